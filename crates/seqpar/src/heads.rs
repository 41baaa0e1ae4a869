//! How heads are cut over Ulysses ranks and head groups.
//!
//! The query heads are cut into `U` near-equal ranges in order, and the range of each Ulysses rank into `G` groups, which it
//! computes one after the other. Groups are of whole KV heads where there are enough, and the first and the last are the smallest,
//! since nothing hides the all-to-all before the one and behind the other. Each range brings the KV heads that its query heads use. Where a KV head
//! serves several ranges (`U > HK`, or a range straddles a cut) it is sent to each of them and its gradients are summed once, at
//! home.

use std::ops::Range;

use crate::{Mask, Mesh, Problem};

/// `n` things cut into `parts` near-equal ranges in order; remainders go to the first ranges.
pub fn near_equal(n: usize, parts: usize, part: usize) -> Range<usize> {
    let (each, rest) = (n / parts, n % parts);
    let start = part * each + part.min(rest);
    start..start + each + usize::from(part < rest)
}

/// `n` things cut into `groups` ranges in order, of which the first and the last have about half as many as each between them: the
/// cuts are at odd multiples of `n / (2 * groups - 2)`, rounded, a half downwards.
fn middle_heavy(n: usize, groups: usize, group: usize) -> Range<usize> {
    let parts = 2 * groups.max(2) - 2;
    let start = |g: usize| match g {
        0 => 0,
        _ if g == groups => n,
        _ => (2 * n * (2 * g - 1) + parts - 1) / (2 * parts),
    };
    start(group)..start(group + 1)
}

/// The most head groups that are chosen.
const MOST_GROUPS: usize = 4;
/// The least that a chosen head group moves, in bytes that leave a rank in a forward: below, links and launches take longer than
/// what is hidden.
const LEAST_BYTES: usize = 16 << 20;
/// Keys of a block from which on a backward with one KV head fills a device evenly: its tiles of keys, of which the longest has all
/// queries, are many for every multiprocessor.
const EVEN_KEYS: usize = 1 << 17;
/// The least that an attention of a ring's head group has where its groups are chosen, in keys of all KV heads, so that it fills
/// a device evenly, and in pairs of all query heads, so that it hides its launch.
const LEAST_KEYS: usize = 1 << 15;
const LEAST_PAIRS: usize = 1 << 30;

/// Head groups of `problem` on `mesh` with so many query and key tokens under `mask`: its own number, or one that is chosen, the same on every
/// rank. That is one, unless an all-to-all moves enough and every rank has several whole KV heads to cut: more groups would
/// share KV heads, whose gradients are then summed in f32 at home. Groups between the first and the last have two KV heads at
/// least, unless sequences are long, since a kernel with fewer does not fill a device evenly; where blocks travel too, and the mask cuts tiles short, every
/// group has to. A ring alone hides what it sends either way; two groups halve its memory where their attentions are large enough.
pub fn head_groups(problem: &Problem, mesh: &Mesh, [q_seq, k_seq]: [usize; 2], mask: &Mask) -> usize {
    if let Some(groups) = problem.head_groups {
        return groups;
    }
    let (u, n) = (mesh.ulysses() as usize, mesh.size() as usize);
    if !problem.kv_heads.is_multiple_of(u) {
        return 1;
    }
    if u == 1 {
        // Half of the own keys are the smallest attention.
        let (queries, keys) = (q_seq / n, k_seq / n / 2);
        let fills = keys * (problem.kv_heads / 2) * problem.batch >= LEAST_KEYS;
        let hides = (problem.heads / 2 * problem.batch).saturating_mul(queries).saturating_mul(keys) >= LEAST_PAIRS;
        return if n > 1 && fills && hides { 2 } else { 1 };
    }
    let dims = problem.head_dim + problem.head_dim_v;
    let elements = (q_seq / n * problem.heads + k_seq / n * problem.kv_heads) * dims * problem.batch;
    let leaving = elements * problem.dtype.size() / u * (u - 1);
    let (each, keys) = (problem.kv_heads / u, k_seq / mesh.ring() as usize * problem.batch);
    let filling = if keys >= EVEN_KEYS { each } else { each / 2 + 1 };
    let most = (leaving / LEAST_BYTES).min(filling).clamp(1, MOST_GROUPS);
    let fills = |groups: &usize| each / groups * (keys / 2) >= LEAST_KEYS;
    let even = mesh.ring() == 1 || *mask == Mask::full();
    (1..=most).rev().find(|groups| even || fills(groups)).unwrap_or(1)
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
    /// Cuts the heads of `problem` over `ulysses` ranks, and those of each into `groups`, at least 1.
    pub fn new(problem: &Problem, ulysses: u32, groups: usize) -> Self {
        let (u_count, g_count) = (ulysses as usize, groups);
        let group = problem.group().max(1);
        let heads = |g: usize, u: usize| {
            let of_rank = near_equal(problem.heads, u_count, u);
            let whole = of_rank.start.is_multiple_of(group) && of_rank.len().is_multiple_of(group);
            let unit = if whole && of_rank.len() / group >= g_count { group } else { 1 };
            let inner = middle_heavy(of_rank.len() / unit, g_count, g);
            let q = of_rank.start + inner.start * unit..of_rank.start + inner.end * unit;
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
            let problem = Problem::new(DType::F32, 1, [kv * group, kv], 8);
            let cut = HeadCut::new(&problem, ulysses, groups);
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

        /// Groups of whole KV heads share none, and the first is no larger than another.
        #[test]
        fn groups_are_of_whole_kv_heads_where_there_are_enough(each in 1usize..9, group in 1usize..9, ulysses in 1u32..5, groups in 1usize..9) {
            let kv = each * ulysses as usize;
            let cut = HeadCut::new(&Problem::new(DType::F32, 1, [kv * group, kv], 8), ulysses, groups);
            prop_assert!(groups > each || !cut.replicates());
            let sizes: Vec<_> = (0..groups).map(|g| cut.of(g, 0).q.len()).collect();
            prop_assert!(sizes.iter().all(|&n| n >= sizes[0]));
            prop_assert!(groups < 3 || sizes[1] >= sizes[groups - 1]);
        }

        #[test]
        fn chosen_groups_never_share_a_kv_head(kv in 1usize..40, group in 1usize..5, ulysses in 1u32..9, ring in 1u32..3, seq in 0usize..200_000) {
            let problem = Problem::new(DType::Bf16, 1, [kv * group, kv], 128);
            let mesh = Mesh::new(ulysses, ring, crate::Placement::default()).expect("not empty");
            let groups = head_groups(&problem, &mesh, [seq, seq], &Mask::causal());
            prop_assert!((1..=MOST_GROUPS).contains(&groups));
            let one = HeadCut::new(&problem, ulysses, 1);
            prop_assert!(groups == 1 || !one.replicates() && !HeadCut::new(&problem, ulysses, groups).replicates());
            prop_assert!(groups == 1 || ulysses > 1 || ring > 1);
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
    fn long_sequences_have_more_groups_and_tiny_ones_have_one() {
        let of = |heads, ulysses, seq| {
            let mesh = Mesh::new(ulysses, 1, crate::Placement::default()).expect("not empty");
            head_groups(&Problem::new(DType::Bf16, 1, heads, 128), &mesh, [seq, seq], &Mask::causal())
        };
        assert_eq!([1 << 10, 1 << 13, 1 << 15, 1 << 17].map(|seq| of([32, 8], 2, seq)), [1, 2, 3, 4]);
        assert_eq!([of([32, 8], 4, 1 << 16), of([32, 8], 8, 1 << 17), of([24, 24], 2, 1 << 14)], [2, 1, 4]);
    }

    #[test]
    fn a_ring_has_two_groups_that_are_large_enough() {
        let of = |heads, ring, seq| {
            let mesh = Mesh::new(1, ring, crate::Placement::default()).expect("not empty");
            head_groups(&Problem::new(DType::Bf16, 1, heads, 128), &mesh, [seq, seq], &Mask::causal())
        };
        assert_eq!([of([32, 8], 4, 1 << 16), of([32, 8], 4, 1 << 15), of([32, 8], 1, 1 << 20)], [2, 1, 1]);
        assert_eq!([of([24, 24], 2, 1 << 14), of([24, 24], 4, 1 << 16), of([8, 1], 2, 1 << 20)], [1, 2, 1]);
    }

    /// Of four ranks: three groups of 32:8 heads took 54.6 ms at 64k where one took 52.4, on four GPUs.
    #[test]
    fn groups_of_blocks_that_travel_fill_a_device() {
        let mesh = Mesh::new(2, 2, crate::Placement::default()).expect("not empty");
        let of = |heads, seq, mask| head_groups(&Problem::new(DType::Bf16, 1, heads, 128), &mesh, [seq, seq], &mask);
        assert_eq!([1 << 16, 1 << 17].map(|seq| of([32, 8], seq, Mask::causal())), [2, 3]);
        assert_eq!([Mask::causal(), Mask::full()].map(|mask| of([24, 24], 1 << 14, mask)), [1, 3]);
    }

    #[test]
    fn the_first_and_the_last_group_have_half_as_many() {
        let sizes = |n, groups| (0..groups).map(|g| middle_heavy(n, groups, g).len()).collect::<Vec<_>>();
        assert_eq!([sizes(4, 3), sizes(5, 3), sizes(2, 3)], [vec![1, 2, 1], vec![1, 3, 1], vec![0, 1, 1]]);
        assert_eq!([sizes(5, 4), sizes(6, 4), sizes(12, 4)], [vec![1, 1, 2, 1], vec![1, 2, 2, 1], vec![2, 4, 4, 2]]);
        assert_eq!([sizes(7, 1), sizes(3, 2), sizes(1, 2)], [vec![7], vec![1, 2], vec![0, 1]]);
    }

    #[test]
    fn thirty_two_heads_over_three_ranks_give_irregular_groups() {
        let cut = HeadCut::new(&Problem::new(DType::F32, 1, [32, 8], 8), 3, 1);
        assert_eq!(cut.of(0, 1), &Heads { q: 11..22, kv: 2..6 });
        assert!(cut.replicates());
    }
}
