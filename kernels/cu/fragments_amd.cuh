// Fragments of one product C[16x16] += A[16x16] B[16x16] on AMD GPUs: the one place that says which lane holds what.
//
//                 MFMA, waves of 64 lanes (CDNA)         WMMA, waves of 32 lanes (RDNA 3)
//   A  16-bit     row lane % 16                          row lane % 16
//                 columns 4 (lane / 16) + 0..3           columns 0..15 (lanes 16..31 repeat lanes 0..15)
//   B  16-bit     column lane % 16, rows as A's columns  column lane % 16, rows as A's columns
//   C  f32        column lane % 16                       column lane % 16
//                 rows 4 (lane / 16) + 0..3              rows 2 r + lane / 16 for r = 0..7
//
// A and B are alike: an *operand* is 16 lines of 16 elements, a line a lane % 16. A *product* has its columns there. So a
// product becomes the operand of the next one without a trip through shared memory: its columns are the lines.

typedef u32 Operand[OPERAND_WORDS];
typedef float Product[PRODUCT_VALUES];

// Row of value r of a product in a lane.
CONSTEXPR int product_row(int lane, int r) { return PRODUCT_VALUES == 4 ? lane / 16 * 4 + r : 2 * r + lane / 16; }
// The first element of a lane's line that the lane holds; it holds 2 * OPERAND_WORDS of them.
CONSTEXPR int operand_first(int lane) { return OPERAND_WORDS == 2 ? lane / 16 * 4 : 0; }

#if !defined(IO_F32) && defined(HEAD_DIM)
DEVICE void clear(Product &c) {
    UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) c[r] = 0.0f;
}

// An operand whose lines are rows of DIM elements in shared memory: byte offset of this lane's part, and the read.
template <int DIM> DEVICE u32 lane_by_rows(int lane) { return u32(lane % 16 * pitch<DIM>() + operand_first(lane)) * 2; }
DEVICE void load_operand(Operand &x, u32 at) {
    if constexpr (OPERAND_WORDS == 2) {
        load_shared2(reinterpret_cast<u32(&)[2]>(x), at);
    } else {
        UNROLL for (int i = 0; i < OPERAND_WORDS; i += 4)
            load_shared4(x[i], x[i + 1 < OPERAND_WORDS ? i + 1 : 0], x[i + 2 < OPERAND_WORDS ? i + 2 : 0],
                         x[i + 3 < OPERAND_WORDS ? i + 3 : 0], at + 4 * i);
    }
}

// Rows of DIM elements in *quads*: element after element of four rows, so that the four neighbours in a column that a lane
// holds are one read. So that lanes meet different banks: in columns 16..31, 48..63, and so on the pairs change places (eight
// threads each write 16 bytes of every other pair); in every other quad neighbouring 16 columns do (two quads are read at once
// where there are 64 banks; rows of an odd number of 16 columns are apart already). backends/rocm/tests/banks.rs counts.
template <int DIM> CONSTEXPR u32 quad(int row, int column) {
    const int pairs = column / 16 % 2 * 2, sixteens = DIM % 32 == 0 ? row / 4 % 2 * 16 : 0;
    return u32(row / 4 * DIM + (column ^ pairs ^ sixteens)) * 8;
}

// An operand whose lines are columns of rows of DIM elements, which lie in quads or one after the other: byte offset of this
// lane's part of columns 0..15, and the read for `row`.. and `column`.., multiples of 16. Quads start at multiples of 256 bytes.
template <bool QUADS, int DIM> DEVICE u32 lane_by_columns(int lane) {
    const int row = operand_first(lane), column = lane % 16;
    return QUADS ? quad<DIM>(row, column) : offset<DIM>(row, column);
}
template <bool QUADS, int DIM> DEVICE void load_columns(Operand &x, u32 at, int row, int column) {
    if constexpr (QUADS) {
        if constexpr (DIM % 32 == 0)
            at = (column % 32 ? at ^ 144 : at) + u32(row / 4 * DIM + column / 32 * 32) * 8;
        else
            at = (column % 32 ? at ^ 16 : at) + u32(row / 4 * DIM + column) * 8;
        UNROLL for (int i = 0; i < OPERAND_WORDS; i += 2) {
            u32 words[2];
            load_shared2(words, (DIM % 32 == 0 && i / 2 % 2 ? at ^ 128 : at) + i / 2 * DIM * 8);
            x[i] = words[0], x[i + 1] = words[1];
        }
    } else {
        at += offset<DIM>(row, column);
        UNROLL for (int i = 0; i < OPERAND_WORDS; ++i) {
            const u32 low = load_shared_16(at + offset<DIM>(2 * i, 0)), high = load_shared_16(at + offset<DIM>(2 * i + 1, 0));
            x[i] = low | high << 16;
        }
    }
}

// The operand whose lines are the columns of a product, rounded.
DEVICE void as_operand(Operand &x, const Product &c, int lane) {
    if constexpr (OPERAND_WORDS == 2) {
        UNROLL for (int i = 0; i < OPERAND_WORDS; ++i) x[i] = pack2(c[2 * i], c[2 * i + 1]);
    } else {  // lane and lane + 16 have alternate rows of one column
        UNROLL for (int i = 0; i < OPERAND_WORDS; ++i) {
            const float own = c[i % PRODUCT_VALUES], other = shuffle_xor(own, 16);
            x[i] = lane < 16 ? pack2(own, other) : pack2(other, own);
        }
    }
}

// Over the lanes of one column.
DEVICE float column_sum(float x) {
    UNROLL for (int mask = 16; mask < WARP; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}
DEVICE float column_maximum(float x) {
    UNROLL for (int mask = 16; mask < WARP; mask *= 2) x = maximum(x, shuffle_xor(x, mask));
    return x;
}

// A product's column times `by` to 16 elements of a row at `to`, of which `left` are inside the row.
template <typename T> DEVICE void store_column(T *to, const Product &c, float by, int left, int lane) {
    if constexpr (PRODUCT_VALUES == 4) {
        const int first = product_row(lane, 0);
        UNROLL for (int r = 0; r < 4; r += 2) store_pair(to + first + r, c[r] * by, c[r + 1] * by, left - first - r);
    } else {
        UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
            const int column = product_row(lane, r);
            if (column >= left) continue;
            if constexpr (sizeof(T) == 2)
                to[column] = narrow(c[r] * by);
            else
                to[column] = c[r] * by;
        }
    }
}
DEVICE void load_column(const float *from, Product &c, int left, int lane) {
    UNROLL for (int r = 0; r < PRODUCT_VALUES; ++r) {
        const int column = product_row(lane, r);
        c[r] = column < left ? from[column] : 0.0f;
    }
}

// Rows of 16-bit elements on their way: from global memory to registers at once, from there to shared memory later.
template <int COUNT, int DIM, int THREADS> struct Travel {
    static constexpr int CHUNKS = DIM / 8, TOTAL = COUNT * CHUNKS, TURNS = (TOTAL + THREADS - 1) / THREADS;
    u32 x[TURNS][4];

    // Zeros from row `valid` and from column `dim` on.
    DEVICE void load(const u16 *from, i64 stride, int valid, int dim) {
        UNROLL for (int i = 0; i < TURNS; ++i) {
            const int index = int(threadIdx.x) + i * THREADS, row = index / CHUNKS, column = index % CHUNKS * 8;
            UNROLL for (int j = 0; j < 4; ++j) x[i][j] = 0;
            if (row >= valid || (TOTAL % THREADS != 0 && index >= TOTAL)) continue;
            const u16 *at = from + row * stride + column;
            const int left = EXACT ? 8 : dim - column;
#if ALIGNED
            if (left > 0) {
                const uint4 words = *reinterpret_cast<const uint4 *>(at);
                x[i][0] = words.x, x[i][1] = words.y, x[i][2] = words.z, x[i][3] = words.w;
            }
#else
            UNROLL for (int j = 0; j < 8; ++j)
                if (j < left) x[i][j / 2] |= u32(at[j]) << 16 * (j % 2);
#endif
        }
    }
    DEVICE void store(u32 to) const {
        each([&](int row, int column, const u32(&words)[4]) {
            store_shared4(to + offset<DIM>(row, column), words[0], words[1], words[2], words[3]);
        });
    }
    template <typename F> DEVICE void each(F &&f) const {
        UNROLL for (int i = 0; i < TURNS; ++i) {
            const int index = int(threadIdx.x) + i * THREADS;
            if (TOTAL % THREADS != 0 && index >= TOTAL) break;
            f(index / CHUNKS, index % CHUNKS * 8, x[i]);
        }
    }
};

// The same where rows will lie in quads: a thread takes four columns of four rows.
template <int COUNT, int DIM, int THREADS> struct TravelByQuads {
    static constexpr int CHUNKS = DIM / 4, TOTAL = COUNT / 4 * CHUNKS, TURNS = (TOTAL + THREADS - 1) / THREADS;
    u32 x[TURNS][4][2];

    DEVICE void load(const u16 *from, i64 stride, int valid, int dim) {
        UNROLL for (int i = 0; i < TURNS; ++i) {
            const int index = int(threadIdx.x) + i * THREADS, first = index / CHUNKS * 4, column = index % CHUNKS * 4;
            const bool inside = TOTAL % THREADS == 0 || index < TOTAL;
            const u16 *at = from + first * stride + column;
            UNROLL for (int j = 0; j < 4; ++j, at += stride) {
                x[i][j][0] = x[i][j][1] = 0;
                if (!inside || first + j >= valid) continue;
                const int left = EXACT ? 4 : dim - column;
#if ALIGNED
                if (left > 0) {
                    const uint2 words = *reinterpret_cast<const uint2 *>(at);
                    x[i][j][0] = words.x, x[i][j][1] = words.y;
                }
#else
                UNROLL for (int e = 0; e < 4; ++e)
                    if (e < left) x[i][j][e / 2] |= u32(at[e]) << 16 * (e % 2);
#endif
            }
        }
    }
    DEVICE void store(u32 to) const {
        each([&](int row, int column, const u32(&words)[4][2]) {
            UNROLL for (int j = 0; j < 4; ++j) store_shared2(to + offset<DIM>(row + j, column), words[j][0], words[j][1]);
        });
    }
    DEVICE void store_quads(u32 to) const {
        each([&](int row, int column, const u32(&words)[4][2]) {
            UNROLL for (int half = 0; half < 2; ++half) {
                const u32 a = words[0][half], b = words[1][half], c = words[2][half], d = words[3][half];
                store_shared4(to + quad<DIM>(row, column + 2 * half), low_halves(a, b), low_halves(c, d), high_halves(a, b),
                              high_halves(c, d));
            }
        });
    }
    template <typename F> DEVICE void each(F &&f) const {
        UNROLL for (int i = 0; i < TURNS; ++i) {
            const int index = int(threadIdx.x) + i * THREADS;
            if (TOTAL % THREADS != 0 && index >= TOTAL) break;
            f(index / CHUNKS * 4, index % CHUNKS * 4, x[i]);
        }
    }
    // Of two words with two columns each, one column of both rows.
    static DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xffff) | b << 16; }
    static DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }
};
#endif
