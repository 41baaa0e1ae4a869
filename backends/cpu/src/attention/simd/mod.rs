//! What the algorithms need of a machine: one small vector trait, and a table of kernels made from it.
//!
//! [`Simd`] is implemented once per instruction set (`avx2.rs`, `avx512.rs`, `neon.rs`, `portable.rs`); the kernels in
//! `gemm.rs` and `rows.rs` are generic over it and compiled once per instruction set by [`kernels!`]. [`Kernels::detect`]
//! chooses the table at run time. The methods of [`Kernels`] are safe: they check their slices once per call, which covers
//! hundreds of operations.

mod gemm;
mod rows;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::sync::OnceLock;

pub(crate) use self::rows::{Bias, RowGrad};
use super::philox;

/// Row lengths that the row kernels take are multiples of this: the widest vector, and every panel width.
pub(crate) const VEC: usize = 16;

/// One vector register of f32. Cut by what `gemm.rs` and `rows.rs` call.
///
/// # Safety
/// Every method may only run on a CPU with the implementation's instruction set; `load` and `store` access [`Simd::LANES`]
/// elements.
pub(crate) trait Simd: Copy {
    /// The register.
    type V: Copy;
    /// Elements of a register: 4, 8 or 16.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn abs(a: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `2^n` of `t = n + 127 + 1.5 * 2^23`, for `-126 <= n <= 127`.
    unsafe fn pow2(t: Self::V) -> Self::V;
    /// `if a < b { x } else { y }`; `y` if either is NaN.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
}

/// How [`Tile`] reads `a`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Order {
    /// `A(r, k) = a[r * lda + k]`.
    Rows,
    /// `A(r, k) = a[k * lda + r]`: the transpose of a row-major matrix.
    Cols,
}

/// What [`Tile`] does with the product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Update<'a> {
    /// `C = C + A B`.
    Add,
    /// `C(r, ..) = by[r] * C(r, ..) + A B`.
    Scale(&'a [f32]),
    /// `C = alpha * A B`.
    Store(f32),
}

/// One register tile: C (`mr` x `nr`) from A (`mr` x `k`) and B (`k` x `nr`), all f32.
#[derive(Debug)]
pub(crate) struct Tile<'a> {
    /// Length of the dot products.
    pub k: usize,
    /// A, read as `order` says.
    pub a: &'a [f32],
    /// Distance of rows of `a`.
    pub lda: usize,
    /// How `a` is read.
    pub order: Order,
    /// B, row-major.
    pub b: &'a [f32],
    /// Distance of rows of `b`.
    pub ldb: usize,
    /// C, row-major.
    pub c: &'a mut [f32],
    /// Distance of rows of `c`.
    pub ldc: usize,
    /// What happens to `c`.
    pub update: Update<'a>,
}

/// The kernels of one instruction set.
pub(crate) struct Kernels {
    /// Name for reports: `avx2+fma`, ...
    pub name: &'static str,
    /// Rows of a register tile; divides [`crate::attention::BLOCK`].
    pub mr: usize,
    /// Columns of a register tile; a multiple of [`VEC`].
    pub nr: usize,
    available: fn() -> bool,
    tile: unsafe fn(&gemm::RawTile),
    tile_cols: unsafe fn(&gemm::RawTile),
    bias: unsafe fn(&mut [f32], &Bias),
    max: unsafe fn(&[f32]) -> f32,
    exp: unsafe fn(&mut [f32], f32) -> f32,
    grad: unsafe fn(&RowGrad, &mut [f32], &mut [f32], &[f32]),
    add: unsafe fn(&mut [f32], &[f32]),
    dot: unsafe fn(&[f32], &[f32]) -> f32,
    widen: unsafe fn(&[u16], &mut [f32]),
    transpose: unsafe fn(&[f32], usize, [usize; 2], &mut [f32], usize),
    philox: unsafe fn(&philox::Row, &mut [f32]),
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernels({}, {} x {})", self.name, self.mr, self.nr)
    }
}

impl Kernels {
    /// The best kernels that this CPU runs. `LONGSPAN_CPU_ARCH=avx2` or `=portable` (read once) picks others that it runs.
    pub fn detect() -> &'static Self {
        static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
        CHOSEN.get_or_init(|| {
            let wanted = std::env::var("LONGSPAN_CPU_ARCH").unwrap_or_default();
            let all = Self::all();
            let named = all.iter().find(|k| !wanted.is_empty() && k.name.starts_with(&wanted));
            named.or(all.first()).copied().unwrap_or(&portable::KERNELS)
        })
    }

    /// All kernels that this CPU runs, the best first.
    pub fn all() -> Vec<&'static Self> {
        let compiled: &[&'static Kernels] = &[
            #[cfg(target_arch = "x86_64")]
            &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            &avx2::KERNELS,
            #[cfg(target_arch = "aarch64")]
            &neon::KERNELS,
            &portable::KERNELS,
        ];
        compiled.iter().copied().filter(|k| (k.available)()).collect()
    }

    /// Computes one register tile. `c` has `mr` rows of `nr`; so have `a` and `b` rows and columns to read, whatever part of
    /// the result is used.
    #[inline]
    pub fn tile(&self, t: Tile<'_>) {
        let (mr, nr) = (self.mr, self.nr);
        if t.k == 0 && matches!(t.update, Update::Add) {
            return;
        }
        let (a_end, b_end) = match (t.k, t.order) {
            (0, _) => (0, 0),
            (k, Order::Rows) => ((mr - 1) * t.lda + k, (k - 1) * t.ldb + nr),
            (k, Order::Cols) => ((k - 1) * t.lda + mr, (k - 1) * t.ldb + nr),
        };
        let c = &mut t.c[..(mr - 1) * t.ldc + nr];
        let (alpha, beta) = match t.update {
            Update::Add => (1.0, std::ptr::null()),
            Update::Scale(by) => (1.0, by[..mr].as_ptr()),
            Update::Store(alpha) => (alpha, std::ptr::null()),
        };
        let raw = gemm::RawTile {
            k: t.k,
            a: t.a[..a_end].as_ptr(),
            lda: t.lda,
            b: t.b[..b_end].as_ptr(),
            ldb: t.ldb,
            c: c.as_mut_ptr(),
            ldc: t.ldc,
            alpha,
            beta,
            store: matches!(t.update, Update::Store(_)),
        };
        let kernel = match t.order {
            Order::Rows => self.tile,
            Order::Cols => self.tile_cols,
        };
        // SAFETY: the slices above hold every element that the tile reads and writes; `available` was true.
        unsafe { kernel(&raw) }
    }

    /// Adds `softcap` and ALiBi to a row of logits, in place.
    pub fn bias(&self, x: &mut [f32], bias: &Bias) {
        check(x.len());
        // SAFETY: whole vectors, checked; `available` was true.
        unsafe { (self.bias)(x, bias) }
    }

    /// The largest element, NaN left out; `-inf` if there is none.
    pub fn max(&self, x: &[f32]) -> f32 {
        check(x.len());
        // SAFETY: as in `bias`.
        unsafe { (self.max)(x) }
    }

    /// `x = exp(x - m)` in place; the sum.
    pub fn exp(&self, x: &mut [f32], m: f32) -> f32 {
        check(x.len());
        // SAFETY: as in `bias`.
        unsafe { (self.exp)(x, m) }
    }

    /// Turns logits `s` and `dp = dout v` of a row into (dropped) probabilities and the gradient of the scaled products, in
    /// place. `keep` holds `keep / (1 - p)` per element, or is empty.
    pub fn grad(&self, row: &RowGrad, s: &mut [f32], dp: &mut [f32], keep: &[f32]) {
        check(s.len());
        let n = s.len();
        let keep = if keep.is_empty() { keep } else { &keep[..n] };
        // SAFETY: as in `bias`; `dp` and `keep` are cut to the length of `s`.
        unsafe { (self.grad)(row, s, &mut dp[..n], keep) }
    }

    /// `into += x`.
    pub fn add(&self, into: &mut [f32], x: &[f32]) {
        // SAFETY: `available` was true; the kernel takes any length.
        unsafe { (self.add)(into, x) }
    }

    /// `sum x * y` in a fixed order.
    pub fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        // SAFETY: `available` was true; the kernel takes any length.
        unsafe { (self.dot)(x, y) }
    }

    /// bf16 bits to f32.
    pub fn widen(&self, from: &[u16], to: &mut [f32]) {
        // SAFETY: `available` was true; the kernel takes any length.
        unsafe { (self.widen)(from, to) }
    }

    /// `to[c * ldt + r] = from[r * ldf + c]` for a `[rows, cols]` matrix; rows of `to` are filled up with 0 to `ldt`, a multiple
    /// of 8.
    pub fn transpose(&self, from: &[f32], ldf: usize, size: [usize; 2], to: &mut [f32], ldt: usize) {
        // SAFETY: `available` was true; the kernel indexes its slices.
        unsafe { (self.transpose)(from, ldf, size, to, ldt) }
    }

    /// Dropout factors of a row: see `philox.rs`.
    pub fn philox(&self, row: &philox::Row, to: &mut [f32]) {
        // SAFETY: `available` was true; the kernel takes any length.
        unsafe { (self.philox)(row, to) }
    }

    /// Columns rounded up to whole register tiles.
    pub fn panels(&self, columns: usize) -> usize {
        columns.next_multiple_of(self.nr)
    }
}

/// Row kernels work on whole vectors.
fn check(n: usize) {
    debug_assert_eq!(n % VEC, 0, "a row kernel takes whole vectors");
}

/// Whether any element is infinite or NaN.
pub(crate) fn any_non_finite(x: &[f32]) -> bool {
    x.iter().fold(0u32, |worst, v| worst.max(v.to_bits() & 0x7f80_0000)) == 0x7f80_0000
}

/// The table of one instruction set: each kernel compiled for `$simd` with the attributes given.
macro_rules! kernels {
    ($simd:ty, $name:literal, $available:expr, $mr:literal, $nv:literal, $(#[$attr:meta])*) => {
        pub(super) static KERNELS: super::Kernels = {
            use super::{Bias, RowGrad, Simd, gemm, philox, rows};

            kernels!(@def $(#[$attr])* fn tile(t: &gemm::RawTile) = gemm::tile::<$simd, $mr, $nv, false>);
            kernels!(@def $(#[$attr])* fn tile_cols(t: &gemm::RawTile) = gemm::tile::<$simd, $mr, $nv, true>);
            kernels!(@def $(#[$attr])* fn bias(x: &mut [f32], b: &Bias) = rows::bias::<$simd>);
            kernels!(@def $(#[$attr])* fn max(x: &[f32]) -> f32 = rows::max::<$simd>);
            kernels!(@def $(#[$attr])* fn exp(x: &mut [f32], m: f32) -> f32 = rows::exp::<$simd>);
            kernels!(@def $(#[$attr])* fn grad(r: &RowGrad, s: &mut [f32], dp: &mut [f32], keep: &[f32]) = rows::grad::<$simd>);
            kernels!(@def $(#[$attr])* fn add(into: &mut [f32], x: &[f32]) = rows::add);
            kernels!(@def $(#[$attr])* fn dot(x: &[f32], y: &[f32]) -> f32 = rows::dot);
            kernels!(@def $(#[$attr])* fn widen(from: &[u16], to: &mut [f32]) = rows::widen);
            kernels!(@def $(#[$attr])* fn transpose(from: &[f32], ldf: usize, size: [usize; 2], to: &mut [f32], ldt: usize) = rows::transpose);
            kernels!(@def $(#[$attr])* fn philox(row: &philox::Row, to: &mut [f32]) = philox::factors);
            super::Kernels {
                name: $name,
                mr: $mr,
                nr: $nv * <$simd as Simd>::LANES,
                available: $available,
                tile, tile_cols, bias, max, exp, grad, add, dot, widen, transpose, philox,
            }
        };
    };
    (@def $(#[$attr:meta])* fn $f:ident($($arg:ident: $t:ty),*) $(-> $r:ty)? = $body:expr) => {
        $(#[$attr])*
        unsafe fn $f($($arg: $t),*) $(-> $r)? {
            // SAFETY: the caller checked that the CPU has the instruction set and that the slices fit.
            #[allow(unused_unsafe)]
            unsafe { $body($($arg),*) }
        }
    };
}
pub(crate) use kernels;
