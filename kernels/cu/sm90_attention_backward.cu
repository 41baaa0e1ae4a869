// Attention backward over slices on Hopper's warpgroup products (16-bit elements, f32 accumulation). Mathematics as in
// sm80_attention_backward.cu.
//
//   one block = one key tile of one KV head (2 x 64 keys); K and V stay in shared memory, dK and dV in registers
//     copier (a warp)       for each query head of the KV head, each piece, each BLOCK_M query rows: describes the block,
//                           starts the copies of Q and dout
//     reader (a warp)       brings lse and delta of the block's rows
//     adder (a warp)        adds dQ of a block to f32 memory, by bulk copies
//     consumers (2 warpgroups, 64 keys each)
//         S^T = K Q^T and dP^T = V dout^T are started
//         P^T = exp2(S^T - lse), 0 outside the band; dS^T = P^T (dP^T - delta)
//         dV += P^T dout is started, with P^T in registers; dS^T goes to shared memory
//         both have written dS: dQ = dS K (each group a half of it) and dK += dS^T Q are started
//         dQ goes to shared memory for the adder
//     write or add dK and dV
//
// Rows of Q, dout, K, V past a piece or tile may hold anything: the copier zeroes them. (Shah et al., FlashAttention-3, 2024.)
//
// Macros: BLOCK_M (64, or 128 for small heads), STAGES, DQ, GRADIENT_F32, REGISTERS, PRODUCER_REGISTERS. Head sizes are
// multiples of 64 here.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq;      // f32, added to
    Tensor dk, dv;  // f32 with GRADIENT_F32, otherwise the I/O dtype
    u32 add;        // bit 0: dk is added to, bit 1: dv is
    u32 unused;
};
struct MappedBackwardParams {
    TensorMap q, k, v, dout;  // boxes of 64 columns; BLOCK_M or BLOCK_N rows
    TensorMap dq;             // boxes of 32 columns of f32, BLOCK_M rows
    BackwardParams call;
    u64 unused[4];
};
static_assert(sizeof(BackwardParams) == 416 && sizeof(MappedBackwardParams) == 1088, "layout");

constexpr int GROUPS = 2, BLOCK_N = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
constexpr int PANELS = HEAD_DIM / 64, PANELS_V = HEAD_DIM_V / 64;
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM_V % 64 == 0 && (BLOCK_M == 64 || BLOCK_M == 128), "tiles");
constexpr u32 KEY_PANEL = BLOCK_N * 128, QUERY_PANEL = BLOCK_M * 128;
constexpr u32 K_BYTES = PANELS * KEY_PANEL, V_BYTES = PANELS_V * KEY_PANEL;
constexpr u32 Q_BYTES = PANELS * QUERY_PANEL, O_BYTES = PANELS_V * QUERY_PANEL;
constexpr u32 DS_BYTES = BLOCK_M / 64 * KEY_PANEL;         // [64 queries a panel][key][query]
constexpr u32 DQ_BOX = BLOCK_M * 128, DQ_BYTES = HEAD_DIM / 32 * DQ_BOX;  // [32 columns a box][query][column]
constexpr u32 V_AT = K_BYTES, Q_AT = V_AT + V_BYTES, O_AT = Q_AT + STAGES * Q_BYTES, DS_AT = O_AT + STAGES * O_BYTES;
constexpr u32 DQ_AT = DS_AT + (DQ ? 2 * DS_BYTES : 0), STATS_AT = DQ_AT + (DQ ? DQ_BYTES : 0);
constexpr u32 FULL_KV = STATS_AT + STAGES * 2 * BLOCK_M * 4, RAW = FULL_KV + 8, FULL_DQ = RAW + 8, FREE_DQ = FULL_DQ + 8;
constexpr u32 FULL_Q = FREE_DQ + 8, FULL_O = FULL_Q + 8 * STAGES, FULL_S = FULL_O + 8 * STAGES;
constexpr u32 FREE_Q = FULL_S + 8 * STAGES, FREE_O = FREE_Q + 8 * STAGES, FREE_S = FREE_O + 8 * STAGES;
constexpr u32 BLOCKS_AT = FULL_KV + 160;

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Pairs[BLOCK_M / 8][4];  // 64 keys x BLOCK_M queries of a group: key lane / 4 + 8 (e / 2), query 8 j + ...
typedef u32 Packed[BLOCK_M / 16][4];

enum : u32 { END = 1, MASKED = 2 /* << group */ };
struct Block {
    Piece piece;
    i32 query;
    u32 flags, head, unused;
};
static_assert(sizeof(Block) == 72, "layout");
constexpr int BLOCKS = 4;  // more than STAGES
static_assert(STAGES < BLOCKS && FREE_S + 8 * STAGES <= BLOCKS_AT && BLOCKS_AT + BLOCKS * sizeof(Block) == SHARED_BYTES,
              "shared memory");

// Local query heads of a KV head.
struct Heads {
    u32 first, past;
};
DEVICE Heads heads_of(const Problem &p, u32 kv) {
    const int first = int((p.kv_first + kv) * p.group) - int(p.head_first), past = first + int(p.group);
    return {u32(first > 0 ? first : 0), u32(past < int(p.heads) ? past : int(p.heads))};
}

// Calls `each` with head, piece and first query row of every block, in order.
template <typename F> DEVICE void each_block(const Problem &p, const Tile &tile, u32 kv, F &&each) {
    const Heads heads = heads_of(p, kv);
    const Piece *pieces = reinterpret_cast<const Piece *>(p.pieces);
    for (u32 head = heads.first; head < heads.past; ++head)
        for (u32 i = tile.first; i < tile.first + tile.count; ++i) {
            const Piece piece = pieces[i];
            for (int query = piece.q0; query < piece.q1; query += BLOCK_M) each(head, piece, query);
        }
}

// ---- the copier ----

struct Copier {
    const MappedBackwardParams &p;
    unsigned char *memory;
    u32 base;
    int lane;
    Tile tile;
    u32 kv;
    u32 turn, tails;

    // One tile to shared memory; rows from `valid` on become 0. The barrier counts `bytes`.
    template <int ROWS> DEVICE void tile_to(u32 to, const TensorMap *map, int panels, int row, u32 head, int valid, u32 full) {
        const bool tail = valid < ROWS;
        const u32 arrived = tail ? base + RAW : full;
        if (lane == 0) {
            barrier_expect(arrived, panels * ROWS * 128);
            for (int i = 0; i < panels; ++i)
                copy_box(to + i * ROWS * 128, map, {64 * i, row, int(head), int(tile.batch)}, arrived);
        }
        if (!tail) return;
        barrier_wait(base + RAW, tails++ & 1);
        for (int panel = 0; panel < panels; ++panel)
            for (int i = valid * 8 + lane; i < ROWS * 8; i += WARP) store_shared4(to + panel * ROWS * 128 + 16 * i, 0, 0, 0, 0);
        fence_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    }

    DEVICE u32 masked(const Piece &piece, int query) {
        u32 flags = 0;
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const int first = tile.row0 + 64 * g, last = first + 63;
            if (first - (query + BLOCK_M - 1) < piece.lo || last - query > piece.hi || first < piece.k0 || last >= piece.k1)
                flags |= MASKED << g;
        }
        return flags;
    }

    DEVICE void run() {
        tile_to<BLOCK_N>(base, &p.k, PANELS, tile.row0, kv, tile.rows, base + FULL_KV);
        tile_to<BLOCK_N>(base + V_AT, &p.v, PANELS_V, tile.row0, kv, tile.rows, base + FULL_KV);
        Block *blocks = reinterpret_cast<Block *>(memory + BLOCKS_AT);
        each_block(p.call.problem, tile, kv, [&](u32 head, const Piece &piece, int query) {
            const u32 s = turn % STAGES, parity = turn / STAGES & 1 ^ 1;
            barrier_wait(base + FREE_Q + 8 * s, parity);
            if (lane == 0) blocks[turn % BLOCKS] = {piece, query, masked(piece, query), head, 0};
            __syncwarp();
            tile_to<BLOCK_M>(base + Q_AT + s * Q_BYTES, &p.q, PANELS, query, head, piece.q_end - query, base + FULL_Q + 8 * s);
            barrier_wait(base + FREE_O + 8 * s, parity);
            tile_to<BLOCK_M>(base + O_AT + s * O_BYTES, &p.dout, PANELS_V, query, head, piece.q_end - query, base + FULL_O + 8 * s);
            ++turn;
        });
        const u32 s = turn % STAGES;
        barrier_wait(base + FREE_Q + 8 * s, turn / STAGES & 1 ^ 1);
        if (lane == 0) {
            blocks[turn % BLOCKS].flags = END;
            barrier_arrive(base + FULL_Q + 8 * s);
        }
    }
};

// ---- the reader: lse in log2 units, +inf where P must be 0; delta ----

DEVICE void read_statistics(const MappedBackwardParams &p, u32 base, const Tile &tile, u32 kv, int lane) {
    u32 turn = 0;
    each_block(p.call.problem, tile, kv, [&](u32 head, const Piece &piece, int query) {
        const u32 s = turn % STAGES;
        float lse[BLOCK_M / WARP], delta[BLOCK_M / WARP];
        UNROLL for (int i = 0; i < BLOCK_M / WARP; ++i) {
            const int row = query + WARP * i + lane;
            lse[i] = row < piece.q1 ? *at<const float>(p.call.lse, tile.batch, row, head) : -INFINITY_F;
            delta[i] = row < piece.q1 ? *at<const float>(p.call.delta, tile.batch, row, head) : 0.0f;
        }
        barrier_wait(base + FREE_S + 8 * s, turn / STAGES & 1 ^ 1);
        const u32 to = base + STATS_AT + (s * 2 * BLOCK_M + lane) * 4;
        UNROLL for (int i = 0; i < BLOCK_M / WARP; ++i) {
            store_shared(to + WARP * 4 * i, __float_as_uint(lse[i] == -INFINITY_F ? INFINITY_F : lse[i] * LOG2E));
            store_shared(to + (BLOCK_M + WARP * i) * 4, __float_as_uint(delta[i]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(base + FULL_S + 8 * s);
        ++turn;
    });
}

// ---- the adder ----

#if DQ
DEVICE void add_gradients(const MappedBackwardParams &p, u32 base, const Tile &tile, u32 kv, int lane) {
    u32 turn = 0;
    each_block(p.call.problem, tile, kv, [&](u32 head, const Piece &, int query) {
        barrier_wait(base + FULL_DQ, turn & 1);
        if (lane == 0) {
            UNROLL for (int i = 0; i < HEAD_DIM / 32; ++i)
                add_box(&p.dq, {32 * i, query, int(head), int(tile.batch)}, base + DQ_AT + i * DQ_BOX);
            copies_commit();
            copies_read<0>();
            barrier_arrive(base + FREE_DQ);
        }
        __syncwarp();
        ++turn;
    });
    if (lane == 0) copies_done<0>();
}
#endif

// ---- the consumers ----

DEVICE void mask(Pairs &s, const Piece &piece, int key0, int query) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int key = key0 + 8 * half;
        int first = key - piece.hi - query, last = key - piece.lo - query;
        if (key < piece.k0 || key >= piece.k1) last = first - 1;
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 2; ++e) {
                const int r = 8 * j + e;
                if (r < first || r > last) s[j][2 * half + e] = -INFINITY_F;
            }
    }
}

DEVICE float2 load_shared2(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}

struct Consumer {
    const BackwardParams &p;
    const Block *blocks;
    u32 base;
    int group, warp, lane;  // warp of the group
    Tile tile;
    u32 kv;
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
    u32 head;

    DEVICE void use_head(u32 of) {
        if (of == head) return;
        head = of;
        score = score_of(p.problem, head);
#if DROPOUT
        dropout = dropout_of(p.problem, tile.batch, head);
#endif
    }

    // First key of this lane, first query of this lane.
    DEVICE int key() { return int(tile.row0) + 64 * group + 16 * warp + lane / 4; }
    DEVICE int query(const Block &block) { return block.query + lane % 4 * 2; }

    // S^T becomes P^T; with SOFTCAP, `bent` its derivative.
    DEVICE void probabilities(Pairs &s, const Block &block, u32 stats, float (*bent)[4]) {
#if TRANSFORM
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float d;
                s[j][e] = transform(score, block.piece, s[j][e], query(block) + 8 * j + e % 2, key() + 8 * (e / 2), d);
#if SOFTCAP
                bent[j][e] = d;
#endif
            }
#endif
        if (block.flags & MASKED << group) mask(s, block.piece, key(), query(block));
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 lse = load_shared2(stats + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e)
                s[j][e] = exp2_fast(s[j][e] * score.unit - (e % 2 ? lse.y : lse.x));
        }
    }

    // dP^T becomes dS^T, and P^T that which weighs dout.
    DEVICE void differences(Pairs &dp, Pairs &s, const Block &block, u32 stats, const float (*bent)[4]) {
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 delta = load_shared2(stats + BLOCK_M * 4 + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e) {
                float keep = 1.0f;
#if DROPOUT
                keep = keep_factor(dropout, block.piece, query(block) + 8 * j + e % 2, key() + 8 * (e / 2));
#endif
                dp[j][e] = s[j][e] * (dp[j][e] * keep - (e % 2 ? delta.y : delta.x));
                s[j][e] *= keep;
#if SOFTCAP
                dp[j][e] *= bent[j][e];
#endif
            }
        }
    }

    // dS^T to [key][query] in shared memory.
    DEVICE void store_differences(const Packed &ds, u32 to) {
        const int row = 64 * group + 16 * warp + lane % 16;
        UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
            const u32 unit = u32(2 * (i % 4) + lane / 16) ^ u32(row % 8);
            store_matrices(to + i / 4 * KEY_PANEL + row * 128 + unit * 16, ds[i]);
        }
    }

    template <int N> DEVICE void store_gradient(const Tensor &g, const float (&c)[N / 8][4], int dim, float scale, bool add) {
        UNROLL for (int half = 0; half < 2; ++half) {
            const int row = 64 * group + 16 * warp + lane / 4 + 8 * half, column = lane % 4 * 2;
            if (row >= int(tile.rows)) continue;
            Gradient *to = at<Gradient>(g, tile.batch, tile.row0 + row, kv) + column;
            UNROLL for (int j = 0; j < N / 8; ++j) {
                float x = c[j][2 * half] * scale, y = c[j][2 * half + 1] * scale;
                const int left = dim - column - 8 * j;
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

#if DQ
    static constexpr int DQ_COLUMNS = BLOCK_M == 128 ? HEAD_DIM : HEAD_DIM / 2;
    typedef float DQuery[DQ_COLUMNS / 8][4];

    // This group's part of dQ = dS K: with 128 queries 64 of them, otherwise half of the columns.
    DEVICE void start_dq(DQuery &dq, u32 ds) {
        const u64 a = along_rows(ds + (BLOCK_M == 128 ? group * KEY_PANEL : 0), KEY_PANEL);
        const u32 column = BLOCK_M == 128 ? 0 : group * DQ_COLUMNS;
        const u64 b = along_rows(base + column / 64 * KEY_PANEL + column % 64 * 2, KEY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk)
            product<1, 1>(dq, a + (kk * 2048 >> 4), b + (kk * 2048 >> 4), kk > 0);
        products_commit();
    }

    DEVICE void store_dq(const DQuery &dq, float scale) {
        const int column0 = BLOCK_M == 128 ? 0 : group * DQ_COLUMNS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int row = (BLOCK_M == 128 ? 64 * group : 0) + 16 * warp + lane / 4 + 8 * half;
            UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j) {
                const int column = column0 + 8 * j + lane % 4 * 2;
                const u32 unit = u32(column % 32 / 4) ^ u32(row % 8);
                store_shared2(base + DQ_AT + column / 32 * DQ_BOX + row * 128 + unit * 16 + column % 4 * 4,
                              dq[j][2 * half] * scale, dq[j][2 * half + 1] * scale);
            }
        }
    }
#endif

    template <int KK, int N> DEVICE void start_pairs(float (&c)[N / 8][4], u32 keys, u32 queries) {
        const u64 a = along_columns(keys + group * 8192), b = along_columns(queries);
        products_fence();
        UNROLL for (int kk = 0; kk < KK / 16; ++kk)
            product<0, 0>(c, a + ((kk / 4 * KEY_PANEL + kk % 4 * 32) >> 4), b + ((kk / 4 * QUERY_PANEL + kk % 4 * 32) >> 4), kk > 0);
        products_commit();
    }

    template <int N> DEVICE void start_gather(float (&c)[N / 8][4], const Packed &a, u32 queries) {
        const u64 b = along_rows(queries, QUERY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_M / 16; ++kk) product<1>(c, a[kk], b + (kk * 2048 >> 4), true);
        products_commit();
    }

    DEVICE void arrive(u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + barrier);
    }

    DEVICE void run() {
        float dk[HEAD_DIM / 8][4], dv[HEAD_DIM_V / 8][4];
        UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dk[j][e] = 0.0f;
        UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dv[j][e] = 0.0f;
        barrier_wait(base + FULL_KV, 0);
        for (u32 turn = 0;; ++turn) {
            const u32 stage = turn % STAGES, parity = turn / STAGES & 1;
            const u32 q_at = base + Q_AT + stage * Q_BYTES, o_at = base + O_AT + stage * O_BYTES;
            const u32 stats = base + STATS_AT + stage * 2 * BLOCK_M * 4 + lane % 4 * 8;
            barrier_wait(base + FULL_Q + 8 * stage, parity);
            const Block &block = blocks[turn % BLOCKS];
            if (block.flags & END) break;
            use_head(block.head);
            Pairs s, dp;
            start_pairs<HEAD_DIM, BLOCK_M>(s, base, q_at);
            barrier_wait(base + FULL_O + 8 * stage, parity);
            start_pairs<HEAD_DIM_V, BLOCK_M>(dp, base + V_AT, o_at);
            barrier_wait(base + FULL_S + 8 * stage, parity);
            products_wait<1>();
            pin(s);
#if SOFTCAP
            Pairs bent;
#else
            float(*bent)[4] = nullptr;
#endif
            probabilities(s, block, stats, bent);
            products_wait<0>();
            pin(dp);
            differences(dp, s, block, stats, bent);
            arrive(FREE_S + 8 * stage);
            Packed weights, ds;
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(weights[i], s[2 * i], s[2 * i + 1]);
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
            const u32 ds_at = base + DS_AT + turn % 2 * DS_BYTES;
            if (DQ) {
                store_differences(ds, ds_at);
                fence_proxy();
            }
            pin(dv);
            pin(weights);
            start_gather<HEAD_DIM_V>(dv, weights, o_at);
#if DQ
            group_sync(1, 128 * GROUPS);
            DQuery dq;
            pin(dk);
            pin(ds);
            start_dq(dq, ds_at);
            start_gather<HEAD_DIM>(dk, ds, q_at);
            products_wait<2>();
            pin(dv);
            pin(weights);
            arrive(FREE_O + 8 * stage);
            products_wait<1>();
            pin(dq);
            barrier_wait(base + FREE_DQ, turn & 1 ^ 1);
            store_dq(dq, p.problem.scale);
            fence_proxy();
            arrive(FULL_DQ);
#else
            pin(dk);
            pin(ds);
            start_gather<HEAD_DIM>(dk, ds, q_at);
            products_wait<1>();
            pin(dv);
            pin(weights);
            arrive(FREE_O + 8 * stage);
#endif
            products_wait<0>();
            pin(dk);
            pin(ds);
            arrive(FREE_Q + 8 * stage);
        }
        const bool add_k = p.add & 1, add_v = p.add & 2;
        if (tile.count || !add_k)
            store_gradient<HEAD_DIM>(p.dk, dk, EXACT ? HEAD_DIM : p.problem.head_dim, p.problem.scale, add_k);
        if (tile.count || !add_v)
            store_gradient<HEAD_DIM_V>(p.dv, dv, EXACT ? HEAD_DIM_V : p.problem.head_dim_v, 1.0f, add_v);
    }
};

KERNEL(THREADS, 1) attention_backward(PARAMS(MappedBackwardParams) p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = shared_address(memory);
    const int warp = uniform(threadIdx.x / WARP), group = warp / 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        barrier_init(base + FULL_KV, 2);
        barrier_init(base + RAW, 1);
        barrier_init(base + FULL_DQ, 4 * GROUPS);
        barrier_init(base + FREE_DQ, 1);
        UNROLL for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + FULL_Q + 8 * i, 1);
            barrier_init(base + FULL_O + 8 * i, 1);
            barrier_init(base + FULL_S + 8 * i, 1);
            barrier_init(base + FREE_Q + 8 * i, 4 * GROUPS);
            barrier_init(base + FREE_O + 8 * i, 4 * GROUPS);
            barrier_init(base + FREE_S + 8 * i, 4 * GROUPS);
        }
        fence_proxy();
    }
    barrier();
    const Place where = place(p.call.problem, p.call.problem.kv_heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.call.problem.tiles)[where.tile];
    if (group == GROUPS) {
        registers_less<PRODUCER_REGISTERS>();
        if (warp % 4 == 0) Copier{p, memory, base, lane, tile, where.head}.run();
        if (warp % 4 == 1) read_statistics(p, base, tile, where.head, lane);
#if DQ
        if (warp % 4 == 2) add_gradients(p, base, tile, where.head, lane);
#endif
    } else {
        registers_more<REGISTERS>();
        Consumer{p.call, reinterpret_cast<const Block *>(memory + BLOCKS_AT), base, group, warp % 4, lane, tile, where.head,
                 score_of(p.call.problem, 0)
#if DROPOUT
                 , dropout_of(p.call.problem, tile.batch, 0)
#endif
                 , 0}
            .run();
    }
}
