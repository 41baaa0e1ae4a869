// dq of its f32 sums as sm80_attention_backward.cu leaves them with LINES: see sm80_sums.cuh.
//
//   round_dq    dq = round(scale * sums); a warp takes 8 rows of a head, 32 columns at a time, a lane what a lane added
//   reorder_dq  sums to f32 dq or back, in place, for calls that another kernel adds to dq; a block takes 8 rows of a head
//
// Macros: DQ_DIM (64, 128 or 256), THREADS.

struct RoundParams {
    Tensor into, sums;
    u32 extent[4];  // batch, row (a multiple of 8), head, DQ_DIM
    float scale;
    u32 flags;  // ALIGNED_QUADS; TO_SUMS
};
static_assert(sizeof(RoundParams) == 88, "layout");

enum : u32 { ALIGNED_QUADS = 1 /* four elements of `into` and of `sums` can be taken at once */, TO_SUMS = 2 };

// The i-th 8 rows of a head.
DEVICE Index rows_of(const RoundParams &p, u64 i) {
    const u32 extent[4] = {p.extent[0], p.extent[1] / 8, p.extent[2], 1};
    Index n = index_of(i, extent, 1);
    n.row *= 8;
    return n;
}
DEVICE u64 count(const RoundParams &p) { return u64(p.extent[0]) * (p.extent[1] / 8) * p.extent[2]; }

// Word i of lane j of a quad becomes word j of lane i.
DEVICE void transpose(u32 (&x)[4], int quad) {
    UNROLL for (int bit = 1; bit < 4; bit *= 2)
        UNROLL for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const u32 got = shuffle_xor(quad & bit ? x[i] : x[i | bit], bit);
            x[i] = quad & bit ? got : x[i];
            x[i | bit] = quad & bit ? x[i | bit] : got;
        }
}

KERNEL(THREADS, 1) round_dq(PARAMS(RoundParams) p) {
    constexpr u32 WARPS = THREADS / WARP;
    const int lane = threadIdx.x % WARP, quad = lane % 4;
    const bool quads = ADD_WIDTH == 4 && p.flags & ALIGNED_QUADS;
    const bool wide = (p.into.ptr | u64(2 * (p.into.batch | p.into.row | p.into.head))) % 16 == 0;
    for (u64 rows = u64(blockIdx.x) * WARPS + threadIdx.x / WARP; rows < count(p); rows += u64(gridDim.x) * WARPS) {
        const Index n = rows_of(p, rows);
        const float *sums = at<const float>(p.sums, n.batch, n.row, n.head);
        u16 *to = at<u16>(p.into, n.batch, n.row + lane / 4, n.head) + 8 * quad;
        float x[DQ_DIM / 16][4];
        UNROLL for (int j = 0; j < DQ_DIM / 16; ++j) {
            if (quads) {
                const float4 v = *reinterpret_cast<const float4 *>(sums + sum_offset<DQ_DIM>(p.sums.row, j, lane, 0));
                x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
            } else {
                UNROLL for (int e = 0; e < 4; ++e) x[j][e] = sums[sum_offset<DQ_DIM>(p.sums.row, j, lane, e)];
            }
        }
        UNROLL for (int j = 0; j < DQ_DIM / 32; ++j) {
            u32 out[4];  // of columns 8 i + 2 quad; then of columns 8 quad + 2 i
            UNROLL for (int i = 0; i < 4; ++i)
                out[i] = pack2(x[2 * j + i / 2][i % 2 * 2] * p.scale, x[2 * j + i / 2][i % 2 * 2 + 1] * p.scale);
            transpose(out, quad);
            if (wide) {
                *reinterpret_cast<uint4 *>(to + 32 * j) = make_uint4(out[0], out[1], out[2], out[3]);
            } else {
                UNROLL for (int e = 0; e < 8; ++e) to[32 * j + e] = u16(out[e / 2] >> e % 2 * 16);
            }
        }
    }
}

KERNEL(THREADS, 1) reorder_dq(PARAMS(RoundParams) p) {
    constexpr int MINE = 8 * DQ_DIM / THREADS;
    const bool back = p.flags & TO_SUMS;
    const float factor = back ? 1.0f / p.scale : p.scale;
    for (u64 rows = blockIdx.x; rows < count(p); rows += gridDim.x) {
        const Index n = rows_of(p, rows);
        float *sums = at<float>(p.sums, n.batch, n.row, n.head), x[MINE];
        UNROLL for (int k = 0; k < 2 * MINE; ++k) {
            if (k == MINE) barrier();  // all of them are read
            const int i = int(threadIdx.x) + k % MINE * THREADS, row = i / DQ_DIM, column = i % DQ_DIM;
            const int lane = row * 4 + column % 8 / 2, element = column % 16 / 8 * 2 + column % 2;
            float *plain = sums + row * p.sums.row + column;
            float *sum = sums + sum_offset<DQ_DIM>(p.sums.row, column / 16, lane, element);
            if (k < MINE)
                x[k] = *(back ? plain : sum) * factor;
            else
                *(back ? sum : plain) = x[k - MINE];
        }
    }
}
