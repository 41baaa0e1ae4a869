//! Exchanges: checked and staged once, run any number of times.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use longspan_hal::{DType, Error, Extent, P2p, Result, Strided, View};
use longspan_peers::Message;

use crate::device::GpuDevice;
use crate::driver::Address;
use crate::group::Group;
use crate::memory::Buffer;

/// An exchange that all ranks agreed on.
#[derive(Debug)]
pub struct GpuExchange {
    /// The group that prepared it.
    pub(crate) group: u64,
    /// The number of its `prepare` among the group's.
    pub(crate) id: u64,
    /// This rank's side.
    pub(crate) draft: Draft,
    /// Where this rank's messages arrive, by rank, in list order; between processes.
    abroad: Vec<Vec<Part>>,
    round: AtomicU64,
}

/// Elements in memory.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The memory.
    pub buffer: Buffer,
    /// Which elements.
    pub at: Strided,
}

/// One rank's side of an exchange before the others agreed.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Shapes of the sends, as [`longspan_hal::check_sends`] wants them.
    pub sends: Vec<(DType, Extent)>,
    /// Receivers of the sends.
    pub to: Vec<u32>,
    /// Senders of the receives.
    pub from: Vec<u32>,
    /// Where each message arrives.
    pub recvs: Vec<Part>,
    /// Bytes of the group's staging that a round uses, for messages that must lie dense to travel.
    pub staging: usize,
    /// By how many bytes it grew for this exchange.
    pub grew: usize,
    /// Where in the staging each send would lie.
    pub staged_sends: Vec<Option<Strided>>,
    /// Where in the staging each receive lies, if it is staged.
    pub staged_recvs: Vec<Option<Strided>>,
}

/// Alignment of messages in the staging, in bytes.
const ALIGN: usize = 256;

impl Part {
    /// Address and place of the first element, as [`crate::copy::Job::new`] wants them.
    pub(crate) fn place(&self) -> (Address, &Strided) {
        (self.buffer.address_of(&self.at), &self.at)
    }
}

impl Draft {
    /// Checks what one rank can check alone; `packs` where messages must lie dense to travel.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a peer out of range, a receive outside windows, receives that overlap.
    pub(crate) fn new(group: &Group, ops: &[P2p<'_, GpuDevice>], packs: bool) -> Result<Self> {
        let mut draft = Self {
            sends: Vec::new(),
            to: Vec::new(),
            from: Vec::new(),
            recvs: Vec::new(),
            staging: 0,
            grew: 0,
            staged_sends: Vec::new(),
            staged_recvs: Vec::new(),
        };
        for op in ops {
            let (P2p::Recv { from: peer, .. } | P2p::Send { to: peer, .. }) = *op;
            if peer >= group.size() {
                let why = format!("a message with rank {peer} of a group of {}", group.size());
                return Err(Error::invalid("exchange", why));
            }
            match op {
                P2p::Recv { into, .. } => {
                    if !into.buffer().is_window_of(group.key) {
                        let why = format!("the receive from rank {peer} does not lie in a window of this group");
                        return Err(Error::invalid("exchange", why));
                    }
                    draft.from.push(peer);
                    draft.recvs.push(Part { buffer: into.buffer().clone(), at: *into.at() });
                }
                P2p::Send { dtype, extent, .. } => {
                    draft.to.push(peer);
                    draft.sends.push((*dtype, *extent));
                }
            }
        }
        draft.check_overlap()?;
        draft.stage(group.rank(), packs)?;
        Ok(draft)
    }

    /// What the peers must agree with.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let sends = self.to.iter().zip(&self.sends);
        let sends = sends.map(|(&peer, &(dtype, extent))| Message { receives: false, peer, dtype, extent });
        let recvs = self.from.iter().zip(&self.recvs).map(|(&peer, part)| (peer, part.at));
        let recvs = recvs.map(|(peer, at)| Message { receives: true, peer, dtype: at.dtype(), extent: at.extent() });
        sends.chain(recvs).collect()
    }

    fn check_overlap(&self) -> Result<()> {
        for (i, a) in self.recvs.iter().enumerate() {
            if let Some(j) = self.recvs[..i].iter().position(|b| a.buffer.same(&b.buffer) && a.at.overlaps(&b.at)) {
                return Err(Error::invalid("exchange", format!("receives {j} and {i} overlap in the window")));
            }
        }
        Ok(())
    }

    /// Sizes the staging: sends may be given strided in any round, receives are known to be strided or not.
    fn stage(&mut self, me: u32, packs: bool) -> Result<()> {
        let bytes = &mut self.staging;
        for (&to, &(dtype, extent)) in self.to.iter().zip(&self.sends) {
            self.staged_sends.push(slot(packs && to != me, bytes, dtype, extent)?);
        }
        for (&from, recv) in self.from.iter().zip(&self.recvs) {
            let staged = packs && from != me && !recv.at.is_dense();
            self.staged_recvs.push(slot(staged, bytes, recv.at.dtype(), recv.at.extent())?);
        }
        Ok(())
    }

    /// Messages to and from `peer`: indices of sends and of receives.
    pub(crate) fn sends_to(&self, peer: u32) -> impl Iterator<Item = usize> + '_ {
        (0..self.to.len()).filter(move |&i| self.to[i] == peer)
    }

    /// Indices of the receives from `peer`.
    pub(crate) fn recvs_from(&self, peer: u32) -> impl Iterator<Item = usize> + '_ {
        (0..self.from.len()).filter(move |&i| self.from[i] == peer)
    }
}

/// A dense place in the staging for one message.
fn slot(staged: bool, bytes: &mut usize, dtype: DType, extent: Extent) -> Result<Option<Strided>> {
    let dense = Strided::dense(dtype, extent);
    if !staged || dense.is_empty() {
        return Ok(None);
    }
    let at = dense.shifted(*bytes / dtype.size())?;
    *bytes = at.byte_range().end.next_multiple_of(ALIGN);
    Ok(Some(at))
}

impl GpuExchange {
    /// The exchange that the ranks agreed on in `prepare` number `id` of `group`; `abroad` between processes.
    pub(crate) fn new(group: u64, id: u64, draft: Draft, abroad: Vec<Vec<Part>>) -> Self {
        Self { group, id, draft, abroad, round: AtomicU64::new(0) }
    }

    /// Bytes by which the group's staging grew for it.
    pub(crate) fn staging_bytes(&self) -> usize {
        self.draft.grew
    }

    /// The number and the checked sends of the next round.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a view differs from its send or overlaps a receive of this round.
    pub(crate) fn next(&self, sends: &[View<'_, GpuDevice>]) -> Result<(u64, Vec<Part>)> {
        longspan_hal::check_sends(&self.draft.sends, sends)?;
        for (i, view) in sends.iter().enumerate() {
            if self.draft.recvs.iter().any(|r| view.aliases(&r.buffer, &r.at)) {
                return Err(Error::invalid("sends", format!("view {i} overlaps a receive of the same exchange")));
            }
        }
        let parts = sends.iter().map(|v| Part { buffer: v.buffer().clone(), at: *v.at() }).collect();
        Ok((self.round.fetch_add(1, Ordering::Relaxed), parts))
    }

    /// Where this rank's messages arrive at `peer`, another process, in list order.
    pub(crate) fn parts_at(&self, peer: u32) -> &[Part] {
        self.abroad.get(peer as usize).map_or(&[], Vec::as_slice)
    }

    /// Where messages from `peer` arrive, in list order.
    pub(crate) fn parts_from(&self, peer: u32) -> Arc<Vec<Part>> {
        Arc::new(self.draft.recvs_from(peer).map(|i| self.draft.recvs[i].clone()).collect())
    }
}
