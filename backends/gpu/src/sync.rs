//! Locks that survive a panicking holder, and waits that end.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result};

/// Locks `mutex`. The state behind every mutex of this crate is whole between statements, so a holder that panicked does not
/// spoil it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The error of a wait in `call` that ran out.
    pub(crate) fn timeout(&self, call: &'static str) -> Error {
        Error::Timeout { call, limit: self.limit }
    }

    /// Waits for `signal`, for `nap` and until the deadline at most; may wake without reason.
    pub(crate) fn wait<'a, T>(&self, signal: &Condvar, guard: MutexGuard<'a, T>, nap: Duration) -> MutexGuard<'a, T> {
        let left = self.at.map_or(nap, |at| at.saturating_duration_since(Instant::now()).min(nap));
        signal.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Asks `done` again and again until it says yes: at once for a while, so that short work is not slowed, then with
    /// pauses, so that long work does not burn a core.
    ///
    /// # Errors
    /// Those of `done`; [`Error::Timeout`] for `call`.
    pub(crate) fn poll(&self, call: &'static str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            if done()? {
                return Ok(());
            }
            if self.passed() {
                return Err(self.timeout(call));
            }
            match start.elapsed() {
                t if t < Duration::from_micros(200) => std::hint::spin_loop(),
                t if t < Duration::from_millis(2) => std::thread::yield_now(),
                t => std::thread::sleep((t / 50).min(Duration::from_millis(1))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poll_ends_with_yes_with_an_error_or_at_the_deadline() {
        let (mut left, deadline) = (100, Deadline::after(Duration::from_secs(60)));
        let countdown = || {
            left -= 1;
            Ok(left == 0)
        };
        assert_eq!(deadline.poll("x", countdown), Ok(()));
        assert_eq!(deadline.poll("x", || Err(Error::invalid("y", "z"))), Err(Error::invalid("y", "z")));
        let limit = Duration::from_millis(5);
        assert_eq!(Deadline::after(limit).poll("x", || Ok(false)), Err(Error::Timeout { call: "x", limit }));
    }
}
