//! The communicator: ranks are threads of one process or processes, on devices of their own or on shared ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::{Collective, Error, GroupId, P2p, Result, Step, View};
use longspan_peers::{Fields, Reader, judge, offer};

use crate::abroad::Abroad;
use crate::device::GpuDevice;
use crate::exchange::{Draft, GpuExchange, Part};
use crate::flags::Numbered;
use crate::group::{Group, Mail, join, new_id};
use crate::letters::Letters;
use crate::memory::Buffer;
use crate::nccl::Comm;
use crate::neighbours::{Card, Way, way};
use crate::peer::{Lanes, Round, Tag};
use crate::stream::GpuStream;
use crate::sync::{Deadline, lock};
use crate::watch::{By, Watch};

/// One rank's end of a group.
///
/// Dropping it leaves the group: ranks that still need this one get [`Error::PeerLost`]. What it queued still runs. By NCCL it waits
/// for that, and for other processes of this host to drop theirs, until the limit of joining.
#[derive(Debug)]
pub struct GpuCollective {
    device: GpuDevice,
    group: Arc<Group>,
    wire: Wire,
    lanes: Lanes,
    /// Where hosts or devices wait for others without end.
    watch: Option<Arc<Watch>>,
    prepared: AtomicU64,
    barriers: AtomicU64,
    /// Rounds are queued one after the other; this is how many there were.
    rounds: Mutex<u64>,
}

/// How messages travel.
#[derive(Debug)]
enum Wire {
    /// Memory for barriers, where ranks are processes.
    Nccl(Arc<Comm>, Option<Buffer>),
    Peer,
    /// Peer copies into windows of other processes.
    Abroad(Abroad),
}

impl GpuCollective {
    /// Joins the group `id`; see [`longspan_hal::Backend::join`].
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Invalid`], [`Error::Unavailable`].
    pub(crate) fn join(device: &GpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let context = device.context();
        let member = join(id, rank, size, limit)?;
        // Held from here on, so that threads of one process find the same.
        let letters = Letters::of(&id.0, size);
        let own = Card::own(context);
        let said = own.as_ref().map_or_else(|_| Fields::default(), Card::fields);
        let offers = member.agree("join", &said)?;
        own?;
        let cards = offers.iter().map(|offer| Card::read(offer)).collect::<Result<Vec<_>>>()?;
        let _bound = context.bind()?;
        let (wire, mail) = match way(context, &member, &cards)? {
            Way::Threads(devices) => {
                context.enable_peers(&devices)?;
                (Wire::Peer, Mail::Letters(letters))
            }
            Way::Processes(flags, beside) => {
                let mail = Mail::Flags(Arc::clone(&flags));
                (Wire::Abroad(Abroad::new(context, flags, beside)), mail)
            }
            Way::Nccl { threads: true } => {
                (Wire::Nccl(Arc::new(Comm::new(context, &member)?), None), Mail::Letters(letters))
            }
            Way::Nccl { threads: false } => {
                // NCCL's own memory is on no account either.
                let scratch = Buffer::alloc(context, Comm::scratch(size), &Arc::default())?;
                (Wire::Nccl(Arc::new(Comm::new(context, &member)?), Some(scratch)), Mail::None)
            }
        };
        Self::new(device, Group::new(member, mail), wire)
    }

    fn new(device: &GpuDevice, group: Group, wire: Wire) -> Result<Self> {
        let (group, lanes) = (Arc::new(group), Lanes::new(device.context())?);
        let by = match (&wire, &group.mail) {
            (Wire::Nccl(comm, _), _) => Some(By::Nccl(Arc::clone(comm))),
            (_, Mail::Flags(flags)) => Some(By::Flags(Arc::clone(flags))),
            _ => None,
        };
        let watch = by.map(|by| Watch::start(device.context(), &group, by, device.lost())).transpose()?;
        let (prepared, barriers) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { device: device.clone(), group, wire, lanes, watch, prepared, barriers, rounds: Mutex::new(0) })
    }

    /// Runs `queue` for a round on `on`. If it fails, this rank is lost to its peers.
    fn round(
        &self,
        on: &GpuStream,
        tag: Tag,
        rounds: &mut u64,
        queue: impl FnOnce(&Round<'_>) -> Result<()>,
    ) -> Result<()> {
        *rounds += 1;
        let numbered = Numbered { tag, number: *rounds, deadline: Deadline::after(self.group.member.limit) };
        let round = || queue(&Round { group: &self.group, on, lanes: &self.lanes, numbered });
        let result = self.device.context().bind().and_then(|_bound| match &self.watch {
            Some(watch) => watch.round(on, numbered.number, round),
            None => round(),
        });
        result.map_err(|error| self.group.fail(tag.call, error))
    }

    fn own(&self, on: &GpuStream) -> Result<()> {
        if std::ptr::eq(on.context(), self.device.context()) {
            return Ok(());
        }
        Err(Error::invalid("stream", format!("it is of device {}", on.context().ordinal)))
    }

    /// This rank's side of the exchange of `ops`, with what it packs messages in.
    fn draft(&self, ops: &[P2p<'_, GpuDevice>]) -> Result<Draft> {
        let Wire::Nccl(comm, _) = &self.wire else { return Draft::new(&self.group, ops, false) };
        let mut draft = Draft::new(&self.group, ops, true)?;
        draft.grew = comm.packing.grow(&self.device, draft.staging)?;
        Ok(draft)
    }

    /// Opens the windows of other processes that `draft` sends to, if there are any; all ranks could, or none goes on.
    fn open(&self, draft: &Draft, offers: &[Vec<u8>]) -> Result<Vec<Vec<Part>>> {
        let Wire::Abroad(abroad) = &self.wire else { return Ok(Vec::new()) };
        let _bound = self.device.context().bind()?;
        let described = offers.iter().map(|offer| {
            let mut fields = Reader(offer);
            fields.bytes().and_then(|_| fields.bytes())
        });
        let described: Vec<&[u8]> = described
            .collect::<std::io::Result<_>>()
            .map_err(|e| Error::invalid("exchange", format!("an offer can't be read: {e}")))?;
        let opened = abroad.open(self.rank(), draft, &described);
        // Owners keep their windows until everybody has opened them.
        let said = opened.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let all = self.group.agree("open", &Fields(said.into_bytes()))?;
        let opened = opened?;
        match all.iter().enumerate().find(|(_, why)| !why.is_empty()) {
            Some((rank, why)) => {
                Err(Error::invalid("exchange", format!("rank {rank}: {}", String::from_utf8_lossy(why))))
            }
            None => Ok(opened),
        }
    }
}

impl Drop for GpuCollective {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.group.abort();
        }
        if let Some(watch) = &self.watch {
            watch.end();
        }
    }
}

impl Collective<GpuDevice> for GpuCollective {
    type Exchange = GpuExchange;

    fn rank(&self) -> u32 {
        self.group.rank()
    }

    fn size(&self) -> u32 {
        self.group.size()
    }

    fn window(&self, bytes: usize) -> Result<Buffer> {
        let abroad = match &self.wire {
            Wire::Abroad(abroad) => Some(abroad.flags()),
            Wire::Nccl(..) | Wire::Peer => None,
        };
        let buffer = self.device.window(bytes, self.group.key, abroad);
        let mine = match &buffer {
            Ok(_) => Fields::default(),
            Err(Error::OutOfMemory { wanted, free }) => Fields::default().bytes(b"").number(*wanted).number(*free),
            Err(error) => Fields::default().bytes(error.to_string().as_bytes()),
        };
        let offers = self.group.agree("window", &mine)?;
        let buffer = buffer?;
        let Some((rank, offer)) = offers.iter().enumerate().find(|(_, offer)| !offer.is_empty()) else {
            return Ok(buffer);
        };
        let mut fields = Reader(offer);
        Err(match (fields.text(), fields.number(), fields.number()) {
            (Ok(_), Ok(wanted), Ok(free)) => Error::OutOfMemory { wanted, free },
            (why, ..) => Error::invalid("window", format!("rank {rank}: {}", why.unwrap_or_default())),
        })
    }

    fn prepare(&self, ops: &[P2p<'_, GpuDevice>]) -> Result<GpuExchange> {
        let draft = self.draft(ops);
        let messages = draft.as_ref().map(Draft::messages).map_err(Error::clone);
        let described = draft.as_ref().map_or_else(|_| Fields::default(), Abroad::describe);
        let mine = Fields::default().bytes(&offer(&messages).0).bytes(&described.0);
        let offers = self.group.agree("prepare", &mine)?;
        let id = self.prepared.fetch_add(1, Ordering::Relaxed);
        let messages: Vec<Vec<u8>> = offers.iter().map(|o| Reader(o).bytes().unwrap_or_default().to_vec()).collect();
        let draft = draft?;
        judge(&messages)?;
        let abroad = self.open(&draft, &offers)?;
        Ok(GpuExchange::new(self.group.key, id, draft, abroad))
    }

    fn staging_bytes(&self, exchange: &GpuExchange) -> usize {
        exchange.staging_bytes()
    }

    fn exchange(&self, on: &GpuStream, exchange: &GpuExchange, sends: &[View<'_, GpuDevice>]) -> Result<()> {
        if exchange.group != self.group.key {
            return Err(Error::invalid("exchange", "it was prepared by another communicator"));
        }
        self.own(on)?;
        self.group.alive("exchange")?;
        let mut rounds = lock(&self.rounds);
        let (round, parts) = exchange.next(sends)?;
        let tag = Tag { call: "exchange", id: exchange.id, round };
        self.round(on, tag, &mut rounds, |round| match &self.wire {
            Wire::Nccl(comm, _) => comm.exchange(round, exchange, &parts),
            Wire::Peer | Wire::Abroad(_) => round.exchange(exchange, &parts),
        })
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        let place = members.iter().position(|&m| m == self.rank());
        let id = if place == Some(0) { new_id()?.0 } else { Vec::new() };
        let list = members.iter().fold(Fields::default(), |f, &m| f.number(u64::from(m)));
        let offers = self.group.agree("subgroup", &Fields::default().bytes(&list.0).bytes(&id))?;
        let wrong = |why: String| Err(Error::invalid("members", why));
        let ascending = members.windows(2).all(|w| w[0] < w[1]);
        if members.is_empty() || !ascending || members.iter().any(|&m| m >= self.size()) {
            let size = self.size();
            return wrong(format!("{members:?} is not an ascending list of at least one of the ranks 0..{size}"));
        }
        let mut ids = Vec::new();
        for (rank, offer) in offers.iter().enumerate() {
            let mut fields = Reader(offer);
            match (fields.bytes(), fields.bytes()) {
                (Ok(theirs), Ok(id)) if theirs == list.0 => ids.push(id),
                _ => return wrong(format!("rank {rank} names others than rank {}: {members:?}", self.rank())),
            }
        }
        let Some(place) = place else { return Ok(None) };
        let id = GroupId(ids[members[0] as usize].to_vec());
        Self::join(&self.device, &id, place as u32, members.len() as u32, self.group.member.limit).map(Some)
    }

    fn barrier(&self, on: &GpuStream) -> Result<()> {
        self.own(on)?;
        self.group.alive("barrier")?;
        let mut rounds = lock(&self.rounds);
        let tag = Tag { call: "barrier", id: 0, round: self.barriers.fetch_add(1, Ordering::Relaxed) };
        let others: Vec<u32> = (0..self.size()).filter(|&p| p != self.rank()).collect();
        self.round(on, tag, &mut rounds, |round| match &self.wire {
            Wire::Nccl(comm, Some(scratch)) => comm.barrier(round, scratch),
            _ => round.meet(&others),
        })
    }

    fn progress(&self, step: Step) {
        self.group.progress(step);
    }

    fn abort(&self) {
        self.group.abort();
    }
}
