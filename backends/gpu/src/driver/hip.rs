//! What only HIP has in this shape.
//!
//! HIP has no contexts of its own: its context functions leave the device current that was pushed last, also after a pop, and
//! enabling peer access between contexts does nothing. So a context is a device's number here, and the runtime's functions do
//! the work.

use std::ffi::{c_char, c_int, c_uint};

use longspan_dylib::{Library, Returned, table};
use longspan_hal::{Error, Result};

use super::{Address, Handle, Rows};
use crate::machine::c_text;

table! {
    /// `libamdhip64.so`.
    struct Functions {
        /// The current device of this thread.
        fn current_device["hipGetDevice"](device: *mut c_int) -> c_int;
        /// Makes a device current on this thread.
        fn set_device["hipSetDevice"](device: c_int) -> c_int;
        /// Lets the current device access memory of `peer`.
        fn enable_peer["hipDeviceEnablePeerAccess"](peer: c_int, flags: c_uint) -> c_int;
        /// Between two addresses.
        fn copy["hipMemcpyAsync"](to: Address, from: Address, bytes: usize, kind: c_int, stream: Handle) -> c_int;
        /// Rows with a pitch.
        fn copy_2d["hipMemcpy2DAsync"](
            to: Address, to_pitch: usize, from: Address, from_pitch: usize, width: usize, height: usize, kind: c_int,
            stream: Handle,
        ) -> c_int;
        /// Name of an error.
        fn error_name["hipGetErrorName"](code: c_int) -> *const c_char;
        /// Text of an error.
        fn error_text["hipGetErrorString"](code: c_int) -> *const c_char;
    }
}

type StreamDevice = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Properties = unsafe extern "C" fn(*mut PropertyBytes, c_int) -> c_int;

/// HIP's functions of their own shape.
#[derive(Debug)]
pub(super) struct Hip {
    functions: Functions,
    /// From ROCm 5.6 on.
    stream_device: Option<StreamDevice>,
    /// Which function fills a `hipDeviceProp_t`, and where the architecture's name is in it.
    properties: Option<(&'static str, Properties, usize)>,
}

/// Room for a `hipDeviceProp_t` of any version: 792 bytes in ROCm 5, 1472 in ROCm 6.
#[repr(C, align(16))]
struct PropertyBytes([u8; 4096]);

/// `hipMemcpyDefault`: the addresses say where they are.
const DEFAULT: c_int = 4;
/// `gcnArchName` in the structures of ROCm 6 and 5: the function, its offset.
const ARCH_NAME: [(&str, usize); 2] = [("hipGetDevicePropertiesR0600", 1160), ("hipGetDeviceProperties", 396)];
/// Bytes of `gcnArchName`.
const NAME_BYTES: usize = 256;

impl Hip {
    pub(super) fn new(library: Library) -> Result<Self> {
        // SAFETY: the signature is that of `hip_runtime_api.h`.
        let stream_device = unsafe { library.symbol("hipStreamGetDevice") }.ok();
        let properties = ARCH_NAME.into_iter().find_map(|(name, offset)| {
            // SAFETY: as above; the buffer is larger than any version's structure.
            unsafe { library.symbol(name) }.ok().map(|function| (name, function, offset))
        });
        Ok(Self { functions: Functions::load(library, 0)?, stream_device, properties })
    }

    pub(super) fn retain(&self, context: &mut Handle, device: c_int) -> Returned<c_int> {
        *context = device as Handle;
        Returned { call: "hipSetDevice", value: 0 }
    }

    pub(super) fn push(&self, context: Handle, before: &mut Handle) -> Returned<c_int> {
        let mut device = 0;
        // SAFETY: `device` is written.
        let asked = unsafe { self.functions.current_device(&mut device) };
        *before = device as Handle;
        if asked.value != 0 {
            return asked;
        }
        // SAFETY: no pointers.
        unsafe { self.functions.set_device(context as c_int) }
    }

    pub(super) fn pop(&self, before: Handle) -> Returned<c_int> {
        // SAFETY: no pointers.
        unsafe { self.functions.set_device(before as c_int) }
    }

    pub(super) fn enable(&self, peer: Handle) -> Returned<c_int> {
        // SAFETY: no pointers.
        unsafe { self.functions.enable_peer(peer as c_int, 0) }
    }

    pub(super) unsafe fn owner(&self, stream: Handle, context: &mut Handle) -> Result<Returned<c_int>> {
        let call = "hipStreamGetDevice";
        let Some(function) = self.stream_device else { return Err(self.too_old(call)) };
        let mut device = 0;
        // SAFETY: the stream is alive by the caller, `device` is written.
        let value = unsafe { function(stream, &mut device) };
        *context = device as Handle;
        Ok(Returned { call, value })
    }

    pub(super) unsafe fn plain(&self, to: Address, from: Address, bytes: usize, stream: Handle) -> Returned<c_int> {
        // SAFETY: by the caller.
        unsafe { self.functions.copy(to, from, bytes, DEFAULT, stream) }
    }

    pub(super) unsafe fn rows(&self, rows: &Rows, stream: Handle) -> Returned<c_int> {
        let Rows { to, to_pitch, from, from_pitch, width, height } = *rows;
        // SAFETY: by the caller.
        unsafe { self.functions.copy_2d(to, to_pitch, from, from_pitch, width, height, DEFAULT, stream) }
    }

    pub(super) fn arch_name(&self, device: c_int) -> Result<String> {
        let Some((call, function, offset)) = self.properties else { return Err(self.too_old(ARCH_NAME[0].0)) };
        let mut bytes = Box::new(PropertyBytes([0; 4096]));
        // SAFETY: the buffer is larger than any version's structure.
        let value = unsafe { function(&mut *bytes, device) };
        if value != 0 {
            let message = self.text(value);
            return Err(Error::Driver { backend: "rocm", call, code: i64::from(value), message });
        }
        let name = &bytes.0[offset..offset + NAME_BYTES];
        let end = name.iter().position(|b| *b == 0).unwrap_or(NAME_BYTES);
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    pub(super) fn text(&self, code: c_int) -> String {
        // SAFETY: both are static strings.
        unsafe {
            let (text, name) = (self.functions.error_text(code).value, self.functions.error_name(code).value);
            format!("{} ({})", c_text(text), c_text(name))
        }
    }

    fn too_old(&self, symbol: &str) -> Error {
        Error::Unavailable {
            library: "libamdhip64".to_owned(),
            why: format!("{} has no symbol {symbol}", self.functions.library().path().to_string_lossy()),
            how_to_get_it: "install ROCm 6.0 or newer".to_owned(),
        }
    }
}
