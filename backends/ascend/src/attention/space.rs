//! Scratch: one address for every intermediate tensor, sized for the largest unit and tile.

use ascendcl_sys::aclDataType;
use longspan_hal::Spec;

use super::plan::Sizes;
use crate::tensor::{Tensor, size};

const ALIGN: usize = 512;

/// Memory for tensors of one type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    address: usize,
    dtype: aclDataType,
}

impl Slot {
    /// A dense tensor in it.
    pub fn of(&self, dims: &[usize]) -> Tensor {
        Tensor::dense(self.address, self.dtype, dims)
    }
}

/// Hands out memory.
#[derive(Debug)]
pub(super) struct Space {
    next: usize,
}

impl Space {
    /// Memory from `base` on.
    pub fn new(base: usize) -> Self {
        Self { next: base }
    }

    /// Memory for `n` elements.
    pub fn take(&mut self, n: usize, dtype: aclDataType) -> Slot {
        let address = self.next;
        self.next = (address + n.max(1) * size(dtype)).next_multiple_of(ALIGN);
        Slot { address, dtype }
    }

    fn real(&mut self, n: usize) -> Slot {
        self.take(n, aclDataType::ACL_FLOAT)
    }

    /// The end so far.
    pub fn end(&self) -> usize {
        self.next
    }
}

/// Every intermediate tensor of forward and backward.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    /// `[heads, rows, head_dim]`.
    pub q: Slot,
    /// `[kv, keys, head_dim]`.
    pub k: Slot,
    /// `[kv, keys, head_dim_v]`.
    pub v: Slot,
    /// `[heads, rows, head_dim_v]`: acc, or dout.
    pub wide: Slot,
    /// Product: `[heads, rows, head_dim or head_dim_v]` or `[kv, keys, ...]`.
    pub product: Slot,
    /// Gradients: dq, or dk.
    pub grad: Slot,
    /// dv.
    pub grad_v: Slot,
    /// `[heads, rows, keys]` each: logits, and two more.
    pub s: [Slot; 3],
    /// `[kv, keys, head_dim_v]`: which values are not finite.
    pub flags: Slot,
    /// `[heads, rows, 1]` each.
    pub row: [Slot; 5],
    /// `[rows, keys]`: distances.
    pub distance: Slot,
    /// `[rows]`.
    pub line: Slot,
    /// `[rows, keys]`.
    pub mask: Slot,
    /// `[heads]` each: slopes, sinks.
    pub head: [Slot; 2],
    /// With dropout: `[heads, rows, keys]` integers.
    pub words: [Slot; 10],
    /// `[rows + keys]` integers each: positions.
    pub positions: [Slot; 3],
    /// Keys of Philox: given, and of the round.
    pub seed: [Slot; 2],
    /// `[heads, rows, keys]`: dropped.
    pub drop: Slot,
    /// `[keys]`.
    pub choice: Slot,
}

impl Slots {
    /// Tensors from `base` on.
    pub fn new(base: usize, spec: &Spec, sizes: Sizes) -> Self {
        Self::lay(&mut Space::new(base), spec, sizes)
    }

    /// Bytes of all of them.
    pub fn bytes(spec: &Spec, sizes: Sizes) -> usize {
        let mut space = Space::new(0);
        Self::lay(&mut space, spec, sizes);
        space.end()
    }

    fn lay(space: &mut Space, spec: &Spec, Sizes { heads, kv, rows, keys }: Sizes) -> Self {
        let (d, dv, logits) = (spec.head_dim, spec.head_dim_v, heads * rows * keys);
        let wider = d.max(dv) * (heads * rows).max(kv * keys);
        let dropped = if spec.dropout.is_some() { logits } else { 0 };
        let int = aclDataType::ACL_INT64;
        Self {
            q: space.real(heads * rows * d),
            k: space.real(kv * keys * d),
            v: space.real(kv * keys * dv),
            wide: space.real(heads * rows * dv),
            product: space.real(wider),
            grad: space.real(wider),
            grad_v: space.real(kv * keys * dv),
            s: std::array::from_fn(|_| space.real(logits)),
            flags: space.take(kv * keys * dv, aclDataType::ACL_BOOL),
            row: std::array::from_fn(|_| space.real(heads * rows)),
            distance: space.real(rows * keys),
            line: space.real(rows),
            mask: space.take(rows * keys, aclDataType::ACL_BOOL),
            head: std::array::from_fn(|_| space.real(heads)),
            words: std::array::from_fn(|_| space.take(dropped, int)),
            positions: std::array::from_fn(|_| space.take(rows + keys, int)),
            seed: std::array::from_fn(|_| space.take(2, int)),
            drop: space.take(dropped, aclDataType::ACL_BOOL),
            choice: space.take(keys, aclDataType::ACL_BOOL),
        }
    }
}
