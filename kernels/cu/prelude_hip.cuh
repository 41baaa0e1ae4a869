// What the kernels need from an AMD GPU (CDNA 2 and 3: waves of 64 lanes, MFMA; RDNA 3: waves of 32, WMMA), and nothing else.
// The names of prelude_cuda.cuh, over AMD's instructions. No header is included: hipRTC brings HIP's own before this text;
// for a bare compiler the few names of it that kernels use are declared here.
//
// The emulator of conformance/emulators/rocm compiles the kernels for a CPU and brings these names itself.

#if !defined(LONGSPAN_HOST)

#if !defined(__HIPCC_RTC__)
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
__device__ __forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__device__ __forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
__device__ __forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
// Every grid has one axis of threads, and two of blocks.
struct ThreadIndex {
    __declspec(property(get = get_x)) unsigned x;
    __device__ __forceinline__ unsigned get_x() const { return __builtin_amdgcn_workitem_id_x(); }
};
struct BlockIndex {
    __declspec(property(get = get_x)) unsigned x;
    __declspec(property(get = get_y)) unsigned y;
    __device__ __forceinline__ unsigned get_x() const { return __builtin_amdgcn_workgroup_id_x(); }
    __device__ __forceinline__ unsigned get_y() const { return __builtin_amdgcn_workgroup_id_y(); }
};
struct GridSize {
    __declspec(property(get = get_x)) unsigned x;
    // Of the packet that launched the kernel: threads in all, threads of a block.
    __device__ __forceinline__ unsigned get_x() const {
        return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
    }
};
[[maybe_unused]] static __device__ const ThreadIndex threadIdx{};
[[maybe_unused]] static __device__ const BlockIndex blockIdx{};
[[maybe_unused]] static __device__ const GridSize gridDim{};
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#if defined(__GFX9__)
[[maybe_unused]] constexpr int WARP = 64;
#else
[[maybe_unused]] constexpr int WARP = 32;
#endif

#define DEVICE __device__ __forceinline__
#define CONSTEXPR constexpr
// `blocks` of a multiprocessor, whose four SIMDs share the waves.
#define KERNEL(threads, blocks)                                                             \
    extern "C" __global__ void __attribute__((amdgpu_flat_work_group_size(threads, threads), \
                                              amdgpu_waves_per_eu(((threads) * (blocks) + 4 * WARP - 1) / (4 * WARP))))
#define PARAMS(T) const T
#define UNROLL _Pragma("unroll")
// A loop that is not unrolled: its loads would all be started at once, and spill.
#define ROLLED _Pragma("clang loop unroll(disable)")
// A loop of loads of which a few are under way at once.
#define FEW_AT_ONCE _Pragma("clang loop unroll_count(8)")
#define INFINITY_F __builtin_inff()
#define SHARED(T, name) extern __shared__ __attribute__((aligned(128))) T name[]

// ---- lanes of a wave ----

DEVICE int lane_index() {
#if defined(__GFX9__)
    return int(__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)));
#else
    return int(__builtin_amdgcn_mbcnt_lo(~0u, 0));
#endif
}
DEVICE float shuffle_xor(float x, int mask) {
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute((lane_index() ^ mask) * 4, __builtin_bit_cast(int, x)));
}
DEVICE bool any_lane(bool x) {
#if defined(__GFX9__) && !__has_builtin(__builtin_amdgcn_ballot_w64)  // compilers before ROCm 6
    return __builtin_amdgcn_uicmp(x, 0, 33) != 0;
#elif defined(__GFX9__)
    return __builtin_amdgcn_ballot_w64(x) != 0;
#else
    return __builtin_amdgcn_ballot_w32(x) != 0;
#endif
}
DEVICE int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }
// What lanes of a wave wrote to shared memory is there for its other lanes.
DEVICE void warp_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// ---- mathematics ----

#if __has_builtin(__builtin_amdgcn_exp2f)
DEVICE float exp2_fast(float x) { return __builtin_amdgcn_exp2f(x); }
DEVICE float log2_fast(float x) { return __builtin_amdgcn_logf(x); }
#else  // compilers before ROCm 6
DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
DEVICE float log2_fast(float x) { return __builtin_log2f(x); }
#endif
DEVICE float natural_log(float x) { return __builtin_logf(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float divide_fast(float x, float y) { return x * __builtin_amdgcn_rcpf(y); }
DEVICE float maximum(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE float round_up(float x) { return __builtin_ceilf(x); }
DEVICE u32 high_product(u32 a, u32 b) { return u32(u64(a) * b >> 32); }

// ---- 16-bit elements ----

#if defined(IO_BF16)
// To nearest, ties to even; NaN stays NaN.
DEVICE u32 rounded_bits(float x) {
    const u32 bits = __builtin_bit_cast(u32, x), up = bits + 0x7fff + (bits >> 16 & 1);
    return x != x ? bits | 0x400000 : up;
}
DEVICE u32 pack2(float low, float high) { return __builtin_amdgcn_perm(rounded_bits(high), rounded_bits(low), 0x07060302); }
DEVICE float widen(u16 x) { return __builtin_bit_cast(float, u32(x) << 16); }
#else
DEVICE u32 pack2(float low, float high) {
    const u16 x = __builtin_bit_cast(u16, _Float16(low)), y = __builtin_bit_cast(u16, _Float16(high));
    return u32(y) << 16 | x;
}
DEVICE float widen(u16 x) { return float(__builtin_bit_cast(_Float16, x)); }
#endif
DEVICE u16 narrow(float x) { return u16(pack2(x, 0.0f)); }

// ---- matrix products: C[16x16] += A[16x16] B[16x16], fragments as fragments_amd.cuh says ----

#if defined(__GFX9__)
constexpr int OPERAND_WORDS = 2, PRODUCT_VALUES = 4;
#else
constexpr int OPERAND_WORDS = 8, PRODUCT_VALUES = 8;
#endif
typedef float Floats __attribute__((ext_vector_type(PRODUCT_VALUES)));
#if defined(IO_BF16)
typedef short Sixteens __attribute__((ext_vector_type(2 * OPERAND_WORDS)));
#else
typedef _Float16 Sixteens __attribute__((ext_vector_type(2 * OPERAND_WORDS)));
#endif

#if !defined(IO_F32)
DEVICE void multiply(float (&c)[PRODUCT_VALUES], const u32 (&a)[OPERAND_WORDS], const u32 (&b)[OPERAND_WORDS]) {
    Floats sum;
    Sixteens x, y;
    __builtin_memcpy(&sum, c, sizeof(sum));
    __builtin_memcpy(&x, a, sizeof(x));
    __builtin_memcpy(&y, b, sizeof(y));
#if defined(__GFX9__) && defined(IO_BF16)
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, sum, 0, 0, 0);
#elif defined(__GFX9__)
    sum = __builtin_amdgcn_mfma_f32_16x16x16f16(x, y, sum, 0, 0, 0);
#elif defined(IO_BF16)
    sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, sum);
#else
    sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, sum);
#endif
#if !defined(__GFX9__)
    // Done before the next operands are loaded: the compiler would load all of a loop's at once, and spill them.
    asm volatile("" : "+v"(sum) : : "memory");
#endif
    __builtin_memcpy(c, &sum, sizeof(sum));
}
#endif

// ---- shared memory ----

[[maybe_unused]] constexpr bool SWIZZLES = false;  // rows of tiles: see common.cuh

#define LDS __attribute__((address_space(3)))
typedef u32 Words2 __attribute__((ext_vector_type(2)));
typedef u32 Words4 __attribute__((ext_vector_type(4)));

DEVICE u32 shared_address(const void *p) { return u32(u64((LDS const char *)p)); }
DEVICE u16 load_shared_16(u32 at) { return *reinterpret_cast<LDS const u16 *>(at); }
DEVICE void load_shared2(u32 (&x)[2], u32 at) {
    const Words2 words = *reinterpret_cast<LDS const Words2 *>(at);
    x[0] = words.x, x[1] = words.y;
}
DEVICE void load_shared4(u32 &x, u32 &y, u32 &z, u32 &w, u32 at) {
    const Words4 words = *reinterpret_cast<LDS const Words4 *>(at);
    x = words.x, y = words.y, z = words.z, w = words.w;
}
DEVICE void store_shared_16(u32 at, u16 x) { *reinterpret_cast<LDS u16 *>(at) = x; }
DEVICE void store_shared(u32 at, u32 x) { *reinterpret_cast<LDS u32 *>(at) = x; }
DEVICE void store_shared2(u32 at, u32 x, u32 y) { *reinterpret_cast<LDS Words2 *>(at) = Words2{x, y}; }
DEVICE void store_shared4(u32 at, u32 x, u32 y, u32 z, u32 w) {
    *reinterpret_cast<LDS Words4 *>(at) = Words4{x, y, z, w};
}

// There is no copy past the registers: it is there when the call returns.
DEVICE void copy_async16(u32 to, const void *from, bool valid) {
    uint4 x{0, 0, 0, 0};
    if (valid) x = *static_cast<const uint4 *>(from);
    store_shared4(to, x.x, x.y, x.z, x.w);
}
// Orders shared memory only: a fence would also wait for the loads that travel to registers meanwhile.
DEVICE void barrier() { asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" : : : "memory"); }

// ---- device memory ----

template <typename T> DEVICE T *global(u64 address) {
    return (T *)reinterpret_cast<__attribute__((address_space(1))) T *>(address);
}
// What no kernel writes, and all lanes read alike: scalar loads.
template <typename T> DEVICE const T *constant(u64 address) {
    return (const T *)reinterpret_cast<__attribute__((address_space(4))) const T *>(address);
}


// ---- atomics ----

// Memory of the device itself, where the instruction is safe.
DEVICE void add_global(float *at, float x) {
    __builtin_amdgcn_global_atomic_fadd_f32((__attribute__((address_space(1))) float *)at, x);
}

// ---- the compiler ----

DEVICE u32 opaque(u32 x) { return x; }
// Where a wave's registers are few: an address that the compiler must not know, so that what was loaded there before is
// loaded again.
DEVICE u32 loaded_anew(u32 at) {
#if !defined(__GFX9__)
    asm volatile("" : "+v"(at));
#endif
    return at;
}

// ---- the grid ----

DEVICE u32 block_index() { return __builtin_amdgcn_workgroup_id_x(); }

#endif
