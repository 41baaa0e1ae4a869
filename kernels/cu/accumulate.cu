// into = round(((t0 + t1) + t2) + ...): f32 sums in list order, rounded once. `into` may be one of the terms.
//
// A thread takes `width` (1 or 4) neighbouring elements at a time; 4 where all pointers and strides are multiples of it.

constexpr int MAX_TERMS = 32;
struct AccumulateParams {
    Tensor into, terms[MAX_TERMS];
    u32 extent[4];  // batch, row, head, dim
    u32 count, width;
};
static_assert(sizeof(AccumulateParams) == 32 + 32 * MAX_TERMS + 24, "layout");

DEVICE void store_units(Element *to, const float (&s)[1]) { *to = rounded(s[0]); }
DEVICE void store_units(Element *to, const float (&s)[4]) {
#if defined(IO_F32)
    *reinterpret_cast<float4 *>(to) = make_float4(s[0], s[1], s[2], s[3]);
#else
    *reinterpret_cast<uint2 *>(to) = make_uint2(pack2(s[0], s[1]), pack2(s[2], s[3]));
#endif
}

template <int WIDTH> DEVICE void sum(const AccumulateParams &p, u32 batch, u32 row, u32 head, u32 column) {
    float s[WIDTH];
    for (u32 t = 0; t < p.count; ++t) {
        const float *from = at<const float>(p.terms[t], batch, row, head) + column;
        float x[WIDTH];
        if (WIDTH == 4) {
            const float4 v = *reinterpret_cast<const float4 *>(from);
            x[0] = v.x, x[WIDTH / 4] = v.y, x[WIDTH / 2] = v.z, x[WIDTH * 3 / 4] = v.w;
        } else {
            x[0] = *from;
        }
        UNROLL for (int i = 0; i < WIDTH; ++i) s[i] = t == 0 ? x[i] : s[i] + x[i];
    }
    Element *to = at<Element>(p.into, batch, row, head) + column;
    store_units(to, s);
}

KERNEL(THREADS, 1) accumulate(PARAMS(AccumulateParams) p) {
    const u32 units = p.extent[3] / p.width;
    const u64 total = u64(p.extent[0]) * p.extent[1] * p.extent[2] * units;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += u64(gridDim.x) * THREADS) {
        const Index n = index_of(i, p.extent, units);
        if (p.width == 4)
            sum<4>(p, n.batch, n.row, n.head, n.unit * 4);
        else
            sum<1>(p, n.batch, n.row, n.head, n.unit);
    }
}
