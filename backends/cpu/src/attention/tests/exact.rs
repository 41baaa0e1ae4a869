//! Bitwise statements: what is not selected does not matter, nor does the number of threads, nor the cut.

use super::*;

/// Everything a call computes, from fresh memory.
fn everything(x: &Inputs, layout: usize) -> [Vec<u32>; 7] {
    let kernels = Kernels::detect();
    let mut loaded = load(x, layout);
    let (out, lse) = loaded.forward(kernels, &[plan(x)]);
    let (delta, dsinks) = loaded.prepare(kernels, &out, &lse);
    let [dq, dk, dv] = loaded.backward(kernels, &plan(x), [&lse, &delta], x.spec.dtype, None);
    [out, lse, delta, dsinks, dq, dk, dv].map(|v| v.iter().map(|y| (*y as f32).to_bits()).collect())
}

/// Whether any local query head selects key row `key` of `batch`; and whether query row `row` sees anything.
fn selected(x: &Inputs, batch: usize) -> (Vec<bool>, Vec<bool>) {
    let (mut keys, mut rows) = (vec![false; x.spec.k_rows], vec![false; x.spec.q_rows]);
    for s in x.slices.iter().filter(|s| s.batch as usize == batch) {
        for q in s.q.clone() {
            for k in s.keys_of(q) {
                keys[k as usize] = true;
                rows[q as usize] = true;
            }
        }
    }
    (keys, rows)
}

/// The same problem with NaN in every row of q, k, v and dout that no pair selects.
fn poisoned(x: &Inputs, dout_too: bool) -> Inputs {
    let (mut y, s) = (x.clone(), x.spec.clone());
    for b in 0..s.batch {
        let (keys, rows) = selected(x, b);
        for (j, _) in keys.iter().enumerate().filter(|(_, seen)| !**seen) {
            let at = (b * s.k_rows + j) * s.kv_heads;
            y.k[at * s.head_dim..(at + s.kv_heads) * s.head_dim].fill(f64::NAN);
            y.v[at * s.head_dim_v..(at + s.kv_heads) * s.head_dim_v].fill(f64::NAN);
        }
        for (i, _) in rows.iter().enumerate().filter(|(_, seen)| !**seen) {
            let at = (b * s.q_rows + i) * s.heads;
            y.q[at * s.head_dim..(at + s.heads) * s.head_dim].fill(f64::NAN);
            if dout_too {
                y.dout[at * s.head_dim_v..(at + s.heads) * s.head_dim_v].fill(f64::NAN);
            }
        }
    }
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn nan_outside_the_slices_does_not_matter((x, layout) in problem()) {
        let (want, got) = (everything(&x, layout), everything(&poisoned(&x, false), layout));
        for (what, (want, got)) in ["out", "lse", "delta", "dsinks", "dq", "dk", "dv"].iter().zip(want.iter().zip(&got)) {
            prop_assert!(near(x.spec.dtype, want, got), "{what}");
        }
    }

    #[test]
    fn a_row_that_saw_nothing_contributes_nothing((x, layout) in problem()) {
        prop_assume!(!x.spec.sinks);
        let kernels = Kernels::detect();
        let (out, lse) = load(&x, layout).forward(kernels, &[plan(&x)]);
        let (delta, _) = load(&x, layout).prepare(kernels, &out, &lse);
        let want = load(&x, layout).backward(kernels, &plan(&x), [&lse, &delta], DType::F32, None);
        let got = load(&poisoned(&x, true), layout).backward(kernels, &plan(&x), [&lse, &delta], DType::F32, None);
        for (want, got) in want.iter().zip(&got) {
            let bits = |v: &[f64]| v.iter().map(|y| (*y as f32).to_bits()).collect::<Vec<_>>();
            prop_assert!(near(DType::F32, &bits(want), &bits(got)));
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits((x, layout) in problem()) {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| everything(&x, layout))
        };
        let one = run(1);
        prop_assert_eq!(&one, &run(2));
        prop_assert_eq!(&one, &run(7));
    }

    #[test]
    fn any_cut_into_tasks_gives_the_same_bits(
        lo in -900i64..0, width in 0i64..1500, group in 1usize..4, threads in 1usize..5, skip in 0u32..200, seed: u32
    ) {
        let spec = Spec::new(DType::F32, 1, [700, 1100], [3, 1], 16).with_head_cut(0, 3, 3usize.next_multiple_of(group), group);
        let band = Slice { lo, hi: lo + width, ..Slice::full(0, 100..700, skip..1100) };
        let x = inputs(&spec, vec![band], u64::from(seed));
        let run = |threads| load(&x, 0).forward(Kernels::detect(), &[plan_for(&x, threads)]);
        let few = run(threads);
        for (a, b) in [(&few.0, &run(64).0), (&few.1, &run(64).1)] {
            prop_assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn dropout_does_not_depend_on_the_cut(first in 0usize..4, cut in 1usize..99, seed: u32) {
        // Values that tell keys apart, equal logits: out shows which pairs were kept.
        let spec = Spec::new(DType::F32, 1, [20, 100], [4, 4], 100).with_dropout(Some(0.4));
        let mut x = inputs(&spec, vec![Slice::full(0, 0..20, 0..100)], u64::from(seed));
        x.q.fill(0.0);
        x.v = (0..100 * 4 * 100).map(|i| if i / 400 == i % 100 { 1.0 } else { 0.0 }).collect();
        let (whole, _) = load(&x, 0).forward(Kernels::detect(), &[plan(&x)]);
        // One head, and two key ranges with positions from k_pos.
        let mut part = x.clone();
        part.spec = Spec::new(DType::F32, 1, [20, 100], [1, 1], 100).with_dropout(Some(0.4)).with_head_cut(first, 1, 4, 1);
        part.slices = vec![Slice::full(0, 0..20, 0..cut as u32), Slice::full(0, 0..20, cut as u32..100)];
        let pick = |v: &[f64]| v.chunks(100).skip(first).step_by(4).flatten().copied().collect::<Vec<_>>();
        (part.q, part.k, part.v) = (pick(&x.q), pick(&x.k), pick(&x.v));
        part.dout = pick(&x.dout);
        part.dlse.truncate(20);
        let (got, _) = load(&part, 1).forward(Kernels::detect(), &[plan(&part)]);
        for (i, (want, got)) in whole.chunks(100).skip(first).step_by(4).flatten().zip(&got).enumerate() {
            prop_assert_eq!(*want == 0.0, *got == 0.0, "pair {}", i);
            prop_assert!((want - got).abs() < 1e-6);
        }
    }
}

/// Equal, but for sums whose order changes where a product takes the careful way, rounded to the dtype.
fn near(dtype: DType, want: &[u32], got: &[u32]) -> bool {
    let step = match dtype {
        DType::F32 => 5e-6,
        DType::F16 => 1e-3,
        _ => 8e-3,
    };
    want.iter().zip(got).all(|(a, b)| {
        let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
        a == b || (a - b).abs() <= step * (0.5 + a.abs())
    })
}

/// A value that is not finite reaches the rows that select it, and no other.
#[test]
fn non_finite_selected_inputs_reach_their_rows_only() {
    for (bad, kernels) in
        [f64::NAN, f64::INFINITY].into_iter().flat_map(|b| Kernels::all().into_iter().map(move |k| (b, k)))
    {
        let spec = Spec::new(DType::F32, 1, [200, 200], [1, 1], 32);
        let mut x = inputs(&spec, vec![Slice { hi: 0, ..Slice::full(0, 0..200, 0..200) }], 3);
        x.v[77 * 32 + 5] = bad;
        x.dout[120 * 32] = bad;
        let mut loaded = load(&x, 0);
        let (out, lse) = loaded.forward(kernels, &[plan(&x)]);
        for (i, row) in out.chunks(32).enumerate() {
            for (c, y) in row.iter().enumerate() {
                assert_eq!(y.is_finite(), i < 77 || c != 5, "out row {i} column {c} is {y} with {bad}");
            }
        }
        assert!(lse.iter().all(|y| y.is_finite()));
        let delta = vec![0.5; 200];
        let [dq, dk, dv] = loaded.backward(kernels, &plan(&x), [&lse, &delta], DType::F32, None);
        // Rows from 77 on see the bad value through dp; row 120 has a bad dout.
        assert!(dq[..77 * 32].iter().all(|y| y.is_finite()));
        assert!(dq[77 * 32..78 * 32].iter().any(|y| !y.is_finite()));
        assert!(dv[121 * 32..].iter().all(|y| y.is_finite()), "{}", kernels.name);
        assert!((0..=120).all(|j| !dv[j * 32].is_finite()));
        assert!((0..=120).all(|j| dv[j * 32 + 1].is_finite()));
        assert!(dk[121 * 32..].iter().all(|y| y.is_finite()) && !dk[120 * 32].is_finite());
    }
}

/// A logit of +inf gives NaN, as `exp(inf - inf)` does; one of -inf weighs nothing.
#[test]
fn infinite_logits() {
    let spec = Spec::new(DType::F32, 1, [1, 300], [1, 1], 1).with_scale(1.0);
    let mut x = inputs(&spec, vec![Slice::full(0, 0..1, 0..300)], 3);
    x.q.fill(1.0);
    x.k.fill(0.0);
    x.v.fill(2.0);
    x.k[..250].fill(f64::NEG_INFINITY);
    let (out, lse) = load(&x, 0).forward(Kernels::detect(), &[plan(&x)]);
    assert_eq!(out, [2.0]);
    assert!((lse[0] - 50.0f64.ln()).abs() < 1e-6);
    x.k[280] = f64::INFINITY;
    let (out, lse) = load(&x, 0).forward(Kernels::detect(), &[plan(&x)]);
    assert!(out[0].is_nan() && lse[0].is_nan());
}
