//! The register tile: the one matrix kernel behind all products.
//!
//! ```text
//! for k:                             c: MR x NV registers, b: NV registers, a: broadcast
//!     b[j]    = B(k, j)              NV loads
//!     c[i][j] += A(i, k) * b[j]      MR broadcasts, MR * NV fused multiply-adds
//! C = alpha * c  |  C + c  |  beta[i] * C + c
//! ```
//!
//! MR and NV are chosen per instruction set so that `c`, `b` and one broadcast fill the register file.

use super::Simd;

/// Arguments of a register tile, checked by [`super::Kernels::tile`].
pub(super) struct RawTile {
    pub k: usize,
    pub a: *const f32,
    pub lda: usize,
    pub b: *const f32,
    pub ldb: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub alpha: f32,
    /// One factor per row of C, or null for 1.
    pub beta: *const f32,
    /// Overwrite C.
    pub store: bool,
}

/// One register tile; `COLS` reads A transposed.
///
/// # Safety
/// The CPU has the instruction set of `S`; the pointers of `t` hold the elements that its numbers imply.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const COLS: bool>(t: &RawTile) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut c = [[S::splat(0.0); NV]; MR];
        let mut b = t.b;
        if COLS {
            let mut a = t.a;
            for _ in 0..t.k {
                step::<S, MR, NV>(&mut c, a, 1, b);
                a = a.add(t.lda);
                b = b.add(t.ldb);
            }
        } else {
            for k in 0..t.k {
                step::<S, MR, NV>(&mut c, t.a.add(k), t.lda, b);
                b = b.add(t.ldb);
            }
        }
        write::<S, MR, NV>(&c, t);
    }
}

/// One rank-1 update.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize>(
    c: &mut [[S::V; NV]; MR],
    a: *const f32,
    stride: usize,
    b: *const f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [S::splat(0.0); NV];
        for (j, v) in row.iter_mut().enumerate() {
            *v = S::load(b.add(j * S::LANES));
        }
        for (i, ci) in c.iter_mut().enumerate() {
            let x = S::splat(*a.add(i * stride));
            for (cij, bj) in ci.iter_mut().zip(row) {
                *cij = S::fma(x, bj, *cij);
            }
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn write<S: Simd, const MR: usize, const NV: usize>(c: &[[S::V; NV]; MR], t: &RawTile) {
    // SAFETY: the caller's promise.
    unsafe {
        for (i, ci) in c.iter().enumerate() {
            let scale = S::splat(if t.store {
                t.alpha
            } else if t.beta.is_null() {
                1.0
            } else {
                *t.beta.add(i)
            });
            for (j, v) in ci.iter().enumerate() {
                let at = t.c.add(i * t.ldc + j * S::LANES);
                S::store(at, if t.store { S::mul(scale, *v) } else { S::fma(scale, S::load(at), *v) });
            }
        }
    }
}
