//! The backward against the oracle.

use super::*;

/// What the backward gets: the oracle's lse and delta, as f32.
fn rows(want: &Results) -> [Vec<f64>; 2] {
    [&want.lse, &want.delta].map(|x| x.iter().map(|x| f64::from(*x as f32)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// With lse and delta of our own forward, as every caller has them.
    #[test]
    fn meets_the_error_rule((x, layout) in problem()) {
        let (want, plain) = exact(&x);
        for kernels in Kernels::all() {
            let mut loaded = load(&x, layout);
            let (out, lse) = loaded.forward(kernels, &[plan(&x)]);
            let (delta, _) = loaded.prepare(kernels, &out, &lse);
            let [dq, dk, dv] = loaded.backward(kernels, &plan(&x), [&lse, &delta], x.spec.dtype, None);
            meets_the_rule("dq", &x, &dq, &want.dq, &plain.dq)?;
            meets_the_rule("dk", &x, &dk, &want.dk, &plain.dk)?;
            meets_the_rule("dv", &x, &dv, &want.dv, &plain.dv)?;
        }
    }

    #[test]
    fn prepare_is_its_formula((x, layout) in problem()) {
        let (want, _) = exact(&x);
        let (s, dv) = (&x.spec, x.spec.head_dim_v);
        let out: Vec<f64> = want.out.iter().map(|y| oracle::round(s.dtype, *y)).collect();
        let [lse, _] = rows(&want);
        let (mut sums, mut sizes) = (vec![0.0; s.heads], vec![0.0; s.heads]);
        for kernels in Kernels::all() {
            let (delta, dsinks) = load(&x, layout).prepare(kernels, &out, &lse);
            for (i, got) in delta.iter().enumerate() {
                let terms = || out[i * dv..][..dv].iter().zip(&x.dout[i * dv..]).map(|(o, g)| o * g);
                let (want, size) = (terms().sum::<f64>() - x.dlse[i], terms().map(f64::abs).sum::<f64>() + x.dlse[i].abs());
                prop_assert!((got - want).abs() <= 1e-6 * size, "delta {got}, wanted {want}");
                if s.sinks {
                    let weight = (f64::from(x.sinks[s.head_first + i % s.heads]) - lse[i]).exp();
                    sums[i % s.heads] -= weight * want;
                    sizes[i % s.heads] += weight * size;
                }
            }
            for (h, got) in dsinks.iter().enumerate() {
                prop_assert!((got - sums[h]).abs() <= 4e-6 * sizes[h], "dsink {got}, wanted {}", sums[h]);
            }
            (sums, sizes) = (vec![0.0; s.heads], vec![0.0; s.heads]);
        }
    }

    #[test]
    fn adding_adds_and_f32_gradients_round_to_the_narrow_ones((x, layout) in problem()) {
        let kernels = Kernels::detect();
        let (want, _) = exact(&x);
        let [lse, delta] = rows(&want);
        let written = load(&x, layout).backward(kernels, &plan(&x), [&lse, &delta], DType::F32, None);
        let narrow = load(&x, layout).backward(kernels, &plan(&x), [&lse, &delta], x.spec.dtype, None);
        let added = load(&x, layout).backward(kernels, &plan(&x), [&lse, &delta], DType::F32, Some(0.75));
        for ((w, n), a) in written.iter().zip(&narrow).zip(&added) {
            for ((w, n), a) in w.iter().zip(n).zip(a) {
                prop_assert_eq!(oracle::round(x.spec.dtype, *w), *n);
                prop_assert!((a - w - 0.75).abs() <= 3e-6 * (1.0 + w.abs()), "{} + 0.75 = {}", w, a);
            }
        }
    }
}
