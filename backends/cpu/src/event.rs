//! Events: points in streams.

use std::sync::Arc;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result};

use crate::clock::Clock;
use crate::sync::{lock, wait};

/// A point in a stream, which has happened once the stream's worker came to it.
#[derive(Clone, Debug, Default)]
pub struct CpuEvent(Arc<Point>);

#[derive(Debug, Default)]
struct Point {
    happened: Mutex<Option<Happened>>,
    signal: Condvar,
}

/// What a stream leaves at an event.
#[derive(Clone, Debug)]
pub(crate) struct Happened {
    /// When.
    pub at: Instant,
    /// The clock of the stream, in checked mode.
    pub clock: Option<Clock>,
    /// The error of the stream, if it has failed before.
    pub failed: Option<Error>,
}

impl CpuEvent {
    /// Makes it happen.
    pub(crate) fn happen(&self, what: Happened) {
        *lock(&self.0.happened) = Some(what);
        self.0.signal.notify_all();
    }

    /// Waits until it has happened. Streams always run or skip what was queued before, so this ends.
    pub(crate) fn wait(&self) -> Happened {
        let mut happened = lock(&self.0.happened);
        loop {
            if let Some(what) = happened.as_ref() {
                return what.clone();
            }
            happened = wait(&self.0.signal, happened);
        }
    }

    /// Time between two events.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one has not happened.
    pub(crate) fn elapsed(&self, to: &Self) -> Result<Duration> {
        let at = |event: &Self, what| {
            let happened = lock(&event.0.happened);
            happened.as_ref().map(|h| h.at).ok_or_else(|| Error::invalid(what, "it has not happened yet; synchronize"))
        };
        Ok(at(to, "event `to`")?.saturating_duration_since(at(self, "event `from`")?))
    }
}
