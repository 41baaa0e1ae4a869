//! Specializations for Hopper's warpgroup products and tensor copies (sm_90a): `cu/sm90_*.cu`.
//!
//! Accumulators of a consumer warpgroup's 64 rows take `head_dim_v / 2` registers a thread, scores `keys / 2`, probabilities
//! half of that; with two consumers and a producer a thread has 232. Then shared memory: Q once or twice, K and V twice.

use longspan_hal::{DType, Spec};

use crate::specialize::{attention_defines, is_heavy, padded};
use crate::{Source, Specialization, Target, View};

/// The forward on this target, if it is one and the views allow tensor maps.
pub(crate) fn forward(spec: &Spec, target: Target, view: View) -> Option<Specialization> {
    if !usable(spec, target, view) {
        return None;
    }
    let (d, dv) = (padded(spec.head_dim, 16), padded(spec.head_dim_v, 16));
    let tile = ForwardTile::of(spec, d, dv, target)?;
    let mut defines = attention_defines(spec, d, dv, true);
    defines.extend([
        format!("PARTIAL={}", u32::from(spec.partial)),
        format!("BLOCK_N={}", tile.keys),
        format!("GROUPS={}", tile.groups),
        "STAGES=2".to_owned(),
        format!("Q_STAGES={}", tile.q_stages),
        format!("SHARED_BYTES={}", tile.bytes(d, dv)),
    ]);
    defines.extend(registers(tile.groups, false));
    Some(Specialization {
        source: Source::SM90_FORWARD,
        entries: &["attention_forward"],
        defines,
        threads: 128 * (tile.groups + 1),
        shared_bytes: tile.bytes(d, dv),
        rows: 64 * tile.groups,
        box_rows: tile.keys,
    })
}

/// dk and dv, and dq where it is added by bulk copies, on this target, if it is one and the views allow tensor maps.
pub(crate) fn backward(spec: &Spec, target: Target, view: View) -> Option<Specialization> {
    if !usable(spec, target, view) {
        return None;
    }
    let (d, dv) = (padded(spec.head_dim, 64), padded(spec.head_dim_v, 64));
    let plain = !is_heavy(spec) && spec.softcap.is_none();
    // Registers: both gradients and dq in one warpgroup, or one gradient each.
    let many = spec.dropout.is_some() && (spec.alibi || spec.softcap.is_some());
    let wide = d.max(dv) > 128 || (!plain && spec.deterministic) || (many && d.max(dv) > 64);
    let queries = if d + dv == 128 && plain && !spec.deterministic { 128 } else { 64 };
    let dq = !wide && !spec.deterministic;
    // lse and delta subtracted by products: where no factor comes in between and lse / scale has elements.
    let fold = !wide && spec.softcap.is_none() && spec.dropout.is_none() && (1e-4..1e4).contains(&spec.scale);
    // Scores a block ahead, where registers allow it.
    let ahead = fold && queries == 64;
    let exchanged = if spec.dtype == DType::Bf16 { 2 } else { 4 };
    let tile = BackwardTile { keys: if wide { 64 } else { 64 * GROUPS }, queries, dq, ahead, fold, exchanged };
    let mut defines = attention_defines(spec, d, dv, true);
    defines.extend([
        format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
        format!("DQ={}", u32::from(tile.dq)),
        format!("BLOCK_M={}", tile.queries),
        format!("BLOCK_N={}", tile.keys),
        "STAGES=2".to_owned(),
        format!("Q_STAGES={}", tile.q_stages()),
        format!("AHEAD={}", u32::from(ahead)),
        format!("DQ_QUADS={}", u32::from(dq && spec.head_dim.is_multiple_of(32) && spec.scale.is_normal())),
        format!("FOLD={}", u32::from(fold)),
        format!("SHARED_BYTES={}", tile.bytes(d, dv)),
    ]);
    defines.extend(registers(GROUPS, queries == 64));
    Some(Specialization {
        source: if wide { Source::SM90_BACKWARD_WIDE } else { Source::SM90_BACKWARD },
        entries: &["attention_backward"],
        defines,
        threads: 128 * (GROUPS + 1),
        shared_bytes: tile.bytes(d, dv),
        rows: tile.keys,
        box_rows: tile.queries,
    })
}

/// dq without atomics on this target, if it is one and the views allow tensor maps.
pub(crate) fn backward_dq(spec: &Spec, target: Target, view: View) -> Option<Specialization> {
    if !usable(spec, target, view) {
        return None;
    }
    let (d, dv) = (padded(spec.head_dim, 16), padded(spec.head_dim_v, 16));
    let keys = match d.max(dv) {
        _ if is_heavy(spec) => 32,
        ..=128 if spec.softcap.is_some() => 64,
        ..=64 => 128,
        65..=128 => 96,
        129..=192 => 64,
        _ => 48,
    };
    // K of a block is in use until the next one's scores are there.
    let [k_stages, v_stages] = if d.max(dv) > 192 && keys == 48 { [3, 1] } else { [3, 2] };
    let queries = tile_bytes(64 * GROUPS, d) + tile_bytes(64 * GROUPS, dv);
    let bytes = queries + k_stages * tile_bytes(keys, d) + v_stages * tile_bytes(keys, dv) + 160 + 4 * 72;
    let mut defines = attention_defines(spec, d, dv, true);
    defines.extend([
        format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
        format!("BLOCK_N={keys}"),
        format!("STAGES={k_stages}"),
        format!("V_STAGES={v_stages}"),
        format!("SHARED_BYTES={bytes}"),
    ]);
    defines.extend(registers(GROUPS, false));
    Some(Specialization {
        source: Source::SM90_BACKWARD_DQ,
        entries: &["attention_backward_dq"],
        defines,
        threads: 128 * (GROUPS + 1),
        shared_bytes: bytes,
        rows: 64 * GROUPS,
        box_rows: keys,
    })
}

/// Registers of a thread of `groups` consumer warpgroups, and of the producer's: together at most what all have at entry.
fn registers(groups: u32, most: bool) -> [String; 2] {
    let [consumer, producer] = match groups {
        3 => [160, 32],
        _ if most => [240, 24],
        _ => [232, 40],
    };
    [format!("REGISTERS={consumer}"), format!("PRODUCER_REGISTERS={producer}")]
}

/// Consumer warpgroups of the backward.
const GROUPS: u32 = 2;

fn usable(spec: &Spec, target: Target, view: View) -> bool {
    let whole = spec.head_dim.is_multiple_of(8) && spec.head_dim_v.is_multiple_of(8);
    target.flash3 && view.mapped && whole && spec.dtype != DType::F32
}

/// Bytes of a tile: panels of 64 columns.
const fn tile_bytes(rows: u32, dim: u32) -> u32 {
    rows * 128 * dim.div_ceil(64)
}

struct ForwardTile {
    groups: u32,
    keys: u32,
    q_stages: u32,
}

impl ForwardTile {
    fn of(spec: &Spec, d: u32, dv: u32, target: Target) -> Option<Self> {
        let heavy = is_heavy(spec);
        let plain = !heavy && spec.softcap.is_none();
        let many = spec.dropout.is_some() && spec.alibi && spec.softcap.is_some();
        let tiles: &[[u32; 3]] = match d.max(dv) {
            ..=128 if heavy => &[[2, 64, 2]],
            ..=64 if plain => &[[3, 128, 2]],
            65..=128 if plain => &[[2, 160, 2]],
            ..=128 => &[[2, 128, 2]],
            129..=192 if heavy => &[[2, 64, 1]],
            193.. if many => &[[2, 32, 1]],
            193.. if heavy => &[[2, 48, 1]],
            129..=192 => &[[2, 112, 1], [2, 96, 1]],
            _ => &[[2, 80, 1]],
        };
        let mut tiles = tiles.iter().map(|&[groups, keys, q_stages]| Self { groups, keys, q_stages });
        tiles.find(|t| target.fits(t.bytes(d, dv), 1))
    }

    fn bytes(&self, d: u32, dv: u32) -> u32 {
        let (barriers, descriptions) = (160, 4 * 96 + 2 * 96 + 2 * 32);
        let keys = tile_bytes(self.keys, d) + tile_bytes(self.keys, dv);
        self.q_stages * tile_bytes(64 * self.groups, d) + 2 * keys + barriers + descriptions
    }
}

struct BackwardTile {
    keys: u32,
    queries: u32,
    dq: bool,
    ahead: bool,
    fold: bool,
    /// Bytes of a probability that one group gives the other, where they share keys.
    exchanged: u32,
}

impl BackwardTile {
    fn q_stages(&self) -> u32 {
        if self.ahead { 3 } else { 2 }
    }

    fn bytes(&self, d: u32, dv: u32) -> u32 {
        let keys = tile_bytes(self.keys, d) + tile_bytes(self.keys, dv);
        let queries = self.q_stages() * tile_bytes(self.queries, d) + 2 * tile_bytes(self.queries, dv);
        let (ds, sums) = (2 * tile_bytes(64 * GROUPS, self.queries), 4 * self.queries * d);
        let exchanged = if self.keys < 64 * GROUPS { 2 * self.exchanged * 64 * self.queries } else { 0 };
        let statistic = self.queries * if self.fold { 32 } else { 4 };
        let (statistics, barriers, descriptions) = (2 * 2 * statistic, 256, 4 * 72 + 2 * 40);
        keys + queries + u32::from(self.dq) * (ds + sums) + exchanged + statistics + barriers + descriptions
    }
}
