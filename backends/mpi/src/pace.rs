//! How long to leave MPI alone between two tests.
//!
//! ```text
//! nothing moved for a short while  -> test again at once: a message of some 10 KiB takes a few microseconds
//! for a while                      -> yield, unless a yield came back late: then somebody computes on this core
//! longer                           -> nap, longer and longer
//! a test that moved data           -> from the start: large messages come in pieces
//! ```
//!
//! Who tests without a nap takes a core. Where every process has one, nobody misses it: attention that wants it shows in the
//! first late yield. Where processes share cores, the naps begin nearly at once.

use std::ops::Range;
use std::time::{Duration, Instant};

/// Until when tests follow each other at once, and until when with yields between, for processes with a core of their own
/// and for those that share cores.
const PATIENCE: [[Duration; 2]; 2] =
    [[Duration::from_micros(100), Duration::from_millis(10)], [Duration::from_micros(5), Duration::from_micros(20)]];

/// A test that took so long has moved data, and more is likely to be there. One that took longer has moved all, or another
/// thread had the core meanwhile.
const MOVED: Range<Duration> = Duration::from_micros(3)..Duration::from_micros(300);

/// A yield that took so long gave the core to somebody who wants it.
const LATE: Duration = Duration::from_micros(50);

/// First and longest nap.
pub(crate) const NAPS: [Duration; 2] = [Duration::from_micros(10), Duration::from_micros(200)];

/// The pauses of one wait.
#[derive(Debug)]
pub(crate) struct Pace {
    patience: [Duration; 2],
    /// When the last pause began, and when it ended.
    last: [Instant; 2],
    pause: Pause,
    /// Time in which nothing moved.
    quiet: Duration,
    nap: Duration,
    shared: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Pause {
    Nap(Duration),
    None,
    Yield,
}

impl Pace {
    /// Of a wait that begins now; `crowded`: processes share cores.
    pub fn new(crowded: bool) -> Self {
        Self {
            patience: PATIENCE[usize::from(crowded)],
            last: [Instant::now(); 2],
            pause: Pause::None,
            quiet: Duration::ZERO,
            nap: NAPS[0],
            shared: false,
        }
    }

    /// Pauses after a test.
    pub fn pause(&mut self) {
        let now = Instant::now();
        let pause = self.next(self.last[1] - self.last[0], now - self.last[1]);
        match pause {
            Pause::Nap(time) => std::thread::sleep(time),
            Pause::None => std::hint::spin_loop(),
            Pause::Yield => std::thread::yield_now(),
        }
        let ended = if pause == Pause::None { now } else { Instant::now() };
        (self.last, self.pause) = ([now, ended], pause);
    }

    /// What to do after a pause that took `paused` and a test that took `test`.
    fn next(&mut self, paused: Duration, test: Duration) -> Pause {
        self.shared |= self.pause == Pause::Yield && paused > LATE;
        if MOVED.contains(&test) {
            (self.quiet, self.nap) = (Duration::ZERO, NAPS[0]);
        } else {
            self.quiet += paused + test;
        }
        match self.quiet {
            quiet if quiet < self.patience[0] => Pause::None,
            quiet if quiet < self.patience[1] && !self.shared => Pause::Yield,
            _ => {
                let nap = self.nap;
                self.nap = (nap * 3 / 2).min(NAPS[1]);
                Pause::Nap(nap)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_nanos(500);

    /// Quiet tests until the first pause of another kind than `of`; how many.
    fn count(pace: &mut Pace, of: Pause) -> usize {
        let same = |_: &usize| {
            pace.pause = pace.next(SHORT, SHORT);
            pace.pause == of
        };
        (0..).take_while(same).count()
    }

    #[test]
    fn a_core_of_its_own_is_used_and_a_shared_one_is_left() {
        let [mut own, mut shared] = [false, true].map(Pace::new);
        assert_eq!((count(&mut own, Pause::None), count(&mut own, Pause::Yield)), (99, 9899));
        assert_eq!((count(&mut shared, Pause::None), count(&mut shared, Pause::Yield)), (4, 14));
        assert!(matches!(own.pause, Pause::Nap(_)) && matches!(shared.pause, Pause::Nap(_)));
    }

    #[test]
    fn a_late_yield_is_the_last_and_data_starts_anew() {
        let mut pace = Pace::new(false);
        let _ = count(&mut pace, Pause::None);
        assert_eq!(pace.pause, Pause::Yield);
        assert_eq!(pace.next(LATE * 2, SHORT), Pause::Nap(NAPS[0]));
        assert_eq!(pace.next(NAPS[0], SHORT), Pause::Nap(NAPS[0] * 3 / 2));
        // What moved is followed closely, but the core stays that of another.
        assert_eq!(pace.next(NAPS[0], MOVED.start), Pause::None);
        pace.pause = Pause::None;
        let _ = count(&mut pace, Pause::None);
        assert_eq!(pace.pause, Pause::Nap(NAPS[0]));
        // The test was interrupted, or that was all.
        assert!(matches!(pace.next(SHORT, MOVED.end), Pause::Nap(_)));
    }
}
