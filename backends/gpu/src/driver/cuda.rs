//! What only CUDA's driver has in this shape.

use std::ffi::{c_char, c_int, c_uint, c_void};

use longspan_dylib::{Returned, table};
use longspan_hal::Result;

use super::{Address, Handle, Rows};
use crate::machine::c_text;

table! {
    /// `libcuda.so.1`.
    pub(super) struct Cuda {
        /// The context that all users of a device in this process share.
        fn retain_context["cuDevicePrimaryCtxRetain"](context: *mut Handle, device: c_int) -> c_int;
        /// Makes a context current on this thread.
        fn push_context["cuCtxPushCurrent_v2"](context: Handle) -> c_int;
        /// Makes the context before it current again.
        fn pop_context["cuCtxPopCurrent_v2"](context: *mut Handle) -> c_int;
        /// Lets the current context access memory of `peer`.
        fn enable_peer["cuCtxEnablePeerAccess"](peer: Handle, flags: c_uint) -> c_int;
        /// The context of a stream.
        fn stream_context["cuStreamGetCtx"](stream: Handle, context: *mut Handle) -> c_int;
        /// Between any two addresses.
        fn copy["cuMemcpyAsync"](to: Address, from: Address, bytes: usize, stream: Handle) -> c_int;
        /// Rows with a pitch, by a copy engine.
        fn copy_2d["cuMemcpy2DAsync_v2"](copy: *const Copy2d, stream: Handle) -> c_int;
        /// Sets a kernel's attribute.
        fn function_set["cuFuncSetAttribute"](function: Handle, attribute: c_int, value: c_int) -> c_int;
        /// Name of an error.
        fn error_name["cuGetErrorName"](code: c_int, name: *mut *const c_char) -> c_int;
        /// Text of an error.
        fn error_text["cuGetErrorString"](code: c_int, text: *mut *const c_char) -> c_int;
    }
}

/// `CUDA_MEMCPY2D`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Copy2d {
    from: Side2d,
    to: Side2d,
    width: usize,
    height: usize,
}

/// One side of a [`Copy2d`].
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Side2d {
    /// Bytes from the start of a row.
    x: usize,
    /// First row.
    y: usize,
    /// Kind of memory.
    kind: c_uint,
    /// Address in host memory.
    host: usize,
    /// Address in unified memory.
    device: Address,
    /// 0: not an array.
    array: Handle,
    /// Bytes from one row to the next.
    pitch: usize,
}

/// `CU_MEMORYTYPE_UNIFIED`: the address says where it is.
const UNIFIED: c_uint = 4;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const SHARED_BYTES: c_int = 8;

impl Cuda {
    pub(super) fn retain(&self, context: &mut Handle, device: c_int) -> Returned<c_int> {
        // SAFETY: `context` is written.
        unsafe { self.retain_context(context, device) }
    }

    pub(super) fn push(&self, context: Handle, _before: &mut Handle) -> Returned<c_int> {
        // SAFETY: contexts of devices live as long as the process.
        unsafe { self.push_context(context) }
    }

    pub(super) fn pop(&self, _before: Handle) -> Returned<c_int> {
        let mut popped = 0;
        // SAFETY: `popped` is written.
        unsafe { self.pop_context(&mut popped) }
    }

    pub(super) fn enable(&self, peer: Handle) -> Returned<c_int> {
        // SAFETY: contexts of devices live as long as the process.
        unsafe { self.enable_peer(peer, 0) }
    }

    pub(super) unsafe fn owner(&self, stream: Handle, context: &mut Handle) -> Result<Returned<c_int>> {
        // SAFETY: the stream is alive by the caller, `context` is written.
        Ok(unsafe { self.stream_context(stream, context) })
    }

    pub(super) unsafe fn plain(&self, to: Address, from: Address, bytes: usize, stream: Handle) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.copy(to, from, bytes, stream) }
    }

    pub(super) unsafe fn rows(&self, rows: &Rows, stream: Handle) -> Returned<c_int> {
        let side = |device, pitch| Side2d { kind: UNIFIED, device, pitch, ..Side2d::default() };
        let copy = Copy2d {
            from: side(rows.from, rows.from_pitch),
            to: side(rows.to, rows.to_pitch),
            width: rows.width,
            height: rows.height,
        };
        // SAFETY: `copy` is read by the call; memory and stream by the caller.
        unsafe { self.copy_2d(&copy, stream) }
    }

    pub(super) unsafe fn allow_shared(&self, function: Handle, bytes: u32) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.function_set(function, SHARED_BYTES, bytes as c_int) }
    }

    pub(super) fn text(&self, code: c_int) -> String {
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both pointers are set to static strings, or left null for unknown codes.
        unsafe {
            let _ = self.error_name(code, &mut name);
            let _ = self.error_text(code, &mut text);
            format!("{} ({})", c_text(text), c_text(name))
        }
    }
}

const _: () = {
    assert!(size_of::<Side2d>() == 56);
    assert!(size_of::<Copy2d>() == 128);
    assert!(size_of::<*const c_void>() == size_of::<Handle>());
};
