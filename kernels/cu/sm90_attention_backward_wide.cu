// dK and dV over slices on Hopper's warpgroup products for large heads, of which a warpgroup holds one gradient only; dQ is
// computed by sm90_attention_backward_dq.cu.
//
//   one block = one tile of 64 keys of one KV head; copier and reader as in sm90_attention_backward.cu
//     group 0, for each block of queries:
//         S^T = K Q^T; P^T = exp2(S^T - lse), 0 outside the band; P^T to shared memory; dV += P^T dout is started
//     group 1:
//         dP^T = V dout^T; dS^T = P^T (dP^T - delta); dK += dS^T Q is started
//
// The operands P^T and dS^T of the second products stay in registers. P^T travels in the order of accumulators, which is the
// same in both groups; a pair that dropout drops travels with a minus. Where elements are bf16 it travels as f16 of 2^15 P^T, off
// by a relative 2^-12 (an eighth of what rounding dS adds), and dK gets rid of the factor.
//
// Macros: those of sm90_backward.cuh (BLOCK_M: 64; BLOCK_N: 64; DQ: 0), REGISTERS, PRODUCER_REGISTERS.

#if defined(IO_BF16)
constexpr float SENT = 32768.0f;
DEVICE u32 pack_f16(float low, float high) {
    u32 x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high * SENT), "f"(low * SENT));
    return x;
}
DEVICE void unpack_f16(u32 x, float &low, float &high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(low), "=f"(high) : "r"(x));
}
// P^T of 16 columns, 8 and 8.
DEVICE void send(u32 to, const float (&p)[2][4]) {
    store_shared4(to, pack_f16(p[0][0], p[0][1]), pack_f16(p[0][2], p[0][3]), pack_f16(p[1][0], p[1][1]), pack_f16(p[1][2], p[1][3]));
}
DEVICE void receive(u32 from, float (&p)[2][4]) {
    const float4 x = load_shared4(from);
    const u32 pairs[4] = {__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)};
    UNROLL for (int i = 0; i < 4; ++i) unpack_f16(pairs[i], p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
}
#else
constexpr float SENT = 1.0f;
DEVICE void send(u32 to, const float (&p)[2][4]) {
    UNROLL for (int i = 0; i < 2; ++i)
        store_shared4(to + i * 2048, __float_as_uint(p[i][0]), __float_as_uint(p[i][1]), __float_as_uint(p[i][2]), __float_as_uint(p[i][3]));
}
DEVICE void receive(u32 from, float (&p)[2][4]) {
    UNROLL for (int i = 0; i < 2; ++i) {
        const float4 x = load_shared4(from + i * 2048);
        p[i][0] = x.x, p[i][1] = x.y, p[i][2] = x.z, p[i][3] = x.w;
    }
}
#endif

struct Group {
    const BackwardParams &p;
    const unsigned char *memory;
    u32 base;
    int warp, lane;
    u32 turn;

    DEVICE void arrive(u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + barrier);
    }

    DEVICE int row() { return 16 * warp + lane / 4; }
    // Of columns 16 i...
    DEVICE u32 exchange(int i) { return base + P_AT + turn % 2 * P_BYTES + i * (P_BYTES / (BLOCK_M / 16)) + threadIdx.x % 128 * 16; }

    // S^T becomes P^T as it weighs dout, and goes to the other group as it weighs dP^T.
    DEVICE void probabilities(Pairs &s, const Block &block, const Tile &tile, const Score &score) {
        const int key = int(tile.row0) + row(), query = block.query + lane % 4 * 2;
        const u32 stats = base + STATS_AT + turn % STAGES * 2 * BLOCK_M * 4 + lane % 4 * 8;
#if SOFTCAP
        Pairs bent;
#endif
#if TRANSFORM
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float d;
                s[j][e] = transform(score, block.piece, s[j][e], query + 8 * j + e % 2, key + 8 * (e / 2), d);
#if SOFTCAP
                bent[j][e] = d;
#endif
            }
#endif
        if (block.flags & MASKED) mask(s, block.piece, key, query);
#if DROPOUT
        const Dropout dropout = dropout_of(p.problem, tile.batch, block.head);
#endif
        barrier_wait(base + FREE_P + 8 * (turn % 2), turn / 2 & 1 ^ 1);
        float both[2][4];
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 lse = load_shared2(stats + 32 * j);
            float (&sent)[4] = both[j % 2];
            UNROLL for (int e = 0; e < 4; ++e) {
                s[j][e] = exp2_fast(s[j][e] * score.unit - (e % 2 ? lse.y : lse.x));
                sent[e] = s[j][e];
#if SOFTCAP
                sent[e] *= bent[j][e];
#endif
#if DROPOUT
                const float keep = keep_factor(dropout, block.piece, query + 8 * j + e % 2, key + 8 * (e / 2));
                s[j][e] *= keep;
                sent[e] = keep == 0.0f ? -sent[e] : sent[e];
#endif
            }
            if (j % 2) send(exchange(j / 2), both);
        }
        barrier_arrive(base + FULL_P + 8 * (turn % 2));  // every lane, since every lane wrote
    }

    // dP^T becomes dS^T.
    DEVICE void differences(Pairs &dp) {
        const u32 stats = base + STATS_AT + turn % STAGES * 2 * BLOCK_M * 4 + lane % 4 * 8;
        barrier_wait(base + FULL_P + 8 * (turn % 2), turn / 2 & 1);
        float weights[2][4];
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 delta = load_shared2(stats + BLOCK_M * 4 + 32 * j);
            if (j % 2 == 0) receive(exchange(j / 2), weights);
            const float (&w)[4] = weights[j % 2];
            UNROLL for (int e = 0; e < 4; ++e) {
                float x = dp[j][e], by = w[e];
#if DROPOUT
                x = __float_as_uint(by) >> 31 ? 0.0f : x * p.problem.keep_scale;
                by = fabsf(by);
#endif
                dp[j][e] = by * (x - (e % 2 ? delta.y : delta.x));
            }
        }
        barrier_arrive(base + FREE_P + 8 * (turn % 2));
    }

    DEVICE const Block &described() {
        barrier_wait(base + FULL_Q + 8 * (turn % Q_STAGES), turn / Q_STAGES & 1);
        return reinterpret_cast<const Block *>(memory + BLOCKS_AT)[turn % BLOCKS];
    }
    DEVICE u32 queries() { return base + Q_AT + turn % Q_STAGES * Q_BYTES; }
    DEVICE u32 gradients() { return base + O_AT + turn % STAGES * O_BYTES; }
    DEVICE void free_queries(u32 turn) { arrive(FREE_Q + 8 * (turn % Q_STAGES)); }
    DEVICE void free_gradients(u32 turn) { arrive(FREE_O + 8 * (turn % STAGES)); }
    DEVICE void wait_gradients() { barrier_wait(base + FULL_O + 8 * (turn % STAGES), turn / STAGES & 1); }
    DEVICE void wait_statistics() { barrier_wait(base + FULL_S + 8 * (turn % STAGES), turn / STAGES & 1); }

    DEVICE void gather_values(float (&dv)[HEAD_DIM_V / 8][4], const Tile &tile) {
        Pairs s;
        Packed weights;
        Score score = score_of(p.problem, 0);
        for (bool first = true, last = false; !last; ++turn, first = false) {
            const Block &block = described();
            last = block.flags & LAST;
#if ALIBI
            score = score_of(p.problem, block.head);
#endif
            start_pairs<HEAD_DIM>(s, base, queries(), {}, 0);
            products_wait<1>();  // dV of the block before: the sooner its rows are free, the sooner others are there
            pin(dv);
            pin(weights);
            if (!first) free_gradients(turn - 1);
            wait_statistics();
            products_wait<0>();
            pin(s);
            free_queries(turn);
            probabilities(s, block, tile, score);
            barrier_arrive(base + FREE_S + 8 * (turn % STAGES));
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(weights[i], s[2 * i], s[2 * i + 1]);
            wait_gradients();
            pin(dv);
            pin(weights);
            start_gather<HEAD_DIM_V>(dv, weights, gradients());
        }
        products_wait<0>();
        pin(dv);
        free_gradients(turn - 1);
    }

    DEVICE void gather_keys(float (&dk)[HEAD_DIM / 8][4]) {
        Pairs dp;
        Packed ds;
        for (bool first = true, last = false; !last; ++turn, first = false) {
            last = described().flags & LAST;
            wait_gradients();
            start_pairs<HEAD_DIM_V>(dp, base + V_AT, gradients(), {}, 0);
            products_wait<1>();
            pin(dk);
            pin(ds);
            if (!first) free_queries(turn - 1);
            wait_statistics();
            products_wait<0>();
            pin(dp);
            free_gradients(turn);
            differences(dp);
            barrier_arrive(base + FREE_S + 8 * (turn % STAGES));
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
            pin(dk);
            pin(ds);
            start_gather<HEAD_DIM>(dk, ds, queries());
        }
        products_wait<0>();
        pin(dk);
        free_queries(turn - 1);
    }

    // Zeros, then what `gather` adds, then to memory or added there.
    template <int N, typename F> DEVICE void run(const Tensor &into, int dim, float scale, bool add, F &&gather) {
        each_tile(memory, base, lane, [&](const Work &work, u32 n) {
            float sum[N / 8][4];
            UNROLL for (int j = 0; j < N / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
            barrier_wait(base + FULL_KV, n & 1);
            if (work.state == BUSY) gather(sum, work.tile);
            arrive(FREE_KV);
            if (work.state == BUSY || !add) store_gradient<N>(into, work, row(), sum, dim, scale, add);
        });
    }
    DEVICE void values() {
        run<HEAD_DIM_V>(p.dv, EXACT ? HEAD_DIM_V : p.problem.head_dim_v, 1.0f, p.add & 2,
                        [&](float (&dv)[HEAD_DIM_V / 8][4], const Tile &tile) { gather_values(dv, tile); });
    }
    DEVICE void keys() {
        run<HEAD_DIM>(p.dk, EXACT ? HEAD_DIM : p.problem.head_dim, p.problem.scale / SENT, p.add & 1,
                      [&](float (&dk)[HEAD_DIM / 8][4], const Tile &) { gather_keys(dk); });
    }
};

KERNEL(THREADS, 1) attention_backward(PARAMS(MappedBackwardParams) p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = shared_address(memory);
    const int warp = uniform(threadIdx.x / WARP), group = warp / 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) init_barriers(base);
    barrier();
    if (group == GROUPS) {
        registers_less<PRODUCER_REGISTERS>();
        if (warp % 4 == 0) Copier{p, memory, base, lane}.run();
        if (warp % 4 == 1) read_statistics(p, memory, base, lane);
    } else {
        registers_more<REGISTERS>();
        Group of{p.call, memory, base, warp % 4, lane};
        if (group == 0)
            of.values();
        else
            of.keys();
    }
}
