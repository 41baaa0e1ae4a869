//! Cases that only this backend has: memory and streams that somebody else made, as a framework's are.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longspan_conformance::{Case, Failure, Rank};
use longspan_cuda::{Cuda, Nvidia};
use longspan_gpu::{Address, Driver, Handle, Vendor};
use longspan_hal::{Backend, DType, Device, Error, Result, Strided, View, ViewMut};

/// The cases of this file.
pub fn cases() -> Vec<Case<Cuda>> {
    vec![
        Case::new("cuda/adopted-memory-and-streams-work", 1, adopted),
        Case::new("cuda/foreign-pointers-are-refused", 1, refused),
        Case::new("cuda/owners-outlive-queued-work", 1, owners),
    ]
}

/// Memory and a stream by the driver's own calls.
struct Foreign {
    before: Handle,
    driver: &'static Driver,
    memory: Address,
    stream: Handle,
}

const BYTES: usize = 1 << 20;

/// The calls below take valid pointers to locals and handles that the driver gave before.
fn ok(returned: longspan_gpu::dylib::Returned<i32>) -> Result<()> {
    match returned.value {
        0 => Ok(()),
        code => Err(Error::invalid("driver call", format!("{} failed with {code}", returned.call))),
    }
}

impl Foreign {
    fn new(ordinal: u32) -> Result<Self> {
        let driver = Nvidia::machine().driver()?;
        let (mut device, mut context, mut before, mut memory, mut stream) = (0, 0, 0, 0, 0);
        // SAFETY: see `ok`.
        unsafe {
            ok(driver.device(&mut device, ordinal as i32))?;
            ok(driver.retain_context(&mut context, device))?;
            ok(driver.push_context(context, &mut before))?;
            ok(driver.alloc(&mut memory, BYTES))?;
            ok(driver.stream_create(&mut stream, 0, 0))?;
        }
        Ok(Self { before, driver, memory, stream })
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: see `ok`; nothing uses either any more.
        let _ = unsafe { (self.driver.stream_destroy(self.stream), self.driver.free(self.memory)) };
        let _ = self.driver.pop_context(self.before);
    }
}

fn line() -> Strided {
    Strided::dense(DType::F32, [1, 1, 1, BYTES / 4])
}

fn adopted(rank: &mut Rank<Cuda>) -> Result<(), Failure> {
    let foreign = Foreign::new(rank.info.index)?;
    // SAFETY: both live until the end of the case, which waits for the work.
    let buffer = unsafe { rank.device.adopt(foreign.memory as *mut c_void, BYTES, None)? };
    // SAFETY: as above.
    let stream = unsafe { rank.device.adopt_stream(foreign.stream as *mut c_void)? };
    rank.device.fill(&stream, 1.5, ViewMut::new(&buffer, line())?)?;
    let done = rank.device.record(&stream)?;
    rank.device.wait(&rank.stream, &done)?;
    let mut bytes = vec![0; BYTES];
    rank.device.download(&rank.stream, View::new(&buffer, line())?, &mut bytes, rank.limit)?;
    if bytes.chunks(4).any(|b| b != 1.5f32.to_le_bytes()) {
        return Err(Failure::wrong("adopted memory does not hold what was written"));
    }
    Ok(())
}

fn refused(rank: &mut Rank<Cuda>) -> Result<(), Failure> {
    let foreign = Foreign::new(rank.info.index)?;
    let host = vec![0u64; 64];
    let aligned = (host.as_ptr() as usize).next_multiple_of(16);
    for (what, address) in [("null", 0), ("unaligned", foreign.memory as usize + 8), ("host", aligned)] {
        // SAFETY: refused; nothing is done with it.
        match unsafe { rank.device.adopt(address as *mut c_void, 16, None) } {
            Err(Error::Invalid { .. }) => {}
            other => return Err(Failure::wrong(format!("a pointer that is {what}: {other:?}"))),
        }
    }
    let Some(other) = Cuda::devices()?.into_iter().find(|d| d.index != rank.info.index) else { return Ok(()) };
    let there = Foreign::new(other.index)?;
    // SAFETY: as above.
    match unsafe { rank.device.adopt(there.memory as *mut c_void, 16, None) } {
        Err(Error::Invalid { why, .. }) if why.contains(&format!("is of device {}", other.index)) => Ok(()),
        other => Err(Failure::wrong(format!("a pointer of another device: {other:?}"))),
    }
}

/// Notes when it goes.
struct Owner(Arc<AtomicBool>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn owners(rank: &mut Rank<Cuda>) -> Result<(), Failure> {
    let foreign = Foreign::new(rank.info.index)?;
    let gone = Arc::new(AtomicBool::new(false));
    let owner: Arc<dyn std::any::Any + Send + Sync> = Arc::new(Owner(gone.clone()));
    // SAFETY: the memory lives until the end of the case, which waits for the work.
    let buffer = unsafe { rank.device.adopt(foreign.memory as *mut c_void, BYTES, Some(owner))? };
    for value in 0..2000 {
        rank.device.fill(&rank.stream, value as f32, ViewMut::new(&buffer, line())?)?;
    }
    let end = rank.device.record(&rank.stream)?;
    drop(buffer);
    let early = gone.load(Ordering::SeqCst);
    // An event that has not happened has no time: then the owner must still be there.
    let running = rank.device.elapsed(&end, &end).is_err();
    rank.device.synchronize(&rank.stream, rank.limit)?;
    if early && running {
        return Err(Failure::wrong("the owner went while queued work used its memory"));
    }
    if !gone.load(Ordering::SeqCst) {
        return Err(Failure::wrong("the owner is kept after all work ran"));
    }
    Ok(())
}
