//! Specializations for AMD's matrix units (`cu/amd_*.cu`): tiles that fit 64 KiB of shared memory and the registers of a wave.
//!
//! MFMA spreads a product of 16 x 16 over 64 lanes (4 values a lane), WMMA over 32 (8 values, and operands twice): so RDNA's
//! waves take fewer rows and columns each. `ci/compile_amd.py` compiles the list of `emit ... every` and fails on a spill.

use longspan_hal::{Result, Spec};

use crate::specialize::{Family, attention_defines, no_tile, padded, transforms};
use crate::{Source, Specialization, Target, View};

/// Lanes of a wave.
const fn lanes(target: Target) -> u32 {
    if matches!(target.family, Family::Rdna) { 32 } else { 64 }
}

/// A head size as tiles have it: RDNA's waves share large heads, in two or four parts.
const fn tiled(size: usize, target: Target) -> u32 {
    let step = match (target.family, size) {
        (Family::Rdna, 97..=128) => 32,
        (Family::Rdna, 129..) => 64,
        _ => 16,
    };
    padded(size, step)
}

/// Bytes of `rows` rows of 16-bit elements: 8 more a row.
const fn tile_bytes(rows: u32, dim: u32) -> u32 {
    rows * (dim + 8) * 2
}

/// Bytes of `rows` rows of 16-bit elements in quads.
const fn quad_bytes(rows: u32, dim: u32) -> u32 {
    rows * dim * 2
}

/// As [`Specialization::forward`].
pub(crate) fn forward(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Specialization> {
    let (d, dv) = (tiled(spec.head_dim, target), tiled(spec.head_dim_v, target));
    // The traveling quads take registers that waves of RDNA don't have for large heads.
    let quads = target.family == Family::Cdna || d.max(dv) <= 64;
    let bytes = |[waves, m_tiles, keys, held]: [u32; 4]| {
        let v = if quads { quad_bytes(keys, dv) } else { tile_bytes(keys, dv) };
        let (q, block) = (tile_bytes(16 * m_tiles * waves, d), tile_bytes(keys, d) + v);
        if held == 1 { q.max(block) } else { q + block }
    };
    // Waves, query tiles a wave, keys of a block, whether Q is held in registers.
    let tiles: &[[u32; 4]] = match (target.family, d.max(dv)) {
        (Family::Rdna, ..=64) if transforms(spec) || spec.dropout.is_some() => &[[8, 1, 32, 1]],
        (Family::Rdna, ..=64) => &[[8, 1, 64, 1]],
        (Family::Rdna, ..=128) => &[[8, 1, 32, 0], [4, 1, 32, 0]],
        (Family::Rdna, _) => &[[4, 1, 16, 0], [2, 1, 16, 0]],
        (_, ..=64) => &[[4, 2, 64, 1]],
        (_, ..=128) => &[[4, 2, 64, 1], [4, 2, 32, 1]],
        _ => &[[4, 1, 32, 1], [4, 1, 16, 1]],
    };
    let tile = tiles.iter().copied().find(|t| target.fits(bytes(*t), 1)).ok_or_else(|| no_tile(backend, spec))?;
    let [waves, m_tiles, keys, held] = tile;
    let mut defines = attention_defines(spec, d, dv, view.aligned);
    defines.extend([
        format!("PARTIAL={}", u32::from(spec.partial)),
        format!("WAVES={waves}"),
        format!("M_TILES={m_tiles}"),
        format!("BLOCK_N={keys}"),
        format!("Q_IN_REGISTERS={held}"),
        format!("V_QUADS={}", u32::from(quads)),
        format!("SHARED_BYTES={}", bytes(tile)),
    ]);
    Ok(Specialization {
        source: Source::AMD_FORWARD,
        entries: &["attention_forward"],
        defines,
        threads: waves * lanes(target),
        shared_bytes: bytes(tile),
        rows: 16 * m_tiles * waves,
        box_rows: 0,
    })
}

/// As [`Specialization::backward`].
pub(crate) fn backward(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Specialization> {
    let (d, dv) = (tiled(spec.head_dim, target), tiled(spec.head_dim_v, target));
    let (dq, held) = (!spec.deterministic, target.family == Family::Cdna);
    let bytes = |[key_waves, _, k_tiles, queries]: [u32; 4]| {
        let keys = 16 * k_tiles * key_waves;
        let pair = |rows| tile_bytes(rows, d) + tile_bytes(rows, dv);
        let others = pair(queries) + if dq { tile_bytes(queries, keys) } else { 0 } + 8 * queries;
        if !held {
            return pair(keys) + others;
        }
        let k = if dq { quad_bytes(keys, d) } else { 0 };
        (k + quad_bytes(queries, d + dv) + others).max(tile_bytes(keys, d.max(dv)))
    };
    // Waves along the keys, waves that share keys, key tiles a wave, queries of a block.
    let tiles: &[[u32; 4]] = match (target.family, d.max(dv)) {
        (Family::Rdna, ..=64) => &[[8, 1, 1, 32]],
        (Family::Rdna, ..=128) => &[[4, 2, 1, 32], [4, 1, 1, 32], [4, 1, 1, 16]],
        (Family::Rdna, _) => &[[2, 4, 1, 16], [2, 2, 1, 16], [2, 1, 1, 16]],
        (_, ..=64) => &[[4, 1, 2, 32]],
        (_, ..=128) if spec.dropout.is_some() => &[[4, 1, 1, 32], [4, 1, 1, 16]],
        (_, 97..=128) if spec.deterministic => &[[4, 1, 1, 32], [4, 1, 1, 16]],
        (_, ..=128) => &[[4, 1, 2, 16], [4, 1, 1, 16]],
        _ => &[[2, 2, 1, 16], [2, 1, 1, 16]],
    };
    let whole = |t: &&[u32; 4]| (d / 16).is_multiple_of(t[1]) && (dv / 16).is_multiple_of(t[1]);
    let tile = tiles.iter().filter(whole).copied().find(|t| target.fits(bytes(*t), 1));
    let tile = tile.ok_or_else(|| no_tile(backend, spec))?;
    let [key_waves, split, k_tiles, queries] = tile;
    let mut defines = attention_defines(spec, d, dv, view.aligned);
    defines.extend([
        format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
        format!("DQ={}", u32::from(dq)),
        format!("KEY_WAVES={key_waves}"),
        format!("SPLIT={split}"),
        format!("K_TILES={k_tiles}"),
        format!("BLOCK_M={queries}"),
        format!("HELD={}", u32::from(held)),
        format!("SHARED_BYTES={}", bytes(tile)),
    ]);
    Ok(Specialization {
        source: Source::AMD_BACKWARD,
        entries: &["attention_backward"],
        defines,
        threads: key_waves * split * lanes(target),
        shared_bytes: bytes(tile),
        rows: 16 * k_tiles * key_waves,
        box_rows: 0,
    })
}

/// As [`Specialization::backward_dq`].
pub(crate) fn backward_dq(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Specialization> {
    let (d, dv) = (tiled(spec.head_dim, target), tiled(spec.head_dim_v, target));
    let held = target.family == Family::Cdna;
    let bytes = |[waves, keys]: [u32; 2]| {
        let pair = |rows| tile_bytes(rows, d) + tile_bytes(rows, dv);
        let (queries, keys) = (pair(16 * waves), pair(keys) + if held { quad_bytes(keys, d) } else { 0 });
        if held { queries.max(keys) } else { queries + keys }
    };
    let tile = [[4, 64], [4, 32], [4, 16], [2, 16]].into_iter().find(|t| target.fits(bytes(*t), 1));
    let tile = tile.ok_or_else(|| no_tile(backend, spec))?;
    let [waves, keys] = tile;
    let mut defines = attention_defines(spec, d, dv, view.aligned);
    defines.extend([
        format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
        format!("WAVES={waves}"),
        format!("BLOCK_N={keys}"),
        format!("HELD={}", u32::from(held)),
        format!("SHARED_BYTES={}", bytes(tile)),
    ]);
    Ok(Specialization {
        source: Source::AMD_BACKWARD_DQ,
        entries: &["attention_backward_dq"],
        defines,
        threads: waves * lanes(target),
        shared_bytes: bytes(tile),
        rows: 16 * waves,
        box_rows: 0,
    })
}
