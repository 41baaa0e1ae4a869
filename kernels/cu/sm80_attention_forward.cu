// Attention forward over slices on tensor cores (16-bit elements, f32 accumulation).
//
//   x_rc = logit of query r and key c (see Spec)         p_rc = exp(x_rc - m_r)
//   l_r  = sum_c p_rc      acc_r = sum_c keep_rc / (1 - drop) p_rc v_c      out = acc / l      lse = m + ln l
//
//   one block = one query tile of one head; the tile's pieces are walked in blocks of BLOCK_N keys
//     (acc, m, l) = (0, -inf, 0), or the partial of an earlier call
//     for each block: K and V of the next block travel to the other stage
//         S = Q K^T; x = transform(S); x = -inf outside the band          (a warp that sees nothing skips the block)
//         if max(x) exceeds m by more than LAZY in some row of the warp: rescale acc and l to the new maximum
//         P = exp2(x - m); l += rowsum(P); acc += round(dropout(P)) V
//     write (acc, m, l), or add the sink and write out and lse
//
// m only has to be near the maximum for (acc, l) to stay in range, so it follows lazily: P <= 2^LAZY (why 3:
// sm90_attention_forward.cu). A partial's m is made
// the true maximum before it is stored. (Online softmax: Milakov and Gimelshein 2018; tiling: Dao, FlashAttention-2, 2023;
// lazy rescaling: FlashAttention-4, 2026.)
//
// With SPLIT = 2 (large heads) two warps share rows: each computes S of half of the keys, and after an exchange of row maxima
// and P through shared memory half of the columns of acc.
//
// Macros: WARPS, SPLIT, M_TILES (rows of a warp / 16), BLOCK_N, STAGES, MIN_BLOCKS (blocks an SM), Q_IN_REGISTERS,
// PARTIAL. With STAGES = 1, V travels under Q K^T, and the next K under the softmax and P V.

struct ForwardParams {
    Problem problem;
    Tensor q, k, v, out, lse;
    Tensor acc, m, l;  // the partial, f32
    Tensor sinks;      // f32 per global head; ptr 0: none
    u32 stage;         // bit 0: load the partial, bit 1: store it (otherwise finish)
    u32 unused;
};
static_assert(sizeof(ForwardParams) == 416, "layout");

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 16 * M_TILES;  // of a warp
constexpr int BLOCK_M = WARPS / SPLIT * ROWS;
constexpr int KEYS = BLOCK_N / SPLIT, COLUMNS = HEAD_DIM_V / SPLIT;  // of a warp
constexpr float LAZY = 3.0f;
constexpr u32 Q_BYTES = BLOCK_M * pitch<HEAD_DIM>() * 2;
constexpr u32 K_BYTES = BLOCK_N * pitch<HEAD_DIM>() * 2;
constexpr u32 V_BYTES = BLOCK_N * pitch<HEAD_DIM_V>() * 2;
constexpr u32 P_AT = Q_BYTES + STAGES * (K_BYTES + V_BYTES);
constexpr u32 CONTROL_AT = P_AT + (SPLIT > 1 ? BLOCK_M * pitch<BLOCK_N>() * 2 : 0), MAXIMA_AT = CONTROL_AT + 160;
static_assert(MAXIMA_AT + (SPLIT > 1 ? SPLIT * BLOCK_M * 4 : 0) == SHARED_BYTES, "shared memory");

typedef float Scores[M_TILES][KEYS / 8][4];
typedef float Output[M_TILES][COLUMNS / 8][4];
typedef float RowValues[M_TILES][2];

// Rows group and group + 8 of each of the warp's 16-row tiles.
struct Rows {
    RowValues m;  // reference maximum, in units of dot products (or log2 units with TRANSFORM)
    RowValues l;  // this lane's part of the row sum
};

// The position in a tile's list of (piece, first key) blocks.
struct Cursor {
    u32 piece;
    int key;
};
// To the next block, where the current piece ends at key `end`; returns whether that one is done. Then the key is to be set.
DEVICE bool advance(Cursor &at, int end) {
    at.key += BLOCK_N;
    if (at.key < end) return false;
    ++at.piece;
    return true;
}

// What all threads know alike lies in shared memory, since the loop needs the registers.
struct Now {
    Piece piece;
    i32 key;
    u32 unused;
};
struct Control {
    Now now[2];  // of this turn and the next
    i32 row0, end_row;
    u32 end_piece, unused[5];
};
static_assert(sizeof(Control) == 160, "shared memory");

// Row `key` after this thread's part of row 0.
DEVICE const u16 *skip(const u16 *part, int key, i64 stride) {
#if ALIGNED
    return part + u64(u32(key)) * u32(stride);
#else
    return part + key * stride;
#endif
}
// Start loading a block of keys (values) from key `key` on, valid before key `end`.
DEVICE void load_keys(const ForwardParams &p, const u16 *k, int end, int key, u32 to) {
    load_part<BLOCK_N, HEAD_DIM, THREADS>(to, skip(k, key, p.k.row), p.k.row, end - key,
                                          EXACT ? HEAD_DIM : p.problem.head_dim, threadIdx.x);
}
DEVICE void load_values(const ForwardParams &p, const u16 *v, int end, int key, u32 to) {
    load_part<BLOCK_N, HEAD_DIM_V, THREADS>(to, skip(v, key, p.v.row), p.v.row, end - key,
                                            EXACT ? HEAD_DIM_V : p.problem.head_dim_v, threadIdx.x);
}

// S = Q K^T of this warp.
DEVICE void scores(Scores &s, u32 q, const u32 (&held)[M_TILES][Q_IN_REGISTERS ? HEAD_DIM / 16 : 1][4], u32 k) {
    UNROLL for (int kk = 0; kk < HEAD_DIM / 16; ++kk) {
        u32 a[M_TILES][4];
        UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
            if (Q_IN_REGISTERS) {
                UNROLL for (int e = 0; e < 4; ++e) a[mt][e] = held[mt][Q_IN_REGISTERS ? kk : 0][e];
            } else {
                load_matrices(a[mt], shifted<HEAD_DIM>(q, mt * 16, kk * 16));
            }
        }
        UNROLL for (int j = 0; j < KEYS / 16; ++j) {
            u32 b[4];
            load_matrices(b, shifted<HEAD_DIM>(k, j * 16, kk * 16));
            UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
                mma(s[mt][2 * j], a[mt], b[0], b[1], kk == 0);
                mma(s[mt][2 * j + 1], a[mt], b[2], b[3], kk == 0);
            }
        }
    }
}

// Where this lane's elements lie: query row of (mt, half) is row + 16 mt + 8 half, key of (j, e) is key + 8 j + e % 2.
struct LaneAt {
    int row, key;
};

// Computed where it is used: the loop needs the registers.
DEVICE LaneAt lane_at(int row0, int key) {
    const int thread = int(opaque(threadIdx.x));
    const int warp = thread / WARP;
    return {row0 + warp / SPLIT * ROWS + thread % WARP / 4, key + warp % SPLIT * KEYS + thread % 4 * 2};
}

DEVICE void transform_all(Scores &s, const Score &f, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int j = 0; j < KEYS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float unused;
                s[mt][j][e] =
                    transform(f, piece, s[mt][j][e], at.row + 16 * mt + 8 * (e / 2), at.key + 8 * j + e % 2, unused);
            }
}

DEVICE void mask(Scores &s, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            int row = at.row + 16 * mt + 8 * half, past = row + piece.hi + 1;
            int above = (past < piece.k1 ? past : piece.k1) - at.key, below = row + piece.lo - at.key;
            UNROLL for (int j = 0; j < KEYS / 8; ++j)
                UNROLL for (int e = 0; e < 2; ++e) {
                    int c = 8 * j + e;
                    if (c >= above || c < below) s[mt][j][2 * half + e] = -INFINITY_F;
                }
        }
}

// Row maxima of this warp's part of the block.
DEVICE void row_maxima(const Scores &s, RowValues &top) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            float t = maximum(s[mt][0][2 * half], s[mt][0][2 * half + 1]);
            UNROLL for (int j = 1; j < KEYS / 8; ++j)
                t = maximum(t, maximum(s[mt][j][2 * half], s[mt][j][2 * half + 1]));
            t = maximum(t, shuffle_xor(t, 1));
            top[mt][half] = maximum(t, shuffle_xor(t, 2));
        }
}

// Moves m towards the maximum of the block where needed, and with it acc and l.
DEVICE void follow_maximum(const RowValues &top, Rows &r, Output &acc, float unit) {
    bool far = false;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            far |= (top[mt][half] - r.m[mt][half]) * unit > LAZY;
        }
    if (!any_lane(far)) return;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            float m = maximum(r.m[mt][half], top[mt][half]);
            float by = m == -INFINITY_F ? 1.0f : exp2_fast((r.m[mt][half] - m) * unit);
            r.m[mt][half] = m;
            r.l[mt][half] *= by;
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j) {
                acc[mt][j][2 * half] *= by;
                acc[mt][j][2 * half + 1] *= by;
            }
        }
}

// S becomes P = exp2(S - m), and l grows.
DEVICE void exponentials(Scores &s, Rows &r, float unit) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            float m = r.m[mt][half] == -INFINITY_F ? 0.0f : r.m[mt][half] * unit, sum = 0.0f;
            UNROLL for (int j = 0; j < KEYS / 8; ++j)
                UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    s[mt][j][e] = exp2_fast(s[mt][j][e] * unit - m);
                    sum += s[mt][j][e];
                }
            r.l[mt][half] += sum;
        }
}

#if DROPOUT
DEVICE void drop(Scores &s, const Dropout &d, const Piece &piece, LaneAt at) {
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int j = 0; j < KEYS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e)
                s[mt][j][e] *= keep_factor(d, piece, at.row + 16 * mt + 8 * (e / 2), at.key + 8 * j + e % 2);
}
#endif

// acc += P V of 16 keys.
DEVICE void weigh16(Output &acc, const u32 (&a)[M_TILES][4], u32 v) {
    UNROLL for (int j = 0; j < COLUMNS / 16; ++j) {
        u32 b[4];
        load_matrices_transposed(b, shifted<HEAD_DIM_V>(v, 0, j * 16));
        UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
            mma(acc[mt][2 * j], a[mt], b[0], b[1]);
            mma(acc[mt][2 * j + 1], a[mt], b[2], b[3]);
        }
    }
}

// acc += P V, with P in registers.
DEVICE void weigh(Output &acc, const Scores &s, u32 v) {
    UNROLL for (int kk = 0; kk < KEYS / 16; ++kk) {
        u32 a[M_TILES][4];
        UNROLL for (int mt = 0; mt < M_TILES; ++mt) as_a(a[mt], s[mt][2 * kk], s[mt][2 * kk + 1]);
        weigh16(acc, a, shifted<HEAD_DIM_V>(v, kk * 16, 0));
    }
}

DEVICE float whole_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

#if SPLIT > 1
static_assert(SPLIT == 2, "pairs of warps");
DEVICE void pair_barrier() { barrier(1 + threadIdx.x / (2 * WARP), 2 * WARP); }

// What lanes of a pair know of their rows, exchanged through shared memory: first all store, then all read.
DEVICE void store_rows(float *to, const RowValues &x) {
    const LaneAt own = lane_at(0, 0);
    const int part = threadIdx.x / WARP % SPLIT;
    if (threadIdx.x % 4 == 0)
        UNROLL for (int mt = 0; mt < M_TILES; ++mt)
            UNROLL for (int half = 0; half < 2; ++half) to[part * BLOCK_M + own.row + 16 * mt + 8 * half] = x[mt][half];
}
DEVICE float other_row(const float *from, int mt, int half) {
    return from[(threadIdx.x / WARP % SPLIT ^ 1) * BLOCK_M + lane_at(0, 0).row + 16 * mt + 8 * half];
}

// P to [row][key] in shared memory; `to` is the pair's.
DEVICE void store_probabilities(const Scores &s, u32 to) {
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP % SPLIT;
    to += offset<BLOCK_N>(lane / 4, part * KEYS) + lane % 4 * 4;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int j = 0; j < KEYS / 8; ++j)
            UNROLL for (int half = 0; half < 2; ++half)
                store_shared(shifted<BLOCK_N>(to, 16 * mt + 8 * half, 8 * j),
                             pack2(s[mt][j][2 * half], s[mt][j][2 * half + 1]));
}

// acc += P V, with P of the pair's other warp in shared memory.
DEVICE void weigh_other(Output &acc, u32 p, u32 v) {
    UNROLL for (int kk = 0; kk < KEYS / 16; ++kk) {
        u32 a[M_TILES][4];
        UNROLL for (int mt = 0; mt < M_TILES; ++mt) load_matrices(a[mt], shifted<BLOCK_N>(p, 16 * mt, 16 * kk));
        weigh16(acc, a, shifted<HEAD_DIM_V>(v, kk * 16, 0));
    }
}

// Row sums of both warps' keys. `to` is shared memory that nobody uses any more.
DEVICE void join_rows(Rows &r, float *to) {
    RowValues sums;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) sums[mt][half] = whole_row(r.l[mt][half]);
    barrier();
    store_rows(to, sums);
    barrier();
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            r.l[mt][half] = threadIdx.x % 4 == 0 ? sums[mt][half] + other_row(to, mt, half) : 0.0f;
        }
}
#endif

// Natural units are units of m times `unit` times ln 2.
DEVICE void load_partial(const ForwardParams &p, const Tile &t, u32 head, int row, float unit, Rows &r, Output &acc) {
    const int quad = threadIdx.x % 4, part = threadIdx.x / WARP % SPLIT, column = part * COLUMNS + 2 * quad;
    const int left = (EXACT ? HEAD_DIM_V : p.problem.head_dim_v) - column;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            int i = row + 16 * mt + 8 * half;
            if (i >= int(t.row0 + t.rows)) continue;
            r.m[mt][half] = *at<const float>(p.m, t.batch, i, head) / (unit * LN2);
            r.l[mt][half] = quad == 0 && part == 0 ? *at<const float>(p.l, t.batch, i, head) : 0.0f;
            const float *from = at<const float>(p.acc, t.batch, i, head) + column;
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j)
                load_pair(from + 8 * j, acc[mt][j][2 * half], acc[mt][j][2 * half + 1], left - 8 * j);
        }
}

#if PARTIAL
DEVICE void store_partial(const ForwardParams &p, const Tile &t, u32 head, int row, float unit, Rows &r, Output &acc) {
    const int quad = threadIdx.x % 4, part = threadIdx.x / WARP % SPLIT, column = part * COLUMNS + 2 * quad;
    const int left = (EXACT ? HEAD_DIM_V : p.problem.head_dim_v) - column;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            const float l = whole_row(r.l[mt][half]);
            int i = row + 16 * mt + 8 * half;
            if (i >= int(t.row0 + t.rows)) continue;
            if (quad == 0 && part == 0) {
                *at<float>(p.m, t.batch, i, head) = r.m[mt][half] * (unit * LN2);
                *at<float>(p.l, t.batch, i, head) = l;
            }
            float *to = at<float>(p.acc, t.batch, i, head) + column;
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j)
                store_pair(to + 8 * j, acc[mt][j][2 * half], acc[mt][j][2 * half + 1], left - 8 * j);
        }
}
#endif

DEVICE void finish(const ForwardParams &p, const Tile &t, u32 head, int row, float unit, Rows &r, Output &acc) {
    const int quad = threadIdx.x % 4, part = threadIdx.x / WARP % SPLIT, column = part * COLUMNS + 2 * quad;
    const int left = (EXACT ? HEAD_DIM_V : p.problem.head_dim_v) - column;
    float sink = p.sinks.ptr ? *at<const float>(p.sinks, 0, 0, p.problem.head_first + head) * LOG2E : -INFINITY_F;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt)
        UNROLL for (int half = 0; half < 2; ++half) {
            float l = whole_row(r.l[mt][half]), m = r.m[mt][half] * unit;
            if (r.m[mt][half] == -INFINITY_F) m = -INFINITY_F;
            float top = maximum(m, sink), by = 1.0f;
            if (top != m) {  // the sink is above: everything shrinks by exp(m - sink)
                by = exp2_fast(m - top);
                l = l * by + 1.0f;
            } else if (sink != -INFINITY_F) {
                l += exp2_fast(sink - top);
            }
            int i = row + 16 * mt + 8 * half;
            if (i >= int(t.row0 + t.rows)) continue;
            float factor = l == 0.0f ? 0.0f : by / l;
            if (quad == 0 && part == 0)
                *at<float>(p.lse, t.batch, i, head) = top == -INFINITY_F ? top : top * LN2 + __logf(l);
            u16 *to = at<u16>(p.out, t.batch, i, head) + column;
            UNROLL for (int j = 0; j < COLUMNS / 8; ++j)
                store_pair(to + 8 * j, acc[mt][j][2 * half] * factor, acc[mt][j][2 * half + 1] * factor, left - 8 * j);
        }
}

KERNEL(THREADS, MIN_BLOCKS) attention_forward(PARAMS(ForwardParams) p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Place where = place(p.problem, p.problem.heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.problem.tiles)[where.tile];
    if (PARTIAL && p.stage == 3 && tile.count == 0) return;  // Continue has nothing to do here
    const Piece *pieces = reinterpret_cast<const Piece *>(p.problem.pieces);
    const u32 head = where.head, kv = kv_head(p.problem, head);
    const int lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP);
    Control &control = *reinterpret_cast<Control *>(memory + CONTROL_AT);
    const u32 q_at = shared_address(memory), k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES;

    const u16 *k = opaque(thread_part<HEAD_DIM, THREADS>(at<const u16>(p.k, tile.batch, 0, kv), p.k.row, threadIdx.x));
    const u16 *v = opaque(thread_part<HEAD_DIM_V, THREADS>(at<const u16>(p.v, tile.batch, 0, kv), p.v.row, threadIdx.x));
    Cursor next{tile.first, 0};
    bool more = tile.count > 0;
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(q_at, at<const u16>(p.q, tile.batch, tile.row0, head), p.q.row, tile.rows,
                                          EXACT ? HEAD_DIM : p.problem.head_dim, threadIdx.x);
    if (more) {
        next.key = pieces[next.piece].k0;
        load_keys(p, k, pieces[next.piece].k1, next.key, k_at);
        if (STAGES == 2) load_values(p, v, pieces[next.piece].k1, next.key, v_at);
        if (threadIdx.x == 0) {
            control.row0 = tile.row0;
            control.end_row = tile.row0 + tile.rows;
            control.end_piece = tile.first + tile.count;
            control.now[0] = {pieces[next.piece], next.key, 0};
        }
    }
    copy_commit();

    const Score score = score_of(p.problem, head);
    const int first_row = tile.row0 + warp / SPLIT * ROWS;
    Rows rows;
    Output acc;
    UNROLL for (int mt = 0; mt < M_TILES; ++mt) {
        UNROLL for (int half = 0; half < 2; ++half) {
            rows.m[mt][half] = -INFINITY_F;
            rows.l[mt][half] = 0.0f;
        }
        UNROLL for (int j = 0; j < COLUMNS / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) acc[mt][j][e] = 0.0f;
    }
    if (PARTIAL && (p.stage & 1)) load_partial(p, tile, head, first_row + lane / 4, score.unit, rows, acc);
#if DROPOUT
    const Dropout dropout = dropout_of(p.problem, tile.batch, head);
#endif
    const u32 warp_q = q_at + offset<HEAD_DIM>(warp / SPLIT * ROWS, 0) + lane_offset_a<HEAD_DIM>(lane);
    const int part = warp % SPLIT;
    const u32 lane_k = offset<HEAD_DIM>(part * KEYS, 0) + lane_offset_b<HEAD_DIM>(lane);
    const u32 lane_v = shifted<HEAD_DIM_V>(lane_offset_a<HEAD_DIM_V>(lane), 0, part * COLUMNS);
    u32 held[M_TILES][Q_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];

    u32 turn = 0;
    while (more) {
        copy_wait<0>();
        barrier();  // this block is here, and nobody is in the turn before any more
        const u32 stage = STAGES == 2 ? turn & 1 : 0, other = STAGES == 2 ? stage ^ 1 : 0;
        const Now &now = control.now[turn & 1];
        const Piece &piece = now.piece;
        const int first_row = control.row0 + warp / SPLIT * ROWS, last_row = first_row + ROWS - 1;
        const int key = now.key, last_key = key + BLOCK_N - 1;
        // Before the loads, which shared memory serves in order.
        const bool sees = key - last_row <= piece.hi && last_key - first_row >= piece.lo &&
                          first_row < control.end_row;
        const bool masked = last_key >= piece.k1 || last_key - first_row > piece.hi || key - last_row < piece.lo;
        int end = piece.k1;
        if (STAGES == 1) {
            load_values(p, v, end, key, v_at);
            copy_commit();
        }
        const bool moved = advance(next, end);
        if (moved) more = next.piece < control.end_piece;
        if (more) {
            if (moved) {
                end = pieces[next.piece].k1;
                next.key = pieces[next.piece].k0;
            }
            if (threadIdx.x == 0) control.now[turn & 1 ^ 1] = {moved ? pieces[next.piece] : piece, next.key, 0};
            if (STAGES == 2) {
                load_keys(p, k, end, next.key, k_at + other * K_BYTES);
                load_values(p, v, end, next.key, v_at + other * V_BYTES);
            }
        }
        if (STAGES == 2) copy_commit();
        if (Q_IN_REGISTERS && turn == 0) {
            UNROLL for (int mt = 0; mt < M_TILES; ++mt)
                UNROLL for (int kk = 0; kk < HEAD_DIM / 16; ++kk)
                    load_matrices(held[mt][Q_IN_REGISTERS ? kk : 0], shifted<HEAD_DIM>(warp_q, mt * 16, kk * 16));
        }
        Scores s;
        RowValues top;
        if (sees) scores(s, warp_q, held, k_at + stage * K_BYTES + lane_k);
        const auto finish_scores = [&] {
#if TRANSFORM
            transform_all(s, score, piece, lane_at(control.row0, now.key));
#endif
            if (masked) mask(s, piece, lane_at(control.row0, now.key));
            row_maxima(s, top);
        };
#if SPLIT > 1
        float *maxima = reinterpret_cast<float *>(memory + MAXIMA_AT);
        if (sees) {
            finish_scores();
            store_rows(maxima, top);
            if (STAGES == 2) pair_barrier();
        }
#endif
        if (STAGES == 1) {
            copy_wait<0>();
            barrier();  // V is here, and nobody reads K any more
            if (more) load_keys(p, k, end, next.key, k_at);
            copy_commit();
        }
        if (sees) {
#if SPLIT > 1
            UNROLL for (int mt = 0; mt < M_TILES; ++mt)
                UNROLL for (int half = 0; half < 2; ++half)
                    top[mt][half] = maximum(top[mt][half], other_row(maxima, mt, half));
#else
            finish_scores();
#endif
            follow_maximum(top, rows, acc, score.unit);
            exponentials(s, rows, score.unit);
#if DROPOUT
            drop(s, dropout, piece, lane_at(control.row0, now.key));
#endif
            const u32 values = v_at + stage * V_BYTES + lane_v;
#if SPLIT > 1
            const u32 pair_p = q_at + P_AT + offset<BLOCK_N>(warp / SPLIT * ROWS, 0);
            store_probabilities(s, pair_p);
            weigh(acc, s, values + offset<HEAD_DIM_V>(part * KEYS, 0));
            pair_barrier();
            weigh_other(acc, shifted<BLOCK_N>(pair_p + lane_offset_a<BLOCK_N>(lane), 0, (part ^ 1) * KEYS),
                        values + offset<HEAD_DIM_V>((part ^ 1) * KEYS, 0));
#else
            weigh(acc, s, values);
#endif
        }
        ++turn;
    }
    copy_wait<0>();
#if SPLIT > 1
    join_rows(rows, reinterpret_cast<float *>(memory));
#endif

    const Place end_place = place(p.problem, p.problem.heads);  // read anew: the loop needs the registers
    const Tile done = reinterpret_cast<const Tile *>(p.problem.tiles)[end_place.tile];
#if PARTIAL
    if (p.stage & 2) {
        store_partial(p, done, end_place.head, lane_at(done.row0, 0).row, score.unit, rows, acc);
        return;
    }
#endif
    finish(p, done, end_place.head, lane_at(done.row0, 0).row, score.unit, rows, acc);
}
