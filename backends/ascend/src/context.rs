//! The thread-local context, and codes as errors.

use std::ffi::{CStr, c_char};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ascendcl_sys::{Ascend, HcclResult, aclError, aclnnStatus, aclrtContext};
use longspan_hal::{Error, Result};

use crate::NAME;

/// A device's own context, which every thread binds before it calls.
#[derive(Debug)]
pub(crate) struct Context {
    /// The vendor's functions.
    pub api: &'static Ascend,
    raw: usize,
}

impl Context {
    /// The context of `device`; starts AscendCL if nobody has.
    pub fn new(device: u32) -> Result<Self> {
        let api = Ascend::get()?;
        start(api)?;
        let mut raw: aclrtContext = std::ptr::null_mut();
        // SAFETY: plain calls; the pointer is valid for the write.
        unsafe {
            check("aclrtSetDevice", (api.runtime.aclrtSetDevice)(device as i32))?;
            check("aclrtGetCurrentContext", (api.runtime.aclrtGetCurrentContext)(&mut raw))?;
        }
        Ok(Self { api, raw: raw as usize })
    }

    /// Makes it this thread's context.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the device's own context lives as long as the process.
        check("aclrtSetCurrentContext", unsafe { (self.api.runtime.aclrtSetCurrentContext)(self.raw as aclrtContext) })
    }

    /// Free and total bytes of the device.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        let attr = ascendcl_sys::aclrtMemAttr::ACL_HBM_MEM;
        // SAFETY: both pointers are valid for writes.
        check("aclrtGetMemInfo", unsafe { (self.api.runtime.aclrtGetMemInfo)(attr, &mut free, &mut total) })?;
        Ok((free, total))
    }
}

/// Starts AscendCL in this process.
pub(crate) fn start(api: &Ascend) -> Result<()> {
    // SAFETY: no configuration file is a documented argument.
    match unsafe { (api.runtime.aclInit)(std::ptr::null()) } {
        aclError::ACL_ERROR_REPEAT_INITIALIZE => Ok(()),
        code => check("aclInit", code),
    }
}

/// A runtime code as a result.
pub(crate) fn check(call: &'static str, code: aclError) -> Result<()> {
    if code == aclError::ACL_SUCCESS { Ok(()) } else { Err(driver(call, code.0, recent())) }
}

/// An aclnn status as a result.
pub(crate) fn check_nn(call: &'static str, status: aclnnStatus) -> Result<()> {
    if status == aclnnStatus::ACLNN_SUCCESS { Ok(()) } else { Err(driver(call, status.0, recent())) }
}

/// An HCCL code as a result.
pub(crate) fn check_hccl(call: &'static str, code: HcclResult) -> Result<()> {
    if code == HcclResult::HCCL_SUCCESS {
        return Ok(());
    }
    // SAFETY: HCCL returns static text for any code.
    let text = Ascend::get().map(|api| unsafe { text((api.hccl.HcclGetErrorString)(code)) }).unwrap_or_default();
    Err(driver(call, code.0, format!("{text}; {}", recent())))
}

fn driver(call: &'static str, code: i32, message: String) -> Error {
    Error::Driver { backend: NAME, call, code: i64::from(code), message }
}

/// This thread's last message of AscendCL.
fn recent() -> String {
    // SAFETY: AscendCL returns null or text that lives until this thread's next call.
    Ascend::get().map(|api| unsafe { text((api.runtime.aclGetRecentErrMsg)()) }).unwrap_or_default()
}

/// C text as a string.
///
/// # Safety
/// `from` is null or NUL-terminated.
pub(crate) unsafe fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

/// Locks; what a panicked thread left behind is still consistent, since every change is one step.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
