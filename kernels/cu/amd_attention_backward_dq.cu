// dQ of the attention backward without atomics, on AMD's matrix units: the deterministic mode's second launch.
//
//   p = exp(x - lse)      ds = p (keep / (1 - drop) * dout v^T - delta) (1 - (x0 / softcap)^2)      dq = scale ds k
//
//   one block = one query tile of one head; a lane owns a query; dQ stays in registers, Q and dout in shared memory, or in
//     registers with HELD (then K lies in quads, too, beside its rows)
//     for each block of BLOCK_N keys of the tile's pieces: K and V from registers to shared memory, the next to registers
//         for each 16 of the keys: S^T = K Q^T; dP^T = V dout^T; dS^T = P^T (dP^T - delta); dQ^T += K^T dS^T
//     write or add dQ
//
// Macros: WAVES (16 queries each), BLOCK_N, HELD, GRADIENT_F32.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq, dk, dv;
    u32 add;  // bit 2: dq is added to
    u32 unused;
};
static_assert(sizeof(BackwardParams) == 416, "layout");

constexpr int THREADS = WAVES * WARP, BLOCK_M = WAVES * 16;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2, O_BYTES = BLOCK_M * pitch<HEAD_DIM_V>() * 2;
// With HELD, K and V come where Q and dout were.
constexpr u32 K_AT = HELD ? 0 : Q_BYTES + O_BYTES, V_AT = K_AT + BLOCK_N * pitch<HEAD_DIM>() * 2;
constexpr u32 K_QUADS_AT = V_AT + BLOCK_N * pitch<HEAD_DIM_V>() * 2, BYTES = K_QUADS_AT + (HELD ? BLOCK_N * HEAD_DIM * 2 : 0);
static_assert((BYTES > Q_BYTES + O_BYTES ? BYTES : Q_BYTES + O_BYTES) == SHARED_BYTES && K_QUADS_AT % 256 == 0, "shared memory");

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif

template <int DIM> using Queries = Operand[HELD ? DIM / 16 : 1];  // Q or dout of this wave
#if HELD
typedef TravelByQuads<BLOCK_N, HEAD_DIM, THREADS> Keys;
#else
typedef Travel<BLOCK_N, HEAD_DIM, THREADS> Keys;
#endif

template <int DIM> DEVICE void hold(Queries<DIM> &held, u32 at) {
    UNROLL for (int kk = 0; kk < (HELD ? DIM / 16 : 0); ++kk) load_operand(held[kk], at + offset<DIM>(0, 16 * kk));
}

// C = A B^T over DIM: 16 rows from `a`, and 16 in registers or from `b`.
template <int DIM> DEVICE void product(Product &c, u32 a, const Queries<DIM> &held, u32 b) {
    clear(c);
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk) {
        Operand x, y;
        load_operand(x, a + offset<DIM>(0, 16 * kk));
        if (!HELD) load_operand(y, b + offset<DIM>(0, 16 * kk));
        multiply(c, x, HELD ? held[HELD ? kk : 0] : y);
    }
}

struct Context {
    Score score;
    float lse, delta;  // of this lane's query, lse in log2 units, +inf where P must be 0
    int lane, query;
#if DROPOUT
    Dropout dropout;
#endif
};

// dP^T becomes dS^T; value r is of key `key` + product_row(lane, r).
DEVICE void differentiate(const Product &s, Product &dp, const Context &x, const Piece &piece, int key) {
    UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
        const int c = key + product_row(x.lane, r);
        float logit = s[r], bent = 1.0f, keep = 1.0f;
#if TRANSFORM
        logit = transform(x.score, piece, logit, x.query, c, bent);
#endif
        const bool seen = c < piece.k1 && c - x.query >= piece.lo && c - x.query <= piece.hi;
        const float p = seen ? exp2_fast(logit * x.score.unit - x.lse) : 0.0f;
#if DROPOUT
        keep = keep_factor(x.dropout, piece, x.query, c);
#endif
        dp[r] = seen ? p * (dp[r] * keep - x.delta) * bent : 0.0f;
    }
}

KERNEL(THREADS, 1) attention_backward_dq(PARAMS(BackwardParams) p) {
    SHARED(unsigned char, memory);
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    const bool add = p.add & 4;
    if (tile.count == 0 && add) return;
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head), base = shared_address(memory);
    const int lane = threadIdx.x % WARP, wave = uniform(threadIdx.x / WARP), first_row = tile.row0 + wave * 16;
    const int end_row = tile.row0 + tile.rows;
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const u16 *k = ::at<const u16>(p.k, tile.batch, 0, kv), *v = ::at<const u16>(p.v, tile.batch, 0, kv);

    Keys keys;
    Travel<BLOCK_N, HEAD_DIM_V, THREADS> values;
    u32 piece_index = tile.first;
    const u32 end_piece = tile.first + tile.count;
    int key = 0;
    if (piece_index < end_piece) {
        key = pieces[piece_index].k0;
        keys.load(k + key * p.k.row, p.k.row, pieces[piece_index].k1 - key, dim);
        values.load(v + key * p.v.row, p.v.row, pieces[piece_index].k1 - key, dim_v);
    }
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(base, ::at<const u16>(p.q, tile.batch, tile.row0, head), p.q.row, tile.rows, dim,
                                          threadIdx.x);
    load_tile<BLOCK_M, HEAD_DIM_V, THREADS>(base + Q_BYTES, ::at<const u16>(p.dout, tile.batch, tile.row0, head), p.dout.row,
                                            tile.rows, dim_v, threadIdx.x);
    Context context;
    context.score = score_of(p.problem, head);
    context.lane = lane;
    context.query = first_row + lane % 16;
#if DROPOUT
    context.dropout = dropout_of(p.problem, tile.batch, head);
#endif
    const bool there = context.query < end_row;
    const float lse = there ? *::at<const float>(p.lse, tile.batch, context.query, head) * LOG2E : INFINITY_F;
    context.lse = lse == -INFINITY_F ? INFINITY_F : lse;
    context.delta = there ? *::at<const float>(p.delta, tile.batch, context.query, head) : 0.0f;
    Product dq[HEAD_DIM / 16];
    UNROLL for (int j = 0; j < HEAD_DIM / 16; ++j) clear(dq[j]);
    const u32 wave_q = base + offset<HEAD_DIM>(wave * 16, 0) + lane_by_rows<HEAD_DIM>(lane);
    const u32 wave_o = base + Q_BYTES + offset<HEAD_DIM_V>(wave * 16, 0) + lane_by_rows<HEAD_DIM_V>(lane);
    Queries<HEAD_DIM> held_q;
    Queries<HEAD_DIM_V> held_o;
#if HELD
    barrier();
    hold<HEAD_DIM>(held_q, wave_q);
    hold<HEAD_DIM_V>(held_o, wave_o);
#endif
    const u32 k_columns = base + (HELD ? K_QUADS_AT : K_AT) + lane_by_columns<HELD, HEAD_DIM>(lane);

    while (piece_index < end_piece) {
        const Piece piece = pieces[piece_index];
        const int first_key = key;
        barrier();  // nobody reads the block before any more
        keys.store(base + K_AT);
#if HELD
        keys.store_quads(base + K_QUADS_AT);
#endif
        values.store(base + V_AT);
        barrier();
        key += BLOCK_N;
        if (key >= piece.k1 && ++piece_index < end_piece) key = pieces[piece_index].k0;
        if (piece_index < end_piece) {
            keys.load(k + key * p.k.row, p.k.row, pieces[piece_index].k1 - key, dim);
            values.load(v + key * p.v.row, p.v.row, pieces[piece_index].k1 - key, dim_v);
        }
        UNROLL for (int at = 0; at < BLOCK_N; at += 16) {
            const int c = first_key + at;
            if (c - (first_row + 15) > piece.hi || c + 15 - first_row < piece.lo || first_row >= end_row) continue;
            Product s, ds;
            product<HEAD_DIM>(s, base + K_AT + offset<HEAD_DIM>(at, 0) + lane_by_rows<HEAD_DIM>(lane), held_q,
                              loaded_anew(wave_q));
            product<HEAD_DIM_V>(ds, base + V_AT + offset<HEAD_DIM_V>(at, 0) + lane_by_rows<HEAD_DIM_V>(lane), held_o,
                                loaded_anew(wave_o));
            differentiate(s, ds, context, piece, c);
            Operand weights;
            as_operand(weights, ds, lane);
            UNROLL for (int j = 0; j < HEAD_DIM / 16; ++j) {
                Operand x;
                load_columns<HELD, HEAD_DIM>(x, k_columns, at, 16 * j);
                multiply(dq[j], x, weights);
            }
        }
    }
    if (!there) return;
    Gradient *to = ::at<Gradient>(p.dq, tile.batch, context.query, head);
    UNROLL for (int j = 0; j < HEAD_DIM / 16; ++j) {
        const int left = dim - 16 * j;
        Product sum;
        UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) sum[r] = dq[j][r] * p.problem.scale;
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
