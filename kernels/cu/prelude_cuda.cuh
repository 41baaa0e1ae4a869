// What the kernels need from an NVIDIA GPU (sm_80 and later), and nothing else: types, conversions, tensor-core products,
// shared-memory matrix loads, asynchronous copies, warp shuffles and atomics. The same names over another vendor's
// instructions make the kernels portable. No header is included: conversions are inline PTX.
//
// Fragments of one product C[16x8] += A[16x16] B[16x8]; lane = 4 * group + quad (group 0..7, quad 0..3):
//
//   C  4 x f32   element e: row group + 8 * (e / 2), column 2 * quad + e % 2
//   A  4 x u32   the two 8-column halves of C pairs: two neighbouring C tiles, rounded and packed, are one A
//   B  2 x u32   column group, rows 2 * quad + {0, 1} and 8 more

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define CONSTEXPR __device__ constexpr
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define PARAMS(T) const __grid_constant__ T
#define UNROLL _Pragma("unroll")
// Loops that the compiler may unroll as it likes.
#define ROLLED
#define FEW_AT_ONCE
#define INFINITY_F __int_as_float(0x7f800000)
#define SHARED(T, name) extern __shared__ __align__(128) T name[]

// ---- lanes of a warp ----

[[maybe_unused]] constexpr int WARP = 32;

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x) != 0; }
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// What lanes of a warp wrote to shared memory is there for its other lanes.
DEVICE void warp_barrier() { __syncwarp(); }

// ---- fast mathematics ----

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) { return __fdiv_rn(1.0f, x); }
DEVICE float divide_fast(float x, float y) { return __fdividef(x, y); }
DEVICE float natural_log(float x) { return logf(x); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float round_up(float x) { return ceilf(x); }
DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }

// ---- 16-bit elements ----

#if defined(IO_BF16)
DEVICE u32 pack2(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE float widen(u16 x) { return __uint_as_float(u32(x) << 16); }
#define MMA_TYPES "bf16.bf16"
#else
DEVICE u32 pack2(float low, float high) {
    u32 x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE float widen(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#define MMA_TYPES "f16.f16"
#endif
DEVICE u16 narrow(float x) { return u16(pack2(x, 0.0f)); }

// ---- tensor cores ----

DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with C = 0 before.
DEVICE void mma_first(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bool first) {
    if (first)
        mma_first(c, a, b0, b1);
    else
        mma(c, a, b0, b1);
}

// ---- shared memory ----

[[maybe_unused]] constexpr bool SWIZZLES = true;  // rows of tiles: see common.cuh

typedef uint4 Words4;  // of u32, as one value

DEVICE u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
DEVICE u32 load_shared(u32 at) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
DEVICE void store_shared(u32 at, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
DEVICE void store_shared2(u32 at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}
DEVICE void store_shared4(u32 at, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// 16 bytes from global to shared memory; zeros where `valid` is false (nothing is read then).
DEVICE void copy_async16(u32 to, const void *from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
DEVICE void barrier() { __syncthreads(); }
// Of `threads` threads that name the same one of 15 barriers.
DEVICE void barrier(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// ---- device memory ----

template <typename T> DEVICE T *global(u64 address) { return reinterpret_cast<T *>(address); }
// What no kernel writes, and all threads of a warp read alike.
template <typename T> DEVICE const T *constant(u64 address) { return reinterpret_cast<const T *>(address); }

// ---- atomics ----

DEVICE void add_global(float *at, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory"); }
// Adds to two neighbours (8-byte aligned) where `valid`.
DEVICE void add_global2(float *at, float x, float y, bool valid) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p red.global.add.v2.f32 [%0], {%1,%2}; }" ::"l"(at), "f"(x),
                 "f"(y), "r"(int(valid))
                 : "memory");
#else
    if (!valid) return;
    add_global(at, x);
    add_global(at + 1, y);
#endif
}

// Adds ADD_WIDTH neighbours where `valid`.
#if __CUDA_ARCH__ >= 900
[[maybe_unused]] constexpr int ADD_WIDTH = 4;
DEVICE void add_global_units(float *at, const float *x, bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p red.global.add.v4.f32 [%0], {%1,%2,%3,%4}; }" ::"l"(at), "f"(x[0]),
                 "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(int(valid))
                 : "memory");
}
#else
[[maybe_unused]] constexpr int ADD_WIDTH = 1;
DEVICE void add_global_units(float *at, const float *x, bool valid) {
    if (valid) add_global(at, *x);
}
#endif

// The counter's value before it grew by 1.
DEVICE u32 take_number(u32 *counter) { return atomicAdd(counter, 1u); }

// ---- the compiler ----

// A value that the compiler must not know: what follows from it is computed where it is used, not held in registers.
DEVICE u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

template <typename T> DEVICE T *opaque(T *x) {
    asm volatile("" : "+l"(x));
    return x;
}

// ---- the grid ----

// Read anew at each use, so that no register holds it meanwhile.
DEVICE u32 block_index() {
    u32 x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}
