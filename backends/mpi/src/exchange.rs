//! Prepared exchanges: matched and typed once, run any number of times.
//!
//! ```text
//! round on a stream:  messages to oneself are copied
//!                     large strided sends are packed into the group's staging
//!                     every receive is posted, then every send; small strided views travel as derived datatypes
//!                     wait for all (`flight.rs`)
//!                     staging -> the large strided receives
//! ```
//!
//! Both libraries move a derived datatype slower than a copy of ours and a dense message, the more so the larger it is (the
//! figures are in the README), but small ones faster. The staging is one for all exchanges of a group, which run one after
//! the other; a round that finds it in use sends derived datatypes.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use longspan_cpu::transport::{Key, Part};
use longspan_cpu::{Buffer, CpuDevice};
use longspan_hal::{DType, Error, Extent, P2p, Result, Strided, View, check_sends};
use longspan_peers::{Member, Message as Agreed};

use crate::datatype::{Datatype, is_contiguous};
use crate::flight::{Flight, Message};
use crate::world::World;

/// Send views whose types an exchange remembers: an algorithm sends from a few places in turn.
const REMEMBERED: usize = 64;

/// Strided messages from this size on, in bytes, are packed.
const PACKED: usize = 64 << 10;

/// Alignment of messages in the staging, in bytes.
const ALIGN: usize = 256;

/// An exchange that all ranks agreed on.
#[derive(Debug)]
pub struct MpiExchange {
    /// The group that prepared it.
    pub(crate) group: Key,
    pub(crate) tag: c_int,
    /// Bytes by which the group's staging grew for it.
    pub(crate) staging: usize,
    sends: Vec<(DType, Extent)>,
    to: Vec<u32>,
    from: Vec<u32>,
    receives: Vec<Part>,
    types: Vec<Arc<Datatype>>,
    /// Types of views that were sent, the last used at the end.
    sent: Mutex<Vec<(Strided, Arc<Datatype>)>>,
}

/// Checks what one rank can check alone; its messages, as the others have to agree with.
///
/// # Errors
/// [`Error::Invalid`] for a peer out of range, a receive outside windows, receives that overlap.
pub(crate) fn messages(ops: &[P2p<'_, CpuDevice>], group: Key, size: u32) -> Result<Vec<Agreed>> {
    let invalid = |why: String| Err(Error::invalid("exchange", why));
    let (mut all, mut windows): (_, Vec<Part>) = (Vec::with_capacity(ops.len()), Vec::new());
    for op in ops {
        let (receives, peer, dtype, extent) = match op {
            P2p::Recv { from, into } => (true, *from, into.dtype(), into.extent()),
            P2p::Send { to, dtype, extent } => (false, *to, *dtype, *extent),
        };
        if peer >= size {
            return invalid(format!("a message with rank {peer} of a group of {size}"));
        }
        if let P2p::Recv { into, .. } = op {
            let part = Part::of_mut(into);
            if !part.is_in_window_of(group) {
                return invalid(format!("the receive from rank {peer} does not lie in a window of this group"));
            }
            if let Some(other) = windows.iter().position(|w| w.overlaps(&part)) {
                return invalid(format!("receives {other} and {} overlap in the window", windows.len()));
            }
            windows.push(part);
        }
        all.push(Agreed { receives, peer, dtype, extent });
    }
    Ok(all)
}

impl MpiExchange {
    /// The exchange of `ops`, which [`messages`] has checked.
    ///
    /// # Errors
    /// [`Error::Driver`] if MPI has no room for a type.
    pub(crate) fn new(group: Key, tag: c_int, ops: &[P2p<'_, CpuDevice>]) -> Result<Self> {
        let mut this = Self {
            group,
            tag,
            staging: 0,
            sends: Vec::new(),
            to: Vec::new(),
            from: Vec::new(),
            receives: Vec::new(),
            types: Vec::new(),
            sent: Mutex::default(),
        };
        for op in ops {
            match op {
                P2p::Recv { from, into } => {
                    this.from.push(*from);
                    this.types.push(Arc::new(Datatype::new(into.at())?));
                    this.receives.push(Part::of_mut(into));
                }
                P2p::Send { to, dtype, extent } => {
                    this.to.push(*to);
                    this.sends.push((*dtype, *extent));
                }
            }
        }
        Ok(this)
    }

    /// Bytes of staging that a round may use: what it sends may be strided, what it receives is known to be.
    pub(crate) fn staging_bytes(&self, me: u32) -> usize {
        let sends = self.to.iter().zip(&self.sends).filter(|(to, _)| **to != me);
        let sends = sends.map(|(_, &(dtype, extent))| Strided::dense(dtype, extent));
        let receives = self.from.iter().zip(&self.receives).filter(|(from, _)| **from != me).map(|(_, r)| *r.at());
        let large = |at: &Strided| at.bytes() >= PACKED;
        sends.filter(large).chain(receives.filter(|at| large(at) && !is_contiguous(at))).map(|at| room(&at)).sum()
    }

    /// The checked arguments of a round.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a view differs from its send or overlaps a receive of this round.
    pub(crate) fn round(self: &Arc<Self>, views: &[View<'_, CpuDevice>]) -> Result<Round> {
        check_sends(&self.sends, views)?;
        let sends: Vec<Part> = views.iter().map(Part::of).collect();
        for (i, send) in sends.iter().enumerate() {
            if self.receives.iter().any(|r| send.overlaps(r)) {
                return Err(Error::invalid("sends", format!("view {i} overlaps a receive of the same exchange")));
            }
        }
        let types = sends.iter().map(|part| self.type_of(part.at())).collect::<Result<_>>()?;
        Ok(Round { exchange: Arc::clone(self), sends, types })
    }

    /// The type of a view, from those that were sent before if it is among them.
    fn type_of(&self, at: &Strided) -> Result<Arc<Datatype>> {
        // The type begins at the first element, wherever that lies.
        let shape = Strided::new(at.dtype(), 0, at.extent(), at.strides())?;
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = sent.iter().position(|(known, _)| *known == shape) {
            let found = sent.remove(i);
            let kind = Arc::clone(&found.1);
            sent.push(found);
            return Ok(kind);
        }
        let kind = Arc::new(Datatype::new(&shape)?);
        if sent.len() >= REMEMBERED {
            sent.remove(0);
        }
        sent.push((shape, Arc::clone(&kind)));
        Ok(kind)
    }
}

/// Bytes of a message in the staging.
fn room(at: &Strided) -> usize {
    at.bytes().next_multiple_of(ALIGN)
}

/// Places in the staging, given out one after the other.
struct Staging<'a> {
    buffer: Option<&'a Buffer>,
    used: usize,
}

impl Staging<'_> {
    /// A dense place for a message that should not travel as it lies, while there is room.
    fn place(&mut self, at: &Strided) -> Option<Part> {
        if at.bytes() < PACKED || is_contiguous(at) {
            return None;
        }
        let dense = Strided::dense(at.dtype(), at.extent()).shifted(self.used / at.dtype().size()).ok()?;
        let part = Part::new(self.buffer?, dense).ok()?;
        self.used += room(at);
        Some(part)
    }
}

/// A round on its way.
pub(crate) struct Started {
    pub flight: Flight,
    /// Copies to make when all has arrived.
    unpack: Vec<(Part, Part)>,
}

impl Started {
    /// Waits until everything arrived where it belongs.
    ///
    /// # Errors
    /// As [`Flight::wait`].
    pub fn finish(self, member: &Member, round: u64) -> Result<()> {
        self.flight.wait(member, "exchange", round)?;
        for (staged, receive) in self.unpack {
            // SAFETY: this is the job that named the receive; the staging is its own for the round.
            unsafe { staged.copy_to(&receive) };
        }
        Ok(())
    }
}

/// One round on one rank.
#[derive(Debug)]
pub(crate) struct Round {
    exchange: Arc<MpiExchange>,
    sends: Vec<Part>,
    types: Vec<Arc<Datatype>>,
}

impl Round {
    /// What it reads.
    pub fn reads(&self) -> &[Part] {
        &self.sends
    }

    /// What it writes.
    pub fn writes(&self) -> &[Part] {
        &self.exchange.receives
    }

    /// Copies messages to oneself, packs, and posts the others; `processes` are the ranks' places in the job.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn start(self, world: &World, me: u32, processes: &[u32], staging: Option<&Buffer>) -> Result<Started> {
        let exchange = &self.exchange;
        let own = |peers: &[u32]| (0..peers.len()).filter(|&i| peers[i] == me).collect::<Vec<_>>();
        for (s, r) in own(&exchange.to).into_iter().zip(own(&exchange.from)) {
            // SAFETY: this is the job that named both; that they do not overlap was checked.
            unsafe { self.sends[s].copy_to(&exchange.receives[r]) };
        }
        let (mut staging, mut messages, mut unpack) = (Staging { buffer: staging, used: 0 }, Vec::new(), Vec::new());
        let lists = [
            (true, &exchange.from, &exchange.receives, &exchange.types),
            (false, &exchange.to, &self.sends, &self.types),
        ];
        for (receive, peers, parts, types) in lists {
            for ((&peer, part), kind) in peers.iter().zip(parts).zip(types) {
                if peer == me || part.at().is_empty() {
                    continue;
                }
                let at = match staging.place(part.at()) {
                    Some(staged) => {
                        let kind = exchange.type_of(staged.at())?;
                        if receive {
                            unpack.push((staged.clone(), part.clone()));
                        } else {
                            // SAFETY: this is the job that named the send; the staging is its own for the round.
                            unsafe { part.copy_to(&staged) };
                        }
                        (staged, kind)
                    }
                    None => (part.clone(), Arc::clone(kind)),
                };
                let process = processes.get(peer as usize).copied().unwrap_or(peer);
                messages.push(Message { peer, process, receive, at: Some(at) });
            }
        }
        Ok(Started { flight: Flight::post(world, exchange.tag, messages)?, unpack })
    }
}
