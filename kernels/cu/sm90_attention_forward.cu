// Attention forward over slices on Hopper's warpgroup products (16-bit elements, f32 accumulation). Mathematics, lazy
// rescaling and the partial's form are those of sm80_attention_forward.cu.
//
//   one resident block per multiprocessor; its warps have these roles:
//     planner (one warp)            gets tiles of query rows from a common counter (longest first), each when the tile before
//                                   it comes to its last block
//     producer (one warp)           for each tile, for each block of BLOCK_N or NARROW keys of the tile's pieces:
//                                       wait until a stage is free; describe the block; start the copies of Q, K, V
//     writer (one warp)             copies the results of a tile to the tensor, while consumers go on to the next
//     consumers (GROUPS warpgroups of 64 query rows each)     for each block n described:
//                                       S = Q K_n^T and acc += P V_{n-1} are started       (P in registers)
//                                       S is there: P' = exp2(S - m), l += rowsum(P')      under P V_{n-1}
//                                       acc is there, about half way: the other half of it, while P = P'; rescale acc
//                                       between two tiles: write (acc, m, l), or lse, and out to shared memory for the writer
//
// A plain block (not a tile's first, wide, seen by the whole group) has an arm of the consumers' loop for itself: what only other
// blocks need, between its instructions, would cost 3 to 6 %.
//
// The list of blocks runs on over tiles, so that a tile's first product runs under the last one of the tile before. One
// group's exponentials run under the other's products, too; making the groups take turns in that gained nothing.
// (Shah et al., FlashAttention-3, 2024: producer and consumers, softmax under products.)
//
// Keys past a piece's end may hold anything, so the producer waits for such a block of V and zeroes those rows. A block of NARROW
// keys has V of BLOCK_N, the rest with weights of 0.
//
// A group skips the products of a block that it does not see, but adds 0 V, so that its list of blocks runs on as the others'
// do. A tile that sees no key is one such block for all groups, whose V is all zeros.
//
// Macros: BLOCK_N, GROUPS, STAGES, Q_STAGES, PARTIAL, REGISTERS (of a consumer), PRODUCER_REGISTERS.

struct ForwardParams {
    Problem problem;
    Tensor q, k, v, out, lse;
    Tensor acc, m, l;  // the partial, f32
    Tensor sinks;      // f32 per global head; ptr 0: none
    u32 stage;         // bit 0: load the partial, bit 1: store it (otherwise finish)
    u32 unused;
};
struct MappedForwardParams {
    TensorMap q, k, v;  // boxes of 64 columns; BLOCK_M or BLOCK_N rows
    TensorMap out;      // of 64 rows
    ForwardParams call;
    u64 counter;  // u32 in device memory: 0, and 0 again when the kernel is done
    u64 unused[3];
};
static_assert(sizeof(ForwardParams) == 416 && sizeof(MappedForwardParams) == 960, "layout");

constexpr int BLOCK_M = 64 * GROUPS;
// Keys of the last blocks of a piece, if that makes all of them full: 160 a + 128 b is any larger multiple of 32.
constexpr int NARROW = BLOCK_N == 160 ? BLOCK_N / 5 * 4 : BLOCK_N;
constexpr int THREADS = 128 * (GROUPS + 1);
// A weight of 1 is rounded exactly, others are not: on data with outliers, where one weight is most of a row, following at 8 makes
// errors 12 % larger than following always, at 3 it makes them 3 % larger and costs 0.3 % of the time.
constexpr float LAZY = 3.0f;
constexpr int PANELS = (HEAD_DIM + 63) / 64, PANELS_V = (HEAD_DIM_V + 63) / 64;
// Exponentials before the products under way are waited for, in units of 8 columns. Between the others weights are packed, in
// registers that those products read. Three groups gain nothing by that.
DEVICE constexpr int early(int keys) { return GROUPS == 3 ? keys / 8 : keys / 16; }
constexpr u32 Q_PANEL = BLOCK_M * 128, KEY_PANEL = BLOCK_N * 128;
constexpr u32 Q_BYTES = PANELS * Q_PANEL, K_BYTES = PANELS * KEY_PANEL, V_BYTES = PANELS_V * KEY_PANEL;
// Results leave by bulk copies out of their tile's Q, which is not needed any more.
constexpr bool BOXES = Q_STAGES > 1 && PANELS_V <= PANELS;
constexpr u32 K_AT = Q_STAGES * Q_BYTES, V_AT = K_AT + STAGES * K_BYTES, WORDS_AT = V_AT + STAGES * V_BYTES;

template <int KEYS> using Scores = float[KEYS / 8][4];
typedef float Output[HEAD_DIM_V / 8][4];

// What the producer tells about a block of keys.
enum : u32 {
    FIRST = 1,   // of a tile: Q comes with it
    LAST = 2,    // of a tile
    END = 4,     // no more work
    MASKED = 8,  // << group: not all pairs are selected
    BLIND = 64,  // << group: none is
    FEW = 512    // NARROW keys
};
struct Block {
    Piece piece;
    Tile tile;
    i32 key;
    u32 flags, head, q_stage;
};
static_assert(sizeof(Block) == 96, "layout");
constexpr int BLOCKS = STAGES + 2;  // a description is read until the block's last product

// What the planner tells about a tile.
struct Work {
    Piece first;
    Tile tile;
    u32 head, kv, end, unused;  // end: no more work
};
static_assert(sizeof(Work) == 96, "layout");
constexpr int WORKS = 2;

// What the consumers tell about results that lie in a stage of Q.
struct Results {
    u32 batch, row0, rows, head, end, unused[3];  // end: no more
};

// Memory barriers, then descriptions of blocks and tiles.
constexpr u32 FULL_K = WORDS_AT, FULL_V = FULL_K + 8 * STAGES, FREE_K = FULL_V + 8 * STAGES, FREE_V = FREE_K + 8 * STAGES;
constexpr u32 FULL_Q = FREE_V + 8 * STAGES, FREE_Q = FULL_Q + 8 * Q_STAGES, RAW_V = FREE_Q + 8 * Q_STAGES;
constexpr u32 FULL_W = RAW_V + 8, NEXT_W = FULL_W + 8 * WORKS, FULL_O = NEXT_W + 8;
constexpr u32 BLOCKS_AT = WORDS_AT + 160, WORKS_AT = BLOCKS_AT + BLOCKS * sizeof(Block), RESULTS_AT = WORKS_AT + WORKS * sizeof(Work);
static_assert(FULL_O + 8 * Q_STAGES <= BLOCKS_AT && RESULTS_AT + 2 * sizeof(Results) == SHARED_BYTES, "shared memory");

// ---- the producer ----

struct Producer {
    const MappedForwardParams &p;
    unsigned char *memory;
    u32 base;
    int lane;
    u32 turn, tiles, tails;  // counted from the kernel's start
    // The values of block turn - 1, whose copy is not started yet: the keys of the block after it go first.
    int value_batch, value_head, value_key, value_end;

    DEVICE u32 free_parity(u32 turn) { return turn / STAGES & 1 ^ 1; }

    // Copies Q of a tile.
    DEVICE void queries(const Work &work) {
        const u32 stage = tiles % Q_STAGES;
        barrier_wait(base + FREE_Q + 8 * stage, tiles / Q_STAGES & 1 ^ 1);
        if (lane != 0) return;
        barrier_expect(base + FULL_Q + 8 * stage, Q_BYTES);
        UNROLL for (int i = 0; i < PANELS; ++i)
            copy_box(base + stage * Q_BYTES + i * Q_PANEL, &p.q,
                     {64 * i, int(work.tile.row0), int(work.head), int(work.tile.batch)}, base + FULL_Q + 8 * stage);
    }

    // Bits of the groups that see a part of the block, or nothing of it.
    DEVICE u32 seen(const Tile &tile, const Piece &piece, int key, int keys) {
        u32 flags = 0;
        const int end = int(tile.row0 + tile.rows), last_key = key + keys - 1;
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const int first = int(tile.row0) + 64 * g, last = first + 63;
            if (last_key >= piece.k1 || last_key - first > piece.hi || key - last < piece.lo) flags |= MASKED << g;
            if (first >= end || key >= piece.k1 || key - last > piece.hi || last_key - first < piece.lo) flags |= BLIND << g;
        }
        return flags;
    }

    // Copies V of block turn - 1. Rows past its piece become 0: they may hold anything, which 0 times them would spread.
    DEVICE void values() {
        const u32 s = (turn - 1) % STAGES, full = base + FULL_V + 8 * s, to = base + V_AT + s * V_BYTES;
        barrier_wait(base + FREE_V + 8 * s, free_parity(turn - 1));
        const bool tail = value_key + BLOCK_N > value_end;
        const u32 arrived = tail ? base + RAW_V : full;
        if (lane == 0) {
            barrier_expect(arrived, V_BYTES);
            UNROLL for (int i = 0; i < PANELS_V; ++i)
                copy_box(to + i * KEY_PANEL, &p.v, {64 * i, value_key, value_head, value_batch}, arrived);
        }
        if (!tail) return;
        barrier_wait(base + RAW_V, tails++ & 1);
        for (int i = (value_end - value_key) * 8 + lane; i < BLOCK_N * 8; i += WARP)
            UNROLL for (int panel = 0; panel < PANELS_V; ++panel) store_shared4(to + panel * KEY_PANEL + 16 * i, 0, 0, 0, 0);
        fence_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    }

    // Describes a block and copies its K, and V of the block before.
    DEVICE void keys(const Work &work, const Piece &piece, int key, u32 flags) {
        const u32 s = turn % STAGES, full = base + FULL_K + 8 * s;
        flags |= seen(work.tile, piece, key, flags & FEW ? NARROW : BLOCK_N);
        barrier_wait(base + FREE_K + 8 * s, free_parity(turn));
        if (lane == 0) {
            Block &block = reinterpret_cast<Block *>(memory + BLOCKS_AT)[turn % BLOCKS];
            block.piece = piece;
            block.tile = work.tile;
            block.key = key, block.flags = flags, block.head = work.head, block.q_stage = tiles % Q_STAGES;
            barrier_expect(full, K_BYTES);
            UNROLL for (int i = 0; i < PANELS; ++i)
                copy_box(base + K_AT + s * K_BYTES + i * KEY_PANEL, &p.k, {64 * i, key, int(work.kv), int(work.tile.batch)}, full);
        }
        if (flags & FIRST) queries(work);
        if (turn > 0) values();
        value_batch = work.tile.batch, value_head = work.kv, value_key = key, value_end = piece.k_end;
        ++turn;
    }

    DEVICE void end() {
        const u32 s = turn % STAGES;
        barrier_wait(base + FREE_K + 8 * s, free_parity(turn));
        if (lane == 0) {
            Block &block = reinterpret_cast<Block *>(memory + BLOCKS_AT)[turn % BLOCKS];
            block.flags = END, block.q_stage = tiles % Q_STAGES;
            barrier_arrive(base + FULL_K + 8 * s);
        }
        if (turn > 0) values();
    }

    // Whether of `left` keys NARROW come next: where no more than the last blocks are left, with which all blocks are full.
    DEVICE bool is_narrow(int left) {
        if (NARROW == BLOCK_N || turn == 0) return false;  // the kernel's first block is a wide one
        constexpr int UNIT = NARROW < BLOCK_N ? BLOCK_N - NARROW : BLOCK_N, WIDE = BLOCK_N / UNIT;
        const int units = (left + UNIT - 1) / UNIT;
        return (WIDE - 1) * ((WIDE - 1) * units % WIDE) >= units;
    }

    // For the next tile. Not before this one's last block: who asks early may get more than its share of the last tiles.
    DEVICE void ask() {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + NEXT_W);
    }

    DEVICE void run() {
        const Piece *pieces = reinterpret_cast<const Piece *>(p.call.problem.pieces);
        for (;; ++tiles) {
            barrier_wait(base + FULL_W + 8 * (tiles % WORKS), tiles / WORKS & 1);
            const Work &work = reinterpret_cast<const Work *>(memory + WORKS_AT)[tiles % WORKS];
            if (work.end) break;
            // A tile that sees no key has one block of an empty piece.
            u32 i = 0;
            do {
                const Piece &piece = i == 0 ? work.first : pieces[work.tile.first + i];
                const int end = piece.k1;
                u32 flags = i == 0 ? FIRST : 0;
                int key = piece.k0;
                do {
                    const bool few = is_narrow(end - key);
                    const int next = key + (few ? NARROW : BLOCK_N);
                    if (few) flags |= FEW;
                    if (i + 1 >= work.tile.count && next >= end) {
                        flags |= LAST;
                        ask();
                    }
                    keys(work, piece, key, flags);
                    flags = 0;
                    key = next;
                } while (key < end);
            } while (++i < work.tile.count);
        }
        end();
    }
};

// ---- the planner ----

DEVICE void plan(const MappedForwardParams &p, unsigned char *memory, u32 base, int lane) {
    const Problem &problem = p.call.problem;
    const u32 total = problem.tile_count * problem.heads;
    u32 index = block_index(), count = 0;
    while (true) {
        const bool end = index >= total;
        const Place where = end ? Place{0, 0} : place_of(problem, problem.heads, index);
        const Tile *tile = reinterpret_cast<const Tile *>(problem.tiles) + where.tile;
        // To load and store the partial of a tile that sees no key changes nothing.
        if (end || tile->count || !PARTIAL || p.call.stage != 3) {
            const bool some = !end && tile->count;
            if (lane == 0) {
                Work &work = reinterpret_cast<Work *>(memory + WORKS_AT)[count % WORKS];
                work.first = some ? reinterpret_cast<const Piece *>(problem.pieces)[tile->first] : Piece{};
                if (!end) work.tile = *tile;
                work.head = where.head, work.kv = kv_head(problem, where.head), work.end = end;
                barrier_arrive(base + FULL_W + 8 * (count % WORKS));
            }
            __syncwarp();
            if (end) return;
            barrier_wait(base + NEXT_W, count++ & 1);
        }
        u32 taken = 0;
        if (lane == 0) taken = take_number(reinterpret_cast<u32 *>(p.counter));
        index = gridDim.x + uniform(taken);
        // The last of all blocks to come here makes the counter 0 again.
        if (lane == 0 && index == total + gridDim.x - 1) *reinterpret_cast<u32 *>(p.counter) = 0;
    }
}

// ---- the writer ----
//
// A warp of its own: a loop within the consumers' loop, such as this one over ragged rows, costs them their uniform registers.

DEVICE void write(const MappedForwardParams &p, const Results *results, u32 base, int lane) {
    constexpr int UNITS = 8 * PANELS_V;
    const int dim = EXACT ? HEAD_DIM_V : p.call.problem.head_dim_v;
    for (u32 n = 0;; ++n) {
        const u32 stage = n % Q_STAGES;
        barrier_wait(base + FULL_O + 8 * stage, n / Q_STAGES & 1);
        const Results &r = results[stage];
        u32 from = base + stage * Q_BYTES;
#pragma unroll 1
        for (int left = r.rows, row = r.row0; left > 0; left -= 64, row += 64, from += 8192) {
            if (left >= 64) {
                if (lane == 0)
                    UNROLL for (int i = 0; i < PANELS_V; ++i)
                        store_box(&p.out, {64 * i, row, int(r.head), int(r.batch)}, from + i * Q_PANEL);
                continue;
            }
#pragma unroll 1
            for (int i = lane; i < left * UNITS; i += WARP) {
                const int down = i / UNITS, unit = i % UNITS;
                if (8 * unit < dim)
                    *reinterpret_cast<float4 *>(at<u16>(p.call.out, r.batch, row + down, r.head) + 8 * unit) =
                        load_shared4(from + unit / 8 * Q_PANEL + down * 128 + (unit % 8 ^ down % 8) * 16);
            }
            fence_proxy();
        }
        const bool end = r.end;
        __syncwarp();
        if (lane == 0) {
            copies_commit();
            copies_read<0>();
            barrier_arrive(base + FREE_Q + 8 * stage);
        }
        if (end) return;
    }
}

// ---- the consumers ----

// Rows group and group + 8 of the warp's 16.
struct Rows {
    float m[2];  // reference maximum, in units of dot products (or log2 units with TRANSFORM)
    float l[2];  // this lane's part of the row sum
};

template <int KEYS> DEVICE void transform_all(Scores<KEYS> &s, const Score &f, const Piece &piece, int row, int key) {
    UNROLL for (int j = 0; j < KEYS / 8; ++j)
        UNROLL for (int e = 0; e < 4; ++e) {
            float unused;
            s[j][e] = transform(f, piece, s[j][e], row + 8 * (e / 2), key + 8 * j + e % 2, unused);
        }
}

// Of a lane's columns 0, 1, 8, 9, 16, .. of a block, how many lie before `column`.
DEVICE int columns_before(int column) {
    const int c = column < 0 ? 0 : column < BLOCK_N ? column : BLOCK_N;
    return c / 8 * 2 + (c % 8 < 2 ? c % 8 : 2);
}

// Bits 0.. below `count`, of which `from` are in words before.
DEVICE u32 low_bits(int count, int from) {
    const int n = count - from;
    return n <= 0 ? 0 : n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

template <int KEYS> DEVICE void mask(Scores<KEYS> &s, const Piece &piece, int row0, int key) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half, past = row + piece.hi + 1;
        const int above = columns_before((past < piece.k1 ? past : piece.k1) - key), below = columns_before(row + piece.lo - key);
        UNROLL for (int word = 0; word < KEYS / 4; word += 32) {
            const u32 seen = low_bits(above, word) & ~low_bits(below, word);
            UNROLL for (int i = word; i < KEYS / 4 && i < word + 32; ++i)
                if (!(seen & 1u << (i - word))) s[i / 2][2 * half + i % 2] = -INFINITY_F;
        }
    }
}

// Of this lane's part of a row.
template <int KEYS> DEVICE float part_maximum(const Scores<KEYS> &s, int half) {
    float t[4];
    UNROLL for (int i = 0; i < 4; ++i) t[i] = maximum(s[i][2 * half], s[i][2 * half + 1]);
    UNROLL for (int j = 4; j < KEYS / 8; ++j) t[j % 4] = maximum(t[j % 4], maximum(s[j][2 * half], s[j][2 * half + 1]));
    return maximum(maximum(t[0], t[1]), maximum(t[2], t[3]));
}

DEVICE float row_maximum(float part) {
    part = maximum(part, shuffle_xor(part, 1));
    return maximum(part, shuffle_xor(part, 2));
}

// At least the maximum of this lane's part of a row, and no more than that or 0: of floats as integers, whose order is that of
// floats but among negative ones, by an instruction for two comparisons.
template <int KEYS> DEVICE float part_bound(const Scores<KEYS> &s, int half) {
    int t[4] = {};
    UNROLL for (int j = 0; j < KEYS / 8; ++j)
        t[j % 4] = max(max(t[j % 4], __float_as_int(s[j][2 * half])), __float_as_int(s[j][2 * half + 1]));
    return __int_as_float(max(max(t[0], t[1]), max(t[2], t[3])));
}

// Factors on acc. `moved`, the same in all lanes: one of the warp is not 1.
struct Factors {
    float x, y;
    bool moved;
};

// Moves m towards the maximum of the block where a row of the warp needs it, and with it l.
template <int KEYS> DEVICE Factors follow_maximum(Scores<KEYS> &s, Rows &r, float unit) {
    float part[2], by[2] = {1.0f, 1.0f};
    bool far = false;
    UNROLL for (int half = 0; half < 2; ++half) far |= (part_bound<KEYS>(s, half) - r.m[half]) * unit > LAZY;
    if (!any_lane(far)) return {1.0f, 1.0f, false};
    pin(s);  // or the compiler finds no registers for the products
    UNROLL for (int half = 0; half < 2; ++half) part[half] = part_maximum<KEYS>(s, half);
    UNROLL for (int half = 0; half < 2; ++half) {
        const float top = row_maximum(part[half]);
        if ((top - r.m[half]) * unit > LAZY) {
            by[half] = exp2_fast((r.m[half] - top) * unit);
            r.m[half] = top;
            r.l[half] *= by[half];
        }
    }
    return {by[0], by[1], true};
}

DEVICE void rescale(Output &acc, Factors by) {
    if (!by.moved) return;
    UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j) {
        acc[j][0] *= by.x;
        acc[j][1] *= by.x;
        acc[j][2] *= by.y;
        acc[j][3] *= by.y;
    }
}

// S becomes P = exp2(S - m), and l grows, in columns FROM.. to TO in units of 8.
template <int FROM, int TO, int KEYS> DEVICE void exponentials(Scores<KEYS> &s, Rows &r, float unit) {
    float m[2], sum[2][2] = {};
    UNROLL for (int half = 0; half < 2; ++half) m[half] = r.m[half] == -INFINITY_F ? 0.0f : r.m[half] * unit;
    UNROLL for (int j = FROM; j < TO; ++j)
        UNROLL for (int e = 0; e < 4; ++e) {
            s[j][e] = exp2_fast(s[j][e] * unit - m[e / 2]);
            sum[e / 2][e % 2] += s[j][e];
        }
    UNROLL for (int half = 0; half < 2; ++half) r.l[half] += sum[half][0] + sum[half][1];
}

#if DROPOUT
template <int KEYS> DEVICE void drop(Scores<KEYS> &s, const Dropout &d, const Piece &piece, int row, int key) {
    UNROLL for (int j = 0; j < KEYS / 8; ++j)
        UNROLL for (int e = 0; e < 4; ++e)
            s[j][e] *= keep_factor(d, piece, row + 8 * (e / 2), key + 8 * j + e % 2);
}
#endif

// The statistics of a partial. Natural units are units of m times `unit` times ln 2.
DEVICE void load_rows(const ForwardParams &p, const Tile &t, u32 head, int row, float unit, Rows &r) {
    UNROLL for (int half = 0; half < 2; ++half) {
        const int i = row + 8 * half;
        if (i >= int(t.row0 + t.rows)) continue;
        r.m[half] = *at<const float>(p.m, t.batch, i, head) / (unit * LN2);
        r.l[half] = threadIdx.x % 4 == 0 ? *at<const float>(p.l, t.batch, i, head) : 0.0f;
    }
}

DEVICE void load_sums(const ForwardParams &p, const Tile &t, u32 head, int row, Output &acc) {
    const int quad = threadIdx.x % 4, dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    UNROLL for (int half = 0; half < 2; ++half) {
        const int i = row + 8 * half;
        if (i >= int(t.row0 + t.rows)) continue;
        const float *from = at<const float>(p.acc, t.batch, i, head) + 2 * quad;
        UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j)
            load_pair(from + 8 * j, acc[j][2 * half], acc[j][2 * half + 1], dim - 8 * j - 2 * quad);
    }
}

DEVICE float whole_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

#if PARTIAL
DEVICE void store_partial(const ForwardParams &p, const Tile &t, u32 head, int row, float unit, Rows &r, Output &acc) {
    const int quad = threadIdx.x % 4, dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    UNROLL for (int half = 0; half < 2; ++half) {
        const float l = whole_row(r.l[half]);
        const int i = row + 8 * half;
        if (i >= int(t.row0 + t.rows)) continue;
        if (quad == 0) {
            *at<float>(p.m, t.batch, i, head) = r.m[half] * (unit * LN2);
            *at<float>(p.l, t.batch, i, head) = l;
        }
        float *to = at<float>(p.acc, t.batch, i, head) + 2 * quad;
        UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j)
            store_pair(to + 8 * j, acc[j][2 * half], acc[j][2 * half + 1], dim - 8 * j - 2 * quad);
    }
}
#endif

DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Factors that make results of sums, and lse. Without branches, so that the two rows' chains of shuffles and divisions run side by side.
struct Ends {
    float factor[2], lse[2];
};
DEVICE Ends ends_of(const ForwardParams &p, u32 head, float unit, const Rows &r) {
    const float sink = p.sinks.ptr ? *at<const float>(p.sinks, 0, 0, p.problem.head_first + head) * LOG2E : -INFINITY_F;
    Ends ends;
    UNROLL for (int half = 0; half < 2; ++half) {
        const float m = r.m[half] == -INFINITY_F ? -INFINITY_F : r.m[half] * unit;
        const float top = maximum(m, sink), above = top == -INFINITY_F ? 0.0f : top;
        const float by = exp2_fast(m - above), l = whole_row(r.l[half]) * by + exp2_fast(sink - above);
        ends.factor[half] = l == 0.0f ? 0.0f : by * reciprocal_fast(l);
        ends.lse[half] = top == -INFINITY_F ? top : (top + log2_fast(l)) * LN2;
    }
    return ends;
}

// `left` rows are inside.
DEVICE void store_lse(const ForwardParams &p, const Tile &t, u32 head, int row, int left, const float (&lse)[2]) {
    float *to = at<float>(p.lse, t.batch, row, head);
    UNROLL for (int half = 0; half < 2; ++half)
        if (8 * half < left && threadIdx.x % 4 == 0) *(to + 8 * half * p.lse.row) = lse[half];
}

DEVICE void store_rows(const ForwardParams &p, const Tile &t, u32 head, int row, int left_rows, const float (&factors)[2], Output &acc) {
    const int quad = threadIdx.x % 4, dim = EXACT ? HEAD_DIM_V : p.problem.head_dim_v;
    u16 *out = at<u16>(p.out, t.batch, row, head);
    UNROLL for (int half = 0; half < 2; ++half) {
        const float factor = factors[half];
        const int left = 8 * half < left_rows ? dim : 0;
        u16 *to = out + 8 * half * p.out.row;
        UNROLL for (int j = 0; j + 4 <= HEAD_DIM_V / 8; j += 4)
            store_pairs(to + 8 * j, reinterpret_cast<const float(&)[4][4]>(acc[j]), half, factor, quad, left - 8 * j);
        UNROLL for (int j = HEAD_DIM_V / 32 * 4; j < HEAD_DIM_V / 8; ++j)
            store_pair(to + 8 * j + 2 * quad, acc[j][2 * half] * factor, acc[j][2 * half + 1] * factor, left - 8 * j - 2 * quad);
    }
}

// A warp's 16 rows to shared memory.
DEVICE void put_rows(u32 to, const float (&factors)[2], const Output &acc) {
    const int lane = threadIdx.x % WARP;
    // Of matrix lane / 8: rows 0.. or 8.. of unit 0 or 1.
    const u32 at = to + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
    UNROLL for (int i = 0; i < HEAD_DIM_V / 16; ++i) {
        u32 packed[4];
        UNROLL for (int e = 0; e < 4; ++e) {
            const float *pair = acc[2 * i + e / 2] + e % 2 * 2;
            packed[e] = pack2(pair[0] * factors[e % 2], pair[1] * factors[e % 2]);
        }
        store_matrices((at ^ i % 4 * 32) + i / 4 * Q_PANEL, packed);
    }
    fence_proxy();
}

// S = Q K^T.
template <int KEYS> DEVICE void scores(Scores<KEYS> &s, u32 q, u32 k) {
    const Operand a = along_columns(q), b = along_columns(k);
    products_fence();
    UNROLL for (int kk = 0; kk < HEAD_DIM / 16; ++kk)
        product<0, 0>(s, a.on(kk / 4 * Q_PANEL + kk % 4 * 32), b.on(kk / 4 * KEY_PANEL + kk % 4 * 32), kk > 0);
    products_commit();
}

// acc += P V, or = where not `add`.
DEVICE void weigh(Output &acc, const u32 (&weights)[BLOCK_N / 16][4], u32 v, bool add) {
    const Operand b = along_rows(v, KEY_PANEL);
    products_fence();
    UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk) product<1>(acc, weights[kk], b.on(kk * 2048), kk > 0 || add);
    products_commit();
}

struct Consumer {
    const ForwardParams &p;
    const Block *blocks;
    Results *results;
    u32 base;
    int group, lane, lane_row;
    u32 tiles;  // whose Q was waited for
    Score score;
    Rows rows;
    bool summed;  // acc holds something of this tile

    DEVICE const Block &described(u32 turn) {
        barrier_wait(base + FULL_K + 8 * (turn % STAGES), turn / STAGES & 1);
        return blocks[turn % BLOCKS];
    }

    DEVICE void wait_queries() {
        barrier_wait(base + FULL_Q + 8 * (tiles % Q_STAGES), tiles / Q_STAGES & 1);
        ++tiles;
    }

    template <int KEYS> DEVICE void start_scores(Scores<KEYS> &s, const Block &block, u32 turn) {
        // From the description it takes longer; with partials the compiler holds the count in no uniform register.
        const u32 q_stage = PARTIAL ? block.q_stage : (tiles - 1) % Q_STAGES;
        scores<KEYS>(s, base + q_stage * Q_BYTES + group * 8192, base + K_AT + turn % STAGES * K_BYTES);
    }

    // K may be overwritten, and at a tile's end Q, unless results go through it. So may the description of the block before the
    // last one, which every lane read: every lane arrives.
    DEVICE void free_keys(const Block &block, u32 turn) {
        barrier_arrive(base + FREE_K + 8 * (turn % STAGES));
        if (!BOXES && lane == 0 && block.flags & LAST) barrier_arrive(base + FREE_Q + 8 * block.q_stage);
    }

    // Whoever frees values waits for them first, used or not: only then the turn before is over for all.
    DEVICE void wait_values(u32 turn) { barrier_wait(base + FULL_V + 8 * (turn % STAGES), turn / STAGES & 1); }

    DEVICE void start_values(Output &acc, const u32 (&weights)[BLOCK_N / 16][4], u32 turn) {
        wait_values(turn);
        weigh(acc, weights, base + V_AT + turn % STAGES * V_BYTES, summed);
        summed = true;
    }

    DEVICE void free_values(u32 turn) {
        if (lane == 0) barrier_arrive(base + FREE_V + 8 * (turn % STAGES));
    }

    DEVICE void start_rows(const Block &block) {
        UNROLL for (int half = 0; half < 2; ++half) {
            rows.m[half] = -INFINITY_F;
            rows.l[half] = 0.0f;
        }
#if ALIBI
        score = score_of(p.problem, block.head);
#endif
        if (PARTIAL && (p.stage & 1)) load_rows(p, block.tile, block.head, int(block.tile.row0) + lane_row, score.unit, rows);
    }

    DEVICE void start_sums(const Block &block, Output &acc) {
        summed = PARTIAL && (p.stage & 1);
        if (summed) load_sums(p, block.tile, block.head, int(block.tile.row0) + lane_row, acc);
    }

    // S becomes P in the first columns; returns the factors on acc.
    template <int KEYS> DEVICE Factors start_softmax(Scores<KEYS> &s, const Block &block, u32 flags) {
        const int row = int(block.tile.row0) + lane_row, key = block.key + lane % 4 * 2;
#if TRANSFORM
        transform_all<KEYS>(s, score, block.piece, row, key);
#endif
        if (flags & MASKED << group) mask<KEYS>(s, block.piece, row, key);
        const Factors by = follow_maximum<KEYS>(s, rows, score.unit);
        exponentials<0, early(KEYS), KEYS>(s, rows, score.unit);
        return by;
    }

    // And in the others.
    template <int KEYS> DEVICE void end_softmax(Scores<KEYS> &s, u32 (&weights)[BLOCK_N / 16][4], const Block &block) {
        exponentials<early(KEYS), KEYS / 8, KEYS>(s, rows, score.unit);
#if DROPOUT
        drop<KEYS>(s, dropout_of(p.problem, block.tile.batch, block.head), block.piece, int(block.tile.row0) + lane_row,
                   block.key + lane % 4 * 2);
#endif
        UNROLL for (int i = 0; i < KEYS / 16; ++i) as_a(weights[i], s[2 * i], s[2 * i + 1]);
        UNROLL for (int i = KEYS / 16; i < BLOCK_N / 16; ++i) UNROLL for (int e = 0; e < 4; ++e) weights[i][e] = 0;
    }

    DEVICE void end_tile(const Block &block, Rows &rows, Output &acc, bool end = false) {
        const int row = int(block.tile.row0) + lane_row, left = int(block.tile.row0 + block.tile.rows) - row;
#if PARTIAL
        if (p.stage & 2) {
            store_partial(p, block.tile, block.head, row, score.unit, rows, acc);
            tell_writer(block, 0, end);
            return;
        }
#endif
        const Ends ends = ends_of(p, block.head, score.unit, rows);
        if (BOXES) {
            put_rows(base + block.q_stage * Q_BYTES + (lane_row - lane / 4) * 128, ends.factor, acc);
            tell_writer(block, block.tile.rows, end);
        } else {
            store_rows(p, block.tile, block.head, row, left, ends.factor, acc);
        }
        store_lse(p, block.tile, block.head, row, left, ends.lse);  // after the fence, which would wait for it
    }

    // Every lane arrives, since every lane wrote.
    DEVICE void tell_writer(const Block &block, u32 rows, bool end) {
        if (!BOXES) return;
        if (threadIdx.x == 0) results[block.q_stage] = {block.tile.batch, block.tile.row0, rows, block.head, end};
        barrier_arrive(base + FULL_O + 8 * block.q_stage);
    }

    // Scores and weights of the next block, under whose softmax run the products of the last one's values. A plain block is not a
    // tile's first, and this group sees all of it.
    template <int KEYS, bool PLAIN>
    DEVICE void follow(Output &acc, u32 (&weights)[BLOCK_N / 16][4], const Block &block, const Block &next, u32 turn) {
        const u32 flags = PLAIN ? 0 : next.flags;
        Scores<KEYS> s;
        if (flags & FIRST) wait_queries();
        start_scores<KEYS>(s, next, turn);
        start_values(acc, weights, turn - 1);
        products_wait<1>();
        pin(s);
        free_keys(next, turn);
        Rows ended;
        if (flags & FIRST) {
            ended = rows;
            start_rows(next);
        }
        Factors by = start_softmax<KEYS>(s, next, flags);
        products_wait<0>(rows.l[0] + rows.l[1]);
        pin(acc);
        pin(weights);
        free_values(turn - 1);
        end_softmax<KEYS>(s, weights, next);
        if (flags & FIRST) {
            end_tile(block, ended, acc);
            start_sums(next, acc);
            if (!PARTIAL) by = {1.0f, 1.0f, false};  // acc is overwritten
        }
        rescale(acc, by);
    }

    DEVICE void run() {
        Output acc;
        Scores<BLOCK_N> s;
        u32 weights[BLOCK_N / 16][4];
        const Block *block = &described(0);
        if (block->flags & END) {
            tell_writer(*block, 0, true);
            return;
        }
        wait_queries();
        start_rows(*block);
        start_sums(*block, acc);
        start_scores<BLOCK_N>(s, *block, 0);
        products_wait<0>();
        pin(s);
        free_keys(*block, 0);
        const Factors by = start_softmax<BLOCK_N>(s, *block, block->flags);
        end_softmax<BLOCK_N>(s, weights, *block);
        rescale(acc, by);
        u32 turn = 1;
        for (;; ++turn) {
            const Block &next = described(turn);
            const u32 flags = next.flags;
            if (flags & END) break;
            pin(acc);
            pin(weights);
            if (!(flags & (FIRST | FEW | (MASKED | BLIND) << group))) {
                follow<BLOCK_N, true>(acc, weights, *block, next, turn);
            } else if (!(flags & (FEW | BLIND << group))) {
                follow<BLOCK_N, false>(acc, weights, *block, next, turn);
            } else if (NARROW < BLOCK_N && !(flags & BLIND << group)) {
                follow<NARROW, false>(acc, weights, *block, next, turn);
            } else {
                if (flags & FIRST) wait_queries();
                start_values(acc, weights, turn - 1);
                free_keys(next, turn);
                products_wait<0>();
                pin(acc);
                pin(weights);
                free_values(turn - 1);
                if (flags & FIRST) {
                    end_tile(*block, rows, acc);
                    start_rows(next);
                    start_sums(next, acc);
                }
                UNROLL for (int i = 0; i < BLOCK_N / 16; ++i) UNROLL for (int e = 0; e < 4; ++e) weights[i][e] = 0;
            }
            block = &next;
        }
        pin(acc);
        pin(weights);
        start_values(acc, weights, turn - 1);
        products_wait<0>();
        pin(acc);
        end_tile(*block, rows, acc, true);
    }
};

KERNEL(THREADS, 1) attention_forward(PARAMS(MappedForwardParams) p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = shared_address(memory);
    const int warp = uniform(threadIdx.x / WARP), group = warp / 4;
    if (threadIdx.x == THREADS - 1) {
        prefetch_map(&p.q);
        prefetch_map(&p.k);
        prefetch_map(&p.v);
    }
    if (threadIdx.x == 0) {
        UNROLL for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + FULL_K + 8 * i, 1);
            barrier_init(base + FULL_V + 8 * i, 1);
            barrier_init(base + FREE_K + 8 * i, 128 * GROUPS);
            barrier_init(base + FREE_V + 8 * i, 4 * GROUPS);
        }
        UNROLL for (int i = 0; i < Q_STAGES; ++i) {
            barrier_init(base + FULL_Q + 8 * i, 1);
            barrier_init(base + FREE_Q + 8 * i, BOXES ? 1 : 4 * GROUPS);
            barrier_init(base + FULL_O + 8 * i, 128 * GROUPS);
        }
        barrier_init(base + RAW_V, 1);
        barrier_init(base + NEXT_W, 1);
        UNROLL for (int i = 0; i < WORKS; ++i) barrier_init(base + FULL_W + 8 * i, 1);
        fence_proxy();
    }
    barrier();
    if (group == GROUPS) {
        registers_less<PRODUCER_REGISTERS>();
        if (warp % 4 == 0) Producer{p, memory, base, int(threadIdx.x % WARP)}.run();
        if (warp % 4 == 1) plan(p, memory, base, int(threadIdx.x % WARP));
        if (warp % 4 == 2 && BOXES) write(p, reinterpret_cast<const Results *>(memory + RESULTS_AT), base, int(threadIdx.x % WARP));
    } else {
        registers_more<REGISTERS>();
        const int lane = threadIdx.x % WARP;
        Consumer{p.call, reinterpret_cast<const Block *>(memory + BLOCKS_AT), reinterpret_cast<Results *>(memory + RESULTS_AT),
                 base, group, lane, 64 * group + warp % 4 * 16 + lane / 4, 0, score_of(p.call.problem, 0)}
            .run();
    }
}
