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
//         dS^T to shared memory; dQ = dS K is added to f32 memory by atomics
//     write or add dK and dV
//
// Keys are the row side of every product, so that P^T and dS^T need no trip through shared memory. With SPLIT = 2 (large
// heads) two warps share 16 keys: each computes half of the queries, and after an exchange through shared memory half of
// the columns of dK and dV. Each KV head's query heads are summed here, in order: no atomics but those of dQ, and none in
// the deterministic mode (DQ = 0), where sm80_attention_backward_dq.cu computes dQ. (Dao, FlashAttention-2, 2023.)
//
// Macros: KEY_WARPS, SPLIT, K_TILES (keys of a warp / 16), BLOCK_M, CHUNK_M (queries a warp takes at once), STAGES,
// DQ_WARPS_M (warps along the queries of dQ), DQ, GRADIENT_F32, MIN_BLOCKS.

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
constexpr int QUERIES = BLOCK_M / SPLIT;  // of a warp, in S and dP
constexpr int COLUMNS = HEAD_DIM / SPLIT, COLUMNS_V = HEAD_DIM_V / SPLIT;
constexpr u32 K_BYTES = BLOCK_N * pitch<HEAD_DIM>() * 2, V_BYTES = BLOCK_N * pitch<HEAD_DIM_V>() * 2;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2, O_BYTES = BLOCK_M * pitch<HEAD_DIM_V>() * 2;
constexpr u32 S_BYTES = BLOCK_N * pitch<BLOCK_M>() * 2;
constexpr u32 Q_AT = K_BYTES + V_BYTES, O_AT = Q_AT + STAGES * Q_BYTES, DS_AT = O_AT + STAGES * O_BYTES;
constexpr u32 P_AT = DS_AT + (DQ || SPLIT > 1 ? S_BYTES : 0), STATS_AT = P_AT + (SPLIT > 1 ? S_BYTES : 0);
static_assert(STATS_AT + 2 * BLOCK_M * 4 == SHARED_BYTES, "shared memory");
static_assert(2 * BLOCK_M <= THREADS && QUERIES % CHUNK_M == 0 && CHUNK_M % 16 == 0, "tiles");

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Chunk[K_TILES][CHUNK_M / 8][4];

// C = A B^T with A from rows of `a` and B from rows of `b`, over DIM columns.
template <int DIM> DEVICE void product(Chunk &c, u32 a, u32 b) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int j = 0; j < CHUNK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) c[kt][j][e] = 0.0f;
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk) {
        u32 x[K_TILES][4];
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) load_matrices(x[kt], a + offset<DIM>(kt * 16, kk * 16));
        UNROLL for (int j = 0; j < CHUNK_M / 16; ++j) {
            u32 y[4];
            load_matrices(y, b + offset<DIM>(j * 16, kk * 16));
            UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
                mma(c[kt][2 * j], x[kt], y[0], y[1]);
                mma(c[kt][2 * j + 1], x[kt], y[2], y[3]);
            }
        }
    }
}

// acc += A B for 16 queries: A (keys x queries) in registers, B the rows of `b`, COLS columns of rows of DIM.
template <int DIM, int COLS> DEVICE void gather16(float (&acc)[K_TILES][COLS / 8][4], const u32 (&a)[K_TILES][4], u32 b) {
    UNROLL for (int j = 0; j < COLS / 16; ++j) {
        u32 y[4];
        load_matrices_transposed(y, b + offset<DIM>(0, j * 16));
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
            mma(acc[kt][2 * j], a[kt], y[0], y[1]);
            mma(acc[kt][2 * j + 1], a[kt], y[2], y[3]);
        }
    }
}

// The position in the list of (query head, piece, first query row) blocks.
struct Cursor {
    u32 head, piece;
    int query;
};
DEVICE void advance(Cursor &at, const Piece *pieces, const Tile &t) {
    at.query += BLOCK_M;
    if (at.query < pieces[at.piece].q1) return;
    if (++at.piece == t.first + t.count) {
        at.piece = t.first;
        ++at.head;
    }
    at.query = pieces[at.piece].q0;
}

// Starts loading one block of Q and dout, and returns this thread's row statistic: thread i < BLOCK_M that of lse of row i
// (in log2 units; +inf where P must be 0), the next BLOCK_M threads that of delta.
DEVICE float load_queries(const BackwardParams &p, u32 batch, const Cursor &c, const Piece &s, u32 q, u32 o) {
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const int valid = s.q1 - c.query, thread = threadIdx.x, row = thread % BLOCK_M;
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(q, at<const u16>(p.q, batch, c.query, c.head), p.q.row, valid, dim, thread);
    load_tile<BLOCK_M, HEAD_DIM_V, THREADS>(o, at<const u16>(p.dout, batch, c.query, c.head), p.dout.row, valid, dim_v,
                                            thread);
    if (thread < BLOCK_M) {
        float lse = row < valid ? *at<const float>(p.lse, batch, c.query + row, c.head) * LOG2E : INFINITY_F;
        return lse == -INFINITY_F ? INFINITY_F : lse;
    }
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

// A chunk to [key][query] in shared memory.
DEVICE void store_chunk(const Chunk &c, u32 to) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int j = 0; j < CHUNK_M / 8; ++j)
            UNROLL for (int half = 0; half < 2; ++half)
                store_shared(to + offset<BLOCK_M>(16 * kt + 8 * half, 8 * j),
                             pack2(c[kt][j][2 * half], c[kt][j][2 * half + 1]));
}

#if DQ
constexpr int DQ_WARPS_N = WARPS / DQ_WARPS_M;
constexpr int DQ_TILES = BLOCK_M / DQ_WARPS_M / 16, DQ_COLUMNS = HEAD_DIM / DQ_WARPS_N;
static_assert(DQ_TILES * DQ_WARPS_M * 16 == BLOCK_M && DQ_COLUMNS % 16 == 0, "dq tiles");

// Adds this warp's part of scale * dS K to `dq`, the row of the block's first query.
DEVICE void add_dq(const BackwardParams &p, float *dq, int valid, u32 ds, u32 k, int warp, int lane) {
    const int row0 = warp / DQ_WARPS_N * DQ_TILES * 16, column0 = warp % DQ_WARPS_N * DQ_COLUMNS;
    float c[DQ_TILES][DQ_COLUMNS / 8][4];
    UNROLL for (int mt = 0; mt < DQ_TILES; ++mt)
        UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) c[mt][j][e] = 0.0f;
    ds += offset<BLOCK_M>(0, row0) + lane_offset_b<BLOCK_M>(lane);
    k += offset<HEAD_DIM>(0, column0) + lane_offset_a<HEAD_DIM>(lane);
    UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk) {
        u32 a[DQ_TILES][4];
        UNROLL for (int mt = 0; mt < DQ_TILES; ++mt)
            load_matrices_transposed(a[mt], ds + offset<BLOCK_M>(kk * 16, mt * 16));
        UNROLL for (int j = 0; j < DQ_COLUMNS / 16; ++j) {
            u32 b[4];
            load_matrices_transposed(b, k + offset<HEAD_DIM>(kk * 16, j * 16));
            UNROLL for (int mt = 0; mt < DQ_TILES; ++mt) {
                mma(c[mt][2 * j], a[mt], b[0], b[1]);
                mma(c[mt][2 * j + 1], a[mt], b[2], b[3]);
            }
        }
    }
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, quad = lane % 4;
    const float scale = p.problem.scale;
    UNROLL for (int mt = 0; mt < DQ_TILES; ++mt) {
#if ALIGNED
        // Neighbouring lanes exchange halves, so that each adds 16 bytes of one row: even lanes of row g, odd of g + 8.
        const int row = row0 + 16 * mt + lane / 4 + quad % 2 * 8, column = column0 + quad / 2 * 4;
        float *to = dq + row * p.dq.row + column;
        UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j) {
            float(&x)[4] = c[mt][j];
            float u = shuffle_xor(quad % 2 ? x[0] : x[2], 1), v = shuffle_xor(quad % 2 ? x[1] : x[3], 1);
            if (row >= valid || (!EXACT && column + 8 * j >= dim)) continue;
            if (quad % 2)
                add_global4(to + 8 * j, u * scale, v * scale, x[2] * scale, x[3] * scale);
            else
                add_global4(to + 8 * j, x[0] * scale, x[1] * scale, u * scale, v * scale);
        }
#else
        UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                int row = row0 + 16 * mt + lane / 4 + 8 * (e / 2), column = column0 + 8 * j + 2 * quad + e % 2;
                if (row < valid && column < dim) add_global(dq + row * p.dq.row + column, c[mt][j][e] * scale);
            }
#endif
    }
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

KERNEL(THREADS, MIN_BLOCKS) attention_backward(PARAMS(BackwardParams) p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Place where = place(p.problem, p.problem.kv_heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.problem.tiles)[where.tile];
    const Piece *pieces = reinterpret_cast<const Piece *>(p.problem.pieces);
    const u32 kv = where.head;
    const int lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP);
    const int key_warp = warp % KEY_WARPS, part = warp / KEY_WARPS;
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const u32 base = shared_address(memory), k_at = base, v_at = base + K_BYTES;
    float *stats = reinterpret_cast<float *>(memory + STATS_AT);

    // Local query heads of this KV head.
    const int first_head = int((p.problem.kv_first + kv) * p.problem.group) - int(p.problem.head_first);
    const u32 head0 = first_head > 0 ? first_head : 0;
    const int past = first_head + int(p.problem.group);
    const u32 heads = past < int(p.problem.heads) ? (past > 0 ? past : 0) : p.problem.heads;
    Cursor next{tile.count ? head0 : heads, tile.first, 0};

    float stat = 0.0f;
    if (next.head < heads) {
        next.query = pieces[next.piece].q0;
        load_tile<BLOCK_N, HEAD_DIM, THREADS>(k_at, at<const u16>(p.k, tile.batch, tile.row0, kv), p.k.row, tile.rows,
                                              dim, threadIdx.x);
        load_tile<BLOCK_N, HEAD_DIM_V, THREADS>(v_at, at<const u16>(p.v, tile.batch, tile.row0, kv), p.v.row, tile.rows,
                                                dim_v, threadIdx.x);
        stat = load_queries(p, tile.batch, next, pieces[next.piece], base + Q_AT, base + O_AT);
    }
    copy_commit();

    float dk[K_TILES][COLUMNS / 8][4], dv[K_TILES][COLUMNS_V / 8][4];
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int e = 0; e < 4; ++e) {
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j) dk[kt][j][e] = 0.0f;
            UNROLL for (int j = 0; j < COLUMNS_V / 8; ++j) dv[kt][j][e] = 0.0f;
        }
    const int warp_key = tile.row0 + key_warp * KEYS;
    const u32 warp_k = k_at + offset<HEAD_DIM>(key_warp * KEYS, 0) + lane_offset_a<HEAD_DIM>(lane);
    const u32 warp_v = v_at + offset<HEAD_DIM_V>(key_warp * KEYS, 0) + lane_offset_a<HEAD_DIM_V>(lane);
    const u32 own_s = offset<BLOCK_M>(key_warp * KEYS + lane / 4, part * QUERIES + lane % 4 * 2);

    Context context{score_of(p.problem, head0)};
    u32 context_head = ~0u;
    int stage = 0;
    while (next.head < heads) {
        const Cursor now = next;
        const Piece &piece = pieces[now.piece];
        if (now.head != context_head) {
            context_head = now.head;
            context.score = score_of(p.problem, now.head);
#if DROPOUT
            context.dropout = dropout_of(p.problem, tile.batch, now.head);
#endif
        }
        if (threadIdx.x < 2 * BLOCK_M) stats[threadIdx.x] = stat;
        copy_wait<0>();
        barrier();
        const u32 q_at = base + Q_AT + stage * Q_BYTES, o_at = base + O_AT + stage * O_BYTES;
        advance(next, pieces, tile);
        if (STAGES == 2) {
            stage ^= 1;
            if (next.head < heads)
                stat = load_queries(p, tile.batch, next, pieces[next.piece], base + Q_AT + stage * Q_BYTES,
                                    base + O_AT + stage * O_BYTES);
            copy_commit();
        }

        UNROLL for (int chunk = 0; chunk < QUERIES / CHUNK_M; ++chunk) {
            const int row = part * QUERIES + chunk * CHUNK_M, query = now.query + row;
            const int least = warp_key - (query + CHUNK_M - 1), most = warp_key + KEYS - 1 - query;
            const bool sees = least <= piece.hi && most >= piece.lo && warp_key < piece.k1 && warp_key + KEYS > piece.k0 &&
                              query < piece.q1;
            const u32 ds_at = base + DS_AT + own_s + u32(chunk * CHUNK_M) * 2;
            const u32 p_at = base + P_AT + own_s + u32(chunk * CHUNK_M) * 2;
            if (sees) {
                const bool masked = least < piece.lo || most > piece.hi || warp_key < piece.k0 || warp_key + KEYS > piece.k1;
                Chunk s, ds;
                product<HEAD_DIM>(s, warp_k, q_at + offset<HEAD_DIM>(row, 0) + lane_offset_b<HEAD_DIM>(lane));
                product<HEAD_DIM_V>(ds, warp_v, o_at + offset<HEAD_DIM_V>(row, 0) + lane_offset_b<HEAD_DIM_V>(lane));
                differentiate(s, ds, context, piece, {warp_key + lane / 4, query + lane % 4 * 2}, stats + row + lane % 4 * 2,
                              masked);
                if (DQ || SPLIT > 1) store_chunk(ds, ds_at);
                if (SPLIT > 1) store_chunk(s, p_at);
                if (SPLIT == 1) {
                    UNROLL for (int i = 0; i < CHUNK_M / 16; ++i) {
                        u32 a[K_TILES][4];
                        UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_a(a[kt], s[kt][2 * i], s[kt][2 * i + 1]);
                        gather16<HEAD_DIM_V, COLUMNS_V>(
                            dv, a, o_at + offset<HEAD_DIM_V>(row + 16 * i, 0) + lane_offset_a<HEAD_DIM_V>(lane));
                        UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_a(a[kt], ds[kt][2 * i], ds[kt][2 * i + 1]);
                        gather16<HEAD_DIM, COLUMNS>(
                            dk, a, q_at + offset<HEAD_DIM>(row + 16 * i, 0) + lane_offset_a<HEAD_DIM>(lane));
                    }
                }
            } else if (DQ || SPLIT > 1) {
                UNROLL for (int kt = 0; kt < 2 * K_TILES; ++kt)
                    UNROLL for (int j = 0; j < CHUNK_M / 8; ++j) {
                        store_shared(ds_at + offset<BLOCK_M>(8 * kt, 8 * j), 0);
                        if (SPLIT > 1) store_shared(p_at + offset<BLOCK_M>(8 * kt, 8 * j), 0);
                    }
            }
        }
        if (DQ || SPLIT > 1 || STAGES == 1) barrier();
        if (SPLIT > 1) {
            const u32 warp_s = offset<BLOCK_M>(key_warp * KEYS, 0) + lane_offset_a<BLOCK_M>(lane);
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
                u32 a[K_TILES][4];
                UNROLL for (int kt = 0; kt < K_TILES; ++kt)
                    load_matrices(a[kt], base + P_AT + warp_s + offset<BLOCK_M>(16 * kt, 16 * i));
                gather16<HEAD_DIM_V, COLUMNS_V>(
                    dv, a, o_at + offset<HEAD_DIM_V>(16 * i, part * COLUMNS_V) + lane_offset_a<HEAD_DIM_V>(lane));
                UNROLL for (int kt = 0; kt < K_TILES; ++kt)
                    load_matrices(a[kt], base + DS_AT + warp_s + offset<BLOCK_M>(16 * kt, 16 * i));
                gather16<HEAD_DIM, COLUMNS>(
                    dk, a, q_at + offset<HEAD_DIM>(16 * i, part * COLUMNS) + lane_offset_a<HEAD_DIM>(lane));
            }
            if (STAGES == 1) barrier();
        }
        if (STAGES == 1) {
            if (next.head < heads)
                stat = load_queries(p, tile.batch, next, pieces[next.piece], base + Q_AT, base + O_AT);
            copy_commit();
        }
#if DQ
        add_dq(p, at<float>(p.dq, tile.batch, now.query, now.head), piece.q1 - now.query, base + DS_AT, k_at, warp, lane);
#endif
    }
    copy_wait<0>();

    const int row = key_warp * KEYS + lane / 4, column = part * COLUMNS + lane % 4 * 2;
    const bool add_k = p.add & 1, add_v = p.add & 2;
    if (tile.count || !add_k) store_gradient<COLUMNS>(p.dk, tile, kv, row, column, dim, p.problem.scale, add_k, dk);
    if (tile.count || !add_v)
        store_gradient<COLUMNS_V>(p.dv, tile, kv, row, part * COLUMNS_V + lane % 4 * 2, dim_v, 1.0f, add_v, dv);
}
