//! Kernels over a row of logits (whole vectors), and the plain loops that gain from the instruction set.

use super::Simd;
use crate::attention::exp::{exp as exp_of, exp_low, tanh};

/// What is added to scaled products before the softmax.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bias {
    /// `c` of `c * tanh(x / c)`.
    pub softcap: Option<f32>,
    /// Slope, and the distance `qpos - kpos` of the first element and its decrease per element.
    pub alibi: Option<[f32; 3]>,
}

impl Bias {
    /// Whether there is nothing to add.
    pub fn is_none(&self) -> bool {
        self.softcap.is_none() && self.alibi.is_none()
    }
}

/// Constants of a row in the backward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowGrad {
    /// As in the forward.
    pub bias: Bias,
    /// Log-sum of the row.
    pub lse: f32,
    /// `rowsum(dout * out) - dlse`.
    pub delta: f32,
    /// Factor on the gradient.
    pub scale: f32,
}

const IOTA: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// `slope * |distance - step * j|` for the vector from element `j`.
///
/// # Safety
/// The CPU has the instruction set of `S`.
#[inline(always)]
unsafe fn penalty<S: Simd>([slope, distance, step]: [f32; 3], j: usize) -> S::V {
    // SAFETY: the caller's promise; IOTA is as long as the longest vector.
    unsafe {
        let first = S::splat(distance - step * j as f32);
        let apart = S::abs(S::fma(S::splat(-step), S::load(IOTA.as_ptr()), first));
        S::mul(S::splat(slope), apart)
    }
}

/// Softcap, then ALiBi, in place.
///
/// # Safety
/// The CPU has the instruction set of `S`; the length is a multiple of its lanes.
#[inline(always)]
pub(super) unsafe fn bias<S: Simd>(x: &mut [f32], bias: &Bias) {
    // SAFETY: the caller's promise.
    unsafe {
        for j in (0..x.len()).step_by(S::LANES) {
            let at = x.as_mut_ptr().add(j);
            let mut v = S::load(at);
            if let Some(c) = bias.softcap {
                v = S::mul(S::splat(c), tanh::<S>(S::div(v, S::splat(c))));
            }
            if let Some(alibi) = bias.alibi {
                v = S::sub(v, penalty::<S>(alibi, j));
            }
            S::store(at, v);
        }
    }
}

/// Largest element that is not NaN.
///
/// # Safety
/// As [`bias`].
#[inline(always)]
pub(super) unsafe fn max<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        // Two running maxima; the second misses an odd vector at the end.
        let mut best = [S::splat(f32::NEG_INFINITY); 2];
        let mut pairs = x.chunks_exact(2 * S::LANES);
        for pair in &mut pairs {
            best[0] = S::max(S::load(pair.as_ptr()), best[0]);
            best[1] = S::max(S::load(pair.as_ptr().add(S::LANES)), best[1]);
        }
        if !pairs.remainder().is_empty() {
            best[0] = S::max(S::load(pairs.remainder().as_ptr()), best[0]);
        }
        let mut lanes = [f32::NEG_INFINITY; 16];
        S::store(lanes.as_mut_ptr(), S::max(best[0], best[1]));
        fold(&lanes, |a, b| if b > a { b } else { a })
    }
}

/// `exp(x - m)` in place, and its sum.
///
/// # Safety
/// As [`bias`].
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: &mut [f32], m: f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let m = S::splat(m);
        // Two running sums; the second misses an odd vector at the end.
        let mut sums = [S::splat(0.0); 2];
        let mut pairs = x.chunks_exact_mut(2 * S::LANES);
        for pair in &mut pairs {
            sums[0] = S::add(sums[0], exp_at::<S>(pair.as_mut_ptr(), m));
            sums[1] = S::add(sums[1], exp_at::<S>(pair.as_mut_ptr().add(S::LANES), m));
        }
        let rest = pairs.into_remainder();
        if !rest.is_empty() {
            sums[0] = S::add(sums[0], exp_at::<S>(rest.as_mut_ptr(), m));
        }
        let mut lanes = [0.0f32; 16];
        S::store(lanes.as_mut_ptr(), S::add(sums[0], sums[1]));
        fold(&lanes, |a, b| a + b)
    }
}

/// `exp(x - m)` of the vector at `at`, in place.
///
/// # Safety
/// The CPU has the instruction set of `S`; `at` points to a vector.
#[inline(always)]
unsafe fn exp_at<S: Simd>(at: *mut f32, m: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let p = exp_low::<S>(S::sub(S::load(at), m));
        S::store(at, p);
        p
    }
}

/// 16 lanes to one, as a tree.
#[inline(always)]
fn fold(lanes: &[f32; 16], join: impl Fn(f32, f32) -> f32) -> f32 {
    let a: [f32; 8] = std::array::from_fn(|i| join(lanes[i], lanes[i + 8]));
    let b: [f32; 4] = std::array::from_fn(|i| join(a[i], a[i + 4]));
    join(join(b[0], b[2]), join(b[1], b[3]))
}

/// Logits and `dp` to (dropped) probabilities and gradients, in place.
///
/// # Safety
/// As [`bias`]; `dp` is as long as `s`, `keep` too or empty.
#[inline(always)]
pub(super) unsafe fn grad<S: Simd>(row: &RowGrad, s: &mut [f32], dp: &mut [f32], keep: &[f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        let (lse, delta, one) = (S::splat(row.lse), S::splat(row.delta), S::splat(1.0));
        for j in (0..s.len()).step_by(S::LANES) {
            let (s_at, d_at) = (s.as_mut_ptr().add(j), dp.as_mut_ptr().add(j));
            let mut x = S::load(s_at);
            let mut factor = S::splat(row.scale);
            if let Some(c) = row.bias.softcap {
                let t = tanh::<S>(S::div(x, S::splat(c)));
                x = S::mul(S::splat(c), t);
                factor = S::mul(factor, S::sub(one, S::mul(t, t)));
            }
            if let Some(alibi) = row.bias.alibi {
                x = S::sub(x, penalty::<S>(alibi, j));
            }
            let p = exp_of::<S>(S::sub(x, lse));
            let (mut kept, mut d) = (p, S::load(d_at));
            if !keep.is_empty() {
                let keep = S::load(keep.as_ptr().add(j));
                kept = S::mul(p, keep);
                d = S::mul(d, keep);
            }
            S::store(s_at, kept);
            S::store(d_at, S::mul(S::mul(p, S::sub(d, delta)), factor));
        }
    }
}

/// `into += x`.
#[inline(always)]
pub(super) fn add(into: &mut [f32], x: &[f32]) {
    for (a, b) in into.iter_mut().zip(x) {
        *a += b;
    }
}

/// `sum x * y`: 16 running sums, then a tree.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let n = x.len().min(y.len());
    let whole = n / 16 * 16;
    for (a, b) in x[..whole].chunks_exact(16).zip(y[..whole].chunks_exact(16)) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    for i in whole..n {
        lanes[i - whole] += x[i] * y[i];
    }
    fold(&lanes, |a, b| a + b)
}

/// bf16 bits to f32.
#[inline(always)]
pub(super) fn widen(from: &[u16], to: &mut [f32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = f32::from_bits(u32::from(*f) << 16);
    }
}

/// A row-major matrix (`rows` x `cols`, rows `ldf` apart) transposed into `to`, whose rows are `ldt >= rows` long and are filled
/// up with 0.
#[inline(always)]
pub(super) fn transpose(from: &[f32], ldf: usize, [rows, cols]: [usize; 2], to: &mut [f32], ldt: usize) {
    for r in (0..ldt).step_by(8) {
        let many = rows.saturating_sub(r).min(8);
        if many < 8 {
            for (c, t) in to.chunks_exact_mut(ldt).take(cols).enumerate() {
                for i in 0..8 {
                    t[r + i] = if i < many { from[(r + i) * ldf + c] } else { 0.0 };
                }
            }
            continue;
        }
        let line = |i: usize| &from[(r + i) * ldf..][..cols];
        let lines: [&[f32]; 8] = std::array::from_fn(line);
        for (c, t) in to.chunks_exact_mut(ldt).take(cols).enumerate() {
            let t = &mut t[r..r + 8];
            for i in 0..8 {
                t[i] = lines[i][c];
            }
        }
    }
}
