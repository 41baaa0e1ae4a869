// dQ over slices on Hopper's warpgroup products, without atomics: the deterministic mode, and head sizes whose dQ the main
// backward kernel has no room for.
//
//   one block = one tile of 128 query rows of one head; Q and dout stay in shared memory, dQ in registers
//     copier (a warp)     for each piece, each BLOCK_N keys: describes the block, starts the copies of K and V
//     consumers (2 warpgroups, 64 queries each)     for each block n:
//         S = Q K_n^T and dP = dout V_n^T are started, then dQ += dS_{n-1} K_{n-1}     (dS in registers)
//         S and dP are there: P = exp2(S - lse), 0 outside the band; dS' = P (dP - delta)      under that product
//         dQ is there: dS = dS'
//     write or add scale * dQ
//
// Rows of K and V past a piece may hold anything: the copier zeroes them.
//
// Macros: BLOCK_N, STAGES (of K), V_STAGES, GRADIENT_F32, REGISTERS, PRODUCER_REGISTERS.

struct BackwardParams {
    Problem problem;
    Tensor q, k, v, dout, lse, delta;
    Tensor dq, dk, dv;  // dq: f32 with GRADIENT_F32, otherwise the I/O dtype
    u32 add;            // bit 2: dq is added to
    u32 unused;
};
struct MappedBackwardParams {
    TensorMap q, k, v, dout;  // boxes of 64 columns; BLOCK_M or BLOCK_N rows
    TensorMap dq;             // not used here
    BackwardParams call;
    u64 unused[4];
};
static_assert(sizeof(BackwardParams) == 416 && sizeof(MappedBackwardParams) == 1088, "layout");

constexpr int GROUPS = 2, BLOCK_M = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
constexpr int PANELS = (HEAD_DIM + 63) / 64, PANELS_V = (HEAD_DIM_V + 63) / 64;
constexpr u32 QUERY_PANEL = BLOCK_M * 128, KEY_PANEL = BLOCK_N * 128;
constexpr u32 Q_BYTES = PANELS * QUERY_PANEL, O_BYTES = PANELS_V * QUERY_PANEL;
constexpr u32 K_BYTES = PANELS * KEY_PANEL, V_BYTES = PANELS_V * KEY_PANEL;
constexpr u32 O_AT = Q_BYTES, K_AT = O_AT + O_BYTES, V_AT = K_AT + STAGES * K_BYTES;
constexpr u32 FULL_QO = V_AT + V_STAGES * V_BYTES, RAW = FULL_QO + 8, FULL_K = RAW + 8, FULL_V = FULL_K + 8 * STAGES;
constexpr u32 FREE_K = FULL_V + 8 * V_STAGES, FREE_V = FREE_K + 8 * STAGES, BLOCKS_AT = FULL_QO + 160;

#if GRADIENT_F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
typedef float Pairs[BLOCK_N / 8][4];
typedef u32 Packed[BLOCK_N / 16][4];
typedef float DQuery[HEAD_DIM / 8][4];

enum : u32 { END = 1, MASKED = 2 /* << group */ };
struct Block {
    Piece piece;
    i32 key;
    u32 flags, unused[2];
};
static_assert(sizeof(Block) == 72, "layout");
constexpr int BLOCKS = 4;  // more than STAGES
static_assert(STAGES < BLOCKS && FREE_V + 8 * V_STAGES <= BLOCKS_AT && BLOCKS_AT + BLOCKS * sizeof(Block) == SHARED_BYTES,
              "shared memory");

// ---- the copier ----

struct Copier {
    const MappedBackwardParams &p;
    unsigned char *memory;
    u32 base;
    int lane;
    Tile tile;
    u32 head, kv;
    u32 turn, tails;

    // A block of keys or values; rows from `valid` on become 0.
    DEVICE void rows_to(u32 to, const TensorMap *map, int panels, int key, int valid, u32 full) {
        const bool tail = valid < BLOCK_N;
        const u32 arrived = tail ? base + RAW : full;
        if (lane == 0) {
            barrier_expect(arrived, panels * KEY_PANEL);
            for (int i = 0; i < panels; ++i)
                copy_box(to + i * KEY_PANEL, map, {64 * i, key, int(kv), int(tile.batch)}, arrived);
        }
        if (!tail) return;
        barrier_wait(base + RAW, tails++ & 1);
        for (int panel = 0; panel < panels; ++panel)
            for (int i = valid * 8 + lane; i < BLOCK_N * 8; i += WARP) store_shared4(to + panel * KEY_PANEL + 16 * i, 0, 0, 0, 0);
        fence_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    }

    DEVICE u32 masked(const Piece &piece, int key) {
        u32 flags = 0;
        const int last_key = key + BLOCK_N - 1;
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const int first = tile.row0 + 64 * g, last = first + 63;
            if (last_key >= piece.k1 || last_key - first > piece.hi || key - last < piece.lo) flags |= MASKED << g;
        }
        return flags;
    }

    DEVICE void run() {
        if (lane == 0) {
            barrier_expect(base + FULL_QO, Q_BYTES + O_BYTES);
            for (int i = 0; i < PANELS; ++i)
                copy_box(base + i * QUERY_PANEL, &p.q, {64 * i, int(tile.row0), int(head), int(tile.batch)}, base + FULL_QO);
            for (int i = 0; i < PANELS_V; ++i)
                copy_box(base + O_AT + i * QUERY_PANEL, &p.dout, {64 * i, int(tile.row0), int(head), int(tile.batch)},
                         base + FULL_QO);
        }
        Block *blocks = reinterpret_cast<Block *>(memory + BLOCKS_AT);
        const Piece *pieces = reinterpret_cast<const Piece *>(p.call.problem.pieces);
        for (u32 i = tile.first; i < tile.first + tile.count; ++i) {
            const Piece &piece = pieces[i];
            const int end = piece.k1, valid = piece.k_end;
            for (int key = piece.k0; key < end; key += BLOCK_N) {
                const u32 s = turn % STAGES, parity = turn / STAGES & 1 ^ 1;
                barrier_wait(base + FREE_K + 8 * s, parity);
                if (lane == 0) blocks[turn % BLOCKS] = {piece, key, masked(piece, key), {0, 0}};
                __syncwarp();
                rows_to(base + K_AT + s * K_BYTES, &p.k, PANELS, key, valid - key, base + FULL_K + 8 * s);
                const u32 v = turn % V_STAGES;
                barrier_wait(base + FREE_V + 8 * v, turn / V_STAGES & 1 ^ 1);
                rows_to(base + V_AT + v * V_BYTES, &p.v, PANELS_V, key, valid - key, base + FULL_V + 8 * v);
                ++turn;
            }
        }
        const u32 s = turn % STAGES;
        barrier_wait(base + FREE_K + 8 * s, turn / STAGES & 1 ^ 1);
        if (lane == 0) {
            blocks[turn % BLOCKS].flags = END;
            barrier_arrive(base + FULL_K + 8 * s);
        }
    }
};

// ---- the consumers ----

DEVICE void mask(Pairs &s, const Piece &piece, int row0, int key) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half, past = row + piece.hi + 1;
        const int above = (past < piece.k1 ? past : piece.k1) - key, below = row + piece.lo - key;
        UNROLL for (int j = 0; j < BLOCK_N / 8; ++j)
            UNROLL for (int e = 0; e < 2; ++e) {
                const int c = 8 * j + e;
                if (c >= above || c < below) s[j][2 * half + e] = -INFINITY_F;
            }
    }
}

struct Consumer {
    const BackwardParams &p;
    const Block *blocks;
    u32 base;
    int group, warp, lane;
    Tile tile;
    u32 head;
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
    float lse[2], delta[2];  // lse in log2 units, +inf where P must be 0

    DEVICE int row() { return int(tile.row0) + 64 * group + 16 * warp + lane / 4; }

    DEVICE void arrive(u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + barrier);
    }

    DEVICE void read_statistics() {
        UNROLL for (int half = 0; half < 2; ++half) {
            const int i = row() + 8 * half;
            const bool inside = i < int(tile.row0 + tile.rows);
            const float l = inside ? *at<const float>(p.lse, tile.batch, i, head) : -INFINITY_F;
            lse[half] = l == -INFINITY_F ? INFINITY_F : l * LOG2E;
            delta[half] = inside ? *at<const float>(p.delta, tile.batch, i, head) : 0.0f;
        }
    }

    template <int DIM> DEVICE void start_pairs(Pairs &c, u32 queries, u32 keys) {
        const Operand a = along_columns(queries + group * 8192), b = along_columns(keys);
        products_fence();
        UNROLL for (int kk = 0; kk < DIM / 16; ++kk)
            product<0, 0>(c, a.on(kk / 4 * QUERY_PANEL + kk % 4 * 32), b.on(kk / 4 * KEY_PANEL + kk % 4 * 32), kk > 0);
    }

    // S and dP of a block, as one group.
    DEVICE void start_block(Pairs &s, Pairs &dp, u32 turn) {
        start_pairs<HEAD_DIM>(s, base, base + K_AT + turn % STAGES * K_BYTES);
        const u32 v = turn % V_STAGES;
        barrier_wait(base + FULL_V + 8 * v, turn / V_STAGES & 1);
        start_pairs<HEAD_DIM_V>(dp, base + O_AT, base + V_AT + v * V_BYTES);
        products_commit();
    }

    DEVICE void start_gather(DQuery &dq, const Packed &ds, u32 turn) {
        const Operand b = along_rows(base + K_AT + turn % STAGES * K_BYTES, KEY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk) product<1>(dq, ds[kk], b.on(kk * 2048), true);
        products_commit();
    }

    // dP becomes dS.
    DEVICE void differentiate(Pairs &s, Pairs &dp, const Block &block) {
        const int key = block.key + lane % 4 * 2;
#if SOFTCAP
        Pairs bent;
#endif
#if TRANSFORM
        UNROLL for (int j = 0; j < BLOCK_N / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float d;
                s[j][e] = transform(score, block.piece, s[j][e], row() + 8 * (e / 2), key + 8 * j + e % 2, d);
#if SOFTCAP
                bent[j][e] = d;
#endif
            }
#endif
        if (block.flags & MASKED << group) mask(s, block.piece, row(), key);
        UNROLL for (int j = 0; j < BLOCK_N / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                const float weight = exp2_fast(s[j][e] * score.unit - lse[e / 2]);
                float keep = 1.0f;
#if DROPOUT
                keep = keep_factor(dropout, block.piece, row() + 8 * (e / 2), key + 8 * j + e % 2);
#endif
                dp[j][e] = weight * (dp[j][e] * keep - delta[e / 2]);
#if SOFTCAP
                dp[j][e] = weight == 0.0f ? 0.0f : dp[j][e] * bent[j][e];  // rows that see nothing may hold NaN
#endif
            }
    }

    DEVICE void store(const DQuery &dq, bool add) {
        const int quad = lane % 4, dim = EXACT ? HEAD_DIM : p.problem.head_dim;
        const float scale = p.problem.scale;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int i = row() + 8 * half;
            const int left = i < int(tile.row0 + tile.rows) ? dim : 0;
            Gradient *to = at<Gradient>(p.dq, tile.batch, i, head);
#if GRADIENT_F32
            UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) {
                float x = 0.0f, y = 0.0f;
                const int column = 8 * j + 2 * quad;
                if (add) load_pair(to + column, x, y, left - column);
                store_pair(to + column, dq[j][2 * half] * scale + x, dq[j][2 * half + 1] * scale + y, left - column);
            }
#else
            UNROLL for (int j = 0; j + 4 <= HEAD_DIM / 8; j += 4)
                store_pairs(to + 8 * j, reinterpret_cast<const float(&)[4][4]>(dq[j]), half, scale, quad, left - 8 * j);
            UNROLL for (int j = HEAD_DIM / 32 * 4; j < HEAD_DIM / 8; ++j)
                store_pair(to + 8 * j + 2 * quad, dq[j][2 * half] * scale, dq[j][2 * half + 1] * scale, left - 8 * j - 2 * quad);
#endif
        }
    }

    DEVICE const Block &described(u32 turn) {
        barrier_wait(base + FULL_K + 8 * (turn % STAGES), turn / STAGES & 1);
        return blocks[turn % BLOCKS];
    }

    DEVICE void run() {
        const bool add = p.add & 4;
        if (tile.count == 0 && add) return;
        read_statistics();
        DQuery dq;
        UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dq[j][e] = 0.0f;
        if (tile.count) gather_all(dq);
        store(dq, add);
    }

    DEVICE void gather_all(DQuery &dq) {
        Pairs s, dp;
        Packed ds;
        barrier_wait(base + FULL_QO, 0);
        const Block &first = described(0);
        start_block(s, dp, 0);
        products_wait<0>();
        pin(s);
        pin(dp);
        arrive(FREE_V);
        differentiate(s, dp, first);
        UNROLL for (int i = 0; i < BLOCK_N / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
        u32 turn = 1;
        for (;; ++turn) {
            const Block &block = described(turn);
            if (block.flags & END) break;
            pin(dq);
            pin(ds);
            start_block(s, dp, turn);
            start_gather(dq, ds, turn - 1);
            products_wait<1>();
            pin(s);
            pin(dp);
            arrive(FREE_V + 8 * (turn % V_STAGES));
            differentiate(s, dp, block);
            products_wait<0>();
            pin(dq);
            pin(ds);
            barrier_arrive(base + FREE_K + 8 * ((turn - 1) % STAGES));  // every lane, since every lane read the description
            UNROLL for (int i = 0; i < BLOCK_N / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
        }
        pin(dq);
        pin(ds);
        start_gather(dq, ds, turn - 1);
        products_wait<0>();
        pin(dq);
    }
};

KERNEL(THREADS, 1) attention_backward_dq(PARAMS(MappedBackwardParams) p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = shared_address(memory);
    const int warp = uniform(threadIdx.x / WARP), group = warp / 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        barrier_init(base + FULL_QO, 1);
        barrier_init(base + RAW, 1);
        UNROLL for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + FULL_K + 8 * i, 1);
            barrier_init(base + FREE_K + 8 * i, 128 * GROUPS);
        }
        UNROLL for (int i = 0; i < V_STAGES; ++i) {
            barrier_init(base + FULL_V + 8 * i, 1);
            barrier_init(base + FREE_V + 8 * i, 4 * GROUPS);
        }
        fence_proxy();
    }
    barrier();
    const Place where = place(p.call.problem, p.call.problem.heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.call.problem.tiles)[where.tile];
    if (group == GROUPS) {
        registers_less<PRODUCER_REGISTERS>();
        if (warp % 4 == 0 && tile.count)
            Copier{p, memory, base, lane, tile, where.head, kv_head(p.call.problem, where.head)}.run();
    } else {
        registers_more<REGISTERS>();
        Consumer{p.call, reinterpret_cast<const Block *>(memory + BLOCKS_AT), base, group, warp % 4, lane, tile, where.head,
                 score_of(p.call.problem, where.head)
#if DROPOUT
                 , dropout_of(p.call.problem, tile.batch, where.head)
#endif
        }
            .run();
    }
}
