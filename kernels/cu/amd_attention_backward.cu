// Attention backward over slices on AMD's matrix units (16-bit elements, f32 accumulation): every lane owns a key.
//
//   p = exp(x - lse)      dp = keep / (1 - drop) * dout v^T      ds = p (dp - delta) (1 - (x0 / softcap)^2)
//   dv = (keep / (1 - drop) p)^T dout      dk = scale ds^T q      dq = scale ds k
//
//   one block = one key tile of one KV head; dK and dV stay in registers, K and V in shared memory, or in registers with HELD
//     (then what is read by columns lies in quads: K, for dQ; Q and dout beside their rows)
//     for each query head of the KV head, each piece, each block of BLOCK_M queries: Q and dout from registers to shared
//     memory, those of the next block to registers
//         for each 16 of the queries: S = Q K^T; P = exp2(S - lse), 0 outside the band; dP = dout V^T; dS = P (dP - delta)
//             dV^T += dout^T P; dK^T += Q^T dS                          (a product's columns are the lines of an operand)
//         dS to shared memory; dQ^T = K^T dS^T is added to f32 memory by atomics
//     write or add dK and dV
//
// A wave owns K_TILES times 16 keys. With SPLIT > 1 (large heads) several waves own the same keys: each computes their S, and
// its part of the columns of dK and dV. Each KV head's query heads are summed here, in order: no atomics but those of dQ, and
// none in the deterministic mode (DQ = 0), where amd_attention_backward_dq.cu computes dQ.
//
// Macros: KEY_WAVES, SPLIT, K_TILES, BLOCK_M, HELD, DQ, GRADIENT_F32.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq;      // f32, added to
    Tensor dk, dv;  // f32 with GRADIENT_F32, otherwise the I/O dtype
    u32 add;        // bit 0: dk is added to, bit 1: dv is, bit 2: dq is (used by the dq kernel)
    u32 unused;
};
static_assert(sizeof(BackwardParams) == 416, "layout");

constexpr int WAVES = KEY_WAVES * SPLIT, THREADS = WAVES * WARP;
constexpr int KEYS = 16 * K_TILES, BLOCK_N = KEY_WAVES * KEYS;  // of a wave, of the block
constexpr int COLUMNS = HEAD_DIM / SPLIT, COLUMNS_V = HEAD_DIM_V / SPLIT;
template <int ROWS, int DIM> CONSTEXPR u32 row_bytes() { return ROWS * pitch<DIM>() * 2; }
template <int ROWS, int DIM> CONSTEXPR u32 quad_bytes() { return HELD ? ROWS * DIM * 2 : 0; }
constexpr u32 K_BYTES = HELD ? quad_bytes<DQ ? BLOCK_N : 0, HEAD_DIM>() : row_bytes<BLOCK_N, HEAD_DIM>();
constexpr u32 V_BYTES = HELD ? 0 : row_bytes<BLOCK_N, HEAD_DIM_V>();
constexpr u32 Q_AT = K_BYTES + V_BYTES, O_AT = Q_AT + row_bytes<BLOCK_M, HEAD_DIM>();
constexpr u32 Q_QUADS_AT = O_AT + row_bytes<BLOCK_M, HEAD_DIM_V>(), O_QUADS_AT = Q_QUADS_AT + quad_bytes<BLOCK_M, HEAD_DIM>();
constexpr u32 DS_AT = O_QUADS_AT + quad_bytes<BLOCK_M, HEAD_DIM_V>();
constexpr u32 STATS_AT = DS_AT + (DQ ? row_bytes<BLOCK_M, BLOCK_N>() : 0), BYTES = STATS_AT + 2 * BLOCK_M * 4;
// K and V pass through on their way to registers, one after the other.
constexpr u32 PASSING = HELD ? row_bytes<BLOCK_N, HEAD_DIM < HEAD_DIM_V ? HEAD_DIM_V : HEAD_DIM>() : 0;
static_assert((BYTES > PASSING ? BYTES : PASSING) == SHARED_BYTES && Q_QUADS_AT % 256 == 0, "shared memory");
static_assert(2 * BLOCK_M <= THREADS && BLOCK_M % 16 == 0 && COLUMNS % 16 == 0 && COLUMNS_V % 16 == 0, "tiles");

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef Product Pairs[K_TILES];
template <int DIM> using Keys = Operand[K_TILES][HELD ? DIM / 16 : 1];  // K or V of this wave
#if HELD
template <int DIM> using Queries = TravelByQuads<BLOCK_M, DIM, THREADS>;
#else
template <int DIM> using Queries = Travel<BLOCK_M, DIM, THREADS>;
#endif

// C = A B^T over DIM: 16 rows from `a`, this wave's rows in registers or from `b`.
template <int DIM> DEVICE void product(Pairs &c, u32 a, const Keys<DIM> &held, u32 b) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt) clear(c[kt]);
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk) {
        Operand x;
        load_operand(x, a + offset<DIM>(0, 16 * kk));
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
            Operand y;
            if (!HELD) load_operand(y, b + offset<DIM>(16 * kt, 16 * kk));
            multiply(c[kt], x, HELD ? held[kt][HELD ? kk : 0] : y);
        }
    }
}

// acc^T += A^T B for the 16 queries from `row` on: A by columns at `a`, COLS from `column` on; B (queries x keys) in registers.
template <int DIM, int COLS>
DEVICE void gather16(Product (&acc)[K_TILES][COLS / 16], const Operand (&b)[K_TILES], u32 a, int row, int column) {
    UNROLL for (int j = 0; j < COLS / 16; ++j) {
        Operand x;
        load_columns<HELD, DIM>(x, a, row, column + 16 * j);
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) multiply(acc[kt][j], x, b[kt]);
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

// A block of queries on its way: Q, dout, and this thread's row statistic: thread i < BLOCK_M has lse of row i in log2 units
// (+inf where P must be 0), the next BLOCK_M threads have delta.
struct Block {
    Queries<HEAD_DIM> q;
    Queries<HEAD_DIM_V> dout;
    float stat;

    DEVICE void load(const BackwardParams &p, u32 batch, const Cursor &c, int end) {
        const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
        const int valid = end - c.query, thread = threadIdx.x, row = thread % BLOCK_M;
        q.load(::at<const u16>(p.q, batch, c.query, c.head), p.q.row, valid, dim);
        dout.load(::at<const u16>(p.dout, batch, c.query, c.head), p.dout.row, valid, dim_v);
        stat = thread < BLOCK_M ? INFINITY_F : 0.0f;
        if (row >= valid || thread >= 2 * BLOCK_M) return;
        if (thread < BLOCK_M) {
            const float lse = *::at<const float>(p.lse, batch, c.query + row, c.head);
            stat = lse == -INFINITY_F ? INFINITY_F : lse * LOG2E;
        } else {
            stat = *::at<const float>(p.delta, batch, c.query + row, c.head);
        }
    }
    DEVICE void store(u32 base, float *stats) const {
        q.store(base + Q_AT);
        dout.store(base + O_AT);
#if HELD
        q.store_quads(base + Q_QUADS_AT);
        dout.store_quads(base + O_QUADS_AT);
#endif
        if (threadIdx.x < 2 * BLOCK_M) stats[threadIdx.x] = stat;
    }
};

// Where this lane's elements lie: key of kt is key + 16 kt, query of r is query + product_row(lane, r).
struct LaneAt {
    int lane, key, query;
};

struct Context {
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
};

// S becomes P (kept and scaled by dropout), dP becomes dS.
DEVICE void differentiate(Pairs &s, Pairs &dp, const Context &x, const Piece &piece, LaneAt at, const float *stats) {
    UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
        const int row = product_row(at.lane, r), query = at.query + row;
        const float lse = stats[row], delta = stats[BLOCK_M + row];
        UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
            const int key = at.key + 16 * kt;
            float logit = s[kt][r], bent = 1.0f, keep = 1.0f;
#if TRANSFORM
            logit = transform(x.score, piece, logit, query, key, bent);
#endif
            const bool seen = key >= piece.k0 && key < piece.k1 && key - query >= piece.lo && key - query <= piece.hi;
            const float p = seen ? exp2_fast(logit * x.score.unit - lse) : 0.0f;
#if DROPOUT
            keep = keep_factor(x.dropout, piece, query, key);
#endif
            dp[kt][r] = seen ? p * (dp[kt][r] * keep - delta) * bent : 0.0f;
            s[kt][r] = p * keep;
        }
    }
}

#if DQ
// dS to [query][key] in shared memory.
DEVICE void store_pairs(const Pairs &c, u32 to, int lane) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r)
            store_shared_16(to + offset<BLOCK_N>(product_row(lane, r), 16 * kt + lane % 16), narrow(c[kt][r]));
}

// Adds this wave's part of scale * dS K to `dq`, the row of the block's first query: 16 queries and 16 columns at a time.
DEVICE void add_dq(const BackwardParams &p, float *dq, int valid, u32 ds, u32 k, int wave, int lane) {
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim;
    constexpr int ACROSS = HEAD_DIM / 16, PARTS = BLOCK_M / 16 * ACROSS;
    for (int part = wave; part < PARTS; part += WAVES) {
        const int row0 = part / ACROSS * 16, column0 = part % ACROSS * 16;
        Product c;
        clear(c);
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk) {
            Operand x, y;
            load_columns<HELD, HEAD_DIM>(x, k + lane_by_columns<HELD, HEAD_DIM>(lane), 16 * kk, column0);
            load_operand(y, ds + lane_by_rows<BLOCK_N>(lane) + offset<BLOCK_N>(row0, 16 * kk));
            multiply(c, x, y);
        }
        const int row = row0 + lane % 16;
        float *to = dq + row * p.dq.row + column0;
        UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
            const int column = product_row(lane, r);
            if (row < valid && column0 + column < dim) add_global(to + column, c[r] * p.problem.scale);
        }
    }
}
#endif

#if HELD
// K or V by rows to shared memory, from there this wave's to registers.
template <int DIM>
DEVICE void hold(Keys<DIM> &held, u32 base, const u16 *from, i64 stride, int valid, int dim, int first, int lane) {
    barrier();
    load_tile<BLOCK_N, DIM, THREADS>(base, from, stride, valid, dim, threadIdx.x);
    barrier();
    const u32 at = base + offset<DIM>(first, 0) + lane_by_rows<DIM>(lane);
    UNROLL for (int kt = 0; kt < K_TILES; ++kt)
        UNROLL for (int kk = 0; kk < DIM / 16; ++kk) load_operand(held[kt][kk], at + offset<DIM>(16 * kt, 16 * kk));
}
#endif

template <int COLS>
DEVICE void store_gradient(const Tensor &g, const Tile &t, u32 kv, int row, int column0, int dim, float scale, bool add,
                           Product (&c)[K_TILES][COLS / 16], int lane) {
    UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
        const int key = row + 16 * kt;
        if (key >= int(t.rows)) continue;
        Gradient *to = ::at<Gradient>(g, t.batch, t.row0 + key, kv) + column0;
        UNROLL for (int j = 0; j < COLS / 16; ++j) {
            const int left = dim - column0 - 16 * j;
            Product sum;
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) sum[r] = c[kt][j][r] * scale;
#if GRADIENT_F32
            if (add) {
                Product before;
                load_column(to + 16 * j, before, left, lane);
                UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) sum[r] += before[r];
            }
#endif
            store_column(to + 16 * j, sum, 1.0f, left, lane);
        }
    }
}

KERNEL(THREADS, 1) attention_backward(PARAMS(BackwardParams) p) {
    SHARED(unsigned char, memory);
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const Place where = place(p.problem, p.problem.kv_heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    const int lane = threadIdx.x % WARP, wave = uniform(threadIdx.x / WARP);
    const int key_wave = wave % KEY_WAVES, part = wave / KEY_WAVES;
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const u32 base = shared_address(memory), k_at = base, v_at = base + K_BYTES;
    float *stats = reinterpret_cast<float *>(memory + STATS_AT);

    // Local query heads of the KV head.
    const int first_head = int((p.problem.kv_first + where.head) * p.problem.group) - int(p.problem.head_first);
    const int past_head = first_head + int(p.problem.group);
    const u32 heads = tile.count ? u32(past_head < int(p.problem.heads) ? past_head : int(p.problem.heads)) : 0;
    Cursor next{u32(first_head > 0 ? first_head : 0), tile.first, 0};
    Block block;
    Keys<HEAD_DIM> held_k;
    Keys<HEAD_DIM_V> held_v;
    if (next.head < heads) {
        next.query = pieces[next.piece].q0;
        block.load(p, tile.batch, next, pieces[next.piece].q1);
        const u16 *k = ::at<const u16>(p.k, tile.batch, tile.row0, where.head);
        const u16 *v = ::at<const u16>(p.v, tile.batch, tile.row0, where.head);
#if HELD
        hold<HEAD_DIM>(held_k, base, k, p.k.row, tile.rows, dim, key_wave * KEYS, lane);
        hold<HEAD_DIM_V>(held_v, base, v, p.v.row, tile.rows, dim_v, key_wave * KEYS, lane);
#if DQ
        TravelByQuads<BLOCK_N, HEAD_DIM, THREADS> keys;
        keys.load(k, p.k.row, tile.rows, dim);
        barrier();
        keys.store_quads(base);
#endif
#else
        load_tile<BLOCK_N, HEAD_DIM, THREADS>(k_at, k, p.k.row, tile.rows, dim, threadIdx.x);
        load_tile<BLOCK_N, HEAD_DIM_V, THREADS>(v_at, v, p.v.row, tile.rows, dim_v, threadIdx.x);
#endif
    }
    Product dk[K_TILES][COLUMNS / 16], dv[K_TILES][COLUMNS_V / 16];
    UNROLL for (int kt = 0; kt < K_TILES; ++kt) {
        UNROLL for (int j = 0; j < COLUMNS / 16; ++j) clear(dk[kt][j]);
        UNROLL for (int j = 0; j < COLUMNS_V / 16; ++j) clear(dv[kt][j]);
    }
    const u32 wave_k = k_at + offset<HEAD_DIM>(key_wave * KEYS, 0) + lane_by_rows<HEAD_DIM>(lane);
    const u32 wave_v = v_at + offset<HEAD_DIM_V>(key_wave * KEYS, 0) + lane_by_rows<HEAD_DIM_V>(lane);
    const u32 q_columns = base + (HELD ? Q_QUADS_AT : Q_AT) + lane_by_columns<HELD, HEAD_DIM>(lane);
    const u32 o_columns = base + (HELD ? O_QUADS_AT : O_AT) + lane_by_columns<HELD, HEAD_DIM_V>(lane);
    const int wave_key = tile.row0 + key_wave * KEYS;

    while (next.head < heads) {
        const Cursor now = next;
        const Piece piece = pieces[now.piece];
        Context context{score_of(p.problem, now.head)};
#if DROPOUT
        context.dropout = dropout_of(p.problem, tile.batch, now.head);
#endif
        barrier();  // nobody reads the block before any more
        block.store(base, stats);
        barrier();
        advance(next, pieces, tile);
        if (next.head < heads) block.load(p, tile.batch, next, pieces[next.piece].q1);
        UNROLL for (int row = 0; row < BLOCK_M; row += 16) {
            const int query = now.query + row, least = wave_key - (query + 15), most = wave_key + KEYS - 1 - query;
            const bool sees = least <= piece.hi && most >= piece.lo && wave_key < piece.k1 && wave_key + KEYS > piece.k0 &&
                              query < piece.q1;
            Pairs s, ds;
            if (sees) {
                product<HEAD_DIM>(s, base + Q_AT + offset<HEAD_DIM>(row, 0) + lane_by_rows<HEAD_DIM>(lane), held_k,
                                  loaded_anew(wave_k));
                product<HEAD_DIM_V>(ds, base + O_AT + offset<HEAD_DIM_V>(row, 0) + lane_by_rows<HEAD_DIM_V>(lane),
                                    held_v, loaded_anew(wave_v));
                differentiate(s, ds, context, piece, LaneAt{lane, wave_key + lane % 16, query}, stats + row);
                Operand weights[K_TILES];
                UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_operand(weights[kt], s[kt], lane);
                gather16<HEAD_DIM_V, COLUMNS_V>(dv, weights, o_columns, row, part * COLUMNS_V);
                UNROLL for (int kt = 0; kt < K_TILES; ++kt) as_operand(weights[kt], ds[kt], lane);
                gather16<HEAD_DIM, COLUMNS>(dk, weights, q_columns, row, part * COLUMNS);
            }
#if DQ
            if (part == 0) {
                if (!sees) UNROLL for (int kt = 0; kt < K_TILES; ++kt) clear(ds[kt]);
                store_pairs(ds, base + DS_AT + offset<BLOCK_N>(row, key_wave * KEYS), lane);
            }
#endif
        }
#if DQ
        barrier();
        add_dq(p, ::at<float>(p.dq, tile.batch, now.query, now.head), piece.q1 - now.query, base + DS_AT, k_at, wave, lane);
#endif
    }
    const bool add_k = p.add & 1, add_v = p.add & 2;
    const int row = key_wave * KEYS + lane % 16;
    if (tile.count || !add_k)
        store_gradient<COLUMNS>(p.dk, tile, where.head, row, part * COLUMNS, dim, p.problem.scale, add_k, dk, lane);
    if (tile.count || !add_v)
        store_gradient<COLUMNS_V>(p.dv, tile, where.head, row, part * COLUMNS_V, dim_v, 1.0f, add_v, dv, lane);
}
