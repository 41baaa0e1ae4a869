//! Locks that survive a panicking holder, and waits that end.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longspan_hal::Error;

/// Locks `mutex`. The state behind every mutex of this crate is whole between statements, so a holder that panicked
/// does not spoil it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for `signal` without a limit; may wake without reason.
pub(crate) fn wait<'a, T>(signal: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    signal.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// The end of a bounded wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// `None`: further away than the clock can say.
    at: Option<Instant>,
    limit: Duration,
}

impl Deadline {
    /// `limit` from now.
    pub(crate) fn after(limit: Duration) -> Self {
        Self { at: Instant::now().checked_add(limit), limit }
    }

    /// Whether it has passed.
    pub(crate) fn passed(&self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }

    /// The limit, once it has passed.
    pub(crate) fn late(&self) -> Option<Duration> {
        self.passed().then_some(self.limit)
    }

    /// The error of a wait in `call` that ran out.
    pub(crate) fn timeout(&self, call: &'static str) -> Error {
        Error::Timeout { call, limit: self.limit }
    }

    /// Waits for `signal` until the deadline at most; may wake without reason.
    pub(crate) fn wait<'a, T>(&self, signal: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let Some(at) = self.at else { return wait(signal, guard) };
        let left = at.saturating_duration_since(Instant::now());
        signal.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
    }
}
