//! A device: memory, streams, events.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use ascendcl_sys::aclrtStream;
use longspan_hal::{Caps, Device, Error, Memory, Priority, Result, View, ViewMut};

use crate::context::{Context, check, text};
use crate::copy::{self, Place};
use crate::event::{AscendEvent, Pool};
use crate::memory::{AscendBuffer, Meter};
use crate::ops::Ops;
use crate::stream::{AscendStream, Graveyard, Kept, StreamState};
use crate::tensor::Tensor;

/// `aclrtCreateStreamWithConfig`: launch and synchronise fast.
const FAST: u32 = 3;

/// An open device.
#[derive(Clone, Debug)]
pub struct AscendDevice(pub(crate) Arc<Inner>);

/// What clones of a device share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub context: Arc<Context>,
    caps: Caps,
    pool: Arc<Pool>,
    meter: Arc<Meter>,
    graveyard: Arc<Graveyard>,
}

impl AscendDevice {
    /// Opens device `index`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without the libraries; [`Error::Driver`].
    pub fn open(index: u32) -> Result<Self> {
        let context = Arc::new(Context::new(index)?);
        let caps = caps(&context)?;
        let pool = Pool::new(&context);
        Ok(Self(Arc::new(Inner { context, caps, pool, meter: Arc::default(), graveyard: Arc::default() })))
    }

    /// Memory that peers of communicator `window` write through (0: none do).
    pub(crate) fn memory_for(&self, bytes: usize, window: u64) -> Result<AscendBuffer> {
        self.0.graveyard.sweep();
        AscendBuffer::new(&self.0.context, &self.0.meter, bytes, window)
    }

    fn staging(&self, at: &longspan_hal::Strided) -> Result<Option<AscendBuffer>> {
        if at.is_dense() { Ok(None) } else { self.alloc(at.bytes()).map(Some) }
    }

    fn wrap(&self, raw: aclrtStream, own: bool) -> Result<AscendStream> {
        let d = &self.0;
        StreamState::new(&d.context, &d.pool, &d.meter, &d.graveyard, raw, own).map(AscendStream)
    }
}

fn caps(context: &Context) -> Result<Caps> {
    let runtime = &context.api.runtime;
    let (_, total) = context.memory()?;
    let (mut major, mut minor, mut patch) = (0, 0, 0);
    // SAFETY: AscendCL returns static text; the pointers are valid for writes.
    let name = unsafe {
        check("aclrtGetVersion", (runtime.aclrtGetVersion)(&mut major, &mut minor, &mut patch))?;
        text((runtime.aclrtGetSocName)())
    };
    let mut caps = Caps::default();
    caps.name = format!("Huawei {name}");
    caps.arch = name;
    caps.units = 1;
    caps.memory_bytes = total as u64;
    caps.versions = vec![format!("AscendCL {major}.{minor}.{patch}")];
    Ok(caps)
}

fn place<'a>(view: &'a View<'_, AscendDevice>) -> Place<'a> {
    Place { buffer: view.buffer(), at: view.at() }
}

fn same_bytes(what: &'static str, host: usize, view: usize) -> Result<()> {
    if host == view {
        return Ok(());
    }
    Err(Error::invalid(what, format!("{host} host bytes for a view of {view}")))
}

impl Device for AscendDevice {
    type Buffer = AscendBuffer;
    type Stream = AscendStream;
    type Event = AscendEvent;

    fn caps(&self) -> &Caps {
        &self.0.caps
    }

    fn memory(&self) -> Result<Memory> {
        self.0.graveyard.sweep();
        let ((used, peak), (free, _)) = (self.0.meter.figures(), self.0.context.memory()?);
        Ok(Memory::new(used, peak, free as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<AscendBuffer> {
        self.memory_for(bytes, 0)
    }

    unsafe fn adopt(
        &self,
        ptr: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<AscendBuffer> {
        AscendBuffer::adopt(&self.0.context, &self.0.meter, ptr, bytes, owner)
    }

    fn bytes(buffer: &AscendBuffer) -> usize {
        buffer.bytes()
    }

    fn same(a: &AscendBuffer, b: &AscendBuffer) -> bool {
        a.same(b)
    }

    fn stream(&self, priority: Priority) -> Result<AscendStream> {
        self.0.context.bind()?;
        self.0.graveyard.sweep();
        let mut raw: aclrtStream = std::ptr::null_mut();
        // 0 is the highest of Ascend's priorities.
        let level = u32::from(priority != Priority::High);
        // SAFETY: the pointer is valid for the write.
        let code = unsafe { (self.0.context.api.runtime.aclrtCreateStreamWithConfig)(&mut raw, level, FAST) };
        check("aclrtCreateStreamWithConfig", code)?;
        self.wrap(raw, true)
    }

    unsafe fn adopt_stream(&self, raw: *mut c_void) -> Result<AscendStream> {
        if raw.is_null() {
            return Err(Error::invalid("stream", "the handle is null; AscendCL's default stream is not supported"));
        }
        self.0.context.bind()?;
        self.wrap(raw, false)
    }

    fn record(&self, on: &AscendStream) -> Result<AscendEvent> {
        on.0.context.bind()?;
        // A failed stream still has points: whoever waits for one fails too.
        Ok(AscendEvent { raw: on.0.record()?, stream: Arc::downgrade(&on.0) })
    }

    fn wait(&self, on: &AscendStream, event: &AscendEvent) -> Result<()> {
        on.0.enter()?;
        on.0.wait(event)
    }

    fn elapsed(&self, from: &AscendEvent, to: &AscendEvent) -> Result<Duration> {
        self.0.context.bind()?;
        for (what, event) in [("from", from), ("to", to)] {
            if !event.raw.is_complete()? {
                return Err(Error::invalid(what, "the event has not happened yet; synchronize its stream first"));
            }
        }
        let mut millis = 0.0f32;
        // SAFETY: both events live and carry times; the pointer is valid for the write.
        let code =
            unsafe { (self.0.context.api.runtime.aclrtEventElapsedTime)(&mut millis, from.raw.raw(), to.raw.raw()) };
        check("aclrtEventElapsedTime", code)?;
        Ok(Duration::from_secs_f64(f64::from(millis.max(0.0)) / 1e3))
    }

    fn synchronize(&self, on: &AscendStream, limit: Duration) -> Result<()> {
        on.0.synchronize(limit)
    }

    fn upload(&self, on: &AscendStream, from: &[u8], to: ViewMut<'_, Self>) -> Result<()> {
        same_bytes("from", from.len(), to.at().bytes())?;
        on.0.enter()?;
        let staging = self.staging(to.at())?;
        copy::upload(&on.0, from, place(&to.read()), staging.as_ref())
    }

    fn download(&self, on: &AscendStream, from: View<'_, Self>, to: &mut [u8], limit: Duration) -> Result<()> {
        same_bytes("to", to.len(), from.at().bytes())?;
        on.0.enter()?;
        let staging = self.staging(from.at())?;
        copy::download(&on.0, place(&from), to, staging.as_ref(), limit)
    }

    fn copy(&self, on: &AscendStream, from: View<'_, Self>, to: ViewMut<'_, Self>) -> Result<()> {
        if from.dtype() != to.dtype() || from.extent() != to.extent() {
            let (f, t) = ((from.dtype(), from.extent()), (to.dtype(), to.extent()));
            return Err(Error::invalid("copy", format!("from {} {:?} to {} {:?}", f.0, f.1, t.0, t.1)));
        }
        if to.aliases(from.buffer(), from.at()) {
            return Err(Error::invalid("copy", "the views overlap"));
        }
        on.0.enter()?;
        copy::on_device(&on.0, place(&from), place(&to.read()))?;
        on.0.keep(Kept { buffers: vec![from.buffer().clone(), to.buffer().clone()], pinned: Vec::new() })
    }

    fn fill(&self, on: &AscendStream, value: f32, to: ViewMut<'_, Self>) -> Result<()> {
        on.0.enter()?;
        Ops::new(&on.0).fill(&Tensor::view(to.buffer(), to.at()), value)?;
        on.0.keep(Kept { buffers: vec![to.buffer().clone()], pinned: Vec::new() })
    }
}
