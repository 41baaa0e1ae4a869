// What the Hopper kernels for dK and dV share: parameters, the layout of shared memory, the warps that bring data.
//
// With FOLD, lse and delta are not subtracted by the consumers, who would load them from shared memory, which is what is short:
// the products subtract them, as 16 more columns of Q and dout (the statistic, in parts that are elements, and zeros) and of K and
// V (ones).
//
// Macros: BLOCK_M queries and BLOCK_N keys of a block; STAGES (of dout), Q_STAGES; DQ; FOLD; GRADIENT_F32. Head sizes are
// multiples of 64.

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
    u64 counter;  // u32 in device memory: 0, and 0 again when the kernel is done
    u64 unused[3];
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
constexpr u32 V_AT = K_BYTES, Q_AT = V_AT + V_BYTES, O_AT = Q_AT + Q_STAGES * Q_BYTES, DS_AT = O_AT + STAGES * O_BYTES;
constexpr u32 DQ_AT = DS_AT + (DQ ? 2 * DS_BYTES : 0), P_AT = DQ_AT + (DQ ? DQ_BYTES : 0);
#if defined(IO_BF16)
constexpr u32 P_BYTES = BLOCK_M * 64 * 2;  // in the order of accumulators; used where the groups share keys
#else
constexpr u32 P_BYTES = BLOCK_M * 64 * 4;
#endif
constexpr u32 STATS_AT = P_AT + (KEY_GROUPS < GROUPS ? 2 * P_BYTES : 0);
constexpr u32 STATISTIC = BLOCK_M * (FOLD ? 32 : 4);  // lse of a block, then delta
constexpr u32 FULL_KV = STATS_AT + STAGES * 2 * STATISTIC, RAW = FULL_KV + 8, FULL_DQ = RAW + 8, FREE_DQ = FULL_DQ + 8;
constexpr u32 FULL_P = FREE_DQ + 8, FREE_P = FULL_P + 16;
constexpr u32 FULL_Q = FREE_P + 16, FULL_O = FULL_Q + 8 * Q_STAGES, FULL_S = FULL_O + 8 * STAGES;
constexpr u32 FREE_Q = FULL_S + 8 * STAGES, FREE_O = FREE_Q + 8 * Q_STAGES, FREE_S = FREE_O + 8 * STAGES;
constexpr u32 FREE_KV = FREE_S + 8 * STAGES, FULL_W = FREE_KV + 8, FREE_W = FULL_W + 16;
constexpr u32 FULL_DS = FREE_W + 16, FREE_DS = FULL_DS + 16, BLOCKS_AT = FULL_KV + 256;

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Pairs[BLOCK_M / 8][4];  // 64 keys x BLOCK_M queries of a group: key lane / 4 + 8 (e / 2), query 8 j + ...
typedef u32 Packed[BLOCK_M / 16][4];

enum : u32 { LAST = 1 /* of a tile */, MASKED = 2 /* << group */ };
struct Block {
    Piece piece;
    i32 query;
    u32 flags, head;
    float bias;  // see BIASED
};
constexpr int BLOCKS = 4;  // more than Q_STAGES

// What the copier tells about a tile. EMPTY: no query sees its keys. DONE: there is none. `down`: queries descend.
enum : u32 { BUSY, EMPTY, DONE };
struct Work {
    Tile tile;
    u32 kv, state, down, unused;
};
constexpr int WORKS = 2;
constexpr u32 WORKS_AT = BLOCKS_AT + BLOCKS * sizeof(Block);
static_assert(sizeof(Block) == 72 && sizeof(Work) == 40 && Q_STAGES < BLOCKS, "layout");
static_assert(FREE_DS + 16 <= BLOCKS_AT && WORKS_AT + WORKS * sizeof(Work) == SHARED_BYTES, "shared memory");

// Local query heads of a KV head.
struct Heads {
    u32 first, past;
};
DEVICE Heads heads_of(const Problem &p, u32 kv) {
    const int first = int((p.kv_first + kv) * p.group) - int(p.head_first), past = first + int(p.group);
    return {u32(first > 0 ? first : 0), u32(past < int(p.heads) ? past : int(p.heads))};
}

// Calls `each` with the tiles of this block and their numbers; every warp but the copier does.
template <typename F> DEVICE void each_tile(const unsigned char *memory, u32 base, int lane, F &&each) {
    const Work *works = reinterpret_cast<const Work *>(memory + WORKS_AT);
    for (u32 n = 0;; ++n) {
        const u32 slot = n % WORKS;
        barrier_wait(base + FULL_W + 8 * slot, n / WORKS & 1);
        if (works[slot].state == DONE) return;
        each(works[slot], n);
        __syncwarp();
        if (lane == 0) barrier_arrive(base + FREE_W + 8 * slot);
    }
}

// Calls `each` with head, piece and first query row of every block of a tile, in order, and whether it is the last one.
//
// The blocks of the grid go through the queries in step, and so read the same ones at the same time: a first wave of tiles
// begins at the last queries; with a causal mask its shorter tiles end earlier, and those of the second wave, which begin
// there and ascend, are where the first wave would be if it turned. All end at the last queries, from where the third begins.
template <typename F> DEVICE void each_block(const Problem &p, const Work &work, F &&each) {
    if (work.state == EMPTY) return;
    const Heads heads = heads_of(p, work.kv);
    const Piece *pieces = reinterpret_cast<const Piece *>(p.pieces) + work.tile.first;
    for (u32 left = work.tile.count; left > 0; --left) {
        const Piece &piece = pieces[work.down ? left - 1 : work.tile.count - left];
        const int step = work.down ? -BLOCK_M : BLOCK_M, blocks = (piece.q1 - piece.q0 + BLOCK_M - 1) / BLOCK_M;
        int query = piece.q0 + (work.down ? (blocks - 1) * BLOCK_M : 0);
        for (int block = blocks; block > 0; --block, query += step)
            for (u32 head = heads.first; head < heads.past; ++head)
                each(head, piece, query, left == 1 && block == 1 && head + 1 == heads.past);
    }
}

// With FOLD, ALiBi is a bias to the dot product: this for a distance of 1.
#define BIASED (ALIBI && FOLD)
DEVICE float bias_of([[maybe_unused]] const Problem &p, [[maybe_unused]] u32 head) {
#if BIASED
    return divide_fast(-*at<const float>(p.slopes, 0, 0, p.head_first + head), p.scale);
#else
    return 0.0f;
#endif
}

// ---- the copier ----

struct Copier {
    const MappedBackwardParams &p;
    unsigned char *memory;
    u32 base;
    int lane;
    u32 turn, tails;

    // One tile to shared memory; rows from `valid` on become 0. The barrier counts `bytes`.
    template <int ROWS>
    DEVICE void tile_to(u32 to, const TensorMap *map, int panels, int row, u32 head, u32 batch, int valid, u32 full) {
        const bool tail = valid < ROWS;
        const u32 arrived = tail ? base + RAW : full;
        if (lane == 0) {
            barrier_expect(arrived, panels * ROWS * 128);
            for (int i = 0; i < panels; ++i) copy_box(to + i * ROWS * 128, map, {64 * i, row, int(head), int(batch)}, arrived);
        }
        if (!tail) return;
        barrier_wait(base + RAW, tails++ & 1);
        for (int panel = 0; panel < panels; ++panel)
            for (int i = valid * 8 + lane; i < ROWS * 8; i += WARP) store_shared4(to + panel * ROWS * 128 + 16 * i, 0, 0, 0, 0);
        fence_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    }

    DEVICE u32 masked(const Piece &piece, int key, int query) {
        u32 flags = 0;
        UNROLL for (int g = 0; g < KEY_GROUPS; ++g) {
            const int first = key + 64 * g, last = first + 63;
            if (first - (query + BLOCK_M - 1) < piece.lo || last - query > piece.hi || first < piece.k0 || last >= piece.k1)
                flags |= MASKED << g;
        }
        return flags;
    }

    // Keys and values of a tile, and what its blocks need.
    DEVICE void load(const Work &work, u32 n) {
        const int key = work.tile.row0, rows = work.tile.rows;
        barrier_wait(base + FREE_KV, n & 1 ^ 1);
        tile_to<BLOCK_N>(base, &p.k, PANELS, key, work.kv, work.tile.batch, rows, base + FULL_KV);
        tile_to<BLOCK_N>(base + V_AT, &p.v, PANELS_V, key, work.kv, work.tile.batch, rows, base + FULL_KV);
        Block *blocks = reinterpret_cast<Block *>(memory + BLOCKS_AT);
        each_block(p.call.problem, work, [&](u32 head, const Piece &piece, int query, bool last) {
            const u32 q = turn % Q_STAGES, s = turn % STAGES, batch = work.tile.batch;
            const int valid = piece.q_end - query;
            barrier_wait(base + FREE_Q + 8 * q, turn / Q_STAGES & 1 ^ 1);
            const u32 flags = masked(piece, key, query) | (last ? LAST : 0);
            if (lane == 0) blocks[turn % BLOCKS] = {piece, query, flags, head, bias_of(p.call.problem, head)};
            tile_to<BLOCK_M>(base + Q_AT + q * Q_BYTES, &p.q, PANELS, query, head, batch, valid, base + FULL_Q + 8 * q);
            barrier_wait(base + FREE_O + 8 * s, turn / STAGES & 1 ^ 1);
            tile_to<BLOCK_M>(base + O_AT + s * O_BYTES, &p.dout, PANELS_V, query, head, batch, valid, base + FULL_O + 8 * s);
            ++turn;
        });
    }

    // Describes tile `index`, for all roles.
    DEVICE const Work &plan(u32 index, u32 total, u32 n) {
        const Problem &problem = p.call.problem;
        const bool done = index >= total;
        const Place where = done ? Place{0, 0} : place_of(problem, problem.kv_heads, index);
        const Tile *tile = reinterpret_cast<const Tile *>(problem.tiles) + where.tile;
        const Heads heads = heads_of(problem, where.head);
        const u32 state = done ? DONE : tile->count == 0 || heads.first >= heads.past ? EMPTY : BUSY;
        // Waves of as many tiles as there are blocks, alternately down and up.
        const u32 section = problem.section, first = where.head / section * section;
        const u32 heads_there = problem.kv_heads - first < section ? problem.kv_heads - first : section;
        const u32 down = ~((tile->rank * heads_there + where.head - first) / gridDim.x) & 1;
        barrier_wait(base + FREE_W + 8 * (n % WORKS), n / WORKS & 1 ^ 1);
        Work *work = reinterpret_cast<Work *>(memory + WORKS_AT) + n % WORKS;
        if (lane == 0) {
            *work = {*tile, where.head, state, down, 0};
            barrier_arrive(base + FULL_W + 8 * (n % WORKS));
        }
        __syncwarp();
        return *work;
    }

    // Tiles from a common counter, longest first. One is taken when all blocks of the one before are on their way: earlier,
    // and a block that is busy for long would keep it from one that is not.
    DEVICE void run() {
        const u32 total = p.call.problem.tile_count * p.call.problem.kv_heads;
        u32 index = block_index();
        for (u32 n = 0;; ++n) {
            const Work &work = plan(index, total, n);
            if (work.state == DONE) return;
            load(work, n);
            u32 taken = 0;
            if (lane == 0) taken = take_number(reinterpret_cast<u32 *>(p.counter));
            index = gridDim.x + uniform(taken);
            // The last of all blocks to come here makes the counter 0 again.
            if (lane == 0 && index == total + gridDim.x - 1) *reinterpret_cast<u32 *>(p.counter) = 0;
        }
    }
};

// ---- the reader: lse in log2 units, +inf where P must be 0; delta. With FOLD -lse / scale and -delta ----

#if FOLD
// A statistic is PARTS[0] a + PARTS[1] b + PARTS[2] c of elements a, b, c: with f32's range and precision.
#if defined(IO_BF16)
constexpr float PARTS[3] = {1.0f, 1.0f, 1.0f};
#else
constexpr float PARTS[3] = {4096.0f, 1.0f, 1.0f / 4096.0f};
#endif
DEVICE void store_parts(u32 to, float x) {
    const float a = widen(narrow(x / PARTS[0])), rest = x == -INFINITY_F ? 0.0f : x - a * PARTS[0], b = widen(narrow(rest));
    store_shared2(to, __uint_as_float(pack2(a, b)), __uint_as_float(pack2((rest - b) / PARTS[2], 0.0f)));
}
#endif
// The other operand, in registers: PARTS in the first three columns.
typedef u32 Parts[1][4];
DEVICE void load_parts([[maybe_unused]] Parts &parts) {
#if FOLD
    const u32 quad = threadIdx.x % 4;
    parts[0][0] = parts[0][1] = quad == 0 ? pack2(PARTS[0], PARTS[1]) : quad == 1 ? pack2(PARTS[2], 0.0f) : 0;
    parts[0][2] = parts[0][3] = 0;
#endif
}

DEVICE void read_statistics(const MappedBackwardParams &p, const unsigned char *memory, u32 base, int lane) {
    u32 turn = 0;
#if FOLD
    for (u32 i = lane; i < STAGES * 2 * STATISTIC / 16; i += WARP) store_shared4(base + STATS_AT + 16 * i, 0, 0, 0, 0);
    __syncwarp();
    const float by = -1.0f / p.call.problem.scale;
#endif
    each_tile(memory, base, lane, [&](const Work &work, u32) {
        each_block(p.call.problem, work, [&](u32 head, const Piece &piece, int query, bool) {
            const u32 s = turn % STAGES;
            float lse[BLOCK_M / WARP], delta[BLOCK_M / WARP];
            UNROLL for (int i = 0; i < BLOCK_M / WARP; ++i) {
                const int row = query + WARP * i + lane;
                lse[i] = row < piece.q1 ? *at<const float>(p.call.lse, work.tile.batch, row, head) : -INFINITY_F;
                delta[i] = row < piece.q1 ? *at<const float>(p.call.delta, work.tile.batch, row, head) : 0.0f;
            }
            barrier_wait(base + FREE_S + 8 * s, turn / STAGES & 1 ^ 1);
            const u32 to = base + STATS_AT + s * 2 * STATISTIC;
            UNROLL for (int i = 0; i < BLOCK_M / WARP; ++i) {
                const int row = WARP * i + lane;
#if FOLD
                store_parts(to + row * 16, lse[i] == -INFINITY_F ? -INFINITY_F : lse[i] * by);
                store_parts(to + STATISTIC + row * 16, -delta[i]);
#else
                store_shared(to + row * 4, __float_as_uint(lse[i] == -INFINITY_F ? INFINITY_F : lse[i] * LOG2E));
                store_shared(to + STATISTIC + row * 4, __float_as_uint(delta[i]));
#endif
            }
            if (FOLD) fence_proxy();
            barrier_arrive(base + FULL_S + 8 * s);
            ++turn;
        });
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

// 64 keys x BLOCK_M queries: c = rows of `keys` times rows of `queries`, with FOLD less the statistic.
template <int DIM>
DEVICE void start_pairs(Pairs &c, u32 keys, u32 queries, [[maybe_unused]] const Parts &parts, [[maybe_unused]] u32 statistic) {
    const Operand a = along_columns(keys), b = along_columns(queries);
    products_fence();
    UNROLL for (int kk = 0; kk < DIM / 16; ++kk)
        product<0, 0>(c, a.on(kk / 4 * KEY_PANEL + kk % 4 * 32), b.on(kk / 4 * QUERY_PANEL + kk % 4 * 32), kk > 0);
#if FOLD
    product<0>(c, parts[0], along_narrow(statistic, STATISTIC / 2), true);
#endif
    products_commit();
}

// c += a times the rows of `queries`.
template <int N> DEVICE void start_gather(float (&c)[N / 8][4], const Packed &a, u32 queries) {
    const Operand b = along_rows(queries, QUERY_PANEL);
    products_fence();
    UNROLL for (int kk = 0; kk < BLOCK_M / 16; ++kk) product<1>(c, a[kk], b.on(kk * 2048), true);
    products_commit();
}

template <int N>
DEVICE void store_gradient(const Tensor &g, const Work &work, int row0, const float (&c)[N / 8][4], int dim, float scale,
                           bool add) {
    const int quad = threadIdx.x % 4;
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half, left = row < int(work.tile.rows) ? dim : 0;
        Gradient *to = at<Gradient>(g, work.tile.batch, work.tile.row0 + row, work.kv);
#if GRADIENT_F32
        UNROLL for (int j = 0; j < N / 8; ++j) {
            const int column = 8 * j + 2 * quad;
            float x = 0.0f, y = 0.0f;
            if (add) load_pair(to + column, x, y, left - column);
            store_pair(to + column, c[j][2 * half] * scale + x, c[j][2 * half + 1] * scale + y, left - column);
        }
#else
        UNROLL for (int j = 0; j < N / 8; j += 4)
            store_pairs(to + 8 * j, reinterpret_cast<const float(&)[4][4]>(c[j]), half, scale, quad, left - 8 * j);
#endif
    }
}

// Barriers that all roles use; one thread calls it.
DEVICE void init_barriers(u32 base) {
    barrier_init(base + FULL_KV, 2);
    barrier_init(base + FREE_KV, 4 * GROUPS);
    UNROLL for (int i = 0; i < WORKS; ++i) {
        barrier_init(base + FULL_W + 8 * i, 1);
        barrier_init(base + FREE_W + 8 * i, 4 * GROUPS + 1 + DQ);  // every warp but the copier
    }
    barrier_init(base + RAW, 1);
    barrier_init(base + FULL_DQ, 4 * GROUPS);
    barrier_init(base + FREE_DQ, 1);
    UNROLL for (int i = 0; i < 2; ++i) {
        barrier_init(base + FULL_DS + 8 * i, 4 * GROUPS);
        barrier_init(base + FREE_DS + 8 * i, 4 * GROUPS);
        barrier_init(base + FULL_P + 8 * i, 128);
        barrier_init(base + FREE_P + 8 * i, 128);
    }
    UNROLL for (int i = 0; i < Q_STAGES; ++i) {
        barrier_init(base + FULL_Q + 8 * i, 1);
        barrier_init(base + FREE_Q + 8 * i, 4 * GROUPS);
    }
    UNROLL for (int i = 0; i < STAGES; ++i) {
        barrier_init(base + FULL_O + 8 * i, 1);
        barrier_init(base + FULL_S + 8 * i, WARP);  // every lane of the reader writes
        barrier_init(base + FREE_O + 8 * i, 4 * GROUPS);
        barrier_init(base + FREE_S + 8 * i, 128 * GROUPS);
    }
    fence_proxy();
}

