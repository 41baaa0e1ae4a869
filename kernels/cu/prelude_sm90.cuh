// What the kernels need from a Hopper GPU (sm_90a) besides prelude_cuda.cuh: memory barriers, bulk tensor copies, warpgroup
// products, register budgets. (PTX ISA 8.x; the layouts below are those of its sections on wgmma and tensor copies.)
//
// Tiles in shared memory are panels of 64 columns of 16-bit elements: [panel][row][64], a row 128 bytes, whose eight 16-byte
// units are permuted by the row (bits 4-6 of an address ^= bits 7-9), as the copies with 128-byte swizzle write them. A tile
// begins at a multiple of 1024 bytes. The same tile serves as an operand along its rows and along its columns:
//
//   along the columns (k = columns)   next 16 of k: 32 bytes on, at 64 columns the next panel;  8 rows: 1024 bytes
//   along the rows (k = rows)         next 16 of k: 2048 bytes on;  64 columns: the next panel, `panel` bytes on
//
// Accumulators of one warpgroup product C[64][N]: warp w of the group has rows 16 w.. as C tiles of mma (prelude_cuda.cuh):
// c[j][e] is row 16 w + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2; and neighbouring pairs c[2 i], c[2 i + 1],
// rounded and packed, are the A operand of the i-th 16 of k.

// ---- memory barriers ----

DEVICE void barrier_init(u32 at, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
// Makes initialised barriers, and shared memory that this thread wrote, visible to copies and warpgroup products.
DEVICE void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void barrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
DEVICE void barrier_expect(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is complete. A new barrier is in phase 0: waiting for parity 1 passes at once.
DEVICE void barrier_wait(u32 at, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(at),
        "r"(parity)
        : "memory");
}

// ---- a barrier among some warps: ids 1..15 ----

DEVICE void group_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Is one of them without waiting.
DEVICE void group_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- bulk copies ----

struct alignas(64) TensorMap {
    u64 words[16];
};
static_assert(sizeof(TensorMap) == 128, "layout");

// A map takes a cache miss, which its first copy would wait for.
DEVICE void prefetch_map(const TensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

struct At {
    int column, row, head, batch;
};
// One box of the tensor to shared memory; the barrier counts its bytes. One thread calls it. Zeros outside of the tensor.
DEVICE void copy_box(u32 to, const TensorMap *map, At at, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(barrier)
                 : "memory");
}
// One box of the tensor from shared memory, as far as it lies in the tensor. One thread calls it, then copies_commit.
DEVICE void store_box(const TensorMap *map, At at, u32 from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map), "r"(at.column),
                 "r"(at.row), "r"(at.head), "r"(at.batch), "r"(from)
                 : "memory");
}
// Adds one box of f32 from shared memory to the tensor. One thread calls it, then copies_commit.
DEVICE void add_box(const TensorMap *map, At at, u32 from) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                 "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(from)
                 : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups still read shared memory.
template <int PENDING> DEVICE void copies_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING> DEVICE void copies_done() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrices(u32 at, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}
DEVICE void store_shared2_if(bool there, u32 at, float x, float y) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.shared.v2.f32 [%0], {%1, %2}; }" ::"r"(at), "f"(x), "f"(y),
                 "r"(int(there))
                 : "memory");
}
DEVICE float2 load_shared2(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
DEVICE float4 load_shared4(u32 at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at) : "memory");
    return x;
}

// ---- global memory ----

// Four pairs, 8 elements apart, of which this lane holds elements 2 * quad and 2 * quad + 1, times `factor`: with wide
// stores a lane of a quad trades with its neighbour, so that the quad writes 32 bytes at once. `to` is the row's first of 32
// elements, `left` are inside the row.
DEVICE void store_pairs(u16 *to, const float (&c)[4][4], int half, float factor, int quad, int left) {
#if ALIGNED
    const bool odd = quad & 1;
    UNROLL for (int j = 0; j < 4; j += 2) {
        const u32 x = pack2(c[j][2 * half] * factor, c[j][2 * half + 1] * factor);
        const u32 y = pack2(c[j + 1][2 * half] * factor, c[j + 1][2 * half + 1] * factor);
        const u32 got = shuffle_xor(odd ? x : y, 1);
        const int at = 8 * (j + odd) + 2 * (quad & 2);
        if (at < left) *reinterpret_cast<uint2 *>(to + at) = odd ? make_uint2(got, y) : make_uint2(x, got);
    }
#else
    UNROLL for (int j = 0; j < 4; ++j)
        store_pair(to + 8 * j + 2 * quad, c[j][2 * half] * factor, c[j][2 * half + 1] * factor, left - 8 * j - 2 * quad);
#endif
}

// ---- registers of a warpgroup ----

template <int COUNT> DEVICE void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// ---- warpgroup products ----

DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING committed groups are under way; accumulators of the others may be read.
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// The same, not before `after`, which is never negative, is there. The compiler waits as early as it can, so that what is to run
// under the products would come after them.
template <int PENDING> DEVICE void products_wait(float after) {
    if (after < 0.0f) __trap();
    products_wait<PENDING>();
}
// The compiler must not move reads and writes of these registers across this point.
template <int N> DEVICE void pin(float (&c)[N][4]) {
    UNROLL for (int j = 0; j < N; ++j) UNROLL for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
}
template <int N> DEVICE void pin(u32 (&a)[N][4]) {
    UNROLL for (int j = 0; j < N; ++j) UNROLL for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[j][e])::"memory");
}

// An operand in shared memory. `along columns`: k runs along the columns of the tile. `along rows`: along its rows. Its low
// word is hidden from the compiler, which would otherwise hold all steps of a long product in registers over the loop.
struct Operand {
    u32 low, high;
    DEVICE Operand on(u32 bytes) const { return {low + (bytes >> 4), high}; }
    DEVICE u64 word() const { return u64(high) << 32 | low; }
};
DEVICE Operand along_columns(u32 at) { return {opaque(at >> 4 & 0x3fff), 1024 >> 4 | 1u << 30}; }
// Rows of 16 columns without swizzle: [8 of them][row][8 columns], the second `half` bytes on.
DEVICE Operand along_narrow(u32 at, u32 half) { return {opaque(at >> 4 & 0x3fff | half >> 4 << 16), 128 >> 4}; }
DEVICE Operand along_rows(u32 at, u32 panel) { return {opaque(at >> 4 & 0x3fff | panel >> 4 << 16), 1024 >> 4 | 1u << 30}; }

// product<TA, TB>(c, a, b, add): C = A B (+ C) for 16 of k. A: 4 registers or an operand; TA, TB: 1 for `along rows`.
#define OUT4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define OUT8(j) OUT4(j), OUT4(j + 1)
#define NAMES0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define NAMES9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define NAMES13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define NAMES15 "%120,%121,%122,%123,%124,%125,%126,%127"

#define PRODUCT(N, NAMES, I0, I1, I2, I3, I4, I5, I6, ...)                                                             \
    template <int TA, int TB> DEVICE void product(float (&c)[N / 8][4], Operand a, Operand b, bool add) {              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " I2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                     "k16.f32." MMA_TYPES " {" NAMES "}, " I0 ", " I1 ", p, 1, 1, " I3 ", " I4 "; }"                   \
                     : __VA_ARGS__                                                                                     \
                     : "l"(a.word()), "l"(b.word()), "r"(int(add)), "n"(TA), "n"(TB));                                 \
    }                                                                                                                  \
    template <int TB> DEVICE void product(float (&c)[N / 8][4], const u32 (&a)[4], Operand b, bool add) {              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " I5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                     "k16.f32." MMA_TYPES " {" NAMES "}, {" I0 ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, " I6 "; }" \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.word()), "r"(int(add)), "n"(TB));             \
    }
PRODUCT(16, NAMES0, "%8", "%9", "%10", "%11", "%12", "%13", "%14", OUT8(0))
PRODUCT(32, NAMES0 "," NAMES1, "%16", "%17", "%18", "%19", "%20", "%21", "%22", OUT8(0), OUT8(2))
PRODUCT(48, NAMES0 "," NAMES1 "," NAMES2, "%24", "%25", "%26", "%27", "%28", "%29", "%30", OUT8(0), OUT8(2), OUT8(4))
PRODUCT(64, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3, "%32", "%33", "%34", "%35", "%36", "%37", "%38", OUT8(0), OUT8(2), OUT8(4), OUT8(6))
PRODUCT(80, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4, "%40", "%41", "%42", "%43", "%44", "%45", "%46", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8))
PRODUCT(96, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5, "%48", "%49", "%50", "%51", "%52", "%53", "%54", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10))
PRODUCT(112, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6, "%56", "%57", "%58", "%59", "%60", "%61", "%62", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12))
PRODUCT(128, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7, "%64", "%65", "%66", "%67", "%68", "%69", "%70", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14))
PRODUCT(144, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8, "%72", "%73", "%74", "%75", "%76", "%77", "%78", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16))
PRODUCT(160, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9, "%80", "%81", "%82", "%83", "%84", "%85", "%86", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18))
PRODUCT(176, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10, "%88", "%89", "%90", "%91", "%92", "%93", "%94", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20))
PRODUCT(192, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10 "," NAMES11, "%96", "%97", "%98", "%99", "%100", "%101", "%102", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20), OUT8(22))
PRODUCT(208, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10 "," NAMES11 "," NAMES12, "%104", "%105", "%106", "%107", "%108", "%109", "%110", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20), OUT8(22), OUT8(24))
PRODUCT(224, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10 "," NAMES11 "," NAMES12 "," NAMES13, "%112", "%113", "%114", "%115", "%116", "%117", "%118", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20), OUT8(22), OUT8(24), OUT8(26))
PRODUCT(240, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10 "," NAMES11 "," NAMES12 "," NAMES13 "," NAMES14, "%120", "%121", "%122", "%123", "%124", "%125", "%126", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20), OUT8(22), OUT8(24), OUT8(26), OUT8(28))
PRODUCT(256, NAMES0 "," NAMES1 "," NAMES2 "," NAMES3 "," NAMES4 "," NAMES5 "," NAMES6 "," NAMES7 "," NAMES8 "," NAMES9 "," NAMES10 "," NAMES11 "," NAMES12 "," NAMES13 "," NAMES14 "," NAMES15, "%128", "%129", "%130", "%131", "%132", "%133", "%134", OUT8(0), OUT8(2), OUT8(4), OUT8(6), OUT8(8), OUT8(10), OUT8(12), OUT8(14), OUT8(16), OUT8(18), OUT8(20), OUT8(22), OUT8(24), OUT8(26), OUT8(28), OUT8(30))
