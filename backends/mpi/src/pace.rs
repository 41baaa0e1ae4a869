//! How long to leave MPI alone between two tests.
//!
//! ```text
//! nothing moved for a short while  -> test again at once: a message of some 10 KiB takes a few microseconds
//! for a while                      -> yield, until yields came back late: then somebody computes on this core
//! longer                           -> nap, longer and longer
//! a test that moved data           -> from the start: large messages come in pieces
//! ```
//!
//! Who tests without a nap takes a core. Where every process has one, nobody misses it: attention that wants it shows in the
//! first late yield, and naps then let the exchange go on beside it. Where processes share cores, a late yield is a good wait:
//! whoever computes keeps the core for its turn, while a nap's end takes it away. So some more of them come first.

use std::ops::Range;
use std::time::{Duration, Instant};

/// How long to be awake.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until then tests follow each other at once.
    spin: Duration,
    /// Until then with yields between. Late ones do not count.
    awake: Duration,
    /// Late yields before the first nap.
    late: u32,
}

/// Of processes with a core of their own, and of those that share cores.
const PATIENCE: [Patience; 2] = [
    Patience { spin: Duration::from_micros(100), awake: Duration::from_millis(10), late: 1 },
    Patience { spin: Duration::from_micros(5), awake: Duration::from_micros(20), late: 30 },
];

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
    patience: Patience,
    /// When the last pause began, and when it ended.
    last: [Instant; 2],
    pause: Pause,
    /// Time in which nothing moved, but for late yields.
    quiet: Duration,
    late: u32,
    nap: Duration,
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
            late: 0,
            nap: NAPS[0],
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
        let late = self.pause == Pause::Yield && paused > LATE;
        self.late += u32::from(late);
        if MOVED.contains(&test) {
            (self.quiet, self.nap) = (Duration::ZERO, NAPS[0]);
        } else {
            self.quiet += if late { test } else { paused + test };
        }
        match self.quiet {
            quiet if quiet < self.patience.spin => Pause::None,
            quiet if quiet < self.patience.awake && self.late < self.patience.late => Pause::Yield,
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
    fn late_yields_end_in_naps_and_data_starts_anew() {
        for (crowded, late) in [(false, 1), (true, 30)] {
            let mut pace = Pace::new(crowded);
            let _ = count(&mut pace, Pause::None);
            for _ in 1..late {
                assert_eq!(pace.next(LATE * 2, Duration::ZERO), Pause::Yield);
            }
            assert_eq!(pace.next(LATE * 2, Duration::ZERO), Pause::Nap(NAPS[0]));
            pace.pause = Pause::Nap(NAPS[0]);
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
}
