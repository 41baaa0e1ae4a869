//! Tiles of the FlashAttention-2 class kernels (`cu/sm80_*.cu`): the first of a list, best first, that fits shared memory.

use longspan_hal::Spec;

use crate::specialize::{is_heavy, transforms};
use crate::{Target, View};

/// Bytes of `rows` rows of 16-bit elements in shared memory: `pitch` of `cu/common.cuh`.
const fn tile_bytes(rows: u32, dim: u32) -> u32 {
    let pitch = if matches!(dim, 64 | 128 | 256) { dim } else { dim + 8 };
    rows * pitch * 2
}

pub(crate) struct ForwardTile {
    pub warps: u32,
    pub split: u32,
    pub m_tiles: u32,
    pub keys: u32,
    pub stages: u32,
    pub blocks: u32,
    pub q_in_registers: bool,
}

impl ForwardTile {
    pub fn rows(&self) -> u32 {
        self.warps / self.split * self.m_tiles * 16
    }

    pub fn bytes(&self, d: u32, dv: u32) -> u32 {
        let (control, block) = (160, tile_bytes(self.keys, d) + tile_bytes(self.keys, dv));
        let exchange =
            if self.split > 1 { 4 * self.split * self.rows() + tile_bytes(self.rows(), self.keys) } else { 0 };
        tile_bytes(self.rows(), d) + self.stages * block + control + exchange
    }
}

pub(crate) fn forward_tile(spec: &Spec, d: u32, dv: u32, target: Target) -> Option<ForwardTile> {
    let of = |[warps, split, m_tiles, keys, stages, blocks]: [u32; 6], q_in_registers| ForwardTile {
        warps,
        split,
        m_tiles,
        keys,
        stages,
        blocks,
        q_in_registers,
    };
    let plain = !transforms(spec) && spec.dropout.is_none();
    let tiles: &[[u32; 6]] = match d.max(dv) {
        ..=64 if is_heavy(spec) => &[[4, 1, 1, 32, 2, 2]],
        65..=128 if is_heavy(spec) => &[[8, 1, 1, 32, 2, 1], [4, 1, 1, 32, 1, 1]],
        ..=64 if plain => &[[4, 1, 2, 64, 2, 2], [4, 1, 2, 64, 1, 2]],
        ..=64 => &[[4, 1, 2, 32, 2, 2], [4, 1, 1, 32, 2, 2]],
        65..=128 if plain => &[[4, 1, 2, 64, 2, 2], [4, 1, 2, 32, 2, 2], [4, 1, 2, 32, 2, 1]],
        65..=128 => &[[4, 1, 2, 32, 2, 2], [4, 1, 2, 32, 1, 2], [4, 1, 1, 32, 1, 1]],
        _ if plain => {
            &[[4, 2, 2, 64, 1, 2], [8, 1, 1, 64, 2, 1], [8, 1, 1, 64, 1, 1], [4, 1, 1, 64, 1, 1], [4, 1, 1, 32, 1, 1]]
        }
        _ => &[[8, 1, 1, 32, 2, 1], [8, 1, 1, 32, 1, 1], [4, 1, 1, 32, 1, 1]],
    };
    let q_in_registers = d.max(dv) <= 64 && plain;
    let mut fitting = tiles.iter().map(|t| of(*t, q_in_registers)).filter(|t| dv.is_multiple_of(16 * t.split));
    fitting.find(|t| target.fits(t.bytes(d, dv), t.blocks))
}

#[derive(Clone, Copy)]
pub(crate) struct BackwardTile {
    pub key_warps: u32,
    pub split: u32,
    pub k_tiles: u32,
    pub queries: u32,
    pub chunk: u32,
    pub stages: u32,
    pub blocks: u32,
    pub side_by_side: bool,
    pub lines: bool,
    pub apart: bool,
}

impl BackwardTile {
    pub fn keys(&self) -> u32 {
        self.key_warps * self.k_tiles * 16
    }

    pub fn bytes(&self, d: u32, dv: u32, dq: bool) -> u32 {
        let pair = |rows| tile_bytes(rows, d) + tile_bytes(rows, dv);
        let exchanges = u32::from(dq || self.split > 1) + u32::from(self.split > 1);
        let scores = exchanges * tile_bytes(self.keys(), self.queries);
        let control = 160;
        pair(self.keys()) + self.stages * pair(self.queries) + scores + 8 * self.queries + control
    }

    pub fn warps(&self) -> u32 {
        self.key_warps * self.split
    }

    /// Warps along the queries of dq: what takes the fewest matrix loads. Only tiles without dq have none.
    pub fn dq_warps_m(&self, d: u32) -> Option<u32> {
        let warps = self.warps();
        let fits = |m: &u32| {
            warps.is_multiple_of(*m) && self.queries.is_multiple_of(16 * m) && d.is_multiple_of(16 * (warps / m))
        };
        let loads = |m: &u32| self.queries / m + d * m / warps;
        [1, 2, 4, 8].into_iter().skip(usize::from(warps > 4)).filter(fits).min_by_key(loads)
    }

    fn dq_columns(&self, d: u32) -> u32 {
        d * self.dq_warps_m(d).unwrap_or(1) / self.warps()
    }

    /// Parts of a warp's columns of dq, one after the other where registers are short.
    pub fn dq_parts(&self, d: u32) -> u32 {
        if self.k_tiles == 1 && self.dq_columns(d) == 64 { 2 } else { 1 }
    }
}

pub(crate) fn backward_tile(spec: &Spec, d: u32, dv: u32, target: Target, view: View) -> Option<BackwardTile> {
    let dq = !spec.deterministic;
    let of = |[key_warps, split, k_tiles, queries, chunk, stages, blocks, side]: [u32; 8]| BackwardTile {
        key_warps,
        split,
        k_tiles,
        queries,
        chunk,
        stages,
        blocks,
        side_by_side: side == 1,
        lines: dq && lines_dq(spec, target, view),
        apart: false,
    };
    let plain = !transforms(spec) && spec.dropout.is_none();
    let tiles: &[[u32; 8]] = if is_heavy(spec) && d + dv <= 320 {
        &[[8, 1, 1, 64, 16, 2, 1, 0], [8, 1, 1, 32, 16, 1, 1, 0], [4, 1, 1, 32, 16, 1, 1, 0]]
    } else if is_heavy(spec) {
        &[[4, 2, 1, 64, 16, 2, 1, 0], [4, 2, 1, 64, 16, 1, 1, 0], [2, 2, 1, 32, 16, 1, 1, 0]]
    } else if d.max(dv) <= 64 && plain {
        &[[4, 1, 2, 64, 32, 2, 2, 1], [4, 1, 2, 32, 32, 2, 2, 1], [4, 1, 1, 32, 32, 2, 2, 1]]
    } else if d.max(dv) <= 64 {
        &[[4, 1, 2, 64, 16, 2, 2, 0], [4, 1, 2, 32, 16, 2, 2, 0], [4, 1, 1, 32, 16, 2, 2, 0]]
    } else if d + dv <= 256 && plain {
        &[
            [4, 2, 2, 64, 32, 2, 1, 1],
            [8, 1, 1, 64, 32, 2, 1, 0],
            [8, 1, 1, 32, 32, 1, 1, 0],
            [4, 1, 1, 32, 32, 1, 1, 0],
        ]
    } else if d + dv <= 256 {
        &[
            [4, 2, 2, 64, 16, 2, 1, 0],
            [8, 1, 1, 64, 16, 2, 1, 0],
            [8, 1, 1, 32, 16, 1, 1, 0],
            [4, 1, 1, 32, 16, 1, 1, 0],
        ]
    } else if d + dv <= 320 {
        &[
            [8, 1, 1, 64, 16, 2, 1, 0],
            [8, 1, 1, 32, 16, 2, 1, 0],
            [4, 1, 1, 32, 16, 2, 1, 0],
            [4, 1, 1, 32, 16, 1, 1, 0],
        ]
    } else {
        &[
            [2, 4, 2, 64, 16, 2, 1, 1],
            [4, 2, 1, 64, 16, 2, 1, 0],
            [4, 2, 1, 64, 16, 1, 1, 0],
            [2, 2, 1, 32, 16, 2, 1, 0],
            [2, 2, 1, 32, 16, 1, 1, 0],
        ]
    };
    // Elsewhere registers spill, or it is not measured.
    let apart = |t: BackwardTile| {
        let apart = dq && plain && view.aligned && target.arch == 90 && t.split == 4 && d == dv;
        let chunk = if apart { 2 * t.queries / t.split } else { t.chunk };
        BackwardTile { apart, chunk, ..t }
    };
    let mut fitting = tiles
        .iter()
        .map(|t| apart(of(*t)))
        .filter(|t| d.is_multiple_of(16 * t.split) && dv.is_multiple_of(16 * t.split));
    fitting.find(|t| target.fits(t.bytes(d, dv, dq), t.blocks) && (!dq || t.dq_warps_m(d).is_some()))
}

/// Whether sums of dq lie in the order of `cu/sm80_sums.cuh`. Not beside Hopper's kernels, which have an order of their own.
fn lines_dq(spec: &Spec, target: Target, view: View) -> bool {
    let fits = matches!(spec.head_dim, 64 | 128 | 256) && spec.q_rows.is_multiple_of(8) && spec.scale.is_normal();
    fits && view.aligned && !target.flash3
}

pub(crate) struct DqTile {
    pub warps: u32,
    pub keys: u32,
    pub stages: u32,
}

impl DqTile {
    pub fn bytes(&self, d: u32, dv: u32) -> u32 {
        let pair = |rows| tile_bytes(rows, d) + tile_bytes(rows, dv);
        pair(self.warps * 16) + self.stages * pair(self.keys)
    }
}

pub(crate) fn dq_tile(d: u32, dv: u32, target: Target) -> Option<DqTile> {
    let sizes = [(8, 64, 2), (8, 64, 1), (8, 32, 2), (8, 32, 1), (4, 32, 2), (4, 32, 1), (4, 16, 1)];
    let wide = d.max(dv) > 128;
    sizes
        .into_iter()
        .filter(|(_, keys, _)| !wide || *keys <= 32)
        .map(|(warps, keys, stages)| DqTile { warps, keys, stages })
        .find(|t| target.fits(t.bytes(d, dv), 1))
}
