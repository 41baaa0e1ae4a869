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
//         S^T = K Q^T of block n + 1, dQ = dS K of block n - 1 (each group a half of it) and dK += dS^T Q are started
//         P^T = exp2(S^T - lse) of block n + 1, 0 outside the band, under those
//         dQ of block n - 1 goes to shared memory for the adder
//     write or add dK and dV
//
// So a group never waits for what the other one does at the same time, but for its turn. Where registers don't allow it
// (AHEAD 0), S^T is started with dP^T of its block, and dQ of the block when both groups have written dS^T.
//
// Rows of Q, dout, K, V past a piece or tile may hold anything: the copier zeroes them. (Shah et al., FlashAttention-3, 2024.)
//
// With DQ_QUADS the sums of dQ lack the scale, and the quads of every 32 columns lie in the order 0 2 4 6 1 3 5 7, in which a
// warp's words of dQ are in different banks: sm90_attention_backward_round.cu mends both.
//
// Macros: those of sm90_backward.cuh (BLOCK_M: 64, or 128 for small heads; BLOCK_N: 128), AHEAD, DQ_QUADS, REGISTERS,
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
    Parts parts;

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

    // ALiBi's bias, in units of the dot product. From the first distance on in f32: off by a relative 2^-23.
    DEVICE void add_bias(Pairs &s, const Block &block) {
        const Piece &piece = block.piece;
        const i64 first = piece.q_pos + i64(query(block)) * piece.q_step - (piece.k_pos + i64(key()) * piece.k_step);
        const float from[2] = {float(first), float(first - 8 * i64(piece.k_step))}, step = float(piece.q_step);
        UNROLL for (int j = 0; j < BLOCK_M / 8; ++j)
            UNROLL for (int e = 0; e < 4; ++e)
                s[j][e] = fmaf(block.bias, fabsf(fmaf(float(8 * j + e % 2), step, from[e / 2])), s[j][e]);
    }

    // S^T becomes P^T as it weighs dP^T: with SOFTCAP times its derivative; a pair that dropout drops has a minus.
    DEVICE void probabilities(Pairs &s, Packed &weights, const Block &block, u32 stats) {
#if SOFTCAP
        Pairs bent;
#endif
#if BIASED
        add_bias(s, block);
#elif TRANSFORM
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

    DEVICE float unit() { return BIASED ? p.problem.scale * LOG2E : score.unit; }
    // Of columns 8 first.. to 8 past.
    DEVICE void exponentials(Pairs &s, u32 stats, int first, int past) {
        UNROLL for (int j = first; j < past; ++j) {
            const float2 lse = FOLD ? float2{} : load_shared2(stats + 32 * j);
            UNROLL for (int e = 0; e < 4; ++e) s[j][e] = exp2_fast(s[j][e] * unit() - (e % 2 ? lse.y : lse.x));
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
            const float2 delta = FOLD ? float2{} : load_shared2(stats + STATISTIC + 32 * j);
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
    // This group's part of dQ = dS K: half of the head's columns, or of 128 queries.
    static constexpr bool BY_QUERIES = BLOCK_M == 128;
    static constexpr int DQ_COLUMNS = BY_QUERIES ? HEAD_DIM : HEAD_DIM / 2;
    typedef float DQuery[DQ_COLUMNS / 8][4];

    DEVICE void start_dq(DQuery &dq, u32 turn) {
        const u32 column = BY_QUERIES ? 0 : group * DQ_COLUMNS;
        const Operand a = along_rows(ds_of(turn) + (BY_QUERIES ? group * KEY_PANEL : 0), KEY_PANEL);
        const Operand b = along_rows(base + column / 64 * KEY_PANEL + column % 64 * 2, KEY_PANEL);
        products_fence();
        UNROLL for (int kk = 0; kk < BLOCK_N / 16; ++kk)
            product<1, 1>(dq, a.on(kk * 2048), b.on(kk * 2048), kk > 0);
        products_commit();
    }

    // Half of the rows. (Predicated, since the compiler serialises the products where a branch reads accumulators.)
    DEVICE void store_dq(const DQuery &dq, int half, bool there) {
        const int lane = here(), quad = lane % 4, row = (BY_QUERIES ? 64 * group : 0) + 16 * warp + lane / 4 + 8 * half;
        const u32 to = base + DQ_AT + (BY_QUERIES ? 0 : group * DQ_COLUMNS / 32 * DQ_BOX) + row * 128 + quad % 2 * 8;
        const float scale = DQ_QUADS ? 1.0f : p.problem.scale;
        UNROLL for (int j = 0; j < DQ_COLUMNS / 8; ++j) {
            const u32 unit = u32(DQ_QUADS ? quad / 2 * 4 + j % 4 : j % 4 * 2 + quad / 2) ^ u32(lane / 4);
            store_shared2_if(there, to + j / 4 * DQ_BOX + unit * 16, dq[j][2 * half] * scale, dq[j][2 * half + 1] * scale);
        }
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
    DEVICE u32 statistics_at(u32 turn) { return base + STATS_AT + turn % STAGES * 2 * STATISTIC; }
    DEVICE u32 statistics(u32 turn) { return statistics_at(turn) + here() % 4 * 8; }
    DEVICE void wait_statistics(u32 turn) { barrier_wait(base + FULL_S + 8 * (turn % STAGES), turn / STAGES & 1); }
    DEVICE void wait_queries(u32 turn) {
        barrier_wait(base + FULL_Q + 8 * (turn % Q_STAGES), turn / Q_STAGES & 1);
        if (FOLD) wait_statistics(turn);
    }
    DEVICE void start_scores(Pairs &s, u32 turn) {
        start_pairs<HEAD_DIM>(s, base + group * 8192, queries(turn), parts, statistics_at(turn));
    }
    DEVICE void weigh_block(Pairs &s, Packed &weights, u32 turn) {
        if (!FOLD) wait_statistics(turn);
        if (!BIASED) use_head(block(turn).head);
        probabilities(s, weights, block(turn), statistics(turn));
    }

    // The groups take turns in starting S, dQ and dK, so that exponentials of one run under products of the other. Left to
    // themselves they fall into step or out of it by chance.
    DEVICE void take_turn() { group_sync(2 + group, 256); }
    DEVICE void give_turn(int to) { group_arrive(2 + to, 256); }

    // dQ is stored between exponentials: both take their time, in different units.
    static constexpr bool MIXED = AHEAD && DQ;

    // All blocks of a tile.
    DEVICE void gather_all(Keys &dk, Values &dv) {
        Pairs s, dp;
        Packed weights, ds;
        load_parts(parts);
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
            start_pairs<HEAD_DIM_V>(dp, base + V_AT + group * 8192, gradients, parts, statistics_at(turn) + STATISTIC);
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
                take_turn();
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
#endif
            if (!AHEAD) {
                fence_proxy();
                start_values(dv, weights, s, gradients);
#if DQ
                group_sync(1, 128 * GROUPS);
                start_dq(dq, turn);
#endif
            }
            pin(dk);
            pin(ds);
            start_gather<HEAD_DIM>(dk, ds, queries(turn));
            if (AHEAD) give_turn(group ^ 1);
            if (AHEAD && DQ) {
                fence_proxy();
                arrive(FULL_DS + 8 * (turn % 2));
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
                        if (!FOLD) wait_statistics(turn + 1);
                        const Block &next = block(turn + 1);
                        if (BIASED) add_bias(s, next);
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
            UNROLL for (int half = 0; half < 2; ++half) {
                if (MIXED) exponentials(s, statistics(turn + 1), (2 + half) * BLOCK_M / 32, (3 + half) * BLOCK_M / 32);
                store_dq(dq, half, there);
            }
            if (there) stored(of);
#endif
            first = false;
            products_wait<0>();
            pin(dk);
            pin(ds);
            if (FOLD) pin(parts);
            arrive(FREE_Q + 8 * (turn % Q_STAGES));
        }
#if DQ
        if (AHEAD) {
            DQuery dq;
            barrier_wait(base + FULL_DS + 8 * ((turn - 1) % 2), (turn - 1) / 2 & 1);
            start_dq(dq, turn - 1);
            products_wait<0>();
            pin(dq);
            arrive(FREE_KV);
            wait_store(turn - 1);
            UNROLL for (int half = 0; half < 2; ++half) store_dq(dq, half, true);
            stored(turn - 1);
        }
#endif
        if (!(AHEAD && DQ)) arrive(FREE_KV);
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
            if (work.state != BUSY) arrive(FREE_KV);  // not `else`: the compiler would take the loop for divergent
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
        Consumer consumer{p.call, memory, base, group, warp % 4, lane, nullptr, score_of(p.call.problem, 0)};
        if (AHEAD && group == 1) consumer.give_turn(0);
        consumer.run();
        if (AHEAD && group == 0) consumer.take_turn();
    }
}
