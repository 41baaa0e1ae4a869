// What the Hopper kernels for dK and dV share: parameters, the layout of shared memory, and the warps that bring data.
//
// Macros: BLOCK_M queries and BLOCK_N keys of a block; STAGES; DQ; GRADIENT_F32. Head sizes are multiples of 64.

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

constexpr int GROUPS = 2, KEY_GROUPS = BLOCK_N / 64, THREADS = 128 * (GROUPS + 1);
constexpr int PANELS = HEAD_DIM / 64, PANELS_V = HEAD_DIM_V / 64;
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM_V % 64 == 0 && (BLOCK_M == 64 || BLOCK_M == 128), "tiles");
constexpr u32 KEY_PANEL = BLOCK_N * 128, QUERY_PANEL = BLOCK_M * 128;
constexpr u32 K_BYTES = PANELS * KEY_PANEL, V_BYTES = PANELS_V * KEY_PANEL;
constexpr u32 Q_BYTES = PANELS * QUERY_PANEL, O_BYTES = PANELS_V * QUERY_PANEL;
constexpr u32 DS_BYTES = BLOCK_M / 64 * KEY_PANEL;         // [64 queries a panel][key][query]
constexpr u32 DQ_BOX = BLOCK_M * 128, DQ_BYTES = HEAD_DIM / 32 * DQ_BOX;  // [32 columns a box][query][column]
constexpr u32 V_AT = K_BYTES, Q_AT = V_AT + V_BYTES, O_AT = Q_AT + STAGES * Q_BYTES, DS_AT = O_AT + STAGES * O_BYTES;
constexpr u32 DQ_AT = DS_AT + (DQ ? 2 * DS_BYTES : 0), P_AT = DQ_AT + (DQ ? DQ_BYTES : 0);
constexpr u32 P_BYTES = BLOCK_M * 64 * 4;  // f32, in the order of accumulators; used where the groups share keys
constexpr u32 STATS_AT = P_AT + (KEY_GROUPS < GROUPS ? 2 * P_BYTES : 0);
constexpr u32 FULL_KV = STATS_AT + STAGES * 2 * BLOCK_M * 4, RAW = FULL_KV + 8, FULL_DQ = RAW + 8, FREE_DQ = FULL_DQ + 8;
constexpr u32 FULL_P = FREE_DQ + 8, FREE_P = FULL_P + 16;
constexpr u32 FULL_Q = FREE_P + 16, FULL_O = FULL_Q + 8 * STAGES, FULL_S = FULL_O + 8 * STAGES;
constexpr u32 FREE_Q = FULL_S + 8 * STAGES, FREE_O = FREE_Q + 8 * STAGES, FREE_S = FREE_O + 8 * STAGES;
constexpr u32 BLOCKS_AT = FULL_KV + 192;

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
        UNROLL for (int g = 0; g < KEY_GROUPS; ++g) {
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

// 64 keys x BLOCK_M queries: c = rows of `keys` times rows of `queries`.
template <int DIM> DEVICE void start_pairs(Pairs &c, u32 keys, u32 queries) {
    const Operand a = along_columns(keys), b = along_columns(queries);
    products_fence();
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk)
        product<0, 0>(c, a.on(kk / 4 * KEY_PANEL + kk % 4 * 32), b.on(kk / 4 * QUERY_PANEL + kk % 4 * 32), kk > 0);
    products_commit();
}

// c += a times the rows of `queries`.
template <int N> DEVICE void start_gather(float (&c)[N / 8][4], const Packed &a, u32 queries) {
    const Operand b = along_rows(queries, QUERY_PANEL);
    products_fence();
    UNROLL for (int kk = 0; kk < BLOCK_M / 16; ++kk) product<1>(c, a[kk], b.on(kk * 2048), true);
    products_commit();
}

template <int N> DEVICE void store_gradient(const Tensor &g, const Tile &tile, u32 kv, int row0, const float (&c)[N / 8][4], int dim, float scale, bool add) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half, column = threadIdx.x % 4 * 2;
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

// Barriers that all roles use; one thread calls it.
DEVICE void init_barriers(u32 base) {
    barrier_init(base + FULL_KV, 2);
    barrier_init(base + RAW, 1);
    barrier_init(base + FULL_DQ, 4 * GROUPS);
    barrier_init(base + FREE_DQ, 1);
    UNROLL for (int i = 0; i < 2; ++i) {
        barrier_init(base + FULL_P + 8 * i, 4);
        barrier_init(base + FREE_P + 8 * i, 4);
    }
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

