//! How heads are cut over Ulysses ranks and head groups.
//!
//! The query heads are cut into `U * G` near-equal ranges in order; Ulysses rank `u` computes ranges `u*G .. u*G + G`, one
//! head group after the other. Each range brings the KV heads that its query heads use. Where a KV head serves several
//! ranges (`U > HK`, or a group straddles a cut) it is sent to each of them and its gradients are summed once, at home.

use std::ops::Range;

use crate::Problem;

/// `n` things cut into `parts` near-equal ranges in order; remainders go to the first ranges.
pub fn near_equal(n: usize, parts: usize, part: usize) -> Range<usize> {
    let (each, rest) = (n / parts, n % parts);
    let start = part * each + part.min(rest);
    start..start + each + usize::from(part < rest)
}

/// The heads of one Ulysses rank in one head group.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Heads {
    /// Query heads (global).
    pub q: Range<usize>,
    /// KV heads that they use (global).
    pub kv: Range<usize>,
}

/// The heads of every Ulysses rank in every head group.
#[derive(Clone, Debug)]
pub struct HeadCut {
    ulysses: usize,
    groups: Vec<Vec<Heads>>,
}

impl HeadCut {
    /// Cuts the heads of `problem` over `ulysses` ranks.
    pub fn new(problem: &Problem, ulysses: u32) -> Self {
        let (u_count, g_count) = (ulysses as usize, problem.head_groups);
        let group = problem.group().max(1);
        let heads = |g: usize, u: usize| {
            let of_rank = near_equal(problem.heads, u_count, u);
            let inner = near_equal(of_rank.len(), g_count, g);
            let q = of_rank.start + inner.start..of_rank.start + inner.end;
            let kv =
                if q.is_empty() { q.start / group..q.start / group } else { q.start / group..(q.end - 1) / group + 1 };
            Heads { q, kv }
        };
        Self { ulysses: u_count, groups: (0..g_count).map(|g| (0..u_count).map(|u| heads(g, u)).collect()).collect() }
    }

    /// Number of head groups.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Heads of Ulysses rank `u` in group `g`.
    pub fn of(&self, g: usize, u: usize) -> &Heads {
        &self.groups[g][u]
    }

    /// Whether any KV head serves more than one range.
    pub fn replicates(&self) -> bool {
        let all = || self.groups.iter().flatten().map(|h| &h.kv);
        let heads = all().map(|kv| kv.end).max().unwrap_or(0);
        all().map(Range::len).sum::<usize>() > heads
    }

    /// Query heads of Ulysses rank `u`, of all groups.
    pub(crate) fn of_rank(&self, u: usize) -> Range<usize> {
        self.groups[0][u].q.start..self.groups[self.groups.len() - 1][u].q.end
    }

    /// Where the heads of the ranks `of` lie when those of group `g` are packed in rank order, and their number.
    pub(crate) fn packed(&self, g: usize, which: Which, of: impl Fn(usize) -> bool) -> (Vec<Range<usize>>, usize) {
        let mut at = 0;
        let places = (0..self.ulysses)
            .map(|u| {
                let start = at;
                at += if of(u) { which.of(self.of(g, u)).len() } else { 0 };
                start..at
            })
            .collect();
        (places, at)
    }
}

/// Query heads or KV heads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Which {
    Kv,
    Query,
}

impl Which {
    pub(crate) fn of(self, heads: &Heads) -> &Range<usize> {
        match self {
            Self::Kv => &heads.kv,
            Self::Query => &heads.q,
        }
    }
}

#[cfg(test)]
mod tests {
    use longspan_hal::DType;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_query_head_once_with_its_kv_head(kv in 1usize..9, group in 1usize..9, ulysses in 1u32..12, groups in 1usize..5) {
            let problem = Problem::new(DType::F32, 1, [kv * group, kv], 8).with_head_groups(groups);
            let cut = HeadCut::new(&problem, ulysses);
            let mut seen = vec![0; kv * group];
            for g in 0..groups {
                for u in 0..ulysses as usize {
                    let Heads { q, kv } = cut.of(g, u);
                    for h in q.clone() {
                        seen[h] += 1;
                        prop_assert!(kv.contains(&(h / group)));
                    }
                    prop_assert!(kv.clone().all(|k| q.clone().any(|h| h / group == k)));
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            let uses: usize = (0..groups).flat_map(|g| (0..ulysses as usize).map(move |u| (g, u))).map(|(g, u)| cut.of(g, u).kv.len()).sum();
            prop_assert_eq!(cut.replicates(), uses > kv);
        }

        #[test]
        fn near_equal_parts_tile_the_whole(n in 0usize..100, parts in 1usize..20) {
            let mut at = 0;
            for p in 0..parts {
                let r = near_equal(n, parts, p);
                prop_assert_eq!(r.start, at);
                prop_assert!(r.len() == n / parts || r.len() == n / parts + 1);
                at = r.end;
            }
            prop_assert_eq!(at, n);
        }
    }

    #[test]
    fn thirty_two_heads_over_three_ranks_give_irregular_groups() {
        let cut = HeadCut::new(&Problem::new(DType::F32, 1, [32, 8], 8), 3);
        assert_eq!(cut.of(0, 1), &Heads { q: 11..22, kv: 2..6 });
        assert!(cut.replicates());
    }
}
