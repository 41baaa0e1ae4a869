//! exp and tanh of a vector register.
//!
//! ```text
//! exp(x) = 2^n e^r,   n = round(x / ln 2),   r = x - n ln 2 in [-0.347, 0.347]      (ln 2 in two parts: Cody and Waite)
//! e^r    = 1 + r + r^2 q(r),   q of degree 4, fitted on Chebyshev nodes: 0.18 units of 2^-24 relative error
//! tanh y = y + y^3 g(y^2)              |y| < 0.625, g of degree 4: 0.29 units of 2^-24
//!        = sign(y) (1 - 2 / (e^(2|y|) + 1))    elsewhere
//! ```
//!
//! Measured over every f32 step of the tests: exp at most 1.5 ulp with a fused multiply-add (2 ulp without), tanh at most
//! 3 ulp. Results below 2^-125 are 0 (so `exp(-inf) = 0`), above the largest f32 inf; NaN stays NaN.

use super::simd::Simd;

/// 1.5 * 2^23 + 127: adding it rounds to an integer, which is then in the low bits, with the bias of an exponent.
const ROUND: f32 = 12_583_039.0;
/// Below it, exp is less than 2^-125.
const LOW: f32 = -86.643_4;
/// Above it, exp is more than the largest f32.
const HIGH: f32 = 88.722_84;
/// ln 2 in two parts; the first has 10 bits, so that its product with an exponent is exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
const Q: [f32; 5] = [0.001_392_619_8, 0.008_363_19, 0.041_666_556, 0.166_665_77, 0.5];
const G: [f32; 5] = [-0.006_096_714, 0.020_997_18, -0.053_850_908, 0.133_327_7, -0.333_333_3];

/// `exp(x)`.
///
/// # Safety
/// The CPU has the instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let t = S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND));
        let n = S::sub(t, S::splat(ROUND));
        let r = S::fma(n, S::splat(-LN2[0]), x);
        let r = S::fma(n, S::splat(-LN2[1]), r);
        let q = polynomial::<S>(r, &Q);
        let e = S::fma(S::mul(r, r), q, r);
        // 2^128 has no f32: the power of two is taken one too small, and doubled at the end.
        let half = S::pow2(S::sub(t, S::splat(1.0)));
        let half = S::fma(half, e, half);
        let y = S::add(half, half);
        let y = S::select_lt(x, S::splat(LOW), S::splat(0.0), y);
        S::select_lt(S::splat(HIGH), x, S::splat(f32::INFINITY), y)
    }
}

/// `exp(x)` for `x` that is not positive, up to rounding (at most 80): without the test for overflow.
///
/// # Safety
/// As [`exp`].
#[inline(always)]
pub(super) unsafe fn exp_low<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let t = S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND));
        let n = S::sub(t, S::splat(ROUND));
        let r = S::fma(n, S::splat(-LN2[0]), x);
        let r = S::fma(n, S::splat(-LN2[1]), r);
        let q = polynomial::<S>(r, &Q);
        let e = S::fma(S::mul(r, r), q, r);
        let scale = S::pow2(t);
        S::select_lt(x, S::splat(LOW), S::splat(0.0), S::fma(scale, e, scale))
    }
}

/// `tanh(y)`.
///
/// # Safety
/// As [`exp`].
#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(y: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let (zero, one) = (S::splat(0.0), S::splat(1.0));
        let (size, square) = (S::abs(y), S::mul(y, y));
        let near = S::fma(S::mul(square, y), polynomial::<S>(square, &G), y);
        let e = exp::<S>(S::add(size, size));
        let far = S::sub(one, S::div(S::splat(2.0), S::add(e, one)));
        let far = S::select_lt(y, zero, S::sub(zero, far), far);
        S::select_lt(size, S::splat(0.625), near, far)
    }
}

/// Horner's rule, highest coefficient first.
///
/// # Safety
/// As [`exp`].
#[inline(always)]
unsafe fn polynomial<S: Simd>(x: S::V, c: &[f32; 5]) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { c[1..].iter().fold(S::splat(c[0]), |y, &c| S::fma(y, x, S::splat(c))) }
}

#[cfg(test)]
mod tests {
    use crate::attention::simd::{Bias, Kernels};

    fn ulps(got: f32, want: f64) -> f64 {
        let near = want as f32;
        if got == near {
            return (f64::from(got) - want).abs() / f64::from(spacing(near));
        }
        (f64::from(got) - want).abs() / f64::from(spacing(near))
    }

    fn spacing(x: f32) -> f32 {
        let x = x.abs().max(f32::MIN_POSITIVE);
        f32::from_bits(x.to_bits() + 1) - x
    }

    #[test]
    fn exp_is_within_two_ulp_over_the_whole_range() {
        for k in Kernels::all() {
            let mut worst = 0.0f64;
            let mut at = -87.5f32;
            while at < 0.5 {
                let xs: Vec<f32> = (0..16).map(|i| at + i as f32 * 1.37e-4).collect();
                let mut ys = xs.clone();
                k.exp(&mut ys, 0.0);
                for (x, y) in xs.iter().zip(&ys) {
                    if *x > -86.64 {
                        worst = worst.max(ulps(*y, f64::from(*x).exp()));
                    } else {
                        assert!(*y == 0.0 || ulps(*y, f64::from(*x).exp()) <= 2.0, "exp({x}) = {y}");
                    }
                }
                at += 16.0 * 1.37e-4;
            }
            assert!(worst <= 2.0, "{}: {worst} ulp", k.name);
        }
    }

    #[test]
    fn exp_of_the_ends() {
        for k in Kernels::all() {
            let inf = f32::INFINITY;
            let mut x = [0.0; 16];
            x[..5].copy_from_slice(&[-inf, -1e30, -200.0, 0.0, f32::NAN]);
            k.exp(&mut x, 0.0);
            assert_eq!(x[..4], [0.0, 0.0, 0.0, 1.0], "{}", k.name);
            assert!(x[4].is_nan());
            let mut x = [inf; 16];
            k.exp(&mut x, inf);
            assert!(x.iter().all(|x| x.is_nan()), "{}: inf - inf", k.name);
        }
    }

    #[test]
    fn tanh_is_within_four_ulp() {
        for k in Kernels::all() {
            let mut worst = 0.0f64;
            for step in 0..40_000 {
                let xs: Vec<f32> = (0..16).map(|i| (step * 16 + i) as f32 * 3.1e-5 - 9.9).collect();
                let mut ys = xs.clone();
                k.bias(&mut ys, &Bias { softcap: Some(1.0), alibi: None });
                for (x, y) in xs.iter().zip(&ys) {
                    worst = worst.max(ulps(*y, f64::from(*x).tanh()));
                }
            }
            assert!(worst <= 4.0, "{}: {worst} ulp", k.name);
            let mut x = [0.0; 16];
            x[..4].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::NAN]);
            k.bias(&mut x, &Bias { softcap: Some(3.0), alibi: None });
            assert_eq!(x[..3], [3.0, -3.0, 0.0], "{}", k.name);
            assert!(x[3].is_nan());
        }
    }
}
