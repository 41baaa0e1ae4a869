// to = round(value), every element. A thread takes `width` (1 or 4) neighbouring elements at a time; 4 where the pointer and
// all strides are multiples of it.

struct FillParams {
    Tensor to;
    u32 extent[4];  // batch, row, head, dim
    float value;
    u32 width;
};
static_assert(sizeof(FillParams) == 56, "layout");

struct alignas(4 * sizeof(Element)) Four {
    Element x, y, z, w;
};

KERNEL(THREADS, 1) fill(PARAMS(FillParams) p) {
    const Element value = rounded(p.value);
    const u32 units = p.extent[3] / p.width;
    const u64 total = u64(p.extent[0]) * p.extent[1] * p.extent[2] * units;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += u64(gridDim.x) * THREADS) {
        const Index n = index_of(i, p.extent, units);
        Element *to = at<Element>(p.to, n.batch, n.row, n.head) + n.unit * p.width;
        if (p.width == 4)
            *reinterpret_cast<Four *>(to) = {value, value, value, value};
        else
            *to = value;
    }
}
