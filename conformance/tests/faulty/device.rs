//! Waits that are left out.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use longspan_hal::{Caps, Device, Error, Memory, Priority, Result, View, ViewMut};

use super::{Cpu, Fault, fault, view, view_mut};

#[derive(Debug)]
pub struct FaultyDevice {
    cpu: Arc<Cpu>,
    waits: AtomicUsize,
}

impl FaultyDevice {
    pub fn new(cpu: Cpu) -> Self {
        Self { cpu: Arc::new(cpu), waits: AtomicUsize::new(0) }
    }

    pub fn cpu(&self) -> Arc<Cpu> {
        self.cpu.clone()
    }
}

fn foreign<T>() -> Result<T> {
    Err(Error::Unsupported { backend: "faulty", what: "foreign handles".into(), instead: "use its own".into() })
}

impl Device for FaultyDevice {
    type Buffer = <Cpu as Device>::Buffer;
    type Stream = <Cpu as Device>::Stream;
    type Event = <Cpu as Device>::Event;

    fn wait(&self, on: &Self::Stream, event: &Self::Event) -> Result<()> {
        if let Fault::RemovedWaits(every) = fault()
            && self.waits.fetch_add(1, Ordering::Relaxed) % every == every - 1
        {
            return Ok(());
        }
        self.cpu.wait(on, event)
    }

    // From here on: as below.

    fn caps(&self) -> &Caps {
        self.cpu.caps()
    }

    fn memory(&self) -> Result<Memory> {
        self.cpu.memory()
    }

    fn alloc(&self, bytes: usize) -> Result<Self::Buffer> {
        self.cpu.alloc(bytes)
    }

    unsafe fn adopt(&self, _: *mut c_void, _: usize, _: Option<Arc<dyn Any + Send + Sync>>) -> Result<Self::Buffer> {
        foreign()
    }

    fn bytes(buffer: &Self::Buffer) -> usize {
        Cpu::bytes(buffer)
    }

    fn same(a: &Self::Buffer, b: &Self::Buffer) -> bool {
        Cpu::same(a, b)
    }

    fn stream(&self, priority: Priority) -> Result<Self::Stream> {
        self.cpu.stream(priority)
    }

    unsafe fn adopt_stream(&self, _: *mut c_void) -> Result<Self::Stream> {
        foreign()
    }

    fn record(&self, on: &Self::Stream) -> Result<Self::Event> {
        self.cpu.record(on)
    }

    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration> {
        self.cpu.elapsed(from, to)
    }

    fn synchronize(&self, on: &Self::Stream, limit: Duration) -> Result<()> {
        self.cpu.synchronize(on, limit)
    }

    fn upload(&self, on: &Self::Stream, from: &[u8], to: ViewMut<'_, Self>) -> Result<()> {
        self.cpu.upload(on, from, view_mut(to)?)
    }

    fn download(&self, on: &Self::Stream, from: View<'_, Self>, to: &mut [u8], limit: Duration) -> Result<()> {
        self.cpu.download(on, view(from)?, to, limit)
    }

    fn copy(&self, on: &Self::Stream, from: View<'_, Self>, to: ViewMut<'_, Self>) -> Result<()> {
        self.cpu.copy(on, view(from)?, view_mut(to)?)
    }

    fn fill(&self, on: &Self::Stream, value: f32, to: ViewMut<'_, Self>) -> Result<()> {
        self.cpu.fill(on, value, view_mut(to)?)
    }
}
