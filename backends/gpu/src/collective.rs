//! The communicator: ranks are threads of this process, on devices of their own or on shared ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::{Collective, Error, GroupId, P2p, Result, Step, Transport, View};

use crate::device::GpuDevice;
use crate::exchange::{Draft, GpuExchange};
use crate::group::Member;
use crate::matching::{Agreement, Offer};
use crate::memory::Buffer;
use crate::nccl::Comm;
use crate::peer::{Round, Tag};
use crate::stream::GpuStream;
use crate::sync::{Deadline, lock};

/// One rank's end of a group.
///
/// Dropping it leaves the group: ranks that still need this one get [`Error::PeerLost`].
#[derive(Debug)]
pub struct GpuCollective {
    device: GpuDevice,
    member: Arc<Member>,
    /// The device of each rank.
    devices: Vec<u32>,
    wire: Wire,
    barriers: AtomicU64,
    /// Rounds are queued one after the other.
    order: Mutex<()>,
}

/// How messages travel.
#[derive(Debug)]
enum Wire {
    Nccl(Comm),
    Peer,
}

/// What the caller, or else `LONGSPAN_EXCHANGE`, asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wish {
    /// Peer where all devices reach each other, else NCCL.
    Auto,
    Nccl,
    Peer,
}

impl Wish {
    /// What `transport` says, or else the variable.
    fn new(transport: Option<Transport>) -> Result<Self> {
        match transport {
            Some(Transport::Library) => Ok(Self::Nccl),
            Some(Transport::Peer) => Ok(Self::Peer),
            Some(_) => Ok(Self::Auto),
            None => Self::parse(std::env::var("LONGSPAN_EXCHANGE").ok().as_deref()),
        }
    }

    fn parse(text: Option<&str>) -> Result<Self> {
        match text {
            None | Some("" | "auto") => Ok(Self::Auto),
            Some("nccl") => Ok(Self::Nccl),
            Some("peer") => Ok(Self::Peer),
            Some(other) => Err(Error::invalid("LONGSPAN_EXCHANGE", format!("{other:?} is not auto, nccl or peer"))),
        }
    }

    /// How messages travel: `Ok(true)` by peer copies.
    fn peer(self, devices: &[u32], unreachable: Option<(u32, u32)>) -> Result<bool> {
        let distinct = {
            let mut sorted = devices.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            sorted.len() == devices.len()
        };
        match (self, unreachable) {
            (Self::Auto | Self::Peer, None) => Ok(true),
            (Self::Peer, Some((a, b))) => {
                let why = format!("device {a} can't access memory of device {b}; use auto or nccl");
                Err(Error::invalid("exchange", why))
            }
            (Self::Auto | Self::Nccl, _) if distinct => Ok(false),
            (Self::Auto | Self::Nccl, _) => {
                let why = format!("NCCL needs a device for each rank, the ranks are on devices {devices:?}");
                Err(Error::invalid("exchange", why))
            }
        }
    }
}

impl GpuCollective {
    /// Joins the group `id`; see [`longspan_hal::Backend::join`].
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Invalid`], [`Error::Unavailable`].
    pub(crate) fn join(device: &GpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let member = Member::join(&device.context().machine.groups, id, rank, size, limit)?;
        let (_, agreed) = member.agree("join", Offer::Device(device.context().ordinal))?;
        let Agreement::Devices(devices) = agreed else {
            return Err(Error::invalid("group", "the ranks did not tell their devices"));
        };
        Self::new(device.clone(), member, devices)
    }

    fn new(device: GpuDevice, member: Arc<Member>, devices: Vec<u32>) -> Result<Self> {
        let context = device.context();
        let wire = if Wish::new(context.machine.transport())?.peer(&devices, context.unreachable(&devices)?)? {
            context.enable_peers(&devices)?;
            Wire::Peer
        } else {
            Wire::Nccl(Comm::new(context, &member)?)
        };
        Ok(Self { device, member, devices, wire, barriers: AtomicU64::new(0), order: Mutex::new(()) })
    }

    /// Runs `queue` for a round on `on`. If it fails, this rank is lost to its peers.
    fn round(&self, on: &GpuStream, tag: Tag, queue: impl FnOnce(&Round<'_>) -> Result<()>) -> Result<()> {
        let _bound = self.device.context().bind()?;
        let deadline = Deadline::after(self.member.limit);
        let result = queue(&Round { member: &self.member, on, tag, deadline });
        if result.is_err() {
            self.member.abort();
        }
        result
    }

    fn own(&self, on: &GpuStream) -> Result<()> {
        if std::ptr::eq(on.context(), self.device.context()) {
            return Ok(());
        }
        Err(Error::invalid("stream", format!("it is of device {}", on.context().ordinal)))
    }
}

impl Drop for GpuCollective {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.member.abort();
        }
    }
}

impl Collective<GpuDevice> for GpuCollective {
    type Exchange = GpuExchange;

    fn rank(&self) -> u32 {
        self.member.rank
    }

    fn size(&self) -> u32 {
        self.member.group.size
    }

    fn window(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.device.window(bytes, self.member.group.key);
        let offer = Offer::Window(buffer.as_ref().map(|_| ()).map_err(Error::clone));
        self.member.agree("window", offer)?;
        buffer
    }

    fn prepare(&self, ops: &[P2p<'_, GpuDevice>]) -> Result<GpuExchange> {
        let draft = Draft::new(&self.device, &self.member, ops, matches!(self.wire, Wire::Nccl(_)));
        let offer = Offer::Prepare(draft.as_ref().map(Draft::shapes).map_err(Error::clone));
        let (number, _) = self.member.agree("prepare", offer)?;
        Ok(GpuExchange::new(self.member.group.key, number, draft?))
    }

    fn staging_bytes(&self, exchange: &GpuExchange) -> usize {
        exchange.staging_bytes()
    }

    fn exchange(&self, on: &GpuStream, exchange: &GpuExchange, sends: &[View<'_, GpuDevice>]) -> Result<()> {
        if exchange.group != self.member.group.key {
            return Err(Error::invalid("exchange", "it was prepared by another communicator"));
        }
        self.own(on)?;
        self.member.alive("exchange")?;
        let _order = lock(&self.order);
        let (round, parts) = exchange.next(sends)?;
        let tag = Tag { call: "exchange", id: exchange.id, round };
        self.round(on, tag, |round| match &self.wire {
            Wire::Nccl(comm) => comm.exchange(round, exchange, &parts),
            Wire::Peer => round.exchange(exchange, &parts),
        })
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        let (_, agreed) = self.member.agree("subgroup", Offer::Subgroup(members.to_vec()))?;
        let place = members.iter().position(|&m| m == self.member.rank);
        let (Agreement::Group(group), Some(place)) = (agreed, place) else { return Ok(None) };
        let member = Member { group, rank: place as u32, limit: self.member.limit };
        let devices = members.iter().filter_map(|&m| self.devices.get(m as usize).copied()).collect();
        Self::new(self.device.clone(), Arc::new(member), devices).map(Some)
    }

    fn barrier(&self, on: &GpuStream) -> Result<()> {
        self.own(on)?;
        self.member.alive("barrier")?;
        let _order = lock(&self.order);
        let tag = Tag { call: "barrier", id: 0, round: self.barriers.fetch_add(1, Ordering::Relaxed) };
        let others: Vec<u32> = (0..self.size()).filter(|&p| p != self.rank()).collect();
        self.round(on, tag, |round| round.meet(&others))
    }

    fn progress(&self, step: Step) {
        self.member.group.board.report(self.member.rank, step);
    }

    fn abort(&self) {
        self.member.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wish_is_auto_nccl_or_peer() {
        let of = |text| Wish::parse(text).ok();
        assert_eq!([None, Some(""), Some("auto")].map(of), [Some(Wish::Auto); 3]);
        assert_eq!([Some("nccl"), Some("peer"), Some("mpi")].map(of), [Some(Wish::Nccl), Some(Wish::Peer), None]);
    }

    #[test]
    fn what_the_caller_says_comes_before_the_variable() {
        let given = [Transport::Auto, Transport::Library, Transport::Peer].map(|t| Wish::new(Some(t)).ok());
        assert_eq!(given, [Some(Wish::Auto), Some(Wish::Nccl), Some(Wish::Peer)]);
    }

    #[test]
    fn auto_takes_peer_where_all_reach_each_other_and_nccl_needs_a_device_for_each_rank() {
        let far = Some((0, 1));
        assert_eq!(Wish::Auto.peer(&[0, 0, 1], None), Ok(true));
        assert_eq!(Wish::Auto.peer(&[0, 1], far), Ok(false));
        assert_eq!(Wish::Nccl.peer(&[0, 1], None), Ok(false));
        assert!(Wish::Auto.peer(&[0, 0, 1], far).is_err());
        assert!(Wish::Nccl.peer(&[0, 0], None).is_err());
        assert!(Wish::Peer.peer(&[0, 1], far).is_err());
    }
}
