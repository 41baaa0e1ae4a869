//! Copies between host and device, and strided copies within the device.

use std::ffi::c_void;
use std::time::Duration;

use ascendcl_sys::aclrtMemcpyKind;
use longspan_hal::{Result, Strided};

use crate::context::check;
use crate::memory::{AscendBuffer, Pinned};
use crate::ops::Ops;
use crate::stream::{Kept, StreamState};
use crate::tensor::Tensor;

/// Strided elements of a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub buffer: &'a AscendBuffer,
    pub at: &'a Strided,
}

impl Place<'_> {
    fn address(&self) -> usize {
        self.buffer.address() + self.at.offset() * self.at.dtype().size()
    }
}

/// Queues a copy of dense bytes.
fn bytes(on: &StreamState, from: usize, to: usize, n: usize, kind: aclrtMemcpyKind) -> Result<()> {
    // SAFETY: both sides have `n` bytes and are kept until the copy ran.
    let code = unsafe {
        (on.context.api.runtime.aclrtMemcpyAsync)(to as *mut c_void, n, from as *const c_void, n, kind, on.raw())
    };
    check("aclrtMemcpyAsync", code)
}

/// Queues a copy between places of equal dtype and extent.
pub(crate) fn on_device(on: &StreamState, from: Place<'_>, to: Place<'_>) -> Result<()> {
    if to.at.is_empty() {
        return Ok(());
    }
    if from.at.is_dense() && to.at.is_dense() {
        let kind = aclrtMemcpyKind::ACL_MEMCPY_DEVICE_TO_DEVICE;
        return bytes(on, from.address(), to.address(), to.at.bytes(), kind);
    }
    Ops::new(on).copy(&Tensor::view(from.buffer, from.at), &Tensor::view(to.buffer, to.at))
}

/// Queues a copy from the host; `host` may be reused when this returns.
pub(crate) fn upload(on: &StreamState, host: &[u8], to: Place<'_>, staging: Option<&AscendBuffer>) -> Result<()> {
    if to.at.is_empty() {
        return Ok(());
    }
    let mut pinned = Pinned::new(&on.context, host.len())?;
    pinned.write(host);
    let kind = aclrtMemcpyKind::ACL_MEMCPY_HOST_TO_DEVICE;
    let mut kept = Kept { buffers: vec![to.buffer.clone()], pinned: Vec::new() };
    match staging {
        None => bytes(on, pinned.address(), to.address(), host.len(), kind)?,
        Some(staging) => {
            bytes(on, pinned.address(), staging.address(), host.len(), kind)?;
            let dense = Strided::dense(to.at.dtype(), to.at.extent());
            on_device(on, Place { buffer: staging, at: &dense }, to)?;
            kept.buffers.push(staging.clone());
        }
    }
    kept.pinned.push(pinned);
    on.keep(kept)
}

/// Copies to the host and waits for it.
pub(crate) fn download(
    on: &StreamState,
    from: Place<'_>,
    host: &mut [u8],
    staging: Option<&AscendBuffer>,
    limit: Duration,
) -> Result<()> {
    if from.at.is_empty() {
        return on.synchronize(limit);
    }
    let pinned = Pinned::new(&on.context, host.len())?;
    let kind = aclrtMemcpyKind::ACL_MEMCPY_DEVICE_TO_HOST;
    let source = match staging {
        None => from.address(),
        Some(staging) => {
            let dense = Strided::dense(from.at.dtype(), from.at.extent());
            on_device(on, from, Place { buffer: staging, at: &dense })?;
            staging.address()
        }
    };
    bytes(on, source, pinned.address(), host.len(), kind)?;
    let result = on.synchronize(limit);
    if result.is_ok() {
        pinned.read(host);
        return Ok(());
    }
    // The copy may still run: what it uses stays until then.
    let buffers = [Some(from.buffer), staging].into_iter().flatten().cloned().collect();
    on.keep(Kept { buffers, pinned: vec![pinned] })?;
    result
}
