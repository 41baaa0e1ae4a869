// to[b, r, h, d] = from[b, r, h, d] for several regions at once (the grid's y axis): strided copies, packing, unpacking.
// Strides and the last extent count units of UNIT bytes.

#if UNIT == 2
typedef u16 Unit;
#elif UNIT == 4
typedef u32 Unit;
#elif UNIT == 8
typedef u64 Unit;
#else
typedef uint4 Unit;
#endif

constexpr int MAX_REGIONS = 16;
struct Region {
    Tensor from, to;
    u32 extent[4];  // batch, row, head, dim
};
struct CopyParams {
    Region regions[MAX_REGIONS];
};
static_assert(sizeof(CopyParams) == 80 * MAX_REGIONS, "layout");

KERNEL(THREADS, 1) copy_strided(PARAMS(CopyParams) p) {
    const Region &g = p.regions[blockIdx.y];
    const u64 total = u64(g.extent[0]) * g.extent[1] * g.extent[2] * g.extent[3];
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += u64(gridDim.x) * THREADS) {
        const Index n = index_of(i, g.extent, g.extent[3]);
        at<Unit>(g.to, n.batch, n.row, n.head)[n.unit] = at<const Unit>(g.from, n.batch, n.row, n.head)[n.unit];
    }
}
