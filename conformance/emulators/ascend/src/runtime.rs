//! `libascendcl`: devices, contexts, memory, streams, events.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::memory::{self, Span};
use crate::state::{CONFIG, Handles, code, count, fail, message, misuse};
use crate::stream::{Event, Stream};

static STREAMS: Handles<Arc<Stream>> = Handles::new();
static EVENTS: Handles<Arc<Event>> = Handles::new();
static STARTED: AtomicBool = AtomicBool::new(false);
/// Every device has one context; its handle is made up from the device's number.
static CONTEXTS: LazyLock<Vec<usize>> =
    LazyLock::new(|| (0..CONFIG.devices as usize).map(|d| 0x7000 + 16 * d).collect());

thread_local! {
    /// This thread's context, 0 for none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

const OK: i32 = code::OK;

/// This thread's context.
fn context() -> Result<usize, i32> {
    match CURRENT.with(Cell::get) {
        0 => Err(misuse(code::NO_CONTEXT, "a call from a thread that has no context")),
        context => Ok(context),
    }
}

/// The device of this thread's context.
pub(crate) fn device() -> Result<u32, i32> {
    Ok(((context()? - 0x7000) / 16) as u32)
}

/// A live stream of this thread's context.
pub(crate) fn stream(handle: *mut c_void) -> Result<Arc<Stream>, i32> {
    let context = context()?;
    let Some(stream) = STREAMS.get(handle) else {
        return Err(misuse(code::INVALID, "a stream that does not live"));
    };
    if stream.context != context {
        return Err(misuse(code::OTHER_CONTEXT, "a stream of another context"));
    }
    Ok(Arc::clone(&stream))
}

fn event(handle: *mut c_void) -> Result<Arc<Event>, i32> {
    context()?;
    let event = EVENTS.get(handle).ok_or_else(|| misuse(code::INVALID, "an event that does not live"))?;
    Ok(Arc::clone(&event))
}

fn done(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(OK)
}

/// Writes a result through the caller's pointer.
///
/// # Safety
/// `to` is null or valid for a write.
unsafe fn put<T>(to: *mut T, value: T) -> i32 {
    if to.is_null() {
        return misuse(code::INVALID, "a null pointer for a result");
    }
    // SAFETY: by the caller.
    unsafe { to.write(value) };
    OK
}

/// `acl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclInit(_config: *const c_char) -> i32 {
    if STARTED.swap(true, Ordering::AcqRel) {
        return code::REPEAT;
    }
    if std::env::var_os("LONGSPAN_EMULATOR_REPORT").is_some() {
        extern "C" fn report() {
            crate::longspan_emulator_report();
        }
        // SAFETY: the function is never unloaded, and touches nothing that ends before.
        let _ = unsafe { libc::atexit(report) };
    }
    OK
}

/// `acl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    message()
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtSetDevice(device: i32) -> i32 {
    if !STARTED.load(Ordering::Acquire) {
        return misuse(code::INVALID, "aclrtSetDevice before aclInit");
    }
    match CONTEXTS.get(device as usize) {
        Some(context) => {
            CURRENT.with(|c| c.set(*context));
            OK
        }
        None => fail(code::INVALID, format!("there is no device {device}")),
    }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtSetCurrentContext(context: *mut c_void) -> i32 {
    if !CONTEXTS.contains(&(context as usize)) {
        return misuse(code::INVALID, "a context that does not live");
    }
    CURRENT.with(|c| c.set(context as usize));
    OK
}

/// `acl_rt.h`.
///
/// # Safety
/// `context` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetCurrentContext(context: *mut *mut c_void) -> i32 {
    // SAFETY: by the caller.
    CURRENT.with(|c| if c.get() == 0 { code::NO_CONTEXT } else { unsafe { put(context, c.get() as *mut c_void) } })
}

/// `acl_rt.h`.
///
/// # Safety
/// `count` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetDeviceCount(count: *mut u32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(count, CONFIG.devices) }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtGetSocName() -> *const c_char {
    c"Ascend910B_emulated".as_ptr()
}

/// `acl_rt.h`.
///
/// # Safety
/// The pointers are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetVersion(major: *mut i32, minor: *mut i32, patch: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(major, 1) | put(minor, 17) | put(patch, 0) }
}

/// `acl_rt.h`.
///
/// # Safety
/// The pointers are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtGetMemInfo(_attr: i32, free: *mut usize, total: *mut usize) -> i32 {
    if let Err(code) = context() {
        return code;
    }
    let (have, all) = memory::figures();
    // SAFETY: by the caller.
    unsafe { put(free, have) | put(total, all) }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtCtxSetSysParamOpt(_option: i32, _value: i64) -> i32 {
    done(context().map(drop))
}

/// `acl_rt.h`.
///
/// # Safety
/// `pointer` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMalloc(pointer: *mut *mut c_void, size: usize, _policy: i32) -> i32 {
    if size == 0 {
        return misuse(code::INVALID, "aclrtMalloc of 0 bytes");
    }
    match device().and_then(|device| memory::allocate(size, device)) {
        // SAFETY: by the caller.
        Ok(memory) => unsafe { put(pointer, memory) },
        Err(code) => code,
    }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtFree(pointer: *mut c_void) -> i32 {
    context().map_or_else(|code| code, |_| memory::free(pointer))
}

/// `acl_rt.h`.
///
/// # Safety
/// `pointer` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMallocHost(pointer: *mut *mut c_void, size: usize) -> i32 {
    if let Err(code) = context() {
        return code;
    }
    let memory = memory::allocate_host(size);
    // SAFETY: by the caller.
    if memory.is_null() { code::MEMORY } else { unsafe { put(pointer, memory) } }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtFreeHost(pointer: *mut c_void) -> i32 {
    context().map_or_else(|code| code, |_| memory::free_host(pointer))
}

/// One side of a copy.
#[derive(Clone, Copy)]
enum Side {
    Device(Span),
    Host(usize),
}

impl Side {
    fn find(device: bool, pointer: *const c_void, bytes: usize) -> Result<Self, i32> {
        let wrong = |text: &str| Err(misuse(code::INVALID, text));
        match (device, memory::span(pointer, bytes)) {
            (true, Some(span)) => Ok(Self::Device(span)),
            (true, None) => wrong("a copy of device memory that is not allocated"),
            (false, Some(_)) => wrong("a copy with device memory as host memory"),
            (false, None) if memory::is_pinned(pointer, bytes) => Ok(Self::Host(pointer as usize)),
            (false, None) => wrong("an asynchronous copy of host memory that is not page-locked"),
        }
    }

    fn address(&self) -> Result<*mut u8, i32> {
        match self {
            Self::Device(span) => span.address(),
            Self::Host(at) => Ok(*at as *mut u8),
        }
    }
}

/// `acl_rt.h`.
///
/// # Safety
/// Host memory stays valid until the copy ran.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtMemcpyAsync(
    dst: *mut c_void,
    room: usize,
    src: *const c_void,
    bytes: usize,
    kind: i32,
    on: *mut c_void,
) -> i32 {
    if bytes > room {
        return misuse(code::INVALID, format!("destMax {room} is less than the {bytes} bytes to copy"));
    }
    // SAFETY: by the caller.
    unsafe { aclrtMemcpy2dAsync(dst, bytes, src, bytes, bytes, 1, kind, on) }
}

/// `acl_rt.h`.
///
/// # Safety
/// Host memory stays valid until the copy ran.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the vendor's signature
pub unsafe extern "C" fn aclrtMemcpy2dAsync(
    dst: *mut c_void,
    dst_pitch: usize,
    src: *const c_void,
    src_pitch: usize,
    width: usize,
    height: usize,
    kind: i32,
    on: *mut c_void,
) -> i32 {
    let copy = || {
        let stream = stream(on)?;
        if !(1..=3).contains(&kind) || width > dst_pitch || width > src_pitch || width == 0 || height == 0 {
            return Err(misuse(code::INVALID, "a copy with a wrong kind, an empty size or rows longer than a pitch"));
        }
        let to = Side::find(kind != 2, dst, dst_pitch * (height - 1) + width)?;
        let from = Side::find(kind != 1, src, src_pitch * (height - 1) + width)?;
        count("launch copy", 1);
        stream.push(move |_| {
            let (to, from) = (to.address()?, from.address()?);
            for row in 0..height {
                // SAFETY: both sides have these rows; the client keeps host memory alive.
                unsafe { std::ptr::copy(from.add(row * src_pitch), to.add(row * dst_pitch), width) };
            }
            Ok(())
        });
        Ok(())
    };
    done(copy())
}

/// `acl_rt.h`. Priorities do not matter here.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtCreateStreamWithConfig(to: *mut *mut c_void, _priority: u32, _flag: u32) -> i32 {
    match context() {
        // SAFETY: by the caller.
        Ok(context) => unsafe { put(to, STREAMS.add(Stream::start(context))) },
        Err(code) => code,
    }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyStream(on: *mut c_void) -> i32 {
    let end = || {
        let stream = stream(on)?;
        STREAMS.remove(on);
        if stream.end() {
            return Err(misuse(code::INVALID, "a stream was destroyed with work on it"));
        }
        Ok(())
    };
    done(end())
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtStreamAbort(on: *mut c_void) -> i32 {
    done(stream(on).map(|s| s.abort()))
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtSynchronizeStreamWithTimeout(on: *mut c_void, timeout: i32) -> i32 {
    let limit = u64::try_from(timeout).ok().map(Duration::from_millis);
    match stream(on).map(|s| s.synchronize(limit)) {
        Ok(OK) => OK,
        Ok(failed) => fail(failed, "the stream failed or did not finish"),
        Err(code) => code,
    }
}

/// `acl_rt.h`.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtCreateEventExWithFlag(to: *mut *mut c_void, flag: u32) -> i32 {
    match context() {
        // SAFETY: by the caller.
        Ok(context) => unsafe { put(to, EVENTS.add(Event::new(context, flag & 8 != 0))) },
        Err(code) => code,
    }
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtDestroyEvent(handle: *mut c_void) -> i32 {
    let end = || {
        let event = event(handle)?;
        EVENTS.remove(handle);
        if !event.may_end() {
            return Err(misuse(code::INVALID, "an event was destroyed before its record ran"));
        }
        Ok(())
    };
    done(end())
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtRecordEvent(handle: *mut c_void, on: *mut c_void) -> i32 {
    let record = || {
        let (event, stream) = (event(handle)?, stream(on)?);
        if event.context != stream.context {
            return Err(misuse(code::OTHER_CONTEXT, "an event was recorded on a stream of another context"));
        }
        stream.record(&event);
        Ok(())
    };
    done(record())
}

/// `acl_rt.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtStreamWaitEvent(on: *mut c_void, handle: *mut c_void) -> i32 {
    done(stream(on).and_then(|stream| event(handle).map(|event| stream.wait(&event))))
}

/// `acl_rt.h`.
///
/// # Safety
/// `status` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtQueryEventStatus(handle: *mut c_void, status: *mut i32) -> i32 {
    match event(handle) {
        // SAFETY: by the caller.
        Ok(event) => unsafe { put(status, i32::from(event.is_complete())) },
        Err(code) => code,
    }
}

/// `acl_rt.h`.
///
/// # Safety
/// `ms` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclrtEventElapsedTime(ms: *mut f32, from: *mut c_void, to: *mut c_void) -> i32 {
    let elapsed = || {
        let (from, to) = (event(from)?, event(to)?);
        if !from.timed || !to.timed {
            return Err(misuse(code::INVALID, "the time of an event without ACL_EVENT_TIME_LINE"));
        }
        let (Some(from), Some(to)) = (from.time(), to.time()) else {
            return Err(misuse(code::INVALID, "the time of an event that has not happened"));
        };
        Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
    };
    match elapsed() {
        // SAFETY: by the caller.
        Ok(time) => unsafe { put(ms, time) },
        Err(code) => code,
    }
}
