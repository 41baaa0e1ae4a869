//! Every mask is bands: lists of (run of queries x run of keys) with a lower and an upper diagonal.
//!
//! With `i` counted from the first query row of a slice and `j` from its first key row, a pair is selected where
//! `lo <= j - i <= hi`. Causal masks, windows, zigzag and stripe layouts, packed documents and prefixes are lists of such
//! slices, and attention kernels know nothing else.

use std::ops::Range;

use crate::{Error, Result, Spec};

/// One band of (query, key) pairs, with the global positions that ALiBi and dropout need.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Slice {
    /// Local batch row.
    pub batch: u32,
    /// Local query rows.
    pub q: Range<u32>,
    /// Local key rows.
    pub k: Range<u32>,
    /// Lower diagonal: `j - i >= lo`.
    pub lo: i64,
    /// Upper diagonal: `j - i <= hi`.
    pub hi: i64,
    /// Global position of the first query row.
    pub q_pos: i64,
    /// Global position of the first key row.
    pub k_pos: i64,
    /// Distance of global positions of neighbouring query rows.
    pub q_step: i64,
    /// Distance of global positions of neighbouring key rows.
    pub k_step: i64,
}

impl Slice {
    /// A `lo` that bounds nothing.
    pub const LO_NONE: i64 = -(1 << 40);
    /// A `hi` that bounds nothing.
    pub const HI_NONE: i64 = 1 << 40;

    /// All pairs of `q` and `k` rows, with positions equal to rows.
    pub fn full(batch: u32, q: Range<u32>, k: Range<u32>) -> Self {
        let (q_pos, k_pos) = (i64::from(q.start), i64::from(k.start));
        Self { batch, q, k, lo: Self::LO_NONE, hi: Self::HI_NONE, q_pos, k_pos, q_step: 1, k_step: 1 }
    }

    /// The part with the local key rows `rows`, which become rows from 0.
    #[must_use]
    pub fn of_keys(&self, rows: Range<u32>) -> Self {
        let k = self.k.start.clamp(rows.start, rows.end)..self.k.end.clamp(rows.start, rows.end);
        let by = i64::from(k.start) - i64::from(self.k.start);
        Self {
            lo: self.lo.saturating_sub(by),
            hi: self.hi.saturating_sub(by),
            k_pos: self.k_pos + by * self.k_step,
            k: k.start - rows.start..k.end - rows.start,
            ..self.clone()
        }
    }

    /// The part with the local query rows `rows`, which become rows from 0.
    #[must_use]
    pub fn of_queries(&self, rows: Range<u32>) -> Self {
        let q = self.q.start.clamp(rows.start, rows.end)..self.q.end.clamp(rows.start, rows.end);
        let by = i64::from(q.start) - i64::from(self.q.start);
        Self {
            lo: self.lo.saturating_add(by),
            hi: self.hi.saturating_add(by),
            q_pos: self.q_pos + by * self.q_step,
            q: q.start - rows.start..q.end - rows.start,
            ..self.clone()
        }
    }

    /// Whether every pair is selected.
    pub fn is_full(&self) -> bool {
        let (m, n) = (self.q.len() as i64, self.k.len() as i64);
        m == 0 || n == 0 || (self.lo <= 1 - m && self.hi >= n - 1)
    }

    /// Local key rows that local query row `row` (in `q`) sees; empty if none.
    pub fn keys_of(&self, row: u32) -> Range<u32> {
        let i = i64::from(row - self.q.start);
        clip(&self.k, i.saturating_add(self.lo), i.saturating_add(self.hi))
    }

    /// Local query rows that see local key row `row` (in `k`); empty if none.
    pub fn queries_of(&self, row: u32) -> Range<u32> {
        let j = i64::from(row - self.k.start);
        clip(&self.q, j.saturating_sub(self.hi), j.saturating_sub(self.lo))
    }

    /// Number of selected pairs.
    pub fn pairs(&self) -> u64 {
        // Row i sees j in [max(0, i + lo), min(n - 1, i + hi)]: sum of two clipped arithmetic series.
        let (m, n) = (self.q.len() as i64, self.k.len() as i64);
        if m == 0 || n == 0 || self.lo > self.hi {
            return 0;
        }
        // Pairs with j - i <= d, for one diagonal d.
        let below = |d: i64| -> i128 {
            // Row i contributes clamp(i + d + 1, 0, n).
            let first = (-d).clamp(0, m); // rows before it see nothing
            let full = (n - d).clamp(first, m); // rows from it on see all n
            let count = i128::from(full - first);
            let start = i128::from(first + d + 1);
            count * start + count * (count - 1) / 2 + i128::from(m - full) * i128::from(n)
        };
        let d = |x: i64| x.clamp(-m - 1, n + 1);
        (below(d(self.hi)) - below(d(self.lo.saturating_sub(1)))) as u64
    }
}

/// `first..=last`, relative to `rows.start`, clipped to `rows`.
fn clip(rows: &Range<u32>, first: i64, last: i64) -> Range<u32> {
    let n = i64::from(rows.end) - i64::from(rows.start);
    let from = first.clamp(0, n);
    let to = last.saturating_add(1).clamp(from, n);
    rows.start + from as u32..rows.start + to as u32
}

/// A checked list of slices: the work of one attention call.
///
/// Ordered by batch, first query row, first key row. Query ranges of a batch row are equal or disjoint, and key ranges of
/// equal query ranges are disjoint, so no pair occurs twice and all slices of a query range are neighbours.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Slices(Vec<Slice>);

impl Slices {
    /// Checks and orders `slices` for `spec`; slices that select nothing are left out.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `spec` is, a range lies outside the local rows, a band has unequal steps, query ranges overlap
    /// without being equal, or a pair would be counted twice.
    pub fn new(spec: &Spec, slices: impl IntoIterator<Item = Slice>) -> Result<Self> {
        spec.check()?;
        let mut list: Vec<Slice> = Vec::new();
        for s in slices {
            check_one(spec, &s)?;
            if s.pairs() > 0 {
                list.push(s);
            }
        }
        list.sort_by_key(|s| (s.batch, s.q.start, s.q.end, s.k.start));
        for pair in list.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            if a.batch != b.batch || a.q.end <= b.q.start {
                continue;
            }
            if a.q != b.q {
                return Err(Error::invalid(
                    "slices",
                    format!("query ranges {:?} and {:?} overlap without being equal", a.q, b.q),
                ));
            }
            if a.k.end > b.k.start {
                return Err(Error::invalid(
                    "slices",
                    format!("queries {:?} select keys {:?} and {:?}, which overlap", a.q, a.k, b.k),
                ));
            }
        }
        Ok(Self(list))
    }

    /// The slices in order.
    pub fn as_slice(&self) -> &[Slice] {
        &self.0
    }

    /// The slices grouped by query range: each group is one stretch of query rows with all its key ranges.
    pub fn by_queries(&self) -> impl Iterator<Item = &[Slice]> {
        self.0.chunk_by(|a, b| a.batch == b.batch && a.q == b.q)
    }

    /// Number of selected pairs (of one head).
    pub fn pairs(&self) -> u64 {
        self.0.iter().map(Slice::pairs).sum()
    }
}

fn check_one(spec: &Spec, s: &Slice) -> Result<()> {
    let bad = |why: String| Err(Error::invalid("slices", why));
    if s.batch as usize >= spec.batch {
        return bad(format!("batch row {} of {}", s.batch, spec.batch));
    }
    if s.q.start > s.q.end || s.q.end as usize > spec.q_rows {
        return bad(format!("queries {:?} of {} rows", s.q, spec.q_rows));
    }
    if s.k.start > s.k.end || s.k.end as usize > spec.k_rows {
        return bad(format!("keys {:?} of {} rows", s.k, spec.k_rows));
    }
    if s.q_step != s.k_step && !s.is_full() {
        return bad(format!("a band needs equal steps, it has {} and {}", s.q_step, s.k_step));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::DType;

    fn slice() -> impl Strategy<Value = Slice> {
        (0u32..5, 0u32..9, 0u32..5, 0u32..9, -12i64..12, -12i64..12).prop_map(|(q, m, k, n, lo, hi)| Slice {
            lo,
            hi,
            ..Slice::full(0, q..q + m, k..k + n)
        })
    }

    #[test]
    fn the_largest_bounds_bound_nothing() {
        let all = Slice { lo: i64::MIN, hi: i64::MAX, ..Slice::full(0, 3..7, 1..6) };
        assert_eq!((all.pairs(), all.is_full(), all.keys_of(3), all.queries_of(5)), (20, true, 1..6, 3..7));
        let none = Slice { lo: i64::MAX, hi: i64::MIN, ..all };
        assert_eq!((none.pairs(), none.is_full(), none.keys_of(3).is_empty()), (0, false, true));
    }

    fn selected(s: &Slice) -> Vec<(u32, u32)> {
        let pair = |q, k| (i64::from(k) - i64::from(s.k.start)) - (i64::from(q) - i64::from(s.q.start));
        s.q.clone()
            .flat_map(|q| s.k.clone().map(move |k| (q, k)))
            .filter(|&(q, k)| (s.lo..=s.hi).contains(&pair(q, k)))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn counts_and_ranges_agree_with_the_definition(s in slice()) {
            let pairs = selected(&s);
            prop_assert_eq!(s.pairs(), pairs.len() as u64);
            prop_assert_eq!(s.is_full(), pairs.len() == s.q.len() * s.k.len() || s.q.is_empty() || s.k.is_empty());
            for q in s.q.clone() {
                let keys: Vec<u32> = pairs.iter().filter(|p| p.0 == q).map(|p| p.1).collect();
                prop_assert_eq!(s.keys_of(q).collect::<Vec<_>>(), keys);
            }
            for k in s.k.clone() {
                let queries: Vec<u32> = pairs.iter().filter(|p| p.1 == k).map(|p| p.0).collect();
                prop_assert_eq!(s.queries_of(k).collect::<Vec<_>>(), queries);
            }
        }

        #[test]
        fn parts_of_keys_have_all_pairs_once(s in slice(), at in 0u32..16) {
            let parts = [s.of_keys(0..at), s.of_keys(at..16)];
            let mut pairs: Vec<_> = selected(&parts[0]);
            pairs.extend(selected(&parts[1]).into_iter().map(|(q, k)| (q, k + at)));
            pairs.sort_unstable();
            prop_assert_eq!(pairs, selected(&s));
            for (part, first) in parts.iter().zip([0, at]).filter(|(part, _)| !part.k.is_empty()) {
                prop_assert_eq!(part.k_pos - i64::from(part.k.start), s.k_pos - i64::from(s.k.start) + i64::from(first));
            }
        }

        #[test]
        fn parts_of_queries_have_all_pairs_once(s in slice(), at in 0u32..16) {
            let parts = [s.of_queries(0..at), s.of_queries(at..16)];
            let mut pairs: Vec<_> = selected(&parts[0]);
            pairs.extend(selected(&parts[1]).into_iter().map(|(q, k)| (q + at, k)));
            pairs.sort_unstable();
            prop_assert_eq!(pairs, selected(&s));
            for (part, first) in parts.iter().zip([0, at]).filter(|(part, _)| !part.q.is_empty()) {
                prop_assert_eq!(part.q_pos - i64::from(part.q.start), s.q_pos - i64::from(s.q.start) + i64::from(first));
            }
        }

        #[test]
        fn a_list_that_counts_a_pair_twice_is_refused(list in prop::collection::vec(slice(), 1..4)) {
            let spec = Spec::new(DType::F32, 1, [16, 16], [1, 1], 8);
            let mut all: Vec<_> = list.iter().flat_map(selected).collect();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            if let Ok(slices) = Slices::new(&spec, list) {
                prop_assert_eq!(all.len(), count);
                prop_assert_eq!(slices.pairs(), count as u64);
            }
        }
    }
}
