//! Fused attention, `FlashAttentionScore` and `FlashAttentionScoreGrad`, for what it can: a call a slice, full or a band, and no
//! option but scale and sinks. Everything else is refused by name; there is no silent way back to the basic one.
//!
//! ```text
//! for each batch row, for each few KV heads with their query heads (as many as keep scratch small):
//!     forward:   rows whose keys come from one slice:  one call in the I/O dtype
//!                other rows, and all partials:         a call a slice in f32, merged into (acc, m, l)
//!     backward:  a call a slice, in the I/O dtype if no row and no key occurs in two, otherwise in f32 and summed in slice order
//! ```
//!
//! The kernel writes results in the dtype of its inputs. So in bf16 and f16 a forward that is cut into calls and gradients that
//! accumulate over calls are refused: their sums would be of rounded terms. It takes values no wider than keys: queries and keys
//! are padded with zeros where they are.

mod backward;
mod forward;
mod scratch;
#[cfg(test)]
mod tests;

use std::ops::Range;

use longspan_hal::{DType, Result, Slice, Slices, Spec};

use super::constants::Constants;
use super::plan::{RowTile, Unit, keys_seen, row_tiles, rows_that_see, units};
use super::unsupported;
use crate::ops::Ops;
use scratch::{Scratch, Sizes};

pub(super) use backward::backward;
pub(super) use forward::forward;

const BASIC: &str = "backend ascend (basic attention) computes it";

/// A planned call.
#[derive(Debug)]
pub(super) struct FusedPlan {
    pub spec: Spec,
    /// What each call computes, in order of batch rows.
    parts: Vec<Part>,
    /// Rows in runs, with the parts (by index) that select keys for them.
    runs: Vec<RowTile>,
    /// Heads that are computed together.
    chunks: Vec<Unit>,
    /// Whether no row and no key occurs in two parts.
    exclusive: bool,
}

/// A slice without the rows and keys that nobody sees or is seen by.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Part {
    batch: usize,
    rows: Range<usize>,
    keys: Range<usize>,
    /// `preTokens` and `nextTokens`; none for a full slice.
    band: Option<[i64; 2]>,
}

/// What calls work with.
struct Work<'a> {
    ops: Ops<'a>,
    constants: &'a Constants,
    plan: &'a FusedPlan,
    /// Start of the scratch.
    base: usize,
}

/// Whether fused attention computes `spec`.
pub(super) fn supports(spec: &Spec) -> Result<()> {
    let narrow = spec.dtype != DType::F32;
    let refused = [
        (spec.partial && narrow, "partial results in bf16 and f16, whose outputs are rounded at once,"),
        (spec.accumulate && narrow, "gradients that accumulate in bf16 and f16, which are rounded at once,"),
        (spec.softcap.is_some(), "softcap"),
        (spec.alibi, "ALiBi"),
        (spec.dropout.is_some(), "dropout"),
    ];
    match refused.into_iter().find(|(on, _)| *on) {
        Some((_, what)) => Err(unsupported(format!("{what} in fused attention"), BASIC)),
        None => Ok(()),
    }
}

impl FusedPlan {
    /// Plans `slices` of `spec`.
    pub(super) fn new(spec: &Spec, slices: &Slices) -> Self {
        let parts: Vec<Part> = slices.as_slice().iter().map(Part::new).collect();
        let runs = row_tiles(spec, slices, spec.q_rows.max(1));
        let chunks = units(spec).iter().flat_map(|unit| chunks(spec, unit)).collect();
        let exclusive = runs.iter().all(|r| r.slices.len() <= 1) && are_apart(&parts);
        Self { spec: spec.clone(), parts, runs, chunks, exclusive }
    }

    /// Bytes of scratch.
    pub(super) fn scratch_bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| Scratch::bytes(&self.spec, Sizes::of(&self.spec, chunk))).max().unwrap_or(0)
    }
}

/// Scratch that is better not exceeded.
const LIMIT: usize = 256 << 20;

/// `unit` in pieces of as many KV heads as keep the scratch small, at least one.
fn chunks(spec: &Spec, unit: &Unit) -> Vec<Unit> {
    let each = unit.heads.len() / unit.kv.len().max(1);
    let of = |kv: Range<usize>| {
        let first = unit.heads.start + (kv.start - unit.kv.start) * each;
        Unit { heads: first..first + kv.len() * each, kv }
    };
    let start = unit.kv.start;
    let fits = |n: &usize| Scratch::bytes(spec, Sizes::of(spec, &of(start..start + n))) <= LIMIT;
    let step = (1..=unit.kv.len()).rev().find(fits).unwrap_or(1);
    unit.kv.clone().step_by(step).map(|from| of(from..(from + step).min(unit.kv.end))).collect()
}

/// Whether no key occurs in two parts.
fn are_apart(parts: &[Part]) -> bool {
    let mut keys: Vec<_> =
        parts.iter().filter(|p| !p.keys.is_empty()).map(|p| (p.batch, p.keys.start, p.keys.end)).collect();
    keys.sort_unstable();
    keys.windows(2).all(|w| w[0].0 < w[1].0 || w[0].2 <= w[1].1)
}

impl Part {
    fn new(s: &Slice) -> Self {
        let rows = rows_that_see(s);
        let keys = keys_seen(s, &rows);
        let band = (!s.is_full()).then(|| tokens(s, &rows, &keys));
        Self { batch: s.batch as usize, rows, keys, band }
    }
}

/// The band of a slice's rows and keys as `preTokens` and `nextTokens`, which count from the lower right corner.
fn tokens(s: &Slice, rows: &Range<usize>, keys: &Range<usize>) -> [i64; 2] {
    let (i, j) = (rows.start as i64 - i64::from(s.q.start), keys.start as i64 - i64::from(s.k.start));
    let corner = keys.len() as i64 - rows.len() as i64;
    let far = i64::from(i32::MAX);
    let [lo, hi] = [s.lo, s.hi].map(|d| d.saturating_add(i - j - corner));
    [lo.saturating_neg().clamp(-far, far), hi.clamp(-far, far)]
}
