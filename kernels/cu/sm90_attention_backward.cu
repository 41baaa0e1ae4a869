// Attention backward over slices on Hopper's warpgroup products (16-bit elements, f32 accumulation). Mathematics as in
// sm80_attention_backward.cu.
//
//   a resident block takes key tiles of a KV head (2 x 64 keys), longest first; K and V stay in shared memory, dK and dV in
//   registers
//     copier (a warp)       takes a tile; for each piece, each BLOCK_M query rows, each query head of the KV head: describes
//                           the block, starts the copies of Q and dout
//     reader (a warp)       brings lse and delta of the block's rows
//     adder (a warp)        adds dQ of a block to f32 memory, by bulk copies
//     consumers (2 warpgroups, 64 keys each)     for each block n, whose P^T is there
//         dP^T = V dout^T and dV += P^T dout are started
//         dS^T = P^T (dP^T - delta), under dV; to shared memory
//         S^T = K Q^T of block n + 1, dQ^T = K^T dS^T of block n - 1 (each group a half of it) and dK += dS^T Q are started
//         P^T = exp2(S^T - lse) of block n + 1, 0 outside the band, under those
//         dQ of block n - 1 goes to shared memory for the adder
//     write or add dK and dV
//
// So a group never waits for what the other one does at the same time. Where registers don't allow it (AHEAD 0), S^T is started
// with dP^T of its block, and dQ of the block when both groups have written dS^T.
//
// Rows of Q, dout, K, V past a piece or tile may hold anything: the copier zeroes them. (Shah et al., FlashAttention-3, 2024.)
//
// Macros: those of sm90_backward.cuh (BLOCK_M: 64, or 128 for small heads; BLOCK_N: 128), AHEAD, REGISTERS,
// PRODUCER_REGISTERS.

// ---- the adder ----

#if DQ
DEVICE void add_gradients(const MappedBackwardParams &p, const unsigned char *memory, u32 base, int lane) {
    u32 turn = 0;
    each_tile(memory, base, lane, [&](const Work &work, u32) {
        each_block(p.call.problem, work, [&](u32 head, const Piece &, int query, bool) {
            barrier_wait(base + FULL_DQ, turn & 1);
            if (lane == 0) {
                UNROLL for (int i = 0; i < HEAD_DIM / 32; ++i)
                    add_box(&p.dq, {32 * i, query, int(head), int(work.tile.batch)}, base + DQ_AT + i * DQ_BOX);
                copies_commit();
                copies_read<0>();
                barrier_arrive(base + FREE_DQ);
            }
            __syncwarp();
            ++turn;
        });
    });
    if (lane == 0) copies_done<0>();
}
#endif

// ---- the consumers ----

struct Consumer {
    const BackwardParams &p;
    const unsigned char *memory;
    u32 base;
    int group, warp, lane;  // warp of the group
    const Tile *tile;
    Score score;
#if DROPOUT
    Dropout dropout;
#endif
    u32 head;
    u32 turn;

    DEVICE void use_head(u32 of) {
        if (of == head) return;
        head = of;
        score = score_of(p.problem, head);
#if DROPOUT
        dropout = dropout_of(p.problem, tile->batch, head);
#endif
    }

    // First key of this lane, first query of this lane.
    DEVICE int key() { return int(tile->row0) + 64 * group + 16 * warp + here() / 4; }
    DEVICE int query(const Block &block) { return block.query + here() % 4 * 2; }
    // The lane, hidden from the compiler, which would otherwise keep all that follows from it in registers over the loop.
    DEVICE int here() { return int(opaque(u32(lane))); }

    // S^T becomes P^T as it weighs dP^T: with SOFTCAP times its derivative; a pair that dropout drops has a minus.
    DEVICE void probabilities(Pairs &s, Packed &weights, const Block &block, u32 stats) {
#if SOFTCAP
        Pairs bent;
#endif
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
        exponentials(s, stats, 0, BLOCK_M / 8);
#if DROPOUT
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e) {
                const float keep = keep_factor(dropout, block.piece, query(block) + 8 * j + e % 2, key() + 8 * (e / 2));
                s[j][e] = keep == 0.0f ? -s[j][e] : s[j][e];
            }
#endif
#if SOFTCAP
        weigh(weights, s);
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) s[j][e] *= bent[j][e];
#endif
    }

    // Of columns 8 first.. to 8 past.
    DEVICE void exponentials(Pairs &s, u32 stats, int first, int past) {
        UNROLL for (int j = first; j < past; ++j) {
            const float2 lse = load_shared2(stats + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e) s[j][e] = exp2_fast(s[j][e] * score.unit - (e % 2 ? lse.y : lse.x));
        }
    }

    // P^T as it weighs dout.
    DEVICE void weigh(Packed &weights, const Pairs &s) {
        UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
#if DROPOUT
            float kept[2][4];
            UNROLL for (int e = 0; e < 8; ++e) kept[e / 4][e % 4] = fmaxf(s[2 * i + e / 4][e % 4], 0.0f) * p.problem.keep_scale;
            as_a(weights[i], kept[0], kept[1]);
#else
            as_a(weights[i], s[2 * i], s[2 * i + 1]);
#endif
        }
    }

    // dP^T becomes dS^T.
    DEVICE void differences(Pairs &dp, const Pairs &s, u32 stats) {
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j) {
            const float2 delta = load_shared2(stats + BLOCK_M * 4 + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e) {
                float x = dp[j][e], by = s[j][e];
#if DROPOUT
                x = __float_as_uint(by) >> 31 ? 0.0f : x * p.problem.keep_scale;
                by = fabsf(by);
#endif
                dp[j][e] = by * (x - (e % 2 ? delta.y : delta.x));
            }
        }
    }

    DEVICE u32 ds_of(u32 turn) { return base + DS_AT + turn % 2 * DS_BYTES; }
    // dS^T to [key][query] in shared memory.
    DEVICE void store_differences(const Packed &ds, u32 to) {
        const int lane = here(), row = 64 * group + 16 * warp + lane % 16;
        UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) {
            const u32 unit = u32(2 * (i % 4) + lane / 16) ^ u32(row % 8);
            store_matrices(to + i / 4 * KEY_PANEL + row * 128 + unit * 16, ds[i]);
        }
    }

#if DQ
    // This group's part of dQ^T = K^T dS^T: 64 columns of the head; of a head of 64, half of the queries.
    static constexpr int DQ_QUERIES = HEAD_DIM == 64 ? BLOCK_M / 2 : BLOCK_M;
    typedef float DQuery[DQ_QUERIES / 8][4];

    DEVICE void start_dq(DQuery &dq, u32 turn) {
        const u32 ds = ds_of(turn);
        const u32 query = HEAD_DIM == 64 ? group * DQ_QUERIES : 0;
        const Operand a = along_rows(base + (HEAD_DIM == 64 ? 0 : group * KEY_PANEL), KEY_PANEL);
        const Operand b = along_rows(ds + query / 64 * KEY_PANEL + query % 64 * 2, KEY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk)
            product<1, 1>(dq, a.on(kk * 2048), b.on(kk * 2048), kk > 0);
        products_commit();
    }

    // Words of a warp's store lie in different banks: 4 rows, in each 8 columns, permuted by the row. (Predicated, since the
    // compiler serialises the products where a branch reads accumulators.)
    DEVICE void store_dq(const DQuery &dq, int e, bool there) {
        const int lane = here(), row = (HEAD_DIM == 64 ? group * DQ_QUERIES : 0) + lane % 4 * 2 + e % 2;
        const int column = (HEAD_DIM == 64 ? 0 : 64 * group) + 16 * warp + lane / 4 + 8 * (e / 2);
        const u32 unit = u32(column % 32 / 4) ^ u32(row % 8);
        const u32 to = base + DQ_AT + column / 32 * DQ_BOX + row * 128 + unit * 16 + column % 4 * 4;
        UNROLL for (int j = 0; j < DQ_QUERIES / 8; ++j) store_shared_if(there, to + 1024 * j, dq[j][e] * p.problem.scale);
    }
#endif

#if DQ
    DEVICE void wait_store(u32 turn) { barrier_wait(base + FREE_DQ, turn & 1 ^ 1); }
    DEVICE void stored(u32 turn) {
        if (AHEAD) arrive(FREE_DS + 8 * (turn % 2));
        fence_proxy();
        arrive(FULL_DQ);
    }
#endif

    DEVICE void arrive(u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + barrier);
    }

    typedef float Keys[HEAD_DIM / 8][4], Values[HEAD_DIM_V / 8][4];
    DEVICE void start_values(Values &dv, Packed &weights, const Pairs &s, u32 gradients) {
        if (!SOFTCAP) weigh(weights, s);
        pin(dv);
        pin(weights);
        start_gather<HEAD_DIM_V>(dv, weights, gradients);
    }
    DEVICE void values_done(Values &dv, Packed &weights, u32 turn) {
        pin(dv);
        pin(weights);
        arrive(FREE_O + 8 * (turn % STAGES));
    }

    DEVICE const Block &block(u32 turn) { return reinterpret_cast<const Block *>(memory + BLOCKS_AT)[turn % BLOCKS]; }
    DEVICE u32 queries(u32 turn) { return base + Q_AT + turn % Q_STAGES * Q_BYTES; }
    DEVICE u32 statistics(u32 turn) { return base + STATS_AT + turn % STAGES * 2 * BLOCK_M * 4 + here() % 4 * 8; }
    DEVICE void wait_queries(u32 turn) { barrier_wait(base + FULL_Q + 8 * (turn % Q_STAGES), turn / Q_STAGES & 1); }
    DEVICE void start_scores(Pairs &s, u32 turn) { start_pairs<HEAD_DIM>(s, base + group * 8192, queries(turn)); }
    DEVICE void wait_statistics(u32 turn) { barrier_wait(base + FULL_S + 8 * (turn % STAGES), turn / STAGES & 1); }
    DEVICE void weigh_block(Pairs &s, Packed &weights, u32 turn) {
        wait_statistics(turn);
        use_head(block(turn).head);
        probabilities(s, weights, block(turn), statistics(turn));
    }

    // dQ is stored between exponentials: both take their time, in different units.
    static constexpr bool MIXED = AHEAD && DQ && !TRANSFORM;

    // All blocks of a tile.
    DEVICE void gather_all(Keys &dk, Values &dv) {
        Pairs s, dp;
        Packed weights, ds;
        if (AHEAD) {
            wait_queries(turn);
            start_scores(s, turn);
            products_wait<0>();
            pin(s);
            weigh_block(s, weights, turn);
        }
        [[maybe_unused]] bool first = true;
        for (bool last = false; !last; ++turn) {
            if (!AHEAD) {
                wait_queries(turn);
                start_scores(s, turn);
            }
            last = block(turn).flags & LAST;
            const u32 stage = turn % STAGES, gradients = base + O_AT + stage * O_BYTES;
            barrier_wait(base + FULL_O + 8 * stage, turn / STAGES & 1);
            start_pairs<HEAD_DIM_V>(dp, base + V_AT + group * 8192, gradients);
            if (AHEAD) {
                start_values(dv, weights, s, gradients);
            } else {
                products_wait<1>();
                pin(s);
                weigh_block(s, weights, turn);
            }
            products_wait<AHEAD>();
            pin(dp);
            differences(dp, s, statistics(turn));
            barrier_arrive(base + FREE_S + 8 * stage);
            pin(dp);
            if (AHEAD) {
                if (!last) wait_queries(turn + 1);
                pin(s);
                start_scores(s, turn + 1);  // after the last block a product of what is there, which is not used
                products_wait<1>();
                values_done(dv, weights, turn);
            }
            UNROLL for (int i = 0; i < BLOCK_M / 16; ++i) as_a(ds[i], dp[2 * i], dp[2 * i + 1]);
#if DQ
            DQuery dq;
            if (AHEAD) barrier_wait(base + FREE_DS + 8 * (turn % 2), turn / 2 & 1 ^ 1);
            store_differences(ds, ds_of(turn));
            if (AHEAD) {  // dQ of the block before, of which the other group's dS has been there for long
                if (!first) barrier_wait(base + FULL_DS + 8 * ((turn - 1) % 2), (turn - 1) / 2 & 1);
                start_dq(dq, turn - 1);
            }
            fence_proxy();
            if (AHEAD) arrive(FULL_DS + 8 * (turn % 2));
#endif
            if (!AHEAD) start_values(dv, weights, s, gradients);
#if DQ
            if (AHEAD) {
                group_sync(1 + group, 128);
            } else {
                group_sync(1, 128 * GROUPS);
                start_dq(dq, turn);
            }
#endif
            pin(dk);
            if (AHEAD && DQ) {
                start_gather<HEAD_DIM>(dk, along_columns(ds_of(turn) + group * 8192), queries(turn));
            } else {
                pin(ds);
                start_gather<HEAD_DIM>(dk, ds, queries(turn));
            }
            products_wait<1 + DQ>();
            if (!AHEAD) {
                values_done(dv, weights, turn);
            } else {
                pin(s);
                if (!last) {
                    if (!MIXED) {
                        weigh_block(s, weights, turn + 1);
                    } else {
                        wait_statistics(turn + 1);
                        const Block &next = block(turn + 1);
                        if (next.flags & MASKED << group) mask(s, next.piece, key(), query(next));
                    }
                }
            }
            if (MIXED) exponentials(s, statistics(turn + 1), 0, BLOCK_M / 16);
#if DQ
            const bool there = !AHEAD || !first;
            const u32 of = AHEAD ? turn - 1 : turn;
            if (there) wait_store(of);
            products_wait<1>();
            pin(dq);
            UNROLL for (int e = 0; e < 4; ++e) {
                if (MIXED) exponentials(s, statistics(turn + 1), (4 + e) * BLOCK_M / 64, (5 + e) * BLOCK_M / 64);
                store_dq(dq, e, there);
            }
            if (there) stored(of);
#endif
            first = false;
            products_wait<0>();
            pin(dk);
            if (!(AHEAD && DQ)) pin(ds);
            arrive(FREE_Q + 8 * (turn % Q_STAGES));
        }
#if DQ
        if (AHEAD) {
            DQuery dq;
            barrier_wait(base + FULL_DS + 8 * ((turn - 1) % 2), (turn - 1) / 2 & 1);
            start_dq(dq, turn - 1);
            products_wait<0>();
            pin(dq);
            wait_store(turn - 1);
            UNROLL for (int e = 0; e < 4; ++e) store_dq(dq, e, true);
            stored(turn - 1);
        }
#endif
    }

    DEVICE void run() {
        each_tile(memory, base, lane, [&](const Work &work, u32 n) {
            Keys dk;
            Values dv;
            UNROLL for (int j = 0; j < HEAD_DIM / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dk[j][e] = 0.0f;
            UNROLL for (int j = 0; j < HEAD_DIM_V / 8; ++j) UNROLL for (int e = 0; e < 4; ++e) dv[j][e] = 0.0f;
            tile = &work.tile;
            head = ~0u;
            barrier_wait(base + FULL_KV, n & 1);
            if (work.state == BUSY) gather_all(dk, dv);
            arrive(FREE_KV);
            const bool add_k = p.add & 1, add_v = p.add & 2;
            const int row = 64 * group + 16 * warp + here() / 4;
            if (work.state == BUSY || !add_k)
                store_gradient<HEAD_DIM>(p.dk, work, row, dk, EXACT ? HEAD_DIM : p.problem.head_dim, p.problem.scale, add_k);
            if (work.state == BUSY || !add_v)
                store_gradient<HEAD_DIM_V>(p.dv, work, row, dv, EXACT ? HEAD_DIM_V : p.problem.head_dim_v, 1.0f, add_v);
        });
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
#if DQ
        if (warp % 4 == 2) add_gradients(p, memory, base, lane);
#endif
    } else {
        registers_more<REGISTERS>();
        Consumer{p.call, memory, base, group, warp % 4, lane, nullptr, score_of(p.call.problem, 0)}.run();
    }
}
