//! Attention on CPU cores (being built).
mod exp;
mod philox;
mod simd;

/// Query rows of a block.
pub(crate) const BLOCK: usize = 96;
