//! Memory and streams by the driver's own calls, as a framework's are: lent to the suite's cases of attention on them.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use longspan_conformance::cases::adopted;
use longspan_conformance::rank::Lend;
use longspan_conformance::{Case, Rank};
use longspan_gpu::{Address, Driver, GpuBackend, Handle, Vendor};
use longspan_hal::{Device, Error, Result};

/// The cases of attention on what a vendor's driver made.
pub fn cases<V: Vendor>() -> Vec<Case<GpuBackend<V>>> {
    let memory: Lend<GpuBackend<V>> = Arc::new(|rank, bytes| {
        let driver = V::machine().driver()?;
        let mut address = 0;
        // SAFETY: `address` is written.
        bound(driver, rank.info.index, || unsafe { ok(driver.alloc(&mut address, bytes.max(16))) })?;
        let owner = Arc::new(Lent { driver, ordinal: rank.info.index, what: What::Memory(address) });
        // SAFETY: the owner keeps it.
        unsafe { rank.device.adopt(address as *mut c_void, bytes, Some(owner)) }
    });
    let stream: adopted::LendStream<GpuBackend<V>> = Arc::new(|rank: &Rank<GpuBackend<V>>| {
        let driver = V::machine().driver()?;
        let mut raw = 0;
        // SAFETY: `raw` is written. 1: it does not wait for the default stream.
        bound(driver, rank.info.index, || unsafe { ok(driver.stream_create(&mut raw, 1, 0)) })?;
        let lent = Lent { driver, ordinal: rank.info.index, what: What::Stream(raw) };
        // SAFETY: what is returned beside it keeps it.
        Ok((unsafe { rank.device.adopt_stream(raw as *mut c_void)? }, Box::new(lent) as Box<dyn Any>))
    });
    adopted::cases(&memory, Some(&stream))
}

/// What goes when nobody uses it any more.
struct Lent {
    driver: &'static Driver,
    ordinal: u32,
    what: What,
}

enum What {
    Memory(Address),
    Stream(Handle),
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: made by the same driver, and nothing uses it any more. A failure leaks.
        let _ = bound(self.driver, self.ordinal, || unsafe {
            match self.what {
                What::Memory(address) => ok(self.driver.free(address)),
                What::Stream(raw) => ok(self.driver.stream_destroy(raw)),
            }
        });
    }
}

/// Calls `body` with the context that all users of a device share.
fn bound(driver: &'static Driver, ordinal: u32, body: impl FnOnce() -> Result<()>) -> Result<()> {
    let (mut device, mut context, mut before) = (0, 0, 0);
    // SAFETY: all are written.
    unsafe { ok(driver.device(&mut device, ordinal as i32))? };
    ok(driver.retain_context(&mut context, device))?;
    ok(driver.push_context(context, &mut before))?;
    let result = body();
    ok(driver.pop_context(before))?;
    result
}

fn ok(returned: longspan_gpu::dylib::Returned<i32>) -> Result<()> {
    match returned.value {
        0 => Ok(()),
        code => Err(Error::invalid("driver call", format!("{} failed with {code}", returned.call))),
    }
}
