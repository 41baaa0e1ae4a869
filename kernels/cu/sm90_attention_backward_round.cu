// dq of its f32 sums as sm90_attention_backward.cu leaves them with DQ_QUADS: without the scale, the quads of every 32 columns
// in the order 0 2 4 6 1 3 5 7.
//
//   round_dq    dq = round(scale * sums); a thread takes 4 neighbouring elements at a time, in UNITS rows of a head
//   reorder_dq  sums to f32 dq or back, in place, for calls that another kernel adds to dq; a thread takes 32 columns

struct RoundParams {
    Tensor into, sums;
    u32 extent[4];  // batch, row, head, dim, a multiple of 32
    float scale;
    u32 flags;  // ALIGNED_QUADS; TO_SUMS
};
static_assert(sizeof(RoundParams) == 88, "layout");

enum : u32 { ALIGNED_QUADS = 1 /* four elements of `into` and of `sums` can be taken at once */, TO_SUMS = 2 };
constexpr int UNITS = 4;

// Where quad `unit` of dq is in the sums.
DEVICE u32 place_of_quad(u32 unit) { return unit & ~7u | unit % 2 * 4 | unit / 2 % 4; }

DEVICE bool is_dense(const Tensor &t, const u32 (&extent)[4]) {
    return t.head == extent[3] && t.row == t.head * extent[2] && t.batch == t.row * extent[1];
}

KERNEL(THREADS, 1) round_dq(PARAMS(RoundParams) p) {
    const u32 units = p.extent[3] / 4, together = THREADS / units, unit = threadIdx.x % units, mine = threadIdx.x / units;
    if (mine >= together) return;
    const u64 rows = u64(p.extent[0]) * p.extent[1] * p.extent[2], step = u64(gridDim.x) * (UNITS * together);
    const bool flat = is_dense(p.into, p.extent) && is_dense(p.sums, p.extent);  // divisions take longer than the memory
    const bool wide = p.flags & ALIGNED_QUADS;
    for (u64 first = u64(blockIdx.x) * (UNITS * together) + mine; first < rows; first += step) {
        u16 *into[UNITS];
        float4 sum[UNITS];
        UNROLL for (int k = 0; k < UNITS; ++k) {
            const u64 row = first + k * together;
            if (row >= rows) continue;
            const Index n = flat ? Index{0, 0, 0, 0} : index_of(row, p.extent, 1);
            const u64 skip = flat ? row * p.extent[3] : 0;
            into[k] = at<u16>(p.into, n.batch, n.row, n.head) + skip + 4 * unit;
            const float *from = at<const float>(p.sums, n.batch, n.row, n.head) + skip + 4 * place_of_quad(unit);
            sum[k] = wide ? *reinterpret_cast<const float4 *>(from) : make_float4(from[0], from[1], from[2], from[3]);
        }
        UNROLL for (int k = 0; k < UNITS; ++k) {
            if (first + k * together >= rows) continue;
            const u32 low = pack2(sum[k].x * p.scale, sum[k].y * p.scale), high = pack2(sum[k].z * p.scale, sum[k].w * p.scale);
            if (wide) {
                *reinterpret_cast<uint2 *>(into[k]) = make_uint2(low, high);
            } else {
                into[k][0] = u16(low), into[k][1] = u16(low >> 16), into[k][2] = u16(high), into[k][3] = u16(high >> 16);
            }
        }
    }
}

KERNEL(THREADS, 1) reorder_dq(PARAMS(RoundParams) p) {
    const u32 units = p.extent[3] / 32;
    const u64 total = u64(p.extent[0]) * p.extent[1] * p.extent[2] * units;
    const bool back = p.flags & TO_SUMS;
    const float factor = back ? 1.0f / p.scale : p.scale;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += u64(gridDim.x) * THREADS) {
        const Index n = index_of(i, p.extent, units);
        float *columns = at<float>(p.sums, n.batch, n.row, n.head) + 32 * n.unit, x[32];
        UNROLL for (u32 c = 0; c < 32; ++c) x[c] = columns[c] * factor;
        UNROLL for (u32 c = 0; c < 32; ++c) {
            const u32 other = 4 * place_of_quad(c / 4) + c % 4;
            if (back)
                columns[other] = x[c];
            else
                columns[c] = x[other];
        }
    }
}
