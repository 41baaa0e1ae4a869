//! Device memory as counted handles, page-locked host memory, and how much of it there is.

use std::any::Any;
use std::ffi::c_void;
use std::fmt::{Debug, Formatter};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ascendcl_sys::{aclError, aclrtMemMallocPolicy};
use longspan_hal::{Error, Result};

use crate::context::{Context, check};

/// A counted handle of device memory.
#[derive(Clone, Debug)]
pub struct AscendBuffer(Arc<Block>);

struct Block {
    context: Arc<Context>,
    meter: Arc<Meter>,
    address: usize,
    bytes: usize,
    /// The communicator that peers write it through, 0 for none.
    window: u64,
    kind: Kind,
}

enum Kind {
    Adopted { _owner: Option<Arc<dyn Any + Send + Sync>> },
    Own,
}

impl Debug for Block {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block").field("address", &self.address).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Bytes allocated through one device handle.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    used: AtomicU64,
    peak: AtomicU64,
}

impl Meter {
    fn add(&self, bytes: usize) {
        let now = self.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }

    /// Now, and at most.
    pub fn figures(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }
}

impl AscendBuffer {
    /// New memory, for the window of communicator `window` if that is not 0.
    pub(crate) fn new(context: &Arc<Context>, meter: &Arc<Meter>, bytes: usize, window: u64) -> Result<Self> {
        let mut raw: *mut c_void = std::ptr::null_mut();
        if bytes > 0 {
            let (free, total) = context.memory()?;
            let out = || Error::OutOfMemory { wanted: bytes as u64, free: free as u64 };
            if bytes > total {
                return Err(out());
            }
            let policy = aclrtMemMallocPolicy::ACL_MEM_MALLOC_HUGE_FIRST;
            // SAFETY: the pointer is valid for the write.
            match unsafe { (context.api.runtime.aclrtMalloc)(&mut raw, bytes, policy) } {
                aclError::ACL_ERROR_RT_MEMORY_ALLOCATION => return Err(out()),
                code => check("aclrtMalloc", code)?,
            }
        }
        meter.add(bytes);
        let (context, meter) = (Arc::clone(context), Arc::clone(meter));
        Ok(Self(Arc::new(Block { context, meter, address: raw as usize, bytes, window, kind: Kind::Own })))
    }

    /// Memory of somebody else.
    pub(crate) fn adopt(
        context: &Arc<Context>,
        meter: &Arc<Meter>,
        pointer: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        if pointer.is_null() || !(pointer as usize).is_multiple_of(16) {
            return Err(Error::invalid("pointer", "device memory is not null and aligned to 16 bytes"));
        }
        let (context, meter) = (Arc::clone(context), Arc::clone(meter));
        let kind = Kind::Adopted { _owner: owner };
        Ok(Self(Arc::new(Block { context, meter, address: pointer as usize, bytes, window: 0, kind })))
    }

    /// Address on the device.
    pub(crate) fn address(&self) -> usize {
        self.0.address
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The communicator whose window it is, 0 for none.
    pub(crate) fn window(&self) -> u64 {
        self.0.window
    }

    /// Whether both name the same memory.
    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if matches!(self.kind, Kind::Own) {
            self.meter.used.fetch_sub(self.bytes as u64, Ordering::Relaxed);
            if self.address != 0 && self.context.bind().is_ok() {
                // SAFETY: from `aclrtMalloc`, freed once; streams keep handles of what queued work uses. A failure leaks.
                let _ = unsafe { (self.context.api.runtime.aclrtFree)(self.address as *mut c_void) };
            }
        }
    }
}

/// Page-locked host memory, which asynchronous copies need.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    address: usize,
    bytes: usize,
}

impl Pinned {
    /// `bytes` (at least 1) of undefined content.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let mut raw: *mut c_void = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the write.
        check("aclrtMallocHost", unsafe { (context.api.runtime.aclrtMallocHost)(&mut raw, bytes) })?;
        if raw.is_null() {
            return Err(Error::OutOfMemory { wanted: bytes as u64, free: 0 });
        }
        Ok(Self { context: Arc::clone(context), address: raw as usize, bytes })
    }

    /// Address on the host.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Writes `from`, which has exactly its bytes, before any copy of it is queued.
    pub fn write(&mut self, from: &[u8]) {
        let n = from.len().min(self.bytes);
        // SAFETY: own memory of these bytes, that no queued copy uses yet.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.address as *mut u8, n) };
    }

    /// Reads into `to`, after every copy into it ran.
    pub fn read(&self, to: &mut [u8]) {
        let n = to.len().min(self.bytes);
        // SAFETY: own memory of these bytes; the caller synchronised.
        unsafe { std::ptr::copy_nonoverlapping(self.address as *const u8, to.as_mut_ptr(), n) };
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: from `aclrtMallocHost`, freed once; streams keep it until its copies ran. A failure leaks.
            let _ = unsafe { (self.context.api.runtime.aclrtFreeHost)(self.address as *mut c_void) };
        }
    }
}
