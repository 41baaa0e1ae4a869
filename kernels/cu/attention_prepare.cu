// What the backward needs of each row, and the gradient of the sinks.
//
//   delta = rowsum(dout * out) - dlse        dsink_h = -sum over rows exp(sink_h - lse) * delta
//
//   prepare_delta: 8 lanes a row (of one head), 8 elements a lane at a time
//   prepare_dsinks: one block a head, rows summed in a fixed order

struct PrepareParams {
    Tensor out, dout, lse, dlse, delta, sinks, dsinks;
    u32 batch, rows, heads, head_dim_v, head_first, unused;
};
static_assert(sizeof(PrepareParams) == 248, "layout");

// Dot of elements column..column + 8, of which those from `dim` on are not there.
DEVICE float dot8(const Element *a, const Element *b, int column, int dim) {
    float sum = 0.0f;
#if !defined(IO_F32)
    if (column + 8 <= dim && ((reinterpret_cast<u64>(a + column) | reinterpret_cast<u64>(b + column)) & 15) == 0) {
        const uint4 x = *reinterpret_cast<const uint4 *>(a + column), y = *reinterpret_cast<const uint4 *>(b + column);
        const u32 u[4] = {x.x, x.y, x.z, x.w}, v[4] = {y.x, y.y, y.z, y.w};
        UNROLL for (int i = 0; i < 4; ++i)
            sum += widen(u16(u[i])) * widen(u16(v[i])) + widen(u16(u[i] >> 16)) * widen(u16(v[i] >> 16));
        return sum;
    }
#endif
    for (int i = column; i < column + 8 && i < dim; ++i) sum += read(a[i]) * read(b[i]);
    return sum;
}

KERNEL(THREADS, 1) prepare_delta(PARAMS(PrepareParams) p) {
    const u64 index = u64(blockIdx.x) * (THREADS / 8) + threadIdx.x / 8;
    const u64 count = u64(p.batch) * p.rows * p.heads;
    const u64 item = index < count ? index : count - 1;
    const Index n = index_of(item, {p.batch, p.rows, p.heads, 1}, 1);
    const Element *out = at<const Element>(p.out, n.batch, n.row, n.head), *dout = at<const Element>(p.dout, n.batch, n.row, n.head);
    float sum = 0.0f;
    for (int c = int(threadIdx.x % 8) * 8; c < int(p.head_dim_v); c += 64) sum += dot8(out, dout, c, p.head_dim_v);
    UNROLL for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    if (index >= count || threadIdx.x % 8) return;
    if (p.dlse.ptr) sum -= *at<const float>(p.dlse, n.batch, n.row, n.head);
    *at<float>(p.delta, n.batch, n.row, n.head) = sum;
}

KERNEL(THREADS, 1) prepare_dsinks(PARAMS(PrepareParams) p) {
    __shared__ float sums[THREADS];
    const u32 head = blockIdx.x;
    const float sink = *at<const float>(p.sinks, 0, 0, p.head_first + head);
    float sum = 0.0f;
    if (sink != -INFINITY_F)
        for (u64 i = threadIdx.x; i < u64(p.batch) * p.rows; i += THREADS) {
            u32 batch = u32(i / p.rows), row = u32(i % p.rows);
            float weight = exp2_fast((sink - *at<const float>(p.lse, batch, row, head)) * LOG2E);
            sum -= weight * *at<const float>(p.delta, batch, row, head);
        }
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        barrier();
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *at<float>(p.dsinks, 0, 0, head) = sums[0];
}
