//! Scratch of fused attention: dense copies of what a call reads and writes, and sums.

use ascendcl_sys::aclDataType;
use longspan_hal::{DType, Spec};

use super::super::plan::Unit;
use super::super::space::{Slot, Space};
use crate::tensor::{Tensor, of};

/// Copies of a statistic.
pub(super) const COPIES: usize = 8;

/// Sizes that scratch is made for: local heads, and rows of a whole batch row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    heads: usize,
    kv: usize,
    rows: usize,
    keys: usize,
}

impl Sizes {
    /// Of `chunk`.
    pub fn of(spec: &Spec, chunk: &Unit) -> Self {
        Self { heads: chunk.heads.len(), kv: chunk.kv.len(), rows: spec.q_rows, keys: spec.k_rows }
    }
}

/// Memory for every tensor. A call's inputs and outputs have the I/O dtype or f32: there is room for f32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scratch {
    /// `[heads, rows, dim]`, and dq.
    pub q: [Slot; 2],
    /// `[kv, keys, dim]`, and dk.
    pub k: [Slot; 2],
    /// `[kv, keys, head_dim_v]`, and dv.
    pub v: [Slot; 2],
    /// `[heads, rows, head_dim_v]`: out of the call; its gradient.
    pub wide: [Slot; 2],
    /// `[heads, rows, 8]`: maximum and sum.
    pub stats: [Slot; 2],
    /// `[heads, rows, 1]` in f32.
    pub row: [Slot; 3],
    /// Partials in f32: acc, m, l. Work space of the backward.
    pub state: [Slot; 3],
    /// The sums of dq, dk and dv in f32, over slices.
    pub sums: [Slot; 3],
}

impl Scratch {
    /// Bytes of all of it.
    pub fn bytes(spec: &Spec, sizes: Sizes) -> usize {
        let mut space = Space::new(0);
        Self::lay(&mut space, spec, sizes);
        space.end()
    }

    /// Memory from `base` on.
    pub fn new(base: usize, spec: &Spec, sizes: Sizes) -> Self {
        Self::lay(&mut Space::new(base), spec, sizes)
    }

    fn lay(space: &mut Space, spec: &Spec, Sizes { heads, kv, rows, keys }: Sizes) -> Self {
        let (d, dv) = (padded(spec), spec.head_dim_v);
        let mut real = |n: usize| space.take(n, aclDataType::ACL_FLOAT);
        let [q, k, v] = [heads * rows * d, kv * keys * d, kv * keys * dv];
        let (wide, thin) = (heads * rows * dv, heads * rows);
        Self {
            q: [real(q), real(q)],
            k: [real(k), real(k)],
            v: [real(v), real(v)],
            wide: [real(wide), real(wide)],
            stats: [real(thin * COPIES), real(thin * COPIES)],
            row: std::array::from_fn(|_| real(thin)),
            state: [real(wide), real(wide), real(thin)],
            sums: [real(q), real(k), real(v)],
        }
    }
}

/// The head size of queries and keys in a call: at least that of values.
pub(super) fn padded(spec: &Spec) -> usize {
    spec.head_dim.max(spec.head_dim_v)
}

/// The dtype of a call: that of the tensors, or f32 where results are summed.
pub(super) fn kernel_dtype(spec: &Spec, summed: bool) -> aclDataType {
    of(if summed { DType::F32 } else { spec.dtype })
}

/// A dense tensor of `dtype` in memory that was made for f32.
pub(super) fn as_dtype(slot: &Slot, dtype: aclDataType, dims: &[usize]) -> Tensor {
    Tensor::dense(slot.of(dims).address, dtype, dims)
}
