//! `delta`, gradients of sinks, and sums of f32 terms.
//!
//! ```text
//! delta = rowsum(dout * out) - dlse          dsink[h] = -sum over batch and rows of exp(sink[h] - lse) * delta
//! ```

use std::ops::Range;

use ascendcl_sys::aclDataType;
use longspan_hal::{Accumulate, Prepare, Result, Spec};

use super::place;
use super::space::{Slot, Space};
use super::tile::part;
use crate::AscendDevice;
use crate::copy::Place;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// Elements of one step; what it works in fits what a stream has from its start.
const STEP: usize = 1 << 18;
/// Bytes that [`accumulate`] works in.
pub(super) const SUM_BYTES: usize = STEP * 4;

const F32: aclDataType = aclDataType::ACL_FLOAT;

/// Scratch of [`prepare`]: two wide tensors, three thin ones, two of heads.
struct Slots {
    wide: [Slot; 2],
    row: [Slot; 2],
    head: [Slot; 3],
}

fn rows_of(spec: &Spec) -> usize {
    (STEP / (spec.heads.max(1) * spec.head_dim_v)).clamp(1, spec.q_rows.max(1))
}

fn slots(base: usize, spec: &Spec) -> (Slots, usize) {
    let (mut space, n) = (Space::new(base), spec.heads * rows_of(spec));
    let slots = Slots {
        wide: std::array::from_fn(|_| space.take(n * spec.head_dim_v, F32)),
        row: std::array::from_fn(|_| space.take(n, F32)),
        head: std::array::from_fn(|_| space.take(spec.heads, F32)),
    };
    (slots, space.end())
}

/// Bytes of scratch of [`prepare`].
pub(super) fn scratch_bytes(spec: &Spec) -> usize {
    slots(0, spec).1
}

/// Queues the preparation of a backward.
pub(super) fn prepare(ops: Ops<'_>, spec: &Spec, args: &Prepare<'_, AscendDevice>, scratch: usize) -> Result<()> {
    let (slots, step) = (slots(scratch, spec).0, rows_of(spec));
    let head = |i: usize| slots.head[i].of(&[spec.heads, 1, 1]);
    if let Some((logits, _)) = &args.sinks {
        let own = Tensor::view(logits.buffer(), logits.at()).narrow(2, spec.head_first..spec.head_first + spec.heads);
        let line = Tensor { dims: vec![spec.heads as i64], strides: vec![own.strides[2]], ..own };
        ops.copy(&line, &slots.head[0].of(&[spec.heads]))?;
        ops.fill(&head(1), 0.0f32)?;
    }
    for batch in 0..spec.batch {
        for from in (0..spec.q_rows).step_by(step) {
            rows(ops, spec, args, &slots, batch, from..(from + step).min(spec.q_rows))?;
        }
    }
    if let Some((_, dsinks)) = &args.sinks {
        ops.scale(&head(1), -1.0, &head(1))?;
        let all = Tensor::view(dsinks.buffer(), dsinks.at());
        let line = Tensor { dims: vec![spec.heads as i64], strides: vec![all.strides[2]], ..all };
        ops.copy(&slots.head[1].of(&[spec.heads]), &line)?;
    }
    Ok(())
}

fn rows(
    ops: Ops<'_>,
    spec: &Spec,
    args: &Prepare<'_, AscendDevice>,
    slots: &Slots,
    batch: usize,
    rows: Range<usize>,
) -> Result<()> {
    let (n, heads) = (rows.len(), 0..spec.heads);
    let of = |view: Place<'_>| part(view, batch, &heads, &rows);
    let [out, dout] = slots.wide.map(|s| s.of(&[spec.heads, n, spec.head_dim_v]));
    let [delta, thin] = slots.row.map(|s| s.of(&[spec.heads, n, 1]));
    ops.copy(&of(place(&args.out)), &out)?;
    ops.copy(&of(place(&args.dout)), &dout)?;
    ops.mul(&out, &dout, &out)?;
    ops.sum(&out, 2, &delta)?;
    if let Some(dlse) = &args.dlse {
        ops.copy(&of(place(dlse)), &thin)?;
        ops.sub(&delta, &thin, 1.0, &delta)?;
    }
    ops.copy(&delta, &of(place(&args.delta.read())))?;
    if args.sinks.is_some() {
        let [sink, sum, one] = slots.head.map(|s| s.of(&[spec.heads, 1, 1]));
        ops.copy(&of(place(&args.lse)), &thin)?;
        ops.sub(&sink, &thin, 1.0, &thin)?;
        ops.exp(&thin, &thin)?;
        ops.mul(&thin, &delta, &thin)?;
        ops.sum(&thin, 1, &one)?;
        ops.add(&sum, &one, &sum)?;
    }
    Ok(())
}

/// Queues a sum of terms in list order, rounded once.
pub(super) fn accumulate(ops: Ops<'_>, args: &Accumulate<'_, AscendDevice>, scratch: usize) -> Result<()> {
    let [batches, rows, heads, dim] = args.into.extent();
    let line = (heads * dim).max(1);
    // One row may be longer than a step: then heads are cut too.
    let (row_step, head_step) = ((STEP / line).max(1), (STEP / dim.max(1)).clamp(1, heads.max(1)));
    for batch in 0..batches {
        for row in (0..rows).step_by(row_step) {
            for head in (0..heads).step_by(head_step) {
                let r = row..(row + row_step).min(rows);
                let h = head..(head + head_step).min(heads);
                sum(ops, args, scratch, batch, (h, r))?;
            }
        }
    }
    Ok(())
}

fn sum(
    ops: Ops<'_>,
    args: &Accumulate<'_, AscendDevice>,
    scratch: usize,
    batch: usize,
    (heads, rows): (Range<usize>, Range<usize>),
) -> Result<()> {
    let of = |view: Place<'_>| part(view, batch, &heads, &rows);
    let sum = Tensor::dense(scratch, F32, &[heads.len(), rows.len(), args.into.extent()[3]]);
    for (i, term) in args.terms.iter().enumerate() {
        let term = of(place(term));
        if i == 0 { ops.copy(&term, &sum)? } else { ops.add(&sum, &term, &sum)? }
    }
    ops.copy(&sum, &of(place(&args.into.read())))
}
