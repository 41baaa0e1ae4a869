//! The layout of `kernels/cu/fragments_amd.cuh` against the emulator's own statement of AMD's matrix instructions.
//!
//! A kernel of one wave loads operands by rows and by columns, multiplies, turns a product into an operand and multiplies
//! again; all entries are small integers, so that every sum is exact.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};

use longspan_kernels::{Prelude, Source};
use longspan_rocm_emulator::*;

const KERNEL: &str = r"
struct Test {
    u64 a, b, out;  // 16 x 16 elements each, row after row; out: five times 16 x 16 f32
};
DEVICE void write(float *out, const Product &c, int lane) {
    for (int r = 0; r < PRODUCT_VALUES; ++r) out[product_row(lane, r) * 16 + lane % 16] = c[r];
}
KERNEL(WARP, 1) fragments(PARAMS(Test) p) {
    SHARED(unsigned char, memory);
    const int lane = threadIdx.x;
    const u32 a = shared_address(memory), b = a + offset<16>(16, 0);
    load_tile<16, 16, WARP>(a, global<const u16>(p.a), 16, 16, 16, lane);
    load_tile<16, 16, WARP>(b, global<const u16>(p.b), 16, 16, 16, lane);
    barrier();
    // Rows of 32 columns from every row's first element on: the last 16 are the next row's.
    const u32 quads = b + offset<16>(16, 0), lane_quads = quads + lane_by_quads<32>(lane);
    TravelToQuads<16, 32, WARP> travel;
    travel.load(global<const u16>(p.a), 16, 16, 32);
    travel.store(quads);
    barrier();
    Operand rows, columns, others, chained, left, right;
    load_operand_of_quads<32>(left, lane_quads, 0, 0);
    load_operand_of_quads<32>(right, lane_quads, 0, 16);
    load_operand(rows, a + lane_by_rows<16>(lane));
    load_operand_transposed<16>(columns, a + lane_by_columns<16>(lane));
    load_operand(others, b + lane_by_rows<16>(lane));
    Product c, d, e, f, g;
    clear(c), clear(d), clear(e), clear(f), clear(g);
    multiply(c, rows, others);          // c = A B^T
    multiply(d, columns, others);       // d = A^T B^T
    as_operand(chained, c, lane);
    multiply(e, rows, chained);         // e = A c
    multiply(f, left, others);          // f = A^T B^T
    multiply(g, right, others);         // g = N^T B^T, row i of N is row i + 1 of A and B
    float *out = global<float>(p.out);
    write(out, c, lane);
    write(out + 256, d, lane);
    write(out + 512, e, lane);
    write(out + 768, f, lane);
    write(out + 1024, g, lane);
    out[1280 + lane % 16] = column_sum(c[0]);
}
";

#[repr(C)]
struct Test {
    a: u64,
    b: u64,
    out: u64,
}

fn number(i: usize) -> f32 {
    (i * 7 % 5) as f32 - 2.0
}

fn bits(x: f32, bf16: bool) -> u16 {
    if bf16 { half::bf16::from_f32(x).to_bits() } else { half::f16::from_f32(x).to_bits() }
}

/// Runs the kernel; what it wrote.
fn run(arch: &str, bf16: bool, a: &[f32], b: &[f32]) -> Vec<f32> {
    let dtype = if bf16 { "-DIO_BF16=1" } else { "-DIO_F16=1" };
    let tile = "HEAD_DIM=16 HEAD_DIM_V=16 EXACT=1 ALIGNED=1 SOFTCAP=0 ALIBI=0 DROPOUT=0 TRANSFORM=0 PARTIAL=0 WAVES=1 M_TILES=1 \
                BLOCK_N=16 Q_IN_REGISTERS=0 SHARED_BYTES=2048";
    let options: Vec<CString> = [format!("--offload-arch={arch}"), "-std=c++17".into(), dtype.into()]
        .into_iter()
        .chain(tile.split_whitespace().map(|d| format!("-D{d}")))
        .map(|o| CString::new(o).expect("text"))
        .collect();
    let list: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let source = CString::new(Source::AMD_FORWARD.text(Prelude::Hip) + KERNEL).expect("text");
    let name = CString::new("fragments").expect("text");
    let (mut program, mut module, mut function, mut on, mut host) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let mut bytes = 0;
    unsafe {
        assert_eq!(hiprtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()), 0);
        let status = hiprtcCompileProgram(program, list.len() as i32, list.as_ptr());
        assert_eq!(hiprtcGetProgramLogSize(program, &mut bytes), 0);
        let mut log = vec![0u8; bytes];
        assert_eq!(hiprtcGetProgramLog(program, log.as_mut_ptr().cast()), 0);
        assert_eq!(status, 0, "{}", String::from_utf8_lossy(&log));
        assert_eq!(hiprtcGetCodeSize(program, &mut bytes), 0);
        let mut code = vec![0u8; bytes];
        assert_eq!(hiprtcGetCode(program, code.as_mut_ptr().cast()), 0);
        assert_eq!(hipModuleLoadData(&mut module, code.as_ptr().cast()), 0);
        assert_eq!(hipModuleGetFunction(&mut function, module, name.as_ptr()), 0);
        assert_eq!(hipStreamCreateWithPriority(&mut on, 1, 0), 0);
        assert_eq!(hipHostMalloc(&mut host, 8192, 1), 0);
        // Kernels read and write page-locked memory of the host directly.
        let inputs = host.cast::<u16>();
        for (i, x) in a.iter().chain(b).enumerate() {
            inputs.add(i).write(bits(*x, bf16));
        }
        let at = host as u64;
        let mut params = Test { a: at, b: at + 512, out: at + 1024 };
        let mut parameters = [(&raw mut params).cast::<c_void>()];
        let lanes = if arch == "gfx942" { 64 } else { 32 };
        let launched =
            hipModuleLaunchKernel(function, 1, 1, 1, lanes, 1, 1, 2560, on, parameters.as_mut_ptr(), null_mut());
        assert_eq!((launched, hipStreamSynchronize(on)), (0, 0));
        std::slice::from_raw_parts(host.cast::<u8>().add(1024).cast::<f32>(), 1280 + 16).to_vec()
    }
}

#[test]
fn operands_and_products_lie_where_the_instructions_have_them() {
    let (a, b): (Vec<f32>, Vec<f32>) = ((0..256).map(number).collect(), (0..256).map(|i| number(3 * i + 1)).collect());
    let sum = |f: &dyn Fn(usize) -> f32| (0..16).map(f).sum::<f32>();
    for (arch, bf16) in [("gfx942", true), ("gfx942", false), ("gfx1100", true), ("gfx1100", false)] {
        let out = run(arch, bf16, &a, &b);
        for (i, j) in (0..256).map(|n| (n / 16, n % 16)) {
            let c = |i: usize| sum(&|k| a[16 * i + k] * b[16 * j + k]);
            assert_eq!(out[16 * i + j], c(i), "{arch}: A B^T at {i}, {j}");
            assert_eq!(out[256 + 16 * i + j], sum(&|k| a[16 * k + i] * b[16 * j + k]), "{arch}: A^T B^T at {i}, {j}");
            assert_eq!(out[768 + 16 * i + j], out[256 + 16 * i + j], "{arch}: quads at {i}, {j}");
            let next = |k: usize| if k < 15 { a[16 * (k + 1) + i] } else { b[i] };
            assert_eq!(out[1024 + 16 * i + j], sum(&|k| next(k) * b[16 * j + k]), "{arch}: right quads at {i}, {j}");
            assert_eq!(out[512 + 16 * i + j], sum(&|k| a[16 * i + k] * c(k)), "{arch}: A (A B^T) at {i}, {j}");
        }
        // The first values of the lanes of a column: rows 0, 4, 8, 12, or rows 0 and 1.
        let rows = if arch == "gfx942" { vec![0, 4, 8, 12] } else { vec![0, 1] };
        for j in 0..16 {
            assert_eq!(out[1280 + j], rows.iter().map(|i| out[16 * i + j]).sum::<f32>(), "{arch}: column {j}");
        }
    }
}
