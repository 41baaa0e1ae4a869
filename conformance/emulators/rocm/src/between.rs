//! `libamdhip64`: what processes have in common: memory of another one, registered host memory, values that streams wait for.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::memory;
use crate::runtime::{device, done, enable_peer, peers_reach, put, stream};
use crate::state::{code, count, fail, lock, misuse};

/// Registered host memory: address to bytes.
static REGISTERED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Where devices see registered memory: not where the host does, so that whoever confuses the two is caught.
const DEVICE_SIDE: usize = 1 << 60;

/// `hipIpcMemHandle_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemoryHandle([u64; 8]);

/// `hip_runtime_api.h`.
///
/// # Safety
/// `handle` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipIpcGetMemHandle(handle: *mut MemoryHandle, pointer: *mut c_void) -> i32 {
    match memory::export(pointer) {
        // SAFETY: by the caller.
        Ok(words) => unsafe { put(handle, MemoryHandle(words)) },
        Err(code) => code,
    }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `pointer` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipIpcOpenMemHandle(pointer: *mut *mut c_void, handle: MemoryHandle, flags: u32) -> i32 {
    if flags != 1 {
        return misuse(code::INVALID, "memory of another process was opened without hipIpcMemLazyEnablePeerAccess");
    }
    if handle.0[1] == u64::from(std::process::id()) {
        return misuse(code::CONTEXT, "a process opened its own memory as another's");
    }
    if std::env::var("LONGSPAN_EMULATOR_IPC").as_deref() == Ok("0") {
        return fail(code::INVALID, "memory of other processes can't be opened here");
    }
    let owner = (handle.0[6] >> 32) as u32;
    if owner != device() && !peers_reach() {
        return misuse(code::INVALID, "memory of a device was opened that this one does not reach");
    }
    match memory::import(handle.0) {
        Ok(memory) => {
            enable_peer(owner);
            // SAFETY: by the caller.
            unsafe { put(pointer, memory) }
        }
        Err(code) => code,
    }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipIpcCloseMemHandle(pointer: *mut c_void) -> i32 {
    memory::close(pointer)
}

/// `hip_runtime_api.h`. Flags 1 and 2: for every device, and with an address for them.
#[unsafe(no_mangle)]
pub extern "C" fn hipHostRegister(host: *mut c_void, bytes: usize, flags: u32) -> i32 {
    if host.is_null() || bytes == 0 || flags != 3 {
        return misuse(code::INVALID, "no memory to register, or other flags than portable and mapped");
    }
    let (at, mut all) = (host as usize, lock(&REGISTERED));
    let before = all.range(..at + bytes).next_back();
    if before.is_some_and(|(start, have)| start + have > at) {
        return misuse(code::REGISTERED, "host memory was registered twice");
    }
    all.insert(at, bytes);
    code::OK
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipHostUnregister(host: *mut c_void) -> i32 {
    match lock(&REGISTERED).remove(&(host as usize)) {
        Some(_) => code::OK,
        None => misuse(code::NOT_REGISTERED, "the end of host memory that is not registered"),
    }
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `address` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipHostGetDevicePointer(address: *mut *mut c_void, host: *mut c_void, flags: u32) -> i32 {
    if flags != 0 || registered(host as usize).is_none() {
        return misuse(code::INVALID, "the device's address of host memory that is not registered, or with flags");
    }
    // SAFETY: by the caller.
    unsafe { put(address, (host as usize + DEVICE_SIDE) as *mut c_void) }
}

/// The registration that the value at `at` lies in.
fn registered(at: usize) -> Option<usize> {
    let all = lock(&REGISTERED);
    let (&start, &bytes) = all.range(..=at).next_back()?;
    (at + 4 <= start + bytes).then_some(start)
}

/// The value at a device's address, when work on it runs.
fn value(address: usize) -> Result<&'static AtomicU32, i32> {
    let host = address.wrapping_sub(DEVICE_SIDE);
    if registered(host).is_none() || !host.is_multiple_of(4) {
        return Err(misuse(code::EXCEPTION, "a value outside of registered memory, as devices see it"));
    }
    // SAFETY: registered memory is mapped; whoever unmaps it without ending that is caught by the system.
    Ok(unsafe { &*(host as *const AtomicU32) })
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipStreamWriteValue32(on: *mut c_void, address: *mut c_void, to: u32, flags: u32) -> i32 {
    let (at, write) = (address as usize, || stream(on));
    if flags != 0 {
        return misuse(code::INVALID, "flags of a write");
    }
    done(value(at).and_then(|_| write()).map(|stream| {
        stream.push(move |_| {
            value(at)?.store(to, Ordering::Release);
            Ok(())
        });
    }))
}

/// `hip_runtime_api.h`. Flag 0: until the value is at least `than`. It never gives up, as the real one does not.
#[unsafe(no_mangle)]
pub extern "C" fn hipStreamWaitValue32(on: *mut c_void, address: *mut c_void, than: u32, flags: u32, mask: u32) -> i32 {
    let at = address as usize;
    if flags != 0 || mask != u32::MAX {
        return misuse(code::INVALID, "a wait for a value with other flags or another mask than are emulated");
    }
    done(value(at).and_then(|_| stream(on)).map(|stream| {
        stream.push(move |running| {
            count("waits for values", 1);
            while value(at)?.load(Ordering::Acquire) < than {
                if running.aborted() {
                    return Err(code::EXCEPTION);
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            Ok(())
        });
    }))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `text` has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetPCIBusId(text: *mut c_char, len: i32, device: i32) -> i32 {
    let name = format!("0000:{:02X}:00.0\0", bus(device as u32));
    if text.is_null() || (len as usize) < name.len() {
        return misuse(code::INVALID, "no room for a bus id");
    }
    // SAFETY: by the caller.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr(), text.cast(), name.len()) };
    code::OK
}

/// Where a device is plugged in.
pub(crate) fn bus(device: u32) -> u32 {
    let first = std::env::var("LONGSPAN_EMULATOR_FIRST_BUS").ok().and_then(|b| b.parse().ok()).unwrap_or(16);
    first + device
}
