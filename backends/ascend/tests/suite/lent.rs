//! Memory and streams by AscendCL's own calls, as a framework's are: lent to the suite's cases of attention on them.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use ascendcl_sys::{Ascend, aclError, aclrtMemMallocPolicy};
use longspan_conformance::Case;
use longspan_conformance::cases::adopted::{self, LendStream};
use longspan_conformance::rank::Lend;
use longspan_hal::{Backend, Device, Error, Result};

/// The cases of attention on what AscendCL made.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    let memory: Lend<B> = Arc::new(|rank, bytes| {
        let runtime = &Ascend::get()?.runtime;
        let mut at = std::ptr::null_mut();
        let policy = aclrtMemMallocPolicy::ACL_MEM_MALLOC_HUGE_FIRST;
        // SAFETY: the pointer is written.
        unsafe {
            ok("aclrtSetDevice", (runtime.aclrtSetDevice)(rank.info.index as i32))?;
            ok("aclrtMalloc", (runtime.aclrtMalloc)(&mut at, bytes.max(16), policy))?;
        }
        let owner = Arc::new(Lent { device: rank.info.index, at: at as usize, end: runtime.aclrtFree });
        // SAFETY: the owner keeps it.
        unsafe { rank.device.adopt(at, bytes, Some(owner)) }
    });
    let stream: LendStream<B> = Arc::new(|rank| {
        let runtime = &Ascend::get()?.runtime;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is written.
        unsafe {
            ok("aclrtSetDevice", (runtime.aclrtSetDevice)(rank.info.index as i32))?;
            ok("aclrtCreateStreamWithConfig", (runtime.aclrtCreateStreamWithConfig)(&mut raw, 0, 0))?;
        }
        let lent = Lent { device: rank.info.index, at: raw as usize, end: runtime.aclrtDestroyStream };
        // SAFETY: what is returned beside it keeps it.
        Ok((unsafe { rank.device.adopt_stream(raw)? }, Box::new(lent) as Box<dyn Any>))
    });
    adopted::cases(&memory, Some(&stream))
}

/// What goes when nobody uses it any more.
struct Lent {
    device: u32,
    at: usize,
    end: unsafe extern "C" fn(*mut c_void) -> aclError,
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Ok(api) = Ascend::get() else { return };
        // SAFETY: made by the same library, and nothing uses it any more. A failure leaks.
        unsafe {
            (api.runtime.aclrtSetDevice)(self.device as i32);
            (self.end)(self.at as *mut c_void);
        }
    }
}

fn ok(call: &'static str, code: aclError) -> Result<()> {
    match code.0 {
        0 => Ok(()),
        code => Err(Error::invalid("AscendCL call", format!("{call} failed with {code}"))),
    }
}
