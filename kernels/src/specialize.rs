//! Specializations: which source with which macros, threads and shared memory computes a [`Spec`] on a [`Target`].
//!
//! Tile sizes follow from what fits: registers (accumulators of a warp's rows take `rows * head_dim / 32` of at most 255 a
//! thread), then shared memory. `ci/compile.py` compiles the list of `emit ... every` and fails on a spill.

use std::fmt::Write as _;

use longspan_hal::{DType, Error, Result, Spec, Strided};

use crate::flash2::{backward_tile, dq_tile, forward_tile};
use crate::source::fnv1a;
use crate::{Source, amd, hopper};

/// Largest head size.
pub const MAX_HEAD_DIM: usize = 256;

/// GPUs whose matrix products are alike.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Family {
    /// AMD's CDNA 2 and 3: MFMA, waves of 64 lanes.
    Cdna,
    /// NVIDIA from sm_80 on.
    Nvidia,
    /// AMD's RDNA 3: WMMA, waves of 32 lanes.
    Rdna,
}

/// What a kernel may use of a device.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Target {
    /// Its family.
    pub family: Family,
    /// Compute capability, such as 80, 89, 90; of AMD the number of the architecture in hexadecimal, such as 0x90a, 0x942.
    pub arch: u32,
    /// Shared memory of one block, in bytes.
    pub block_bytes: u32,
    /// Shared memory of one multiprocessor, in bytes; on NVIDIA each resident block takes 1 KiB more than it asks for.
    pub unit_bytes: u32,
    /// It has warpgroup products and tensor copies (sm_90a), and they may be used.
    pub flash3: bool,
}

impl Target {
    /// A target from the device's own figures (`MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`, `..._PER_MULTIPROCESSOR`).
    pub const fn new(arch: u32, block_bytes: u32, unit_bytes: u32) -> Self {
        Self { family: Family::Nvidia, arch, block_bytes, unit_bytes, flash3: arch == 90 }
    }

    /// The target that AMD names `gfx942` or `gfx942:sramecc+:xnack-`; `None` where there are no kernels for it.
    pub fn amd(name: &str, block_bytes: u32, unit_bytes: u32) -> Option<Self> {
        let arch = u32::from_str_radix(name.split(':').next()?.strip_prefix("gfx")?, 16).ok()?;
        let family = match arch {
            0x90a | 0x940..=0x942 | 0x950 => Family::Cdna,
            0x1100..=0x1103 | 0x1150..=0x1153 => Family::Rdna,
            _ => return None,
        };
        Some(Self { family, arch, block_bytes, unit_bytes, flash3: false })
    }

    /// The figures of a known NVIDIA architecture; of the smallest one for those unknown.
    pub const fn nvidia(arch: u32) -> Self {
        let unit = match arch {
            80 | 87 => 164,
            90 | 100 | 103 => 228,
            _ => 100,
        };
        Self::new(arch, (unit - 1) << 10, unit << 10)
    }

    pub(crate) fn fits(&self, bytes: u32, blocks: u32) -> bool {
        let reserved = if self.family == Family::Nvidia { 1024 } else { 0 };
        bytes <= self.block_bytes && (bytes + reserved) * blocks <= self.unit_bytes
    }
}

/// What the call's views allow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct View {
    /// All pointers and strides of the call allow 16-byte access to 16-bit elements: see [`View::of`].
    pub aligned: bool,
    /// Tensor maps can be made of them: aligned, no axis is empty and none longer than 1 has stride 0.
    pub mapped: bool,
}

impl View {
    /// Whether 16-byte loads are possible in `views` (of one call, head sizes included) whose buffers start at 256-byte
    /// boundaries: every offset, stride and last extent (but the extent 1 of row statistics) is a multiple of 8, and no row
    /// stride is 2^24 or more (addresses within a tile are 32-bit).
    pub fn of<'a>(views: impl IntoIterator<Item = &'a Strided>) -> Self {
        let whole = |v: &Strided| {
            let [b, s, h, d] = v.extent();
            let [sb, ss, sh, _] = v.strides();
            let strides = [(b, sb), (s, ss), (h, sh)];
            d == 1
                || (ss < 1 << 24
                    && v.offset().is_multiple_of(8)
                    && d % 8 == 0
                    && strides.iter().all(|(n, x)| *n <= 1 || x % 8 == 0))
        };
        let steps = |v: &Strided| v.extent().iter().zip(v.strides()).all(|(n, step)| *n == 1 || (*n > 1 && step > 0));
        let (mut aligned, mut stepping) = (true, true);
        for view in views {
            aligned &= whole(view);
            stepping &= steps(view);
        }
        Self { aligned, mapped: aligned && stepping }
    }
}

/// A kernel ready to be compiled and launched.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Specialization {
    /// The source.
    pub source: Source,
    /// Names of the kernels in it.
    pub entries: &'static [&'static str],
    /// Macros, as `NAME=value`.
    pub defines: Vec<String>,
    /// Threads of a block (x axis).
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Rows of a tile: what to give to [`crate::WorkList`]; 0 for kernels without tiles.
    pub rows: u32,
    /// Rows that the kernel takes at once of the tensors that a tile walks along: box of their tensor maps. 0: it takes no
    /// tensor maps, and a block a tile.
    pub box_rows: u32,
}

impl Specialization {
    /// Key of source and macros, for scripts. The kernel cache's own also has compiler and architecture.
    pub fn key(&self) -> u128 {
        self.defines.iter().fold(self.source.hash(), |h, d| fnv1a(h, d.as_bytes()))
    }

    /// A readable name for messages and reports.
    pub fn name(&self) -> String {
        let mut name = self.source.file.trim_end_matches(".cu").to_owned();
        for d in self.defines.iter().filter(|d| !d.ends_with("=0")) {
            let _ = write!(name, " {}", d.strip_suffix("=1").unwrap_or(d));
        }
        name
    }

    /// The forward of `spec`: `attention_forward` with [`crate::params::ForwardParams`] over query tiles.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a head over [`MAX_HEAD_DIM`], or if no tile fits `target`.
    pub fn forward(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Self> {
        head_sizes(backend, spec)?;
        if spec.dtype == DType::F32 {
            return fma(backend, Source::FMA_FORWARD, &["attention_forward"], spec, target);
        }
        if target.family != Family::Nvidia {
            return amd::forward(backend, spec, target, view);
        }
        if let Some(kernel) = hopper::forward(spec, target, view) {
            return Ok(kernel);
        }
        let (d, dv) = (tiled(spec.head_dim, 16), tiled(spec.head_dim_v, 16));
        let tile = forward_tile(spec, d, dv, target).ok_or_else(|| no_tile(backend, spec))?;
        let rows = tile.rows();
        let mut defines = attention_defines(spec, d, dv, view.aligned);
        defines.extend([
            format!("PARTIAL={}", u32::from(spec.partial)),
            format!("WARPS={}", tile.warps),
            format!("SPLIT={}", tile.split),
            format!("M_TILES={}", tile.m_tiles),
            format!("BLOCK_N={}", tile.keys),
            format!("STAGES={}", tile.stages),
            format!("MIN_BLOCKS={}", tile.blocks),
            format!("Q_IN_REGISTERS={}", u32::from(tile.q_in_registers)),
            format!("SHARED_BYTES={}", tile.bytes(d, dv)),
        ]);
        Ok(Self {
            source: Source::SM80_FORWARD,
            entries: &["attention_forward"],
            defines,
            threads: tile.warps * 32,
            shared_bytes: tile.bytes(d, dv),
            rows,
            box_rows: 0,
        })
    }

    /// dk and dv (and, unless `spec.deterministic` or f32, dq by atomics) of `spec`: `attention_backward` with
    /// [`crate::params::BackwardParams`] over key tiles. The grid counts KV heads.
    ///
    /// # Errors
    /// As [`Specialization::forward`].
    pub fn backward(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Self> {
        head_sizes(backend, spec)?;
        if spec.dtype == DType::F32 {
            return fma(backend, Source::FMA_BACKWARD, &["attention_backward", "attention_backward_dq"], spec, target);
        }
        if target.family != Family::Nvidia {
            return amd::backward(backend, spec, target, view);
        }
        if let Some(kernel) = hopper::backward(spec, target, view) {
            return Ok(kernel);
        }
        let (d, dv) = (tiled(spec.head_dim, 32), tiled(spec.head_dim_v, 32));
        let dq = !spec.deterministic;
        let tile = backward_tile(spec, d, dv, target, view).ok_or_else(|| no_tile(backend, spec))?;
        let mut defines = attention_defines(spec, d, dv, view.aligned);
        defines.extend([
            format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
            format!("DQ={}", u32::from(dq)),
            format!("KEY_WARPS={}", tile.key_warps),
            format!("SPLIT={}", tile.split),
            format!("K_TILES={}", tile.k_tiles),
            format!("BLOCK_M={}", tile.queries),
            format!("CHUNK_M={}", tile.chunk),
            format!("STAGES={}", tile.stages),
            format!("DQ_WARPS_M={}", tile.dq_warps_m(d).unwrap_or(1)),
            format!("DQ_PARTS={}", tile.dq_parts(d)),
            format!("LINES={}", u32::from(tile.lines)),
            format!("APART={}", u32::from(tile.apart)),
            format!("SIDE_BY_SIDE={}", u32::from(tile.side_by_side)),
            format!("MIN_BLOCKS={}", tile.blocks),
            format!("SHARED_BYTES={}", tile.bytes(d, dv, dq)),
        ]);
        Ok(Self {
            source: Source::SM80_BACKWARD,
            entries: &["attention_backward"],
            defines,
            threads: tile.key_warps * tile.split * 32,
            shared_bytes: tile.bytes(d, dv, dq),
            rows: tile.keys(),
            box_rows: 0,
        })
    }

    /// Whether this backward adds dq, too. Then dq must be f32 memory that holds 0 (or what is added to); otherwise
    /// [`Specialization::backward_dq`] computes it.
    pub fn adds_dq(&self) -> bool {
        self.defines.iter().any(|d| d == "DQ=1")
    }

    /// Whether what this backward adds to is no f32 dq, but sums that [`Specialization::round_dq`] makes it of.
    pub fn sums_dq(&self) -> bool {
        self.defines.iter().any(|d| d == "DQ_QUADS=1" || d == "LINES=1")
    }

    /// Of a backward of `spec` with [`Specialization::sums_dq`]: `round_dq` makes dq of sums, `reorder_dq` f32 dq in place of
    /// them or the reverse; with [`crate::params::RoundParams`], any grid (grid-stride loops).
    pub fn round_dq(&self, spec: &Spec) -> Self {
        let mut defines = vec![io(spec.dtype).to_owned()];
        let source = if self.source == Source::SM80_BACKWARD {
            defines.push(format!("DQ_DIM={}", spec.head_dim));
            Source::SM80_BACKWARD_ROUND
        } else {
            Source::SM90_BACKWARD_ROUND
        };
        Self::plain(source, &["round_dq", "reorder_dq"], defines, 256)
    }

    /// dq of `spec` without atomics: `attention_backward_dq` with [`crate::params::BackwardParams`] over query tiles.
    ///
    /// # Errors
    /// As [`Specialization::forward`].
    pub fn backward_dq(backend: &'static str, spec: &Spec, target: Target, view: View) -> Result<Self> {
        head_sizes(backend, spec)?;
        if spec.dtype == DType::F32 {
            return fma(backend, Source::FMA_BACKWARD, &["attention_backward", "attention_backward_dq"], spec, target);
        }
        if target.family != Family::Nvidia {
            return amd::backward_dq(backend, spec, target, view);
        }
        if let Some(kernel) = hopper::backward_dq(spec, target, view) {
            return Ok(kernel);
        }
        let (d, dv) = (tiled(spec.head_dim, 16), tiled(spec.head_dim_v, 16));
        let tile = dq_tile(d, dv, target).ok_or_else(|| no_tile(backend, spec))?;
        let mut defines = attention_defines(spec, d, dv, view.aligned);
        defines.extend([
            format!("GRADIENT_F32={}", u32::from(spec.accumulate)),
            format!("WARPS={}", tile.warps),
            format!("BLOCK_N={}", tile.keys),
            format!("STAGES={}", tile.stages),
            format!("SHARED_BYTES={}", tile.bytes(d, dv)),
        ]);
        Ok(Self {
            source: Source::SM80_BACKWARD_DQ,
            entries: &["attention_backward_dq"],
            defines,
            threads: tile.warps * 32,
            shared_bytes: tile.bytes(d, dv),
            rows: tile.warps * 16,
            box_rows: 0,
        })
    }

    /// `prepare_delta` (a warp a row: grid `ceil(batch * rows * heads / 4)`) and `prepare_dsinks` (a block a head), with
    /// [`crate::params::PrepareParams`].
    pub fn prepare(dtype: DType) -> Self {
        Self::plain(Source::PREPARE, &["prepare_delta", "prepare_dsinks"], vec![io(dtype).to_owned()], 128)
    }

    /// `accumulate` with [`crate::params::AccumulateParams`]: a thread an element, any grid (grid-stride loop).
    pub fn accumulate(into: DType) -> Self {
        Self::plain(Source::ACCUMULATE, &["accumulate"], vec![io(into).to_owned()], 256)
    }

    /// `copy_strided` with [`crate::params::CopyParams`], whose elements are units of `unit` bytes (2, 4, 8 or 16); grid x is
    /// any, grid y the number of regions.
    pub fn copy(unit: u32) -> Self {
        Self::plain(Source::COPY, &["copy_strided"], vec![io(DType::F32).to_owned(), format!("UNIT={unit}")], 256)
    }

    /// `fill` with [`crate::params::FillParams`]: a thread an element, any grid.
    pub fn fill(dtype: DType) -> Self {
        Self::plain(Source::FILL, &["fill"], vec![io(dtype).to_owned()], 256)
    }

    fn plain(source: Source, entries: &'static [&'static str], mut defines: Vec<String>, threads: u32) -> Self {
        defines.extend(["SOFTCAP=0", "ALIBI=0", "DROPOUT=0", "TRANSFORM=0", "EXACT=0", "ALIGNED=0"].map(str::to_owned));
        defines.push(format!("THREADS={threads}"));
        Self { source, entries, defines, threads, shared_bytes: 0, rows: 0, box_rows: 0 }
    }
}

/// Neighbours in the grid, so that what their blocks re-read stays in a cache.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Section {
    /// Heads whose tiles are neighbours: query heads of the forward, KV heads of the backward.
    pub heads: u32,
    /// Batch rows whose tiles are neighbours: see [`crate::WorkList`].
    pub batches: u32,
}

/// Sections of the forward (and the dq kernel) and of the backward for a cache of `cache` bytes on `units` multiprocessors:
/// what the cache holds, but about two tiles a multiprocessor (backward: one where a KV head has one query head), so that the
/// longest tiles of the last section don't end long after the others. Where it can be, all sections have as many heads.
pub fn sections(spec: &Spec, cache: usize, units: u32) -> [Section; 2] {
    let row = (spec.head_dim + spec.head_dim_v) * spec.dtype.size();
    let (keys, queries) = (spec.k_rows * row, spec.group * spec.q_rows * (row + 4 * spec.head_dim));
    let few = units as usize * 7 / 8;
    let of = |bytes: usize, rows: usize, group: usize, heads: usize, least: usize| {
        let tiles = rows.div_ceil(128).max(1) * group;
        let (all, least) = (heads.div_ceil(group).max(1), least.div_ceil(tiles).max(1));
        let fit = (cache / bytes.max(1)).max(least);
        let even = (least..=fit.min(all)).rev().find(|n| all.is_multiple_of(*n));
        let at_once = even.or_else(|| (fit..=all).find(|n| all.is_multiple_of(*n))).unwrap_or(all);
        Section {
            heads: (at_once * group).clamp(1, heads.max(1)) as u32,
            batches: (fit / all).clamp(1, spec.batch.max(1)) as u32,
        }
    };
    let blocks = if spec.group > 1 { 2 * few } else { few };
    [of(keys, spec.q_rows, spec.group, spec.heads, 2 * few), of(queries, spec.k_rows, 1, spec.kv_heads, blocks)]
}

fn head_sizes(backend: &'static str, spec: &Spec) -> Result<()> {
    spec.check()?;
    let most = spec.head_dim.max(spec.head_dim_v);
    if most > MAX_HEAD_DIM {
        return Err(Error::Unsupported {
            backend,
            what: format!("head_dim {most}"),
            instead: format!("sizes up to {MAX_HEAD_DIM} are"),
        });
    }
    Ok(())
}

pub(crate) fn no_tile(backend: &'static str, spec: &Spec) -> Error {
    Error::Unsupported {
        backend,
        what: format!("head_dim {} with head_dim_v {} on this device", spec.head_dim, spec.head_dim_v),
        instead: "smaller heads fit its shared memory".to_owned(),
    }
}

pub(crate) const fn padded(size: usize, to: usize) -> u32 {
    (size.div_ceil(to) * to) as u32
}

/// A head size as tensor-core tiles have it: coarser where it is large, so that loads divide evenly among threads.
pub(crate) const fn tiled(size: usize, step: usize) -> u32 {
    match size {
        ..=96 => padded(size, step),
        97..=128 => padded(size, 32),
        _ => padded(size, 64),
    }
}

const fn io(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "IO_BF16=1",
        DType::F16 => "IO_F16=1",
        _ => "IO_F32=1",
    }
}

pub(crate) fn attention_defines(spec: &Spec, d: u32, dv: u32, aligned: bool) -> Vec<String> {
    let on = u32::from;
    let exact = d as usize == spec.head_dim && dv as usize == spec.head_dim_v;
    vec![
        io(spec.dtype).to_owned(),
        format!("HEAD_DIM={d}"),
        format!("HEAD_DIM_V={dv}"),
        format!("EXACT={}", on(exact)),
        format!("ALIGNED={}", on(aligned)),
        format!("SOFTCAP={}", on(spec.softcap.is_some())),
        format!("ALIBI={}", on(spec.alibi)),
        format!("DROPOUT={}", on(spec.dropout.is_some())),
        format!("TRANSFORM={}", on(transforms(spec))),
    ]
}

/// Whether logits are more than a positive factor times the dot product (the f32 kernels know no other form).
pub(crate) fn transforms(spec: &Spec) -> bool {
    spec.dtype == DType::F32 || spec.softcap.is_some() || spec.alibi || spec.scale <= 0.0
}

/// Whether positions of pairs are computed, which takes registers.
pub(crate) fn is_heavy(spec: &Spec) -> bool {
    spec.alibi || spec.dropout.is_some()
}

/// The f32 kernels: four threads a row; sizes as in `cu/fma_*.cu`.
fn fma(
    backend: &'static str,
    source: Source,
    entries: &'static [&'static str],
    spec: &Spec,
    target: Target,
) -> Result<Specialization> {
    let (d, dv) = (padded(spec.head_dim, 32), padded(spec.head_dim_v, 32));
    let forward = source == Source::FMA_FORWARD;
    let bytes = |rows: u32, others: u32| {
        let (d, dv) = (d + 4, dv + 4);
        let tiles = if forward { rows * d + others * (d + dv) } else { (rows + others) * (d + dv) };
        4 * (tiles + if forward { 1 } else { 2 } * rows * (others + 1))
    };
    let tiles: &[[u32; 2]] = match (d + dv > 320, forward) {
        (false, _) => &[[32, 32], [32, 16], [32, 8], [16, 16], [16, 8]],
        (true, true) => &[[32, 16], [32, 8], [16, 8]],
        (true, false) => &[[32, 8], [16, 8]],
    };
    let tile = tiles.iter().find(|[rows, others]| target.fits(bytes(*rows, *others), 1));
    let &[rows, others] = tile.ok_or_else(|| no_tile(backend, spec))?;
    let mut defines = attention_defines(spec, d, dv, false);
    defines.extend([
        format!("PARTIAL={}", u32::from(spec.partial)),
        format!("FMA_ROWS={rows}"),
        format!("FMA_OTHERS={others}"),
        format!("SHARED_BYTES={}", bytes(rows, others)),
    ]);
    Ok(Specialization {
        source,
        entries,
        defines,
        threads: 4 * rows,
        shared_bytes: bytes(rows, others),
        rows,
        box_rows: 0,
    })
}
