//! The fused backward, a call a slice.
//!
//! The kernel takes maximum and sum of each row, and `out`, from which it computes `delta = rowsum(dy out)`. Ring attention and
//! gradients of the log-sum need other values: those of the whole row, and `delta - dlse`. Both are what the kernel computes from
//!
//! ```text
//! max := lse,  sum := 1          since exp(x - lse) / 1 is the probability over all keys
//! out := u (delta / a) / |u|^2   with a = max |dy|, u = dy / a: the multiple of dy whose product with dy is delta
//! ```
//!
//! so `out` itself need not travel. Where `delta` is not of the form `dy out` (a gradient of the log-sum alone, dy = 0), no
//! multiple of dy will do: then the first column of dy is raised to `|delta|` times a number below the dtype's rounding.

use longspan_hal::{Backward, DType, Gradient, Result, Store};

use super::super::constants::Constants;
use super::super::place;
use super::super::plan::Unit;
use super::super::space::Slot;
use super::super::tile::part;
use super::scratch::{COPIES, Scratch, Sizes, as_dtype, kernel_dtype};
use super::{FusedPlan, Part, Work};
use crate::AscendDevice;
use crate::ops::{Fused, Ops};
use crate::tensor::Tensor;

/// Queues a backward call.
pub(in super::super) fn backward(
    ops: Ops<'_>,
    constants: &Constants,
    plan: &FusedPlan,
    args: &Backward<'_, AscendDevice>,
    base: usize,
) -> Result<()> {
    let work = Work { ops, constants, plan, base };
    let spec = &plan.spec;
    // Heads that no query head uses still have gradients to be written.
    let used = plan.chunks.first().map_or(0, |c| c.kv.start)..plan.chunks.last().map_or(0, |c| c.kv.end);
    for batch in 0..spec.batch {
        for gradient in [&args.dk, &args.dv].into_iter().filter(|g| g.store == Store::Write) {
            for heads in [0..used.start, used.end..spec.kv_heads] {
                ops.fill(&part(place(&gradient.into.read()), batch, &heads, &(0..spec.k_rows)), 0.0f32)?;
            }
        }
        plan.chunks.iter().try_for_each(|chunk| work.chunk(batch, chunk, args))?;
    }
    Ok(())
}

/// Where one of the gradients of a batch row and some heads is put together: `[heads, rows, dim]`.
struct Sum {
    /// The gradient itself.
    target: Tensor,
    store: Store,
    /// In f32, where several calls contribute.
    own: Option<Tensor>,
}

impl Sum {
    /// Sets it to 0, if it is not added to.
    fn begin(ops: &Ops<'_>, of: &Gradient<'_, AscendDevice>, target: Tensor, own: Option<&Slot>) -> Result<Self> {
        let own = own.map(|slot| slot.of(&[0, 1, 2].map(|i| target.dims[i] as usize)));
        match (&own, of.store) {
            (Some(own), _) => ops.fill(own, 0.0f32)?,
            (None, Store::Write) => ops.fill(&target, 0.0f32)?,
            (None, Store::Add) => {}
        }
        Ok(Self { target, store: of.store, own })
    }

    /// Puts in what a call computed for `rows`.
    fn add(&self, ops: &Ops<'_>, rows: &std::ops::Range<usize>, from: &Tensor) -> Result<()> {
        let into = self.own.as_ref().unwrap_or(&self.target).narrow(1, rows.clone());
        match (&self.own, self.store) {
            (None, Store::Write) => ops.copy(from, &into),
            _ => ops.add(&into, from, &into),
        }
    }

    fn end(self, ops: &Ops<'_>) -> Result<()> {
        match (self.own, self.store) {
            (None, _) => Ok(()),
            (Some(own), Store::Write) => ops.copy(&own, &self.target),
            (Some(own), Store::Add) => ops.add(&self.target, &own, &self.target),
        }
    }
}

impl Work<'_> {
    /// All parts of a batch row.
    fn chunk(&self, batch: usize, chunk: &Unit, args: &Backward<'_, AscendDevice>) -> Result<()> {
        let (spec, ops) = (&self.plan.spec, &self.ops);
        let slot = Scratch::new(self.base, spec, Sizes::of(spec, chunk));
        let of = |i: usize| (!self.plan.exclusive).then_some(&slot.sums[i]);
        let begin = |gradient: &Gradient<'_, AscendDevice>, i: usize| {
            let (heads, rows) = if i == 0 { (&chunk.heads, spec.q_rows) } else { (&chunk.kv, spec.k_rows) };
            Sum::begin(ops, gradient, part(place(&gradient.into.read()), batch, heads, &(0..rows)), of(i))
        };
        let (dq, dk, dv) = (begin(&args.dq, 0)?, begin(&args.dk, 1)?, begin(&args.dv, 2)?);
        for of in self.plan.parts.iter().filter(|p| p.batch == batch && !p.rows.is_empty()) {
            let got = self.gradients(&slot, chunk, of, args)?;
            dq.add(ops, &of.rows, &got[0])?;
            dk.add(ops, &of.keys, &got[1])?;
            dv.add(ops, &of.keys, &got[2])?;
        }
        [dq, dk, dv].into_iter().try_for_each(|sum| sum.end(ops))
    }

    /// One call of the kernel: dq, dk and dv of a part.
    fn gradients(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        of: &Part,
        args: &Backward<'_, AscendDevice>,
    ) -> Result<[Tensor; 3]> {
        let (spec, ops) = (&self.plan.spec, &self.ops);
        let dtype = kernel_dtype(spec, !self.plan.exclusive);
        let (heads, rows) = (chunk.heads.len(), of.rows.len());
        let [q, k, v] = &self.inputs(slot, chunk, of, dtype, [place(&args.q), place(&args.k), place(&args.v)])?;
        let [out, dy] = slot.wide.map(|s| as_dtype(&s, dtype, &[heads, rows, spec.head_dim_v]));
        self.output_of(slot, chunk, of, args, [&out, &dy])?;
        let [max, sum] = slot.stats.map(|s| s.of(&[heads, rows, COPIES]));
        ops.copy(&part(place(&args.lse), of.batch, &chunk.heads, &of.rows), &max)?;
        ops.fill(&sum, 1.0f32)?;
        let like = |slot: &Slot, t: &Tensor| Tensor { address: slot.of(&[0]).address, ..t.clone() };
        let gradients = [like(&slot.q[1], q), like(&slot.k[1], k), like(&slot.v[1], v)];
        let mask = of.band.map(|tokens| (self.constants.compressed(), tokens));
        let call = Fused { q, k, v, mask, scale: spec.scale, max: &max, sum: &sum };
        ops.fused_backward(&call, [&out, &dy], &gradients)?;
        let [dq, dk, dv] = gradients;
        Ok([dq.narrow(2, 0..spec.head_dim), dk.narrow(2, 0..spec.head_dim), dv])
    }

    /// Writes dy, and an output whose product with it is delta.
    fn output_of(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        of: &Part,
        args: &Backward<'_, AscendDevice>,
        [out, dy]: [&Tensor; 2],
    ) -> Result<()> {
        let (ops, heads, rows) = (&self.ops, chunk.heads.len(), of.rows.len());
        let wide = |i: usize| slot.state[i].of(&[heads, rows, self.plan.spec.head_dim_v]);
        let ([u, t], [delta, a, b]) = ([wide(0), wide(1)], slot.row.map(|s| s.of(&[heads, rows, 1])));
        ops.copy(&part(place(&args.dout), of.batch, &chunk.heads, &of.rows), &u)?;
        ops.copy(&part(place(&args.delta), of.batch, &chunk.heads, &of.rows), &delta)?;
        ops.scale(&delta, -1.0, &a)?;
        ops.maximum(&delta, &a, &a)?;
        ops.scale(&a, floor(self.plan.spec.dtype), &a)?;
        let first = u.narrow(2, 0..1);
        ops.add(&first, &a, &first)?;
        // As the kernel will read it.
        ops.copy(&u, dy)?;
        ops.copy(dy, &u)?;
        ops.scale(&u, -1.0, &t)?;
        ops.amax(&u, 2, &a)?;
        ops.amax(&t, 2, &b)?;
        ops.maximum(&a, &b, &a)?;
        ops.maximum(&a, &self.constants.tiny(), &a)?;
        ops.div(&u, &a, &u)?;
        ops.mul(&u, &u, &t)?;
        ops.sum(&t, 2, &b)?;
        ops.maximum(&b, &self.constants.tiny(), &b)?;
        ops.div(&delta, &a, &delta)?;
        ops.div(&delta, &b, &delta)?;
        ops.mul(&u, &delta, &u)?;
        ops.copy(&u, out)
    }
}

/// The part of `|delta|` that dy is raised by: far below rounding, and such that its inverse is a number of the dtype.
fn floor(dtype: DType) -> f32 {
    let bits = if dtype == DType::F16 { 15 } else { 30 };
    0.5f32.powi(bits)
}
