//! Personalities: how the CPU backend imitates the ways in which other machines exchange.
//!
//! They keep the contract and use every freedom that it gives, so an algorithm that passes under all of them does not
//! lean on what one machine happens to do.

use std::time::Duration;

/// How exchanges behave.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Personality {
    /// As HCCL: an exchange starts only when all its peers have arrived; attention with outputs in the I/O dtype and no
    /// partials for bf16 and f16.
    AscendLike,
    /// As NCCL: nothing strided on the wire, so sends are packed into staging and receives unpacked; data arrives late.
    NcclLike,
    /// One copy, from the sender's memory straight into the receiver's window.
    #[default]
    Plain,
    /// As machines where only registered memory moves and the sender pushes: sends go through staging, are read as late
    /// as the contract allows, and the sender is released late.
    Push,
}

impl Personality {
    /// Whether sends are packed before they are offered, and receives unpacked after they arrived.
    pub(crate) fn packs(self) -> bool {
        self == Self::NcclLike
    }

    /// Whether the sender copies, rather than the receiver.
    pub(crate) fn pushes(self) -> bool {
        self == Self::Push
    }

    /// Whether nothing moves before all peers of the round have arrived.
    pub(crate) fn meets_first(self) -> bool {
        self == Self::AscendLike
    }

    /// Whether sends need staging at all.
    pub(crate) fn stages(self) -> bool {
        self.packs() || self.pushes()
    }

    /// The delays of one round: of exchange `id`, its `round`, on `rank`.
    pub(crate) fn delays(self, id: u64, round: u64, rank: u32) -> Delays {
        Delays { late: self.stages(), state: mix(mix(mix(0x10_75_9A_17 ^ id) ^ round) ^ u64::from(rank)) }
    }
}

/// A seeded sequence of short delays: the same in every run.
#[derive(Debug)]
pub(crate) struct Delays {
    late: bool,
    state: u64,
}

impl Delays {
    /// The next delay: most are none, none is longer than 0.6 ms.
    pub(crate) fn next(&mut self) -> Duration {
        self.state = mix(self.state);
        let late = self.late && self.state.is_multiple_of(4);
        if late { Duration::from_micros((self.state >> 32) % 600) } else { Duration::ZERO }
    }

    /// Sleeps for the next delay.
    pub(crate) fn sleep(&mut self) {
        let delay = self.next();
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
    }
}

/// SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number generators").
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_seeded_and_short_and_only_where_the_personality_has_them() {
        let list = |p: Personality, round| {
            let mut d = p.delays(3, round, 1);
            (0..200).map(|_| d.next()).collect::<Vec<_>>()
        };
        let late = list(Personality::Push, 0);
        assert_eq!(late, list(Personality::Push, 0));
        assert_ne!(late, list(Personality::Push, 1));
        assert!(late.iter().all(|d| *d < Duration::from_millis(1)));
        assert!((20..100).contains(&late.iter().filter(|d| !d.is_zero()).count()));
        assert!(list(Personality::Plain, 0).iter().all(Duration::is_zero));
    }
}
