//! Attention on CPU cores (being built).
mod backward;
mod exp;
mod forward;
mod pack;
mod philox;
mod plan;
mod prepare;
mod simd;

/// Query rows of a block: a multiple of every register tile's rows.
pub(crate) const BLOCK: usize = 96;
/// Blocks of a forward task at most, unless one KV head has more query heads... they share packed keys.
const TASK_BLOCKS: usize = 3;
/// Keys of a packed tile in the forward.
const FORWARD_KEYS: usize = 192;
/// Keys of a tile in the backward.
const KEY_TILE: usize = 96;

#[cfg(test)]
mod tests;
