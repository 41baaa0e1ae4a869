//! The fused forward.
//!
//! ```text
//! one slice:   out, max, sum = kernel(q, k, v);  lse = max + ln sum
//! several:     (acc, m, l) = (0, -inf, 0) or the given partial
//!              for each: m' = max(m, max);  x = exp(m - m');  y = sum exp(max - m')
//!                        acc = x acc + y out;  l = x l + y;  m = m'
//!              store the partial, or with sinks m' = max(m, sink), l = exp(m - m') l + exp(sink - m'), acc = exp(m - m') acc, and
//!              out = acc / max(l, tiny),  lse = m + ln l
//! ```

use std::ops::Range;

use ascendcl_sys::aclDataType;
use longspan_hal::{Forward, Result, Stage};

use super::super::constants::Constants;
use super::super::place;
use super::super::plan::{RowTile, Unit};
use super::super::tile::part;
use super::scratch::{COPIES, Scratch, Sizes, as_dtype, kernel_dtype, padded};
use super::{FusedPlan, Part, Work};
use crate::AscendDevice;
use crate::copy::Place;
use crate::ops::{Fused, Ops};
use crate::tensor::Tensor;

/// Partials of a run of rows.
struct State {
    acc: Tensor,
    m: Tensor,
    l: Tensor,
}

/// What a call wrote: `[heads, rows, dim]`, and the first of eight copies `[heads, rows, 1]`.
struct Results {
    out: Tensor,
    max: Tensor,
    sum: Tensor,
}

/// Queues a forward call.
pub(in super::super) fn forward(
    ops: Ops<'_>,
    constants: &Constants,
    plan: &FusedPlan,
    args: &Forward<'_, AscendDevice>,
    base: usize,
) -> Result<()> {
    let work = Work { ops, constants, plan, base };
    let continues = matches!(args.stage, Stage::Continue(_));
    let whole = matches!(args.stage, Stage::All { .. });
    for chunk in &plan.chunks {
        for run in plan.runs.iter().filter(|r| !(continues && r.slices.is_empty())) {
            let slot = Scratch::new(base, &plan.spec, Sizes::of(&plan.spec, chunk));
            match &plan.parts[run.slices.clone()] {
                [] if whole && !plan.spec.sinks => work.nothing(chunk, run, args)?,
                [only] if whole => work.one(&slot, chunk, run, only, args)?,
                parts => work.merged(&slot, chunk, run, parts, args)?,
            }
        }
    }
    Ok(())
}

impl Work<'_> {
    /// Rows that see nothing.
    fn nothing(&self, chunk: &Unit, run: &RowTile, args: &Forward<'_, AscendDevice>) -> Result<()> {
        let Stage::All { out, lse } = &args.stage else { return Ok(()) };
        self.ops.fill(&part(place(&out.read()), run.batch, &chunk.heads, &run.rows), 0.0f32)?;
        self.ops.fill(&part(place(&lse.read()), run.batch, &chunk.heads, &run.rows), f32::NEG_INFINITY)
    }

    /// Rows that one slice selects keys for.
    fn one(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        run: &RowTile,
        of: &Part,
        args: &Forward<'_, AscendDevice>,
    ) -> Result<()> {
        let (Stage::All { out, lse }, ops) = (&args.stage, &self.ops) else { return Ok(()) };
        let got = self.call(slot, chunk, of, args, false)?;
        if self.plan.spec.sinks {
            let state = self.state(slot, chunk, run);
            ops.copy(&got.out, &state.acc)?;
            ops.copy(&got.max, &state.m)?;
            ops.copy(&got.sum, &state.l)?;
            ops.mul(&state.acc, &state.l, &state.acc)?;
            return self.end(slot, chunk, run, &state, args);
        }
        ops.copy(&got.out, &part(place(&out.read()), of.batch, &chunk.heads, &of.rows))?;
        ops.log(&got.sum, &got.sum)?;
        ops.add(&got.max, &got.sum, &got.max)?;
        ops.copy(&got.max, &part(place(&lse.read()), of.batch, &chunk.heads, &of.rows))
    }

    /// Rows whose results are put together in f32.
    fn merged(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        run: &RowTile,
        parts: &[Part],
        args: &Forward<'_, AscendDevice>,
    ) -> Result<()> {
        let state = self.state(slot, chunk, run);
        self.begin(chunk, run, &state, args)?;
        // The rows of a slice lie in one run of its group.
        let inside = |p: &&Part| !p.rows.is_empty() && run.rows.start <= p.rows.start && p.rows.end <= run.rows.end;
        for of in parts.iter().filter(inside) {
            let got = self.call(slot, chunk, of, args, true)?;
            self.merge(slot, &state, of.rows.start - run.rows.start..of.rows.end - run.rows.start, &got)?;
        }
        self.end(slot, chunk, run, &state, args)
    }

    fn state(&self, slot: &Scratch, chunk: &Unit, run: &RowTile) -> State {
        let (heads, m) = (chunk.heads.len(), run.rows.len());
        let ([acc, max, sum], dims) = (&slot.state, [heads, m, 1]);
        State { acc: acc.of(&[heads, m, self.plan.spec.head_dim_v]), m: max.of(&dims), l: sum.of(&dims) }
    }

    fn begin(&self, chunk: &Unit, run: &RowTile, state: &State, args: &Forward<'_, AscendDevice>) -> Result<()> {
        if let Stage::Continue(p) | Stage::Finish { partial: p, .. } = &args.stage {
            for (view, to) in [(&p.acc, &state.acc), (&p.m, &state.m), (&p.l, &state.l)] {
                self.ops.copy(&part(place(&view.read()), run.batch, &chunk.heads, &run.rows), to)?;
            }
            return Ok(());
        }
        self.ops.fill(&state.acc, 0.0f32)?;
        self.ops.fill(&state.m, f32::NEG_INFINITY)?;
        self.ops.fill(&state.l, 0.0f32)
    }

    /// Adds a call's results to `rows` of the state.
    fn merge(&self, slot: &Scratch, state: &State, rows: Range<usize>, got: &Results) -> Result<()> {
        let (ops, heads) = (&self.ops, state.m.dims[0] as usize);
        let [acc, m, l] = [&state.acc, &state.m, &state.l].map(|t| t.narrow(1, rows.clone()));
        let [new, x, y] = slot.row.map(|s| s.of(&[heads, rows.len(), 1]));
        ops.maximum(&m, &got.max, &new)?;
        ops.sub(&m, &new, 1.0, &x)?;
        ops.exp(&x, &x)?;
        ops.sub(&got.max, &new, 1.0, &y)?;
        ops.exp(&y, &y)?;
        ops.mul(&y, &got.sum, &y)?;
        ops.mul(&l, &x, &l)?;
        ops.add(&l, &y, &l)?;
        ops.copy(&new, &m)?;
        ops.mul(&acc, &x, &acc)?;
        ops.mul(&got.out, &y, &got.out)?;
        ops.add(&acc, &got.out, &acc)
    }

    fn end(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        run: &RowTile,
        state: &State,
        args: &Forward<'_, AscendDevice>,
    ) -> Result<()> {
        let (ops, to) = (&self.ops, |view: Place<'_>| part(view, run.batch, &chunk.heads, &run.rows));
        match &args.stage {
            Stage::Continue(p) | Stage::Start(p) => {
                for (view, from) in [(&p.acc, &state.acc), (&p.m, &state.m), (&p.l, &state.l)] {
                    ops.copy(from, &to(place(&view.read())))?;
                }
                Ok(())
            }
            Stage::All { out, lse } | Stage::Finish { out, lse, .. } => {
                if let Some(sinks) = &args.extras.sinks {
                    self.sink(slot, place(sinks), chunk, state)?;
                }
                let row = slot.row[0].of(&[chunk.heads.len(), run.rows.len(), 1]);
                ops.maximum(&state.l, &self.constants.tiny(), &row)?;
                ops.div(&state.acc, &row, &state.acc)?;
                ops.copy(&state.acc, &to(place(&out.read())))?;
                ops.log(&state.l, &row)?;
                ops.add(&state.m, &row, &row)?;
                ops.copy(&row, &to(place(&lse.read())))
            }
        }
    }

    /// The sinks join the denominators.
    fn sink(&self, slot: &Scratch, sinks: Place<'_>, chunk: &Unit, state: &State) -> Result<()> {
        let (ops, heads, m) = (&self.ops, chunk.heads.len(), state.m.dims[1] as usize);
        let first = self.plan.spec.head_first + chunk.heads.start;
        let line = Tensor::view(sinks.buffer, sinks.at).narrow(2, first..first + heads);
        let sink = Tensor { dims: vec![heads as i64, 1, 1], strides: vec![line.strides[2], 1, 1], ..line };
        let [new, factor, own] = slot.row.map(|s| s.of(&[heads, m, 1]));
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

    /// One call of the kernel.
    fn call(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        of: &Part,
        args: &Forward<'_, AscendDevice>,
        summed: bool,
    ) -> Result<Results> {
        let spec = &self.plan.spec;
        let (heads, rows) = (chunk.heads.len(), of.rows.len());
        let dtype = kernel_dtype(spec, summed);
        let inputs = self.inputs(slot, chunk, of, dtype, [place(&args.q), place(&args.k), place(&args.v)])?;
        let out = as_dtype(&slot.wide[0], dtype, &[heads, rows, spec.head_dim_v]);
        let [max, sum] = slot.stats.map(|s| s.of(&[heads, rows, COPIES]));
        let [q, k, v] = &inputs;
        let mask = of.band.map(|tokens| (self.constants.compressed(), tokens));
        self.ops.fused(&Fused { q, k, v, mask, scale: spec.scale, max: &max, sum: &sum }, &out)?;
        Ok(Results { out, max: max.narrow(2, 0..1), sum: sum.narrow(2, 0..1) })
    }

    /// Dense q, k and v of a part: `[heads, rows, dim]`, q and k padded to the size of v.
    pub(super) fn inputs(
        &self,
        slot: &Scratch,
        chunk: &Unit,
        of: &Part,
        dtype: aclDataType,
        views: [Place<'_>; 3],
    ) -> Result<[Tensor; 3]> {
        let spec = &self.plan.spec;
        let q = as_dtype(&slot.q[0], dtype, &[chunk.heads.len(), of.rows.len(), padded(spec)]);
        let k = as_dtype(&slot.k[0], dtype, &[chunk.kv.len(), of.keys.len(), padded(spec)]);
        let v = as_dtype(&slot.v[0], dtype, &[chunk.kv.len(), of.keys.len(), spec.head_dim_v]);
        let sides = [(&chunk.heads, &of.rows), (&chunk.kv, &of.keys), (&chunk.kv, &of.keys)];
        for ((view, to), (heads, rows)) in views.into_iter().zip([&q, &k, &v]).zip(sides) {
            let (from, dim) = (part(view, of.batch, heads, rows), view.at.extent()[3]);
            if dim < to.dims[2] as usize {
                self.ops.fill(to, 0.0f32)?;
            }
            self.ops.copy(&from, &to.narrow(2, 0..dim))?;
        }
        Ok([q, k, v])
    }
}
