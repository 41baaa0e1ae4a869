//! The layout of `kernels/cu/fragments_amd.cuh` against the emulator's own statement of AMD's matrix instructions.
//!
//! A kernel of one wave loads operands by rows and by columns, multiplies, turns a product into an operand and multiplies
//! again; all entries are small integers, so that every sum is exact.

mod launch;

use launch::Kernel;

const KERNEL: &str = r"
DEVICE void write(float *out, const Product &c, int lane) {
    for (int r = 0; r < PRODUCT_VALUES; ++r) out[product_row(lane, r) * 16 + lane % 16] = c[r];
}
// In: A and B, 16 x 16 elements each, row after row; out: five times 16 x 16 f32.
KERNEL(WARP, 1) fragments(PARAMS(Test) p) {
    SHARED(unsigned char, memory);
    const u16 *first = global<const u16>(p.in), *second = first + 256;
    const int lane = threadIdx.x;
    const u32 a = shared_address(memory), b = a + offset<16>(16, 0);
    load_tile<16, 16, WARP>(a, first, 16, 16, 16, lane);
    load_tile<16, 16, WARP>(b, second, 16, 16, 16, lane);
    barrier();
    // Rows of 32 columns from every row's first element on: the last 16 are the next row's.
    const u32 quads = b + offset<16>(16, 0), lane_quads = quads + lane_by_columns<true, 32>(lane);
    TravelByQuads<16, 32, WARP> travel;
    travel.load(first, 16, 16, 32);
    travel.store_quads(quads);
    barrier();
    Operand rows, columns, others, chained, left, right;
    load_columns<true, 32>(left, lane_quads, 0, 0);
    load_columns<true, 32>(right, lane_quads, 0, 16);
    load_operand(rows, a + lane_by_rows<16>(lane));
    load_columns<false, 16>(columns, a + lane_by_columns<false, 16>(lane), 0, 0);
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

fn number(i: usize) -> f32 {
    (i * 7 % 5) as f32 - 2.0
}

fn bits(x: f32, bf16: bool) -> u16 {
    if bf16 { half::bf16::from_f32(x).to_bits() } else { half::f16::from_f32(x).to_bits() }
}

/// Runs the kernel; what it wrote.
fn run(arch: &str, bf16: bool, a: &[f32], b: &[f32]) -> Vec<f32> {
    let input: Vec<u16> = a.iter().chain(b).map(|x| bits(*x, bf16)).collect();
    let words =
        launch::run(&Kernel { arch, bf16, text: KERNEL, name: "fragments", waves: 1, shared: 2560 }, &input, 1296);
    words.into_iter().map(f32::from_bits).collect()
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
