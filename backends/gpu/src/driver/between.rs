//! What ranks that are processes of one host need of a driver: memory of another process, and values that streams write and
//! wait for. Loaded when it is first needed: where a version has less, everything else works.

use std::ffi::{c_char, c_int, c_uint, c_void};

use longspan_dylib::{Library, Returned, table};
use longspan_hal::Result;

use super::{Address, Flavor, Handle};

table! {
    /// `libcuda.so.1`, `libamdhip64.so`. All functions return 0 or an error code.
    struct Functions {
        /// A handle of plain memory, for other processes.
        fn export["cuIpcGetMemHandle", "hipIpcGetMemHandle"](handle: *mut MemoryHandle, address: Address) -> c_int;
        /// Memory of another process.
        fn import["cuIpcOpenMemHandle_v2", "hipIpcOpenMemHandle"](address: *mut Address, handle: MemoryHandle, flags: c_uint) -> c_int;
        /// Closes memory of another process.
        fn close["cuIpcCloseMemHandle", "hipIpcCloseMemHandle"](address: Address) -> c_int;
        /// Lets devices use memory of the host.
        fn register["cuMemHostRegister_v2", "hipHostRegister"](host: *mut c_void, bytes: usize, flags: c_uint) -> c_int;
        /// Ends that.
        fn unregister["cuMemHostUnregister", "hipHostUnregister"](host: *mut c_void) -> c_int;
        /// Where the device sees registered memory.
        fn device_address["cuMemHostGetDevicePointer_v2", "hipHostGetDevicePointer"](
            address: *mut Address, host: *mut c_void, flags: c_uint,
        ) -> c_int;
        /// The stream writes a value, after all its work before.
        fn write["cuStreamWriteValue32_v2", "hipStreamWriteValue32"](
            stream: Handle, address: Address, value: u32, flags: c_uint,
        ) -> c_int;
        /// Where a device is plugged in, as `0000:0b:00.0`.
        fn bus_id["cuDeviceGetPCIBusId", "hipDeviceGetPCIBusId"](text: *mut c_char, len: c_int, device: c_int) -> c_int;
    }
}

table! {
    /// The wait of `libcuda.so.1`.
    struct CudaWait {
        /// The stream waits for a value.
        fn wait["cuStreamWaitValue32_v2"](stream: Handle, address: Address, value: u32, flags: c_uint) -> c_int;
    }
}

table! {
    /// The wait of `libamdhip64.so`, which takes a mask.
    struct HipWait {
        /// The stream waits for a value.
        fn wait["hipStreamWaitValue32"](stream: Handle, address: Address, value: u32, flags: c_uint, mask: u32) -> c_int;
    }
}

/// `CUipcMemHandle`, `hipIpcMemHandle_t`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct MemoryHandle(pub [u8; MEMORY_HANDLE]);

/// Bytes of a [`MemoryHandle`].
pub(crate) const MEMORY_HANDLE: usize = 64;

/// The functions, in a vendor's shape.
#[derive(Debug)]
pub(crate) struct Between {
    functions: Functions,
    wait: Wait,
}

#[derive(Debug)]
enum Wait {
    Cuda(CudaWait),
    Hip(HipWait),
}

/// Access to the memory of another device is enabled by opening it.
const LAZY_PEER_ACCESS: c_uint = 1;
/// Of registered memory: for every context, and with an address for devices.
const PORTABLE_AND_MAPPED: c_uint = 1 | 2;
/// A wait ends when the value is at least the one given.
const AT_LEAST: c_uint = 0;

impl Between {
    pub(super) fn load(library: Library, flavor: Flavor) -> Result<Self> {
        let wait = match flavor {
            Flavor::Cuda => Wait::Cuda(CudaWait::load(library.clone(), 0)?),
            Flavor::Hip => Wait::Hip(HipWait::load(library.clone(), 0)?),
        };
        Ok(Self { functions: Functions::load(library, flavor.column())?, wait })
    }

    /// A handle of plain memory that starts at `address`; the driver checks the address.
    pub(crate) fn export(&self, address: Address) -> (Returned<c_int>, MemoryHandle) {
        let mut handle = MemoryHandle([0; MEMORY_HANDLE]);
        // SAFETY: `handle` is written.
        (unsafe { self.functions.export(&mut handle, address) }, handle)
    }

    /// Memory of another process, for the current context.
    pub(crate) fn import(&self, handle: MemoryHandle) -> (Returned<c_int>, Address) {
        let mut address = 0;
        // SAFETY: `address` is written.
        (unsafe { self.functions.import(&mut address, handle, LAZY_PEER_ACCESS) }, address)
    }

    /// Closes memory of another process.
    ///
    /// # Safety
    /// It came from [`Between::import`], is closed once, and no queued work uses it.
    pub(crate) unsafe fn close(&self, address: Address) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.functions.close(address) }
    }

    /// Lets devices use memory of the host, and says where the current context's sees it.
    ///
    /// # Safety
    /// It is mapped until [`Between::unregister`].
    pub(crate) unsafe fn register(&self, host: *mut c_void, bytes: usize) -> (Returned<c_int>, Address) {
        // SAFETY: by the caller.
        let registered = unsafe { self.functions.register(host, bytes, PORTABLE_AND_MAPPED) };
        let mut address = 0;
        if registered.value != 0 {
            return (registered, address);
        }
        // SAFETY: `address` is written; the memory was registered.
        (unsafe { self.functions.device_address(&mut address, host, 0) }, address)
    }

    /// Ends [`Between::register`].
    ///
    /// # Safety
    /// The memory is registered, and no queued work uses it.
    pub(crate) unsafe fn unregister(&self, host: *mut c_void) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.functions.unregister(host) }
    }

    /// The stream writes `value`, after all its work before.
    ///
    /// # Safety
    /// The stream is alive; the address is of registered memory, until the stream got there.
    pub(crate) unsafe fn write(&self, stream: Handle, address: Address, value: u32) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.functions.write(stream, address, value, 0) }
    }

    /// The stream waits until the value is at least `value`.
    ///
    /// # Safety
    /// As [`Between::write`].
    pub(crate) unsafe fn wait(&self, stream: Handle, address: Address, value: u32) -> Returned<c_int> {
        match &self.wait {
            // SAFETY: by the caller.
            Wait::Cuda(cuda) => unsafe { cuda.wait(stream, address, value, AT_LEAST) },
            // SAFETY: by the caller.
            Wait::Hip(hip) => unsafe { hip.wait(stream, address, value, AT_LEAST, u32::MAX) },
        }
    }

    /// Where a device is plugged in, the same in every process of a host.
    pub(crate) fn bus_id(&self, device: c_int) -> (Returned<c_int>, String) {
        let mut text = [0u8; 64];
        // SAFETY: at most 63 bytes of `text` are written.
        let asked = unsafe { self.functions.bus_id(text.as_mut_ptr().cast(), 63, device) };
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        (asked, String::from_utf8_lossy(&text[..end]).to_ascii_lowercase())
    }
}

const _: () = assert!(size_of::<MemoryHandle>() == MEMORY_HANDLE);
