// to[b, r, h, d] = from[b, r, h, d] for several regions at once (the grid's y axis): strided copies, packing, unpacking.
// Strides and the last extent count units of UNIT bytes.

#if UNIT == 2
typedef u16 Unit;
#elif UNIT == 4
typedef u32 Unit;
#elif UNIT == 8
typedef u64 Unit;
#else
typedef Words4 Unit;
#endif

constexpr int MAX_REGIONS = 16;
struct Region {
    Tensor from, to;
    u32 extent[4];  // batch, row, head, dim; up to 2^31 units in all
};
struct CopyParams {
    Region regions[MAX_REGIONS];
};
static_assert(sizeof(CopyParams) == 80 * MAX_REGIONS, "layout");

constexpr int UNITS = 4;  // of a thread, under way together

// Address of unit i.
DEVICE u64 place(const Tensor &t, const u32 (&extent)[4], u32 i) {
    const u32 row = i / extent[3], sequence = row / extent[2], batch = sequence / extent[1];
    return t.ptr + sizeof(Unit) * (batch * t.batch + (sequence - batch * extent[1]) * t.row +
                                   (row - sequence * extent[2]) * t.head + (i - row * extent[3]));
}

KERNEL(THREADS, 1) copy_strided(PARAMS(CopyParams) p) {
    const Region &g = p.regions[blockIdx.y];
    const u32 total = g.extent[0] * g.extent[1] * g.extent[2] * g.extent[3];
    for (u32 first = blockIdx.x * (UNITS * THREADS) + threadIdx.x; first < total; first += gridDim.x * (UNITS * THREADS)) {
        Unit moved[UNITS];
        UNROLL for (int k = 0; k < UNITS; ++k) {
            const u32 i = first + k * THREADS;
            moved[k] = *reinterpret_cast<const Unit *>(place(g.from, g.extent, i < total ? i : total - 1));
        }
        UNROLL for (int k = 0; k < UNITS; ++k)
            if (first + k * THREADS < total)
                *reinterpret_cast<Unit *>(place(g.to, g.extent, first + k * THREADS)) = moved[k];
    }
}
