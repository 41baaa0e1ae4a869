// Attention backward over slices on tensor cores (16-bit elements, f32 accumulation).
//
//   p = exp(x - lse)      dp = keep / (1 - drop) * dout v^T      ds = p (dp - delta) (1 - (x0 / softcap)^2)
//   dv = (keep / (1 - drop) p)^T dout      dk = scale ds^T q      dq = scale ds k
//
//   one block = one key tile of one KV head; K and V stay in shared memory, dK and dV in registers
//     for each query head of the KV head, each piece, each block of BLOCK_M query rows:
//         Q and dout of the next block travel to the other stage
//         S^T = K Q^T; P^T = exp2(S^T - lse), 0 outside the band; dP^T = V dout^T; dS^T = P^T (dP^T - delta)
//         dV += P^T dout; dK += dS^T Q          (with SPLIT = 1 straight from registers: an accumulator pair is an A)
//         dS^T to shared memory; dQ = dS K is added to f32 memory by atomics: with LINES to sums in an order of their own
//     write or add dK and dV
//
// Keys are the row side of every product, so that P^T and dS^T need no trip through shared memory. With SPLIT = 2 (large
// heads) two warps share 16 keys: each computes half of the queries, and after an exchange through shared memory half of
// the columns of dK and dV. With APART = 1 half of the warps computes S and P, the other half dP and, from P in shared memory,
// dS: each reads K or V for twice as many queries. With SPLIT = 4 dQ is computed in two halves, each added between products of
// dK. Each KV head's query heads are summed here, in order: no atomics but those of dQ, and none in the deterministic mode
// (DQ = 0), where sm80_attention_backward_dq.cu computes dQ. (Dao, FlashAttention-2, 2023.)
//
// The speed of d128 hangs on the order of instructions: see kernels/README.md before moving address arithmetic.
//
// Macros: KEY_WARPS, SPLIT, K_TILES (keys of a warp / 16), BLOCK_M, CHUNK_M (queries a warp takes at once), STAGES,
// DQ_WARPS_M (warps along the queries of dQ), DQ_PARTS (of a warp's columns of dQ, one after the other), LINES (the
// order of sm80_sums.cuh), APART, DQ, GRADIENT_F32, SIDE_BY_SIDE, MIN_BLOCKS.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq;      // f32, added to
    Tensor dk, dv;  // f32 with GRADIENT_F32, otherwise the I/O dtype
    u32 add;        // bit 0: dk is added to, bit 1: dv is, bit 2: dq is (used by the dq kernel)
    u32 unused;
};
static_assert(sizeof(BackwardParams) == 416, "layout");

constexpr int WARPS = KEY_WARPS * SPLIT, THREADS = WARPS * 32;
constexpr int KEYS = 16 * K_TILES;  // of a warp
constexpr int BLOCK_N = KEY_WARPS * KEYS;
constexpr int PARTS = APART ? SPLIT / 2 : SPLIT;  // of the queries of a block, in S and dP
constexpr int QUERIES = BLOCK_M / PARTS;  // of a warp there
constexpr bool BETWEEN = SPLIT == 4;  // dQ is added between dK's products
constexpr int COLUMNS = HEAD_DIM / SPLIT, COLUMNS_V = HEAD_DIM_V / SPLIT;
constexpr u32 K_BYTES = BLOCK_N * pitch<HEAD_DIM>() * 2, V_BYTES = BLOCK_N * pitch<HEAD_DIM_V>() * 2;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2, O_BYTES = BLOCK_M * pitch<HEAD_DIM_V>() * 2;
constexpr u32 S_BYTES = BLOCK_N * pitch<BLOCK_M>() * 2;
constexpr u32 Q_AT = K_BYTES + V_BYTES, O_AT = Q_AT + STAGES * Q_BYTES, DS_AT = O_AT + STAGES * O_BYTES;
constexpr u32 P_AT = DS_AT + (DQ || SPLIT > 1 ? S_BYTES : 0), STATS_AT = P_AT + (SPLIT > 1 ? S_BYTES : 0);
constexpr u32 CONTROL_AT = STATS_AT + 2 * BLOCK_M * 4;
#if DQ
constexpr int DQ_WARPS_N = WARPS / DQ_WARPS_M, DQ_TURNS = BETWEEN ? 2 : 1;  // parts of a warp's rows
constexpr int DQ_TILES = BLOCK_M / DQ_WARPS_M / DQ_TURNS / 16;
constexpr int DQ_COLUMNS = HEAD_DIM / DQ_WARPS_N / DQ_PARTS;  // of a warp, in one part
static_assert(DQ_TILES * DQ_TURNS * DQ_WARPS_M * 16 == BLOCK_M && DQ_COLUMNS % 16 == 0, "dq tiles");
static_assert(!BETWEEN || DQ_PARTS == 1, "dq between dk's products");
#endif
static_assert(CONTROL_AT + 160 == SHARED_BYTES, "shared memory");
static_assert(2 * BLOCK_M <= THREADS && QUERIES % CHUNK_M == 0 && CHUNK_M % 16 == 0, "tiles");

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Chunk[K_TILES][CHUNK_M / 8][4];

// One step of 16 columns (the kk-th) of C = A B^T with A from rows of `a` and B from rows of `b`.
template <int DIM> DEVICE void product_step(Chunk &c, u32 a, u32 b, int kk) {
    u32 x[K_TILES][4];
    UNROLL for (int kt = 0; kt < K_TILES; ++kt) load_matrices(x[kt], shifted<DIM>(a, kt * 16, kk * 16));
    UNROLL for (int j = 0; j < CHUNK_M / 16; ++j) {
        u32 y[4];
        load_matrices(y, shifted<DIM>(b, j * 16, kk * 16));
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
            mma(c[kt][2 * j], x[kt], y[0], y[1], kk == 0);
            mma(c[kt][2 * j + 1], x[kt], y[2], y[3], kk == 0);
        }
    }
}

// acc += A B for 16 queries: A (keys x queries) in registers, B the rows of `b`, COLS columns of rows of DIM.
template <int DIM, int COLS> DEVICE void gather16(float (&acc)[K_TILES][COLS / 8][4], const u32 (&a)[K_TILES][4], u32 b) {
    UNROLL for (int j = 0; j < COLS / 16; ++j) {
        u32 y[4];
        load_matrices_transposed(y, shifted<DIM>(b, 0, j * 16));
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
            mma(acc[kt][2 * j], a[kt], y[0], y[1]);
            mma(acc[kt][2 * j + 1], a[kt], y[2], y[3]);
        }
    }
}

// Local query heads of a KV head.
struct Heads {
    u32 first, past;
};
DEVICE Heads heads_of(const Problem &p, u32 kv) {
    const int first = int((p.kv_first + kv) * p.group) - int(p.head_first), past = first + int(p.group);
    return {u32(first > 0 ? first : 0), u32(past < int(p.heads) ? past : int(p.heads))};
}

// What all threads know alike lies in shared memory, since the loop needs the registers.
struct Now {
    Piece piece;
    i32 query;
    u32 head;
};
struct Control {
    Now now[2];  // of this turn and the next
    Tile tile;
    Heads heads;
};
static_assert(sizeof(Control) == 160, "shared memory");

// The position in the list of (query head, piece, first query row) blocks.
struct Cursor {
    u32 head, piece;
    int query;
};
constexpr u32 NONE = ~0u;  // head of the position after the last one

// To the next block, from one in `piece`; returns whether it is in another piece.
DEVICE bool advance(Cursor &at, const Piece &piece, const Piece *pieces, const Control &control) {
    at.query += BLOCK_M;
    if (at.query < piece.q1) return false;
    if (++at.piece == control.tile.first + control.tile.count) {
        at.piece = control.tile.first;
        if (++at.head == control.heads.past) {
            at.head = NONE;
            return false;
        }
    }
    at.query = pieces[at.piece].q0;
    return true;
}

// Starts loading one block of Q and dout (valid before row `end`), and returns this thread's row statistic: thread
// i < BLOCK_M that of lse of row i (+inf where there is no row), the next BLOCK_M threads that of delta.
DEVICE float load_queries(const BackwardParams &p, u32 batch, const Cursor &c, int end, u32 q, u32 o) {
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const int valid = end - c.query, thread = threadIdx.x, row = thread % BLOCK_M;
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(q, at<const u16>(p.q, batch, c.query, c.head), p.q.row, valid, dim, thread);
    load_tile<BLOCK_M, HEAD_DIM_V, THREADS>(o, at<const u16>(p.dout, batch, c.query, c.head), p.dout.row, valid, dim_v,
                                            thread);
    if (thread < BLOCK_M) return row < valid ? *at<const float>(p.lse, batch, c.query + row, c.head) : INFINITY_F;
    return thread < 2 * BLOCK_M && row < valid ? *at<const float>(p.delta, batch, c.query + row, c.head) : 0.0f;
}

// Where this lane's elements lie: key of (kt, e) is key + 16 kt + 8 (e / 2), query of (j, e) is query + 8 j + e % 2.
struct LaneAt {
    int key, query;
};

DEVICE void mask(Chunk &s, const Piece &piece, LaneAt at) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int half = 0; half < 2; ++half) {
            int key = at.key + 16 * kt + 8 * half;
            int first = key - piece.hi - at.query, last = key - piece.lo - at.query;
            if (key < piece.k0 || key >= piece.k1) last = first - 1;
            UNROLL for (int j = 0; j < CHUNK_M / 8; ++j)
                UNROLL for (int e = 0; e < 2; ++e) {
                    int r = 8 * j + e;
                    if (r < first || r > last) s[kt][j][2 * half + e] = -INFINITY_F;
                }
        }
}

struct Context {
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
};

// S^T becomes P^T (kept and scaled by dropout), dP^T becomes dS^T.
DEVICE void differentiate(Chunk &s, Chunk &dp, const Context &x, const Piece &piece, LaneAt at, const float *stats,
                          bool masked) {
#if SOFTCAP
    Chunk bent;  // derivative of the softcap
#endif
#if TRANSFORM
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int j = 0; j < CHUNK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float d;
                s[kt][j][e] = transform(x.score, piece, s[kt][j][e], at.query + 8 * j + e % 2,
                                        at.key + 16 * kt + 8 * (e / 2), d);
#if SOFTCAP
                bent[kt][j][e] = d;
#endif
            }
#endif
    if (masked) mask(s, piece, at);
    UNROLL for (int j = 0; j < CHUNK_M / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2 *>(stats + 8 * j);
        const float2 delta = *reinterpret_cast<const float2 *>(stats + BLOCK_M + 8 * j);
        UNROLL for (int kt = 0; kt < K_TILES; ++kt)
            UNROLL for (int e = 0; e < 4; ++e) {
                float p = exp2_fast(s[kt][j][e] * x.score.unit - (e % 2 ? lse.y : lse.x)), keep = 1.0f;
#if DROPOUT
                keep = keep_factor(x.dropout, piece, at.query + 8 * j + e % 2, at.key + 16 * kt + 8 * (e / 2));
#endif
                float ds = p * (dp[kt][j][e] * keep - (e % 2 ? delta.y : delta.x));
#if SOFTCAP
                ds *= bent[kt][j][e];
#endif
                s[kt][j][e] = p * keep;
                dp[kt][j][e] = ds;
            }
    }
}

#if APART
static_assert(HEAD_DIM == HEAD_DIM_V && CHUNK_M == QUERIES && SPLIT > 1 && !TRANSFORM && !DROPOUT, "S and dP apart");
// S^T becomes P^T.
DEVICE void probabilities(Chunk &s, const Context &x, const Piece &piece, LaneAt at, const float *lse, bool masked) {
    if (masked) mask(s, piece, at);
    UNROLL for (int j = 0; j < CHUNK_M / 8; ++j) {
        const float2 l = *reinterpret_cast<const float2 *>(lse + 8 * j);
        UNROLL for (int kt = 0; kt < K_TILES; ++kt)
            UNROLL for (int e = 0; e < 4; ++e)
                s[kt][j][e] = exp2_fast(s[kt][j][e] * x.score.unit - (e % 2 ? l.y : l.x));
    }
}
// dP^T becomes dS^T, with P^T in shared memory at `p`.
DEVICE void derivatives(Chunk &dp, u32 p, const float *delta) {
    UNROLL for (int j = 0; j < CHUNK_M / 8; ++j) {
        const float2 d = *reinterpret_cast<const float2 *>(delta + 8 * j);
        UNROLL for (int kt = 0; kt < K_TILES; ++kt)
            UNROLL for (int half = 0; half < 2; ++half) {
                const u32 pair = load_shared(shifted<BLOCK_M>(p, 16 * kt + 8 * half, 8 * j));
                dp[kt][j][2 * half] = widen(u16(pair)) * (dp[kt][j][2 * half] - d.x);
                dp[kt][j][2 * half + 1] = widen(u16(pair >> 16)) * (dp[kt][j][2 * half + 1] - d.y);
            }
    }
}
#endif

// A chunk to [key][query] in shared memory.
DEVICE void store_chunk(const Chunk &c, u32 to) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int j = 0; j < CHUNK_M / 8; ++j)
            UNROLL for (int half = 0; half < 2; ++half)
                store_shared(shifted<BLOCK_M>(to, 16 * kt + 8 * half, 8 * j),
                             pack2(c[kt][j][2 * half], c[kt][j][2 * half + 1]));
}

// The same of zeros.
DEVICE void store_zeros(u32 to) {
    UNROLL for (int kt = 0; kt < 2 * K_TILES; ++kt)
        UNROLL for (int j = 0; j < CHUNK_M / 8; ++j) store_shared(shifted<BLOCK_M>(to, 8 * kt, 8 * j), 0);
}

#if DQ
typedef float Sums[DQ_TILES][DQ_COLUMNS / 8][4];

// A warp's part of dQ: from which row and column of the block on.
struct DqPart {
    int row, column;
};
DEVICE DqPart dq_part(int warp, int turn, int part) {
    warp = int(opaque(u32(warp)));
    return {(warp / DQ_WARPS_N * DQ_TURNS + turn) * DQ_TILES * 16, (warp % DQ_WARPS_N * DQ_PARTS + part) * DQ_COLUMNS};
}

// c = dS K.
DEVICE void dq_products(Sums &c, u32 base, DqPart part, int lane) {
    const u32 ds = shifted<BLOCK_M>(base + DS_AT + lane_offset_b<BLOCK_M>(lane), 0, part.row);
    const u32 k = shifted<HEAD_DIM>(base + lane_offset_a<HEAD_DIM>(lane), 0, part.column);
    UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk) {
        u32 a[DQ_TILES][4];
        UNROLL for (int mt = 0; mt < DQ_TILES; ++mt)
            load_matrices_transposed(a[mt], shifted<BLOCK_M>(ds, kk * 16, mt * 16));
        UNROLL for (int j = 0; j < DQ_COLUMNS / 16; ++j) {
            u32 b[4];
            load_matrices_transposed(b, shifted<HEAD_DIM>(k, kk * 16, j * 16));
            UNROLL for (int mt = 0; mt < DQ_TILES; ++mt) {
                mma(c[mt][2 * j], a[mt], b[0], b[1], kk == 0);
                mma(c[mt][2 * j + 1], a[mt], b[2], b[3], kk == 0);
            }
        }
    }
}

// Rows of dQ in memory: those of a head, of which a block has the ones from `query` on, and the ones before `end` exist.
struct DqRows {
    float *from;
    int query, end;
};
DEVICE DqRows dq_rows(const BackwardParams &p, const Control &control, const Now &now) {
    return {at<float>(p.dq, control.tile.batch, 0, now.head), now.query, now.piece.q1};
}

// Adds the step-th of `steps` portions of `c`.
DEVICE void add_sums(const BackwardParams &p, const Sums &c, const DqRows &dq, DqPart part, int lane, int step, int steps) {
#if LINES
    static_assert(DQ_COLUMNS * 8 % HEAD_DIM == 0, "whole rows of memory");
    constexpr int UNITS = DQ_COLUMNS / 16, COUNT = 2 * DQ_TILES * UNITS;
    lane = int(opaque(u32(lane)));
    const int row = dq.query + part.row + lane / 4;
    const u32 stride = u32(p.dq.row);
    float *to = dq.from + i64((row & ~7) + part.column * 8 / HEAD_DIM) * p.dq.row;
    UNROLL for (int n = 0; n < COUNT; ++n) {
        const int eight = n / UNITS, j = n % UNITS, e = eight % 2 * 2;
        if (n * steps / COUNT == step) {
            const float(&left)[4] = c[eight / 2][2 * j], (&right)[4] = c[eight / 2][2 * j + 1];
            const float x[4] = {left[e], left[e + 1], right[e], right[e + 1]};
            UNROLL for (int i = 0; i < 4; i += ADD_WIDTH)
                add_global_units(to + sum_offset<HEAD_DIM>(stride, j, (row & 7) * 4 + lane % 4, i), x + i,
                                 row + 8 * eight < dq.end);
        }
        if (j == UNITS - 1) to += 8 * stride;
    }
#else
    if (step > 0) return;
    const int quad = lane % 4, valid = dq.end - dq.query - part.row;
    const int dim = (EXACT ? HEAD_DIM : p.problem.head_dim) - part.column;
    const i64 stride = p.dq.row;
    const float scale = p.problem.scale;
    float *const from = dq.from + (dq.query + part.row) * stride + part.column;
    UNROLL for (int mt = 0; mt < DQ_TILES; ++mt) {
#if ALIGNED
        // The four lanes of a row add 32 neighbouring bytes.
        UNROLL for (int half = 0; half < 2; ++half) {
            const int row = 16 * mt + lane / 4 + 8 * half, column = 2 * quad;
            float *to = from + row * stride + column;
            UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j)
                add_global2(to + 8 * j, c[mt][j][2 * half] * scale, c[mt][j][2 * half + 1] * scale,
                            row < valid && (EXACT || column + 8 * j < dim));
        }
#else
        UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                int row = 16 * mt + lane / 4 + 8 * (e / 2), column = 8 * j + 2 * quad + e % 2;
                if (row < valid && column < dim) add_global(from + row * stride + column, c[mt][j][e] * scale);
            }
#endif
    }
#endif
}
#endif

template <int COLS>
DEVICE void store_gradient(const Tensor &g, const Tile &t, u32 kv, int row, int column, int dim, float scale, bool add,
                           const float (&c)[K_TILES][COLS / 8][4]) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int half = 0; half < 2; ++half) {
            int r = row + 16 * kt + 8 * half;
            if (r >= int(t.rows)) continue;
            Gradient *to = at<Gradient>(g, t.batch, t.row0 + r, kv) + column;
            UNROLL for (int j = 0; j < COLS / 8; ++j) {
                float x = c[kt][j][2 * half] * scale, y = c[kt][j][2 * half + 1] * scale;
                int left = dim - column - 8 * j;
#if GRADIENT_F32
                float u = 0.0f, v = 0.0f;
                if (add) load_pair(to + 8 * j, u, v, left);
                x += u;
                y += v;
#endif
                store_pair(to + 8 * j, x, y, left);
            }
        }
}

// Writes or adds dK and dV. Everything is read anew: the loop needs the registers.
DEVICE void finish(const BackwardParams &p, const float (&dk)[K_TILES][COLUMNS / 8][4],
                   const float (&dv)[K_TILES][COLUMNS_V / 8][4]) {
    const Place where = place(p.problem, p.problem.kv_heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.problem.tiles)[where.tile];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp / KEY_WARPS;
    const int row = warp % KEY_WARPS * KEYS + lane / 4, column = lane % 4 * 2;
    const bool add_k = p.add & 1, add_v = p.add & 2;
    if (tile.count || !add_k)
        store_gradient<COLUMNS>(p.dk, tile, where.head, row, part * COLUMNS + column,
                                EXACT ? HEAD_DIM : p.problem.head_dim, p.problem.scale, add_k, dk);
    if (tile.count || !add_v)
        store_gradient<COLUMNS_V>(p.dv, tile, where.head, row, part * COLUMNS_V + column,
                                  EXACT ? HEAD_DIM_V : p.problem.head_dim_v, 1.0f, add_v, dv);
}

// To shared memory: lse in log2 units, +inf where P must be 0.
DEVICE void store_statistic(float *stats, float x) {
    if (threadIdx.x < BLOCK_M)
        stats[threadIdx.x] = x == -INFINITY_F ? INFINITY_F : x * LOG2E;
    else if (threadIdx.x < 2 * BLOCK_M)
        stats[threadIdx.x] = x;
}

KERNEL(THREADS, MIN_BLOCKS) attention_backward(PARAMS(BackwardParams) p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Piece *pieces = reinterpret_cast<const Piece *>(p.problem.pieces);
    const int lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP);
    const int key_warp = warp % KEY_WARPS, part = warp / KEY_WARPS;
    const u32 base = shared_address(memory), k_at = base, v_at = base + K_BYTES;
    float *stats = reinterpret_cast<float *>(memory + STATS_AT);
    Control &control = *reinterpret_cast<Control *>(memory + CONTROL_AT);

    Cursor next{NONE, 0, 0};
    float stat = 0.0f;
    {
        const Place where = place(p.problem, p.problem.kv_heads);
        const Tile tile = reinterpret_cast<const Tile *>(p.problem.tiles)[where.tile];
        const Heads range = heads_of(p.problem, where.head);
        if (tile.count && range.first < range.past) {
            next = {range.first, tile.first, pieces[tile.first].q0};
            load_tile<BLOCK_N, HEAD_DIM, THREADS>(k_at, at<const u16>(p.k, tile.batch, tile.row0, where.head), p.k.row,
                                                  tile.rows, EXACT ? HEAD_DIM : p.problem.head_dim, threadIdx.x);
            load_tile<BLOCK_N, HEAD_DIM_V, THREADS>(v_at, at<const u16>(p.v, tile.batch, tile.row0, where.head), p.v.row,
                                                    tile.rows, EXACT ? HEAD_DIM_V : p.problem.head_dim_v, threadIdx.x);
            stat = load_queries(p, tile.batch, next, pieces[next.piece].q1, base + Q_AT, base + O_AT);
            if (threadIdx.x == 0) {
                control.tile = tile;
                control.heads = range;
                control.now[0] = {pieces[next.piece], next.query, next.head};
            }
        }
    }
    copy_commit();

    float dk[K_TILES][COLUMNS / 8][4], dv[K_TILES][COLUMNS_V / 8][4];
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int e = 0; e < 4; ++e) {
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j) dk[kt][j][e] = 0.0f;
            UNROLL for (int j = 0; j < COLUMNS_V / 8; ++j) dv[kt][j][e] = 0.0f;
        }
    const u32 warp_k = k_at + offset<HEAD_DIM>(key_warp * KEYS, 0) + lane_offset_a<HEAD_DIM>(lane);
    const u32 warp_v = v_at + offset<HEAD_DIM_V>(key_warp * KEYS, 0) + lane_offset_a<HEAD_DIM_V>(lane);
    const int query_part = part % PARTS;
    const u32 own_s = offset<BLOCK_M>(key_warp * KEYS + lane / 4, query_part * QUERIES) + lane % 4 * 4;

    Context context{score_of(p.problem, next.head)};
#if ALIBI || DROPOUT
    u32 context_head = ~0u;
#endif
    u32 turn = 0;
    while (next.head != NONE) {
        const u32 stage = STAGES == 2 ? turn & 1 : 0, other = STAGES == 2 ? stage ^ 1 : 0;
        const u32 q_at = base + Q_AT + stage * Q_BYTES, o_at = base + O_AT + stage * O_BYTES;
        store_statistic(stats, stat);
        copy_wait<0>();
        barrier();  // the block is here, and nobody is in an earlier turn any more
        const Now &now = control.now[turn & 1];
        const int warp_key = control.tile.row0 + key_warp * KEYS;
        const bool moved = advance(next, now.piece, pieces, control);
        int end = now.piece.q1;
        // Before the loads, which shared memory serves in order. Bit i: of chunk i.
        u32 seen = 0, masked = 0;
        UNROLL for (int chunk = 0; chunk < QUERIES / CHUNK_M; ++chunk) {
            const Piece &piece = now.piece;
            const int query = now.query + query_part * QUERIES + chunk * CHUNK_M;
            const int least = warp_key - (query + CHUNK_M - 1), most = warp_key + KEYS - 1 - query;
            const bool sees = least <= piece.hi && most >= piece.lo && warp_key < piece.k1 && warp_key + KEYS > piece.k0 &&
                              query < piece.q1;
            const bool cut = least < piece.lo || most > piece.hi || warp_key < piece.k0 || warp_key + KEYS > piece.k1;
            seen |= u32(sees) << chunk;
            masked |= u32(cut) << chunk;
        }
        if (next.head != NONE) {
            if (moved) end = pieces[next.piece].q1;
            if (threadIdx.x == 0)
                control.now[turn & 1 ^ 1] = {moved ? pieces[next.piece] : now.piece, next.query, next.head};
        }
#if ALIBI || DROPOUT
        if (now.head != context_head) {
            context_head = now.head;
            context.score = score_of(p.problem, context_head);
#if DROPOUT
            context.dropout = dropout_of(p.problem, control.tile.batch, context_head);
#endif
        }
#endif

#if APART
        const int row = query_part * QUERIES;
        const u32 ds_at = base + DS_AT + own_s, p_at = base + P_AT + own_s;
        const bool scores = part < PARTS;  // the others have dP
        Chunk c;
        if (seen) {
            const u32 b = (scores ? q_at : o_at) + offset<HEAD_DIM>(row, 0) + lane_offset_b<HEAD_DIM>(lane);
            UNROLL for (int kk = 0; kk < HEAD_DIM / 16; ++kk) product_step<HEAD_DIM>(c, scores ? warp_k : warp_v, b, kk);
        }
        if (scores && seen) {
            probabilities(c, context, now.piece, {warp_key + lane / 4, now.query + row + lane % 4 * 2},
                          stats + row + lane % 4 * 2, masked);
            store_chunk(c, p_at);
        } else if (scores) {
            store_zeros(p_at);
        }
#else
        UNROLL for (int chunk = 0; chunk < QUERIES / CHUNK_M; ++chunk) {
            const int row = query_part * QUERIES + chunk * CHUNK_M;
            const u32 ds_at = shifted<BLOCK_M>(base + DS_AT + own_s, 0, chunk * CHUNK_M);
            const u32 p_at = shifted<BLOCK_M>(base + P_AT + own_s, 0, chunk * CHUNK_M);
            if (seen >> chunk & 1) {
                Chunk s, ds;
                const u32 lane_q = q_at + offset<HEAD_DIM>(row, 0) + lane_offset_b<HEAD_DIM>(lane);
                const u32 lane_o = o_at + offset<HEAD_DIM_V>(row, 0) + lane_offset_b<HEAD_DIM_V>(lane);
                // The two products are independent: side by side they hide each other's latency, if registers allow.
                constexpr int STEPS = HEAD_DIM / 16, STEPS_V = HEAD_DIM_V / 16;
                UNROLL for (int kk = 0; kk < STEPS; ++kk) {
                    product_step<HEAD_DIM>(s, warp_k, lane_q, kk);
                    if (SIDE_BY_SIDE && kk < STEPS_V) product_step<HEAD_DIM_V>(ds, warp_v, lane_o, kk);
                }
                UNROLL for (int kk = SIDE_BY_SIDE ? STEPS : 0; kk < STEPS_V; ++kk)
                    product_step<HEAD_DIM_V>(ds, warp_v, lane_o, kk);
                const LaneAt lane_at{warp_key + lane / 4, now.query + row + lane % 4 * 2};
                differentiate(s, ds, context, now.piece, lane_at, stats + row + lane % 4 * 2, masked >> chunk & 1);
                if (DQ || SPLIT > 1) store_chunk(ds, ds_at);
                if (SPLIT > 1) store_chunk(s, p_at);
                if (SPLIT == 1) {
                    UNROLL for (int i = 0; i < CHUNK_M / 16; ++i) {
                        u32 a[K_TILES][4];
                        UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_a(a[kt], s[kt][2 * i], s[kt][2 * i + 1]);
                        gather16<HEAD_DIM_V, COLUMNS_V>(
                            dv, a, shifted<HEAD_DIM_V>(o_at + lane_offset_a<HEAD_DIM_V>(lane), row + 16 * i, 0));
                        UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_a(a[kt], ds[kt][2 * i], ds[kt][2 * i + 1]);
                        gather16<HEAD_DIM, COLUMNS>(
                            dk, a, shifted<HEAD_DIM>(q_at + lane_offset_a<HEAD_DIM>(lane), row + 16 * i, 0));
                    }
                }
            } else if (DQ || SPLIT > 1) {
                store_zeros(ds_at);
                if (SPLIT > 1) store_zeros(p_at);
            }
        }
#endif
        // After the two products, which these loads would hold up.
        if (STAGES == 2) {
            if (next.head != NONE)
                stat = load_queries(p, control.tile.batch, next, end, base + Q_AT + other * Q_BYTES,
                                    base + O_AT + other * O_BYTES);
            copy_commit();
        }
        barrier();  // dS (and P) are there; row statistics, and with STAGES = 1 Q and dout, may be overwritten
#if APART
        if (!scores && seen) {
            derivatives(c, p_at, stats + BLOCK_M + row + lane % 4 * 2);
            store_chunk(c, ds_at);
        } else if (!scores) {
            store_zeros(ds_at);
        }
#endif
        if (SPLIT > 1) {
            const int lane_now = int(opaque(u32(lane)));  // no address is kept over turns: the loop needs the registers
            u32 warp_s = base + offset<BLOCK_M>(key_warp * KEYS, 0) + lane_offset_a<BLOCK_M>(lane_now);
            const u32 lane_o = shifted<HEAD_DIM_V>(o_at + lane_offset_a<HEAD_DIM_V>(lane), 0, part * COLUMNS_V);
            const u32 lane_q = shifted<HEAD_DIM>(q_at + lane_offset_a<HEAD_DIM>(lane), 0, part * COLUMNS);
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
                u32 a[K_TILES][4];
                UNROLL for (int kt = 0; kt < K_TILES; ++kt)
                    load_matrices(a[kt], shifted<BLOCK_M>(warp_s + P_AT, 16 * kt, 16 * i));
                gather16<HEAD_DIM_V, COLUMNS_V>(dv, a, shifted<HEAD_DIM_V>(lane_o, 16 * i, 0));
            }
            if (APART) barrier();  // dS is there
#if DQ
            Sums sums;
            constexpr int STEPS = BLOCK_M / 16 / DQ_TURNS;
#endif
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
#if DQ
                if (BETWEEN && i % STEPS == 0) dq_products(sums, base, dq_part(warp, i / STEPS, 0), lane);
#endif
                u32 a[K_TILES][4];
                if (BETWEEN)
                    warp_s = base + offset<BLOCK_M>(key_warp * KEYS, 0) + lane_offset_a<BLOCK_M>(int(opaque(u32(lane))));
                UNROLL for (int kt = 0; kt < K_TILES; ++kt)
                    load_matrices(a[kt], shifted<BLOCK_M>(warp_s + DS_AT, 16 * kt, 16 * i));
                gather16<HEAD_DIM, COLUMNS>(dk, a, shifted<HEAD_DIM>(lane_q, 16 * i, 0));
#if DQ
                if (BETWEEN) add_sums(p, sums, dq_rows(p, control, now), dq_part(warp, i / STEPS, 0), lane, i % STEPS, STEPS);
#endif
            }
            if (STAGES == 1) barrier();
        }
        if (STAGES == 1) {
            if (next.head != NONE)
                stat = load_queries(p, control.tile.batch, next, end, base + Q_AT, base + O_AT);
            copy_commit();
        }
#if DQ
        if (!BETWEEN) {
            UNROLL for (int i = 0; i < DQ_PARTS; ++i) {
                const DqPart part_now = dq_part(warp, 0, i);
                Sums c;
                dq_products(c, base, part_now, lane);
                add_sums(p, c, dq_rows(p, control, now), part_now, lane, 0, 1);
            }
        }
#endif
        ++turn;
    }
    copy_wait<0>();
    finish(p, dk, dv);
}
