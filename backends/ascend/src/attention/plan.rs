//! Plans: units of heads, tiles of rows, tiles of keys with their pairs.
//!
//! ```text
//! rows:  each query range of the slices, without the rows that see no key, cut by TILE; the rest are gaps
//! keys:  every key row, cut by TILE; for each slice that meets a tile, the rows that see it, cut by TILE,
//!        and of the tile the keys that these rows see
//! ```
//!
//! So every row and key that a matmul reads is selected by somebody, and memory that no slice selects is never read.

use std::ops::Range;

use longspan_hal::{Slice, Slices, Spec};

use super::space::Slots;

/// The largest tile: rows and keys of one matmul.
pub(super) const TILE: usize = 512;
const LEAST: usize = 16;
/// Logits of one tile over a unit's heads, at most.
const LOGITS: usize = 1 << 21;
/// The same with dropout, which needs ten 8-byte numbers a logit.
const LOGITS_DROPOUT: usize = 1 << 18;

/// A planned call of basic attention.
#[derive(Debug)]
pub(super) struct BasicPlan {
    pub(super) spec: Spec,
    pub(super) slices: Slices,
    pub(super) units: Vec<Unit>,
    pub(super) tile: usize,
    pub(super) rows: Vec<RowTile>,
    pub(super) keys: Vec<KeyTile>,
}

/// Neighbouring KV heads with equally many query heads each.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Unit {
    pub heads: Range<usize>,
    pub kv: Range<usize>,
}

/// Query rows with the slices (by index) that select keys for them; none for a gap.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct RowTile {
    pub batch: usize,
    pub rows: Range<usize>,
    pub slices: Range<usize>,
}

/// Key rows with the pairs of rows and keys that select them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct KeyTile {
    pub batch: usize,
    pub keys: Range<usize>,
    pub pairs: Vec<Pair>,
}

/// Part of a slice: local rows and keys.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Pair {
    pub slice: usize,
    pub rows: Range<usize>,
    pub keys: Range<usize>,
}

/// Sizes that scratch is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub heads: usize,
    pub kv: usize,
    pub rows: usize,
    pub keys: usize,
}

impl BasicPlan {
    /// Plans `slices` of `spec`.
    pub(super) fn new(spec: &Spec, slices: &Slices) -> Self {
        let units = units(spec);
        let most = units.iter().map(|u| u.heads.len()).max().unwrap_or(1);
        Self::with_tile(spec, slices, tile_for(spec, most))
    }

    /// [`Self::new`] with tiles of `tile`.
    pub(super) fn with_tile(spec: &Spec, slices: &Slices, tile: usize) -> Self {
        let (rows, keys) = (row_tiles(spec, slices, tile), key_tiles(spec, slices, tile));
        Self { spec: spec.clone(), slices: slices.clone(), units: units(spec), tile, rows, keys }
    }

    /// The largest of everything.
    pub(super) fn sizes(&self) -> Sizes {
        let heads = self.units.iter().map(|u| u.heads.len()).max().unwrap_or(0);
        let kv = self.units.iter().map(|u| u.kv.len()).max().unwrap_or(0);
        Sizes { heads, kv, rows: self.tile.min(self.spec.q_rows), keys: self.tile.min(self.spec.k_rows) }
    }

    /// Bytes of scratch.
    pub(super) fn scratch_bytes(&self) -> usize {
        Slots::bytes(&self.spec, self.sizes())
    }
}

/// The largest power of two whose tile of logits is small enough; `LONGSPAN_ASCEND_TILE` bounds it, for tests.
fn tile_for(spec: &Spec, heads: usize) -> usize {
    let bound = std::env::var("LONGSPAN_ASCEND_TILE").ok().and_then(|t| t.parse().ok()).unwrap_or(TILE);
    let logits = if spec.dropout.is_some() { LOGITS_DROPOUT } else { LOGITS };
    let mut tile = TILE;
    while tile > LEAST && (tile > bound || heads * tile * tile > logits) {
        tile /= 2;
    }
    tile
}

/// Units of the local heads.
pub(super) fn units(spec: &Spec) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut head = 0;
    while head < spec.heads {
        let kv = spec.kv_head(head);
        let end = (head..spec.heads).find(|&h| spec.kv_head(h) != kv).unwrap_or(spec.heads);
        match units.last_mut() {
            Some(unit) if unit.heads.len() == unit.kv.len() * (end - head) && unit.kv.end == kv => {
                unit.heads.end = end;
                unit.kv.end = kv + 1;
            }
            _ => units.push(Unit { heads: head..end, kv: kv..kv + 1 }),
        }
        head = end;
    }
    units
}

/// `from..to` in pieces of at most `tile`.
fn cut(range: Range<usize>, tile: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(tile).map(move |from| from..(from + tile).min(end))
}

pub(super) fn row_tiles(spec: &Spec, slices: &Slices, tile: usize) -> Vec<RowTile> {
    let (mut tiles, mut next) = (Vec::new(), (0, 0));
    let gap = |tiles: &mut Vec<RowTile>, next: &mut (usize, usize), batch: usize, row: usize| {
        while *next < (batch, row) {
            let end = if next.0 < batch { spec.q_rows } else { row };
            let gaps = cut(next.1..end, tile).map(|rows| RowTile { batch: next.0, rows, slices: 0..0 });
            tiles.extend(gaps);
            *next = if next.0 < batch { (next.0 + 1, 0) } else { (batch, row) };
        }
    };
    let mut first = 0;
    for group in slices.by_queries() {
        let (index, batch) = (first..first + group.len(), group[0].batch as usize);
        first = index.end;
        for run in seeing(group) {
            gap(&mut tiles, &mut next, batch, run.start);
            next = (batch, run.end);
            tiles.extend(cut(run, tile).map(|rows| RowTile { batch, rows, slices: index.clone() }));
        }
    }
    gap(&mut tiles, &mut next, spec.batch, 0);
    tiles
}

/// Runs of the group's rows that see a key in some slice.
fn seeing(group: &[Slice]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = group.iter().map(rows_that_see).filter(|r| !r.is_empty()).collect();
    runs.sort_by_key(|r| r.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

/// Local rows that see a key of the slice.
pub(super) fn rows_that_see(s: &Slice) -> Range<usize> {
    rows_seeing(s, &(s.k.start as usize..s.k.end as usize))
}

/// Local rows of `s` that see one of `keys`, which lie in the slice.
fn rows_seeing(s: &Slice, keys: &Range<usize>) -> Range<usize> {
    if keys.is_empty() || s.lo > s.hi {
        return 0..0;
    }
    let (first, last) = (keys.start as i64 - i64::from(s.k.start), keys.end as i64 - 1 - i64::from(s.k.start));
    clip(&s.q, first - s.hi, last - s.lo)
}

/// Local keys of `s` that one of `rows`, which lie in the slice, sees.
pub(super) fn keys_seen(s: &Slice, rows: &Range<usize>) -> Range<usize> {
    if rows.is_empty() || s.lo > s.hi {
        return 0..0;
    }
    let (first, last) = (rows.start as i64 - i64::from(s.q.start), rows.end as i64 - 1 - i64::from(s.q.start));
    clip(&s.k, first + s.lo, last + s.hi)
}

/// `first..=last`, relative to `range.start`, clipped to `range`.
fn clip(range: &Range<u32>, first: i64, last: i64) -> Range<usize> {
    let n = i64::from(range.end) - i64::from(range.start);
    let from = first.clamp(0, n);
    let to = (last + 1).clamp(from, n);
    range.start as usize + from as usize..range.start as usize + to as usize
}

/// Pieces of the keys that `rows` see in slice `s`, of at most `tile`.
pub(super) fn key_pieces(s: &Slice, rows: &Range<usize>, tile: usize) -> impl Iterator<Item = Range<usize>> {
    cut(keys_seen(s, rows), tile)
}

fn key_tiles(spec: &Spec, slices: &Slices, tile: usize) -> Vec<KeyTile> {
    let per_batch = spec.k_rows.div_ceil(tile);
    let mut tiles: Vec<KeyTile> = (0..spec.batch)
        .flat_map(|batch| cut(0..spec.k_rows, tile).map(move |keys| KeyTile { batch, keys, pairs: Vec::new() }))
        .collect();
    for (slice, s) in slices.as_slice().iter().enumerate() {
        let (start, end) = (s.k.start as usize, s.k.end as usize);
        for n in start / tile..end.div_ceil(tile) {
            let to = &mut tiles[s.batch as usize * per_batch + n];
            let keys = start.max(to.keys.start)..end.min(to.keys.end);
            for rows in cut(rows_seeing(s, &keys), tile) {
                let seen = keys_seen(s, &rows);
                let keys = seen.start.max(keys.start)..seen.end.min(keys.end);
                if !keys.is_empty() {
                    to.pairs.push(Pair { slice, rows, keys });
                }
            }
        }
    }
    tiles
}

#[cfg(test)]
mod tests;
