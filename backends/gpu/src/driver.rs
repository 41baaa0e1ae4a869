//! The driver's C functions that are used. A column of symbols per flavor; signatures are the same for all.
//!
//! Handles (contexts, streams, events, modules, pools) are opaque pointers of the driver's, here [`Handle`]; device memory is
//! a [`Address`]. Both have the size of a pointer.

use std::ffi::{c_char, c_int, c_uint, c_void};

use longspan_dylib::table;

/// An opaque pointer of the driver.
pub type Handle = usize;

/// A device address.
pub type Address = u64;

table! {
    /// The driver: `libcuda.so.1`. All functions return 0 or an error code.
    pub struct Driver {
        /// Starts the driver.
        fn init["cuInit"](flags: c_uint) -> c_int;
        /// Version of the driver's interface.
        fn version["cuDriverGetVersion"](version: *mut c_int) -> c_int;
        /// Number of devices.
        fn device_count["cuDeviceGetCount"](count: *mut c_int) -> c_int;
        /// A device.
        fn device["cuDeviceGet"](device: *mut c_int, ordinal: c_int) -> c_int;
        /// Name of a device.
        fn device_name["cuDeviceGetName"](name: *mut c_char, len: c_int, device: c_int) -> c_int;
        /// Total memory in bytes.
        fn device_memory["cuDeviceTotalMem_v2"](bytes: *mut usize, device: c_int) -> c_int;
        /// A figure of a device.
        fn device_attribute["cuDeviceGetAttribute"](value: *mut c_int, attribute: c_int, device: c_int) -> c_int;
        /// Whether `device` can access memory of `peer`.
        fn can_access_peer["cuDeviceCanAccessPeer"](can: *mut c_int, device: c_int, peer: c_int) -> c_int;
        /// The context that all users of a device in this process share.
        fn retain_context["cuDevicePrimaryCtxRetain"](context: *mut Handle, device: c_int) -> c_int;
        /// Makes a context current on this thread.
        fn push_context["cuCtxPushCurrent_v2"](context: Handle) -> c_int;
        /// Makes the context before it current again.
        fn pop_context["cuCtxPopCurrent_v2"](context: *mut Handle) -> c_int;
        /// Lets the current context access memory of `peer`.
        fn enable_peer["cuCtxEnablePeerAccess"](peer: Handle, flags: c_uint) -> c_int;
        /// Least and greatest stream priority.
        fn priorities["cuCtxGetStreamPriorityRange"](least: *mut c_int, greatest: *mut c_int) -> c_int;
        /// Free and total memory of the current context's device.
        fn memory_info["cuMemGetInfo_v2"](free: *mut usize, total: *mut usize) -> c_int;
        /// Plain memory, which peers may access.
        fn alloc["cuMemAlloc_v2"](address: *mut Address, bytes: usize) -> c_int;
        /// Frees plain memory.
        fn free["cuMemFree_v2"](address: Address) -> c_int;
        /// A pool of memory.
        fn pool_create["cuMemPoolCreate"](pool: *mut Handle, properties: *const PoolProperties) -> c_int;
        /// Sets a pool's attribute.
        fn pool_set["cuMemPoolSetAttribute"](pool: Handle, attribute: c_int, value: *mut c_void) -> c_int;
        /// Reads a pool's attribute.
        fn pool_get["cuMemPoolGetAttribute"](pool: Handle, attribute: c_int, value: *mut c_void) -> c_int;
        /// Gives memory of a pool that is not in use back to the device, down to `keep` bytes.
        fn pool_trim["cuMemPoolTrimTo"](pool: Handle, keep: usize) -> c_int;
        /// Memory of a pool, in stream order.
        fn pool_alloc["cuMemAllocFromPoolAsync"](
            address: *mut Address, bytes: usize, pool: Handle, stream: Handle,
        ) -> c_int;
        /// Frees memory of a pool, in stream order.
        fn pool_free["cuMemFreeAsync"](address: Address, stream: Handle) -> c_int;
        /// Host memory that the device reads and writes directly.
        fn host_alloc["cuMemHostAlloc"](host: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int;
        /// Frees such memory.
        fn host_free["cuMemFreeHost"](host: *mut c_void) -> c_int;
        /// What the driver knows of an address.
        fn pointer_attribute["cuPointerGetAttribute"](
            value: *mut c_void, attribute: c_int, address: Address,
        ) -> c_int;
        /// A stream.
        fn stream_create["cuStreamCreateWithPriority"](
            stream: *mut Handle, flags: c_uint, priority: c_int,
        ) -> c_int;
        /// Destroys a stream once its work is done.
        fn stream_destroy["cuStreamDestroy_v2"](stream: Handle) -> c_int;
        /// Work queued from now on waits for an event.
        fn stream_wait["cuStreamWaitEvent"](stream: Handle, event: Handle, flags: c_uint) -> c_int;
        /// The context of a stream.
        fn stream_context["cuStreamGetCtx"](stream: Handle, context: *mut Handle) -> c_int;
        /// An event.
        fn event_create["cuEventCreate"](event: *mut Handle, flags: c_uint) -> c_int;
        /// Records an event.
        fn event_record["cuEventRecord"](event: Handle, stream: Handle) -> c_int;
        /// Whether an event has happened.
        fn event_query["cuEventQuery"](event: Handle) -> c_int;
        /// Milliseconds between two events.
        fn event_elapsed["cuEventElapsedTime"](milliseconds: *mut f32, from: Handle, to: Handle) -> c_int;
        /// Host to device.
        fn copy_to_device["cuMemcpyHtoDAsync_v2"](
            to: Address, from: *const c_void, bytes: usize, stream: Handle,
        ) -> c_int;
        /// Device to host.
        fn copy_to_host["cuMemcpyDtoHAsync_v2"](
            to: *mut c_void, from: Address, bytes: usize, stream: Handle,
        ) -> c_int;
        /// Between any two addresses.
        fn copy["cuMemcpyAsync"](to: Address, from: Address, bytes: usize, stream: Handle) -> c_int;
        /// Rows with a pitch, by a copy engine.
        fn copy_2d["cuMemcpy2DAsync_v2"](copy: *const Copy2d, stream: Handle) -> c_int;
        /// Fills with a 16-bit pattern.
        fn fill_16["cuMemsetD16Async"](to: Address, value: u16, count: usize, stream: Handle) -> c_int;
        /// Fills with a 32-bit pattern.
        fn fill_32["cuMemsetD32Async"](to: Address, value: c_uint, count: usize, stream: Handle) -> c_int;
        /// Loads compiled kernels.
        fn module_load["cuModuleLoadData"](module: *mut Handle, image: *const c_void) -> c_int;
        /// A kernel of a module.
        fn module_function["cuModuleGetFunction"](
            function: *mut Handle, module: Handle, name: *const c_char,
        ) -> c_int;
        /// Sets a kernel's attribute.
        fn function_set["cuFuncSetAttribute"](function: Handle, attribute: c_int, value: c_int) -> c_int;
        /// Launches a kernel.
        fn launch["cuLaunchKernel"](
            function: Handle,
            grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
            block_x: c_uint, block_y: c_uint, block_z: c_uint,
            shared_bytes: c_uint, stream: Handle,
            parameters: *mut *mut c_void, extra: *mut *mut c_void,
        ) -> c_int;
        /// Name of an error.
        fn error_name["cuGetErrorName"](code: c_int, name: *mut *const c_char) -> c_int;
        /// Text of an error.
        fn error_text["cuGetErrorString"](code: c_int, text: *mut *const c_char) -> c_int;
    }
}

/// `CUmemPoolProps`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PoolProperties {
    /// 1: pinned on the device.
    pub kind: c_int,
    /// 0: no export.
    pub handles: c_int,
    /// 1: a device.
    pub location: c_int,
    /// Which device.
    pub ordinal: c_int,
    /// Only for other systems.
    pub security: usize,
    /// 0: as large as the device.
    pub limit: usize,
    /// 0.
    pub reserved: [u64; 7],
}

/// `CUDA_MEMCPY2D`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Copy2d {
    /// One side.
    pub from: Side2d,
    /// The other.
    pub to: Side2d,
    /// Bytes of a row.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
}

/// One side of a [`Copy2d`].
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Side2d {
    /// Bytes from the start of a row.
    pub x: usize,
    /// First row.
    pub y: usize,
    /// Kind of memory; see [`crate::Codes::unified`].
    pub kind: c_uint,
    /// Address in host memory.
    pub host: usize,
    /// Address in unified memory.
    pub device: Address,
    /// 0: not an array.
    pub array: Handle,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

const _: () = {
    assert!(size_of::<PoolProperties>() == 88);
    assert!(size_of::<Side2d>() == 56);
    assert!(size_of::<Copy2d>() == 128);
    assert!(size_of::<Handle>() == size_of::<*mut c_void>() && size_of::<Address>() == size_of::<Handle>());
};
