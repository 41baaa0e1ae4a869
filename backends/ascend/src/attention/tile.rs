//! What forward and backward do alike with a tile: loading, logits, masks, options.

use std::ops::Range;

use longspan_hal::{Extras, Result, Seed, Slice, Spec};

use super::constants::Constants;
use super::plan::Unit;
use super::space::Slots;
use crate::AscendDevice;
use crate::copy::Place;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// Everything that a call works with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'a> {
    pub ops: Ops<'a>,
    pub constants: &'a Constants,
    pub spec: &'a Spec,
    pub slots: Slots,
}

/// Rows and keys of a slice that are computed together.
#[derive(Clone, Debug)]
pub(super) struct Tile<'a> {
    pub unit: &'a Unit,
    pub slice: &'a Slice,
    pub rows: Range<usize>,
    pub keys: Range<usize>,
}

impl Tile<'_> {
    /// `[heads, rows, keys]`.
    pub fn logits(&self) -> [usize; 3] {
        [self.unit.heads.len(), self.rows.len(), self.keys.len()]
    }

    /// `[kv, group * rows]`: how matmuls see heads and rows.
    pub fn batched(&self) -> [usize; 2] {
        [self.unit.kv.len(), self.unit.heads.len() / self.unit.kv.len() * self.rows.len()]
    }

    /// Bounds of `j - i` counted from the tile's first row and key.
    fn band(&self) -> (i64, i64) {
        let (i, j) = self.first();
        (self.slice.lo + i - j, self.slice.hi + i - j)
    }

    /// Whether some row does not see some key.
    pub fn is_cut(&self) -> bool {
        let ([_, m, n], (lo, hi)) = (self.logits(), self.band());
        hi < n as i64 - 1 || lo > 1 - m as i64
    }

    /// First row and key, counted from the slice's.
    fn first(&self) -> (i64, i64) {
        let s = self.slice;
        (self.rows.start as i64 - i64::from(s.q.start), self.keys.start as i64 - i64::from(s.k.start))
    }

    /// Global positions of the first row and key.
    pub fn positions(&self) -> (i64, i64) {
        let ((i, j), s) = (self.first(), self.slice);
        (s.q_pos + i * s.q_step, s.k_pos + j * s.k_step)
    }
}

/// `[heads, rows, dim]` of a batch row of a view.
pub(super) fn part(view: Place<'_>, batch: usize, heads: &Range<usize>, rows: &Range<usize>) -> Tensor {
    Tensor::heads(view.buffer, view.at, batch).narrow(0, heads.clone()).narrow(1, rows.clone())
}

impl Work<'_> {
    /// Loads what options bring for the heads of `unit`.
    pub fn load_extras(&self, unit: &Unit, extras: &Extras<'_, AscendDevice>) -> Result<()> {
        let first = self.spec.head_first + unit.heads.start;
        for (slot, view) in self.slots.head.iter().zip([&extras.alibi_slopes, &extras.sinks]) {
            if let Some(view) = view {
                let all = Tensor::view(view.buffer(), view.at()).narrow(2, first..first + unit.heads.len());
                let n = unit.heads.len();
                let line = Tensor { dims: vec![n as i64], strides: vec![all.strides[2]], ..all };
                self.ops.copy(&line, &slot.of(&[n]))?;
            }
        }
        match &extras.seed {
            Some(Seed::Device(buffer)) => self.load_seed(buffer.address()),
            Some(Seed::Host(seed)) => self.store_seed(*seed),
            None => Ok(()),
        }
    }

    /// Queries scaled: `[heads, rows, head_dim]`.
    pub fn load_q(&self, view: Place<'_>, batch: usize, unit: &Unit, rows: &Range<usize>) -> Result<()> {
        let q = self.slots.q.of(&[unit.heads.len(), rows.len(), self.spec.head_dim]);
        self.ops.copy(&part(view, batch, &unit.heads, rows), &q)?;
        self.ops.scale(&q, self.spec.scale, &q)
    }

    /// Keys and values: `[kv, keys, dim]`.
    pub fn load_kv(&self, k: Place<'_>, v: Place<'_>, batch: usize, unit: &Unit, keys: &Range<usize>) -> Result<()> {
        let dims = |d| [unit.kv.len(), keys.len(), d];
        self.ops.copy(&part(k, batch, &unit.kv, keys), &self.slots.k.of(&dims(self.spec.head_dim)))?;
        self.ops.copy(&part(v, batch, &unit.kv, keys), &self.slots.v.of(&dims(self.spec.head_dim_v)))
    }

    /// Logits of the tile in `s[0]`, masked ones -inf; with softcap, `s[1]` holds the tanh.
    pub fn scores(&self, tile: &Tile<'_>) -> Result<()> {
        let ([kv, rows], n, d) = (tile.batched(), tile.keys.len(), self.spec.head_dim);
        let (q, k) = (self.slots.q.of(&[kv, rows, d]), self.slots.k.of(&[kv, n, d]));
        self.ops.matmul(&q, &k.transposed(), &self.slots.s[0].of(&[kv, rows, n]))?;
        let s = self.slots.s[0].of(&tile.logits());
        if let Some(cap) = self.spec.softcap {
            let t = self.slots.s[1].of(&tile.logits());
            self.ops.scale(&s, 1.0 / cap, &t)?;
            self.ops.tanh(&t, &t)?;
            self.ops.scale(&t, cap, &s)?;
        }
        if self.spec.alibi {
            self.alibi(tile)?;
        }
        self.mask(tile, &s, f32::NEG_INFINITY)
    }

    /// `s -= slope * |qpos - kpos|`.
    fn alibi(&self, tile: &Tile<'_>) -> Result<()> {
        let ([heads, m, n], slice) = (tile.logits(), tile.slice);
        let (q_pos, k_pos) = tile.positions();
        let line = self.slots.line.of(&[m, 1]);
        self.ops.scale(&self.constants.counts(&[m, 1]), slice.q_step as f32, &line)?;
        self.ops.add_number(&line, (q_pos - k_pos) as f32, 1.0, &line)?;
        let distance = self.slots.distance.of(&[m, n]);
        self.ops.sub(&line, &self.constants.counts(&[1, n]), slice.k_step as f32, &distance)?;
        // s[2] is free here: first for the negative, then for the bias.
        let negative = self.slots.s[2].of(&[m, n]);
        self.ops.scale(&distance, -1.0, &negative)?;
        self.ops.maximum(&distance, &negative, &distance)?;
        let (bias, s) = (self.slots.s[2].of(&[heads, m, n]), self.slots.s[0].of(&[heads, m, n]));
        self.ops.mul(&self.slots.head[0].of(&[heads, 1, 1]), &distance.reshaped(&[1, m, n]), &bias)?;
        self.ops.sub(&s, &bias, 1.0, &s)
    }

    /// Writes `value` where the band does not go.
    pub fn mask(&self, tile: &Tile<'_>, to: &Tensor, value: f32) -> Result<()> {
        let ([_, m, n], (lo, hi)) = (tile.logits(), tile.band());
        let mask = self.slots.mask.of(&[1, m, n]);
        let flat = self.slots.mask.of(&[m, n]);
        if hi < n as i64 - 1 {
            self.ops.copy(&self.constants.above(hi, [m, n]), &flat)?;
            self.ops.fill_where(to, &mask, value)?;
        }
        if lo > 1 - m as i64 {
            self.ops.copy(&self.constants.below(lo, [m, n]), &flat)?;
            self.ops.fill_where(to, &mask, value)?;
        }
        Ok(())
    }
}
