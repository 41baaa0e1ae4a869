// Attention forward over slices on AMD's matrix units (16-bit elements, f32 accumulation): every lane owns a query.
//
//   x_rc = logit of query r and key c (see Spec)         p_rc = exp(x_rc - m_r)
//   l_r  = sum_c p_rc      acc_r = sum_c keep_rc / (1 - drop) p_rc v_c      out = acc / l      lse = m + ln l
//
//   one block = one query tile of one head; a wave owns M_TILES times 16 queries, a lane one of each 16 (lane % 16)
//     (acc, m, l) = (0, -inf, 0), or the partial of an earlier call
//     for each block of BLOCK_N keys of the tile's pieces: K and V from registers to shared memory, those of the next
//     block to registers
//         S^T = K Q^T; x = transform(S); x = -inf outside the band        (a wave that sees nothing skips the block)
//         if max(x) exceeds m by more than LAZY in some query of the wave: rescale acc and l to the new maximum
//         P^T = exp2(S^T - m); l += sum of P over keys; acc^T += V^T round(dropout(P^T))
//     write (acc, m, l), or add the sink and write out and lse
//
// Transposed, the scores are the operand of the second product as they are (see fragments_amd.cuh), and a query's statistics
// live in the lanes that hold its column. (Papers: see sm80_attention_forward.cu.)
//
// Macros: WAVES, M_TILES, BLOCK_N, Q_IN_REGISTERS (otherwise Q stays in shared memory), V_QUADS
// (V lies in quads), PARTIAL.

struct ForwardParams {
    Problem problem;
    Tensor q, k, v, out, lse;
    Tensor acc, m, l;  // the partial, f32
    Tensor sinks;      // f32 per global head; ptr 0: none
    u32 stage;         // bit 0: load the partial, bit 1: store it (otherwise finish)
    u32 unused;
};
static_assert(sizeof(ForwardParams) == 416, "layout");

constexpr int THREADS = WAVES * WARP;
constexpr int ROWS = 16 * M_TILES;  // of a wave
constexpr int BLOCK_M = WAVES * ROWS, KEY_TILES = BLOCK_N / 16, COLUMN_TILES = HEAD_DIM_V / 16;
constexpr int HELD = Q_IN_REGISTERS ? HEAD_DIM / 16 : 1;
constexpr float LAZY = 3.0f;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2;
constexpr u32 K_BYTES = BLOCK_N * pitch<HEAD_DIM>() * 2, V_BYTES = BLOCK_N * (V_QUADS ? HEAD_DIM_V : pitch<HEAD_DIM_V>()) * 2;
// A Q that goes to registers lies where K and V come afterwards.
constexpr u32 K_AT = Q_IN_REGISTERS ? 0 : Q_BYTES, V_AT = K_AT + K_BYTES;
static_assert(V_AT % 256 == 0 && BLOCK_N % 16 == 0, "quads");
static_assert((Q_BYTES > V_AT + V_BYTES ? Q_BYTES : V_AT + V_BYTES) == SHARED_BYTES, "shared memory");

typedef Product Scores[M_TILES][KEY_TILES];
typedef Product Output[M_TILES][COLUMN_TILES];

// Of this lane's queries.
struct Rows {
    float m[M_TILES];  // reference maximum, in units of dot products (or log2 units with TRANSFORM)
    float l[M_TILES];  // this lane's part of the sum
};

// Where this lane's elements lie: query of mt is query + 16 mt, key of (j, r) is key + 16 j + product_row(lane, r).
struct LaneAt {
    int lane, query, key;
};

DEVICE void scores(Scores &s, u32 q, const Operand (&held)[M_TILES][HELD], u32 k) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) UNROLL for (int j = 0; j < KEY_TILES; ++j) clear(s[mt][j]);
    UNROLL for (int kk = 0; kk < HEAD_DIM / 16; ++kk) {
        Operand own[M_TILES];
        if (!Q_IN_REGISTERS)
            UNROLL for (int mt = 0; mt < M_TILES; ++mt) load_operand(own[mt], q + offset<HEAD_DIM>(16 * mt, 16 * kk));
        UNROLL for (int j = 0; j < KEY_TILES; ++j) {
            Operand keys;
            load_operand(keys, k + offset<HEAD_DIM>(16 * j, 16 * kk));
            UNROLL for (int mt = 0; mt < M_TILES; ++mt)
                multiply(s[mt][j], keys, Q_IN_REGISTERS ? held[mt][Q_IN_REGISTERS ? kk : 0] : own[mt]);
        }
    }
}

#if TRANSFORM
DEVICE void transform_all(Scores &s, const Score &f, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int j = 0; j < KEY_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
                float unused;
                s[mt][j][r] = transform(f, piece, s[mt][j][r], at.query + 16 * mt,
                                        at.key + 16 * j + product_row(at.lane, r), unused);
            }
}
#endif

DEVICE void mask(Scores &s, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        const int query = at.query + 16 * mt, past = query + piece.hi + 1;
        const int above = (past < piece.k1 ? past : piece.k1) - at.key, below = query + piece.lo - at.key;
        UNROLL for (int j = 0; j < KEY_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
                const int c = 16 * j + product_row(at.lane, r);
                if (c >= above || c < below) s[mt][j][r] = -INFINITY_F;
            }
    }
}

// Moves m towards the maximum of the block where needed, and with it acc and l.
DEVICE void follow_maximum(const Scores &s, Rows &rows, Output &acc, float unit) {
    float top[M_TILES];
    bool far = false;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        float t = s[mt][0][0];
        UNROLL for (int j = 0; j < KEY_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) t = maximum(t, s[mt][j][r]);
        top[mt] = column_maximum(t);
        far |= (top[mt] - rows.m[mt]) * unit > LAZY;
    }
    if (!any_lane(far)) return;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        const float m = maximum(rows.m[mt], top[mt]);
        const float by = m == -INFINITY_F ? 1.0f : exp2_fast((rows.m[mt] - m) * unit);
        rows.m[mt] = m;
        rows.l[mt] *= by;
        UNROLL for (int j = 0; j < COLUMN_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) acc[mt][j][r] *= by;
    }
}

// S becomes P = exp2(S - m), and l grows.
DEVICE void exponentials(Scores &s, Rows &rows, float unit) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        const float m = rows.m[mt] == -INFINITY_F ? 0.0f : rows.m[mt] * unit;
        float sum = 0.0f;
        UNROLL for (int j = 0; j < KEY_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
                s[mt][j][r] = exp2_fast(s[mt][j][r] * unit - m);
                sum += s[mt][j][r];
            }
        rows.l[mt] += sum;
    }
}

#if DROPOUT
DEVICE void drop(Scores &s, const Dropout &d, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int j = 0; j < KEY_TILES; ++j)
            UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r)
                s[mt][j][r] *=
                    keep_factor(d, piece, at.query + 16 * mt, at.key + 16 * j + product_row(at.lane, r));
}
#endif

// acc^T += V^T P^T.
DEVICE void weigh(Output &acc, const Scores &s, u32 v, int lane) {
    UNROLL for (int kk = 0; kk < KEY_TILES; ++kk) {
        Operand weights[M_TILES];
        UNROLL for (int mt = 0; mt < M_TILES; ++mt) as_operand(weights[mt], s[mt][kk], lane);
        UNROLL for (int j = 0; j < COLUMN_TILES; ++j) {
            Operand values;
            load_columns<V_QUADS, HEAD_DIM_V>(values, v, 16 * kk, 16 * j);
            UNROLL for (int mt = 0; mt < M_TILES; ++mt) multiply(acc[mt][j], values, weights[mt]);
        }
    }
}

// Natural units are units of m times `unit` times ln 2.
DEVICE void start(const ForwardParams &p, const Tile &t, u32 head, LaneAt at, float unit, Rows &rows, Output &acc) {
    const int dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        rows.m[mt] = -INFINITY_F;
        rows.l[mt] = 0.0f;
        UNROLL for (int j = 0; j < COLUMN_TILES; ++j) clear(acc[mt][j]);
        const int row = at.query + 16 * mt;
        if (PARTIAL && (p.stage & 1) && row < int(t.row0 + t.rows)) {
            rows.m[mt] = *::at<const float>(p.m, t.batch, row, head) / (unit * LN2);
            rows.l[mt] = at.lane < 16 ? *::at<const float>(p.l, t.batch, row, head) : 0.0f;
            const float *from = ::at<const float>(p.acc, t.batch, row, head);
            UNROLL for (int j = 0; j < COLUMN_TILES; ++j) load_column(from + 16 * j, acc[mt][j], dim - 16 * j, at.lane);
        }
    }
}

#if PARTIAL
DEVICE void store_partial(const ForwardParams &p, const Tile &t, u32 head, LaneAt at, float unit, Rows &rows, Output &acc) {
    const int dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        const float l = column_sum(rows.l[mt]);
        const int row = at.query + 16 * mt;
        if (row >= int(t.row0 + t.rows)) continue;
        if (at.lane < 16) {
            *::at<float>(p.m, t.batch, row, head) = rows.m[mt] * (unit * LN2);
            *::at<float>(p.l, t.batch, row, head) = l;
        }
        float *to = ::at<float>(p.acc, t.batch, row, head);
        UNROLL for (int j = 0; j < COLUMN_TILES; ++j) store_column(to + 16 * j, acc[mt][j], 1.0f, dim - 16 * j, at.lane);
    }
}
#endif

DEVICE void finish(const ForwardParams &p, const Tile &t, u32 head, LaneAt at, float unit, Rows &rows, Output &acc) {
    const int dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const float sink =
        p.sinks.ptr ? *::at<const float>(p.sinks, 0, 0, p.problem.head_first + head) * LOG2E : -INFINITY_F;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        float l = column_sum(rows.l[mt]), m = rows.m[mt] * unit;
        if (rows.m[mt] == -INFINITY_F) m = -INFINITY_F;
        float top = maximum(m, sink), by = 1.0f;
        if (top != m) {  // the sink is above: everything shrinks by exp(m - sink)
            by = exp2_fast(m - top);
            l = l * by + 1.0f;
        } else if (sink != -INFINITY_F) {
            l += exp2_fast(sink - top);
        }
        const int row = at.query + 16 * mt;
        if (row >= int(t.row0 + t.rows)) continue;
        const float factor = l == 0.0f ? 0.0f : by / l;
        if (at.lane < 16)
            *::at<float>(p.lse, t.batch, row, head) = top == -INFINITY_F ? top : top * LN2 + log2_fast(l) * LN2;
        u16 *to = ::at<u16>(p.out, t.batch, row, head);
        UNROLL for (int j = 0; j < COLUMN_TILES; ++j) store_column(to + 16 * j, acc[mt][j], factor, dim - 16 * j, at.lane);
    }
}

KERNEL(THREADS, 1) attention_forward(PARAMS(ForwardParams) p) {
    SHARED(unsigned char, memory);
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    if (PARTIAL && p.stage == 3 && tile.count == 0) return;  // Continue has nothing to do here
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head), base = shared_address(memory);
    const int lane = threadIdx.x % WARP, wave = uniform(threadIdx.x / WARP), first_row = tile.row0 + wave * ROWS;
    const int dim = EXACT ? HEAD_DIM : p.problem.head_dim, dim_v = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    const u16 *k = ::at<const u16>(p.k, tile.batch, 0, kv), *v = ::at<const u16>(p.v, tile.batch, 0, kv);

    Travel<BLOCK_N, HEAD_DIM, THREADS> keys;
#if V_QUADS
    TravelByQuads<BLOCK_N, HEAD_DIM_V, THREADS> values;
#else
    Travel<BLOCK_N, HEAD_DIM_V, THREADS> values;
#endif
    u32 piece_index = tile.first;
    const u32 end_piece = tile.first + tile.count;
    int key = 0;
    if (piece_index < end_piece) {
        key = pieces[piece_index].k0;
        keys.load(k + key * p.k.row, p.k.row, pieces[piece_index].k1 - key, dim);
        values.load(v + key * p.v.row, p.v.row, pieces[piece_index].k1 - key, dim_v);
    }
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(base, ::at<const u16>(p.q, tile.batch, tile.row0, head), p.q.row,
                                          tile.rows, dim, threadIdx.x);
    barrier();
    const u32 lane_q = base + offset<HEAD_DIM>(wave * ROWS, 0) + lane_by_rows<HEAD_DIM>(lane);
    const u32 lane_k = base + K_AT + lane_by_rows<HEAD_DIM>(lane);
    const u32 lane_v = base + V_AT + lane_by_columns<V_QUADS, HEAD_DIM_V>(lane);
    Operand held[M_TILES][HELD];
    if (Q_IN_REGISTERS)
        UNROLL for (int mt = 0; mt < M_TILES; ++mt)
            UNROLL for (int kk = 0; kk < HELD; ++kk)
                load_operand(held[mt][kk], lane_q + offset<HEAD_DIM>(16 * mt, 16 * kk));

    const Score score = score_of(p.problem, head);
#if DROPOUT
    const Dropout dropout = dropout_of(p.problem, tile.batch, head);
#endif
    LaneAt at{lane, first_row + lane % 16, 0};
    Rows rows;
    Output acc;
    start(p, tile, head, at, score.unit, rows, acc);
    while (piece_index < end_piece) {
        const Piece piece = pieces[piece_index];
        at.key = key;
        const int last_row = first_row + ROWS - 1, last_key = key + BLOCK_N - 1, first_key = key;
        barrier();  // nobody reads the block before any more
        keys.store(base + K_AT);
#if V_QUADS
        values.store_quads(base + V_AT);
#else
        values.store(base + V_AT);
#endif
        barrier();
        key += BLOCK_N;
        if (key >= piece.k1 && ++piece_index < end_piece) key = pieces[piece_index].k0;
        if (piece_index < end_piece) {
            keys.load(k + key * p.k.row, p.k.row, pieces[piece_index].k1 - key, dim);
            values.load(v + key * p.v.row, p.v.row, pieces[piece_index].k1 - key, dim_v);
        }
        const bool sees = first_key - last_row <= piece.hi && last_key - first_row >= piece.lo &&
                          first_row < int(tile.row0 + tile.rows);
        if (!sees) continue;
        Scores s;
        scores(s, lane_q, held, lane_k);
#if TRANSFORM
        transform_all(s, score, piece, at);
#endif
        if (last_key >= piece.k1 || last_key - first_row > piece.hi || first_key - last_row < piece.lo) mask(s, piece, at);
        follow_maximum(s, rows, acc, score.unit);
        exponentials(s, rows, score.unit);
#if DROPOUT
        drop(s, dropout, piece, at);
#endif
        weigh(acc, s, lane_v, lane);
    }
#if PARTIAL
    if (p.stage & 2) {
        store_partial(p, tile, head, at, score.unit, rows, acc);
        return;
    }
#endif
    finish(p, tile, head, at, score.unit, rows, acc);
}
