//! `libhccl`: communicators with a rendezvous that really blocks.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::link::{ALL_TO_ALL, BARRIER, DATA, Peer, connect};
use crate::memory::{Span, span};
use crate::runtime::{device, stream};
use crate::state::{CONFIG, Handles, code, count, lock, misuse, random};
use crate::stream::Running;

/// HCCL's own codes.
mod result {
    pub const OK: i32 = 0;
    pub const PARAMETER: i32 = 1;
    pub const POINTER: i32 = 2;
    pub const TIMEOUT: i32 = 9;
    pub const RUNTIME: i32 = 15;
}

const ROOT_BYTES: usize = 4108;

struct Comm {
    peers: Vec<Option<Arc<Peer>>>,
    /// One task of a communicator at a time.
    turn: Mutex<()>,
    failed: AtomicI32,
}

static COMMS: Handles<Comm> = Handles::new();
static ROOTS: AtomicU64 = AtomicU64::new(0);

/// `hccl.h`.
///
/// # Safety
/// `root` points to 4108 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclGetRootInfo(root: *mut c_void) -> i32 {
    if root.is_null() {
        return misuse(result::POINTER, "no place for the root info");
    }
    let n = ROOTS.fetch_add(1, Ordering::Relaxed);
    let name = format!("longspan-npu-{}-{n}-{:x}", std::process::id(), random(1 << 40));
    let mut bytes = [0u8; ROOT_BYTES];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: by the caller.
    unsafe { root.cast::<[u8; ROOT_BYTES]>().write_unaligned(bytes) };
    result::OK
}

/// `hccl.h`.
///
/// # Safety
/// `root` points to 4108 bytes, `comm` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclCommInitRootInfo(
    size: u32,
    root: *const c_void,
    rank: u32,
    comm: *mut *mut c_void,
) -> i32 {
    if root.is_null() || comm.is_null() {
        return misuse(result::POINTER, "no root info or no place for the communicator");
    }
    let Ok(device) = device() else { return result::RUNTIME };
    if rank >= size {
        return misuse(result::PARAMETER, format!("rank {rank} of {size}"));
    }
    // SAFETY: by the caller.
    let bytes = unsafe { root.cast::<[u8; ROOT_BYTES]>().read_unaligned() };
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(ROOT_BYTES);
    let name = String::from_utf8_lossy(&bytes[..end]);
    match connect(&name, rank, size, device) {
        Ok(peers) => {
            let made = Comm { peers, turn: Mutex::default(), failed: AtomicI32::new(0) };
            // SAFETY: by the caller.
            unsafe { comm.write(COMMS.add(made)) };
            result::OK
        }
        Err(error) => misuse(result::TIMEOUT, format!("rank {rank} of {size} could not connect: {error}")),
    }
}

/// `hccl.h`. Nobody is told.
#[unsafe(no_mangle)]
pub extern "C" fn HcclCommDestroy(comm: *mut c_void) -> i32 {
    match COMMS.remove(comm) {
        Some(comm) => {
            comm.peers.iter().flatten().for_each(|p| p.close());
            result::OK
        }
        None => misuse(result::PARAMETER, "a communicator was destroyed that does not live"),
    }
}

/// `hccl.h`.
///
/// # Safety
/// `error` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclGetCommAsyncError(comm: *mut c_void, error: *mut i32) -> i32 {
    let Some(comm) = COMMS.get(comm) else { return misuse(result::PARAMETER, "a communicator that does not live") };
    // SAFETY: by the caller.
    unsafe { error.write(comm.failed.load(Ordering::Acquire)) };
    result::OK
}

/// `hccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn HcclGetErrorString(code: i32) -> *const c_char {
    match code {
        result::OK => c"no error",
        result::PARAMETER => c"parameter error",
        result::POINTER => c"empty pointer",
        result::TIMEOUT => c"timeout",
        result::RUNTIME => c"call runtime api fail",
        _ => c"other error",
    }
    .as_ptr()
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Item {
    kind: i32,
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    peer: u32,
}

struct Message {
    send: bool,
    span: Option<Span>,
    count: u64,
    dtype: i32,
    peer: Arc<Peer>,
}

fn size_of(dtype: i32) -> Option<usize> {
    match dtype {
        0 | 7 => Some(1),
        1 | 3 | 8 | 11 => Some(2),
        2 | 4 | 9 => Some(4),
        5 | 6 | 10 => Some(8),
        _ => None,
    }
}

impl Comm {
    fn message(&self, item: &Item) -> Result<Message, i32> {
        let wrong = |text: String| Err(misuse(result::PARAMETER, text));
        let Some(Some(peer)) = self.peers.get(item.peer as usize) else {
            return wrong(format!("a message with rank {}, which is oneself or out of range", item.peer));
        };
        let Some(size) = size_of(item.dtype) else { return wrong(format!("a message of type {}", item.dtype)) };
        let bytes = item.count as usize * size;
        let span = if bytes == 0 { None } else { span(item.buffer, bytes) };
        if (span.is_none() && bytes > 0) || !(0..=1).contains(&item.kind) {
            return wrong("a message outside of device memory, or neither send nor receive".into());
        }
        let peer = Arc::clone(peer);
        Ok(Message { send: item.kind == 0, span, count: item.count, dtype: item.dtype, peer })
    }

    /// Runs a batch: all sends leave, then receives are taken in order, then acknowledgements are awaited.
    fn batch(&self, kind: u8, messages: &[Message], running: &Running<'_>) -> Result<(), i32> {
        let _turn = lock(&self.turn);
        let until = Instant::now() + CONFIG.timeout;
        let over = || running.aborted() || Instant::now() > until;
        for m in messages.iter().filter(|m| m.send) {
            let bytes = m.span.map_or(Ok(Vec::new()), |s| {
                // SAFETY: the span lives and has these bytes.
                s.address().map(|at| unsafe { std::slice::from_raw_parts(at, s.bytes()) }.to_vec())
            })?;
            count("bytes sent", bytes.len() as u64);
            m.peer.send(kind, m.dtype, m.count, &bytes);
        }
        for m in messages.iter().filter(|m| !m.send) {
            let frame = m.peer.receive(over).ok_or_else(|| self.lost())?;
            if frame.kind != kind || frame.dtype != m.dtype || frame.count != m.count {
                return Err(misuse(code::EXCEPTION, "a receive met another message than it expected"));
            }
            if let Some(span) = m.span {
                // SAFETY: the span lives and has as many bytes as the frame, whose count and type are equal.
                unsafe { std::ptr::copy_nonoverlapping(frame.bytes.as_ptr(), span.address()?, frame.bytes.len()) };
            }
            m.peer.acknowledge();
        }
        for m in messages.iter().filter(|m| m.send) {
            m.peer.acknowledged(over).ok_or_else(|| self.lost())?;
        }
        Ok(())
    }

    fn lost(&self) -> i32 {
        self.failed.store(result::TIMEOUT, Ordering::Release);
        count("communication timeouts", 1);
        code::TASK_TIMEOUT
    }
}

/// `hccl.h`.
///
/// # Safety
/// `items` points to `n` items.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn HcclBatchSendRecv(items: *mut c_void, n: u32, comm: *mut c_void, on: *mut c_void) -> i32 {
    let Some(comm) = COMMS.get(comm) else { return misuse(result::PARAMETER, "a communicator that does not live") };
    let Ok(stream) = stream(on) else { return result::RUNTIME };
    if items.is_null() || n == 0 {
        return misuse(result::POINTER, "an empty batch");
    }
    // SAFETY: by the caller.
    let items = unsafe { std::slice::from_raw_parts(items.cast::<Item>(), n as usize) };
    let messages: Result<Vec<Message>, i32> = items.iter().map(|i| comm.message(i)).collect();
    match messages {
        Ok(messages) => {
            count("launch exchange", 1);
            stream.push(move |running| comm.batch(DATA, &messages, running));
            result::OK
        }
        Err(code) => code,
    }
}

/// One direction of an all-to-all.
struct Lists {
    send: bool,
    base: *mut c_void,
    counts: *const c_void,
    offsets: *const c_void,
    dtype: i32,
}

impl Comm {
    /// Messages to or from every other rank; what a rank has for itself is not emulated.
    ///
    /// # Safety
    /// Counts and offsets have an entry a rank.
    unsafe fn messages(&self, lists: &Lists) -> Result<Vec<Message>, i32> {
        let wrong = |text: &str| misuse(result::PARAMETER, text);
        let size = size_of(lists.dtype).ok_or_else(|| wrong("an all-to-all of an unknown type"))?;
        // SAFETY: by the caller.
        let [counts, offsets] = [lists.counts, lists.offsets]
            .map(|list| unsafe { std::slice::from_raw_parts(list.cast::<u64>(), self.peers.len()) });
        let end = counts.iter().zip(offsets).filter(|(n, _)| **n > 0).map(|(n, at)| (n + at) as usize * size).max();
        if end.is_some_and(|end| span(lists.base, end).is_none()) {
            return Err(wrong("an all-to-all whose parts do not lie in one piece of device memory"));
        }
        let mut messages = Vec::new();
        for (rank, (count, at)) in counts.iter().zip(offsets).enumerate() {
            if self.peers[rank].is_none() {
                if *count > 0 {
                    return Err(wrong("an all-to-all with a message to oneself is not emulated"));
                }
                continue;
            }
            let buffer = lists.base.wrapping_byte_add(*at as usize * size);
            let kind = i32::from(!lists.send);
            messages.push(self.message(&Item {
                kind,
                buffer,
                count: *count,
                dtype: lists.dtype,
                peer: rank as u32,
            })?);
        }
        Ok(messages)
    }
}

/// `hccl.h`. Every rank takes part, with or without bytes.
///
/// # Safety
/// Counts and displacements point to a `u64` a rank.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the vendor's signature
pub unsafe extern "C" fn HcclAlltoAllV(
    send: *const c_void,
    send_counts: *const c_void,
    send_offsets: *const c_void,
    send_type: i32,
    receive: *const c_void,
    receive_counts: *const c_void,
    receive_offsets: *const c_void,
    receive_type: i32,
    comm: *mut c_void,
    on: *mut c_void,
) -> i32 {
    let Some(comm) = COMMS.get(comm) else { return misuse(result::PARAMETER, "a communicator that does not live") };
    let Ok(stream) = stream(on) else { return result::RUNTIME };
    let lists = [send_counts, send_offsets, receive_counts, receive_offsets];
    if lists.iter().any(|l| l.is_null()) || send == receive {
        return misuse(result::POINTER, "an all-to-all without its lists, or with one memory for both directions");
    }
    let sides = [(true, send, 0, send_type), (false, receive, 2, receive_type)];
    let mut messages = Vec::new();
    for (send, base, i, dtype) in sides {
        let lists = Lists { send, base: base.cast_mut(), counts: lists[i], offsets: lists[i + 1], dtype };
        // SAFETY: by the caller.
        match unsafe { comm.messages(&lists) } {
            Ok(more) => messages.extend(more),
            Err(code) => return code,
        }
    }
    count("launch all-to-all", 1);
    stream.push(move |running| comm.batch(ALL_TO_ALL, &messages, running));
    result::OK
}

/// `hccl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn HcclBarrier(comm: *mut c_void, on: *mut c_void) -> i32 {
    let Some(comm) = COMMS.get(comm) else { return misuse(result::PARAMETER, "a communicator that does not live") };
    let Ok(stream) = stream(on) else { return result::RUNTIME };
    stream.push(move |running| {
        let _turn = lock(&comm.turn);
        let until = Instant::now() + CONFIG.timeout;
        let over = || running.aborted() || Instant::now() > until;
        comm.peers.iter().flatten().for_each(|p| p.send(BARRIER, 0, 0, &[]));
        for peer in comm.peers.iter().flatten() {
            let frame = peer.receive(over).ok_or_else(|| comm.lost())?;
            if frame.kind != BARRIER {
                return Err(misuse(code::EXCEPTION, "a barrier met a message"));
            }
        }
        Ok(())
    });
    result::OK
}
