//! The communicator: data through MPI, everything else through the group's board.

use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longspan_cpu::transport::{self, Key, Part};
use longspan_cpu::{Buffer, CpuDevice, CpuStream};
use longspan_hal::{Collective, Device, Error, GroupId, P2p, Result, Step, View};
use longspan_peers::{Board, Fields, Member, Place, Reach, Reader, judge, offer};

use crate::exchange::{MpiExchange, messages};
use crate::flight::{Flight, Message};
use crate::world::{GROUP_TAGS, World, world};

/// Numbers of the groups that this process made.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// One rank's end of a group of processes.
///
/// Dropping it leaves the group once its queued work ran: ranks that still need this one get [`Error::PeerLost`], those that
/// are done do not notice. Dropped by a panic, it ends the group at once.
#[derive(Debug)]
pub struct MpiCollective {
    device: CpuDevice,
    group: Arc<Group>,
    prepared: AtomicU64,
    queued: AtomicU64,
}

/// What queued work needs of the group.
#[derive(Debug)]
struct Group {
    member: Member,
    key: Key,
    world: &'static World,
    /// The ranks' places in the job.
    processes: Vec<u32>,
    /// The first tag of the group, which barriers use.
    tag: u64,
    /// Where large strided messages are packed, for the largest exchange. Held by the round that uses it.
    staging: Mutex<Option<Buffer>>,
}

/// Gives the group up unless its round runs through: skipped or failed, this rank is lost to its peers.
struct Ticket {
    group: Arc<Group>,
    through: bool,
}

impl Ticket {
    fn run(mut self, round: impl FnOnce(&Group) -> Result<()>) -> Result<()> {
        let result = round(&self.group);
        self.through = result.is_ok();
        result
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.through {
            self.group.member.abort();
        }
    }
}

impl MpiCollective {
    /// The id of a new group: its number, which gives its tags, and where its board is, which this process serves.
    pub(crate) fn group_id() -> Result<GroupId> {
        let world = world()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed) * u64::from(world.size) + u64::from(world.rank);
        let reach = if world.is_one_host() { Reach::Host } else { Reach::Network };
        let place = Board::open(reach).map_err(|e| Error::Unavailable {
            library: "the progress board".into(),
            why: format!("no socket could be opened: {e}"),
            how_to_get_it: "set LONGSPAN_ADDRESS to an address of this host that all ranks reach".into(),
        })?;
        Ok(GroupId(Fields::default().number(number).bytes(&place.to_bytes()).0))
    }

    /// Joins the group `id`; see [`longspan_hal::Backend::join`].
    pub(crate) fn join(device: &CpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let world = world()?;
        if rank >= size {
            return Err(Error::invalid("rank", format!("rank {rank} of a group of {size}")));
        }
        let (number, place) =
            parse(id).map_err(|_| Error::invalid("group id", "it was not made by the mpi backend"))?;
        let member = Member::join(&place, rank, size, limit)?;
        let offers = member.agree("join", &Fields::default().number(u64::from(world.rank)))?;
        let processes = offers.iter().map(|o| Reader(o).number().map_or(u32::MAX, |p| p as u32)).collect::<Vec<_>>();
        check_processes(&processes, world.size)?;
        transport::set_rank(device, rank);
        let tag = number * GROUP_TAGS % (world.tags / GROUP_TAGS * GROUP_TAGS).max(GROUP_TAGS);
        let group = Arc::new(Group { member, key: Key::next(), world, processes, tag, staging: Mutex::default() });
        Ok(Self { device: device.clone(), group, prepared: AtomicU64::new(0), queued: AtomicU64::new(0) })
    }

    /// Queues a round, which must run.
    fn queue(
        &self,
        on: &CpuStream,
        call: &'static str,
        [reads, writes]: [&[Part]; 2],
        round: impl FnOnce(&Group, u64) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.group.member.alive(call)?;
        let number = self.queued.fetch_add(1, Ordering::Relaxed) + 1;
        self.group.member.queued(number);
        let ticket = Ticket { group: Arc::clone(&self.group), through: false };
        transport::queue(on, call, reads, writes, move || ticket.run(|group| round(group, number)))
    }
}

fn parse(id: &GroupId) -> std::io::Result<(u64, Place)> {
    let mut fields = Reader(&id.0);
    Ok((fields.number()?, Place::from_bytes(fields.bytes()?)?))
}

/// Every rank is a process of its own, of this job.
fn check_processes(processes: &[u32], size: u32) -> Result<()> {
    for (rank, process) in processes.iter().enumerate() {
        if let Some(other) = processes[..rank].iter().position(|p| p == process) {
            let why = format!(
                "ranks {other} and {rank} are both in process {process} of the MPI job; every rank is a process of its own: \
                 start as many with `mpirun -n {}`",
                processes.len()
            );
            return Err(Error::invalid("ranks", why));
        }
        if *process >= size {
            return Err(Error::invalid("ranks", format!("rank {rank} is no process of this MPI job of {size}")));
        }
    }
    Ok(())
}

impl Group {
    /// Has `bytes` of staging; by how many it grew.
    fn grow(&self, device: &CpuDevice, bytes: usize) -> Result<usize> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let have = staging.as_ref().map_or(0, CpuDevice::bytes);
        if have >= bytes {
            return Ok(0);
        }
        *staging = None;
        *staging = Some(device.alloc(bytes)?);
        Ok(bytes - have)
    }

    /// Every rank hears of every other, directly or not, in log2(size) steps (dissemination barrier: Hensgen, Finkel, Manber,
    /// "Two algorithms for barrier synchronization").
    fn barrier(&self, round: u64) -> Result<()> {
        let (me, size) = (self.member.rank, self.member.size);
        let mut distance = 1;
        while distance < size {
            let message = |receive, peer: u32| {
                let process = self.processes.get(peer as usize).copied().unwrap_or(peer);
                Message { peer, process, receive, at: None }
            };
            let both = vec![message(true, (me + size - distance) % size), message(false, (me + distance) % size)];
            Flight::post(self.world, self.tag as c_int, both)?.wait(&self.member, "barrier", round)?;
            distance = distance.saturating_mul(2);
        }
        Ok(())
    }
}

impl Drop for MpiCollective {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.group.member.abort();
        }
    }
}

impl Collective<CpuDevice> for MpiCollective {
    type Exchange = Arc<MpiExchange>;

    fn rank(&self) -> u32 {
        self.group.member.rank
    }

    fn size(&self) -> u32 {
        self.group.member.size
    }

    fn window(&self, bytes: usize) -> Result<Buffer> {
        let buffer = transport::window(&self.device, bytes, self.group.key);
        let free = match &buffer {
            Err(Error::OutOfMemory { free, .. }) => *free,
            _ => 0,
        };
        let mine = Fields::default().number(u64::from(buffer.is_ok())).number(bytes as u64).number(free);
        let offers = self.group.member.agree("window", &mine)?;
        let buffer = buffer?;
        for offer in &offers {
            let mut fields = Reader(offer);
            if let (Ok(0), Ok(wanted), Ok(free)) = (fields.number(), fields.number(), fields.number()) {
                return Err(Error::OutOfMemory { wanted, free });
            }
        }
        Ok(buffer)
    }

    fn prepare(&self, ops: &[P2p<'_, CpuDevice>]) -> Result<Arc<MpiExchange>> {
        let number = self.prepared.fetch_add(1, Ordering::Relaxed);
        // One tag an exchange: rounds of two exchanges never meet, even where ranks queue them in another order.
        let tag = self.group.tag + 1 + number % (GROUP_TAGS - 1);
        let draft = messages(ops, self.group.key, self.size()).and_then(|m| {
            let mut exchange = MpiExchange::new(self.group.key, tag as c_int, ops)?;
            exchange.staging = self.group.grow(&self.device, exchange.staging_bytes(self.rank()))?;
            Ok((m, exchange))
        });
        let mine = draft.as_ref().map(|(m, _)| m.clone()).map_err(Clone::clone);
        let offers = self.group.member.agree("prepare", &offer(&mine))?;
        let (_, exchange) = draft?;
        judge(&offers)?;
        Ok(Arc::new(exchange))
    }

    fn staging_bytes(&self, exchange: &Arc<MpiExchange>) -> usize {
        exchange.staging
    }

    fn exchange(&self, on: &CpuStream, exchange: &Arc<MpiExchange>, sends: &[View<'_, CpuDevice>]) -> Result<()> {
        if exchange.group != self.group.key {
            return Err(Error::invalid("exchange", "it was prepared by another communicator"));
        }
        let round = exchange.round(sends)?;
        let (reads, writes) = (round.reads().to_vec(), round.writes().to_vec());
        self.queue(on, "exchange", [&reads, &writes], move |group, number| {
            let staging = group.staging.try_lock().ok();
            let buffer = staging.as_ref().and_then(|s| s.as_ref());
            round.start(group.world, group.member.rank, &group.processes, buffer)?.finish(&group.member, number)
        })
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        let me = &self.group.member;
        let place = members.iter().position(|&m| m == me.rank);
        let id = if place == Some(0) { Self::group_id()?.0 } else { Vec::new() };
        let list = members.iter().fold(Fields::default(), |f, &m| f.number(u64::from(m)));
        let offers = me.agree("subgroup", &Fields::default().bytes(&list.0).bytes(&id))?;
        let wrong = |why: String| Err(Error::invalid("members", why));
        let ascending = members.windows(2).all(|w| w[0] < w[1]);
        if members.is_empty() || !ascending || members.iter().any(|&m| m >= me.size) {
            return wrong(format!("{members:?} is not an ascending list of at least one of the ranks 0..{}", me.size));
        }
        let mut ids = Vec::new();
        for (rank, offer) in offers.iter().enumerate() {
            let mut fields = Reader(offer);
            let (Ok(theirs), Ok(id)) = (fields.bytes(), fields.bytes()) else {
                return wrong(format!("the offer of rank {rank} can't be read"));
            };
            if theirs != list.0 {
                return wrong(format!("rank {rank} names other members than {members:?}"));
            }
            ids.push(id);
        }
        let Some(place) = place else { return Ok(None) };
        let id = GroupId(ids[members[0] as usize].to_vec());
        Self::join(&self.device, &id, place as u32, members.len() as u32, me.limit).map(Some)
    }

    fn barrier(&self, on: &CpuStream) -> Result<()> {
        self.queue(on, "barrier", [&[], &[]], Group::barrier)
    }

    fn progress(&self, step: Step) {
        self.group.member.progress(step);
    }

    fn abort(&self) {
        self.group.member.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_processes_of_the_job_and_of_their_own() {
        assert_eq!(check_processes(&[2, 0, 1], 3), Ok(()));
        let text = |list: &[u32]| check_processes(list, 3).expect_err("refused").to_string();
        assert!(
            text(&[0, 1, 0]).contains("ranks 0 and 2 are both in process 0") && text(&[0, 0]).contains("mpirun -n 2")
        );
        assert!(text(&[0, 3]).contains("rank 1 is no process of this MPI job of 3"));
    }
}
