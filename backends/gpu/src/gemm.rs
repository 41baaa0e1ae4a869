//! The device's own ceiling: the vendor's products of matrices, timed. Nothing else of Longspan uses them.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use half::{bf16, f16};
use longspan_dylib::{Library, Returned, table};
use longspan_hal::{DType, Device, Error, Peak, Priority, Result, Strided, ViewMut};

use crate::context::Context;
use crate::device::GpuDevice;
use crate::driver::Handle;
use crate::machine::{Machine, Place};
use crate::memory::Buffer;

table! {
    /// cuBLAS: `libcublas.so`. All functions return 0 or an error code.
    pub(crate) struct Functions {
        /// A handle for the current context.
        fn create["cublasCreate_v2"](handle: *mut Handle) -> c_int;
        /// Frees a handle.
        fn destroy["cublasDestroy_v2"](handle: Handle) -> c_int;
        /// The stream that work is queued on.
        fn set_stream["cublasSetStream_v2"](handle: Handle, stream: Handle) -> c_int;
        /// `c = alpha * op(a) * op(b) + beta * c`, column-major.
        fn product["cublasGemmEx"](
            handle: Handle, transpose_a: c_int, transpose_b: c_int, m: c_int, n: c_int, k: c_int,
            alpha: *const c_void,
            a: u64, a_type: c_int, a_stride: c_int,
            b: u64, b_type: c_int, b_stride: c_int,
            beta: *const c_void,
            c: u64, c_type: c_int, c_stride: c_int,
            compute: c_int, algorithm: c_int,
        ) -> c_int;
    }
}

/// The vendor's library of matrix products.
#[derive(Clone, Copy, Debug)]
pub struct Products {
    /// Where it is looked for.
    pub place: Place,
    /// The library's numbers of bf16, f16 and f32.
    pub dtypes: [i32; 3],
    /// The library's number of f32 accumulation.
    pub compute: i32,
    /// The library's number of the algorithm that it chooses itself.
    pub algorithm: i32,
}

/// Rows and columns of the matrices: of 16-bit elements, of f32.
const SIZES: [usize; 2] = [8192, 4096];

/// Products of one measurement, and measurements, of which the best counts.
const PRODUCTS: u32 = 20;
const MEASUREMENTS: usize = 5;

const LIMIT: Duration = Duration::from_secs(60);

/// Numbers that are drawn. A prime, so that no two rows are alike.
const BLOCK: usize = 100_003;

impl Products {
    /// Loads the library.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub(crate) fn load(&self, machine: &Machine) -> Result<Functions> {
        let Place { what, candidates, beside, how_to_get_it } = self.place;
        let search = longspan_dylib::Search { what, candidates: candidates(), beside, how_to_get_it };
        Functions::load(Library::open(&search)?, machine.facts().flavor)
    }

    /// Measures `device`.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::OutOfMemory`], [`Error::Driver`]; [`Error::Invalid`] for a dtype that is none of
    /// bf16, f16 and f32.
    pub(crate) fn peak(&self, functions: &Functions, device: &GpuDevice, dtype: DType) -> Result<Peak> {
        let at = [DType::Bf16, DType::F16, DType::F32].iter().position(|d| *d == dtype);
        let at = at.ok_or_else(|| Error::invalid("dtype", format!("{dtype} is none of bf16, f16 and f32")))?;
        let size = SIZES[usize::from(dtype == DType::F32)];
        let matrix = Strided::dense(dtype, [1, 1, size, size]);
        let buffers = [device.alloc(matrix.bytes())?, device.alloc(matrix.bytes())?, device.alloc(matrix.bytes())?];
        let stream = device.stream(Priority::Normal)?;
        let numbers = numbers(dtype, size * size);
        for buffer in &buffers {
            device.upload(&stream, &numbers, ViewMut::new(buffer, matrix)?)?;
        }
        let context = device.context();
        let _bound = context.bind()?;
        buffers.iter().try_for_each(|b| b.used_on(&stream))?;
        let blas = Blas::new(functions, context, stream.raw())?;
        let queue = |count| (0..count).try_for_each(|_| self.queue(&blas, &buffers, self.dtypes[at], size));
        queue(PRODUCTS / 2)?;
        let mut best = Duration::MAX;
        for _ in 0..MEASUREMENTS {
            let from = stream.record(true)?;
            queue(PRODUCTS)?;
            let to = stream.record(true)?;
            stream.synchronize("a product of matrices", LIMIT)?;
            best = best.min(from.elapsed(&to)?);
        }
        let flops = 2.0 * (size as f64).powi(3) * f64::from(PRODUCTS);
        Ok(Peak {
            flops_per_second: flops / best.as_secs_f64().max(f64::MIN_POSITIVE),
            how: format!("{dtype} products of {size} x {size} matrices by {}", self.place.what),
        })
    }

    fn queue(&self, blas: &Blas<'_>, [a, b, c]: &[Buffer; 3], dtype: c_int, size: usize) -> Result<()> {
        let (n, one, zero) = (size as c_int, 1.0f32, 0.0f32);
        let (alpha, beta) = ((&raw const one).cast(), (&raw const zero).cast());
        // SAFETY: the three matrices have `size * size` elements of the dtype and live until the work ran; the factors are
        // f32, as the accumulation is, and are read before the call returns.
        blas.check(unsafe {
            blas.functions.product(
                blas.raw,
                1,
                0,
                n,
                n,
                n,
                alpha,
                a.address(),
                dtype,
                n,
                b.address(),
                dtype,
                n,
                beta,
                c.address(),
                dtype,
                n,
                self.compute,
                self.algorithm,
            )
        })
    }
}

/// A handle of the library's, freed with this.
struct Blas<'a> {
    functions: &'a Functions,
    context: &'static Context,
    raw: Handle,
}

impl<'a> Blas<'a> {
    /// A handle that queues on `stream`. The context is bound.
    fn new(functions: &'a Functions, context: &'static Context, stream: Handle) -> Result<Self> {
        let mut this = Self { functions, context, raw: 0 };
        // SAFETY: the handle is written.
        let made = unsafe { functions.create(&mut this.raw) };
        this.check(made)?;
        // SAFETY: handle and stream are alive.
        this.check(unsafe { functions.set_stream(this.raw, stream) })?;
        Ok(this)
    }

    fn check(&self, returned: Returned<c_int>) -> Result<()> {
        if returned.value == 0 {
            return Ok(());
        }
        Err(Error::Driver {
            backend: self.context.machine.facts().name,
            call: returned.call,
            code: i64::from(returned.value),
            message: "the library of matrix products failed; its codes are in its manual".to_owned(),
        })
    }
}

impl Drop for Blas<'_> {
    fn drop(&mut self) {
        if self.raw != 0 {
            // SAFETY: the handle is this one's and is freed once; the context is bound.
            let _ = unsafe { self.functions.destroy(self.raw) };
        }
    }
}

/// Numbers between -1 and 1, the same block over and over: how fast a chip computes depends on what it computes.
fn numbers(dtype: DType, count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    let block: Vec<u8> = (0..count.min(BLOCK))
        .flat_map(|_| match dtype {
            DType::Bf16 => bf16::from_f32(next()).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(next()).to_le_bytes().to_vec(),
            _ => next().to_le_bytes().to_vec(),
        })
        .collect();
    let mut bytes = block.repeat(count.div_ceil(BLOCK).max(1));
    bytes.truncate(count * dtype.size());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_dtypes_size_and_are_not_all_alike() {
        for (dtype, size) in [(DType::Bf16, 2), (DType::F16, 2), (DType::F32, 4)] {
            assert_eq!(numbers(dtype, 3 * BLOCK + 7).len(), (3 * BLOCK + 7) * size);
            let bytes = numbers(dtype, 100);
            assert_eq!(bytes.len(), 100 * size);
            assert!(bytes.chunks(size).any(|x| x != &bytes[..size]));
        }
        let last = numbers(DType::F32, 50);
        assert!(last.chunks(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).abs() <= 1.0));
    }
}
