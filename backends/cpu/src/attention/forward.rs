//! The forward: tiled online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao,
//! "FlashAttention-2", 2023, algorithm 1), on partials `(acc, m, l)`.
//!
//! ```text
//! for each task (row tile x heads of one KV head):               tasks in parallel, longest first
//!     load q; (acc, m, l) = (0, -inf, 0) or the given partial
//!     for each slice of the rows, for each tile of its keys that a row sees:
//!         pack K^T and V as f32                                  once for all blocks of the task
//!         for each block of rows:
//!             S = scale Q K^T                                    only register tiles that the band crosses
//!             per row, over the columns it sees:
//!                 S = softcap, ALiBi;  m' = max(m, max S);  P = exp(S - m')
//!                 beta = exp(m - m');  l = beta l + sum P;  m = m';  P = keep / (1 - p) P;  0 where it sees nothing
//!             acc = beta acc + P V
//!     store the partial, or out = acc / l, lse = m + ln l with the sink as one more logit
//! ```
//!
//! Departures: a maximum of -inf is taken as 0 in the exponents, so that a row that saw nothing stays `(0, -inf, 0)`. Where `V`
//! has elements that are not finite and rows of a group see different keys, `P V` runs over each row's own columns, since
//! `0 * NaN` is not nothing.

use std::ops::Range;
use std::sync::Arc;

use longspan_hal::Slice;

use super::pack::{Scratch, Tensor, each, padded};
use super::philox::{Dropout, Row};
use super::plan::{Band, Plan, RowTile, Unit};
use super::simd::{Bias, Kernels, Order, Tile, Update, VEC, any_non_finite};
use super::{BLOCK, FORWARD_KEYS, TASK_BLOCKS};

/// Options that a call brings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// f32 `[1, 1, heads_total, 1]`.
    pub alibi_slopes: Option<Tensor>,
    /// f32 `[1, 1, heads_total, 1]`.
    pub sinks: Option<Tensor>,
    pub dropout: Option<Dropout>,
}

/// One forward call on memory.
#[derive(Debug)]
pub(super) struct Forward {
    pub plan: Arc<Plan>,
    pub kernels: &'static Kernels,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub options: Options,
    /// `acc`, `m`, `l`.
    pub partial: Option<[Tensor; 3]>,
    /// Begin with empty partials rather than with `partial`.
    pub start: bool,
    /// `out`, `lse`: finish into them rather than into `partial`.
    pub results: Option<[Tensor; 2]>,
}

/// Rows of one head that are computed together.
struct Block<'a> {
    head: usize,
    rows: Range<usize>,
    q: &'a mut [f32],
    acc: &'a mut [f32],
    m: &'a mut [f32],
    l: &'a mut [f32],
}

/// Keys of one slice, packed.
struct Keys<'a> {
    slice: &'a Slice,
    /// Local key rows.
    rows: Range<usize>,
    /// K in panels, `[panel][head_dim][nr]`.
    k: &'a [f32],
    /// V, row-major.
    v: &'a [f32],
}

/// Distances of the rows of packed matrices.
#[derive(Clone, Copy)]
struct Strides {
    q: usize,
    v: usize,
    s: usize,
}

impl Forward {
    /// Computes the call.
    pub fn run(&self) {
        let units = self.plan.units.len();
        let tiles = &self.plan.row_tiles;
        // Continue has nothing to do for rows without slices, and these are the last.
        let all = self.start || self.results.is_some();
        let count = if all { tiles.len() } else { tiles.partition_point(|t| t.cost > 0) };
        each(count * units, |i, scratch| self.task(&tiles[i / units], &self.plan.units[i % units], scratch));
    }

    fn strides(&self) -> Strides {
        let (spec, k) = (&self.plan.spec, self.kernels);
        Strides { q: padded(k, spec.head_dim), v: padded(k, spec.head_dim_v), s: padded(k, FORWARD_KEYS) }
    }

    fn task(&self, tile: &RowTile, unit: &Unit, scratch: &mut Scratch) {
        let (spec, ld) = (&self.plan.spec, self.strides());
        let count = unit.heads.len() * tile.rows.len().div_ceil(BLOCK);
        debug_assert!(count <= TASK_BLOCKS);
        let lengths = [
            count * BLOCK * ld.q,
            count * BLOCK * ld.v,
            count * BLOCK,
            count * BLOCK,
            self.kernels.nr * ld.q,
            self.kernels.panels(FORWARD_KEYS) * spec.head_dim,
            FORWARD_KEYS * ld.v,
            self.kernels.mr * ld.s,
            self.kernels.mr,
            ld.s,
        ];
        let [q, acc, m, l, rows, k, v, s, beta, keep] = scratch.parts(lengths);
        let mut blocks = self.blocks(tile, unit, ld, [q, acc, m, l]);
        for slice in &self.plan.slices[tile.slices.clone()] {
            let seen_by = |rows: &Range<usize>| Band::new(slice, rows, &(0..spec.k_rows), 0).all();
            let seen = seen_by(&tile.rows);
            if seen.is_empty() {
                continue;
            }
            // Counted from the first key that the slice selects, wherever its rows are cut.
            let first = seen_by(&(slice.q.start as usize..slice.q.end as usize)).start;
            let skipped = (seen.start - first) / FORWARD_KEYS * FORWARD_KEYS;
            for from in (first + skipped..seen.end).step_by(FORWARD_KEYS) {
                let keys = from..(from + FORWARD_KEYS).min(seen.end);
                self.pack(tile.batch, unit.kv_head, &keys, ld, [rows, k, v]);
                let keys = Keys { slice, rows: keys, k: &*k, v: &*v };
                for block in &mut blocks {
                    self.attend(tile.batch, block, &keys, ld, [s, beta, keep]);
                }
            }
        }
        for block in &mut blocks {
            self.finish(tile.batch, block, ld);
        }
    }

    /// The task's blocks, with q and the partial loaded.
    fn blocks<'a>(&self, tile: &RowTile, unit: &Unit, ld: Strides, parts: [&'a mut [f32]; 4]) -> Vec<Block<'a>> {
        let [q, acc, m, l] = parts;
        let ranges = unit
            .heads
            .clone()
            .flat_map(|head| tile.rows.clone().step_by(BLOCK).map(move |r| (head, r..(r + BLOCK).min(tile.rows.end))));
        let memory = q
            .chunks_exact_mut(BLOCK * ld.q)
            .zip(acc.chunks_exact_mut(BLOCK * ld.v))
            .zip(m.chunks_exact_mut(BLOCK).zip(l.chunks_exact_mut(BLOCK)));
        ranges
            .zip(memory)
            .map(|((head, rows), ((q, acc), (m, l)))| {
                let mut block = Block { head, rows, q, acc, m, l };
                self.load(tile, &mut block, ld);
                block
            })
            .collect()
    }

    fn load(&self, tile: &RowTile, block: &mut Block<'_>, ld: Strides) {
        let (at, n) = ([tile.batch, block.rows.start, block.head], block.rows.len());
        if !tile.slices.is_empty() {
            self.q.pack(self.kernels, at, n, block.q, ld.q);
        }
        block.acc.fill(0.0);
        block.m.fill(f32::NEG_INFINITY);
        block.l.fill(0.0);
        if let (false, Some([acc, m, l])) = (self.start, &self.partial) {
            acc.pack(self.kernels, at, n, block.acc, ld.v);
            for r in 0..n {
                let row = [at[0], at[1] + r, at[2]];
                block.m[r] = m.get(row);
                block.l[r] = l.get(row);
            }
        }
    }

    /// Packs K into panels, through `rows`, and V.
    fn pack(&self, batch: usize, kv_head: usize, keys: &Range<usize>, ld: Strides, to: [&mut [f32]; 3]) {
        let [rows, k, v] = to;
        let (d, nr) = (self.plan.spec.head_dim, self.kernels.nr);
        for (from, panel) in keys.clone().step_by(nr).zip(k.chunks_exact_mut(d * nr)) {
            let many = (keys.end - from).min(nr);
            self.k.pack(self.kernels, [batch, from, kv_head], many, rows, ld.q);
            self.kernels.transpose(rows, ld.q, [many, d], panel, nr);
        }
        self.v.pack(self.kernels, [batch, keys.start, kv_head], keys.len(), v, ld.v);
    }

    /// Updates a block with the keys of a tile, a register tile's rows at a time: their logits stay in the first cache.
    fn attend(&self, batch: usize, block: &mut Block<'_>, keys: &Keys<'_>, ld: Strides, to: [&mut [f32]; 3]) {
        let [s, beta, keep] = to;
        let band = Band::new(keys.slice, &block.rows, &keys.rows, keys.rows.start);
        let hull = band.all();
        if hull.is_empty() {
            return;
        }
        let (mr, n, dv) = (self.kernels.mr, block.rows.len(), self.plan.spec.head_dim_v);
        let careful = !band.is_even(&(0..n)) && any_non_finite_rows(keys.v, ld.v, [keys.rows.len(), dv]);
        for first in whole(&band.rows_of(&hull), mr).step_by(mr) {
            let rows = first..(first + mr).min(n);
            let cols = band.hull(&rows);
            if cols.is_empty() {
                continue;
            }
            self.scores(block, keys, first, &cols, s, ld);
            for (r, s) in rows.clone().zip(s.chunks_exact_mut(ld.s)) {
                beta[r - first] = self.softmax(batch, block, keys, r, band.cols_of(r), cols.clone(), s, keep);
            }
            if careful && !band.is_even(&rows) {
                self.values_by_row(block, keys, &band, rows, [s, beta], ld);
            } else {
                self.values(block, keys, first, &cols, [s, beta], ld);
            }
        }
    }

    /// `S = scale Q K^T` of the rows from `first` on, over the register tiles of `cols`.
    fn scores(
        &self,
        block: &Block<'_>,
        keys: &Keys<'_>,
        first: usize,
        cols: &Range<usize>,
        s: &mut [f32],
        ld: Strides,
    ) {
        let (d, nr) = (self.plan.spec.head_dim, self.kernels.nr);
        for p in whole(cols, nr).step_by(nr) {
            self.kernels.tile(Tile {
                k: d,
                a: &block.q[first * ld.q..],
                lda: ld.q,
                order: Order::Rows,
                b: &keys.k[p * d..],
                ldb: nr,
                c: &mut s[p..],
                ldc: ld.s,
                update: Update::Store(self.plan.spec.scale),
            });
        }
    }

    /// Turns the logits of row `r` into probabilities, zero in the rest of `read`, and updates `(m, l)`; the factor on `acc`.
    #[expect(clippy::too_many_arguments, reason = "the state of one row")]
    fn softmax(
        &self,
        batch: usize,
        block: &mut Block<'_>,
        keys: &Keys<'_>,
        r: usize,
        cols: Range<usize>,
        read: Range<usize>,
        s: &mut [f32],
        keep: &mut [f32],
    ) -> f32 {
        if cols.is_empty() {
            s[read].fill(0.0);
            return 1.0;
        }
        let (a, b) = (cols.start / VEC * VEC, cols.end.next_multiple_of(VEC));
        let bias = self.bias(block.head, keys, block.rows.start + r, a);
        if !bias.is_none() {
            self.kernels.bias(&mut s[a..b], &bias);
        }
        s[a..cols.start].fill(f32::NEG_INFINITY);
        s[cols.end..b].fill(f32::NEG_INFINITY);
        let before = block.m[r];
        let m = before.max(self.kernels.max(&s[a..b]));
        let finite = if m == f32::NEG_INFINITY { 0.0 } else { m };
        let sum = self.kernels.exp(&mut s[a..b], finite);
        let beta = if before == m { if m.is_finite() { 1.0 } else { 0.0 } } else { (before - finite).exp() };
        block.l[r] = block.l[r] * beta + sum;
        block.m[r] = m;
        if let Some(dropout) = self.options.dropout {
            let row = drop_row(
                &self.plan.spec,
                dropout,
                batch,
                block.head,
                keys.slice,
                block.rows.start + r,
                keys.rows.start + a,
            );
            self.kernels.philox(&row, &mut keep[a..b]);
            s[a..b].iter_mut().zip(&keep[a..b]).for_each(|(p, k)| *p *= k);
        }
        s[read.start.min(a)..a].fill(0.0);
        s[b..read.end.max(b)].fill(0.0);
        beta
    }

    fn bias(&self, head: usize, keys: &Keys<'_>, row: usize, column: usize) -> Bias {
        let slope = self.options.alibi_slopes.map(|t| t.get([0, 0, self.plan.spec.head_first + head]));
        Bias {
            softcap: self.plan.spec.softcap,
            alibi: slope.map(|slope| alibi(slope, keys.slice, row, keys.rows.start + column)),
        }
    }

    /// `acc = beta acc + P V` of the rows from `first` on.
    fn values(
        &self,
        block: &mut Block<'_>,
        keys: &Keys<'_>,
        first: usize,
        cols: &Range<usize>,
        [s, beta]: [&[f32]; 2],
        ld: Strides,
    ) {
        let nr = self.kernels.nr;
        for p in (0..self.kernels.panels(self.plan.spec.head_dim_v)).step_by(nr) {
            self.kernels.tile(Tile {
                k: cols.len(),
                a: &s[cols.start..],
                lda: ld.s,
                order: Order::Rows,
                b: &keys.v[cols.start * ld.v + p..],
                ldb: ld.v,
                c: &mut block.acc[first * ld.v + p..],
                ldc: ld.v,
                update: Update::Scale(beta),
            });
        }
    }

    /// The same over each row's own columns.
    fn values_by_row(
        &self,
        block: &mut Block<'_>,
        keys: &Keys<'_>,
        band: &Band,
        rows: Range<usize>,
        [s, beta]: [&[f32]; 2],
        ld: Strides,
    ) {
        let dv = self.plan.spec.head_dim_v;
        for (r, (s, beta)) in rows.zip(s.chunks_exact(ld.s).zip(beta)) {
            let acc = &mut block.acc[r * ld.v..][..dv];
            acc.iter_mut().for_each(|x| *x *= beta);
            for c in band.cols_of(r) {
                axpy(acc, s[c], &keys.v[c * ld.v..][..dv]);
            }
        }
    }

    /// Stores the partial, or the results with the sink.
    fn finish(&self, batch: usize, block: &mut Block<'_>, ld: Strides) {
        let sink = self.options.sinks.map(|t| t.get([0, 0, self.plan.spec.head_first + block.head]));
        for (r, row) in block.rows.clone().enumerate() {
            let (at, acc) = ([batch, row, block.head], &mut block.acc[r * ld.v..][..self.plan.spec.head_dim_v]);
            if let Some([out, lse]) = &self.results {
                let (factor, sum) = finished(block.m[r], block.l[r], sink);
                acc.iter_mut().for_each(|x| *x *= factor);
                out.store(at, acc);
                lse.set(at, sum);
            } else if let Some([to, m, l]) = &self.partial {
                to.store(at, acc);
                m.set(at, block.m[r]);
                l.set(at, block.l[r]);
            }
        }
    }
}

/// The factor that turns `acc` into `out`, and lse, of a row with the maximum `m`, the sum `l` and perhaps a sink.
fn finished(m: f32, l: f32, sink: Option<f32>) -> (f32, f32) {
    let top = m.max(sink.unwrap_or(f32::NEG_INFINITY));
    let finite = if top == f32::NEG_INFINITY { 0.0 } else { top };
    let weight = if m == finite { 1.0 } else { (m - finite).exp() };
    // NaN in l must stay, also where the weight of what was seen is 0.
    let sum = l * weight + sink.map_or(0.0, |s| (s - finite).exp());
    if sum == 0.0 { (0.0, f32::NEG_INFINITY) } else { (weight / sum, finite + sum.ln()) }
}

/// Slope, distance and step of the keys from local key row `key` for query row `row`.
pub(super) fn alibi(slope: f32, slice: &Slice, row: usize, key: usize) -> [f32; 3] {
    let [q, k] = positions(slice, row, key);
    [slope, (q - k) as f32, slice.k_step as f32]
}

/// Dropout of query row `row` from local key row `key` on.
pub(super) fn drop_row(
    spec: &longspan_hal::Spec,
    dropout: Dropout,
    batch: usize,
    head: usize,
    slice: &Slice,
    row: usize,
    key: usize,
) -> Row {
    let [q, k] = positions(slice, row, key);
    let counter = [(spec.batch_first + batch) as u32, (spec.head_first + head) as u32, q as u32];
    Row { dropout, counter, keys: [k, slice.k_step] }
}

/// Global positions of a query row and a key row; the key row may lie outside the slice.
fn positions(slice: &Slice, row: usize, key: usize) -> [i64; 2] {
    let (i, j) = (row as i64 - i64::from(slice.q.start), key as i64 - i64::from(slice.k.start));
    [slice.q_pos + slice.q_step * i, slice.k_pos + slice.k_step * j]
}

/// `range` widened to whole multiples of `n`.
pub(super) fn whole(range: &Range<usize>, n: usize) -> Range<usize> {
    range.start / n * n..range.end.next_multiple_of(n)
}

/// Whether a packed matrix has an element that is not finite.
pub(super) fn any_non_finite_rows(x: &[f32], ld: usize, [rows, cols]: [usize; 2]) -> bool {
    x.chunks(ld).take(rows).any(|row| any_non_finite(&row[..cols]))
}

/// `y += a * x`.
pub(super) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
