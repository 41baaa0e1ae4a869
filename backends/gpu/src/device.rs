//! A GPU as a device. See the ordering contract in `longspan_hal::device`.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use longspan_hal::{Caps, Device, Error, KernelClass, Memory, Priority, Result, Strided, View, ViewMut};
use longspan_kernels::Target;

use crate::context::Context;
use crate::copy::{self, Form, Job};
use crate::event::Event;
use crate::flags::Flags;
use crate::memory::{Account, Buffer};
use crate::stream::GpuStream;
use crate::watch::Lost;

/// One rank's handle of a GPU. Clones are the same handle: one account of memory.
#[derive(Clone, Debug)]
pub struct GpuDevice {
    context: &'static Context,
    account: Arc<Account>,
    caps: Arc<Caps>,
    /// The class of attention kernels that was asked for.
    kernels: KernelClass,
    /// Why results can't be right: a wait for another rank was ended.
    lost: Lost,
}

/// Bytes of one piece of a dense copy between host and device: pieces overlap with the host's own copies.
const PIECE: usize = 8 << 20;

impl GpuDevice {
    /// A handle of `context`'s device.
    pub(crate) fn new(context: &'static Context, kernels: KernelClass) -> Self {
        Self { context, account: Arc::default(), caps: Arc::new(caps(context)), kernels, lost: Lost::default() }
    }

    /// The class of attention kernels that was asked for when it was opened.
    pub(crate) fn kernels(&self) -> KernelClass {
        self.kernels
    }

    /// What kernels are made for.
    pub(crate) fn target(&self) -> Target {
        let target = self.context.figures.target;
        Target { flash3: target.flash3 && self.kernels != KernelClass::Flash2, ..target }
    }

    /// Its context.
    pub(crate) fn context(&self) -> &'static Context {
        self.context
    }

    /// Why results can't be right.
    pub(crate) fn lost(&self) -> &Lost {
        &self.lost
    }

    /// Memory that peers of `group` may write; those that are other processes meet by `abroad`.
    pub(crate) fn window(&self, bytes: usize, group: u64, abroad: Option<&Arc<Flags>>) -> Result<Buffer> {
        let _bound = self.context.bind()?;
        Buffer::window(self.context, bytes, group, &self.account, abroad)
    }

    /// [`Device::alloc`] where the context is bound.
    pub(crate) fn alloc_bound(&self, bytes: usize) -> Result<Buffer> {
        Buffer::alloc(self.context, bytes, &self.account)
    }

    /// Host to device, dense, to memory that the stream was noted to use. The context is bound.
    pub(crate) fn upload_bound(&self, on: &GpuStream, from: &[u8], address: u64) -> Result<()> {
        let context = self.context;
        for (i, piece) in from.chunks(PIECE).enumerate() {
            let mut staged = context.pinned.take(context, piece.len())?;
            staged.write(piece)?;
            let at = address + (i * PIECE) as u64;
            // SAFETY: the caller checked the memory; the block lives until the event.
            context.check(unsafe { context.driver.copy_to_device(at, staged.pointer(), piece.len(), on.raw()) })?;
            staged.until(on.record(false)?);
        }
        Ok(())
    }

    fn own(&self, on: &GpuStream) -> Result<()> {
        if std::ptr::eq(on.context(), self.context) {
            return Ok(());
        }
        Err(Error::invalid(
            "stream",
            format!("it is of device {}, not of {}", on.context().ordinal, self.context.ordinal),
        ))
    }

    /// Device to host, dense: while the host takes one piece, the next travels.
    fn download_dense(&self, on: &GpuStream, from: u64, to: &mut [u8], limit: Duration) -> Result<()> {
        let context = self.context;
        let mut last: Option<(crate::staging::Staged, Event, &mut [u8])> = None;
        let take = |(staged, event, piece): (crate::staging::Staged, Event, &mut [u8])| -> Result<()> {
            crate::sync::Deadline::after(limit).poll("download", || event.happened())?;
            staged.read(piece)
        };
        for (i, piece) in to.chunks_mut(PIECE).enumerate() {
            let mut staged = context.pinned.take(context, piece.len())?;
            let at = from + (i * PIECE) as u64;
            // SAFETY: the view was checked against its buffer; the block has so many bytes and lives until the event.
            let copied = unsafe { context.driver.copy_to_host(staged.pointer(), at, piece.len(), on.raw()) };
            context.check(copied)?;
            let event = on.record(false)?;
            staged.until(event.clone());
            if let Some(previous) = last.replace((staged, event, piece)) {
                take(previous)?;
            }
        }
        last.map_or(Ok(()), take)
    }
}

fn caps(context: &Context) -> Caps {
    let (figures, facts) = (&context.figures, context.machine.facts());
    let mut caps = Caps::default();
    caps.name.clone_from(&figures.name);
    caps.arch.clone_from(&figures.arch);
    caps.units = figures.units;
    caps.memory_bytes = figures.memory_bytes;
    caps.strided_exchange = true;
    caps.versions = vec![format!("{} {}", facts.driver.what, version_text(figures.driver_version))];
    if let Ok(compiler) = context.machine.compiler() {
        caps.versions.push(format!("{} {}", facts.compiler.what, compiler.version()));
    }
    caps
}

/// CUDA's `13000` is 13.0, HIP's `60342131` is 6.3.
pub(crate) fn version_text(version: i32) -> String {
    if version >= 10_000_000 {
        return format!("{}.{}", version / 10_000_000, version / 100_000 % 100);
    }
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn check_bytes(have: usize, at: &Strided) -> Result<()> {
    if have == at.bytes() {
        return Ok(());
    }
    Err(Error::invalid("host bytes", format!("{have} bytes for a view of {} bytes", at.bytes())))
}

impl Device for GpuDevice {
    type Buffer = Buffer;
    type Stream = GpuStream;
    type Event = Event;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn memory(&self) -> Result<Memory> {
        let _bound = self.context.bind()?;
        self.context.grave.reap(self.context);
        Ok(Memory::new(self.account.used(), self.account.peak(), self.context.free_bytes()?))
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let _bound = self.context.bind()?;
        self.alloc_bound(bytes)
    }

    unsafe fn adopt(
        &self,
        ptr: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Buffer> {
        let _bound = self.context.bind()?;
        // SAFETY: by the caller.
        unsafe { Buffer::adopt(self.context, ptr as u64, bytes, owner) }
    }

    fn bytes(buffer: &Buffer) -> usize {
        buffer.bytes()
    }

    fn same(a: &Buffer, b: &Buffer) -> bool {
        a.same(b)
    }

    fn stream(&self, priority: Priority) -> Result<GpuStream> {
        GpuStream::new(self.context, priority)
    }

    unsafe fn adopt_stream(&self, raw: *mut c_void) -> Result<GpuStream> {
        // SAFETY: by the caller.
        unsafe { GpuStream::adopt(self.context, raw as usize) }
    }

    fn record(&self, on: &GpuStream) -> Result<Event> {
        self.own(on)?;
        let _bound = self.context.bind()?;
        on.record(true)
    }

    fn wait(&self, on: &GpuStream, event: &Event) -> Result<()> {
        self.own(on)?;
        let _bound = self.context.bind()?;
        on.wait(event)
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        let _bound = self.context.bind()?;
        from.elapsed(to)
    }

    fn synchronize(&self, on: &GpuStream, limit: Duration) -> Result<()> {
        self.own(on)?;
        let _bound = self.context.bind()?;
        let result = on.synchronize("synchronize", limit).and_then(|()| self.lost.check());
        self.context.grave.reap(self.context);
        result
    }

    fn upload(&self, on: &GpuStream, from: &[u8], to: ViewMut<'_, Self>) -> Result<()> {
        check_bytes(from.len(), to.at())?;
        self.own(on)?;
        let dense = Strided::dense(to.dtype(), to.extent());
        let Some(form) = Form::of(&dense, to.at()) else { return Ok(()) };
        let (context, address) = (self.context, to.buffer().address_of(to.at()));
        let _bound = context.bind()?;
        to.buffer().used_on(on)?;
        if form.is_plain() {
            return self.upload_bound(on, from, address);
        }
        let mut staged = context.pinned.take(context, from.len())?;
        staged.write(from)?;
        let queued = copy::remote(on, [Job { form, from: staged.address(), to: address }]);
        staged.until(on.record(false)?); // also of a part, where the rest was refused
        queued
    }

    fn download(&self, on: &GpuStream, from: View<'_, Self>, to: &mut [u8], limit: Duration) -> Result<()> {
        check_bytes(to.len(), from.at())?;
        self.own(on)?;
        let _bound = self.context.bind()?;
        let dense = Strided::dense(from.dtype(), from.extent());
        let Some(form) = Form::of(from.at(), &dense) else { return on.synchronize("download", limit) };
        let (context, address) = (self.context, from.buffer().address_of(from.at()));
        from.buffer().used_on(on)?;
        if form.is_plain() {
            return self.download_dense(on, address, to, limit).and_then(|()| self.lost.check());
        }
        let mut staged = context.pinned.take(context, to.len())?;
        let queued = copy::remote(on, [Job { form, from: address, to: staged.address() }]);
        staged.until(on.record(false)?);
        queued?;
        on.synchronize("download", limit)?;
        self.lost.check()?;
        staged.read(to)
    }

    fn copy(&self, on: &GpuStream, from: View<'_, Self>, to: ViewMut<'_, Self>) -> Result<()> {
        if from.dtype() != to.dtype() || from.extent() != to.extent() {
            let (a, b) = ((from.dtype(), from.extent()), (to.dtype(), to.extent()));
            return Err(Error::invalid("copy", format!("from {} {:?} to {} {:?}", a.0, a.1, b.0, b.1)));
        }
        if to.aliases(from.buffer(), from.at()) {
            return Err(Error::invalid("copy", "source and destination overlap"));
        }
        self.own(on)?;
        let _bound = self.context.bind()?;
        from.buffer().used_on(on)?;
        to.buffer().used_on(on)?;
        let [a, b] = [(from.buffer(), from.at()), (to.buffer(), to.at())].map(|(x, at)| (x.address_of(at), at));
        copy::local(on, Job::new(a, b))
    }

    fn fill(&self, on: &GpuStream, value: f32, to: ViewMut<'_, Self>) -> Result<()> {
        self.own(on)?;
        let _bound = self.context.bind()?;
        to.buffer().used_on(on)?;
        copy::fill(on, value, to.buffer().address_of(to.at()), to.at())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!([13_000, 12_080, 60_342_131].map(version_text), ["13.0", "12.8", "6.3"].map(str::to_owned));
    }
}
