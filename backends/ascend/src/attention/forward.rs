//! The forward: online softmax over tiles (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao,
//! "FlashAttention-2", 2023, algorithm 1), on partials `(acc, m, l)`.
//!
//! ```text
//! for each unit of heads, for each tile of rows:
//!     (acc, m, l) = (0, -inf, 0) or the given partial
//!     for each slice of the rows, for each tile of its keys:
//!         S = scale Q K^T;  softcap;  ALiBi;  -inf outside the band
//!         m' = max(m, max S);  x = max(m', lowest);  P = exp(S - x);  beta = exp(m - x)
//!         l = beta l + sum P;  P = keep / (1 - p) P;  acc = beta acc + P V (finite.rs);  m = m'
//!     store the partial, or with sinks m' = max(m, sink), l = exp(m - m') l + exp(sink - m'), acc = exp(m - m') acc, and
//!     out = acc / max(l, tiny),  lse = m + ln l
//! ```
//!
//! A row that saw nothing stays `(0, -inf, 0)`: its exponents are of -inf minus the lowest finite number.

use longspan_hal::{Forward, Result, Stage};

use super::place;
use super::plan::{BasicPlan, RowTile, Unit, key_pieces};
use super::tile::{Tile, Work, part};
use crate::AscendDevice;
use crate::tensor::Tensor;

/// Running state of a tile of rows: `acc`, `m`, `l`.
struct State {
    acc: Tensor,
    m: Tensor,
    l: Tensor,
}

/// Queues a forward call.
pub(super) fn forward(work: &Work<'_>, plan: &BasicPlan, args: &Forward<'_, AscendDevice>) -> Result<()> {
    let continues = matches!(args.stage, Stage::Continue(_));
    for unit in &plan.units {
        work.load_extras(unit, &args.extras)?;
        for rows in plan.rows.iter().filter(|r| !(continues && r.slices.is_empty())) {
            work.row_tile(plan, unit, rows, args)?;
        }
    }
    Ok(())
}

impl Work<'_> {
    fn row_tile(&self, plan: &BasicPlan, unit: &Unit, tile: &RowTile, args: &Forward<'_, AscendDevice>) -> Result<()> {
        let (heads, m) = (unit.heads.len(), tile.rows.len());
        let state = State {
            acc: self.slots.wide.of(&[heads, m, self.spec.head_dim_v]),
            m: self.slots.row[0].of(&[heads, m, 1]),
            l: self.slots.row[1].of(&[heads, m, 1]),
        };
        self.begin(unit, tile, &state, args)?;
        if !tile.slices.is_empty() {
            self.load_q(place(&args.q), tile.batch, unit, &tile.rows)?;
        }
        for slice in &plan.slices.as_slice()[tile.slices.clone()] {
            for keys in key_pieces(slice, &tile.rows, plan.tile) {
                self.load_kv(place(&args.k), place(&args.v), tile.batch, unit, &keys)?;
                self.attend(&Tile { unit, slice, rows: tile.rows.clone(), keys }, &state)?;
            }
        }
        self.end(unit, tile, &state, args)
    }

    fn begin(&self, unit: &Unit, tile: &RowTile, state: &State, args: &Forward<'_, AscendDevice>) -> Result<()> {
        match &args.stage {
            Stage::Continue(p) | Stage::Finish { partial: p, .. } => {
                for (view, to) in [(&p.acc, &state.acc), (&p.m, &state.m), (&p.l, &state.l)] {
                    self.ops.copy(&part(place(&view.read()), tile.batch, &unit.heads, &tile.rows), to)?;
                }
                Ok(())
            }
            _ => {
                self.ops.fill(&state.acc, 0.0f32)?;
                self.ops.fill(&state.m, f32::NEG_INFINITY)?;
                self.ops.fill(&state.l, 0.0f32)
            }
        }
    }

    /// Updates the state with the loaded keys.
    fn attend(&self, tile: &Tile<'_>, state: &State) -> Result<()> {
        let ([heads, m, n], ops) = (tile.logits(), &self.ops);
        self.scores(tile)?;
        let s = self.slots.s[0].of(&[heads, m, n]);
        let row = |i: usize| self.slots.row[i].of(&[heads, m, 1]);
        let (new, floor, beta) = (row(2), row(3), row(4));
        ops.amax(&s, 2, &new)?;
        ops.maximum(&state.m, &new, &new)?;
        ops.maximum(&new, &self.constants.lowest(), &floor)?;
        ops.sub(&state.m, &floor, 1.0, &beta)?;
        ops.exp(&beta, &beta)?;
        ops.sub(&s, &floor, 1.0, &s)?;
        ops.exp(&s, &s)?;
        ops.copy(&new, &state.m)?;
        ops.mul(&state.l, &beta, &state.l)?;
        ops.sum(&s, 2, &new)?;
        ops.add(&state.l, &new, &state.l)?;
        if self.spec.dropout.is_some() {
            let dropped = self.dropped(tile)?;
            self.drop(&s, &dropped)?;
        }
        let ([kv, rows], dv) = (tile.batched(), self.spec.head_dim_v);
        let infinities = if tile.is_cut() { Some(self.split_values(tile)?) } else { None };
        let product = self.slots.product.of(&[kv, rows, dv]);
        ops.matmul(&s.reshaped(&[kv, rows, n]), &self.slots.v.of(&[kv, n, dv]), &product)?;
        ops.mul(&state.acc, &beta, &state.acc)?;
        ops.add(&state.acc, &product.reshaped(&[heads, m, dv]), &state.acc)?;
        infinities.map_or(Ok(()), |bad| self.add_infinities(tile, &bad, &state.acc))
    }

    fn end(&self, unit: &Unit, tile: &RowTile, state: &State, args: &Forward<'_, AscendDevice>) -> Result<()> {
        match &args.stage {
            Stage::Continue(p) | Stage::Start(p) => {
                for (from, view) in [(&state.acc, &p.acc), (&state.m, &p.m), (&state.l, &p.l)] {
                    self.ops.copy(from, &part(place(&view.read()), tile.batch, &unit.heads, &tile.rows))?;
                }
                Ok(())
            }
            Stage::All { out, lse } | Stage::Finish { out, lse, .. } => {
                if self.spec.sinks {
                    self.sink(unit, state)?;
                }
                let (ops, row) = (&self.ops, self.slots.row[2].of(&[unit.heads.len(), tile.rows.len(), 1]));
                ops.maximum(&state.l, &self.constants.tiny(), &row)?;
                ops.div(&state.acc, &row, &state.acc)?;
                ops.copy(&state.acc, &part(place(&out.read()), tile.batch, &unit.heads, &tile.rows))?;
                ops.log(&state.l, &row)?;
                ops.add(&state.m, &row, &row)?;
                ops.copy(&row, &part(place(&lse.read()), tile.batch, &unit.heads, &tile.rows))
            }
        }
    }

    /// The sink joins the denominator.
    fn sink(&self, unit: &Unit, state: &State) -> Result<()> {
        let (ops, dims) = (&self.ops, [state.m.dims[0] as usize, state.m.dims[1] as usize, 1]);
        let row = |i: usize| self.slots.row[i].of(&dims);
        let (new, factor, own) = (row(2), row(3), row(4));
        let sink = self.slots.head[1].of(&[unit.heads.len(), 1, 1]);
        ops.maximum(&state.m, &sink, &new)?;
        ops.maximum(&new, &self.constants.lowest(), &new)?;
        ops.sub(&state.m, &new, 1.0, &factor)?;
        ops.exp(&factor, &factor)?;
        ops.sub(&sink, &new, 1.0, &own)?;
        ops.exp(&own, &own)?;
        ops.mul(&state.l, &factor, &state.l)?;
        ops.add(&state.l, &own, &state.l)?;
        ops.mul(&state.acc, &factor, &state.acc)?;
        ops.copy(&new, &state.m)
    }
}
