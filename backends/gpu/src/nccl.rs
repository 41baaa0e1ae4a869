//! The NCCL exchange: grouped sends and receives of dense messages, packed and unpacked by the copy kernel.
//!
//! ```text
//! exchange(on):
//!   meet every peer of the round on the host, where ranks are threads: NCCL's kernel waits for its peers on the device
//!   pack strided sends into the staging, which all exchanges share; copy what I send to myself
//!   group { send and receive every message, in list order }
//!   unpack strided receives
//! ```
//!
//! The kernels wait for each other, and the first call that uses a pair of ranks waits on the host: the watch (`watch.rs`) aborts
//! the communicator when a rank is lost.
//!
//! RCCL exports the same symbols.

use std::ffi::{OsString, c_char, c_int};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use longspan_dylib::{Library, Returned, table};
use longspan_hal::{Error, Result, Strided};
use longspan_peers::{Fields, Member, Reader};

use crate::context::Context;
use crate::copy::{self, Job};
use crate::driver::Handle;
use crate::exchange::{Draft, GpuExchange, Part};
use crate::group::Mail;
use crate::machine::{Machine, c_text};
use crate::memory::Buffer;
use crate::packing::Packing;
use crate::peer::Round;
use crate::sync::{Deadline, lock};

const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct UniqueId([u8; ID_BYTES]);

table! {
    /// NCCL: `libnccl.so.2`, or RCCL. All functions return 0 or an error code.
    struct Functions {
        /// Version as a number.
        fn version["ncclGetVersion"](version: *mut c_int) -> c_int;
        /// A new communicator's id.
        fn unique_id["ncclGetUniqueId"](id: *mut UniqueId) -> c_int;
        /// Joins a communicator; returns when all ranks have.
        fn init_rank["ncclCommInitRank"](comm: *mut Handle, size: c_int, id: UniqueId, rank: c_int) -> c_int;
        /// Ends a communicator at once.
        fn abort["ncclCommAbort"](comm: Handle) -> c_int;
        /// Ends a communicator once it has sent what was queued.
        fn destroy["ncclCommDestroy"](comm: Handle) -> c_int;
        /// What went wrong on the device.
        fn async_error["ncclCommGetAsyncError"](comm: Handle, error: *mut c_int) -> c_int;
        /// Starts a group.
        fn group_start["ncclGroupStart"]() -> c_int;
        /// Launches a group.
        fn group_end["ncclGroupEnd"]() -> c_int;
        /// Sends.
        fn send["ncclSend"](
            from: u64, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle,
        ) -> c_int;
        /// Receives.
        fn recv["ncclRecv"](
            to: u64, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle,
        ) -> c_int;
        /// Text of an error.
        fn error_text["ncclGetErrorString"](code: c_int) -> *const c_char;
    }
}

/// `ncclUint8`: messages are bytes.
const BYTES: c_int = 1;

/// The loaded library.
#[derive(Debug)]
pub(crate) struct Nccl(Functions);

impl Nccl {
    /// Takes the functions from `library`.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub(crate) fn load(library: Library, flavor: usize) -> Result<Self> {
        Functions::load(library, flavor).map(Self)
    }

    /// Version, as `2.28.3`, where the library tells.
    pub(crate) fn version(&self) -> Option<String> {
        let mut version = 0;
        // SAFETY: `version` is written.
        let asked = unsafe { self.0.version(&mut version) };
        (asked.value == 0).then(|| version_text(version))
    }

    /// Where it was loaded from.
    pub(crate) fn path(&self) -> &OsString {
        self.0.library().path()
    }

    fn check(&self, backend: &'static str, returned: Returned<c_int>) -> Result<()> {
        if returned.value == 0 {
            return Ok(());
        }
        Err(Error::Driver {
            backend,
            call: returned.call,
            code: i64::from(returned.value),
            // SAFETY: the text is a static string.
            message: unsafe { c_text(self.0.error_text(returned.value).value) },
        })
    }
}

/// `22803` is 2.28.3; versions before 2.9 had a digit less.
fn version_text(version: c_int) -> String {
    let major = if version < 10_000 { 1_000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

/// A rank's communicator.
#[derive(Debug)]
pub(crate) struct Comm {
    machine: &'static Machine,
    nccl: &'static Nccl,
    raw: Handle,
    /// The staging of all exchanges.
    pub(crate) packing: Packing,
    /// Held during calls.
    calls: Mutex<()>,
    ended: AtomicBool,
}

/// How long a call of the library is waited for before the communicator is aborted under it.
const CALL: Duration = Duration::from_secs(2);

impl Drop for Comm {
    fn drop(&mut self) {
        // Nothing was queued, or the watch ended it.
        self.abort();
    }
}

impl Comm {
    /// Collective. A communicator of the group's ranks, one on each device.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Timeout`], [`Error::Driver`], [`Error::PeerLost`].
    pub(crate) fn new(context: &'static Context, member: &Member) -> Result<Self> {
        let (machine, name) = (context.machine, context.machine.facts().name);
        let mine = machine.nccl().and_then(|nccl| {
            let mut id = UniqueId([0; ID_BYTES]);
            if member.rank == 0 {
                // SAFETY: `id` is written.
                nccl.check(name, unsafe { nccl.0.unique_id(&mut id) })?;
            }
            Ok(id)
        });
        let said = match &mine {
            Ok(id) => Fields::default().bytes(&id.0),
            Err(error) => Fields::default().bytes(&[]).bytes(error.to_string().as_bytes()),
        };
        let offers = member.agree("nccl", &said)?;
        let nccl = mine.and_then(|_| machine.nccl())?;
        let raw = join(context, nccl, member, unique_id(&offers)?)?;
        Ok(Self {
            machine,
            nccl,
            raw,
            packing: Packing::default(),
            calls: Mutex::new(()),
            ended: AtomicBool::new(false),
        })
    }

    /// Ends the communicator, all of whose rounds are through: NCCL's threads may still send what its kernels left them. Returns
    /// once the other processes of this host end theirs too.
    pub(crate) fn finish(&self) {
        let call = lock(&self.calls);
        let first = !self.ended.swap(true, Ordering::AcqRel);
        drop(call);
        if first {
            // SAFETY: the communicator is this handle's, and is ended once; later calls see that it was.
            let _ = unsafe { self.nccl.0.destroy(self.raw) };
        }
    }

    /// Ends the communicator and what it does on the device, from any thread. May return as late as [`Comm::finish`].
    pub(crate) fn abort(&self) {
        // A call that hangs is what this is to end; any other is over soon.
        let mut call = None;
        let _ = Deadline::after(CALL).poll("ncclCommAbort", || {
            call = self.calls.try_lock().ok();
            Ok(call.is_some())
        });
        if !self.ended.swap(true, Ordering::AcqRel) {
            // SAFETY: as in `finish`.
            let _ = unsafe { self.nccl.0.abort(self.raw) };
        }
    }

    /// Checks that the communicator lives. Calls hold `calls`.
    fn lives(&self) -> Result<()> {
        if self.ended.load(Ordering::Acquire) {
            return Err(Error::invalid("exchange", "the communicator was ended"));
        }
        Ok(())
    }

    fn check(&self, returned: Returned<c_int>) -> Result<()> {
        self.nccl.check(self.machine.facts().name, returned)
    }

    /// Queues a round.
    ///
    /// # Errors
    /// [`Error::PeerLost`], [`Error::Driver`].
    pub(crate) fn exchange(&self, round: &Round<'_>, exchange: &GpuExchange, sends: &[Part]) -> Result<()> {
        let (draft, me, on) = (&exchange.draft, round.group.rank(), round.on);
        self.healthy()?;
        if let Mail::Letters(_) = round.group.mail {
            let partner = |p: &u32| *p != me && (draft.to.contains(p) || draft.from.contains(p));
            round.meet(&(0..round.group.size()).filter(partner).collect::<Vec<_>>())?;
        }
        for part in draft.recvs.iter().chain(sends) {
            part.buffer.used_on(on)?;
        }
        let staging = self.packing.turn(on, draft.staging)?;
        let staged = |at: Option<Strided>| Some(Part { buffer: staging.clone()?, at: at? });
        let own = draft.sends_to(me).zip(draft.recvs_from(me)).map(|(s, r)| (sends[s].clone(), draft.recvs[r].clone()));
        // A send travels as it lies if it is dense, else from its place in the staging.
        let packed = sends.iter().zip(&draft.staged_sends);
        let packed =
            packed.map(|(send, at)| staged(*at).filter(|_| !send.at.is_dense()).unwrap_or_else(|| send.clone()));
        let packed: Vec<Part> = packed.collect();
        let pack = sends.iter().cloned().zip(packed.iter().cloned()).filter(|(a, b)| !a.buffer.same(&b.buffer));
        let first: Vec<(Part, Part)> = own.chain(pack).collect();
        copy::local(on, first.iter().filter_map(|(from, to)| Job::new(from.place(), to.place())))?;
        let came = draft.recvs.iter().zip(&draft.staged_recvs);
        let came: Vec<Part> = came.map(|(recv, at)| staged(*at).unwrap_or_else(|| recv.clone())).collect();
        self.travel(round, draft, &packed, &came)?;
        let unpack: Vec<_> = came.iter().zip(&draft.recvs).filter(|(a, b)| !a.buffer.same(&b.buffer)).collect();
        copy::local(on, unpack.iter().filter_map(|(from, to)| Job::new(from.place(), to.place())))?;
        self.healthy()
    }

    fn travel(&self, round: &Round<'_>, draft: &Draft, sends: &[Part], recvs: &[Part]) -> Result<()> {
        let me = round.group.rank();
        let (sends, recvs) = (draft.to.iter().zip(sends), draft.from.iter().zip(recvs));
        let place = |(peer, part): (&u32, &Part)| (*peer, part.place().0, part.at.bytes());
        let others = |m: &(u32, u64, usize)| m.0 != me && m.2 > 0;
        self.group(round, sends.map(place).filter(others), recvs.map(place).filter(others))
    }

    /// Queues sends and receives as one group: the other rank, address and bytes. The memory stays alive until the work ran.
    fn group(
        &self,
        round: &Round<'_>,
        sends: impl Iterator<Item = (u32, u64, usize)>,
        recvs: impl Iterator<Item = (u32, u64, usize)>,
    ) -> Result<()> {
        let stream = round.on.raw();
        let _call = lock(&self.calls);
        self.lives()?;
        // SAFETY: no pointers.
        self.check(unsafe { self.nccl.0.group_start() })?;
        let mut result = Ok(());
        for (to, at, bytes) in sends {
            // SAFETY: the message is dense, was checked against its buffer, and stays alive until the work ran.
            let sent = unsafe { self.nccl.0.send(at, bytes, BYTES, to as c_int, self.raw, stream) };
            result = result.and_then(|()| self.check(sent));
        }
        for (from, at, bytes) in recvs {
            // SAFETY: as above.
            let received = unsafe { self.nccl.0.recv(at, bytes, BYTES, from as c_int, self.raw, stream) };
            result = result.and_then(|()| self.check(received));
        }
        // SAFETY: no pointers; a group that was started is ended, also after an error.
        let ended = unsafe { self.nccl.0.group_end() };
        result.and_then(|()| self.check(ended))
    }

    /// Queues a barrier of ranks that have no letters: a byte from each to each; `scratch` has [`Comm::scratch`] bytes.
    ///
    /// # Errors
    /// As [`Comm::exchange`].
    pub(crate) fn barrier(&self, round: &Round<'_>, scratch: &Buffer) -> Result<()> {
        self.healthy()?;
        scratch.used_on(round.on)?;
        let (me, n) = (round.group.rank(), round.group.size());
        let others = move || (0..n).filter(move |p| *p != me);
        let at = |p: u32| scratch.address() + u64::from(p);
        self.group(round, others().map(|p| (p, at(n), 1)), others().map(|p| (p, at(p), 1)))
    }

    /// Bytes that a barrier of `size` ranks needs.
    pub(crate) fn scratch(size: u32) -> usize {
        size as usize + 1
    }

    /// What went wrong on the device since.
    fn healthy(&self) -> Result<()> {
        let _call = lock(&self.calls);
        self.lives()?;
        self.async_error()
    }

    /// Whether something is known to have gone wrong, unless a call is in progress.
    pub(crate) fn is_sick(&self) -> bool {
        self.calls.try_lock().is_ok_and(|_call| self.lives().is_ok() && self.async_error().is_err())
    }

    fn async_error(&self) -> Result<()> {
        let mut code = 0;
        // SAFETY: `code` is written.
        let asked = unsafe { self.nccl.0.async_error(self.raw, &mut code) };
        self.check(asked)?;
        // Code 7: an operation is on its way.
        self.check(Returned { call: asked.call, value: if code == 7 { 0 } else { code } })
    }
}

/// The id that rank 0 made; every rank has the library.
fn unique_id(offers: &[Vec<u8>]) -> Result<UniqueId> {
    let mut first = None;
    for (rank, offer) in offers.iter().enumerate() {
        let mut fields = Reader(offer);
        match fields.bytes().map(<[u8; ID_BYTES]>::try_from) {
            Ok(Ok(id)) => first = first.or(Some(UniqueId(id))),
            _ => {
                let why = fields.text().unwrap_or_else(|e| e.to_string());
                return Err(Error::invalid("group", format!("rank {rank}: {why}")));
            }
        }
    }
    first.ok_or_else(|| Error::invalid("group", "rank 0 brought no NCCL id"))
}

/// Joins on a thread of its own, since NCCL's call does not end when a peer stays away.
fn join(context: &'static Context, nccl: &'static Nccl, member: &Member, id: UniqueId) -> Result<Handle> {
    let (rank, size, name) = (member.rank as c_int, member.size as c_int, context.machine.facts().name);
    let (done, result) = channel();
    let work = move || {
        let joined = context.bind().and_then(|_bound| {
            let mut raw = 0;
            // SAFETY: `raw` is written; the id is rank 0's.
            nccl.check(name, unsafe { nccl.0.init_rank(&mut raw, size, id, rank) })?;
            Ok(raw)
        });
        if let Err(unheard) = done.send(joined)
            && let Ok(raw) = unheard.0
        {
            // SAFETY: nobody else knows it.
            let _ = unsafe { nccl.0.abort(raw) };
        }
    };
    let started = std::thread::Builder::new().name(format!("nccl join {rank}")).spawn(work);
    started.map_err(|e| Error::Unavailable {
        library: "a thread".to_owned(),
        why: e.to_string(),
        how_to_get_it: "raise the process's thread limit".to_owned(),
    })?;
    let limit: Duration = member.limit;
    result.recv_timeout(limit).unwrap_or(Err(Error::Timeout { call: "ncclCommInitRank", limit }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_needs_the_library_and_rank_0_makes_the_id() {
        let id = |byte| Fields::default().bytes(&[byte; ID_BYTES]).0;
        assert!(matches!(unique_id(&[id(1), id(0)]), Ok(UniqueId(b)) if b[0] == 1));
        let without = Fields::default().bytes(&[]).bytes(b"no librccl").0;
        let text = unique_id(&[id(1), without]).expect_err("one has none").to_string();
        assert!(text.contains("rank 1: no librccl"), "{text}");
        assert!(unique_id(&[]).is_err() && unique_id(&[vec![1]]).is_err());
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!([22_803, 21_907, 2_708].map(version_text), ["2.28.3", "2.19.7", "2.7.8"].map(str::to_owned));
    }
}
