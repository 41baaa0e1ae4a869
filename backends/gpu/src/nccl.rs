//! The NCCL exchange: grouped sends and receives of dense messages, packed and unpacked by the copy kernel.
//!
//! ```text
//! exchange(on):
//!   meet every peer of the round on the host: NCCL's kernel waits for its peers on the device, where nobody could end it
//!   pack strided sends into the staging; copy what I send to myself
//!   group { send and receive every message, in list order }
//!   unpack strided receives
//! ```
//!
//! RCCL exports the same symbols.

use std::ffi::{OsString, c_char, c_int};
use std::sync::mpsc::channel;
use std::time::Duration;

use longspan_dylib::{Library, Returned, table};
use longspan_hal::{Error, Result};

use crate::context::Context;
use crate::copy::{self, Job};
use crate::driver::Handle;
use crate::exchange::{GpuExchange, Part};
use crate::group::Member;
use crate::machine::{Machine, c_text};
use crate::matching::{Agreement, Offer};
use crate::peer::Round;

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
}

impl Drop for Comm {
    fn drop(&mut self) {
        // Aborting needs no peer, unlike `ncclCommDestroy`; what was queued before is done or of no use to anyone.
        // SAFETY: the communicator is this handle's, and is ended once.
        let _ = unsafe { self.nccl.0.abort(self.raw) };
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
            Ok((member.rank == 0).then(|| id.0.to_vec()))
        });
        let (_, agreed) = member.agree("nccl", Offer::Bytes(mine))?;
        let nccl = machine.nccl()?;
        let id = match agreed {
            Agreement::Bytes(bytes) => bytes.try_into().map(UniqueId).ok(),
            _ => None,
        };
        let id = id.ok_or_else(|| Error::invalid("group", "rank 0 brought no NCCL id"))?;
        let raw = join(context, nccl, member, id)?;
        Ok(Self { machine, nccl, raw })
    }

    fn check(&self, returned: Returned<c_int>) -> Result<()> {
        self.nccl.check(self.machine.facts().name, returned)
    }

    /// Queues a round.
    ///
    /// # Errors
    /// [`Error::PeerLost`], [`Error::Driver`].
    pub(crate) fn exchange(&self, round: &Round<'_>, exchange: &GpuExchange, sends: &[Part]) -> Result<()> {
        let (draft, me, on) = (&exchange.draft, round.member.rank, round.on);
        self.healthy()?;
        let partner = |p: &u32| *p != me && (draft.to.contains(p) || draft.from.contains(p));
        round.meet(&(0..round.member.group.size).filter(partner).collect::<Vec<_>>())?;
        for part in draft.recvs.iter().chain(sends) {
            part.buffer.used_on(on)?;
        }
        if let Some(staging) = &draft.staging {
            staging.used_on(on)?;
        }
        let own = draft.sends_to(me).zip(draft.recvs_from(me)).map(|(s, r)| (sends[s].clone(), draft.recvs[r].clone()));
        let packed: Vec<Part> = sends.iter().enumerate().map(|(i, send)| dense_send(exchange, i, send)).collect();
        let pack = sends.iter().cloned().zip(packed.iter().cloned()).filter(|(a, b)| !a.buffer.same(&b.buffer));
        let first: Vec<(Part, Part)> = own.chain(pack).collect();
        copy::local(on, first.iter().filter_map(|(from, to)| Job::new(from.place(), to.place())))?;
        self.travel(round, exchange, &packed)?;
        let unpack = draft.recvs.iter().zip(&draft.staged_recvs);
        let unpack: Vec<_> = unpack.filter_map(|(recv, at)| Some((draft.staged(*at)?, recv.clone()))).collect();
        copy::local(on, unpack.iter().filter_map(|(from, to)| Job::new(from.place(), to.place())))?;
        self.healthy()
    }

    fn travel(&self, round: &Round<'_>, exchange: &GpuExchange, packed: &[Part]) -> Result<()> {
        let (draft, me, stream) = (&exchange.draft, round.member.rank, round.on.raw());
        // SAFETY: no pointers.
        self.check(unsafe { self.nccl.0.group_start() })?;
        let mut result = Ok(());
        for (&to, part) in draft.to.iter().zip(packed).filter(|(to, part)| **to != me && !part.at.is_empty()) {
            let (at, bytes) = (part.place().0, part.at.bytes());
            // SAFETY: the part is dense, was checked against its buffer, and stays alive until the work ran.
            let sent = unsafe { self.nccl.0.send(at, bytes, BYTES, to as c_int, self.raw, stream) };
            result = result.and_then(|()| self.check(sent));
        }
        for (i, &from) in draft.from.iter().enumerate().filter(|(_, from)| **from != me) {
            let part = draft.staged(draft.staged_recvs[i]).unwrap_or_else(|| draft.recvs[i].clone());
            if part.at.is_empty() {
                continue;
            }
            let (at, bytes) = (part.place().0, part.at.bytes());
            // SAFETY: as above.
            let received = unsafe { self.nccl.0.recv(at, bytes, BYTES, from as c_int, self.raw, stream) };
            result = result.and_then(|()| self.check(received));
        }
        // SAFETY: no pointers; a group that was started is ended, also after an error.
        let ended = unsafe { self.nccl.0.group_end() };
        result.and_then(|()| self.check(ended))
    }

    /// What went wrong on the device since.
    fn healthy(&self) -> Result<()> {
        let mut code = 0;
        // SAFETY: `code` is written.
        let asked = unsafe { self.nccl.0.async_error(self.raw, &mut code) };
        self.check(asked)?;
        // Code 7: an operation is on its way.
        self.check(Returned { call: asked.call, value: if code == 7 { 0 } else { code } })
    }
}

/// Send `i` as it travels: itself if it is dense, else its place in the staging.
fn dense_send(exchange: &GpuExchange, i: usize, send: &Part) -> Part {
    let staged = exchange.draft.staged(exchange.draft.staged_sends[i]);
    staged.filter(|_| !send.at.is_dense()).unwrap_or_else(|| send.clone())
}

/// Joins on a thread of its own, since NCCL's call does not end when a peer stays away.
fn join(context: &'static Context, nccl: &'static Nccl, member: &Member, id: UniqueId) -> Result<Handle> {
    let (rank, size, name) = (member.rank as c_int, member.group.size as c_int, context.machine.facts().name);
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
    fn versions_read_as_people_write_them() {
        assert_eq!([22_803, 21_907, 2_708].map(version_text), ["2.28.3", "2.19.7", "2.7.8"].map(str::to_owned));
    }
}
