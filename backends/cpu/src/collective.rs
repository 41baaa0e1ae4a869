//! The communicator: ranks are threads of this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use longspan_hal::{Collective, Error, GroupId, P2p, Result, Step, View};

use crate::exchange::{CpuExchange, Draft};
use crate::group::{Member, new_id};
use crate::matching::Offer;
use crate::memory::Buffer;
use crate::round::{Post, Round, Tag};
use crate::stream::Running;
use crate::sync::Deadline;
use crate::table::Access;
use crate::{CpuDevice, CpuStream};

/// One rank's end of a group of threads.
///
/// Dropping it leaves the group once its queued work ran: ranks that still need this one get
/// [`Error::PeerLost`], those that are done do not notice. Dropped by a panic, it ends the group at once.
#[derive(Debug)]
pub struct CpuCollective {
    device: CpuDevice,
    member: Arc<Member>,
    barriers: AtomicU64,
}

impl CpuCollective {
    /// The id of a new group, for ranks of this process.
    pub fn group_id() -> GroupId {
        new_id()
    }

    /// Joins the group `id`; see [`longspan_hal::Backend::join`].
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Invalid`].
    pub fn join(device: &CpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let member = Member::join(id, rank, size, limit, device.personality())?;
        device.set_rank(rank);
        Ok(Self::new(device.clone(), member))
    }

    fn new(device: CpuDevice, member: Arc<Member>) -> Self {
        Self { device, member, barriers: AtomicU64::new(0) }
    }

    /// Whether the group goes on. If it is over since this rank's own stream failed, the stream's error says more.
    fn alive(&self, on: &CpuStream, call: &'static str) -> Result<()> {
        self.member.group.alive(call).map_err(|error| on.failure().unwrap_or(error))
    }

    /// Queues a round, which must run: skipped because its stream failed, this rank is lost to its peers.
    fn queue(
        &self,
        on: &CpuStream,
        call: &'static str,
        accesses: Vec<Access>,
        round: impl FnOnce(&Member, &Running<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.alive(on, call)?;
        let mut ticket = Ticket { member: Arc::clone(&self.member), ran: false };
        on.submit_with(call, accesses, move |running| {
            ticket.ran = true;
            round(&ticket.member, running)
        })
    }
}

/// Gives the group up unless its round runs.
#[derive(Debug)]
struct Ticket {
    member: Arc<Member>,
    ran: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ran {
            self.member.abort();
        }
    }
}

impl Drop for CpuCollective {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.member.abort();
        }
    }
}

impl Collective<CpuDevice> for CpuCollective {
    type Exchange = CpuExchange;

    fn rank(&self) -> u32 {
        self.member.rank
    }

    fn size(&self) -> u32 {
        self.member.group.size()
    }

    fn window(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.device.window(bytes, self.member.group.key());
        let offer = Offer::Window(buffer.as_ref().map(|_| ()).map_err(Error::clone));
        self.member.agree("window", offer)?;
        buffer
    }

    fn prepare(&self, ops: &[P2p<'_, CpuDevice>]) -> Result<CpuExchange> {
        let draft = Draft::new(&self.device, &self.member, ops);
        let offer = Offer::Prepare(draft.as_ref().map(Draft::shapes).map_err(Error::clone));
        let (number, _) = self.member.agree("prepare", offer)?;
        Ok(CpuExchange::new(self.member.group.key(), number, draft?))
    }

    fn staging_bytes(&self, exchange: &CpuExchange) -> usize {
        exchange.staging_bytes()
    }

    fn exchange(&self, on: &CpuStream, exchange: &CpuExchange, sends: &[View<'_, CpuDevice>]) -> Result<()> {
        if exchange.group() != self.member.group.key() {
            return Err(Error::invalid("exchange", "it was prepared by another communicator"));
        }
        self.alive(on, "exchange")?;
        let transfer = exchange.next(sends)?;
        self.queue(on, "exchange", transfer.accesses(), move |member, running| transfer.run(member, running))
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        let (_, group) = self.member.agree("subgroup", Offer::Subgroup(members.to_vec()))?;
        let place = members.iter().position(|&m| m == self.member.rank);
        Ok(group.zip(place).map(|(group, place)| {
            let member = Member { group, rank: place as u32, limit: self.member.limit };
            Self::new(self.device.clone(), Arc::new(member))
        }))
    }

    fn barrier(&self, on: &CpuStream) -> Result<()> {
        self.alive(on, "barrier")?;
        let round = self.barriers.fetch_add(1, Ordering::Relaxed);
        let tag = Tag { call: "barrier", id: 0, round };
        self.queue(on, "barrier", Vec::new(), move |member, running| {
            let peers = (0..member.group.size()).filter(|&peer| peer != member.rank);
            let post = || Post { tag, sends: Vec::new(), recvs: Vec::new(), clock: running.clock() };
            let posts = peers.map(|peer| (peer, post())).collect();
            let deadline = Deadline::after(member.limit);
            let known = Round { group: &member.group, me: member.rank, deadline, tag }.run(posts, |_, _| {})?;
            running.merge(&known);
            Ok(())
        })
    }

    fn progress(&self, step: Step) {
        self.member.group.board().report(self.member.rank, step);
    }

    fn abort(&self) {
        self.member.abort();
    }
}
