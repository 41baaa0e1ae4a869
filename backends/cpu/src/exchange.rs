//! Prepared exchanges: checked and staged once, run any number of times.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use longspan_hal::{DType, Device, Error, Extent, P2p, Result, Strided, View};

use crate::CpuDevice;
use crate::device::copy_between;
use crate::group::Member;
use crate::matching::Shape;
use crate::memory::{ALIGN, Buffer};
use crate::round::{Part, Post, Round, Tag};
use crate::stream::Running;
use crate::sync::Deadline;
use crate::table::Access;

/// An exchange that all ranks agreed on.
#[derive(Debug)]
pub struct CpuExchange {
    prepared: Arc<Prepared>,
    round: AtomicU64,
}

/// The part of an exchange that its rounds share.
#[derive(Debug)]
pub(crate) struct Prepared {
    group: u64,
    id: u64,
    draft: Draft,
}

/// One rank's side of an exchange before the others agreed.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    /// Shapes of the sends, as [`longspan_hal::check_sends`] wants them.
    pub sends: Vec<(DType, Extent)>,
    to: Vec<u32>,
    from: Vec<u32>,
    recvs: Vec<Part>,
    staging: Option<Buffer>,
    /// Where in the staging each send and receive lies, if it is staged.
    staged_sends: Vec<Option<Strided>>,
    staged_recvs: Vec<Option<Strided>>,
}

impl Draft {
    /// Checks what one rank can check alone and sizes the staging.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a peer out of range, a receive outside windows, receives that overlap;
    /// [`Error::OutOfMemory`].
    pub(crate) fn new(device: &CpuDevice, member: &Member, ops: &[P2p<'_, CpuDevice>]) -> Result<Self> {
        let mut draft = Self::default();
        for op in ops {
            draft.add(member, op)?;
        }
        draft.check_overlap()?;
        draft.stage(device, member)?;
        Ok(draft)
    }

    /// What the peers must agree with.
    pub(crate) fn shapes(&self) -> Vec<Shape> {
        let sends = self.to.iter().zip(&self.sends);
        let sends = sends.map(|(&peer, &(dtype, extent))| Shape { peer, send: true, dtype, extent });
        let recvs = self.from.iter().zip(&self.recvs);
        let recvs = recvs.map(|(&peer, r)| Shape { peer, send: false, dtype: r.at.dtype(), extent: r.at.extent() });
        sends.chain(recvs).collect()
    }

    fn add(&mut self, member: &Member, op: &P2p<'_, CpuDevice>) -> Result<()> {
        let (P2p::Recv { from: peer, .. } | P2p::Send { to: peer, .. }) = *op;
        if peer >= member.group.size() {
            let why = format!("a message with rank {peer} of a group of {}", member.group.size());
            return Err(Error::invalid("exchange", why));
        }
        match op {
            P2p::Recv { into, .. } => {
                if !into.buffer().is_window_of(member.group.key()) {
                    let why = format!("the receive from rank {peer} does not lie in a window of this group");
                    return Err(Error::invalid("exchange", why));
                }
                self.from.push(peer);
                self.recvs.push(Part { buffer: into.buffer().clone(), at: *into.at() });
            }
            P2p::Send { dtype, extent, .. } => {
                self.to.push(peer);
                self.sends.push((*dtype, *extent));
            }
        }
        Ok(())
    }

    fn check_overlap(&self) -> Result<()> {
        for (i, a) in self.recvs.iter().enumerate() {
            if let Some(j) = self.recvs[..i].iter().position(|b| a.buffer.same(&b.buffer) && a.at.overlaps(&b.at)) {
                return Err(Error::invalid("exchange", format!("receives {j} and {i} overlap in the window")));
            }
        }
        Ok(())
    }

    fn stage(&mut self, device: &CpuDevice, member: &Member) -> Result<()> {
        let personality = member.group.personality();
        let mut bytes = 0;
        for (&to, &(dtype, extent)) in self.to.iter().zip(&self.sends) {
            let staged = personality.stages() && to != member.rank;
            self.staged_sends.push(slot(staged, &mut bytes, dtype, extent)?);
        }
        for (&from, recv) in self.from.iter().zip(&self.recvs) {
            let staged = personality.packs() && from != member.rank && !recv.at.is_dense();
            self.staged_recvs.push(slot(staged, &mut bytes, recv.at.dtype(), recv.at.extent())?);
        }
        if bytes > 0 {
            self.staging = Some(device.alloc(bytes)?);
        }
        Ok(())
    }

    fn staged(&self, at: Option<Strided>) -> Option<Part> {
        Some(Part { buffer: self.staging.clone()?, at: at? })
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

impl CpuExchange {
    /// The exchange that the ranks agreed on in their common call `id` of `group`.
    pub(crate) fn new(group: u64, id: u64, draft: Draft) -> Self {
        Self { prepared: Arc::new(Prepared { group, id, draft }), round: AtomicU64::new(0) }
    }

    /// Bytes of staging.
    pub(crate) fn staging_bytes(&self) -> usize {
        self.prepared.draft.staging.as_ref().map_or(0, Buffer::bytes)
    }

    /// The group that prepared it.
    pub(crate) fn group(&self) -> u64 {
        self.prepared.group
    }

    /// The checked arguments of the next round.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a view differs from its send or overlaps a receive of this round.
    pub(crate) fn next(&self, sends: &[View<'_, CpuDevice>]) -> Result<Transfer> {
        let draft = &self.prepared.draft;
        longspan_hal::check_sends(&draft.sends, sends)?;
        for (i, view) in sends.iter().enumerate() {
            if draft.recvs.iter().any(|r| view.aliases(&r.buffer, &r.at)) {
                return Err(Error::invalid("sends", format!("view {i} overlaps a receive of the same exchange")));
            }
        }
        let round = self.round.fetch_add(1, Ordering::Relaxed);
        let sends = sends.iter().map(|v| Part { buffer: v.buffer().clone(), at: *v.at() }).collect();
        Ok(Transfer { prepared: Arc::clone(&self.prepared), round, sends })
    }
}

/// One round of an exchange on one rank.
#[derive(Debug)]
pub(crate) struct Transfer {
    prepared: Arc<Prepared>,
    round: u64,
    sends: Vec<Part>,
}

impl Transfer {
    /// What the round touches of this rank's memory.
    pub(crate) fn accesses(&self) -> Vec<Access> {
        let draft = &self.prepared.draft;
        let access = |part: &Part, write| Access { buffer: part.buffer.clone(), at: part.at, write };
        let staged = draft.staged_sends.iter().chain(&draft.staged_recvs);
        let staged = staged.filter_map(|&at| draft.staged(at)).map(|part| access(&part, true));
        let sends = self.sends.iter().map(|part| access(part, false));
        sends.chain(draft.recvs.iter().map(|part| access(part, true))).chain(staged).collect()
    }

    /// Runs the round, on the stream's worker.
    pub(crate) fn run(&self, member: &Member, on: &Running<'_>) -> Result<()> {
        let personality = member.group.personality();
        let draft = &self.prepared.draft;
        let tag = Tag { call: "exchange", id: self.prepared.id, round: self.round };
        let mut delays = personality.delays(tag.id, tag.round, member.rank);
        self.copy_to_self(member.rank);
        if personality.packs() {
            self.pack();
        }
        let posts = self.posts(member, tag, on);
        let deadline = Deadline::after(member.limit);
        let round = Round { group: &member.group, me: member.rank, deadline, tag };
        let known = round.run(posts, |from, to| {
            delays.sleep();
            move_messages(from, to);
        })?;
        on.merge(&known);
        for (recv, at) in draft.recvs.iter().zip(&draft.staged_recvs) {
            if let Some(staged) = draft.staged(*at) {
                copy_part(&staged, recv);
            }
        }
        if personality.pushes() {
            delays.sleep();
        }
        Ok(())
    }

    /// Messages to oneself, in list order.
    fn copy_to_self(&self, me: u32) {
        let draft = &self.prepared.draft;
        let own = |peers: &[u32]| peers.iter().enumerate().filter(|p| *p.1 == me).map(|p| p.0).collect::<Vec<_>>();
        for (s, r) in own(&draft.to).into_iter().zip(own(&draft.from)) {
            copy_part(&self.sends[s], &draft.recvs[r]);
        }
    }

    fn pack(&self) {
        let draft = &self.prepared.draft;
        for (send, at) in self.sends.iter().zip(&draft.staged_sends) {
            if let Some(staged) = draft.staged(*at) {
                copy_part(send, &staged);
            }
        }
    }

    /// What this rank lays down for each peer.
    fn posts(&self, member: &Member, tag: Tag, on: &Running<'_>) -> Vec<(u32, Post)> {
        let draft = &self.prepared.draft;
        let mut peers: Vec<u32> = draft.to.iter().chain(&draft.from).copied().filter(|&p| p != member.rank).collect();
        peers.sort_unstable();
        peers.dedup();
        let post = |peer: u32| {
            let sends = (0..draft.to.len()).filter(|&i| draft.to[i] == peer).map(|i| self.offer(member, i));
            let recvs = (0..draft.from.len()).filter(|&i| draft.from[i] == peer);
            let recvs = recvs.map(|i| draft.staged(draft.staged_recvs[i]).unwrap_or_else(|| draft.recvs[i].clone()));
            Post { tag, sends: sends.collect(), recvs: recvs.collect(), clock: on.clock() }
        };
        peers.into_iter().map(|peer| (peer, post(peer))).collect()
    }

    /// Send `i` as the wire sees it: packed already, on its way through staging, or as it lies.
    fn offer(&self, member: &Member, i: usize) -> (Part, Option<Part>) {
        let (draft, send) = (&self.prepared.draft, self.sends[i].clone());
        match draft.staged(draft.staged_sends[i]) {
            Some(staged) if member.group.personality().packs() => (staged, None),
            Some(staged) if !send.buffer.is_window_of(self.prepared.group) => (send, Some(staged)),
            _ => (send, None),
        }
    }
}

/// Moves the messages of one direction of one pair.
fn move_messages(from: &Post, to: &Post) {
    for ((send, staged), recv) in from.sends.iter().zip(&to.recvs) {
        match staged {
            Some(staged) => {
                copy_part(send, staged);
                copy_part(staged, recv);
            }
            None => copy_part(send, recv),
        }
    }
}

fn copy_part(from: &Part, to: &Part) {
    copy_between(&from.buffer, &from.at, &to.buffer, &to.at);
}
