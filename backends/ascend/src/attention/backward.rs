//! The backward (Dao, "FlashAttention-2", 2023, algorithm 2), in two passes that both compute the probabilities again, so that
//! no gradient lies in scratch as a whole and every sum has a fixed order.
//!
//! ```text
//! P  = exp(S - lse);  dP = keep / (1 - p) dO V^T;  dS = P (dP - delta) (1 - tanh^2);  both 0 outside the band
//! pass 1, for each tile of rows:   dQ = scale * sum over its keys of dS K
//! pass 2, for each tile of keys:   dK = sum over its rows of dS^T (scale Q);   dV = sum of (keep / (1 - p) P)^T dO
//! ```

use std::ops::Range;

use longspan_hal::{Backward, Gradient, Result, Store};

use super::place;
use super::plan::{BasicPlan, KeyTile, RowTile, Unit, key_pieces};
use super::tile::{Tile, Work, part};
use crate::AscendDevice;
use crate::tensor::Tensor;

/// Queues a backward call.
pub(super) fn backward(work: &Work<'_>, plan: &BasicPlan, args: &Backward<'_, AscendDevice>) -> Result<()> {
    // Heads that no query head uses still have gradients to be written.
    let used = plan.units.first().map_or(0, |u| u.kv.start)..plan.units.last().map_or(0, |u| u.kv.end);
    for gradient in [&args.dk, &args.dv] {
        for batch in 0..plan.spec.batch {
            for heads in [0..used.start, used.end..plan.spec.kv_heads] {
                work.clear(gradient, batch, &heads, &(0..plan.spec.k_rows))?;
            }
        }
    }
    for unit in &plan.units {
        work.load_extras(unit, &args.extras)?;
        plan.rows.iter().try_for_each(|tile| work.queries(plan, unit, tile, args))?;
        plan.keys.iter().try_for_each(|tile| work.keys(plan, unit, tile, args))?;
    }
    Ok(())
}

impl Work<'_> {
    /// Pass 1 for a tile of rows.
    fn queries(&self, plan: &BasicPlan, unit: &Unit, tile: &RowTile, args: &Backward<'_, AscendDevice>) -> Result<()> {
        if tile.slices.is_empty() {
            return self.clear(&args.dq, tile.batch, &unit.heads, &tile.rows);
        }
        let (heads, m, d) = (unit.heads.len(), tile.rows.len(), self.spec.head_dim);
        let dq = self.slots.grad.of(&[heads, m, d]);
        self.ops.fill(&dq, 0.0f32)?;
        self.load_rows(tile.batch, unit, &tile.rows, args)?;
        for slice in &plan.slices.as_slice()[tile.slices.clone()] {
            for keys in key_pieces(slice, &tile.rows, plan.tile) {
                self.load_kv(place(&args.k), place(&args.v), tile.batch, unit, &keys)?;
                let tile = Tile { unit, slice, rows: tile.rows.clone(), keys };
                let ([kv, rows], n) = (tile.batched(), tile.keys.len());
                let ds = self.derivative(&tile, false)?.reshaped(&[kv, rows, n]);
                let product = self.slots.product.of(&[kv, rows, d]);
                self.ops.matmul(&ds, &self.slots.k.of(&[kv, n, d]), &product)?;
                self.ops.add(&dq, &product.reshaped(&[heads, m, d]), &dq)?;
            }
        }
        self.ops.scale(&dq, self.spec.scale, &dq)?;
        self.store(&args.dq, tile.batch, &unit.heads, &tile.rows, &dq)
    }

    /// Pass 2 for a tile of keys.
    fn keys(&self, plan: &BasicPlan, unit: &Unit, tile: &KeyTile, args: &Backward<'_, AscendDevice>) -> Result<()> {
        if tile.pairs.is_empty() {
            self.clear(&args.dk, tile.batch, &unit.kv, &tile.keys)?;
            return self.clear(&args.dv, tile.batch, &unit.kv, &tile.keys);
        }
        let (d, dv, all) = (self.spec.head_dim, self.spec.head_dim_v, tile.keys.len());
        let dk = self.slots.grad.of(&[unit.kv.len(), all, d]);
        let dv_sum = self.slots.grad_v.of(&[unit.kv.len(), all, dv]);
        self.ops.fill(&dk, 0.0f32)?;
        self.ops.fill(&dv_sum, 0.0f32)?;
        for pair in &tile.pairs {
            let slice = &plan.slices.as_slice()[pair.slice];
            let at = pair.keys.start - tile.keys.start..pair.keys.end - tile.keys.start;
            self.load_rows(tile.batch, unit, &pair.rows, args)?;
            self.load_kv(place(&args.k), place(&args.v), tile.batch, unit, &pair.keys)?;
            let part = Tile { unit, slice, rows: pair.rows.clone(), keys: pair.keys.clone() };
            let ([kv, rows], n) = (part.batched(), part.keys.len());
            let ds = self.derivative(&part, true)?.reshaped(&[kv, rows, n]);
            self.add_product(&ds, &self.slots.q.of(&[kv, rows, d]), &dk.narrow(1, at.clone()))?;
            let p = self.slots.s[0].of(&[kv, rows, n]);
            self.add_product(&p, &self.slots.wide.of(&[kv, rows, dv]), &dv_sum.narrow(1, at))?;
        }
        self.store(&args.dk, tile.batch, &unit.kv, &tile.keys, &dk)?;
        self.store(&args.dv, tile.batch, &unit.kv, &tile.keys, &dv_sum)
    }

    /// `to += a^T b`.
    fn add_product(&self, a: &Tensor, b: &Tensor, to: &Tensor) -> Result<()> {
        let dims: Vec<usize> = to.dims.iter().map(|&d| d as usize).collect();
        let product = self.slots.product.of(&dims);
        self.ops.matmul(&a.transposed(), b, &product)?;
        self.ops.add(to, &product, to)
    }

    /// Queries, gradients of outputs, log-sums and deltas of rows.
    fn load_rows(
        &self,
        batch: usize,
        unit: &Unit,
        rows: &Range<usize>,
        args: &Backward<'_, AscendDevice>,
    ) -> Result<()> {
        let (heads, m) = (unit.heads.len(), rows.len());
        self.load_q(place(&args.q), batch, unit, rows)?;
        let dout = self.slots.wide.of(&[heads, m, self.spec.head_dim_v]);
        self.ops.copy(&part(place(&args.dout), batch, &unit.heads, rows), &dout)?;
        for (view, slot) in [(&args.lse, self.slots.row[0]), (&args.delta, self.slots.row[1])] {
            self.ops.copy(&part(place(view), batch, &unit.heads, rows), &slot.of(&[heads, m, 1]))?;
        }
        Ok(())
    }

    /// `dS` in `s[2]`; `P`, with dropout if `keep`, in `s[0]`.
    fn derivative(&self, tile: &Tile<'_>, keep: bool) -> Result<Tensor> {
        let ([heads, m, n], ops) = (tile.logits(), &self.ops);
        self.scores(tile)?;
        let [p, t, ds] = self.slots.s.map(|slot| slot.of(&[heads, m, n]));
        let row = |i: usize| self.slots.row[i].of(&[heads, m, 1]);
        ops.maximum(&row(0), &self.constants.lowest(), &row(2))?;
        ops.sub(&p, &row(2), 1.0, &p)?;
        ops.exp(&p, &p)?;
        let ([kv, rows], dv) = (tile.batched(), self.spec.head_dim_v);
        let (dout, v) = (self.slots.wide.of(&[kv, rows, dv]), self.slots.v.of(&[kv, n, dv]));
        ops.matmul(&dout, &v.transposed(), &ds.reshaped(&[kv, rows, n]))?;
        let dropped = if self.spec.dropout.is_some() { Some(self.dropped(tile)?) } else { None };
        if let Some(dropped) = &dropped {
            self.drop(&ds, dropped)?;
        }
        ops.sub(&ds, &row(1), 1.0, &ds)?;
        ops.mul(&ds, &p, &ds)?;
        if self.spec.softcap.is_some() {
            // 1 - t^2 = -(t^2 - 1)
            ops.mul(&t, &t, &t)?;
            ops.add_number(&t, -1.0f32, 1.0, &t)?;
            ops.mul(&ds, &t, &ds)?;
            ops.scale(&ds, -1.0, &ds)?;
        }
        self.mask(tile, &ds, 0.0)?;
        if let Some(dropped) = dropped.filter(|_| keep) {
            self.drop(&p, &dropped)?;
        }
        Ok(ds)
    }

    /// Stores a gradient of rows or keys.
    fn store(
        &self,
        to: &Gradient<'_, AscendDevice>,
        batch: usize,
        heads: &Range<usize>,
        rows: &Range<usize>,
        from: &Tensor,
    ) -> Result<()> {
        let into = part(place(&to.into.read()), batch, heads, rows);
        match to.store {
            Store::Add => self.ops.add(&into, from, &into),
            Store::Write => self.ops.copy(from, &into),
        }
    }

    /// Rows or keys that nothing contributes to.
    fn clear(
        &self,
        to: &Gradient<'_, AscendDevice>,
        batch: usize,
        heads: &Range<usize>,
        rows: &Range<usize>,
    ) -> Result<()> {
        match to.store {
            Store::Add => Ok(()),
            Store::Write => self.ops.fill(&part(place(&to.into.read()), batch, heads, rows), 0.0f32),
        }
    }
}
