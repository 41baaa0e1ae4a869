//! The communicator: data through HCCL, everything else through the group's board.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ascendcl_sys::{HcclComm, HcclDataType, HcclRootInfo, HcclSendRecvItem};
use longspan_hal::{Collective, Error, GroupId, P2p, Result, Step, View};
use longspan_peers::{Board, Fields, Member, Place, Reach, Reader, judge, offer};

use crate::context::{Context, check_hccl, lock, start};
use crate::exchange::{AllToAll, AscendExchange, messages};
use crate::memory::AscendBuffer;
use crate::stream::Kept;
use crate::watch::Watch;
use crate::{AscendDevice, AscendEvent, AscendStream};

const ROOT: usize = size_of::<HcclRootInfo>();

/// Distinct for every communicator of the process; 0 is none.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// One rank's end of a communicator.
#[derive(Debug)]
pub struct AscendCollective {
    device: AscendDevice,
    key: u64,
    member: Arc<Member>,
    /// None in a group of one.
    comm: Option<Arc<Comm>>,
    watch: Arc<Watch>,
    /// The end of the last round and its number: rounds run in order, whatever streams they are on.
    last: Mutex<(u64, Option<AscendEvent>)>,
}

/// The vendor's communicator.
#[derive(Debug)]
struct Comm {
    context: Arc<Context>,
    raw: usize,
}

impl Drop for Comm {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by HCCL, ended once. A failure leaks.
            let _ = unsafe { (self.context.api.hccl.HcclCommDestroy)(self.raw as HcclComm) };
        }
    }
}

impl AscendCollective {
    /// The id of a new group: HCCL's root info and the address of the board, which this process serves.
    pub(crate) fn group_id(context: &Context) -> Result<GroupId> {
        start(context.api)?;
        context.bind()?;
        let mut root = Box::new(HcclRootInfo { internal: [0; ROOT] });
        // SAFETY: the pointer is valid for the write.
        check_hccl("HcclGetRootInfo", unsafe { (context.api.hccl.HcclGetRootInfo)(&mut *root) })?;
        let place = Board::open(Reach::of_job()).map_err(|e| Error::Unavailable {
            library: "the progress board".into(),
            why: format!("no socket could be opened: {e}"),
            how_to_get_it: "set LONGSPAN_ADDRESS to an address of this host that all ranks reach".into(),
        })?;
        let mut bytes: Vec<u8> = root.internal.iter().map(|&c| c as u8).collect();
        bytes.extend(place.to_bytes());
        Ok(GroupId(bytes))
    }

    /// Joins the group `id`; see [`longspan_hal::Backend::join`].
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Invalid`], [`Error::Driver`].
    pub fn join(device: &AscendDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        if rank >= size {
            return Err(Error::invalid("rank", format!("rank {rank} of a group of {size}")));
        }
        let bad = || Error::invalid("group id", "it was not made by the ascend backend");
        let (root, place) = id.0.split_at_checked(ROOT).ok_or_else(bad)?;
        let place = Place::from_bytes(place).map_err(|_| bad())?;
        let member = Arc::new(Member::join(&place, rank, size, limit)?);
        let context = &device.0.context;
        let comm = if size == 1 { None } else { Some(Arc::new(Comm::new(context, root, rank, size)?)) };
        let no_thread = |e: std::io::Error| Error::Unavailable {
            library: "a thread".into(),
            why: e.to_string(),
            how_to_get_it: "raise the limit on threads".into(),
        };
        let kept = comm.clone().map(|c| c as Arc<dyn std::any::Any + Send + Sync>);
        let watch = Watch::start(context, &member, kept).map_err(no_thread)?;
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { device: device.clone(), key, member, comm, watch, last: Mutex::default() })
    }

    /// Queues a round between `before` and `after` steps of the caller.
    fn round(&self, on: &AscendStream, call: &'static str, queue: impl FnOnce(&Comm) -> Result<()>) -> Result<()> {
        let Some(comm) = &self.comm else { return Ok(()) };
        let mut last = lock(&self.last);
        if let Some(event) = &last.1
            && !std::ptr::eq(event.stream.as_ptr(), Arc::as_ptr(&on.0))
        {
            on.0.wait(event)?;
        }
        self.member.alive(call)?;
        let before = on.0.record()?;
        queue(comm)?;
        let after = on.0.record()?;
        last.0 += 1;
        self.member.queued(last.0);
        self.watch.add(last.0, &on.0, before, Arc::clone(&after));
        last.1 = Some(AscendEvent { raw: after, stream: Arc::downgrade(&on.0) });
        Ok(())
    }
}

impl Comm {
    fn new(context: &Arc<Context>, root: &[u8], rank: u32, size: u32) -> Result<Self> {
        let mut info = Box::new(HcclRootInfo { internal: [0; ROOT] });
        info.internal.iter_mut().zip(root).for_each(|(to, from)| *to = *from as std::ffi::c_char);
        let mut raw: HcclComm = std::ptr::null_mut();
        context.bind()?;
        // SAFETY: the pointers are valid for the call.
        let code = unsafe { (context.api.hccl.HcclCommInitRootInfo)(size, &*info, rank, &mut raw) };
        check_hccl("HcclCommInitRootInfo", code)?;
        Ok(Self { context: Arc::clone(context), raw: raw as usize })
    }

    fn batch(&self, items: &mut [HcclSendRecvItem], on: &AscendStream) -> Result<()> {
        let (n, raw) = (items.len() as u32, self.raw as HcclComm);
        // SAFETY: items point to device memory that is kept until the round ran; HCCL copies the list.
        let code = unsafe { (self.context.api.hccl.HcclBatchSendRecv)(items.as_mut_ptr(), n, raw, on.0.raw()) };
        check_hccl("HcclBatchSendRecv", code)
    }

    fn all_to_all(&self, a: &AllToAll, on: &AscendStream) -> Result<()> {
        let kind = HcclDataType::HCCL_DATA_TYPE_UINT8;
        // SAFETY: the lists have an entry a rank, and HCCL reads them in this call; the memory that they name is kept until the
        // round ran.
        let code = unsafe {
            (self.context.api.hccl.HcclAlltoAllV)(
                a.bases[0] as *const c_void,
                a.counts[0].as_ptr().cast(),
                a.offsets[0].as_ptr().cast(),
                kind,
                a.bases[1] as *const c_void,
                a.counts[1].as_ptr().cast(),
                a.offsets[1].as_ptr().cast(),
                kind,
                self.raw as HcclComm,
                on.0.raw(),
            )
        };
        check_hccl("HcclAlltoAllV", code)
    }
}

impl Drop for AscendCollective {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.member.abort();
        }
        self.watch.end();
    }
}

impl Collective<AscendDevice> for AscendCollective {
    type Exchange = AscendExchange;

    fn rank(&self) -> u32 {
        self.member.rank
    }

    fn size(&self) -> u32 {
        self.member.size
    }

    fn window(&self, bytes: usize) -> Result<AscendBuffer> {
        let buffer = self.device.memory_for(bytes, self.key);
        let free = match &buffer {
            Err(Error::OutOfMemory { free, .. }) => *free,
            _ => 0,
        };
        let mine = Fields::default().number(u64::from(buffer.is_ok())).number(bytes as u64).number(free);
        let offers = self.member.agree("window", &mine)?;
        let buffer = buffer?;
        for offer in &offers {
            let mut fields = Reader(offer);
            if let (Ok(0), Ok(wanted), Ok(free)) = (fields.number(), fields.number(), fields.number()) {
                return Err(Error::OutOfMemory { wanted, free });
            }
        }
        Ok(buffer)
    }

    fn prepare(&self, ops: &[P2p<'_, AscendDevice>]) -> Result<AscendExchange> {
        let (me, size) = (self.member.rank, self.member.size);
        let draft = messages(ops, self.key, size).and_then(|m| {
            let exchange = AscendExchange::new(&self.device, self.key, me, size, ops, &m)?;
            Ok((m, exchange))
        });
        let mine = draft.as_ref().map(|(m, _)| m.clone()).map_err(Clone::clone);
        let offers = self.member.agree("prepare", &offer(&mine))?;
        let (_, mut exchange) = draft?;
        // All ranks judge the same offers, so all choose alike.
        exchange.together = judge(&offers)? && size > 2;
        Ok(exchange)
    }

    fn staging_bytes(&self, exchange: &AscendExchange) -> usize {
        exchange.staging_bytes()
    }

    fn exchange(&self, on: &AscendStream, exchange: &AscendExchange, sends: &[View<'_, AscendDevice>]) -> Result<()> {
        if exchange.comm != self.key {
            return Err(Error::invalid("exchange", "it was prepared by another communicator"));
        }
        exchange.check(sends)?;
        self.member.alive("exchange")?;
        on.0.enter()?;
        let mut items = exchange.pack(on, sends)?;
        self.round(on, "exchange", |comm| match items.len() {
            0 => Ok(()),
            _ if exchange.together => comm.all_to_all(&AllToAll::new(&items, self.member.size), on),
            _ => comm.batch(&mut items, on),
        })?;
        exchange.unpack(on)?;
        let buffers = sends.iter().map(|v| v.buffer().clone()).chain(exchange.buffers()).collect();
        on.0.keep(Kept { buffers, pinned: Vec::new() })
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        let place = members.iter().position(|&m| m == self.member.rank);
        let id = if place == Some(0) { Self::group_id(&self.device.0.context)?.0 } else { Vec::new() };
        let list = members.iter().fold(Fields::default(), |f, &m| f.number(u64::from(m)));
        let offers = self.member.agree("subgroup", &Fields::default().bytes(&list.0).bytes(&id))?;
        let wrong = |why: &str| Err(Error::invalid("members", why));
        let ascending = members.windows(2).all(|w| w[0] < w[1]);
        if members.is_empty() || !ascending || members.iter().any(|&m| m >= self.member.size) {
            return wrong("they are not ascending ranks of this group");
        }
        let mut ids = Vec::new();
        for offer in &offers {
            let mut fields = Reader(offer);
            let (Ok(theirs), Ok(id)) = (fields.bytes(), fields.bytes()) else { return wrong("an offer can't be read") };
            if theirs != list.0 {
                return wrong("the ranks named different members");
            }
            ids.push(id);
        }
        let Some(place) = place else { return Ok(None) };
        let id = GroupId(ids[members[0] as usize].to_vec());
        Self::join(&self.device, &id, place as u32, members.len() as u32, self.member.limit).map(Some)
    }

    fn barrier(&self, on: &AscendStream) -> Result<()> {
        self.member.alive("barrier")?;
        on.0.enter()?;
        self.round(on, "barrier", |comm| {
            // SAFETY: communicator and stream live.
            check_hccl("HcclBarrier", unsafe { (comm.context.api.hccl.HcclBarrier)(comm.raw as HcclComm, on.0.raw()) })
        })
    }

    fn progress(&self, step: Step) {
        self.member.progress(step);
    }

    fn abort(&self) {
        self.member.abort();
    }
}
