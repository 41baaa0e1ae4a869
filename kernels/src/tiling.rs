//! Slices become work lists: tiles of rows, each with the bands of pairs that it computes.
//!
//! ```text
//! by_queries: cut every query range (and every stretch of rows between them) into tiles of at most `rows` rows
//!     piece of tile T and slice s = the keys of s that some row of T sees
//! by_keys: cut the union of the keys that slices select (and the stretches between) into tiles
//!     piece of tile T and slice s = the keys of s in T, and the queries that see one of them
//! order the tiles: batch rows in sections that a cache holds; in each most pairs first, so that the last blocks are short
//! ```
//!
//! A key tile never holds a row that no slice selects beside one that some slice does: such rows may hold NaN, and a product
//! with probability 0 would spread it.

use std::ops::Range;

use longspan_hal::{Error, Result, Slice, Slices, Spec};

use crate::params::{Piece, Tile};

/// Largest number of local rows, so that differences of rows and diagonals fit 32 bits.
pub const MAX_ROWS: usize = 1 << 30;

/// The work of one launch, for each head alike.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WorkList {
    /// Tiles, most pairs first within each section of batch rows. Together they hold every row of every batch row exactly once.
    pub tiles: Vec<Tile>,
    /// Pieces of the tiles.
    pub pieces: Vec<Piece>,
}

impl WorkList {
    /// Query tiles of at most `rows` rows, for the forward and the dq kernel, in sections of `batches` batch rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tensors have over [`MAX_ROWS`] rows or there are over 2^32 tiles or pieces.
    pub fn by_queries(spec: &Spec, slices: &Slices, rows: u32, batches: u32) -> Result<Self> {
        check(spec, slices)?;
        let mut list = Builder::default();
        let mut groups = slices.by_queries().peekable();
        for batch in 0..spec.batch as u32 {
            let mut row = 0;
            while let Some(group) = groups.next_if(|g| g[0].batch == batch) {
                let range = group[0].q.clone();
                list.cut(batch, row..range.start, rows, |_| {});
                row = range.end;
                list.cut_with(batch, range, rows, group);
            }
            list.cut(batch, row..spec.q_rows as u32, rows, |_| {});
        }
        list.finish(batches)
    }

    /// Key tiles of at most `rows` rows, for the backward, in sections of `batches` batch rows.
    ///
    /// # Errors
    /// As [`WorkList::by_queries`].
    pub fn by_keys(spec: &Spec, slices: &Slices, rows: u32, batches: u32) -> Result<Self> {
        check(spec, slices)?;
        let mut list = Builder::default();
        for batch in 0..spec.batch as u32 {
            let own = of_batch(slices.as_slice(), batch);
            let first_tile = list.tiles.len();
            let mut row = 0;
            for covered in union(own) {
                list.cut(batch, row..covered.start, rows, |_| {});
                row = covered.end;
                list.cut(batch, covered, rows, |_| {});
            }
            list.cut(batch, row..spec.k_rows as u32, rows, |_| {});
            list.scatter(first_tile, own);
        }
        list.finish(batches)
    }

    /// The tiles' bytes, as the device reads them.
    pub fn tile_bytes(&self) -> usize {
        size_of_val(self.tiles.as_slice())
    }

    /// The pieces' bytes, as the device reads them.
    pub fn piece_bytes(&self) -> usize {
        size_of_val(self.pieces.as_slice())
    }
}

fn check(spec: &Spec, slices: &Slices) -> Result<()> {
    if let Some(s) = slices.as_slice().iter().find(|s| i32::try_from(s.q_step.max(s.k_step)).is_err()) {
        return Err(Error::invalid(
            "slices",
            format!("positions {} apart, fewer than 2^31 are possible", s.q_step.max(s.k_step)),
        ));
    }
    for (what, rows) in [("q_rows", spec.q_rows), ("k_rows", spec.k_rows)] {
        if rows >= MAX_ROWS {
            return Err(Error::invalid(what, format!("{rows} rows on one device, fewer than {MAX_ROWS} are possible")));
        }
    }
    Ok(())
}

fn of_batch(slices: &[Slice], batch: u32) -> &[Slice] {
    let start = slices.partition_point(|s| s.batch < batch);
    let end = slices.partition_point(|s| s.batch <= batch);
    &slices[start..end]
}

/// Keys of `s` that one of its queries sees; not empty, since the slice selects a pair.
fn seen(s: &Slice) -> Range<u32> {
    clip(&s.k, first_diagonal(s, s.lo) + i64::from(s.q.start), first_diagonal(s, s.hi) + i64::from(s.q.end) - 1)
}

/// Queries of `s` that see one of its keys.
fn seen_queries(s: &Slice) -> Range<u32> {
    clip(&s.q, i64::from(s.k.start) - first_diagonal(s, s.hi), i64::from(s.k.end) - 1 - first_diagonal(s, s.lo))
}

/// A diagonal of a slice counted from the tensors' first rows.
fn first_diagonal(s: &Slice, diagonal: i64) -> i64 {
    diagonal + i64::from(s.k.start) - i64::from(s.q.start)
}

/// `first..=last` clipped to `rows`.
fn clip(rows: &Range<u32>, first: i64, last: i64) -> Range<u32> {
    let (start, end) = (i64::from(rows.start), i64::from(rows.end));
    let from = first.clamp(start, end);
    from as u32..(last + 1).clamp(from, end) as u32
}

/// Maximal stretches of keys that slices select, ascending.
fn union(slices: &[Slice]) -> Vec<Range<u32>> {
    let mut ranges: Vec<_> = slices.iter().map(seen).collect();
    ranges.sort_by_key(|r| r.start);
    let mut merged: Vec<Range<u32>> = Vec::new();
    for r in ranges {
        match merged.last_mut() {
            Some(last) if r.start <= last.end => last.end = last.end.max(r.end),
            _ => merged.push(r),
        }
    }
    merged
}

/// The piece of `s` between query rows `q` and key rows `k` of it, trimmed to rows that occur in a pair; and its pairs.
fn piece(s: &Slice, q: &Range<u32>, k: &Range<u32>) -> Option<(Piece, u64)> {
    let (lo, hi) = (first_diagonal(s, s.lo), first_diagonal(s, s.hi));
    let k = clip(k, i64::from(q.start) + lo, i64::from(q.end) - 1 + hi);
    let q = clip(q, i64::from(k.start) - hi, i64::from(k.end) - 1 - lo);
    if q.is_empty() || k.is_empty() {
        return None;
    }
    let part = Slice {
        lo: lo + i64::from(q.start) - i64::from(k.start),
        hi: hi + i64::from(q.start) - i64::from(k.start),
        q: q.clone(),
        k: k.clone(),
        ..s.clone()
    };
    let pairs = part.pairs();
    let bound = MAX_ROWS as i64 - 2;
    let piece = Piece {
        q0: q.start as i32,
        q1: q.end as i32,
        k0: k.start as i32,
        k1: k.end as i32,
        lo: lo.clamp(-bound, bound) as i32,
        hi: hi.clamp(-bound, bound) as i32,
        q_pos: s.q_pos - s.q_step * i64::from(s.q.start),
        k_pos: s.k_pos - s.k_step * i64::from(s.k.start),
        q_step: s.q_step as i32,
        k_step: s.k_step as i32,
        q_end: seen_queries(s).end as i32,
        k_end: seen(s).end as i32,
    };
    (pairs > 0).then_some((piece, pairs))
}

/// A tile under construction.
struct Draft {
    tile: Tile,
    pairs: u64,
    pieces: Vec<Piece>,
}

#[derive(Default)]
struct Builder {
    tiles: Vec<Draft>,
}

impl Builder {
    fn cut(&mut self, batch: u32, range: Range<u32>, rows: u32, mut each: impl FnMut(&mut Draft)) {
        let mut row0 = range.start;
        while row0 < range.end {
            let tile = Tile { batch, row0, rows: rows.min(range.end - row0), ..Tile::default() };
            let mut draft = Draft { tile, pairs: 0, pieces: Vec::new() };
            each(&mut draft);
            row0 += tile.rows;
            self.tiles.push(draft);
        }
    }

    /// Query tiles of a group of slices with the same query range.
    fn cut_with(&mut self, batch: u32, range: Range<u32>, rows: u32, group: &[Slice]) {
        self.cut(batch, range, rows, |draft| {
            let q = draft.tile.row0..draft.tile.row0 + draft.tile.rows;
            for s in group {
                draft.take(piece(s, &q, &s.k));
            }
        });
    }

    /// Gives every slice's pieces to the key tiles from `first_tile` on, which ascend.
    fn scatter(&mut self, first_tile: usize, slices: &[Slice]) {
        let tiles = &mut self.tiles[first_tile..];
        for s in slices {
            let keys = seen(s);
            let start = tiles.partition_point(|d| d.tile.row0 + d.tile.rows <= keys.start);
            for draft in tiles[start..].iter_mut().take_while(|d| d.tile.row0 < keys.end) {
                let end = draft.tile.row0 + draft.tile.rows;
                let k = keys.start.max(draft.tile.row0)..keys.end.min(end);
                draft.take(piece(s, &s.q, &k));
            }
        }
    }

    fn finish(mut self, batches: u32) -> Result<WorkList> {
        let section = |d: &Draft| d.tile.batch / batches.max(1);
        self.tiles.sort_by_key(|d| (section(d), std::cmp::Reverse(d.pairs)));
        let (mut list, mut now, mut rank) = (WorkList::default(), 0, 0);
        for draft in self.tiles {
            rank = if section(&draft) == now { rank } else { 0 };
            now = section(&draft);
            let too_many = || Error::invalid("slices", "they cut into more than 2^32 pieces");
            let first = u32::try_from(list.pieces.len()).map_err(|_| too_many())?;
            let count = u32::try_from(draft.pieces.len()).map_err(|_| too_many())?;
            list.tiles.push(Tile { first, count, rank, ..draft.tile });
            rank += 1;
            list.pieces.extend(draft.pieces);
        }
        Ok(list)
    }
}

impl Draft {
    fn take(&mut self, piece: Option<(Piece, u64)>) {
        if let Some((piece, pairs)) = piece {
            self.pieces.push(piece);
            self.pairs += pairs;
        }
    }
}

#[cfg(test)]
mod tests {
    use longspan_hal::DType;
    use proptest::prelude::*;

    use super::*;

    const Q_ROWS: u32 = 40;
    const K_ROWS: u32 = 36;

    /// Random lists with equal or disjoint query ranges, on two batch rows.
    fn slices() -> impl Strategy<Value = (Spec, Slices)> {
        let one = (0u32..2, 0u32..4, 0u32..K_ROWS, 1u32..20, -25i64..25, 0i64..30, 0i64..50, 1i64..4);
        prop::collection::vec(one, 0..8).prop_map(|list| {
            let spec = Spec::new(DType::Bf16, 2, [Q_ROWS as usize, K_ROWS as usize], [2, 1], 16);
            let borders = [0, 7, 19, 20, 33];
            let mut kept: Vec<Slice> = Vec::new();
            for (batch, range, k, n, lo, width, pos, step) in list {
                let s = Slice {
                    lo,
                    hi: lo + width,
                    q_pos: pos,
                    k_pos: 2 * pos,
                    q_step: step,
                    k_step: step,
                    ..Slice::full(batch, borders[range as usize]..borders[range as usize + 1], k..(k + n).min(K_ROWS))
                };
                let mut with = kept.clone();
                with.push(s);
                if Slices::new(&spec, with.clone()).is_ok() {
                    kept = with;
                }
            }
            let slices = Slices::new(&spec, kept).expect("each step was valid");
            (spec, slices)
        })
    }

    /// (batch, query, key, query position, key position).
    type Pair = (u32, u32, u32, i64, i64);

    fn expected(slices: &Slices) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for s in slices.as_slice() {
            for r in s.q.clone() {
                let q_pos = s.q_pos + s.q_step * i64::from(r - s.q.start);
                pairs.extend(
                    s.keys_of(r).map(|c| (s.batch, r, c, q_pos, s.k_pos + s.k_step * i64::from(c - s.k.start))),
                );
            }
        }
        pairs.sort_unstable();
        pairs
    }

    /// The pairs that a kernel computes, by the rule of [`Piece`].
    fn computed(list: &WorkList, keys: bool) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for t in &list.tiles {
            for p in &list.pieces[t.first as usize..(t.first + t.count) as usize] {
                let rows = t.row0 as i32..(t.row0 + t.rows) as i32;
                let (qs, ks) = if keys { (p.q0..p.q1, rows) } else { (rows, p.k0..p.k1) };
                for r in qs {
                    for c in ks.clone().filter(|c| (p.k0..p.k1).contains(c) && (p.lo..=p.hi).contains(&(c - r))) {
                        let (q_pos, k_pos) = (i64::from(r) * i64::from(p.q_step), i64::from(c) * i64::from(p.k_step));
                        pairs.push((t.batch, r as u32, c as u32, p.q_pos + q_pos, p.k_pos + k_pos));
                    }
                }
            }
        }
        pairs.sort_unstable();
        pairs
    }

    fn covers_all_rows(list: &WorkList, rows: u32, most: u32) {
        let mut seen: Vec<(u32, u32)> =
            list.tiles.iter().flat_map(|t| (t.row0..t.row0 + t.rows).map(|r| (t.batch, r))).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..2).flat_map(|b| (0..rows).map(move |r| (b, r))).collect::<Vec<_>>());
        assert!(list.tiles.iter().all(|t| t.rows <= most && t.rows > 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn query_tiles_compute_each_pair_once((spec, slices) in slices(), rows in 1u32..17) {
            let list = WorkList::by_queries(&spec, &slices, rows, 2).expect("valid");
            covers_all_rows(&list, Q_ROWS, rows);
            prop_assert_eq!(computed(&list, false), expected(&slices));
        }

        #[test]
        fn key_tiles_compute_each_pair_once((spec, slices) in slices(), rows in 1u32..17) {
            let list = WorkList::by_keys(&spec, &slices, rows, 2).expect("valid");
            covers_all_rows(&list, K_ROWS, rows);
            prop_assert_eq!(computed(&list, true), expected(&slices));
        }

        #[test]
        fn tiles_touch_no_row_that_no_slice_selects((spec, slices) in slices(), rows in 1u32..17) {
            let pairs = expected(&slices);
            let query = |b, r: i32| pairs.iter().any(|p| p.0 == b && p.1 as i32 == r);
            let key = |b, c: i32| pairs.iter().any(|p| p.0 == b && p.2 as i32 == c);
            let list = WorkList::by_queries(&spec, &slices, rows, 2).expect("valid");
            for t in &list.tiles {
                for p in &list.pieces[t.first as usize..(t.first + t.count) as usize] {
                    prop_assert!(p.q_end >= p.q1 && p.k_end >= p.k1);
                    prop_assert!((p.q0..p.q_end).all(|r| query(t.batch, r)));
                    prop_assert!((p.k1..p.k_end).all(|c| key(t.batch, c)));
                    prop_assert!((p.k0..p.k1).all(|c| key(t.batch, c)));
                }
            }
            let list = WorkList::by_keys(&spec, &slices, rows, 2).expect("valid");
            for t in list.tiles.iter().filter(|t| t.count > 0) {
                prop_assert!((t.row0..t.row0 + t.rows).all(|c| key(t.batch, c as i32)));
                for p in &list.pieces[t.first as usize..(t.first + t.count) as usize] {
                    prop_assert!((p.q0..p.q1).all(|r| query(t.batch, r)));
                }
            }
        }

        #[test]
        fn sections_of_batch_rows_come_one_after_the_other((spec, slices) in slices(), rows in 1u32..17) {
            let list = WorkList::by_keys(&spec, &slices, rows, 1).expect("valid");
            prop_assert!(list.tiles.is_sorted_by_key(|t| t.batch));
            let list = WorkList::by_queries(&spec, &slices, rows, 1).expect("valid");
            prop_assert!(list.tiles.is_sorted_by_key(|t| t.batch));
        }

        #[test]
        fn the_longest_tiles_come_first((spec, slices) in slices(), rows in 1u32..17) {
            let list = WorkList::by_queries(&spec, &slices, rows, 2).expect("valid");
            let pairs = |t: &Tile| {
                let one = WorkList {
                    tiles: vec![Tile { first: 0, ..*t }],
                    pieces: list.pieces[t.first as usize..(t.first + t.count) as usize].to_vec(),
                };
                computed(&one, false).len()
            };
            let order: Vec<_> = list.tiles.iter().map(pairs).collect();
            prop_assert!(order.is_sorted_by(|a, b| a >= b), "{:?}", order);
        }
    }

    #[test]
    fn a_diagonal_that_bounds_nothing_fits_32_bits() {
        let spec = Spec::new(DType::Bf16, 1, [64, 64], [1, 1], 16);
        let slices = Slices::new(&spec, [Slice::full(0, 0..64, 0..64)]).expect("valid");
        let list = WorkList::by_keys(&spec, &slices, 128, 2).expect("valid");
        assert_eq!(list.tiles, [Tile { batch: 0, row0: 0, rows: 64, first: 0, count: 1, rank: 0 }]);
        assert!(list.pieces[0].lo < -64 && list.pieces[0].hi > 64);
    }

    #[test]
    fn tiles_are_numbered_in_their_section_of_batch_rows() {
        let spec = Spec::new(DType::Bf16, 3, [256, 256], [1, 1], 16);
        let slices = Slices::new(&spec, (0..3).map(|batch| Slice::full(batch, 0..256, 0..256))).expect("valid");
        let list = WorkList::by_keys(&spec, &slices, 128, 2).expect("valid");
        let ranks: Vec<_> = list.tiles.iter().map(|t| t.rank).collect();
        assert_eq!(ranks, [0, 1, 2, 3, 0, 1]);
    }

    #[test]
    fn a_thousand_slices_take_about_a_millisecond() {
        let spec = Spec::new(DType::Bf16, 1, [1 << 17, 1 << 17], [1, 1], 16);
        let documents =
            (0..1000).map(|i| Slice { hi: 0, ..Slice::full(0, i * 128..i * 128 + 128, i * 128..i * 128 + 128) });
        let slices = Slices::new(&spec, documents).expect("valid");
        let begin = std::time::Instant::now();
        let list = WorkList::by_keys(&spec, &slices, 128, 2).expect("valid");
        assert!(list.tiles.len() >= 1000);
        // Ten times the promise: test machines are shared.
        assert!(begin.elapsed().as_millis() < 10, "{:?}", begin.elapsed());
    }
}
