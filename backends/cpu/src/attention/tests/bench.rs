//! Quick figures while tuning; the real ones come from `benches/attention.rs`.

use std::time::Instant;

use super::*;

#[test]
#[ignore = "measures, does not judge"]
fn figures() {
    let threads = rayon::current_num_threads() as f64;
    let kernels = Kernels::detect();
    let peak = (0..6).map(|_| peak(kernels)).fold(0.0, f64::max);
    println!("{kernels:?}: register tile {peak:.1} GFLOP/s per thread, {threads} threads");
    for (dtype, s, d, causal) in [
        (DType::F32, 2048, 128, false),
        (DType::F32, 4096, 128, true),
        (DType::F32, 2048, 64, false),
        (DType::F32, 4096, 64, true),
        (DType::Bf16, 2048, 128, false),
    ] {
        let h = 8;
        let spec = Spec::new(dtype, 1, [s, s], [h, h], d);
        let hi = if causal { 0 } else { Slice::HI_NONE };
        let n = s * h * d;
        let slices = vec![Slice { hi, ..Slice::full(0, 0..s as u32, 0..s as u32) }];
        let x = Inputs {
            q: vec![0.5; n],
            k: vec![0.25; n],
            v: vec![1.0; n],
            dout: vec![1.0; n],
            dlse: vec![0.0; s * h],
            ..inputs(&Spec::new(dtype, 1, [1, 1], [h, h], d), slices, 1)
        };
        let x = Inputs { spec, ..x };
        let plan = plan(&x);
        let mut loaded = load(&x, 0);
        let flops = 4.0 * (h * s * s * d) as f64 * if causal { 0.5 } else { 1.0 };
        let mut best = 0.0f64;
        let (mut out, mut lse) = (loaded.wide(dtype), loaded.thin());
        for _ in 0..5 {
            let call = Forward {
                plan: plan.clone(),
                kernels,
                q: loaded.q.tensor(),
                k: loaded.k.tensor(),
                v: loaded.v.tensor(),
                options: loaded.options(),
                partial: None,
                start: true,
                results: Some([out.tensor(), lse.tensor()]),
            };
            let t = Instant::now();
            call.run();
            best = best.max(flops / t.elapsed().as_secs_f64() / 1e9);
        }
        println!(
            "{dtype} S={s} D={d} causal={causal}: forward {best:.1} GFLOP/s = {:.1} %",
            100.0 * best / peak / threads
        );
    }
}

/// A register tile whose operands stay in the first cache.
fn peak(k: &Kernels) -> f64 {
    use super::super::simd::{Order, Tile, Update};
    let (a, b, mut c) = (vec![1.0; 128 * 16], vec![1.0; 128 * 64], vec![0.0; 64 * 64]);
    let t = Instant::now();
    let n = 20_000;
    for _ in 0..n {
        k.tile(Tile {
            k: 128,
            a: &a,
            lda: 144,
            order: Order::Rows,
            b: &b,
            ldb: k.nr,
            c: &mut c,
            ldc: k.nr,
            update: Update::Store(1.0),
        });
    }
    (2 * n * 128 * k.mr * k.nr) as f64 / t.elapsed().as_secs_f64() / 1e9
}
