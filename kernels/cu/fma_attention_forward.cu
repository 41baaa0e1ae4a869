// Attention forward over slices for f32, on the FMA units: correct first, for what tensor cores would round.
//
//   l_r = sum_c exp(x_rc - m_r)      acc_r = sum_c keep_rc / (1 - drop) exp(x_rc - m_r) v_c      out = acc / l      lse = m + ln l
//
//   one block = one tile of FMA_ROWS query rows of one head; a thread owns 2 rows and an eighth of their keys and columns
//     (acc, m, l) = (0, -inf, 0), or the partial of an earlier call
//     for each block of BLOCK_N keys of the tile's pieces: K and V to shared memory
//         x = transform(q k); m' = max(m, roundup(rowmax x)); P = exp2(x - m')
//         (l, acc) = (l, acc) exp2(m - m') + (rowsum P, dropout(P) V)
//     write (acc, m, l), or add the sink and write out and lse
//
// Results hardly depend on the order of the blocks, and so of a ring's steps: m is a whole number in log2 units, so that rescaling
// is exact and m survives its way through a partial in natural units; and a block is summed by itself. Macros: PARTIAL.

struct ForwardParams {
    Problem problem;
    Tensor q, k, v, out, lse;
    Tensor acc, m, l;  // the partial, f32
    Tensor sinks;      // f32 per global head; ptr 0: none
    u32 stage;         // bit 0: load the partial, bit 1: store it (otherwise finish)
    u32 unused;
};
static_assert(sizeof(ForwardParams) == 416, "layout");

constexpr int BLOCK_N = FMA_OTHERS, J = BLOCK_N / 8;
constexpr int Q_AT = 0, K_AT = FMA_ROWS * fma_pitch<HEAD_DIM>(), V_AT = K_AT + BLOCK_N * fma_pitch<HEAD_DIM>();
constexpr int P_AT = V_AT + BLOCK_N * fma_pitch<HEAD_DIM_V>();
static_assert((P_AT + FMA_ROWS * (BLOCK_N + 1)) * 4 == SHARED_BYTES, "shared memory");

struct State {
    float acc[2][HEAD_DIM_V / 8];
    float m[2], l[2];
};

DEVICE float over_row(float x, bool max) {
    UNROLL for (int mask = 1; mask < 8; mask *= 2) {
        float y = shuffle_xor(x, mask);
        x = max ? maximum(x, y) : x + y;
    }
    return x;
}

DEVICE void load_state(const ForwardParams &p, const Tile &t, u32 head, State &s) {
    UNROLL for (int i = 0; i < 2; ++i) {
        int row = threadIdx.x / 8 * 2 + i;
        s.m[i] = -INFINITY_F;
        s.l[i] = 0.0f;
        UNROLL for (int c = 0; c < HEAD_DIM_V / 8; ++c) s.acc[i][c] = 0.0f;
        if (!(p.stage & 1) || row >= int(t.rows)) continue;
        s.m[i] = round_up(*at<const float>(p.m, t.batch, t.row0 + row, head) * LOG2E - 0.5f);
        s.l[i] = *at<const float>(p.l, t.batch, t.row0 + row, head);
        const float *from = at<const float>(p.acc, t.batch, t.row0 + row, head);
        each_column<HEAD_DIM_V>(p.problem.head_dim_v, [&](int c, int column) { s.acc[i][c] = from[column]; });
    }
}

DEVICE void store_state(const ForwardParams &p, const Tile &t, u32 head, const State &s) {
    UNROLL for (int i = 0; i < 2; ++i) {
        int row = threadIdx.x / 8 * 2 + i;
        if (row >= int(t.rows)) continue;
        if (threadIdx.x % 8 == 0) {
            *at<float>(p.m, t.batch, t.row0 + row, head) = s.m[i] * LN2;
            *at<float>(p.l, t.batch, t.row0 + row, head) = s.l[i];
        }
        float *to = at<float>(p.acc, t.batch, t.row0 + row, head);
        each_column<HEAD_DIM_V>(p.problem.head_dim_v, [&](int c, int column) { to[column] = s.acc[i][c]; });
    }
}

DEVICE void finish(const ForwardParams &p, const Tile &t, u32 head, const State &s) {
    float sink = p.sinks.ptr ? *at<const float>(p.sinks, 0, 0, p.problem.head_first + head) * LOG2E : -INFINITY_F;
    UNROLL for (int i = 0; i < 2; ++i) {
        int row = threadIdx.x / 8 * 2 + i;
        if (row >= int(t.rows)) continue;
        float top = maximum(s.m[i], sink), by = s.m[i] == -INFINITY_F ? 0.0f : exp2_fast(s.m[i] - top);
        float l = s.l[i] * by + (sink == -INFINITY_F ? 0.0f : exp2_fast(sink - top));
        float factor = l == 0.0f ? 0.0f : by / l;
        if (threadIdx.x % 8 == 0)
            *at<float>(p.lse, t.batch, t.row0 + row, head) = top == -INFINITY_F ? top : top * LN2 + natural_log(l);
        float *to = at<float>(p.out, t.batch, t.row0 + row, head);
        each_column<HEAD_DIM_V>(p.problem.head_dim_v, [&](int c, int column) { to[column] = s.acc[i][c] * factor; });
    }
}

// One block of keys, from `key` on.
DEVICE void attend(const ForwardParams &p, const Tile &t, u32 head, const Piece &piece, int key, float *memory, State &s) {
    const Score score = score_of(p.problem, head);
    float x[2][J], by[2], sum[2][HEAD_DIM_V / 8];
    dots<HEAD_DIM, J>(x, memory + Q_AT, memory + K_AT);
    UNROLL for (int i = 0; i < 2; ++i) {
        const int local = threadIdx.x / 8 * 2 + i, row = t.row0 + local;
        float top = -INFINITY_F;
        UNROLL for (int j = 0; j < J; ++j) {
            const int c = key + int(threadIdx.x % 8) + 8 * j;
            const bool seen = c < piece.k1 && c - row >= piece.lo && c - row <= piece.hi;
            float unused;
            x[i][j] = seen ? transform(score, piece, x[i][j], row, c, unused) : -INFINITY_F;
            top = maximum(top, x[i][j]);
        }
        top = maximum(s.m[i], round_up(over_row(top, true)));
        const float base = top == -INFINITY_F ? 0.0f : top;
        by[i] = exp2_fast(s.m[i] - base);
        s.m[i] = top;
        float l = 0.0f;
        UNROLL for (int j = 0; j < J; ++j) {
            float weight = exp2_fast(x[i][j] - base);
            l += weight;
#if DROPOUT
            weight *= keep_factor(dropout_of(p.problem, t.batch, head), piece, row, key + int(threadIdx.x % 8) + 8 * j);
#endif
            memory[P_AT + local * (BLOCK_N + 1) + threadIdx.x % 8 + 8 * j] = weight;
        }
        s.l[i] = s.l[i] * by[i] + over_row(l, false);
        UNROLL for (int c = 0; c < HEAD_DIM_V / 8; ++c) sum[i][c] = 0.0f;
    }
    warp_barrier();  // a row's weights are written and read by one warp
    gather<HEAD_DIM_V, BLOCK_N>(sum, memory + P_AT, memory + V_AT);
    UNROLL for (int i = 0; i < 2; ++i)
        UNROLL for (int c = 0; c < HEAD_DIM_V / 8; ++c) s.acc[i][c] = s.acc[i][c] * by[i] + sum[i][c];
}

KERNEL(FMA_THREADS, 1) attention_forward(PARAMS(ForwardParams) p) {
    SHARED(float, memory);
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    if (PARTIAL && p.stage == 3 && tile.count == 0) return;  // Continue has nothing to do here
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head);
    load_rows<HEAD_DIM>(memory + Q_AT, at<const float>(p.q, tile.batch, tile.row0, head), p.q.row, FMA_ROWS, tile.rows,
                        p.problem.head_dim);
    State state;
    load_state(p, tile, head, state);
    for (u32 n = tile.first; n < tile.first + tile.count; ++n) {
        const Piece piece = pieces[n];
        for (int key = piece.k0; key < piece.k1; key += BLOCK_N) {
            barrier();
            load_rows<HEAD_DIM>(memory + K_AT, at<const float>(p.k, tile.batch, key, kv), p.k.row, BLOCK_N, piece.k1 - key,
                                p.problem.head_dim);
            load_rows<HEAD_DIM_V>(memory + V_AT, at<const float>(p.v, tile.batch, key, kv), p.v.row, BLOCK_N,
                                  piece.k1 - key, p.problem.head_dim_v);
            barrier();
            attend(p, tile, head, piece, key, memory, state);
        }
    }
    if (PARTIAL && (p.stage & 2))
        store_state(p, tile, head, state);
    else
        finish(p, tile, head, state);
}
