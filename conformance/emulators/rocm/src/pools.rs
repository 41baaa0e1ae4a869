//! `libamdhip64`: memory, plain, of pools and page-locked.

use std::ffi::c_void;

use crate::memory;
use crate::runtime::{device, done, put, stream};
use crate::state::{Handles, code, misuse};

/// Pools differ by device only: all take their memory from the same place.
static POOLS: Handles<u32> = Handles::new();

/// `hip_runtime_api.h`.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMalloc(to: *mut *mut c_void, bytes: usize) -> i32 {
    if bytes == 0 {
        return misuse(code::INVALID, "hipMalloc of 0 bytes");
    }
    match memory::allocate(bytes, device()) {
        // SAFETY: by the caller.
        Ok(memory) => unsafe { put(to, memory) },
        Err(code) => code,
    }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipFree(memory: *mut c_void) -> i32 {
    memory::free(memory)
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `to` is valid for a write, `properties` points to 88 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMemPoolCreate(to: *mut *mut c_void, properties: *const [i32; 22]) -> i32 {
    if properties.is_null() {
        return misuse(code::INVALID, "a pool without properties");
    }
    // SAFETY: by the caller.
    let words = unsafe { properties.read_unaligned() };
    let [kind, handles, location, ordinal, rest @ ..] = words;
    if kind != 1 || handles != 0 || location != 1 || ordinal != device() as i32 || rest.iter().any(|w| *w != 0) {
        return misuse(code::INVALID, "a pool that is not pinned on the current device, or with other properties set");
    }
    // SAFETY: by the caller.
    unsafe { put(to, POOLS.add(device())) }
}

/// `hip_runtime_api.h`. Accepted, and of no effect.
///
/// # Safety
/// `value` points to a value of the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMemPoolSetAttribute(pool: *mut c_void, attribute: i32, value: *mut c_void) -> i32 {
    if POOLS.get(pool).is_none() || !(1..=4).contains(&attribute) || value.is_null() {
        return misuse(code::INVALID, "a pool that does not live, or an attribute that can't be set");
    }
    code::OK
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `value` is valid for a write of the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMemPoolGetAttribute(pool: *mut c_void, attribute: i32, value: *mut c_void) -> i32 {
    if POOLS.get(pool).is_none() || ![5, 7].contains(&attribute) {
        return misuse(code::INVALID, "a pool that does not live, or an attribute that is not emulated");
    }
    // Nothing is held back.
    // SAFETY: by the caller; both attributes are 64 bits wide.
    unsafe { put(value.cast::<u64>(), 0) }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipMemPoolTrimTo(pool: *mut c_void, _keep: usize) -> i32 {
    if POOLS.get(pool).is_some() { code::OK } else { misuse(code::HANDLE, "a pool that does not live") }
}

/// `hip_runtime_api.h`. The memory is there when the stream gets to it: until then it may still be poisoned.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMallocFromPoolAsync(
    to: *mut *mut c_void,
    bytes: usize,
    pool: *mut c_void,
    on: *mut c_void,
) -> i32 {
    let take = || {
        let stream = stream(on)?;
        let owner = POOLS.get(pool).ok_or_else(|| misuse(code::HANDLE, "a pool that does not live"))?;
        if bytes == 0 || *owner != device() {
            return Err(misuse(code::INVALID, "0 bytes, or a pool of another device"));
        }
        let memory = memory::allocate(bytes, *owner)?;
        let span = memory::span(memory, bytes).ok_or(code::MEMORY)?;
        stream.push(move |_| span.poison());
        Ok(memory)
    };
    match take() {
        // SAFETY: by the caller.
        Ok(memory) => unsafe { put(to, memory) },
        Err(code) => code,
    }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipFreeAsync(memory: *mut c_void, on: *mut c_void) -> i32 {
    let release = || {
        let stream = stream(on)?;
        if memory::span(memory, 1).is_none() {
            return Err(misuse(code::INVALID, "a free of device memory that is not allocated (freed twice?)"));
        }
        let at = memory as usize;
        stream.push(move |_| match memory::free(at as *mut c_void) {
            code::OK => Ok(()),
            code => Err(code),
        });
        Ok(())
    };
    done(release())
}

/// `hip_runtime_api.h`. Flag 1: for every device.
///
/// # Safety
/// `to` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipHostMalloc(to: *mut *mut c_void, bytes: usize, _flags: u32) -> i32 {
    let memory = memory::allocate_host(bytes);
    // SAFETY: by the caller.
    if memory.is_null() { code::MEMORY } else { unsafe { put(to, memory) } }
}

/// `hip_runtime_api.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hipHostFree(memory: *mut c_void) -> i32 {
    memory::free_host(memory)
}
