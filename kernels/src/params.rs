//! What the kernels read: the C structures of `cu/common.cuh` and of each kernel file, field for field.
//!
//! All are plain data of fixed layout without padding bytes, passed by value as the one kernel parameter, or (tiles and
//! pieces) lying in device memory. Pointers are device addresses; strides count elements.

/// A strided tensor `[batch, row, head, dim]`; the last stride is 1. An absent tensor has address 0.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Tensor {
    /// Device address of the first element.
    pub ptr: u64,
    /// Elements from one batch row to the next.
    pub batch: i64,
    /// Elements from one sequence row to the next.
    pub row: i64,
    /// Elements from one head to the next.
    pub head: i64,
}

/// Rows of one batch row that one block works on: query rows in the forward, key rows in the backward.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Tile {
    /// Local batch row.
    pub batch: u32,
    /// First row.
    pub row0: u32,
    /// Number of rows.
    pub rows: u32,
    /// Index of the first piece.
    pub first: u32,
    /// Number of pieces; 0 where no slice selects anything of the tile.
    pub count: u32,
    /// Its number within its section of batch rows.
    pub rank: u32,
}

/// A band of pairs: query rows `q0..q1`, key rows `k0..k1`, with `lo <= c - r <= hi` for local rows `r` and `c` (counted from
/// the tensors' first rows). Every query row and every key row of a tile's piece occurs in at least one selected pair with
/// the tile.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Piece {
    /// First query row.
    pub q0: i32,
    /// Past the last query row.
    pub q1: i32,
    /// First key row.
    pub k0: i32,
    /// Past the last key row.
    pub k1: i32,
    /// Lower diagonal.
    pub lo: i32,
    /// Upper diagonal.
    pub hi: i32,
    /// Global position of local query row 0 (extrapolated).
    pub q_pos: i64,
    /// Global position of local key row 0 (extrapolated).
    pub k_pos: i64,
    /// Distance of the positions of neighbouring query rows.
    pub q_step: i32,
    /// Distance of the positions of neighbouring key rows.
    pub k_step: i32,
    /// Query rows from `q1` up to here are selected somewhere, so they hold numbers; those after may hold anything.
    pub q_end: i32,
    /// The same of key rows.
    pub k_end: i32,
}

/// The problem, as every attention kernel takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Problem {
    /// Device address of the [`Tile`]s.
    pub tiles: u64,
    /// Device address of the [`Piece`]s.
    pub pieces: u64,
    /// ALiBi slopes, f32 per global head (head stride only).
    pub slopes: Tensor,
    /// Device address of the dropout seed, or 0: then [`Problem::seed`] is it.
    pub seed_ptr: u64,
    /// Dropout seed.
    pub seed: u64,
    /// Tiles of one head.
    pub tile_count: u32,
    /// Local query heads.
    pub heads: u32,
    /// Local KV heads.
    pub kv_heads: u32,
    /// Heads whose blocks are neighbours in the grid (KV heads in [`BackwardParams`] for the main kernel).
    pub section: u32,
    /// Global index of local query head 0.
    pub head_first: u32,
    /// Query heads per KV head in the whole problem.
    pub group: u32,
    /// Global index of local KV head 0.
    pub kv_first: u32,
    /// Global index of local batch row 0.
    pub batch_first: u32,
    /// Size of a query and key head.
    pub head_dim: u32,
    /// Size of a value head.
    pub head_dim_v: u32,
    /// Factor on the dot product.
    pub scale: f32,
    /// Softcap, 1 without.
    pub softcap: f32,
    /// `1 / (1 - p)` of dropout.
    pub keep_scale: f32,
    /// A Philox word below it drops its pair.
    pub drop_below: u32,
}

/// Parameter of `attention_forward`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct ForwardParams {
    /// The problem; tiles are query tiles.
    pub problem: Problem,
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Output, I/O dtype.
    pub out: Tensor,
    /// Log-sum, f32.
    pub lse: Tensor,
    /// Partial accumulator, f32.
    pub acc: Tensor,
    /// Partial maximum, f32.
    pub m: Tensor,
    /// Partial sum, f32.
    pub l: Tensor,
    /// Sink logits, f32 per global head.
    pub sinks: Tensor,
    /// Sum of [`ForwardParams::LOAD`] and [`ForwardParams::STORE`].
    pub stage: u32,
    /// Padding, 0.
    pub unused: u32,
}

impl ForwardParams {
    /// The partial is read first (Continue, Finish).
    pub const LOAD: u32 = 1;
    /// The partial is written (Start, Continue), otherwise out and lse are.
    pub const STORE: u32 = 2;
}

/// A `CUtensorMap`, as the driver encodes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// Rows of the output that one copy writes: a warpgroup's.
pub const OUT_ROWS: u32 = 64;

/// Parameter of an `attention_forward` that takes tensor maps (see [`crate::Specialization::box_rows`]).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct MappedForwardParams {
    /// Maps of queries (boxes of a tile's rows), keys, values and, where there is one, the output ([`OUT_ROWS`]).
    pub maps: [TensorMap; 4],
    /// What the other kernels take.
    pub call: ForwardParams,
    /// Device address of a u32 that is 0 before and after the launch.
    pub counter: u64,
    /// Padding, 0.
    pub unused: [u64; 3],
}

/// Parameter of `attention_backward` (key tiles) and `attention_backward_dq` (query tiles).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct BackwardParams {
    /// The problem.
    pub problem: Problem,
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Gradient of the output.
    pub dout: Tensor,
    /// Global log-sum, f32.
    pub lse: Tensor,
    /// Delta, f32.
    pub delta: Tensor,
    /// Gradient of the queries: f32 that is added to in `attention_backward`, else f32 or the I/O dtype.
    pub dq: Tensor,
    /// Gradient of the keys.
    pub dk: Tensor,
    /// Gradient of the values.
    pub dv: Tensor,
    /// Sum of [`BackwardParams::ADD_DK`], [`BackwardParams::ADD_DV`] and [`BackwardParams::ADD_DQ`].
    pub add: u32,
    /// Padding, 0.
    pub unused: u32,
}

impl BackwardParams {
    /// dk is added to.
    pub const ADD_DK: u32 = 1;
    /// dv is added to.
    pub const ADD_DV: u32 = 2;
    /// dq is added to (dq kernel only).
    pub const ADD_DQ: u32 = 4;
}

/// Parameter of an `attention_backward` that takes tensor maps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct MappedBackwardParams {
    /// Maps of queries, keys, values, gradient of the output (boxes of 64 columns) and f32 gradient of the queries (32).
    pub maps: [TensorMap; 5],
    /// What the other kernels take.
    pub call: BackwardParams,
    /// As [`MappedForwardParams::counter`], of `attention_backward`.
    pub counter: u64,
    /// Padding, 0.
    pub unused: [u64; 3],
}

/// Parameter of `prepare_delta` and `prepare_dsinks`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct PrepareParams {
    /// Output, I/O dtype.
    pub out: Tensor,
    /// Gradient of the output, I/O dtype.
    pub dout: Tensor,
    /// Log-sum, f32.
    pub lse: Tensor,
    /// Gradient of lse, f32, or absent.
    pub dlse: Tensor,
    /// Result, f32.
    pub delta: Tensor,
    /// Sink logits, f32 per global head.
    pub sinks: Tensor,
    /// Gradient of the local heads' sinks, f32.
    pub dsinks: Tensor,
    /// Batch rows.
    pub batch: u32,
    /// Query rows.
    pub rows: u32,
    /// Local heads.
    pub heads: u32,
    /// Size of a value head.
    pub head_dim_v: u32,
    /// Global index of local head 0.
    pub head_first: u32,
    /// Padding, 0.
    pub unused: u32,
}

/// Terms that one `accumulate` takes.
pub const MAX_TERMS: usize = 32;

/// Parameter of `accumulate`: `into = round(((t0 + t1) + t2) + ...)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct AccumulateParams {
    /// The sum, any dtype.
    pub into: Tensor,
    /// f32 terms.
    pub terms: [Tensor; MAX_TERMS],
    /// Sizes `[batch, row, head, dim]`.
    pub extent: [u32; 4],
    /// Number of terms.
    pub count: u32,
    /// Elements of a thread: see [`width`].
    pub width: u32,
}

/// Regions that one `copy_strided` takes.
pub const MAX_REGIONS: usize = 16;

/// One strided copy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Region {
    /// Read.
    pub from: Tensor,
    /// Written.
    pub to: Tensor,
    /// Sizes `[batch, row, head, dim]`; up to 2^31 units in all.
    pub extent: [u32; 4],
}

/// Parameter of `copy_strided`: the grid's y axis is the region. Packing and unpacking are copies with one dense side.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct CopyParams {
    /// The regions; elements (of whatever type) are units of `copy_strided`'s UNIT bytes.
    pub regions: [Region; MAX_REGIONS],
}

/// Parameter of `fill`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct FillParams {
    /// Written.
    pub to: Tensor,
    /// Sizes `[batch, row, head, dim]`.
    pub extent: [u32; 4],
    /// Rounded to the dtype.
    pub value: f32,
    /// Elements of a thread: see [`width`].
    pub width: u32,
}

/// Parameter of `round_dq` and `reorder_dq`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct RoundParams {
    /// dq, written by `round_dq`.
    pub into: Tensor,
    /// f32 sums, read by `round_dq`.
    pub sums: Tensor,
    /// Sizes `[batch, row, head, dim]`.
    pub extent: [u32; 4],
    /// Of the logits.
    pub scale: f32,
    /// [`RoundParams::ALIGNED`], [`RoundParams::TO_SUMS`].
    pub flags: u32,
}

impl RoundParams {
    /// [`width`] of both tensors is 4.
    pub const ALIGNED: u32 = 1;
    /// `reorder_dq` makes sums of f32 dq.
    pub const TO_SUMS: u32 = 2;
}

/// `width` of [`AccumulateParams`] and [`FillParams`]: 4 where every address is a multiple of 16 bytes, and every stride (of an
/// axis longer than 1) and the last extent of 4 elements; otherwise 1.
pub fn width<'a>(tensors: impl IntoIterator<Item = &'a Tensor>, extent: [u32; 4]) -> u32 {
    let whole = |t: &Tensor| {
        let strides = [(extent[0], t.batch), (extent[1], t.row), (extent[2], t.head)];
        t.ptr.is_multiple_of(16) && strides.iter().all(|(n, s)| *n <= 1 || s % 4 == 0)
    };
    if extent[3].is_multiple_of(4) && tensors.into_iter().all(whole) { 4 } else { 1 }
}

const _: () = {
    assert!(size_of::<Tensor>() == 32);
    assert!(size_of::<Tile>() == 24);
    assert!(size_of::<Piece>() == 56);
    assert!(size_of::<Problem>() == 120);
    assert!(size_of::<ForwardParams>() == 416);
    assert!(size_of::<MappedForwardParams>() == 960);
    assert!(size_of::<BackwardParams>() == 416);
    assert!(size_of::<MappedBackwardParams>() == 1088);
    assert!(size_of::<PrepareParams>() == 248);
    assert!(size_of::<AccumulateParams>() == 32 + 32 * MAX_TERMS + 24);
    assert!(size_of::<Region>() == 80);
    assert!(size_of::<CopyParams>() == 80 * MAX_REGIONS);
    assert!(size_of::<FillParams>() == 56);
    assert!(size_of::<RoundParams>() == 88);
};
