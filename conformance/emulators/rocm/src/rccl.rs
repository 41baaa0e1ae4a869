//! `librccl`: communicators with a rendezvous that really blocks.

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::between::bus;
use crate::link::{CONNECT, DATA, Peer, connect};
use crate::memory::{Span, span};
use crate::runtime::{device, stream};
use crate::state::{CONFIG, Handles, code, count, fail, lock, misuse, random};
use crate::stream::{Running, Stream};

/// RCCL's own codes.
mod result {
    pub const OK: i32 = 0;
    pub const SYSTEM: i32 = 2;
    pub const ARGUMENT: i32 = 4;
    pub const REMOTE: i32 = 6;
}

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

struct Comm {
    device: u32,
    /// `None` at the rank's own place.
    peers: Vec<Option<Arc<Peer>>>,
    /// Those that a group was queued with.
    met: Mutex<Vec<bool>>,
    /// One group of a communicator at a time.
    turn: Mutex<()>,
    failed: AtomicI32,
    aborted: AtomicBool,
}

/// A send or receive of a group.
struct Message {
    send: bool,
    span: Option<Span>,
    count: usize,
    to: usize,
    peer: Arc<Peer>,
}

struct Queued {
    comm: Arc<Comm>,
    stream: Arc<Stream>,
    message: Message,
}

static COMMS: Handles<Arc<Comm>> = Handles::new();
static IDS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The group of this thread, while one is open.
    static GROUP: RefCell<Option<Vec<Queued>>> = const { RefCell::new(None) };
}

/// `rccl.h`.
///
/// # Safety
/// `version` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { version.write(22_005) };
    result::OK
}

/// `rccl.h`.
///
/// # Safety
/// `id` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> i32 {
    let n = IDS.fetch_add(1, Ordering::Relaxed);
    let name = format!("longspan-gpu-{}-{n}-{:x}", std::process::id(), random(1 << 40));
    let mut bytes = [0u8; 128];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: by the caller.
    unsafe { id.write(UniqueId(bytes)) };
    result::OK
}

/// `rccl.h`. Returns when all ranks have come.
///
/// # Safety
/// `comm` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(comm: *mut *mut c_void, size: i32, id: UniqueId, rank: i32) -> i32 {
    if comm.is_null() || rank < 0 || rank >= size {
        return misuse(result::ARGUMENT, format!("rank {rank} of {size}, or no place for the communicator"));
    }
    let end = id.0.iter().position(|b| *b == 0).unwrap_or(id.0.len());
    let name = String::from_utf8_lossy(&id.0[..end]);
    match connect(&name, rank as u32, size as u32, bus(device())) {
        Ok(peers) => {
            let (turn, failed, aborted) = (Mutex::default(), AtomicI32::new(0), AtomicBool::new(false));
            let met = Mutex::new(vec![false; peers.len()]);
            let made = COMMS.add(Arc::new(Comm { device: device(), peers, met, turn, failed, aborted }));
            // SAFETY: by the caller.
            unsafe { comm.write(made) };
            result::OK
        }
        Err(error) => misuse(result::SYSTEM, format!("rank {rank} of {size} could not connect: {error}")),
    }
}

/// `rccl.h`. Ends what waits; nobody else is told.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(comm: *mut c_void) -> i32 {
    match COMMS.remove(comm) {
        Some(comm) => {
            comm.aborted.store(true, Ordering::Release);
            comm.peers.iter().flatten().for_each(|p| p.close());
            result::OK
        }
        None => misuse(result::ARGUMENT, "a communicator was ended that does not live"),
    }
}

/// `rccl.h`. What was queued must have run.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(comm: *mut c_void) -> i32 {
    match COMMS.remove(comm) {
        Some(comm) if Arc::strong_count(&*comm) > 1 => {
            misuse(result::ARGUMENT, "a communicator was destroyed before its work ran")
        }
        Some(_) => result::OK,
        None => misuse(result::ARGUMENT, "a communicator was destroyed that does not live"),
    }
}

/// `rccl.h`.
///
/// # Safety
/// `error` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, error: *mut i32) -> i32 {
    let Some(comm) = COMMS.get(comm) else { return misuse(result::ARGUMENT, "a communicator that does not live") };
    // SAFETY: by the caller.
    unsafe { error.write(comm.failed.load(Ordering::Acquire)) };
    result::OK
}

/// `rccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> i32 {
    GROUP.with(|g| match g.replace(Some(Vec::new())) {
        None => result::OK,
        Some(_) => misuse(result::ARGUMENT, "a group within a group is not emulated"),
    })
}

/// `rccl.h`. All messages of one communicator and stream travel as one. The first with a peer waits until that comes to the same.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> i32 {
    let Some(mut queued) = GROUP.with(RefCell::take) else {
        return misuse(result::ARGUMENT, "the end of a group that was not started");
    };
    let Some(first) = queued.first() else { return result::OK };
    let (comm, stream) = (Arc::clone(&first.comm), Arc::clone(&first.stream));
    if queued.iter().any(|q| !Arc::ptr_eq(&q.comm, &comm) || !Arc::ptr_eq(&q.stream, &stream)) {
        return misuse(result::ARGUMENT, "a group over several communicators or streams is not emulated");
    }
    let messages: Vec<Message> = queued.drain(..).map(|q| q.message).collect();
    if !comm.meet(&messages) {
        return fail(result::REMOTE, "the communicator was ended, or a peer did not come");
    }
    count("launch exchange", 1);
    stream.push(move |running| comm.work(&messages, running));
    result::OK
}

fn message(
    send: bool,
    at: *const c_void,
    count: usize,
    dtype: i32,
    peer: i32,
    comm: *mut c_void,
    on: *mut c_void,
) -> i32 {
    let wrong = |text: &str| misuse(result::ARGUMENT, text);
    let Some(comm) = COMMS.get(comm) else { return wrong("a communicator that does not live") };
    let Ok(stream) = stream(on) else { return wrong("a stream that does not live, or of another device") };
    if comm.device != device() || dtype != 1 {
        return wrong("a communicator of another device, or elements that are not bytes");
    }
    let to = usize::try_from(peer).unwrap_or(usize::MAX);
    let Some(peer) = comm.peers.get(to).cloned().flatten() else {
        return wrong("a message to nobody, or to the rank itself (which is not emulated)");
    };
    let span = if count == 0 { None } else { span(at, count) };
    if span.is_none() && count > 0 {
        return wrong("a message outside of device memory");
    }
    let queued = Queued { comm: Arc::clone(&comm), stream, message: Message { send, span, count, to, peer } };
    GROUP.with_borrow_mut(|group| match group {
        Some(group) => {
            group.push(queued);
            result::OK
        }
        None => wrong("a message outside of a group is not emulated"),
    })
}

/// `rccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    dtype: i32,
    peer: i32,
    comm: *mut c_void,
    on: *mut c_void,
) -> i32 {
    message(true, from, count, dtype, peer, comm, on)
}

/// `rccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    dtype: i32,
    peer: i32,
    comm: *mut c_void,
    on: *mut c_void,
) -> i32 {
    message(false, to, count, dtype, peer, comm, on)
}

/// `rccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: i32) -> *const c_char {
    match code {
        result::OK => c"no error".as_ptr(),
        result::SYSTEM => c"unhandled system error".as_ptr(),
        result::ARGUMENT => c"invalid argument".as_ptr(),
        result::REMOTE => c"remote process exited or there was a network error".as_ptr(),
        _ => c"unknown".as_ptr(),
    }
}

impl Comm {
    /// Connects with the peers of `messages` that it has not met yet: on the host, and without a limit but the emulator's.
    fn meet(&self, messages: &[Message]) -> bool {
        let until = Instant::now() + CONFIG.timeout;
        let over = || self.aborted.load(Ordering::Acquire) || Instant::now() > until;
        let mut met = lock(&self.met);
        let new: Vec<&Arc<Peer>> =
            messages.iter().filter(|m| !std::mem::replace(&mut met[m.to], true)).map(|m| &m.peer).collect();
        new.iter().for_each(|peer| peer.send(CONNECT, 0, 0, &[]));
        new.iter().all(|peer| peer.receive(over).is_some_and(|frame| frame.kind == CONNECT))
    }

    /// Runs a group: all sends leave, receives are taken in order, then acknowledgements are awaited.
    fn batch(&self, messages: &[Message], running: &Running<'_>) -> Result<(), i32> {
        let _turn = lock(&self.turn);
        let until = Instant::now() + CONFIG.timeout;
        let over = || running.aborted() || self.aborted.load(Ordering::Acquire) || Instant::now() > until;
        for m in messages.iter().filter(|m| m.send) {
            let bytes = m.span.map_or(Ok(Vec::new()), |s| {
                // SAFETY: the span lives and has these bytes.
                s.address().map(|at| unsafe { std::slice::from_raw_parts(at, s.bytes()) }.to_vec())
            })?;
            count("bytes sent", bytes.len() as u64);
            m.peer.send(DATA, 1, m.count as u64, &bytes);
        }
        for m in messages.iter().filter(|m| !m.send) {
            let frame = m.peer.receive(over).ok_or_else(|| self.lost())?;
            if frame.kind != DATA || frame.count != m.count as u64 {
                return Err(misuse(code::EXCEPTION, "a receive met another message than it expected"));
            }
            if let Some(span) = m.span {
                // SAFETY: the span lives and has as many bytes as the frame.
                unsafe { std::ptr::copy_nonoverlapping(frame.bytes.as_ptr(), span.address()?, frame.bytes.len()) };
            }
            m.peer.acknowledge();
        }
        for m in messages.iter().filter(|m| m.send) {
            m.peer.acknowledged(over).ok_or_else(|| self.lost())?;
        }
        Ok(())
    }

    /// An aborted communicator ends its work without an error of the stream.
    fn work(&self, messages: &[Message], running: &Running<'_>) -> Result<(), i32> {
        match self.batch(messages, running) {
            Err(_) if self.aborted.load(Ordering::Acquire) => Ok(()),
            result => result,
        }
    }

    fn lost(&self) -> i32 {
        self.failed.store(result::REMOTE, Ordering::Release);
        count("communication timeouts", 1);
        code::LAUNCH
    }
}
