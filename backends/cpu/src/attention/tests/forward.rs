//! The forward against the oracle.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn meets_the_error_rule((x, layout) in problem()) {
        let (want, plain) = exact(&x);
        for kernels in Kernels::all() {
            let (out, lse) = load(&x, layout).forward(kernels, &[plan(&x)]);
            meets_the_rule("out", &x, &out, &want.out, &plain.out)?;
            meets_the_rule("lse", &x, &lse, &want.lse, &plain.lse)?;
        }
    }

    #[test]
    fn stages_in_any_split_agree_with_one_call((x, layout) in problem(), parts in 2usize..5, seed: u32) {
        let kernels = Kernels::detect();
        let (out, lse) = load(&x, layout).forward(kernels, &[plan(&x)]);
        let steps: Vec<Arc<Plan>> = (0..parts).map(|p| {
            let some = x.slices.iter().enumerate().filter(|(i, _)| (seed as usize >> (2 * i)) % parts == p);
            plan(&Inputs { slices: some.map(|(_, s)| s.clone()).collect(), ..x.clone() })
        }).collect();
        let (out2, lse2) = load(&x, layout).forward(kernels, &steps);
        for (a, b) in lse.iter().zip(&lse2) {
            prop_assert!(a == b || (a - b).abs() <= 2e-6 * (1.0 + a.abs()), "{a} {b}");
        }
        let step = match x.spec.dtype { DType::F32 => 4e-6, DType::F16 => 1e-3, _ => 8e-3 };
        for (a, b) in out.iter().zip(&out2) {
            prop_assert!((a - b).abs() <= step * (1.0 + a.abs()), "{a} {b}");
        }
    }
}
