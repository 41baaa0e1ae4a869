// Attention backward over slices on Hopper's warpgroup products (16-bit elements, f32 accumulation). Mathematics as in
// sm80_attention_backward.cu.
//
//   one block = one key tile of one KV head (2 x 64 keys); K and V stay in shared memory, dK and dV in registers
//     copier (a warp)       for each query head of the KV head, each piece, each BLOCK_M query rows: describes the block,
//                           starts the copies of Q and dout
//     reader (a warp)       brings lse and delta of the block's rows
//     adder (a warp)        adds dQ of a block to f32 memory, by bulk copies
//     consumers (2 warpgroups, 64 keys each)
//         S^T = K Q^T and dP^T = V dout^T are started
//         P^T = exp2(S^T - lse), 0 outside the band; dS^T = P^T (dP^T - delta)
//         dV += P^T dout is started, with P^T in registers; dS^T goes to shared memory
//         both have written dS: dQ = dS K (each group a half of it) and dK += dS^T Q are started
//         dQ goes to shared memory for the adder
//     write or add dK and dV
//
// Rows of Q, dout, K, V past a piece or tile may hold anything: the copier zeroes them. (Shah et al., FlashAttention-3, 2024.)
//
// Macros: those of sm90_backward.cuh (BLOCK_M: 64, or 128 for small heads; BLOCK_N: 128), REGISTERS, PRODUCER_REGISTERS.

// ---- the adder ----

#if DQ
DEVICE void add_gradients(const MappedBackwardParams &p, u32 base, const Tile &tile, u32 kv, int lane) {
    u32 turn = 0;
    each_block(p.call.problem, tile, kv, [&](u32 head, const Piece &, int query) {
        barrier_wait(base + FULL_DQ, turn & 1);
        if (lane == 0) {
            UNROLL for (int i = 0; i < HEAD_DIM / 32; ++i)
                add_box(&p.dq, {32 * i, query, int(head), int(tile.batch)}, base + DQ_AT + i * DQ_BOX);
            copies_commit();
            copies_read<0>();
            barrier_arrive(base + FREE_DQ);
        }
        __syncwarp();
        ++turn;
    });
    if (lane == 0) copies_done<0>();
}
#endif

// ---- the consumers ----

struct Consumer {
    const BackwardParams &p;
    const Block *blocks;
    u32 base;
    int group, warp, lane;  // warp of the group
    Tile tile;
    u32 kv;
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
    u32 head;

    DEVICE void use_head(u32 of) {
        if (of == head) return;
        head = of;
        score = score_of(p.problem, head);
#if DROPOUT
        dropout = dropout_of(p.problem, tile.batch, head);
#endif
    }

    // First key of this lane, first query of this lane.
    DEVICE int key() { return int(tile.row0) + 64 * group + 16 * warp + lane / 4; }
    DEVICE int query(const Block &block) { return block.query + lane % 4 * 2; }

    // S^T becomes P^T; with SOFTCAP, `bent` its derivative.
    DEVICE void probabilities(Pairs &s, const Block &block, u32 stats, float (*bent)[4]) {
#if TRANSFORM
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                float d;
                s[j][e] = transform(score, block.piece, s[j][e], query(block) + 8 * j + e % 2, key() + 8 * (e / 2), d);
#if SOFTCAP
                bent[j][e] = d;
#endif
            }
#endif
        if (block.flags & MASKED << group) mask(s, block.piece, key(), query(block));
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 lse = load_shared2(stats + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e)
                s[j][e] = exp2_fast(s[j][e] * score.unit - (e % 2 ? lse.y : lse.x));
        }
    }

    // dP^T becomes dS^T, and P^T that which weighs dout.
    DEVICE void differences(Pairs &dp, Pairs &s, const Block &block, u32 stats, const float (*bent)[4]) {
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 delta = load_shared2(stats + BLOCK_M * 4 + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e) {
                float keep = 1.0f;
#if DROPOUT
                keep = keep_factor(dropout, block.piece, query(block) + 8 * j + e % 2, key() + 8 * (e / 2));
#endif
                dp[j][e] = s[j][e] * (dp[j][e] * keep - (e % 2 ? delta.y : delta.x));
                s[j][e] *= keep;
#if SOFTCAP
                dp[j][e] *= bent[j][e];
#endif
            }
        }
    }

    // dS^T to [key][query] in shared memory.
    DEVICE void store_differences(const Packed &ds, u32 to) {
        const int row = 64 * group + 16 * warp + lane % 16;
        UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
            const u32 unit = u32(2 * (i % 4) + lane / 16) ^ u32(row % 8);
            store_matrices(to + i / 4 * KEY_PANEL + row * 128 + unit * 16, ds[i]);
        }
    }

#if DQ
    static constexpr int DQ_COLUMNS = BLOCK_M == 128 ? HEAD_DIM : HEAD_DIM / 2;
    typedef float DQuery[DQ_COLUMNS / 8][4];

    // This group's part of dQ = dS K: with 128 queries 64 of them, otherwise half of the columns.
    DEVICE void start_dq(DQuery &dq, u32 ds) {
        const Operand a = along_rows(ds + (BLOCK_M == 128 ? group * KEY_PANEL : 0), KEY_PANEL);
        const u32 column = BLOCK_M == 128 ? 0 : group * DQ_COLUMNS;
        const Operand b = along_rows(base + column / 64 * KEY_PANEL + column % 64 * 2, KEY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk)
            product<1, 1>(dq, a.on(kk * 2048), b.on(kk * 2048), kk > 0);
        products_commit();
    }

    DEVICE void store_dq(const DQuery &dq, float scale) {
        const int column0 = BLOCK_M == 128 ? 0 : group * DQ_COLUMNS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int row = (BLOCK_M == 128 ? 64 * group : 0) + 16 * warp + lane / 4 + 8 * half;
            UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j) {
                const int column = column0 + 8 * j + lane % 4 * 2;
                const u32 unit = u32(column % 32 / 4) ^ u32(row % 8);
                store_shared2(base + DQ_AT + column / 32 * DQ_BOX + row * 128 + unit * 16 + column % 4 * 4,
                              dq[j][2 * half] * scale, dq[j][2 * half + 1] * scale);
            }
        }
    }
#endif

    DEVICE void arrive(u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + barrier);
    }

    DEVICE void run() {
        float dk[HEAD_DIM / 8][4], dv[HEAD_DIM_V / 8][4];
        UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dk[j][e] = 0.0f;
        UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dv[j][e] = 0.0f;
        barrier_wait(base + FULL_KV, 0);
        for (u32 turn = 0;; ++turn) {
            const u32 stage = turn % STAGES, parity = turn / STAGES & 1;
            const u32 q_at = base + Q_AT + stage * Q_BYTES, o_at = base + O_AT + stage * O_BYTES;
            const u32 stats = base + STATS_AT + stage * 2 * BLOCK_M * 4 + lane % 4 * 8;
            barrier_wait(base + FULL_Q + 8 * stage, parity);
            const Block &block = blocks[turn % BLOCKS];
            if (block.flags & END) break;
            use_head(block.head);
            Pairs s, dp;
            start_pairs<HEAD_DIM>(s, base + group * 8192, q_at);
            barrier_wait(base + FULL_O + 8 * stage, parity);
            start_pairs<HEAD_DIM_V>(dp, base + V_AT + group * 8192, o_at);
            barrier_wait(base + FULL_S + 8 * stage, parity);
            products_wait<1>();
            pin(s);
#if SOFTCAP
            Pairs bent;
#else
            float(*bent)[4] = nullptr;
#endif
            probabilities(s, block, stats, bent);
            products_wait<0>();
            pin(dp);
            differences(dp, s, block, stats, bent);
            arrive(FREE_S + 8 * stage);
            Packed weights, ds;
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(weights[i], s[2 * i], s[2 * i + 1]);
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
            const u32 ds_at = base + DS_AT + turn % 2 * DS_BYTES;
            if (DQ) {
                store_differences(ds, ds_at);
                fence_proxy();
            }
            pin(dv);
            pin(weights);
            start_gather<HEAD_DIM_V>(dv, weights, o_at);
#if DQ
            group_sync(1, 128 * GROUPS);
            DQuery dq;
            pin(dk);
            pin(ds);
            start_dq(dq, ds_at);
            start_gather<HEAD_DIM>(dk, ds, q_at);
            products_wait<2>();
            pin(dv);
            pin(weights);
            arrive(FREE_O + 8 * stage);
            products_wait<1>();
            pin(dq);
            barrier_wait(base + FREE_DQ, turn & 1 ^ 1);
            store_dq(dq, p.problem.scale);
            fence_proxy();
            arrive(FULL_DQ);
#else
            pin(dk);
            pin(ds);
            start_gather<HEAD_DIM>(dk, ds, q_at);
            products_wait<1>();
            pin(dv);
            pin(weights);
            arrive(FREE_O + 8 * stage);
#endif
            products_wait<0>();
            pin(dk);
            pin(ds);
            arrive(FREE_Q + 8 * stage);
        }
        const bool add_k = p.add & 1, add_v = p.add & 2;
        const int row = 64 * group + 16 * warp + lane / 4;
        if (tile.count || !add_k)
            store_gradient<HEAD_DIM>(p.dk, tile, kv, row, dk, EXACT ? HEAD_DIM : p.problem.head_dim, p.problem.scale, add_k);
        if (tile.count || !add_v)
            store_gradient<HEAD_DIM_V>(p.dv, tile, kv, row, dv, EXACT ? HEAD_DIM_V : p.problem.head_dim_v, 1.0f, add_v);
    }
};

KERNEL(THREADS, 1) attention_backward(PARAMS(MappedBackwardParams) p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = shared_address(memory);
    const int warp = uniform(threadIdx.x / WARP), group = warp / 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) init_barriers(base);
    barrier();
    const Place where = place(p.call.problem, p.call.problem.kv_heads);
    const Tile tile = reinterpret_cast<const Tile *>(p.call.problem.tiles)[where.tile];
    if (group == GROUPS) {
        registers_less<PRODUCER_REGISTERS>();
        if (warp % 4 == 0) Copier{p, memory, base, lane, tile, where.head}.run();
        if (warp % 4 == 1) read_statistics(p, base, tile, where.head, lane);
#if DQ
        if (warp % 4 == 2) add_gradients(p, base, tile, where.head, lane);
#endif
    } else {
        registers_more<REGISTERS>();
        Consumer{p.call, reinterpret_cast<const Block *>(memory + BLOCKS_AT), base, group, warp % 4, lane, tile, where.head,
                 score_of(p.call.problem, 0)
#if DROPOUT
                 , dropout_of(p.call.problem, tile.batch, 0)
#endif
                 , 0}
            .run();
    }
}
