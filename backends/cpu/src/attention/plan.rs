//! The work of an attention call, cut into tasks.
//!
//! ```text
//! forward:   for each stretch of query rows (the slices of a stretch have the same rows; gaps are stretches without slices)
//!                cut it into row tiles of some blocks             tasks: row tile x unit of heads, longest first
//! backward:  for each tile of key rows
//!                the slices that select from it                   tasks: key tile x batch row x KV head
//! ```
//!
//! How many blocks the forward's tasks have follows from the number of threads. What a row becomes does not: rows are independent,
//! blocks start at the same rows whatever the tile, and tiles of keys are counted from the first key of their slice.

use std::ops::Range;

use longspan_hal::{Slice, Slices, Spec};

use super::{BLOCK, KEY_TILE, TASK_BLOCKS};

/// Tasks of the forward get smaller until there are this many for every thread: enough to balance, and keys are packed rarely.
const TASKS_OF_A_THREAD: usize = 8;

/// Query rows that share slices.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct RowTile {
    /// Local batch row.
    pub batch: usize,
    /// Local query rows, at most `BLOCK * TASK_BLOCKS`.
    pub rows: Range<usize>,
    /// Their slices in [`Plan::slices`].
    pub slices: Range<usize>,
    /// Selected pairs.
    pub cost: u64,
}

/// Query heads that a task computes together: they share a KV head, whose packed tiles they use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Unit {
    /// Local KV head.
    pub kv_head: usize,
    /// Local query heads.
    pub heads: Range<usize>,
}

/// The tasks of a spec and its slices.
#[derive(Debug)]
pub(super) struct Plan {
    pub spec: Spec,
    pub slices: Vec<Slice>,
    /// Row tiles, the most expensive first.
    pub row_tiles: Vec<RowTile>,
    pub units: Vec<Unit>,
    /// Per batch row and key tile: where its slices start in `tile_slices`; one more at the end.
    tile_first: Vec<usize>,
    /// Slices of each key tile, ascending.
    tile_slices: Vec<u32>,
}

impl Plan {
    /// The tasks for a pool of `threads` threads.
    pub fn new(spec: &Spec, slices: &Slices, threads: usize) -> Self {
        let blocks = task_blocks(spec, threads);
        let units = units(spec, blocks);
        let row_tiles = row_tiles(spec, slices, &units, blocks);
        let (tile_first, tile_slices) = key_tiles(spec, slices.as_slice());
        Self { spec: spec.clone(), slices: slices.as_slice().to_vec(), row_tiles, units, tile_first, tile_slices }
    }

    /// Key tiles of a batch row.
    pub fn key_tiles(&self) -> usize {
        self.spec.k_rows.div_ceil(KEY_TILE)
    }

    /// Indices of the slices that select keys of `tile`, ascending.
    pub fn slices_of_tile(&self, batch: usize, tile: usize) -> &[u32] {
        let at = batch * self.key_tiles() + tile;
        &self.tile_slices[self.tile_first[at]..self.tile_first[at + 1]]
    }
}

/// Local query heads of a local KV head.
pub(super) fn heads_of(spec: &Spec, kv_head: usize) -> Range<usize> {
    let first = (spec.kv_first + kv_head) * spec.group;
    let local = |global: usize| global.saturating_sub(spec.head_first).min(spec.heads);
    local(first)..local(first + spec.group)
}

/// Blocks of a forward task.
fn task_blocks(spec: &Spec, threads: usize) -> usize {
    let all = spec.batch * spec.heads * spec.q_rows.div_ceil(BLOCK);
    (all / (threads * TASKS_OF_A_THREAD)).clamp(1, TASK_BLOCKS)
}

fn units(spec: &Spec, blocks: usize) -> Vec<Unit> {
    let mut units = Vec::new();
    for kv_head in 0..spec.kv_heads {
        let heads = heads_of(spec, kv_head);
        // Near-equal parts.
        let parts = heads.len().div_ceil(blocks);
        let cut = |i: usize| heads.start + heads.len() * i / parts.max(1);
        units.extend((0..parts).map(|i| Unit { kv_head, heads: cut(i)..cut(i + 1) }));
    }
    units
}

fn row_tiles(spec: &Spec, slices: &Slices, units: &[Unit], blocks: usize) -> Vec<RowTile> {
    let widest = units.iter().map(|u| u.heads.len()).max().unwrap_or(1);
    let rows = BLOCK * (blocks / widest.max(1)).max(1);
    let mut tiles = Vec::new();
    let (mut batch, mut row, mut at) = (0, 0, 0);
    for group in slices.by_queries() {
        let (b, q) = (group[0].batch as usize, group[0].q.start as usize..group[0].q.end as usize);
        while batch < b {
            cut(&mut tiles, batch, row..spec.q_rows, &[], 0, rows);
            (batch, row) = (batch + 1, 0);
        }
        cut(&mut tiles, batch, row..q.start, &[], 0, rows);
        cut(&mut tiles, batch, q.clone(), group, at, rows);
        row = q.end;
        at += group.len();
    }
    while batch < spec.batch {
        cut(&mut tiles, batch, row..spec.q_rows, &[], 0, rows);
        (batch, row) = (batch + 1, 0);
    }
    tiles.sort_by_key(|t| std::cmp::Reverse(t.cost));
    tiles
}

/// Cuts a stretch into tiles of `size` rows; its slices start at index `at`.
fn cut(tiles: &mut Vec<RowTile>, batch: usize, rows: Range<usize>, group: &[Slice], at: usize, size: usize) {
    for start in rows.clone().step_by(size) {
        let part = start..(start + size).min(rows.end);
        let cost = group.iter().map(|s| pairs_in(s, &part)).sum();
        tiles.push(RowTile { batch, rows: part, slices: at..at + group.len(), cost });
    }
}

/// Pairs that `slice` selects for some of its query rows.
fn pairs_in(slice: &Slice, rows: &Range<usize>) -> u64 {
    let skipped = rows.start as i64 - i64::from(slice.q.start);
    let q = rows.start as u32..rows.end as u32;
    Slice { q, lo: slice.lo + skipped, hi: slice.hi + skipped, ..slice.clone() }.pairs()
}

/// The slices of each key tile, as starts and a flat list.
fn key_tiles(spec: &Spec, slices: &[Slice]) -> (Vec<usize>, Vec<u32>) {
    let per_batch = spec.k_rows.div_ceil(KEY_TILE);
    let tiles_of = |s: &Slice| {
        let first = s.batch as usize * per_batch;
        first + s.k.start as usize / KEY_TILE..first + (s.k.end as usize).div_ceil(KEY_TILE)
    };
    let mut first = vec![0usize; spec.batch * per_batch + 1];
    for s in slices {
        for t in tiles_of(s) {
            first[t + 1] += 1;
        }
    }
    for t in 1..first.len() {
        first[t] += first[t - 1];
    }
    let mut list = vec![0u32; first[first.len() - 1]];
    let mut next = first.clone();
    for (i, s) in slices.iter().enumerate() {
        for t in tiles_of(s) {
            list[next[t]] = i as u32;
            next[t] += 1;
        }
    }
    (first, list)
}

/// A band over the rows of a block and the columns of a tile: row `r` sees the columns `r + lo ..= r + hi` inside `cols`.
#[derive(Clone, Debug)]
pub(super) struct Band {
    lo: i64,
    hi: i64,
    cols: Range<usize>,
    rows: usize,
}

impl Band {
    /// The part of `slice` with query rows `rows` (inside the slice's) and key rows `keys`, with columns counted from `origin`
    /// (not behind `keys`).
    pub fn new(slice: &Slice, rows: &Range<usize>, keys: &Range<usize>, origin: usize) -> Self {
        let (q, k) = (slice.q.start as usize, slice.k.start as usize);
        let from = keys.start.max(k);
        let to = keys.end.min(slice.k.end as usize).max(from);
        let shift = (rows.start - q) as i64 + k as i64 - origin as i64;
        let near = |x: i64| x.clamp(Slice::LO_NONE, Slice::HI_NONE) + shift;
        Self { lo: near(slice.lo), hi: near(slice.hi), cols: from - origin..to - origin, rows: rows.len() }
    }

    /// Columns that row `r` sees.
    pub fn cols_of(&self, r: usize) -> Range<usize> {
        self.hull(&(r..r + 1))
    }

    /// Columns that any of `rows` (not empty) sees.
    pub fn hull(&self, rows: &Range<usize>) -> Range<usize> {
        let (from, to) = (self.cols.start as i64, self.cols.end as i64);
        let start = (rows.start as i64 + self.lo).clamp(from, to);
        let end = (rows.end as i64 + self.hi).clamp(start, to);
        start as usize..end as usize
    }

    /// Rows that see any of `cols` (not empty, and clipped to the band's own).
    pub fn rows_of(&self, cols: &Range<usize>) -> Range<usize> {
        let (from, to) = (cols.start.max(self.cols.start) as i64, cols.end.min(self.cols.end) as i64);
        if from >= to {
            return 0..0;
        }
        let start = (from - self.hi).clamp(0, self.rows as i64);
        let end = (to - self.lo).clamp(start, self.rows as i64);
        start as usize..end as usize
    }

    /// Columns that any row sees.
    pub fn all(&self) -> Range<usize> {
        self.hull(&(0..self.rows))
    }

    /// Whether every row sees the same columns.
    pub fn is_even(&self, rows: &Range<usize>) -> bool {
        self.cols_of(rows.start) == self.cols_of(rows.end - 1)
    }
}

#[cfg(test)]
mod tests {
    use longspan_hal::DType;
    use proptest::prelude::*;

    use super::*;

    fn slice() -> impl Strategy<Value = Slice> {
        (0u32..20, 1u32..40, 0u32..20, 1u32..40, -45i64..45, -45i64..45).prop_map(|(q, m, k, n, lo, hi)| Slice {
            lo,
            hi,
            ..Slice::full(0, q..q + m, k..k + n)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_band_is_its_slice(s in slice(), a in 0usize..30, m in 1usize..20, origin in 0usize..70, n in 1usize..30) {
            let q = s.q.start as usize + a.min(s.q.len() - 1);
            let rows = q..(q + m).min(s.q.end as usize);
            let keys = origin..origin + n;
            let band = Band::new(&s, &rows, &keys, origin);
            let sees = |r: usize, c: usize| {
                s.keys_of((rows.start + r) as u32).contains(&((origin + c) as u32))
            };
            let hull = band.all();
            for r in 0..rows.len() {
                let cols: Vec<usize> = (0..n).filter(|&c| sees(r, c)).collect();
                prop_assert_eq!(band.cols_of(r).collect::<Vec<_>>(), cols.clone());
                prop_assert!(cols.iter().all(|c| hull.contains(c)));
            }
            let seen = |c: usize| (0..rows.len()).any(|r| sees(r, c));
            prop_assert!(s.lo > s.hi || hull.clone().all(seen), "the hull is tight");
            for c in 0..n {
                let part = band.rows_of(&(c..(c + 3).min(n)));
                for r in 0..rows.len() {
                    let any = (c..(c + 3).min(n)).any(|c| sees(r, c));
                    prop_assert!(!any || part.contains(&r));
                }
            }
        }

        #[test]
        fn row_tiles_cover_every_row_once(
            list in prop::collection::vec(slice(), 0..6), heads in 1usize..9, group in 1usize..5, batch in 1usize..4,
            threads in 1usize..9
        ) {
            let spec = Spec::new(DType::F32, batch, [700, 300], [heads, 1], 8).with_head_cut(0, heads, heads, group);
            let moved = list.iter().enumerate().map(|(i, s)| Slice {
                batch: i as u32 % batch as u32,
                q: s.q.start + 60 * i as u32..s.q.end + 60 * i as u32,
                ..s.clone()
            });
            let slices = Slices::new(&spec, moved).expect("disjoint query ranges");
            let plan = Plan::new(&spec, &slices, threads);
            let mut seen = vec![0; batch * 700];
            for t in &plan.row_tiles {
                for r in t.rows.clone() {
                    seen[t.batch * 700 + r] += 1;
                    for s in &plan.slices {
                        let covers = s.batch as usize == t.batch && s.q.contains(&(r as u32));
                        prop_assert_eq!(covers, plan.slices[t.slices.clone()].contains(s));
                    }
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            prop_assert_eq!(plan.row_tiles.iter().map(|t| t.cost).sum::<u64>(), slices.pairs());
            let heads_seen: Vec<usize> = plan.units.iter().flat_map(|u| u.heads.clone()).collect();
            prop_assert_eq!(heads_seen, (0..heads).collect::<Vec<_>>());
            prop_assert!(plan.units.iter().all(|u| u.heads.clone().all(|h| spec.kv_head(h) == u.kv_head)));
            for b in 0..batch {
                for t in 0..plan.key_tiles() {
                    let want: Vec<u32> = (0..plan.slices.len() as u32).filter(|&i| {
                        let s = &plan.slices[i as usize];
                        let tile = t * KEY_TILE..(t + 1) * KEY_TILE;
                        s.batch as usize == b && s.k.clone().any(|k| tile.contains(&(k as usize)))
                    }).collect();
                    prop_assert_eq!(plan.slices_of_tile(b, t), &want[..]);
                }
            }
        }
    }
}
