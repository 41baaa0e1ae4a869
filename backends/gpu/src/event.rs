//! Events: points in streams. The driver's events behind them are used again.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::{Error, Result};

use crate::context::Context;
use crate::driver::Handle;
use crate::sync::lock;

/// A point in a stream.
#[derive(Clone, Debug)]
pub struct Event(Arc<Point>);

#[derive(Debug)]
struct Point {
    context: &'static Context,
    raw: Handle,
    timed: bool,
}

/// Events that can be recorded again, without and with time.
#[derive(Debug, Default)]
pub(crate) struct Events([Mutex<Vec<Handle>>; 2]);

/// Flag of an event that takes no time stamp.
const UNTIMED: u32 = 2;

impl Event {
    /// The point after everything queued on `stream` so far. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn record(context: &'static Context, stream: Handle, timed: bool) -> Result<Self> {
        let pooled = lock(&context.events.0[usize::from(timed)]).pop();
        let raw = match pooled {
            Some(raw) => raw,
            None => {
                let mut raw = 0;
                // SAFETY: `raw` is written.
                context.check(unsafe { context.driver.event_create(&mut raw, if timed { 0 } else { UNTIMED }) })?;
                raw
            }
        };
        let event = Self(Arc::new(Point { context, raw, timed }));
        // SAFETY: event and stream are alive.
        context.check(unsafe { context.driver.event_record(raw, stream) })?;
        Ok(event)
    }

    /// The driver's event.
    pub(crate) fn raw(&self) -> Handle {
        self.0.raw
    }

    /// Whether it has happened.
    ///
    /// # Errors
    /// [`Error::Driver`]: errors of work before it show here.
    pub(crate) fn happened(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        self.0.context.ready(unsafe { self.0.context.driver.event_query(self.0.raw) })
    }

    /// Time from this event to `to`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one has not happened; [`Error::Driver`].
    pub(crate) fn elapsed(&self, to: &Self) -> Result<Duration> {
        let context = self.0.context;
        let mut milliseconds = 0.0;
        // SAFETY: `milliseconds` is written; both events are alive.
        let asked = unsafe { context.driver.event_elapsed(&mut milliseconds, self.0.raw, to.0.raw) };
        if !context.ready(asked)? {
            return Err(Error::invalid("events", "one has not happened yet; synchronize first"));
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        // A wait that was queued on it keeps the point that it had then.
        lock(&self.context.events.0[usize::from(self.timed)]).push(self.raw);
    }
}
