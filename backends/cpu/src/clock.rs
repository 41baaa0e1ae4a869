//! Vector clocks: what checked mode knows about the order of operations (Lamport; Mattern, "Virtual time and global
//! states of distributed systems").
//!
//! Every stream counts its operations. A clock says, for each stream, up to which operation everything is known to have
//! run before:
//!
//! ```text
//! operation on stream s:   clock_s[s] += 1
//! record on s:             event.clock = clock_s
//! wait on t for event:     clock_t = max(clock_t, event.clock)
//! exchange, barrier:       clock_s = max(clock_s, clock of every peer of the round when it arrived)
//! synchronize s:           host = max(host, clock_s); every later call of that device starts with clock >= host
//! a before b               clock of b [stream of a] >= count of a
//! ```

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use crate::sync::lock;

/// Counts per stream, sorted by stream. A handful of streams take part, so this is a short list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    times: Vec<(u64, u64)>,
}

impl Clock {
    /// Up to which operation `stream` is known to have run; 0 for none.
    pub(crate) fn time(&self, stream: u64) -> u64 {
        self.times.binary_search_by_key(&stream, |t| t.0).map_or(0, |i| self.times[i].1)
    }

    /// Counts one more operation of `stream` and returns its number.
    pub(crate) fn tick(&mut self, stream: u64) -> u64 {
        let next = self.time(stream) + 1;
        self.raise(stream, next);
        next
    }

    /// The later of both, stream by stream.
    pub(crate) fn merge(&mut self, other: &Self) {
        for &(stream, time) in &other.times {
            self.raise(stream, time);
        }
    }

    fn raise(&mut self, stream: u64, time: u64) {
        match self.times.binary_search_by_key(&stream, |t| t.0) {
            Ok(i) => self.times[i].1 = self.times[i].1.max(time),
            Err(i) => self.times.insert(i, (stream, time)),
        }
    }
}

/// What the host knows to have run, of one device handle: [`longspan_hal::Device::synchronize`] raises it.
#[derive(Debug, Default)]
pub(crate) struct HostClock(Mutex<Arc<Clock>>);

/// What any device handle of the process was synchronised with. Only memory that travels between handles asks it: host
/// threads hand buffers to each other in ways that no clock sees.
static ANY_HOST: LazyLock<Mutex<HashMap<u64, u64>>> = LazyLock::new(Mutex::default);

impl HostClock {
    /// The clock of now.
    pub(crate) fn now(&self) -> Arc<Clock> {
        Arc::clone(&lock(&self.0))
    }

    /// Notes that everything in `clock` has run.
    pub(crate) fn raise(&self, clock: &Clock) {
        Arc::make_mut(&mut lock(&self.0)).merge(clock);
        let mut any = lock(&ANY_HOST);
        for &(stream, time) in &clock.times {
            let known = any.entry(stream).or_default();
            *known = time.max(*known);
        }
    }
}

/// Whether some device handle was synchronised with operation `time` of `stream`.
pub(crate) fn some_host_saw(stream: u64, time: u64) -> bool {
    lock(&ANY_HOST).get(&stream).is_some_and(|&known| known >= time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_takes_the_later_of_each_stream() {
        let (mut a, mut b) = (Clock::default(), Clock::default());
        assert_eq!((a.tick(7), a.tick(7), a.tick(3)), (1, 2, 1));
        assert_eq!((b.tick(3), b.tick(3), b.tick(9)), (1, 2, 1));
        a.merge(&b);
        assert_eq!([3, 7, 8, 9].map(|s| a.time(s)), [2, 2, 0, 1]);
        assert_eq!([3, 7, 9].map(|s| b.time(s)), [2, 0, 1]);
    }

    #[test]
    fn the_host_clock_only_rises() {
        let host = HostClock::default();
        let mut clock = Clock::default();
        let stream = u64::MAX - 1;
        let old = clock.clone();
        clock.tick(stream);
        host.raise(&clock);
        host.raise(&old);
        assert_eq!(host.now().time(stream), 1);
        assert!(some_host_saw(stream, 1) && !some_host_saw(stream, 2));
    }
}
