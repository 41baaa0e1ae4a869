//! MPI itself: its start and end, its error codes, and one lock around its calls.
//!
//! MPI is asked for `MPI_THREAD_SERIALIZED` alone: streams call it from threads of their own, one at a time, and never block
//! in it. So the lock is held for microseconds, and every MPI build will do.

use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use longspan_hal::{Error, Result};
use mpi::Threading;
use mpi::ffi;

/// The backend's name in errors.
pub(crate) const NAME: &str = "mpi";

/// Tags of one group.
pub(crate) const GROUP_TAGS: u64 = 256;

/// The processes of the job, as this one sees them.
#[derive(Debug)]
pub struct World {
    /// This process, from 0.
    pub rank: u32,
    /// Number of processes.
    pub size: u32,
    /// This process among those of its host, from 0.
    pub local_rank: u32,
    /// Number of processes of this host.
    pub local_size: u32,
    /// Whether this host has more processes than cores.
    pub(crate) crowded: bool,
    /// Whether this process started MPI, and so has to end it.
    owned: bool,
    /// Number of tags that the library has.
    pub(crate) tags: u64,
    comm: Handle<ffi::MPI_Comm>,
}

/// A handle of MPI: a number or a pointer that only MPI looks behind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handle<T>(pub T);

// SAFETY: handles may be used from any thread, which `MPI_THREAD_SERIALIZED` allows for calls under the lock.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

static LOCK: Mutex<()> = Mutex::new(());
static WORLD: OnceLock<Result<World>> = OnceLock::new();

/// Calls MPI. No other thread is in MPI meanwhile.
pub(crate) fn lock() -> MutexGuard<'static, ()> {
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The job of this process. Collective over all its processes at the first call, which starts MPI unless that was done; a
/// process that no launcher started is a job of one.
///
/// # Errors
/// [`Error::Driver`] with MPI's own text; [`Error::Unavailable`] if MPI allows no threads.
pub fn world() -> Result<&'static World> {
    WORLD.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Result<World> {
    let _mpi = lock();
    let started = mpi::initialize_with_threading(Threading::Serialized);
    let owned = started.is_some();
    let threading = started.map_or_else(mpi::environment::threading_support, |(universe, threading)| {
        // It ends MPI when dropped; `finalize` does.
        std::mem::forget(universe);
        threading
    });
    if threading < Threading::Serialized {
        return Err(Error::Unavailable {
            library: "MPI with threads".into(),
            why: format!("MPI was started with {threading:?}"),
            how_to_get_it: "start MPI with MPI_THREAD_SERIALIZED or more, or let Longspan start it".into(),
        });
    }
    // SAFETY: MPI is started and the lock is held; pointers are valid for the calls; handles are MPI's.
    unsafe {
        let (everyone, mut comm, mut host) = (ffi::RSMPI_COMM_WORLD, ffi::RSMPI_COMM_NULL, ffi::RSMPI_COMM_NULL);
        check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(everyone, ffi::RSMPI_ERRORS_RETURN))?;
        check("MPI_Comm_dup", ffi::MPI_Comm_dup(everyone, &mut comm))?;
        check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
        let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
        check("MPI_Comm_split_type", ffi::MPI_Comm_split_type(comm, kind, 0, info, &mut host))?;
        let [rank, size] = place(comm)?;
        let [local_rank, local_size] = place(host)?;
        check("MPI_Comm_free", ffi::MPI_Comm_free(&mut host))?;
        share_cores(local_size);
        let crowded = machine_cores().is_some_and(|cores| local_size as usize > cores);
        Ok(World { rank, size, local_rank, local_size, crowded, owned, tags: tags(comm), comm: Handle(comm) })
    }
}

/// # Safety
/// MPI is started, the lock is held, and `comm` lives.
unsafe fn place(comm: ffi::MPI_Comm) -> Result<[u32; 2]> {
    let (mut rank, mut size) = (0, 0);
    // SAFETY: by the caller; the pointers are valid for the calls.
    unsafe {
        check("MPI_Comm_rank", ffi::MPI_Comm_rank(comm, &mut rank))?;
        check("MPI_Comm_size", ffi::MPI_Comm_size(comm, &mut size))?;
    }
    Ok([rank as u32, size as u32])
}

/// Number of tags; the standard promises 32768.
///
/// # Safety
/// MPI is started, the lock is held, and `comm` lives.
unsafe fn tags(comm: ffi::MPI_Comm) -> u64 {
    let (mut value, mut found): (*const c_int, c_int) = (std::ptr::null(), 0);
    // SAFETY: by the caller; MPI stores a pointer to an int that lives as long as MPI.
    unsafe {
        let code =
            ffi::MPI_Comm_get_attr(comm, ffi::MPI_TAG_UB as c_int, (&raw mut value).cast::<c_void>(), &mut found);
        let known = code == 0 && found != 0 && !value.is_null();
        if known { u64::try_from(*value).unwrap_or(32767) + 1 } else { 32768 }
    }
}

/// The processes of a host share its cores: attention takes this one's part of them, unless `RAYON_NUM_THREADS` or the
/// launcher's binding says otherwise.
fn share_cores(local_size: u32) {
    if std::env::var_os("RAYON_NUM_THREADS").is_some() {
        return;
    }
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let part = usable_part(usable, machine_cores().unwrap_or(usable), local_size as usize);
    // A pool that the host program made first stays.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(part).build_global();
}

/// Threads of one of `processes` that sees `usable` of `all` cores: a process that is bound to some has these to itself, but
/// for those that are bound to the same.
fn usable_part(usable: usize, all: usize, processes: usize) -> usize {
    let fair = (all.max(usable) / processes.max(1)).max(1);
    fair.min(usable.max(1))
}

fn machine_cores() -> Option<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    text.trim().split(',').map(range_length).sum()
}

/// Cores of `3` or `0-7`.
fn range_length(range: &str) -> Option<usize> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
    Some(last.checked_sub(first)? + 1)
}

/// Collective over all processes of the job: `bytes` of process 0, on every process. Blocks until all came.
///
/// # Errors
/// [`Error::Driver`] with MPI's own text.
pub fn broadcast(bytes: &[u8]) -> Result<Vec<u8>> {
    let world = world()?;
    let mut length = bytes.len() as u64;
    let mut bytes = if world.rank == 0 { bytes.to_vec() } else { Vec::new() };
    let _mpi = lock();
    let send = |at: *mut c_void, n: usize| {
        let n = c_int::try_from(n).map_err(|_| Error::invalid("broadcast", format!("{n} bytes are too many")))?;
        // SAFETY: MPI is started and the lock is held; `at` points to `n` bytes.
        check("MPI_Bcast", unsafe { ffi::MPI_Bcast(at, n, ffi::RSMPI_UINT8_T, 0, world.comm()) })
    };
    send((&raw mut length).cast(), size_of::<u64>())?;
    bytes.resize(length as usize, 0);
    send(bytes.as_mut_ptr().cast(), bytes.len())?;
    Ok(bytes)
}

/// Collective over all processes of the job: ends MPI, where Longspan started it. Nothing of MPI works afterwards. A process
/// that exits without it makes the launcher end the others.
pub fn finalize() {
    let Some(Ok(World { owned: true, .. })) = WORLD.get() else { return };
    let _mpi = lock();
    if mpi::environment::is_initialized() && !mpi::environment::is_finalized() {
        // SAFETY: MPI is started, not ended, and the lock is held. What it returns can't be told to anybody any more.
        let _ = unsafe { ffi::MPI_Finalize() };
    }
}

/// Ends every process of the job with exit code `code`; where MPI does not run, this process alone. For when a peer is lost:
/// a launcher that has not noticed does so now.
pub fn abort(code: i32) -> ! {
    if let Some(Ok(world)) = WORLD.get()
        && mpi::environment::is_initialized()
        && !mpi::environment::is_finalized()
    {
        // SAFETY: MPI is started and not ended. The lock may be held by a thread that hangs in MPI: aborting is the one
        // call that has to get through.
        let _ = unsafe { ffi::MPI_Abort(world.comm(), code) };
    }
    std::process::exit(code)
}

impl World {
    /// The communicator of all processes, of Longspan's own.
    pub(crate) fn comm(&self) -> ffi::MPI_Comm {
        self.comm.0
    }

    /// Whether all processes are on this host.
    pub fn is_one_host(&self) -> bool {
        self.local_size == self.size
    }
}

/// `code` of `call` as a result, with MPI's own text.
pub(crate) fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let (mut text, mut length) = ([0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1], 0);
    // SAFETY: the text has the length that MPI asks for.
    let told = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut length) } == ffi::MPI_SUCCESS as c_int;
    let bytes: Vec<u8> = text.iter().take(length.max(0) as usize).map(|&c| c as u8).collect();
    let message = if told { String::from_utf8_lossy(&bytes).into_owned() } else { "MPI has no text for it".into() };
    Err(Error::Driver { backend: NAME, call, code: i64::from(code), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_a_host_share_its_cores() {
        // Unbound: an equal share, at least one. Bound to a core or a socket: not more than that.
        for (usable, all, processes, part) in
            [(8, 8, 4, 2), (2, 2, 4, 1), (1, 16, 4, 1), (8, 16, 4, 4), (8, 16, 1, 8), (4, 2, 2, 2), (3, 3, 2, 1)]
        {
            assert_eq!(usable_part(usable, all, processes), part, "{usable} {all} {processes}");
        }
        assert_eq!([range_length("3"), range_length("0-7"), range_length("x")], [Some(1), Some(8), None]);
    }
}
