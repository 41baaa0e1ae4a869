// Attention backward over slices for f32, on the FMA units, without atomics: one kernel over key tiles for dK and dV, one
// over query tiles for dQ.
//
//   p = exp(x - lse)      ds = p (keep / (1 - drop) * dout v^T - delta) (1 - (x0 / softcap)^2)
//   dv = (keep / (1 - drop) p)^T dout      dk = scale ds^T q      dq = scale ds k
//
//   attention_backward: a block owns FMA_ROWS keys of one KV head
//     for each of its query heads, each piece, each block of OTHERS queries: S^T, dP^T -> P^T, dS^T; dV += P^T dout; dK += dS^T Q
//   attention_backward_dq: a block owns FMA_ROWS queries of one head
//     for each piece, each block of OTHERS keys: S, dP -> dS; dQ += dS K
//
// In both, a thread owns 2 of the rows and an eighth of the others.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq, dk, dv;
    u32 add;  // bit 0: dk is added to, bit 1: dv is, bit 2: dq is
    u32 unused;
};
static_assert(sizeof(BackwardParams) == 416, "layout");

constexpr int OTHERS = FMA_OTHERS, J = OTHERS / 8;
// Rows of the block (K and V, or Q and dout), then the others, then P and dS.
constexpr int OWN_A = 0, OWN_B = FMA_ROWS * fma_pitch<HEAD_DIM>(), OTHER_A = OWN_B + FMA_ROWS * fma_pitch<HEAD_DIM_V>();
constexpr int OTHER_B = OTHER_A + OTHERS * fma_pitch<HEAD_DIM>(), P_AT = OTHER_B + OTHERS * fma_pitch<HEAD_DIM_V>();
constexpr int S_AT = P_AT + FMA_ROWS * (OTHERS + 1);
static_assert((S_AT + FMA_ROWS * (OTHERS + 1)) * 4 == SHARED_BYTES, "shared memory");

struct Pair {
    float p, ds;
};

// One pair from its two products.
DEVICE Pair differentiate(const BackwardParams &p, const Piece &piece, u32 batch, u32 head, int row, int c, float dot,
                          float dp) {
    const bool seen = row < piece.q1 && row >= piece.q0 && c < piece.k1 && c >= piece.k0 && c - row >= piece.lo &&
                      c - row <= piece.hi;
    if (!seen) return {0.0f, 0.0f};
    const float lse = *at<const float>(p.lse, batch, row, head), delta = *at<const float>(p.delta, batch, row, head);
    if (lse == -INFINITY_F) return {0.0f, 0.0f};
    float bent, keep = 1.0f;
    const float x = transform(score_of(p.problem, head), piece, dot, row, c, bent), weight = exp2_fast(x - lse * LOG2E);
#if DROPOUT
    keep = keep_factor(dropout_of(p.problem, batch, head), piece, row, c);
#endif
    return {weight * keep, weight * (dp * keep - delta) * bent};
}

// A block of others is summed by itself: a sum of thousands of terms one by one loses more digits than plain attention does.
template <int DIM>
DEVICE void add_block(float (&c)[2][DIM / 8], const float *weights, const float *values) {
    float block[2][DIM / 8];
    UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int n = 0; n < DIM / 8; ++n) block[i][n] = 0.0f;
    gather<DIM, OTHERS>(block, weights, values);
    UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int n = 0; n < DIM / 8; ++n) c[i][n] += block[i][n];
}

template <int DIM>
DEVICE void store(const Tensor &g, const Tile &t, u32 head, int dim, float scale, bool add, const float (&c)[2][DIM / 8]) {
    UNROLL for (int i = 0; i < 2; ++i) {
        int row = threadIdx.x / 8 * 2 + i;
        if (row >= int(t.rows)) continue;
        float *to = at<float>(g, t.batch, t.row0 + row, head);
        each_column<DIM>(dim, [&](int n, int column) { to[column] = (add ? to[column] : 0.0f) + scale * c[i][n]; });
    }
}

DEVICE void load_own(float *memory, const Tensor &a, const Tensor &b, const Tile &t, u32 head, const Problem &p) {
    load_rows<HEAD_DIM>(memory + OWN_A, at<const float>(a, t.batch, t.row0, head), a.row, FMA_ROWS, t.rows, p.head_dim);
    load_rows<HEAD_DIM_V>(memory + OWN_B, at<const float>(b, t.batch, t.row0, head), b.row, FMA_ROWS, t.rows,
                          p.head_dim_v);
}

DEVICE void load_others(float *memory, const Tensor &a, const Tensor &b, u32 batch, int row, u32 head, int valid,
                        const Problem &p) {
    barrier();
    load_rows<HEAD_DIM>(memory + OTHER_A, at<const float>(a, batch, row, head), a.row, OTHERS, valid, p.head_dim);
    load_rows<HEAD_DIM_V>(memory + OTHER_B, at<const float>(b, batch, row, head), b.row, OTHERS, valid, p.head_dim_v);
    barrier();
}

KERNEL(FMA_THREADS, 1) attention_backward(PARAMS(BackwardParams) p) {
    SHARED(float, memory);
    const Place where = place(p.problem, p.problem.kv_heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const u32 kv = where.head, y = threadIdx.x / 8, x = threadIdx.x % 8;
    const int first_head = int((p.problem.kv_first + kv) * p.problem.group) - int(p.problem.head_first);
    const int head0 = first_head > 0 ? first_head : 0, past = first_head + int(p.problem.group);
    const int heads = past < int(p.problem.heads) ? past : int(p.problem.heads);
    load_own(memory, p.k, p.v, tile, kv, p.problem);
    float dk[2][HEAD_DIM / 8], dv[2][HEAD_DIM_V / 8];
    UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int c = 0; c < HEAD_DIM / 8; ++c) dk[i][c] = 0.0f;
        UNROLL for (int c = 0; c < HEAD_DIM_V / 8; ++c) dv[i][c] = 0.0f;
    }
    for (int head = head0; head < heads; ++head)
        for (u32 n = tile.first; n < tile.first + tile.count; ++n) {
            const Piece piece = pieces[n];
            for (int query = piece.q0; query < piece.q1; query += OTHERS) {
                load_others(memory, p.q, p.dout, tile.batch, query, head, piece.q1 - query, p.problem);
                float s[2][J], dp[2][J];
                dots<HEAD_DIM, J>(s, memory + OWN_A, memory + OTHER_A);
                dots<HEAD_DIM_V, J>(dp, memory + OWN_B, memory + OTHER_B);
                UNROLL for (int i = 0; i < 2; ++i)
                    UNROLL for (int j = 0; j < J; ++j) {
                        const Pair w = differentiate(p, piece, tile.batch, head, query + x + 8 * j,
                                                     tile.row0 + 2 * y + i, s[i][j], dp[i][j]);
                        const int to = (2 * y + i) * (OTHERS + 1) + x + 8 * j;
                        memory[P_AT + to] = w.p;
                        memory[S_AT + to] = w.ds;
                    }
                warp_barrier();
                add_block<HEAD_DIM_V>(dv, memory + P_AT, memory + OTHER_B);
                add_block<HEAD_DIM>(dk, memory + S_AT, memory + OTHER_A);
            }
        }
    const bool add_k = p.add & 1, add_v = p.add & 2;
    if (tile.count || !add_k) store<HEAD_DIM>(p.dk, tile, kv, p.problem.head_dim, p.problem.scale, add_k, dk);
    if (tile.count || !add_v) store<HEAD_DIM_V>(p.dv, tile, kv, p.problem.head_dim_v, 1.0f, add_v, dv);
}

KERNEL(FMA_THREADS, 1) attention_backward_dq(PARAMS(BackwardParams) p) {
    SHARED(float, memory);
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = constant<Tile>(p.problem.tiles)[where.tile];
    const bool add = p.add & 4;
    if (tile.count == 0 && add) return;
    const Piece *pieces = constant<Piece>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head), y = threadIdx.x / 8, x = threadIdx.x % 8;
    load_own(memory, p.q, p.dout, tile, head, p.problem);
    float dq[2][HEAD_DIM / 8];
    UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int c = 0; c < HEAD_DIM / 8; ++c) dq[i][c] = 0.0f;
    for (u32 n = tile.first; n < tile.first + tile.count; ++n) {
        const Piece piece = pieces[n];
        for (int key = piece.k0; key < piece.k1; key += OTHERS) {
            load_others(memory, p.k, p.v, tile.batch, key, kv, piece.k1 - key, p.problem);
            float s[2][J], dp[2][J];
            dots<HEAD_DIM, J>(s, memory + OWN_A, memory + OTHER_A);
            dots<HEAD_DIM_V, J>(dp, memory + OWN_B, memory + OTHER_B);
            UNROLL for (int i = 0; i < 2; ++i)
                UNROLL for (int j = 0; j < J; ++j) {
                    const int row = tile.row0 + 2 * y + i;
                    memory[S_AT + (2 * y + i) * (OTHERS + 1) + x + 8 * j] =
                        differentiate(p, piece, tile.batch, head, row, key + x + 8 * j, s[i][j], dp[i][j]).ds;
                }
            warp_barrier();
            add_block<HEAD_DIM>(dq, memory + S_AT, memory + OTHER_A);
        }
    }
    store<HEAD_DIM>(p.dq, tile, head, p.problem.head_dim, p.problem.scale, add, dq);
}
