// into = round(((t0 + t1) + t2) + ...): f32 sums in list order, rounded once. `into` may be one of the terms.
//
// A thread takes `width` (1 or 4) neighbouring elements at a time, 4 where all pointers and strides are multiples of it, in UNITS
// places, so that as many loads are under way.

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

constexpr int UNITS = 4;

DEVICE void load_units(float (&x)[1], const float *from) { x[0] = *from; }
DEVICE void load_units(float (&x)[4], const float *from) {
    const float4 v = *reinterpret_cast<const float4 *>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// Units first, first + THREADS, ... of `total`.
template <int WIDTH> DEVICE void sum(const AccumulateParams &p, u64 first, u64 total, u32 units) {
    Index n[UNITS];
    float s[UNITS][WIDTH];
    UNROLL for (int k = 0; k < UNITS; ++k)
        if (first + k * THREADS < total) n[k] = index_of(first + k * THREADS, p.extent, units);
    for (u32 t = 0; t < p.count; ++t) {
        const Tensor &term = p.terms[t];
        float x[UNITS][WIDTH];
        UNROLL for (int k = 0; k < UNITS; ++k)
            if (first + k * THREADS < total)
                load_units(x[k], at<const float>(term, n[k].batch, n[k].row, n[k].head) + n[k].unit * WIDTH);
        UNROLL for (int k = 0; k < UNITS; ++k)
            UNROLL for (int i = 0; i < WIDTH; ++i) s[k][i] = t == 0 ? x[k][i] : s[k][i] + x[k][i];
    }
    UNROLL for (int k = 0; k < UNITS; ++k)
        if (first + k * THREADS < total)
            store_units(at<Element>(p.into, n[k].batch, n[k].row, n[k].head) + n[k].unit * WIDTH, s[k]);
}

KERNEL(THREADS, 1) accumulate(PARAMS(AccumulateParams) p) {
    const u32 units = p.extent[3] / p.width;
    const u64 total = u64(p.extent[0]) * p.extent[1] * p.extent[2] * units, step = u64(gridDim.x) * (UNITS * THREADS);
    for (u64 first = u64(blockIdx.x) * (UNITS * THREADS) + threadIdx.x; first < total; first += step) {
        if (p.width == 4)
            sum<4>(p, first, total, units);
        else
            sum<1>(p, first, total, units);
    }
}
