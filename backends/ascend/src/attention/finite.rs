//! Values that are not finite, in tiles that a band cuts: a matmul multiplies what is masked by 0, and 0 times NaN is NaN, so such
//! a value would reach rows that do not see it.
//!
//! ```text
//! F = V, 0 where not finite;  B+ = 1 where V is inf or NaN;  B- = 1 where V is -inf or NaN;  M = 1 in the band, 0 outside
//! P V = P F + inf (M B+) - inf (M B-)         with inf 0 = 0: a row gets what it sees, NaN from both terms
//! ```
//!
//! The calls do not depend on the values. Whole tiles, where nothing is masked, need none of it.

use longspan_hal::Result;

use super::tile::{Tile, Work};
use crate::tensor::Tensor;

/// Its square is infinite, and so it is for any count of a tile.
const LARGE: f32 = 1e30;

impl Work<'_> {
    /// Takes what is not finite out of the loaded values; `B+` and `B-`, `[kv, keys, head_dim_v]`.
    pub fn split_values(&self, tile: &Tile<'_>) -> Result<[Tensor; 2]> {
        let (ops, dims) = (&self.ops, [tile.unit.kv.len(), tile.keys.len(), self.spec.head_dim_v]);
        let (v, flags) = (self.slots.v.of(&dims), self.slots.flags.of(&dims));
        // Gradients have no other use in a forward.
        let bad = [self.slots.grad.of(&dims), self.slots.grad_v.of(&dims)];
        ops.scale(&v, -1.0, &bad[1])?;
        for (from, to) in [(&v, &bad[0]), (&bad[1], &bad[1])] {
            // Less than infinity is neither infinity nor NaN.
            ops.below(from, f32::INFINITY, &flags)?;
            ops.copy(&flags, to)?;
        }
        for bad in &bad {
            ops.equals(bad, 0.0, &flags)?;
            ops.fill_where(&v, &flags, 0.0)?;
            ops.copy(&flags, bad)?;
        }
        Ok(bad)
    }

    /// Adds to `acc`, `[heads, rows, head_dim_v]`, what rows see of `bad`.
    pub fn add_infinities(&self, tile: &Tile<'_>, bad: &[Tensor; 2], acc: &Tensor) -> Result<()> {
        let ([heads, m, n], [kv, rows], ops) = (tile.logits(), tile.batched(), &self.ops);
        let (band, dv) = (self.slots.s[2].of(&[heads, m, n]), self.spec.head_dim_v);
        ops.fill(&band, LARGE)?;
        self.mask(tile, &band, 0.0)?;
        for (bad, sign) in bad.iter().zip([1.0, -1.0]) {
            let product = self.slots.product.of(&[kv, rows, dv]);
            ops.matmul(&band.reshaped(&[kv, rows, n]), bad, &product)?;
            ops.scale(&product, sign * LARGE, &product)?;
            ops.add(acc, &product.reshaped(&[heads, m, dv]), acc)?;
        }
        Ok(())
    }
}
