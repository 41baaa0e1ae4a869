// What kernels see of an AMD GPU, on a CPU: the names of kernels/cu/prelude_hip.cuh, which leaves them to this file where
// LONGSPAN_HOST is defined. The emulator puts it before the source that hipRTC gets, and compiles both for the host.
//
// A block runs on one thread of the host; its threads are fibers that switch where a wave or the block has to meet. Matrix
// products are computed by the last lane that comes, for the whole wave, after AMD's instruction manuals; the layout is stated
// here once more, on purpose: kernels/cu/fragments_amd.cuh is what is tested.
//
// Hostile: shared memory holds NaN bits when a block starts, accesses behind its end stop the kernel, lanes of a wave must
// meet in the same operation, and halves of WMMA operands must repeat each other.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#if defined(__GFX9__)
constexpr int WARP = 64, OPERAND_WORDS = 2, PRODUCT_VALUES = 4;
#else
constexpr int WARP = 32, OPERAND_WORDS = 8, PRODUCT_VALUES = 8;
#endif

namespace host {

constexpr int MOST_THREADS = 1024;
constexpr u64 STACK_BYTES = 128 << 10;

struct Index {
    unsigned x, y;
};

// What a lane brings to a meeting of its wave.
struct Bid {
    const void *what;  // names the operation
    u32 bits, a[8], b[8];
    float *c;
};

struct Wave {
    Bid bids[2][WARP];
    u32 results[2];
    int arrived, alive;
    u64 round;
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    Index index;
    u64 wave_round, block_round;  // the rounds that it waits for
    bool started, done;
};

// One block, on one thread of the host.
struct Block {
    Fiber fibers[MOST_THREADS];
    Wave waves[MOST_THREADS / WARP];
    unsigned char *stacks, *shared;
    u32 shared_bytes;
    int threads, current, alive, arrived;
    u64 round;
    jmp_buf home;
    const char *fault;
    void (*kernel)(const void *);
    const void *params;
    Index block, grid;
};

static thread_local Block *block;

[[noreturn]] inline void fail(const char *text) {
    block->fault = text;
    _longjmp(block->home, 2);
}

inline Fiber &fiber() { return block->fibers[block->current]; }

inline bool can_run(const Fiber &f, int i) {
    return !f.done && f.wave_round <= block->waves[i / WARP].round && f.block_round <= block->round;
}

[[noreturn]] inline void resume(int i) {
    block->current = i;
    Fiber &f = block->fibers[i];
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    setcontext(&f.start);
    __builtin_trap();
}

// To the next lane of the wave that can run, then to the other waves.
[[noreturn]] inline void leave() {
    Block &b = *block;
    const int wave = b.current / WARP * WARP, lanes = b.threads - wave < WARP ? b.threads - wave : WARP;
    for (int i = 1, lane = b.current - wave; i <= lanes; ++i) {
        const int other = wave + (lane + i) % lanes;
        if (can_run(b.fibers[other], other)) resume(other);
    }
    for (int i = 1; i <= b.threads; ++i) {
        const int other = (wave + lanes + i - 1) % b.threads;
        if (can_run(b.fibers[other], other)) resume(other);
    }
    if (b.alive) fail("lanes wait for lanes that do not come: a wave or a block meets in divergent code");
    _longjmp(b.home, 1);
}

inline void pause() {
    if (_setjmp(fiber().at) == 0) leave();
}

// All live lanes of the wave meet; the last one runs `once(wave, bids)`, whose result all get. Bids stay until the next but
// one meeting.
template <typename F> inline u32 meet(const void *what, const Bid &bid, F &&once) {
    const int me = block->current;
    Wave &w = block->waves[me / WARP];
    const u64 round = w.round;
    Bid(&bids)[WARP] = w.bids[round & 1];
    bids[me % WARP] = bid;
    bids[me % WARP].what = what;
    if (++w.arrived == w.alive) {
        const int first = me / WARP * WARP;
        for (int lane = 0; lane < WARP; ++lane)
            if (first + lane < block->threads && !block->fibers[first + lane].done && bids[lane].what != what)
                fail("lanes of a wave meet in different operations");
        w.results[round & 1] = once(w, bids);
        w.arrived = 0;
        ++w.round;
    } else {
        fiber().wave_round = round + 1;
        pause();
    }
    return block->waves[me / WARP].results[round & 1];
}

inline void meet_block() {
    Block &b = *block;
    if (++b.arrived == b.alive) {
        b.arrived = 0;
        ++b.round;
    } else {
        fiber().block_round = b.round + 1;
        pause();
    }
}

inline void main_of_fiber() {
    block->kernel(block->params);
    Fiber &f = fiber();
    f.done = true;
    Wave &w = block->waves[block->current / WARP];
    --w.alive;
    --block->alive;
    if (w.arrived && w.arrived == w.alive) fail("a lane left where its wave meets");
    if (block->arrived && block->arrived == block->alive) {
        block->arrived = 0;
        ++block->round;
    }
    leave();
}

inline unsigned char *shared(u32 at, u32 bytes) {
    if (at % bytes || at + bytes > block->shared_bytes) fail("an access outside of shared memory, or not aligned");
    return block->shared + at;
}

inline const char *run_block(Block &b) {
    __builtin_memset(b.shared, 0xFF, b.shared_bytes);
    b.alive = b.threads;
    b.arrived = 0;
    b.round = 0;
    b.fault = nullptr;
    for (int w = 0; w * WARP < b.threads; ++w) {
        Wave &wave = b.waves[w];
        wave.arrived = 0;
        wave.round = 0;
        wave.alive = b.threads - w * WARP < WARP ? b.threads - w * WARP : WARP;
    }
    for (int i = 0; i < b.threads; ++i) {
        Fiber &f = b.fibers[i];
        f.index = {unsigned(i), 0};
        f.wave_round = f.block_round = 0;
        f.started = f.done = false;
        f.start.uc_stack.ss_sp = b.stacks + i * STACK_BYTES;
        f.start.uc_stack.ss_size = STACK_BYTES;
        f.start.uc_link = nullptr;
        makecontext(&f.start, main_of_fiber, 0);
    }
    if (_setjmp(b.home) == 0) resume(0);
    return b.fault;
}

// Threads of the host keep their block, with its stacks, for the next launch.
inline Block *own_block() {
    static thread_local Block *kept = nullptr;
    if (!kept) {
        const u64 bytes = sizeof(Block) + MOST_THREADS * STACK_BYTES + (64 << 10);
        void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        kept = static_cast<Block *>(memory);
        kept->shared = static_cast<unsigned char *>(memory) + (sizeof(Block) + 127) / 128 * 128;
        kept->stacks = kept->shared + (64 << 10) - 128;
        for (Fiber &f : kept->fibers) getcontext(&f.start);
    }
    return kept;
}

// ---- numbers ----

inline float as_float(u32 bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline u32 as_bits(float x) {
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
inline float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0.0f : x; }

inline float from_half(u16 h) {
    const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float x = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -x : x;
}
inline u16 to_half(float x) {
    const u32 bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and more
    if (magnitude < 0x38800000)  // below the normal ones: multiples of 2^-24, by adding 0.5 to round
        return u16(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
    return u16(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline float from_bf16(u16 b) { return as_float(u32(b) << 16); }
inline u16 to_bf16(float x) {
    const u32 bits = as_bits(x);
    if (x != x) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- matrix instructions, after the manuals of CDNA 3 and RDNA 3 ----

#if defined(IO_BF16)
inline float element(u16 x) { return from_bf16(x); }
#else
inline float element(u16 x) { return from_half(x); }
#endif

// Line i, element k of an operand: which lane has it, at which place.
inline u16 operand(const Bid (&bids)[WARP], bool second, int i, int k) {
#if defined(__GFX9__)
    const int lane = i + 16 * (k / 4), place = k % 4;
#else
    const int lane = i, place = k;
#endif
    const u32 word = second ? bids[lane].b[place / 2] : bids[lane].a[place / 2];
    return u16(word >> 16 * (place % 2));
}

inline u32 matrix_product(const Wave &w, Bid (&bids)[WARP]) {
    if (w.alive != WARP) fail("a matrix instruction of a wave that is not whole");
#if !defined(__GFX9__)
    for (int lane = 0; lane < 16; ++lane)
        if (__builtin_memcmp(bids[lane].a, bids[lane + 16].a, 32) || __builtin_memcmp(bids[lane].b, bids[lane + 16].b, 32))
            fail("the halves of a WMMA operand differ");
#endif
    float a[16][16], b[16][16], sum[16][16];
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) {
            a[i][k] = element(operand(bids, false, i, k));
            b[k][i] = element(operand(bids, true, i, k));
        }
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) sum[i][j] = 0.0f;
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 16; ++j) sum[i][j] += a[i][k] * b[k][j];
    }
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) {
#if defined(__GFX9__)
            const int lane = j + 16 * (i / 4), value = i % 4;
#else
            const int lane = j + 16 * (i % 2), value = i / 2;
#endif
            bids[lane].c[value] += sum[i][j];
        }
    return 0;
}

}  // namespace host

// ---- the names of the prelude ----

#define __shared__ static thread_local
#define DEVICE inline
#define CONSTEXPR constexpr
#define KERNEL(threads, blocks) extern "C" void
#define PARAMS(T) const T &
#define UNROLL
#define ROLLED
#define FEW_AT_ONCE
#define INFINITY_F __builtin_inff()
#define SHARED(T, name) T *const name = reinterpret_cast<T *>(host::block->shared)
#define threadIdx (host::fiber().index)
#define blockIdx (host::block->block)
#define gridDim (host::block->grid)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
typedef uint4 Words4;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

inline int lane_index() { return host::block->current % WARP; }
inline float shuffle_xor(float x, int mask) {
    static const char what = 0;
    host::Bid bid;
    bid.bits = host::as_bits(x);
    const int me = host::block->current;
    const u64 round = host::block->waves[me / WARP].round;
    host::meet(&what, bid, [](host::Wave &, host::Bid(&)[WARP]) { return 0u; });
    return host::as_float(host::block->waves[me / WARP].bids[round & 1][(me % WARP) ^ mask].bits);
}
inline bool any_lane(bool x) {
    static const char what = 0;
    host::Bid bid;
    bid.bits = x;
    return host::meet(&what, bid, [](host::Wave &w, host::Bid(&bids)[WARP]) {
        u32 any = 0;
        for (int lane = 0; lane < w.alive; ++lane) any |= bids[lane].bits;
        return any;
    });
}
inline int uniform(int x) {
    static const char what = 0;
    host::Bid bid;
    bid.bits = u32(x);
    return int(host::meet(&what, bid, [](host::Wave &, host::Bid(&bids)[WARP]) { return bids[0].bits; }));
}
inline void warp_barrier() {
    static const char what = 0;
    host::meet(&what, host::Bid{}, [](host::Wave &, host::Bid(&)[WARP]) { return 0u; });
}
inline void barrier() { host::meet_block(); }

inline float exp2_fast(float x) { return host::flushed(__builtin_exp2f(x)); }
inline float log2_fast(float x) { return __builtin_log2f(x); }
inline float natural_log(float x) { return __builtin_logf(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float divide_fast(float x, float y) { return x / y; }
inline float maximum(float a, float b) { return a != a ? b : b != b ? a : a < b ? b : a; }
inline float round_up(float x) { return __builtin_ceilf(x); }
inline u32 high_product(u32 a, u32 b) { return u32(u64(a) * b >> 32); }

#if defined(IO_BF16)
inline u16 narrow(float x) { return host::to_bf16(x); }
#else
inline u16 narrow(float x) { return host::to_half(x); }
#endif
inline float widen(u16 x) { return host::element(x); }
inline u32 pack2(float low, float high) { return u32(narrow(high)) << 16 | narrow(low); }

inline void multiply(float (&c)[PRODUCT_VALUES], const u32 (&a)[OPERAND_WORDS], const u32 (&b)[OPERAND_WORDS]) {
    static const char what = 0;
    host::Bid bid;
    __builtin_memcpy(bid.a, a, sizeof(a));
    __builtin_memcpy(bid.b, b, sizeof(b));
    bid.c = c;
    host::meet(&what, bid, host::matrix_product);
}

constexpr bool SWIZZLES = false;
inline u32 shared_address(const void *p) { return u32(static_cast<const unsigned char *>(p) - host::block->shared); }
template <typename T> inline T load_shared(u32 at) {
    T x;
    __builtin_memcpy(&x, host::shared(at, sizeof(T)), sizeof(T));
    return x;
}
inline u16 load_shared_16(u32 at) { return load_shared<u16>(at); }
inline void load_shared2(u32 (&x)[2], u32 at) {
    const uint2 words = load_shared<uint2>(at);
    x[0] = words.x, x[1] = words.y;
}
inline void load_shared4(u32 &x, u32 &y, u32 &z, u32 &w, u32 at) {
    const uint4 words = load_shared<uint4>(at);
    x = words.x, y = words.y, z = words.z, w = words.w;
}
inline void store_shared_16(u32 at, u16 x) { __builtin_memcpy(host::shared(at, 2), &x, 2); }
inline void store_shared(u32 at, u32 x) { __builtin_memcpy(host::shared(at, 4), &x, 4); }
inline void store_shared2(u32 at, u32 x, u32 y) {
    const uint2 words{x, y};
    __builtin_memcpy(host::shared(at, 8), &words, 8);
}
inline void store_shared4(u32 at, u32 x, u32 y, u32 z, u32 w) {
    const uint4 words{x, y, z, w};
    __builtin_memcpy(host::shared(at, 16), &words, 16);
}
inline void copy_async16(u32 to, const void *from, bool valid) {
    uint4 x{0, 0, 0, 0};
    if (valid) x = *static_cast<const uint4 *>(from);
    store_shared4(to, x.x, x.y, x.z, x.w);
}

template <typename T> inline T *global(u64 address) { return reinterpret_cast<T *>(address); }
template <typename T> inline const T *constant(u64 address) { return reinterpret_cast<const T *>(address); }
inline void add_global(float *at, float x) {
    u32 *bits = reinterpret_cast<u32 *>(at), before = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &before, host::as_bits(host::as_float(before) + x), true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
}
inline u32 opaque(u32 x) { return x; }
inline u32 loaded_anew(u32 at) { return at; }
inline u32 block_index() { return host::block->block.x; }

// Runs every block of a grid; what went wrong, or null.
extern "C" inline __attribute__((used)) const char *longspan_host_run(void (*kernel)(const void *), const void *params,
                                                                      u32 grid_x, u32 grid_y, u32 threads, u32 shared_bytes) {
    host::Block *b = host::own_block();
    if (!b || threads > host::MOST_THREADS || shared_bytes > (64 << 10) - 256) return "more threads or shared memory than there are";
    host::block = b;
    b->kernel = kernel;
    b->params = params;
    b->threads = int(threads);
    b->shared_bytes = shared_bytes;
    b->grid = {grid_x, grid_y};
    for (u32 y = 0; y < grid_y; ++y)
        for (u32 x = 0; x < grid_x; ++x) {
            b->block = {x, y};
            if (const char *fault = host::run_block(*b)) return fault;
        }
    return nullptr;
}
