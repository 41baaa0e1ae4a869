//! The grid of ranks: `ulysses` ranks share a block by heads, `ring` blocks share the sequence.
//!
//! Sequence-parallel size is `N = U * R`. With `u` in `0..U` and `r` in `0..R`:
//!
//! ```text
//! UlyssesInner: rank = r * U + u        the all-to-all runs among neighbours
//! RingInner:    rank = u * R + r        the ring runs among neighbours
//! ```
//!
//! Ulysses groups and ring groups are lists of ranks, not communicators. A mesh is plain data: any number of them may live
//! in one process.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use longspan_hal::{Error, Result};

/// `ulysses x ring` ranks, and which of the two is numbered inside.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Mesh {
    ulysses: u32,
    ring: u32,
    placement: Placement,
}

impl Mesh {
    /// A mesh of `ulysses * ring` ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a side is 0 or the product does not fit 32 bits.
    pub fn new(ulysses: u32, ring: u32, placement: Placement) -> Result<Self> {
        if ulysses == 0 || ring == 0 {
            return Err(Error::invalid("mesh", format!("{ulysses} ulysses x {ring} ring: both must be at least 1")));
        }
        if ulysses.checked_mul(ring).is_none() {
            return Err(Error::invalid("mesh", format!("{ulysses} ulysses x {ring} ring ranks do not fit 32 bits")));
        }
        Ok(Self { ulysses, ring, placement })
    }

    /// Ranks that share one ring rank's block, each with its part of the heads.
    pub const fn ulysses(&self) -> u32 {
        self.ulysses
    }

    /// Number of blocks that the sequence is cut into.
    pub const fn ring(&self) -> u32 {
        self.ring
    }

    /// Number of ranks, `ulysses * ring`.
    pub const fn size(&self) -> u32 {
        self.ulysses * self.ring
    }

    /// Which side is numbered inside.
    pub const fn placement(&self) -> Placement {
        self.placement
    }

    /// Where `rank` (below [`Mesh::size`]) stands.
    pub const fn coords(&self, rank: u32) -> Coords {
        match self.placement {
            Placement::RingInner => Coords { ring: rank % self.ring, ulysses: rank / self.ring },
            Placement::UlyssesInner => Coords { ring: rank / self.ulysses, ulysses: rank % self.ulysses },
        }
    }

    /// The rank that stands at `at` (each coordinate below its side).
    pub const fn rank(&self, at: Coords) -> u32 {
        match self.placement {
            Placement::RingInner => at.ulysses * self.ring + at.ring,
            Placement::UlyssesInner => at.ring * self.ulysses + at.ulysses,
        }
    }

    /// The ranks of ring rank `ring`, in order of their Ulysses rank: the group of one all-to-all.
    pub fn ulysses_group(&self, ring: u32) -> impl Iterator<Item = u32> + use<> {
        let mesh = *self;
        (0..mesh.ulysses).map(move |ulysses| mesh.rank(Coords { ring, ulysses }))
    }

    /// The ranks of Ulysses rank `ulysses`, in order of their ring rank: one ring.
    pub fn ring_group(&self, ulysses: u32) -> impl Iterator<Item = u32> + use<> {
        let mesh = *self;
        (0..mesh.ring).map(move |ring| mesh.rank(Coords { ring, ulysses }))
    }
}

impl Display for Mesh {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ulysses x {} ring, {}", self.ulysses, self.ring, self.placement)
    }
}

/// Where a rank stands in a [`Mesh`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Coords {
    /// Ring rank: which block of the sequence.
    pub ring: u32,
    /// Ulysses rank: which part of the block before the all-to-all, which heads after it.
    pub ulysses: u32,
}

/// Which side of a [`Mesh`] is numbered inside, so that its ranks are neighbours.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Placement {
    /// `rank = ulysses * R + ring`.
    RingInner,
    /// `rank = ring * U + ulysses`: the default, since an all-to-all needs the faster links.
    #[default]
    UlyssesInner,
}

impl Display for Placement {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RingInner => "ring-inner",
            Self::UlyssesInner => "ulysses-inner",
        })
    }
}

impl FromStr for Placement {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "ring-inner" => Ok(Self::RingInner),
            "ulysses-inner" => Ok(Self::UlyssesInner),
            _ => Err(Error::invalid("placement", format!("`{text}`: it is ulysses-inner or ring-inner"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_and_coordinates_are_inverse(u in 1u32..9, r in 1u32..9, inner in any::<bool>()) {
            let placement = if inner { Placement::UlyssesInner } else { Placement::RingInner };
            let mesh = Mesh::new(u, r, placement).expect("small");
            let mut seen = vec![0; mesh.size() as usize];
            for ring in 0..r {
                for (ulysses, rank) in mesh.ulysses_group(ring).enumerate() {
                    seen[rank as usize] += 1;
                    prop_assert_eq!(mesh.coords(rank), Coords { ring, ulysses: ulysses as u32 });
                    prop_assert_eq!(mesh.ring_group(ulysses as u32).nth(ring as usize), Some(rank));
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
        }
    }

    #[test]
    fn placements_number_their_inner_side_first() {
        let at = Coords { ring: 2, ulysses: 1 };
        assert_eq!(Mesh::new(4, 3, Placement::UlyssesInner).expect("ok").rank(at), 9);
        assert_eq!(Mesh::new(4, 3, Placement::RingInner).expect("ok").rank(at), 5);
        assert_eq!("ring-inner".parse(), Ok(Placement::RingInner));
        assert!("inner".parse::<Placement>().is_err());
    }

    #[test]
    fn zero_sides_and_overflow_are_refused() {
        assert!(Mesh::new(0, 1, Placement::RingInner).is_err());
        assert!(Mesh::new(1, 0, Placement::RingInner).is_err());
        assert!(Mesh::new(1 << 16, 1 << 16, Placement::RingInner).is_err());
        assert!(Mesh::new(u32::MAX, 1, Placement::RingInner).is_ok());
    }
}
