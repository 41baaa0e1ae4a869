//! Streams: the driver's, and what buffers must know of those that used them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::{Error, Priority, Result};

use crate::context::Context;
use crate::driver::Handle;
use crate::event::Event;
use crate::sync::{Deadline, lock};

/// A stream of a device. Dropping it does not block: what is queued still runs.
#[derive(Debug)]
pub struct GpuStream {
    core: Arc<Core>,
    owned: bool,
}

/// What buffers keep of a stream that used them.
#[derive(Debug)]
pub(crate) struct Core {
    context: &'static Context,
    raw: Handle,
    /// Once the handle is gone: the point after all its work, if that could be recorded.
    closed: Mutex<Option<Option<Event>>>,
}

/// Flag of a stream that does not wait for the default stream.
const NON_BLOCKING: u32 = 1;

impl GpuStream {
    /// A new stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn new(context: &'static Context, priority: Priority) -> Result<Self> {
        let _bound = context.bind()?;
        let [normal, high] = context.figures.priorities;
        let priority = if priority == Priority::High { high } else { normal };
        let mut raw = 0;
        // SAFETY: `raw` is written.
        context.check(unsafe { context.driver.stream_create(&mut raw, NON_BLOCKING, priority) })?;
        Ok(Self::of(context, raw, true))
    }

    /// Somebody else's stream.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a stream of another device.
    ///
    /// # Safety
    /// `raw` is a live stream that outlives the handle.
    pub(crate) unsafe fn adopt(context: &'static Context, raw: Handle) -> Result<Self> {
        let _bound = context.bind()?;
        let mut owner = 0;
        // SAFETY: the stream is alive, `owner` is written.
        context.check(unsafe { context.driver.stream_context(raw, &mut owner) }?)?;
        if owner != context.raw {
            return Err(Error::invalid("stream", format!("it is not of device {}'s shared context", context.ordinal)));
        }
        Ok(Self::of(context, raw, false))
    }

    fn of(context: &'static Context, raw: Handle, owned: bool) -> Self {
        Self { core: Arc::new(Core { context, raw, closed: Mutex::new(None) }), owned }
    }

    /// The driver's stream.
    pub(crate) fn raw(&self) -> Handle {
        self.core.raw
    }

    /// What buffers keep.
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Its device.
    pub(crate) fn context(&self) -> &'static Context {
        self.core.context
    }

    /// Work queued from now on waits for `event`. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: stream and event are alive.
        self.core.context.check(unsafe { self.core.context.driver.stream_wait(self.raw(), event.raw(), 0) })
    }

    /// The point after everything queued so far. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn record(&self, timed: bool) -> Result<Event> {
        Event::record(self.core.context, self.raw(), timed)
    }

    /// Blocks until everything queued so far ran. The context is bound.
    ///
    /// # Errors
    /// [`Error::Timeout`] for `call`; [`Error::Driver`].
    pub(crate) fn synchronize(&self, call: &'static str, limit: Duration) -> Result<()> {
        let end = self.record(false)?;
        Deadline::after(limit).poll(call, || end.happened())
    }
}

impl Core {
    /// Whether the handle is gone and all that was queued on the stream before is done.
    pub(crate) fn is_over(&self) -> bool {
        match &*lock(&self.closed) {
            Some(Some(last)) => last.happened() == Ok(true),
            Some(None) => true,
            None => false,
        }
    }

    /// The point after everything queued on the stream so far; `None` if the device can't say any more.
    pub(crate) fn mark(&self) -> Option<Event> {
        let closed = lock(&self.closed);
        match &*closed {
            Some(last) => last.clone(),
            None => {
                // It may be another device's than the caller's.
                let _bound = self.context.bind().ok()?;
                Event::record(self.context, self.raw, false).ok()
            }
        }
    }
}

impl Drop for GpuStream {
    fn drop(&mut self) {
        let mut closed = lock(&self.core.closed);
        let bound = self.core.context.bind();
        *closed = Some(bound.is_ok().then(|| Event::record(self.core.context, self.core.raw, false).ok()).flatten());
        if self.owned && bound.is_ok() {
            // SAFETY: it is this handle's, and nobody uses it once `closed` is set.
            let _ = unsafe { self.core.context.driver.stream_destroy(self.core.raw) };
        }
    }
}
