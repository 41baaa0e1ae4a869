// dQ of the attention backward without atomics, on tensor cores: the deterministic mode's second launch.
//
//   p = exp(x - lse)      ds = p (keep / (1 - drop) * dout v^T - delta) (1 - (x0 / softcap)^2)      dq = scale ds k
//
//   one block = one query tile of one head; Q and dout stay in shared memory, dQ in registers
//     for each block of BLOCK_N keys of the tile's pieces (the next block travels meanwhile, with STAGES = 2):
//         S = Q K^T; dP = dout V^T; dS = P (dP - delta); dQ += dS K
//     write or add dQ
//
// Macros: WARPS (16 query rows each), BLOCK_N, STAGES, GRADIENT_F32.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq, dk, dv;
    u32 add;  // bit 2: dq is added to
    u32 unused;
};
static_assert(sizeof(BackwardParams) == 416, "layout");

constexpr int THREADS = WARPS * 32, BLOCK_M = WARPS * 16;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2, O_BYTES = BLOCK_M * pitch<HEAD_DIM_V>() * 2;
constexpr u32 K_BYTES = BLOCK_N * pitch<HEAD_DIM>() * 2, V_BYTES = BLOCK_N * pitch<HEAD_DIM_V>() * 2;
static_assert(Q_BYTES + O_BYTES + STAGES * (K_BYTES + V_BYTES) == SHARED_BYTES, "shared memory");

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Block[BLOCK_N / 8][4];

struct Cursor {
    u32 piece, end;
    int key;
};
DEVICE void advance(Cursor &at, const Piece *pieces) {
    at.key += BLOCK_N;
    if (at.key >= pieces[at.piece].k1 && ++at.piece < at.end) at.key = pieces[at.piece].k0;
}

DEVICE void load_keys(const BackwardParams &p, const u16 *k, const u16 *v, const Piece &s, int key, u32 to_k, u32 to_v) {
    int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    load_tile<BLOCK_N, HEAD_DIM, THREADS>(to_k, k + key * p.k.row, p.k.row, s.k1 - key, dim, threadIdx.x);
    load_tile<BLOCK_N, HEAD_DIM_V, THREADS>(to_v, v + key * p.v.row, p.v.row, s.k1 - key, dim_v, threadIdx.x);
}

template <int DIM> DEVICE void product(Block &c, u32 a, u32 b) {
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk) {
        u32 x[4];
        load_matrices(x, shifted<DIM>(a, 0, kk * 16));
        UNROLL for (int j = 0; j < BLOCK_N / 16; ++j) {
            u32 y[4];
            load_matrices(y, shifted<DIM>(b, j * 16, kk * 16));
            mma(c[2 * j], x, y[0], y[1], kk == 0);
            mma(c[2 * j + 1], x, y[2], y[3], kk == 0);
        }
    }
}

struct Context {
    Score score;
    float lse[2], delta[2];  // of rows `row` and `row + 8`, lse in log2 units, +inf where P must be 0
    int row;
#if DROPOUT
    Dropout dropout;
#endif
};

// dP becomes dS. `key` is this lane's first key.
DEVICE void differentiate(Block &s, Block &dp, const Context &x, const Piece &piece, int key) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = x.row + 8 * half;
        UNROLL for (int j = 0; j < BLOCK_N / 8; ++j)
            UNROLL for (int e = 0; e < 2; ++e) {
                const int c = key + 8 * j + e;
                float logit = s[j][2 * half + e], bent = 1.0f, keep = 1.0f;
#if TRANSFORM
                logit = transform(x.score, piece, logit, row, c, bent);
#endif
                const bool seen = c < piece.k1 && c - row >= piece.lo && c - row <= piece.hi;
                const float p = seen ? exp2_fast(logit * x.score.unit - x.lse[half]) : 0.0f;
#if DROPOUT
                keep = keep_factor(x.dropout, piece, row, c);
#endif
                dp[j][2 * half + e] = seen ? p * (dp[j][2 * half + e] * keep - x.delta[half]) * bent : 0.0f;
            }
    }
}

KERNEL(THREADS, 1) attention_backward_dq(PARAMS(BackwardParams) p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.problem.tiles)[where.tile];
    const bool add = p.add & 4;
    if (tile.count == 0 && add) return;
    const Piece *pieces = reinterpret_cast<const Piece *>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head);
    const int lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP);
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const u16 *k = at<const u16>(p.k, tile.batch, 0, kv), *v = at<const u16>(p.v, tile.batch, 0, kv);
    const u32 q_at = shared_address(memory), o_at = q_at + Q_BYTES, k_at = o_at + O_BYTES, v_at = k_at + STAGES * K_BYTES;

    Cursor next{tile.first, tile.first + tile.count, 0};
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(q_at, at<const u16>(p.q, tile.batch, tile.row0, head), p.q.row, tile.rows, dim,
                                          threadIdx.x);
    load_tile<BLOCK_M, HEAD_DIM_V, THREADS>(o_at, at<const u16>(p.dout, tile.batch, tile.row0, head), p.dout.row,
                                            tile.rows, dim_v, threadIdx.x);
    if (tile.count) {
        next.key = pieces[next.piece].k0;
        load_keys(p, k, v, pieces[next.piece], next.key, k_at, v_at);
    }
    copy_commit();

    const int first_row = tile.row0 + warp * 16, end_row = tile.row0 + tile.rows;
    Context context;
    context.score = score_of(p.problem, head);
    context.row = first_row + lane / 4;
#if DROPOUT
    context.dropout = dropout_of(p.problem, tile.batch, head);
#endif
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = context.row + 8 * half;
        float lse = row < end_row ? *at<const float>(p.lse, tile.batch, row, head) * LOG2E : INFINITY_F;
        context.lse[half] = lse == -INFINITY_F ? INFINITY_F : lse;
        context.delta[half] = row < end_row ? *at<const float>(p.delta, tile.batch, row, head) : 0.0f;
    }
    float dq[HEAD_DIM / 8][4];
    UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dq[j][e] = 0.0f;
    const u32 warp_q = q_at + offset<HEAD_DIM>(warp * 16, 0) + lane_offset_a<HEAD_DIM>(lane);
    const u32 warp_o = o_at + offset<HEAD_DIM_V>(warp * 16, 0) + lane_offset_a<HEAD_DIM_V>(lane);

    int stage = 0;
    while (next.piece < next.end) {
        const Piece &piece = pieces[next.piece];
        const int key = next.key, last_key = key + BLOCK_N - 1;
        const u32 keys = k_at + stage * K_BYTES, values = v_at + stage * V_BYTES;
        copy_wait<0>();
        barrier();
        advance(next, pieces);
        if (STAGES == 2) {
            stage ^= 1;
            if (next.piece < next.end)
                load_keys(p, k, v, pieces[next.piece], next.key, k_at + stage * K_BYTES, v_at + stage * V_BYTES);
            copy_commit();
        }
        if (key - (first_row + 15) <= piece.hi && last_key - first_row >= piece.lo && first_row < end_row) {
            Block s, ds;
            product<HEAD_DIM>(s, warp_q, keys + lane_offset_b<HEAD_DIM>(lane));
            product<HEAD_DIM_V>(ds, warp_o, values + lane_offset_b<HEAD_DIM_V>(lane));
            differentiate(s, ds, context, piece, key + lane % 4 * 2);
            UNROLL for (int i = 0; i < BLOCK_N / 16; ++i) {
                u32 a[4];
                as_a(a, ds[2 * i], ds[2 * i + 1]);
                UNROLL for (int j = 0; j < HEAD_DIM / 16; ++j) {
                    u32 b[4];
                    load_matrices_transposed(b, shifted<HEAD_DIM>(keys + lane_offset_a<HEAD_DIM>(lane), i * 16, j * 16));
                    mma(dq[2 * j], a, b[0], b[1]);
                    mma(dq[2 * j + 1], a, b[2], b[3]);
                }
            }
        }
        if (STAGES == 1) {
            barrier();
            if (next.piece < next.end) load_keys(p, k, v, pieces[next.piece], next.key, k_at, v_at);
            copy_commit();
        }
    }
    copy_wait<0>();

    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = context.row + 8 * half, column = lane % 4 * 2;
        if (row >= end_row) continue;
        Gradient *to = at<Gradient>(p.dq, tile.batch, row, head) + column;
        UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) {
            float x = dq[j][2 * half] * p.problem.scale, y = dq[j][2 * half + 1] * p.problem.scale;
#if GRADIENT_F32
            float u = 0.0f, w = 0.0f;
            if (add) load_pair(to + 8 * j, u, w, dim - column - 8 * j);
            x += u;
            y += w;
#endif
            store_pair(to + 8 * j, x, y, dim - column - 8 * j);
        }
    }
}
