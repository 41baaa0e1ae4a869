//! The fused forward, `FlashAttentionScore`, for what it can: one call a slice that is full or causal from its corner, and no
//! option but scale. Everything else is refused by name; there is no silent way back to the basic one.
//!
//! It writes `out` in the I/O dtype and statistics as eight f32 copies of maximum and sum: `lse = max + ln sum`. So it has no
//! partials: a forward that is cut into calls is refused. The backward is the basic one in f32: the vendor's fused backward
//! wants `out`, and Longspan hands on `delta`, computed before heads travel.

use longspan_hal::{Forward, Result, Slice, Slices, Spec, Stage};

use super::constants::Constants;
use super::plan::{AscendPlan, Unit};
use super::space::Space;
use super::tile::part;
use super::{place, unsupported};
use crate::AscendDevice;
use crate::memory::AscendBuffer;
use crate::ops::{Fused, Ops};
use crate::tensor::{Tensor, of};

use ascendcl_sys::aclDataType;

/// Copies of a statistic.
const COPIES: usize = 8;
const BASIC: &str = "backend ascend (basic attention) computes it";

/// Whether the fused forward computes `spec`.
pub(super) fn supports(spec: &Spec) -> Result<()> {
    let refused = [
        (spec.partial, "partial results: it writes out in the I/O dtype only"),
        (spec.accumulate, "gradients that accumulate"),
        (spec.softcap.is_some(), "softcap"),
        (spec.alibi, "ALiBi"),
        (spec.sinks, "attention sinks"),
        (spec.dropout.is_some(), "dropout"),
        (spec.head_dim_v > spec.head_dim, "values wider than keys"),
        (irregular(spec), "irregular groups of query heads"),
    ];
    match refused.into_iter().find(|(on, _)| *on) {
        Some((_, what)) => Err(unsupported(format!("{what} in fused attention"), BASIC)),
        None => Ok(()),
    }
}

/// Whether KV heads have unequal numbers of local query heads.
fn irregular(spec: &Spec) -> bool {
    spec.heads > 0
        && !(spec.head_first.is_multiple_of(spec.group) && spec.heads.is_multiple_of(spec.group))
        && spec.kv_heads > 1
}

/// Whether every row's keys come from one slice that is full or causal from its upper left corner.
pub(super) fn check_slices(slices: &Slices) -> Result<()> {
    if slices.by_queries().any(|group| group.len() > 1) {
        return Err(unsupported("rows whose keys lie in several slices, in fused attention", BASIC));
    }
    match slices.as_slice().iter().find(|s| !s.is_full() && !is_causal(s)) {
        Some(s) => Err(unsupported(format!("a band from {} to {} in fused attention", s.lo, s.hi), BASIC)),
        None => Ok(()),
    }
}

/// `j <= i`, and nothing below is cut off.
fn is_causal(s: &Slice) -> bool {
    s.hi == 0 && s.lo <= 1 - s.q.len() as i64
}

/// Dense copies of one slice's tensors.
struct Slots {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    max: Tensor,
    sum: Tensor,
    mask: Tensor,
}

fn slots(space: &mut Space, spec: &Spec, [heads, kv, rows, keys]: [usize; 4]) -> Slots {
    let (io, f32, d, dv) = (of(spec.dtype), aclDataType::ACL_FLOAT, spec.head_dim, spec.head_dim_v);
    let mut take = |dims: &[usize], dtype| space.take(dims.iter().product(), dtype).of(dims);
    Slots {
        q: take(&[1, heads, rows, d], io),
        k: take(&[1, kv, keys, d], io),
        v: take(&[1, kv, keys, dv], io),
        out: take(&[1, heads, rows, dv], io),
        max: take(&[1, heads, rows, COPIES], f32),
        sum: take(&[1, heads, rows, COPIES], f32),
        mask: take(&[2048, 2048], aclDataType::ACL_BOOL),
    }
}

/// Bytes of scratch.
pub(super) fn scratch_bytes(plan: &AscendPlan) -> usize {
    let (spec, mut space) = (&plan.spec, Space::new(0));
    slots(&mut space, spec, [spec.heads, spec.kv_heads, spec.q_rows, spec.k_rows]);
    space.end()
}

/// Queues a forward call.
pub(super) fn forward(
    ops: Ops<'_>,
    constants: &Constants,
    plan: &AscendPlan,
    args: &Forward<'_, AscendDevice>,
    scratch: &AscendBuffer,
) -> Result<()> {
    let Stage::All { out, lse } = &args.stage else {
        return Err(unsupported("partial results in fused attention", BASIC));
    };
    let spec = &plan.spec;
    let heads = 0..spec.heads;
    for gap in plan.rows.iter().filter(|r| r.slices.is_empty()) {
        ops.fill(&part(place(&out.read()), gap.batch, &heads, &gap.rows), 0.0f32)?;
        ops.fill(&part(place(&lse.read()), gap.batch, &heads, &gap.rows), f32::NEG_INFINITY)?;
    }
    let unit = Unit { heads, kv: 0..plan.units.last().map_or(0, |u| u.kv.end) };
    for slice in plan.slices.as_slice().iter().filter(|_| spec.heads > 0) {
        one(ops, constants, spec, slice, &unit, args, scratch)?;
    }
    Ok(())
}

fn one(
    ops: Ops<'_>,
    constants: &Constants,
    spec: &Spec,
    slice: &Slice,
    unit: &Unit,
    args: &Forward<'_, AscendDevice>,
    scratch: &AscendBuffer,
) -> Result<()> {
    let Stage::All { out, lse } = &args.stage else { return Ok(()) };
    let (rows, keys) = (slice.q.start as usize..slice.q.end as usize, slice.k.start as usize..slice.k.end as usize);
    let batch = slice.batch as usize;
    let sizes = [unit.heads.len(), unit.kv.len(), rows.len(), keys.len()];
    let t = slots(&mut Space::new(scratch.address()), spec, sizes);
    let flat = |t: &Tensor| t.reshaped(&[t.dims[1] as usize, t.dims[2] as usize, t.dims[3] as usize]);
    ops.copy(&part(place(&args.q), batch, &unit.heads, &rows), &flat(&t.q))?;
    ops.copy(&part(place(&args.k), batch, &unit.kv, &keys), &flat(&t.k))?;
    ops.copy(&part(place(&args.v), batch, &unit.kv, &keys), &flat(&t.v))?;
    let causal = !slice.is_full();
    if causal {
        constants.compressed(ops, &t.mask)?;
    }
    let (q, k, v) = (&t.q, &t.k, &t.v);
    let mask = causal.then_some(&t.mask);
    let call =
        Fused { q, k, v, mask, scale: spec.scale, heads: unit.heads.len(), max: &t.max, sum: &t.sum, out: &t.out };
    ops.fused(&call)?;
    ops.copy(&flat(&t.out), &part(place(&out.read()), batch, &unit.heads, &rows))?;
    // lse = max + ln sum, of the first of the eight copies.
    let (max, sum) = (flat(&t.max), flat(&t.sum));
    ops.log(&sum, &sum)?;
    ops.add(&max, &sum, &max)?;
    ops.copy(&max.narrow(2, 0..1), &part(place(&lse.read()), batch, &unit.heads, &rows))
}
