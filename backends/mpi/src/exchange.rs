//! Prepared exchanges: matched and typed once, run any number of times.
//!
//! ```text
//! round on a stream:  messages to oneself are copied
//!                     every receive is posted, then every send; views that are not dense travel as derived datatypes
//!                     wait for all (`flight.rs`)
//! ```

use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use longspan_cpu::CpuDevice;
use longspan_cpu::transport::{Key, Part};
use longspan_hal::{DType, Error, Extent, P2p, Result, Strided, View, check_sends};
use longspan_peers::Message as Agreed;

use crate::datatype::Datatype;
use crate::flight::{Flight, Message};
use crate::world::World;

/// Send views whose types an exchange remembers: an algorithm sends from a few places in turn.
const REMEMBERED: usize = 32;

/// An exchange that all ranks agreed on.
#[derive(Debug)]
pub struct MpiExchange {
    /// The group that prepared it.
    pub(crate) group: Key,
    pub(crate) tag: c_int,
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

    /// Copies messages to oneself and posts the others; `processes` are the ranks' places in the job.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn start(self, world: &World, me: u32, processes: &[u32]) -> Result<Flight> {
        let exchange = &self.exchange;
        let own = |peers: &[u32]| (0..peers.len()).filter(|&i| peers[i] == me).collect::<Vec<_>>();
        for (s, r) in own(&exchange.to).into_iter().zip(own(&exchange.from)) {
            // SAFETY: this is the job that named both; that they do not overlap was checked.
            unsafe { self.sends[s].copy_to(&exchange.receives[r]) };
        }
        let message = |receive, peer: u32, part: &Part, kind: &Arc<Datatype>| Message {
            peer,
            process: processes.get(peer as usize).copied().unwrap_or(peer),
            receive,
            at: Some((part.clone(), Arc::clone(kind))),
        };
        let all = |receive, peers: &[u32], parts: &[Part], types: &[Arc<Datatype>]| {
            let others = (0..peers.len()).filter(|&i| peers[i] != me && !parts[i].at().is_empty());
            others.map(|i| message(receive, peers[i], &parts[i], &types[i])).collect::<Vec<_>>()
        };
        let mut messages = all(true, &exchange.from, &exchange.receives, &exchange.types);
        messages.extend(all(false, &exchange.to, &self.sends, &self.types));
        Flight::post(world, exchange.tag, messages)
    }
}
