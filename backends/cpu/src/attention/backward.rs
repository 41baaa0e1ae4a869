//! The backward in one pass over tiles of keys (Dao, "FlashAttention-2", 2023, algorithm 2), without races and in a fixed order.
//!
//! ```text
//! for each task (key tile x batch row x KV head):                tasks in parallel, tiles ascending
//!     pack K, K^T, V^T; dk = dv = 0
//!     for each block of rows that sees the tile, for each query head of the KV head:
//!         pack q, dout; dq' = 0
//!         for each slice of both:
//!             S = scale Q K^T;  dP = dout V^T                    only register tiles that the band crosses
//!             per row:  P = exp(bias(S) - lse);  S = keep P;  dP = scale P (keep dP - delta) (1 - (x0 / c)^2)
//!             dv += S^T dout;  dk += dP^T q;  dq' += dP K
//!         wait until the tile before has passed this block;  dq += dq';  say that this tile has passed it
//!     store or add dk, dv
//! ```
//!
//! Every row of dk and dv belongs to one task. The rows of dq get their terms in the order of the tiles, whatever the number of
//! threads: a tile waits only for the tile before it, which was started earlier, and computes its term before it waits.
//!
//! Departures: a row with lse = -inf sees nothing. Where an operand has elements that are not finite and rows see different
//! keys, the three updates run pair by pair, since `0 * NaN` is not nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use longspan_hal::{Slice, Store};

use super::forward::{Options, alibi, any_non_finite_rows, axpy, drop_row, whole};
use super::pack::{Scratch, Tensor, each, padded, panels};
use super::plan::{Band, Plan, heads_of};
use super::simd::{Bias, Kernels, Order, RowGrad, Tile, Update, VEC};
use super::{KEY_TILE, QUERY_BLOCK};

/// One backward call on memory.
#[derive(Debug)]
pub(super) struct Backward {
    pub plan: Arc<Plan>,
    pub kernels: &'static Kernels,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub dout: Tensor,
    pub lse: Tensor,
    pub delta: Tensor,
    pub options: Options,
    pub dq: (Tensor, Store),
    pub dk: (Tensor, Store),
    pub dv: (Tensor, Store),
    /// f32 `[batch, q_rows, heads, head_dim]` to sum dq in where it is stored in a narrower type.
    pub dq_sum: Option<Tensor>,
}

/// Distances of the rows of packed matrices.
#[derive(Clone, Copy)]
struct Strides {
    /// Rows of head_dim.
    d: usize,
    /// Rows of head_dim_v.
    v: usize,
    /// Rows of keys.
    s: usize,
}

/// A tile of keys with its gradients.
struct Keys<'a> {
    batch: usize,
    /// Local key rows of the tile.
    rows: Range<usize>,
    /// K, row-major.
    k: &'a mut [f32],
    /// K and V in panels.
    kt: &'a mut [f32],
    vt: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    finite: bool,
}

/// Rows of one query head.
struct Block<'a> {
    head: usize,
    rows: Range<usize>,
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    finite: bool,
}

/// Scratch of a block against a tile.
struct Work<'a> {
    s: &'a mut [f32],
    dp: &'a mut [f32],
    keep: &'a mut [f32],
}

impl Backward {
    /// Computes the call.
    pub fn run(&self) {
        let spec = &self.plan.spec;
        self.clear_dq();
        let chains = spec.batch * spec.kv_heads;
        let tiles = self.plan.key_tiles();
        // How far each tile has passed its chain's blocks; `Turn` moves it to the end.
        let passed: Vec<AtomicUsize> = (0..tiles * chains).map(|_| AtomicUsize::new(0)).collect();
        each(tiles * chains, |i, scratch| {
            let turn = Turn { before: i.checked_sub(chains).map(|b| &passed[b]), mine: &passed[i] };
            let chain = i % chains;
            self.task(i / chains, chain / spec.kv_heads, chain % spec.kv_heads, &turn, scratch);
        });
        self.round_dq();
    }

    /// Where dq is summed.
    fn dq(&self) -> Tensor {
        self.dq_sum.unwrap_or(self.dq.0)
    }

    fn clear_dq(&self) {
        if self.dq.1 == Store::Write {
            let (to, [batch, rows, heads, dim]) = (self.dq(), self.dq.0.extent());
            let zero = vec![0.0; dim];
            each(batch * rows.div_ceil(QUERY_BLOCK), |i, _| {
                let (b, from) = (i % batch, i / batch * QUERY_BLOCK);
                for row in from..(from + QUERY_BLOCK).min(rows) {
                    (0..heads).for_each(|h| to.store([b, row, h], &zero));
                }
            });
        }
    }

    fn round_dq(&self) {
        if let Some(sum) = self.dq_sum {
            let [batch, rows, heads, dim] = sum.extent();
            each(batch * rows.div_ceil(QUERY_BLOCK), |i, scratch| {
                let [line] = scratch.parts([dim]);
                let (b, from) = (i % batch, i / batch * QUERY_BLOCK);
                for row in from..(from + QUERY_BLOCK).min(rows) {
                    for h in 0..heads {
                        sum.load(self.kernels, [b, row, h], line);
                        self.dq.0.store([b, row, h], line);
                    }
                }
            });
        }
    }

    fn task(&self, tile: usize, batch: usize, kv_head: usize, turn: &Turn<'_>, scratch: &mut Scratch) {
        let (spec, k) = (&self.plan.spec, self.kernels);
        let ld = Strides { d: padded(k, spec.head_dim), v: padded(k, spec.head_dim_v), s: padded(k, KEY_TILE) };
        let (wide, keys) = (k.panels(KEY_TILE), KEY_TILE);
        let [kr, kt, vt, vr, dk, dv, q, dout, dq, s, dp, lse, delta, keep] = scratch.parts([
            keys * ld.d,
            wide * spec.head_dim,
            wide * spec.head_dim_v,
            keys * ld.v,
            keys * ld.d,
            keys * ld.v,
            QUERY_BLOCK * ld.d,
            QUERY_BLOCK * ld.v,
            QUERY_BLOCK * ld.d,
            QUERY_BLOCK * ld.s,
            QUERY_BLOCK * ld.s,
            QUERY_BLOCK,
            QUERY_BLOCK,
            ld.s,
        ]);
        let rows = tile * KEY_TILE..((tile + 1) * KEY_TILE).min(spec.k_rows);
        let mut keys = Keys { batch, rows, k: kr, kt, vt, dk, dv, finite: true };
        let slices = self.plan.slices_of_tile(batch, tile);
        self.pack(&mut keys, kv_head, slices, vr, ld);
        let mut block = Block { head: 0, rows: 0..0, q, dout, dq, lse, delta, finite: true };
        let mut work = Work { s, dp, keep };
        for stretch in slices.chunk_by(|a, b| self.slice(*a).q == self.slice(*b).q) {
            self.stretch(&mut keys, kv_head, stretch, &mut block, &mut work, turn, ld);
        }
        self.write(&keys, kv_head, !slices.is_empty(), ld);
        turn.end();
    }

    fn slice(&self, i: u32) -> &Slice {
        &self.plan.slices[i as usize]
    }

    /// Packs the keys that slices select (their hull), and clears the gradients. `rows` is scratch.
    fn pack(&self, keys: &mut Keys<'_>, kv_head: usize, slices: &[u32], rows: &mut [f32], ld: Strides) {
        let spec = &self.plan.spec;
        keys.dk.fill(0.0);
        keys.dv.fill(0.0);
        let from = slices.iter().map(|&i| self.slice(i).k.start as usize).min().unwrap_or(0).max(keys.rows.start);
        let to = slices.iter().map(|&i| self.slice(i).k.end as usize).max().unwrap_or(0).min(keys.rows.end);
        if from >= to {
            return;
        }
        let (skip, n) = (from - keys.rows.start, to - from);
        let at = [keys.batch, from, kv_head];
        keys.k[..skip * ld.d].fill(0.0);
        self.k.pack(self.kernels, at, n, &mut keys.k[skip * ld.d..], ld.d);
        panels(self.kernels, keys.k, ld.d, [skip + n, spec.head_dim], keys.kt);
        rows[..skip * ld.v].fill(0.0);
        self.v.pack(self.kernels, at, n, &mut rows[skip * ld.v..], ld.v);
        panels(self.kernels, rows, ld.v, [skip + n, spec.head_dim_v], keys.vt);
        keys.finite = !any_non_finite_rows(keys.k, ld.d, [skip + n, spec.head_dim]);
    }

    /// All blocks of the stretch whose slices are `slices`.
    #[expect(clippy::too_many_arguments, reason = "the state of one task")]
    fn stretch(
        &self,
        keys: &mut Keys<'_>,
        kv_head: usize,
        slices: &[u32],
        block: &mut Block<'_>,
        work: &mut Work<'_>,
        turn: &Turn<'_>,
        ld: Strides,
    ) {
        let q = self.slice(slices[0]).q.start as usize..self.slice(slices[0]).q.end as usize;
        let all = |i: &u32| Band::new(self.slice(*i), &q, &keys.rows, keys.rows.start);
        let seen = slices.iter().map(|i| all(i).rows_of(&(0..KEY_TILE))).filter(|r| !r.is_empty());
        let (first, last) = seen.fold((usize::MAX, 0), |(a, b), r| (a.min(r.start), b.max(r.end)));
        let heads = heads_of(&self.plan.spec, kv_head);
        for from in (first.min(last) / QUERY_BLOCK * QUERY_BLOCK..last).step_by(QUERY_BLOCK) {
            let rows = q.start + from..(q.start + from + QUERY_BLOCK).min(q.end);
            for head in heads.clone() {
                (block.head, block.rows) = (head, rows.clone());
                self.load(keys.batch, block, ld);
                for &i in slices {
                    self.update(keys, self.slice(i), block, work, ld);
                }
                let place = rows.start * heads.len() + head - heads.start;
                turn.wait(place);
                for (r, row) in rows.clone().enumerate() {
                    self.dq().add(self.kernels, [keys.batch, row, head], &block.dq[r * ld.d..]);
                }
                turn.pass(place);
            }
        }
    }

    fn load(&self, batch: usize, block: &mut Block<'_>, ld: Strides) {
        let (spec, n) = (&self.plan.spec, block.rows.len());
        let at = [batch, block.rows.start, block.head];
        self.q.pack(self.kernels, at, n, block.q, ld.d);
        self.dout.pack(self.kernels, at, n, block.dout, ld.v);
        block.finite = !any_non_finite_rows(block.q, ld.d, [n, spec.head_dim])
            && !any_non_finite_rows(block.dout, ld.v, [n, spec.head_dim_v]);
        for r in 0..n {
            block.lse[r] = self.lse.get([at[0], at[1] + r, at[2]]);
            block.delta[r] = self.delta.get([at[0], at[1] + r, at[2]]);
        }
        block.dq.fill(0.0);
    }

    /// Adds what one slice contributes between a block and the tile.
    fn update(&self, keys: &mut Keys<'_>, slice: &Slice, block: &mut Block<'_>, work: &mut Work<'_>, ld: Strides) {
        let band = Band::new(slice, &block.rows, &keys.rows, keys.rows.start);
        let hull = band.all();
        if hull.is_empty() {
            return;
        }
        let spec = &self.plan.spec;
        self.products([block.q, keys.kt, work.s], [spec.head_dim, ld.d, ld.s], spec.scale, &band, &hull);
        self.products([block.dout, keys.vt, work.dp], [spec.head_dim_v, ld.v, ld.s], 1.0, &band, &hull);
        for r in 0..block.rows.len() {
            self.row(keys, slice, block, r, &band, work, ld);
        }
        if (keys.finite && block.finite) || self.is_whole(keys, block, &band, &hull) {
            self.keys_update([work.s, block.dout, keys.dv], [spec.head_dim_v, ld.v, ld.s], &band, &hull);
            self.keys_update([work.dp, block.q, keys.dk], [spec.head_dim, ld.d, ld.s], &band, &hull);
            self.rows_update([work.dp, keys.k, block.dq], [spec.head_dim, ld.d, ld.s], &band, &hull);
        } else {
            self.pair_by_pair(keys, block, work, &band, ld);
        }
    }

    /// Whether register tiles hold selected pairs only, so that a product with 0 never stands for "not selected".
    fn is_whole(&self, keys: &Keys<'_>, block: &Block<'_>, band: &Band, hull: &Range<usize>) -> bool {
        let (mr, n) = (self.kernels.mr, block.rows.len());
        let ends = hull.start.is_multiple_of(mr) && (hull.end.is_multiple_of(mr) || hull.end == keys.rows.len());
        ends && band.is_even(&(0..n)) && !block.lse[..n].contains(&f32::NEG_INFINITY)
    }

    /// `c = alpha a b` over the register tiles that the band crosses; `b` in panels of `k` rows.
    fn products(
        &self,
        [a, b, c]: [&mut [f32]; 3],
        [k, lda, ldc]: [usize; 3],
        alpha: f32,
        band: &Band,
        hull: &Range<usize>,
    ) {
        let (mr, nr) = (self.kernels.mr, self.kernels.nr);
        for p in whole(hull, nr).step_by(nr) {
            for g in whole(&band.rows_of(&(p..p + nr)), mr).step_by(mr) {
                self.kernels.tile(Tile {
                    k,
                    a: &a[g * lda..],
                    lda,
                    order: Order::Rows,
                    b: &b[p * k..],
                    ldb: nr,
                    c: &mut c[g * ldc + p..],
                    ldc,
                    update: Update::Store(alpha),
                });
            }
        }
    }

    /// Turns row `r` of the logits and of dP into (kept) probabilities and gradients, 0 where it sees nothing.
    #[expect(clippy::too_many_arguments, reason = "the state of one row")]
    fn row(
        &self,
        keys: &Keys<'_>,
        slice: &Slice,
        block: &Block<'_>,
        r: usize,
        band: &Band,
        work: &mut Work<'_>,
        ld: Strides,
    ) {
        let (s, dp) = (&mut work.s[r * ld.s..][..ld.s], &mut work.dp[r * ld.s..][..ld.s]);
        let cols = if block.lse[r] == f32::NEG_INFINITY { 0..0 } else { band.cols_of(r) };
        if !cols.is_empty() {
            let (spec, row) = (&self.plan.spec, block.rows.start + r);
            let (a, b) = (cols.start / VEC * VEC, cols.end.next_multiple_of(VEC));
            let slope = self.options.alibi_slopes.map(|t| t.get([0, 0, spec.head_first + block.head]));
            let bias =
                Bias { softcap: spec.softcap, alibi: slope.map(|slope| alibi(slope, slice, row, keys.rows.start + a)) };
            let keep: &[f32] = match self.options.dropout {
                Some(dropout) => {
                    let drops = drop_row(spec, dropout, keys.batch, block.head, slice, row, keys.rows.start + a);
                    self.kernels.philox(&drops, &mut work.keep[..b - a]);
                    &work.keep[..b - a]
                }
                None => &[],
            };
            let grad = RowGrad { bias, lse: block.lse[r], delta: block.delta[r], scale: spec.scale };
            self.kernels.grad(&grad, &mut s[a..b], &mut dp[a..b], keep);
        }
        for x in [s, dp] {
            x[..cols.start].fill(0.0);
            x[cols.end..].fill(0.0);
        }
    }

    /// `c += a^T b`: rows of `c` are keys.
    fn keys_update(&self, [a, b, c]: [&mut [f32]; 3], [dim, ld, lda]: [usize; 3], band: &Band, hull: &Range<usize>) {
        let (mr, nr) = (self.kernels.mr, self.kernels.nr);
        for p in (0..self.kernels.panels(dim)).step_by(nr) {
            for g in whole(hull, mr).step_by(mr) {
                let rows = band.rows_of(&(g..g + mr));
                self.kernels.tile(Tile {
                    k: rows.len(),
                    a: &a[rows.start * lda + g..],
                    lda,
                    order: Order::Cols,
                    b: &b[rows.start * ld + p..],
                    ldb: ld,
                    c: &mut c[g * ld + p..],
                    ldc: ld,
                    update: Update::Add,
                });
            }
        }
    }

    /// `c += a b`: rows of `c` are queries.
    fn rows_update(&self, [a, b, c]: [&mut [f32]; 3], [dim, ld, lda]: [usize; 3], band: &Band, hull: &Range<usize>) {
        let (mr, nr) = (self.kernels.mr, self.kernels.nr);
        let seen = band.rows_of(hull);
        for p in (0..self.kernels.panels(dim)).step_by(nr) {
            for g in whole(&seen, mr).step_by(mr) {
                let cols = band.hull(&(g..(g + mr).min(seen.end)));
                self.kernels.tile(Tile {
                    k: cols.len(),
                    a: &a[g * lda + cols.start..],
                    lda,
                    order: Order::Rows,
                    b: &b[cols.start * ld + p..],
                    ldb: ld,
                    c: &mut c[g * ld + p..],
                    ldc: ld,
                    update: Update::Add,
                });
            }
        }
    }

    /// The three updates over exactly the selected pairs.
    fn pair_by_pair(&self, keys: &mut Keys<'_>, block: &mut Block<'_>, work: &Work<'_>, band: &Band, ld: Strides) {
        let (d, dv) = (self.plan.spec.head_dim, self.plan.spec.head_dim_v);
        for r in (0..block.rows.len()).filter(|&r| block.lse[r] != f32::NEG_INFINITY) {
            for c in band.cols_of(r) {
                let (p, ds) = (work.s[r * ld.s + c], work.dp[r * ld.s + c]);
                axpy(&mut keys.dv[c * ld.v..][..dv], p, &block.dout[r * ld.v..][..dv]);
                axpy(&mut keys.dk[c * ld.d..][..d], ds, &block.q[r * ld.d..][..d]);
                axpy(&mut block.dq[r * ld.d..][..d], ds, &keys.k[c * ld.d..][..d]);
            }
        }
    }

    /// Stores or adds dk and dv of the tile.
    fn write(&self, keys: &Keys<'_>, kv_head: usize, any: bool, ld: Strides) {
        for ((to, store), from, ld) in [(&self.dk, &keys.dk, ld.d), (&self.dv, &keys.dv, ld.v)] {
            for (r, row) in keys.rows.clone().enumerate() {
                let (at, from) = ([keys.batch, row, kv_head], &from[r * ld..]);
                match store {
                    Store::Write => to.store(at, from),
                    Store::Add if any => to.add(self.kernels, at, from),
                    Store::Add => {}
                }
            }
        }
    }
}

/// The order in which the tiles of a chain (batch row and KV head) add to dq.
struct Turn<'a> {
    before: Option<&'a AtomicUsize>,
    mine: &'a AtomicUsize,
}

impl Turn<'_> {
    /// Waits until the tile before has passed `place`.
    fn wait(&self, place: usize) {
        let Some(before) = self.before else { return };
        let mut tries = 0u32;
        while before.load(Ordering::Acquire) <= place {
            tries = tries.saturating_add(1);
            if tries < 64 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Says that this tile, and so every tile before it, has passed `place`.
    fn pass(&self, place: usize) {
        self.mine.store(place + 1, Ordering::Release);
    }

    /// Passes everything.
    fn end(&self) {
        self.wait(usize::MAX - 1);
        self.mine.store(usize::MAX, Ordering::Release);
    }
}

impl Drop for Turn<'_> {
    /// Lets the tiles behind go on if this one panicked; the panic ends the call.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.mine.store(usize::MAX, Ordering::Release);
        }
    }
}
