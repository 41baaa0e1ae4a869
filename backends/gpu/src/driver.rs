//! The driver's C functions that are used: [`Shared`], a column of symbols per flavor where signatures are the same, and
//! what each flavor has in a shape of its own (`driver/cuda.rs`, `driver/hip.rs`), behind the same methods of [`Driver`].
//!
//! Handles (contexts, streams, events, modules, pools) are opaque pointers of the driver's, here [`Handle`]; device memory is
//! a [`Address`]. Both have the size of a pointer.

mod between;
mod cuda;
mod hip;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ops::Deref;
use std::sync::OnceLock;

use longspan_dylib::{Library, Returned, table};
use longspan_hal::Result;

pub(crate) use between::{Between, MEMORY_HANDLE, MemoryHandle};
use cuda::Cuda;
use hip::Hip;

/// An opaque pointer of the driver.
pub type Handle = usize;

/// A device address.
pub type Address = u64;

/// A vendor's driver: the column of symbols in the tables.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flavor {
    /// `libcuda.so.1`.
    Cuda,
    /// `libamdhip64.so`.
    Hip,
}

/// A loaded driver.
#[derive(Debug)]
pub struct Driver {
    shared: Shared,
    native: Native,
    flavor: Flavor,
    between: OnceLock<Result<Between>>,
}

#[derive(Debug)]
enum Native {
    Cuda(Cuda),
    Hip(Hip),
}

table! {
    /// What drivers share: `libcuda.so.1`, `libamdhip64.so`. All functions return 0 or an error code.
    pub struct Shared {
        /// Starts the driver.
        fn init["cuInit", "hipInit"](flags: c_uint) -> c_int;
        /// Version of the driver's interface.
        fn version["cuDriverGetVersion", "hipDriverGetVersion"](version: *mut c_int) -> c_int;
        /// Number of devices.
        fn device_count["cuDeviceGetCount", "hipGetDeviceCount"](count: *mut c_int) -> c_int;
        /// A device.
        fn device["cuDeviceGet", "hipDeviceGet"](device: *mut c_int, ordinal: c_int) -> c_int;
        /// Name of a device.
        fn device_name["cuDeviceGetName", "hipDeviceGetName"](name: *mut c_char, len: c_int, device: c_int) -> c_int;
        /// Total memory in bytes.
        fn device_memory["cuDeviceTotalMem_v2", "hipDeviceTotalMem"](bytes: *mut usize, device: c_int) -> c_int;
        /// A figure of a device.
        fn device_attribute["cuDeviceGetAttribute", "hipDeviceGetAttribute"](value: *mut c_int, attribute: c_int, device: c_int) -> c_int;
        /// Whether `device` can access memory of `peer`.
        fn can_access_peer["cuDeviceCanAccessPeer", "hipDeviceCanAccessPeer"](can: *mut c_int, device: c_int, peer: c_int) -> c_int;
        /// Least and greatest stream priority.
        fn priorities["cuCtxGetStreamPriorityRange", "hipDeviceGetStreamPriorityRange"](least: *mut c_int, greatest: *mut c_int) -> c_int;
        /// Free and total memory of the current context's device.
        fn memory_info["cuMemGetInfo_v2", "hipMemGetInfo"](free: *mut usize, total: *mut usize) -> c_int;
        /// Plain memory, which peers may access.
        fn alloc["cuMemAlloc_v2", "hipMalloc"](address: *mut Address, bytes: usize) -> c_int;
        /// Frees plain memory.
        fn free["cuMemFree_v2", "hipFree"](address: Address) -> c_int;
        /// A pool of memory.
        fn pool_create["cuMemPoolCreate", "hipMemPoolCreate"](pool: *mut Handle, properties: *const PoolProperties) -> c_int;
        /// Sets a pool's attribute.
        fn pool_set["cuMemPoolSetAttribute", "hipMemPoolSetAttribute"](pool: Handle, attribute: c_int, value: *mut c_void) -> c_int;
        /// Reads a pool's attribute.
        fn pool_get["cuMemPoolGetAttribute", "hipMemPoolGetAttribute"](pool: Handle, attribute: c_int, value: *mut c_void) -> c_int;
        /// Gives memory of a pool that is not in use back to the device, down to `keep` bytes.
        fn pool_trim["cuMemPoolTrimTo", "hipMemPoolTrimTo"](pool: Handle, keep: usize) -> c_int;
        /// Memory of a pool, in stream order.
        fn pool_alloc["cuMemAllocFromPoolAsync", "hipMallocFromPoolAsync"](
            address: *mut Address, bytes: usize, pool: Handle, stream: Handle,
        ) -> c_int;
        /// Frees memory of a pool, in stream order.
        fn pool_free["cuMemFreeAsync", "hipFreeAsync"](address: Address, stream: Handle) -> c_int;
        /// Host memory that the device reads and writes directly.
        fn host_alloc["cuMemHostAlloc", "hipHostMalloc"](host: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int;
        /// Frees such memory.
        fn host_free["cuMemFreeHost", "hipHostFree"](host: *mut c_void) -> c_int;
        /// What the driver knows of an address.
        fn pointer_attribute["cuPointerGetAttribute", "hipPointerGetAttribute"](
            value: *mut c_void, attribute: c_int, address: Address,
        ) -> c_int;
        /// A stream.
        fn stream_create["cuStreamCreateWithPriority", "hipStreamCreateWithPriority"](
            stream: *mut Handle, flags: c_uint, priority: c_int,
        ) -> c_int;
        /// Destroys a stream once its work is done.
        fn stream_destroy["cuStreamDestroy_v2", "hipStreamDestroy"](stream: Handle) -> c_int;
        /// Work queued from now on waits for an event.
        fn stream_wait["cuStreamWaitEvent", "hipStreamWaitEvent"](stream: Handle, event: Handle, flags: c_uint) -> c_int;
        /// An event.
        fn event_create["cuEventCreate", "hipEventCreateWithFlags"](event: *mut Handle, flags: c_uint) -> c_int;
        /// Records an event.
        fn event_record["cuEventRecord", "hipEventRecord"](event: Handle, stream: Handle) -> c_int;
        /// Whether an event has happened.
        fn event_query["cuEventQuery", "hipEventQuery"](event: Handle) -> c_int;
        /// Milliseconds between two events.
        fn event_elapsed["cuEventElapsedTime", "hipEventElapsedTime"](milliseconds: *mut f32, from: Handle, to: Handle) -> c_int;
        /// Host to device.
        fn copy_to_device["cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"](
            to: Address, from: *const c_void, bytes: usize, stream: Handle,
        ) -> c_int;
        /// Device to host.
        fn copy_to_host["cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"](
            to: *mut c_void, from: Address, bytes: usize, stream: Handle,
        ) -> c_int;
        /// Fills with a 16-bit pattern.
        fn fill_16["cuMemsetD16Async", "hipMemsetD16Async"](to: Address, value: u16, count: usize, stream: Handle) -> c_int;
        /// Fills with a 32-bit pattern.
        fn fill_32["cuMemsetD32Async", "hipMemsetD32Async"](to: Address, value: c_uint, count: usize, stream: Handle) -> c_int;
        /// Loads compiled kernels.
        fn module_load["cuModuleLoadData", "hipModuleLoadData"](module: *mut Handle, image: *const c_void) -> c_int;
        /// A kernel of a module.
        fn module_function["cuModuleGetFunction", "hipModuleGetFunction"](
            function: *mut Handle, module: Handle, name: *const c_char,
        ) -> c_int;
        /// Launches a kernel.
        fn launch["cuLaunchKernel", "hipModuleLaunchKernel"](
            function: Handle,
            grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
            block_x: c_uint, block_y: c_uint, block_z: c_uint,
            shared_bytes: c_uint, stream: Handle,
            parameters: *mut *mut c_void, extra: *mut *mut c_void,
        ) -> c_int;
    }
}

/// Rows with a pitch, between any two addresses.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Written.
    pub to: Address,
    /// Bytes from one row to the next there.
    pub to_pitch: usize,
    /// Read.
    pub from: Address,
    /// Bytes from one row to the next there.
    pub from_pitch: usize,
    /// Bytes of a row.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
}

/// `CUmemPoolProps`, `hipMemPoolProps`.
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

impl Flavor {
    /// The column of symbols in the tables.
    pub const fn column(self) -> usize {
        match self {
            Self::Cuda => 0,
            Self::Hip => 1,
        }
    }
}

impl Deref for Driver {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// The same call in either shape. Each arm returns what the call did.
macro_rules! either {
    ($self:ident, $native:ident => $call:expr) => {
        match &$self.native {
            Native::Cuda($native) => $call,
            Native::Hip($native) => $call,
        }
    };
}

impl Driver {
    /// Takes every function from `library`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unavailable`] naming the library and the first symbol that is missing.
    pub fn load(library: Library, flavor: Flavor) -> Result<Self> {
        let shared = Shared::load(library.clone(), flavor.column())?;
        let native = match flavor {
            Flavor::Cuda => Native::Cuda(Cuda::load(library, flavor.column())?),
            Flavor::Hip => Native::Hip(Hip::new(library)?),
        };
        Ok(Self { shared, native, flavor, between: OnceLock::new() })
    }

    /// What ranks that are processes need, loaded by the first call.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unavailable`] if this version has less.
    pub(crate) fn between(&self) -> Result<&Between> {
        let load = || Between::load(self.shared.library().clone(), self.flavor);
        self.between.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    /// The context that all users of a device in this process share; on HIP, which has none, the device's number.
    pub fn retain_context(&self, context: &mut Handle, device: c_int) -> Returned<c_int> {
        either!(self, native => native.retain(context, device))
    }

    /// Makes a context of [`Driver::retain_context`] current on this thread; `before` is for [`Driver::pop_context`].
    pub fn push_context(&self, context: Handle, before: &mut Handle) -> Returned<c_int> {
        either!(self, native => native.push(context, before))
    }

    /// Makes the context before the last pushed one current again.
    pub fn pop_context(&self, before: Handle) -> Returned<c_int> {
        either!(self, native => native.pop(before))
    }

    /// Lets the current context access memory of `peer`, a context of [`Driver::retain_context`].
    pub fn enable_peer(&self, peer: Handle) -> Returned<c_int> {
        either!(self, native => native.enable(peer))
    }

    /// The context of a stream, as [`Driver::retain_context`] gives it.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unavailable`] if this version can't say.
    ///
    /// # Safety
    /// The stream is alive.
    pub unsafe fn stream_context(&self, stream: Handle, context: &mut Handle) -> Result<Returned<c_int>> {
        // SAFETY: by the caller.
        either!(self, native => unsafe { native.owner(stream, context) })
    }

    /// Queues a copy between any two addresses.
    ///
    /// # Safety
    /// Both sides have `bytes` and live until the copy ran; the stream is alive.
    pub unsafe fn copy(&self, to: Address, from: Address, bytes: usize, stream: Handle) -> Returned<c_int> {
        // SAFETY: by the caller.
        either!(self, native => unsafe { native.plain(to, from, bytes, stream) })
    }

    /// Queues a copy of rows, by a copy engine.
    ///
    /// # Safety
    /// As [`Driver::copy`].
    pub unsafe fn copy_2d(&self, rows: &Rows, stream: Handle) -> Returned<c_int> {
        // SAFETY: by the caller.
        either!(self, native => unsafe { native.rows(rows, stream) })
    }

    /// Lets a kernel take so much dynamic shared memory, where it must be told.
    ///
    /// # Safety
    /// The function is one of a loaded module.
    pub unsafe fn allow_shared(&self, function: Handle, bytes: u32) -> Option<Returned<c_int>> {
        match &self.native {
            // SAFETY: by the caller.
            Native::Cuda(native) => Some(unsafe { native.allow_shared(function, bytes) }),
            Native::Hip(_) => None,
        }
    }

    /// Name of a device's architecture, such as `gfx942:sramecc+:xnack-`, where the driver knows it.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unavailable`] if this version can't say.
    pub fn arch_name(&self, device: c_int) -> Result<Option<String>> {
        match &self.native {
            Native::Cuda(_) => Ok(None),
            Native::Hip(native) => native.arch_name(device).map(Some),
        }
    }

    /// Text and name of an error.
    pub fn error_text(&self, code: c_int) -> String {
        either!(self, native => native.text(code))
    }
}

const _: () = {
    assert!(size_of::<PoolProperties>() == 88);
    assert!(size_of::<Handle>() == size_of::<*mut c_void>() && size_of::<Address>() == size_of::<Handle>());
};
