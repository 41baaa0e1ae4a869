// What all attention kernels share and no vendor changes: parameters, tile loads, the score function, dropout.
//
// Macros of a specialization: IO_BF16 | IO_F16 | IO_F32; HEAD_DIM, HEAD_DIM_V (padded sizes); EXACT (1: the padded sizes are
// the sizes); ALIGNED (1: pointers and strides allow 16-byte loads); SOFTCAP, ALIBI, DROPOUT, TRANSFORM (0 or 1; TRANSFORM
// where the logits are not simply a positive scale times the dot product).

#if defined(IO_F32)
typedef float Element;
DEVICE float read(float x) { return x; }
DEVICE float rounded(float x) { return x; }
#else
typedef u16 Element;
DEVICE float read(u16 x) { return widen(x); }
DEVICE u16 rounded(float x) { return narrow(x); }
#endif

constexpr float LOG2E = 1.4426950408889634f;
[[maybe_unused]] constexpr float LN2 = 0.6931471805599453f;

// A strided tensor [batch, row, head, dim]; strides in elements, the last is 1.
struct Tensor {
    u64 ptr;
    i64 batch, row, head;
};

// Rows [row0, row0 + rows) of one batch row, and their pieces [first, first + count). `rank`: its number in its section of
// batch rows, in list order.
struct Tile {
    u32 batch, row0, rows, first, count, rank;
};

// Query rows q0..q1 and key rows k0..k1; a pair (r, c) is selected where lo <= c - r <= hi (local rows, not counted from q0
// and k0). Global positions are q_pos + r * q_step and k_pos + c * k_step. Query rows q1..q_end and key rows k1..k_end hold
// numbers, those after them may hold anything.
struct Piece {
    i32 q0, q1, k0, k1, lo, hi;
    i64 q_pos, k_pos;
    i32 q_step, k_step, q_end, k_end;
};

struct Problem {
    u64 tiles, pieces;            // Tile[tile_count], Piece[]
    Tensor slopes;                // f32, per global head
    u64 seed_ptr, seed;           // the seed lies at seed_ptr unless that is 0
    u32 tile_count;               // tiles of one head
    u32 heads, kv_heads;          // local
    u32 section;                  // heads whose tiles are neighbours in the grid
    u32 head_first, group, kv_first, batch_first;
    u32 head_dim, head_dim_v;     // not padded
    float scale, softcap;
    float keep_scale;             // 1 / (1 - p)
    u32 drop_below;               // floor(p * 2^32)
};

static_assert(sizeof(Tensor) == 32 && sizeof(Tile) == 24 && sizeof(Piece) == 56 && sizeof(Problem) == 120, "layout");

template <typename T> DEVICE T *at(const Tensor &t, i64 batch, i64 row, i64 head) {
    return global<T>(t.ptr) + batch * t.batch + row * t.row + head * t.head;
}

// Unit i of a tensor [batch, row, head, units], in row-major order.
struct Index {
    u32 batch, row, head, unit;
};
DEVICE Index index_of(u64 i, const u32 (&extent)[4], u32 units) {
    if (i >> 32 == 0) {  // 64-bit divisions are slow
        const u32 n = u32(i), row = n / units, sequence = row / extent[2], batch = sequence / extent[1];
        return {batch, sequence - batch * extent[1], row - sequence * extent[2], n - row * units};
    }
    const u64 row = i / units, sequence = row / extent[2], batch = sequence / extent[1];
    return {u32(batch), u32(sequence % extent[1]), u32(row % extent[2]), u32(i % units)};
}

// The grid is linear: sections of heads; within one, tiles in list order (longest first); within one tile, the heads.
struct Place {
    u32 tile, head;
};
DEVICE Place place_of(const Problem &p, u32 heads, u32 block) {
    u32 per_section = p.section * p.tile_count;
    u32 section = block / per_section, rest = block - section * per_section;
    u32 first = section * p.section, size = heads - first < p.section ? heads - first : p.section;
    return {rest / size, first + rest % size};
}
DEVICE Place place(const Problem &p, u32 heads) { return place_of(p, heads, block_index()); }

DEVICE u32 kv_head(const Problem &p, u32 head) { return (p.head_first + head) / p.group - p.kv_first; }

// ---- dropout: Philox4x32-10 (Salmon et al., SC 2011) ----

#if DROPOUT
struct Dropout {
    u32 batch, head, key0, key1, below;
    float scale;
};
DEVICE Dropout dropout_of(const Problem &p, u32 batch, u32 head) {
    u64 seed = p.seed_ptr ? *reinterpret_cast<const u64 *>(p.seed_ptr) : p.seed;
    return {p.batch_first + batch, p.head_first + head, u32(seed), u32(seed >> 32), p.drop_below, p.keep_scale};
}
DEVICE u32 philox_word(const Dropout &d, u32 query, u32 keys, u32 word) {
    u32 c0 = d.batch, c1 = d.head, c2 = query, c3 = keys, k0 = d.key0, k1 = d.key1;
    UNROLL for (int i = 0; i < 10; ++i) {
        u32 h0 = high_product(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        u32 h1 = high_product(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return word < 2 ? (word == 0 ? c0 : c1) : (word == 2 ? c2 : c3);
}
// keep / (1 - p) of local query row r and key row c.
DEVICE float keep_factor(const Dropout &d, const Piece &s, int r, int c) {
    i64 q = s.q_pos + i64(r) * s.q_step, k = s.k_pos + i64(c) * s.k_step;
    return philox_word(d, u32(q), u32(k >> 2), u32(k) & 3u) < d.below ? 0.0f : d.scale;
}
#endif

// ---- the score function, in log2 units ----

// A dot product becomes a logit: `dot` times `unit()` is the logit in log2 units.
struct Score {
    float scale, cap, slope, unit;
};
DEVICE Score score_of(const Problem &p, u32 head) {
    Score s{p.scale, p.softcap, 0.0f, p.scale * LOG2E};
#if TRANSFORM
    s.unit = 1.0f;
#endif
#if ALIBI
    s.slope = *at<const float>(p.slopes, 0, 0, p.head_first + head) * LOG2E;
#endif
    return s;
}
// tanh to about 1e-7 absolutely: 1 - 2 / (1 + e^2x).
DEVICE float tanh_fast(float x) { return 1.0f - divide_fast(2.0f, 1.0f + exp2_fast(x * (2.0f * LOG2E))); }
DEVICE float distance(const Piece &s, int r, int c) {
    i64 d = (s.q_pos + i64(r) * s.q_step) - (s.k_pos + i64(c) * s.k_step);
    return float(d < 0 ? -d : d);
}
// With TRANSFORM: the logit in log2 units, and in `slope_of_cap` the derivative of the softcap.
DEVICE float transform(const Score &f, const Piece &s, float dot, int r, int c, float &slope_of_cap) {
    float x = dot * f.scale;
    slope_of_cap = 1.0f;
#if SOFTCAP
    float t = tanh_fast(x / f.cap);
    x = f.cap * t;
    slope_of_cap = 1.0f - t * t;
#endif
    x *= LOG2E;
#if ALIBI
    x -= f.slope * distance(s, r, c);
#endif
    return x;
}

#if !defined(IO_F32) && defined(HEAD_DIM)
// ---- tiles of 16-bit elements in shared memory ----
//
// The eight rows of a matrix load must lie in different banks. Where the prelude SWIZZLES, rows of 64, 128 and 256 elements
// lie densely, and the 16-byte units of each 128 bytes change places: unit u of row r is at u XOR r % 8. A row of any other
// `dim` takes dim + 8, an odd number of units.

template <int DIM> CONSTEXPR bool swizzled() { return SWIZZLES && (DIM == 64 || DIM == 128 || DIM == 256); }
template <int DIM> CONSTEXPR int pitch() { return swizzled<DIM>() ? DIM : DIM + 8; }
// Byte offset of a unit; without swizzle of any element.
template <int DIM> CONSTEXPR u32 offset(int row, int column) {
    return u32(row * pitch<DIM>() + (swizzled<DIM>() ? column ^ row % 8 * 8 : column)) * 2;
}
// From an address in a row to that `rows` and `columns` further, both multiples of 8. With swizzle the column is one of two
// addends that have no bits in common.
template <int DIM> DEVICE u32 shifted(u32 address, int rows, int columns) {
    if (!swizzled<DIM>()) return address + offset<DIM>(rows, columns);
    return (address ^ u32(columns % 64 * 2)) + u32(rows * DIM + columns / 64 * 64) * 2;
}

// 8 elements to shared memory, asynchronously; zeros from element `left` on, or all where not `valid`.
DEVICE void load_chunk(u32 to, const u16 *from, bool valid, int left) {
#if ALIGNED
    copy_async16(to, from, valid && left > 0);
#else
    u32 x[4];
    UNROLL for (int j = 0; j < 4; ++j) {
        u32 low = valid && 2 * j < left ? from[2 * j] : 0;
        u32 high = valid && 2 * j + 1 < left ? from[2 * j + 1] : 0;
        x[j] = low | high << 16;
    }
    store_shared4(to, x[0], x[1], x[2], x[3]);
#endif
}

// Where a thread's part of rows 0.. of `from` begins, if its column stays the same (THREADS is a multiple of the 16-byte
// units of a row); otherwise `from`.
template <int DIM, int THREADS> DEVICE const u16 *thread_part(const u16 *from, i64 stride, int thread) {
    constexpr int CHUNKS = DIM / 8;
    return THREADS % CHUNKS == 0 ? from + thread / CHUNKS * stride + thread % CHUNKS * 8 : from;
}

// Rows 0..ROWS into shared memory at `to`, asynchronously; zeros from row `valid` and from column `dim` on. `part` is the
// thread's part of these rows. ALIGNED: 64 rows span less than 4 GiB.
template <int ROWS, int DIM, int THREADS>
DEVICE void load_part(u32 to, const u16 *part, i64 stride, int valid, int dim, int thread) {
    constexpr int CHUNKS = DIM / 8, TOTAL = ROWS * CHUNKS, TURNS = (TOTAL + THREADS - 1) / THREADS;
    thread = int(opaque(u32(thread)));
    if constexpr (THREADS % CHUNKS == 0) {
        constexpr int STEP = THREADS / CHUNKS;
        const int row = thread / CHUNKS, column = thread % CHUNKS * 8;
        const char *at = reinterpret_cast<const char *>(part);
#if ALIGNED
        const u32 step = opaque(u32(stride) * (2 * STEP));
#else
        const i64 step = stride * (2 * STEP);
#endif
        to += offset<DIM>(row, column);
        valid -= row;
        UNROLL for (int i = 0; i < TURNS; ++i) {
            if (ROWS % STEP != 0 && row + i * STEP >= ROWS) break;
            const u32 turned = swizzled<DIM>() ? to ^ u32(i * STEP % 8 * 16) : to;
            load_chunk(turned + u32(i * STEP * pitch<DIM>()) * 2, reinterpret_cast<const u16 *>(at + i * step),
                       i * STEP < valid, EXACT ? 8 : dim - column);
        }
    } else {
        UNROLL for (int i = 0; i < TURNS; ++i) {
            const int index = thread + i * THREADS, row = index / CHUNKS, column = index % CHUNKS * 8;
            if (TOTAL % THREADS != 0 && index >= TOTAL) break;
            load_chunk(to + offset<DIM>(row, column), part + row * stride + column, row < valid,
                       EXACT ? 8 : dim - column);
        }
    }
}

// The same from the first row on, with nothing kept in registers between calls.
template <int ROWS, int DIM, int THREADS>
DEVICE void load_tile(u32 to, const u16 *from, i64 stride, int valid, int dim, int thread) {
    thread = int(opaque(u32(thread)));
    load_part<ROWS, DIM, THREADS>(to, thread_part<DIM, THREADS>(from, stride, thread), stride, valid, dim, thread);
}

// Byte offset of this lane's matrix row: for A, and for B stored [k][n] (transposed load).
template <int DIM> DEVICE u32 lane_offset_a(int lane) { return offset<DIM>(lane % 16, lane / 16 * 8); }
// For B stored [n][k], and for A stored [k][m] (transposed load).
template <int DIM> DEVICE u32 lane_offset_b(int lane) {
    return offset<DIM>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
}

// Two neighbouring C tiles as one A.
DEVICE void as_a(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack2(left[0], left[1]);
    a[1] = pack2(left[2], left[3]);
    a[2] = pack2(right[0], right[1]);
    a[3] = pack2(right[2], right[3]);
}

// Two neighbouring elements of a row, of which `left` are inside the row.
DEVICE void store_pair(u16 *to, float x, float y, int left) {
#if ALIGNED
    if (left > 0) *reinterpret_cast<u32 *>(to) = pack2(x, y);
#else
    if (left > 0) to[0] = narrow(x);
    if (left > 1) to[1] = narrow(y);
#endif
}
DEVICE void store_pair(float *to, float x, float y, int left) {
#if ALIGNED
    if (left > 0) *reinterpret_cast<float2 *>(to) = make_float2(x, y);
#else
    if (left > 0) to[0] = x;
    if (left > 1) to[1] = y;
#endif
}
DEVICE void load_pair(const float *from, float &x, float &y, int left) {
#if ALIGNED
    float2 v = left > 0 ? *reinterpret_cast<const float2 *>(from) : make_float2(0.0f, 0.0f);
    x = v.x;
    y = v.y;
#else
    x = left > 0 ? from[0] : 0.0f;
    y = left > 1 ? from[1] : 0.0f;
#endif
}
#endif

#if defined(IO_F32) && defined(HEAD_DIM)
// ---- tiles of f32, for the FMA kernels: FMA_ROWS / 2 (y) x 8 (x) threads; a thread owns rows 2 y and 2 y + 1 ----
//
// Macros: FMA_ROWS of a block (32, or 16 where shared memory is small), FMA_OTHERS (rows that it meets at once).
// A row of `dim` elements takes dim + 4: its 16-byte units lie in different banks than those of the next seven rows.

constexpr int FMA_THREADS = FMA_ROWS * 4;
template <int DIM> CONSTEXPR int fma_pitch() { return DIM + 4; }

template <int DIM> DEVICE void load_rows(float *to, const float *from, i64 stride, int rows, int valid, int dim) {
    FEW_AT_ONCE for (int i = threadIdx.x; i < rows * DIM; i += FMA_THREADS) {
        int row = i / DIM, column = i % DIM;
        to[row * fma_pitch<DIM>() + column] = row < valid && column < dim ? from[row * stride + column] : 0.0f;
    }
}

// s[i][j] = dot of row 2 y + i of `a` and row x + 8 j of `b`.
template <int DIM, int J> DEVICE void dots(float (&s)[2][J], const float *a, const float *b) {
    const float *rows = a + threadIdx.x / 8 * 2 * fma_pitch<DIM>(), *others = b + threadIdx.x % 8 * fma_pitch<DIM>();
    UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int j = 0; j < J; ++j) s[i][j] = 0.0f;
    ROLLED for (int d = 0; d < DIM; d += 4) {
        float4 x[2] = {*reinterpret_cast<const float4 *>(rows + d),
                       *reinterpret_cast<const float4 *>(rows + fma_pitch<DIM>() + d)};
        UNROLL for (int j = 0; j < J; ++j) {
            float4 y = *reinterpret_cast<const float4 *>(others + 8 * j * fma_pitch<DIM>() + d);
            UNROLL for (int i = 0; i < 2; ++i)
                s[i][j] += x[i].x * y.x + x[i].y * y.y + x[i].z * y.z + x[i].w * y.w;
        }
    }
}

// acc[i][4 n + e] += sum over c < COUNT of p[2 y + i][c] * v[c][32 n + 4 x + e].
template <int DIM, int COUNT> DEVICE void gather(float (&acc)[2][DIM / 8], const float *p, const float *v) {
    const float *weights = p + threadIdx.x / 8 * 2 * (COUNT + 1), *columns = v + threadIdx.x % 8 * 4;
    ROLLED for (int c = 0; c < COUNT; ++c) {
        float w[2] = {weights[c], weights[COUNT + 1 + c]};
        UNROLL for (int n = 0; n < DIM / 32; ++n) {
            float4 y = *reinterpret_cast<const float4 *>(columns + c * fma_pitch<DIM>() + 32 * n);
            UNROLL for (int i = 0; i < 2; ++i) {
                acc[i][4 * n] += w[i] * y.x;
                acc[i][4 * n + 1] += w[i] * y.y;
                acc[i][4 * n + 2] += w[i] * y.z;
                acc[i][4 * n + 3] += w[i] * y.w;
            }
        }
    }
}

// Element (i, n, e) of an accumulator is column 32 n + 4 x + e of row 2 y + i.
template <int DIM, typename F> DEVICE void each_column(int dim, F &&f) {
    UNROLL for (int n = 0; n < DIM / 32; ++n)
        UNROLL for (int e = 0; e < 4; ++e) {
            int column = 32 * n + int(threadIdx.x % 8) * 4 + e;
            if (column < dim) f(4 * n + e, column);
        }
}
#endif
