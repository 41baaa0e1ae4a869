//! `libamdhip64`: devices, streams, events, copies.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use crate::memory::{self, Span};
use crate::state::{CONFIG, Handles, code, count, fail, lock, message, misuse};
use crate::stream::{Event, Stream};

static STREAMS: Handles<Arc<Stream>> = Handles::new();
static EVENTS: Handles<Arc<Event>> = Handles::new();
/// Who enabled access to whose memory.
static PEERS: Mutex<BTreeSet<(u32, u32)>> = Mutex::new(BTreeSet::new());

thread_local! {
    /// This thread's device.
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

const OK: i32 = code::OK;

/// The device of this thread.
pub(crate) fn device() -> u32 {
    CURRENT.with(Cell::get)
}

/// The architecture that is emulated.
pub(crate) fn arch() -> String {
    std::env::var("LONGSPAN_EMULATOR_ARCH").ok().filter(|a| !a.is_empty()).unwrap_or_else(|| "gfx942".to_owned())
}

/// A live stream of this thread's device.
pub(crate) fn stream(handle: *mut c_void) -> Result<Arc<Stream>, i32> {
    let Some(stream) = STREAMS.get(handle) else {
        return Err(misuse(code::HANDLE, "a stream that does not live"));
    };
    if stream.context != device() as usize {
        return Err(misuse(code::HANDLE, "a stream of another device than the current one"));
    }
    Ok(Arc::clone(&stream))
}

fn event(handle: *mut c_void) -> Result<Arc<Event>, i32> {
    let event = EVENTS.get(handle).ok_or_else(|| misuse(code::HANDLE, "an event that does not live"))?;
    Ok(Arc::clone(&event))
}

pub(crate) fn done(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(OK)
}

/// Writes a result through the caller's pointer.
///
/// # Safety
/// `to` is null or valid for a write.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> i32 {
    if to.is_null() {
        return misuse(code::INVALID, "a null pointer for a result");
    }
    // SAFETY: by the caller.
    unsafe { to.write(value) };
    OK
}

fn known(device: i32) -> Result<u32, i32> {
    u32::try_from(device)
        .ok()
        .filter(|d| *d < CONFIG.devices)
        .ok_or_else(|| fail(code::DEVICE, "there is no such device"))
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipInit(flags: u32) -> i32 {
    if flags == 0 { OK } else { code::INVALID }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `version` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDriverGetVersion(version: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(version, 60_000_000) }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `count` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipGetDeviceCount(count: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(count, CONFIG.devices as i32) }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `device` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGet(device: *mut i32, ordinal: i32) -> i32 {
    // SAFETY: by the caller.
    known(ordinal).map_or_else(|code| code, |_| unsafe { put(device, ordinal) })
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `device` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipGetDevice(device: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(device, self::device() as i32) }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipSetDevice(device: i32) -> i32 {
    done(known(device).map(|device| CURRENT.with(|c| c.set(device))))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `name` has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetName(name: *mut c_char, len: i32, device: i32) -> i32 {
    if name.is_null() || len < 1 || known(device).is_err() {
        return misuse(code::INVALID, "no room for a name, or no such device");
    }
    let text = format!("emulated {}", arch());
    let bytes = text.as_bytes();
    let n = bytes.len().min(len as usize - 1);
    // SAFETY: by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), name.cast(), n);
        name.add(n).write(0);
    }
    OK
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceTotalMem(bytes: *mut usize, _device: i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(bytes, CONFIG.memory) }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `value` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) -> i32 {
    if let Err(code) = known(device) {
        return code;
    }
    let answer = match attribute {
        19 => 4 << 20,           // L2CacheSize
        23 => 9,                 // ComputeCapabilityMajor
        61 => 4,                 // ComputeCapabilityMinor
        63 => 8,                 // MultiprocessorCount
        74 | 10_002 => 64 << 10, // MaxSharedMemoryPerBlock, MaxSharedMemoryPerMultiprocessor
        88 => 1,                 // MemoryPoolsSupported
        _ => return misuse(code::INVALID, format!("attribute {attribute} is not emulated")),
    };
    // SAFETY: by the caller.
    unsafe { put(value, answer) }
}

/// `hip_runtime_api.h`, as from ROCm 6 on: 1472 bytes.
///
/// # Safety
/// `properties` has 1472 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipGetDevicePropertiesR0600(properties: *mut c_void, device: i32) -> i32 {
    if properties.is_null() || known(device).is_err() {
        return misuse(code::INVALID, "no room for properties, or no such device");
    }
    let (mut bytes, name) = ([0xFFu8; 1472], format!("{}:sramecc+:xnack-\0", arch()));
    bytes[1160..1160 + name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: by the caller.
    unsafe { properties.cast::<[u8; 1472]>().write_unaligned(bytes) };
    OK
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `can` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> i32 {
    if known(device).and(known(peer)).is_err() {
        return code::DEVICE;
    }
    // SAFETY: by the caller.
    unsafe { put(can, i32::from(peers_reach() && device != peer)) }
}

/// Whether devices reach each other's memory.
pub(crate) fn peers_reach() -> bool {
    std::env::var("LONGSPAN_EMULATOR_PEERS").as_deref() != Ok("0")
}

/// Lets the current device access memory of `owner`.
pub(crate) fn enable_peer(owner: u32) {
    lock(&PEERS).insert((device(), owner));
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipDeviceEnablePeerAccess(peer: i32, flags: u32) -> i32 {
    let enable = || {
        let peer = known(peer)?;
        if flags != 0 || peer == device() {
            return Err(misuse(code::INVALID, "peer access to the device itself, or with flags"));
        }
        if lock(&PEERS).insert((device(), peer)) { Ok(()) } else { Err(code::PEER_ENABLED) }
    };
    done(enable())
}

/// Whether `device` may access memory of `owner`.
pub(crate) fn reaches(device: u32, owner: u32) -> bool {
    device == owner || lock(&PEERS).contains(&(device, owner))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// Both are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(least, 1) | put(greatest, -1) }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// Both are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMemGetInfo(free: *mut usize, total: *mut usize) -> i32 {
    let (have, all) = memory::figures();
    // SAFETY: by the caller.
    unsafe { put(free, have) | put(total, all) }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `data` is valid for a write of the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipPointerGetAttribute(data: *mut c_void, attribute: i32, pointer: *mut c_void) -> i32 {
    match memory::owner(pointer) {
        // SAFETY: by the caller; attribute 9 is the ordinal, an int.
        Some(device) if attribute == 9 => unsafe { put(data.cast::<i32>(), device as i32) },
        Some(_) => misuse(code::INVALID, format!("pointer attribute {attribute} is not emulated")),
        None => code::INVALID,
    }
}

/// `hip_runtime_api.h`. Priorities do not matter here.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipStreamCreateWithPriority(to: *mut *mut c_void, _flags: u32, _priority: i32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(to, STREAMS.add(Stream::start(device() as usize))) }
}

/// `hip_runtime_api.h`. What is queued still runs.
#[unsafe(no_mangle)]
pub extern "C" fn hipStreamDestroy(on: *mut c_void) -> i32 {
    done(stream(on).map(|stream| {
        STREAMS.remove(on);
        stream.end();
    }))
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipStreamWaitEvent(on: *mut c_void, handle: *mut c_void, flags: u32) -> i32 {
    if flags != 0 {
        return misuse(code::INVALID, "flags of a wait");
    }
    done(stream(on).and_then(|stream| event(handle).map(|event| stream.wait(&event))))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `device` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipStreamGetDevice(on: *mut c_void, device: *mut i32) -> i32 {
    match STREAMS.get(on) {
        // SAFETY: by the caller.
        Some(stream) => unsafe { put(device, stream.context as i32) },
        None => misuse(code::HANDLE, "a stream that does not live"),
    }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipStreamSynchronize(on: *mut c_void) -> i32 {
    stream(on).map_or_else(|code| code, |stream| stream.synchronize(None))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipEventCreateWithFlags(to: *mut *mut c_void, flags: u32) -> i32 {
    // SAFETY: by the caller.
    unsafe { put(to, EVENTS.add(Event::new(device() as usize, flags & 2 == 0))) }
}

/// `hip_runtime_api.h`. A record that is still queued happens all the same.
#[unsafe(no_mangle)]
pub extern "C" fn hipEventDestroy(handle: *mut c_void) -> i32 {
    done(event(handle).map(|_| drop(EVENTS.remove(handle))))
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipEventRecord(handle: *mut c_void, on: *mut c_void) -> i32 {
    let record = || {
        let (event, stream) = (event(handle)?, stream(on)?);
        if event.context != stream.context {
            return Err(misuse(code::HANDLE, "an event was recorded on a stream of another device"));
        }
        stream.record(&event);
        Ok(())
    };
    done(record())
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipEventQuery(handle: *mut c_void) -> i32 {
    match event(handle) {
        Ok(event) if event.is_complete() => event.failed().unwrap_or(OK),
        Ok(_) => code::NOT_READY,
        Err(code) => code,
    }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `ms` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipEventElapsedTime(ms: *mut f32, from: *mut c_void, to: *mut c_void) -> i32 {
    let elapsed = || {
        let (from, to) = (event(from)?, event(to)?);
        if !from.timed || !to.timed {
            return Err(misuse(code::HANDLE, "the time of an event without times"));
        }
        let (Some(from), Some(to)) = (from.time(), to.time()) else { return Err(code::NOT_READY) };
        Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
    };
    match elapsed() {
        // SAFETY: by the caller.
        Ok(time) => unsafe { put(ms, time) },
        Err(code) => code,
    }
}

/// One side of a copy.
#[derive(Clone, Copy)]
enum Side {
    Device(Span),
    Host(usize),
}

impl Side {
    /// `device`: whether it must be device memory; `None` where the address says so.
    fn find(device: Option<bool>, pointer: *const c_void, bytes: usize) -> Result<Self, i32> {
        let wrong = |text: &str| Err(misuse(code::INVALID, text));
        match (device, memory::span(pointer, bytes)) {
            (Some(false), Some(_)) => wrong("a copy with device memory as host memory"),
            (_, Some(span)) => {
                let owner = memory::owner(pointer).unwrap_or(0);
                if reaches(self::device(), owner) {
                    Ok(Self::Device(span))
                } else {
                    wrong("a copy of another device's memory without peer access")
                }
            }
            (Some(true), None) => wrong("a copy of device memory that is not allocated"),
            (_, None) if memory::is_pinned(pointer, bytes) => Ok(Self::Host(pointer as usize)),
            (_, None) => wrong("an asynchronous copy of memory that is neither the device's nor page-locked"),
        }
    }

    fn address(&self) -> Result<*mut u8, i32> {
        match self {
            Self::Device(span) => span.address(),
            Self::Host(at) => Ok(*at as *mut u8),
        }
    }
}

struct Rows {
    to: *mut c_void,
    to_pitch: usize,
    from: *const c_void,
    from_pitch: usize,
    width: usize,
    height: usize,
}

fn copy(rows: Rows, sides: [Option<bool>; 2], on: *mut c_void) -> i32 {
    let Rows { to, to_pitch, from, from_pitch, width, height } = rows;
    let queue = || {
        let stream = stream(on)?;
        if width > to_pitch || width > from_pitch || width == 0 || height == 0 {
            return Err(misuse(code::INVALID, "a copy with an empty size, or of rows longer than a pitch"));
        }
        let to = Side::find(sides[0], to, to_pitch * (height - 1) + width)?;
        let from = Side::find(sides[1], from, from_pitch * (height - 1) + width)?;
        count("launch copy", 1);
        stream.push(move |_| {
            let (to, from) = (to.address()?, from.address()?);
            for row in 0..height {
                // SAFETY: both sides have these rows; the client keeps host memory alive.
                unsafe { std::ptr::copy(from.add(row * from_pitch), to.add(row * to_pitch), width) };
            }
            Ok(())
        });
        Ok(())
    };
    done(queue())
}

fn plain(to: *mut c_void, from: *const c_void, bytes: usize, sides: [Option<bool>; 2], on: *mut c_void) -> i32 {
    copy(Rows { to, to_pitch: bytes, from, from_pitch: bytes, width: bytes, height: 1 }, sides, on)
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemcpyHtoDAsync(to: *mut c_void, from: *const c_void, bytes: usize, on: *mut c_void) -> i32 {
    plain(to, from, bytes, [Some(true), Some(false)], on)
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemcpyDtoHAsync(to: *mut c_void, from: *mut c_void, bytes: usize, on: *mut c_void) -> i32 {
    plain(to, from, bytes, [Some(false), Some(true)], on)
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemcpyAsync(
    to: *mut c_void,
    from: *const c_void,
    bytes: usize,
    kind: i32,
    on: *mut c_void,
) -> i32 {
    match kind {
        4 => plain(to, from, bytes, [None; 2], on),
        _ => misuse(code::INVALID, format!("a copy of kind {kind} is not emulated, only hipMemcpyDefault")),
    }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the vendor's signature
pub extern "C" fn hipMemcpy2DAsync(
    to: *mut c_void,
    to_pitch: usize,
    from: *const c_void,
    from_pitch: usize,
    width: usize,
    height: usize,
    kind: i32,
    on: *mut c_void,
) -> i32 {
    match kind {
        4 => copy(Rows { to, to_pitch, from, from_pitch, width, height }, [None; 2], on),
        _ => misuse(code::INVALID, format!("a copy of kind {kind} is not emulated, only hipMemcpyDefault")),
    }
}

fn fill(to: *mut c_void, value: &[u8], count: usize, on: *mut c_void) -> i32 {
    let (value, bytes) = (value.to_vec(), count * value.len());
    let queue = || {
        let stream = stream(on)?;
        let Some(span) = memory::span(to, bytes) else {
            return Err(misuse(code::INVALID, "a fill outside of device memory"));
        };
        stream.push(move |_| {
            // SAFETY: the span lives and has these bytes.
            let memory = unsafe { std::slice::from_raw_parts_mut(span.address()?, bytes) };
            memory.chunks_exact_mut(value.len()).for_each(|unit| unit.copy_from_slice(&value));
            Ok(())
        });
        Ok(())
    };
    done(queue())
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemsetD16Async(to: *mut c_void, value: u16, count: usize, on: *mut c_void) -> i32 {
    fill(to, &value.to_ne_bytes(), count, on)
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemsetD32Async(to: *mut c_void, value: i32, count: usize, on: *mut c_void) -> i32 {
    fill(to, &value.to_ne_bytes(), count, on)
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipGetErrorName(code: i32) -> *const c_char {
    code::name(code).as_ptr()
}

/// `hip_runtime_api.h`. The emulator says more than HIP does: why this thread's last call failed.
#[unsafe(no_mangle)]
pub extern "C" fn hipGetErrorString(code: i32) -> *const c_char {
    let last = message();
    // SAFETY: a C string of this thread, good until its next failure.
    if unsafe { CStr::from_ptr(last) }.is_empty() { code::name(code).as_ptr() } else { last }
}
