//! Strided tensors in memory, their rows as f32, and the scratch that rows are packed into.
//!
//! Packed matrices are row-major f32 with rows an odd number of cache lines apart ([`padded`]), so that a column of them spreads
//! over all sets of a cache. Operands of `Q K^T` are transposed into panels: for each `nr` keys, `[head_dim, nr]`.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use longspan_hal::{DType, Strided};

use super::simd::{Kernels, VEC};

/// A tensor in memory, `[batch, seq, heads, dim]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor {
    base: *mut u8,
    at: Strided,
}

// SAFETY: a tensor is an address; whoever made it promised (see `Tensor::new`) that its uses from several threads do not conflict.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// The tensor `at` in the buffer that starts at `base`.
    ///
    /// # Safety
    /// While the value or a copy is used, the elements of `at` lie in live, aligned memory behind `base`. Nobody else writes
    /// elements that are loaded, or touches elements that are stored; uses by several threads are for different rows, or
    /// ordered.
    pub unsafe fn new(base: *mut u8, at: Strided) -> Self {
        Self { base, at }
    }

    /// Sizes of the axes.
    pub fn extent(&self) -> [usize; 4] {
        self.at.extent()
    }

    /// Address of the first element of row `[batch, seq, head]`.
    fn row<T>(&self, [b, s, h]: [usize; 3]) -> *mut T {
        let [nb, ns, nh, nd] = self.at.extent();
        assert!(b < nb && s < ns && h < nh && nd > 0, "row {:?} of {:?}", [b, s, h], self.at.extent());
        // SAFETY: the row is inside the extent, whose elements are in memory as `new` was promised.
        unsafe { self.base.cast::<T>().add(self.at.offset_of([b, s, h, 0])) }
    }

    /// The row `[batch, seq, head]` as f32.
    pub fn load(&self, kernels: &Kernels, row: [usize; 3], to: &mut [f32]) {
        let to = &mut to[..self.at.extent()[3]];
        // SAFETY: `row` points to `extent[3]` elements of the dtype, valid as `new` was promised.
        unsafe {
            match self.at.dtype() {
                DType::F32 => to.copy_from_slice(std::slice::from_raw_parts(self.row(row), to.len())),
                DType::F16 => {
                    std::slice::from_raw_parts(self.row::<f16>(row).cast_const(), to.len()).convert_to_f32_slice(to);
                }
                _ => kernels.widen(std::slice::from_raw_parts(self.row(row), to.len()), to),
            }
        }
    }

    /// Stores a row, rounded to nearest even.
    pub fn store(&self, row: [usize; 3], from: &[f32]) {
        let from = &from[..self.at.extent()[3]];
        // SAFETY: as in `load`; the elements are ours alone.
        unsafe {
            match self.at.dtype() {
                DType::F32 => std::slice::from_raw_parts_mut(self.row(row), from.len()).copy_from_slice(from),
                DType::F16 => {
                    std::slice::from_raw_parts_mut(self.row::<f16>(row), from.len()).convert_from_f32_slice(from);
                }
                _ => {
                    let to = std::slice::from_raw_parts_mut(self.row::<bf16>(row), from.len());
                    for (t, f) in to.iter_mut().zip(from) {
                        *t = bf16::from_f32(*f);
                    }
                }
            }
        }
    }

    /// Adds to a row in f32.
    pub fn add(&self, kernels: &Kernels, row: [usize; 3], from: &[f32]) {
        debug_assert_eq!(self.at.dtype(), DType::F32);
        let from = &from[..self.at.extent()[3]];
        // SAFETY: as in `store`.
        kernels.add(unsafe { std::slice::from_raw_parts_mut(self.row(row), from.len()) }, from);
    }

    /// The first element of a row of an f32 tensor.
    pub fn get(&self, row: [usize; 3]) -> f32 {
        debug_assert_eq!(self.at.dtype(), DType::F32);
        // SAFETY: as in `load`.
        unsafe { *self.row::<f32>(row) }
    }

    /// Stores the first element of a row of an f32 tensor.
    pub fn set(&self, row: [usize; 3], x: f32) {
        debug_assert_eq!(self.at.dtype(), DType::F32);
        // SAFETY: as in `store`.
        unsafe { *self.row::<f32>(row) = x }
    }

    /// Rows `[batch, from + i, head]` as the first rows of a matrix with rows `ld` apart.
    pub fn pack(&self, kernels: &Kernels, [b, from, h]: [usize; 3], rows: usize, to: &mut [f32], ld: usize) {
        for (i, line) in to.chunks_mut(ld).take(rows).enumerate() {
            self.load(kernels, [b, from + i, h], line);
        }
    }
}

/// Distance of rows of a packed matrix with `columns` columns: whole register tiles, and an odd number of cache lines.
pub(super) fn padded(kernels: &Kernels, columns: usize) -> usize {
    ((kernels.panels(columns) / VEC) | 1) * VEC
}

/// `rows` x `cols` of a row-major matrix into panels of `nr` rows, each transposed: `[panel][cols][nr]`, filled up with 0.
pub(super) fn panels(kernels: &Kernels, from: &[f32], ld: usize, [rows, cols]: [usize; 2], to: &mut [f32]) {
    let nr = kernels.nr;
    for (p, panel) in to.chunks_exact_mut(cols * nr).take(rows.div_ceil(nr)).enumerate() {
        let many = (rows - p * nr).min(nr);
        kernels.transpose(&from[p * nr * ld..], ld, [many, cols], panel, nr);
    }
}

/// Scratch of one thread, kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    /// Disjoint parts of these lengths, each starting on a cache line; the content is undefined but initialised.
    pub fn parts<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let lengths = lengths.map(|n| n.next_multiple_of(VEC));
        let total = lengths.iter().sum::<usize>() + VEC;
        if self.0.len() < total {
            self.0.resize(total, 0.0);
        }
        let skip = self.0.as_ptr().align_offset(64).min(VEC);
        let mut rest = &mut self.0[skip..];
        lengths.map(|n| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(n);
            rest = tail;
            part
        })
    }
}

/// Runs tasks `0..count` on the threads of the pool: each starts in order, once. Gives each the scratch of its thread.
///
/// A task may wait for tasks with lower numbers: they have been started, and nothing makes a thread leave a task.
pub(super) fn each(count: usize, task: impl Fn(usize, &mut Scratch) + Sync) {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    let next = AtomicUsize::new(0);
    let work = || {
        // Taken, so that a task can't meet a borrow.
        let mut scratch = SCRATCH.with(RefCell::take);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                break;
            }
            task(i, &mut scratch);
        }
        SCRATCH.with(|s| s.replace(scratch));
    };
    let threads = rayon::current_num_threads().min(count);
    if threads <= 1 {
        return work();
    }
    rayon::scope(|s| {
        for _ in 0..threads {
            s.spawn(|_| work());
        }
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn panels_hold_the_transpose(rows in 1usize..70, cols in 1usize..40, gap in 0usize..5) {
            for k in Kernels::all() {
                let ld = cols + gap;
                let from: Vec<f32> = (0..rows * ld).map(|i| i as f32 + 1.0).collect();
                let mut to = vec![-1.0; k.panels(rows) * cols];
                panels(k, &from, ld, [rows, cols], &mut to);
                for r in 0..k.panels(rows) {
                    for c in 0..cols {
                        let want = if r < rows { from[r * ld + c] } else { 0.0 };
                        prop_assert_eq!(to[(r / k.nr * cols + c) * k.nr + r % k.nr], want);
                    }
                }
            }
        }

        #[test]
        fn rows_go_there_and_back(s in 1usize..5, h in 1usize..4, d in 1usize..40, bhsd: bool, kind in 0usize..3) {
            let dtype = [DType::Bf16, DType::F16, DType::F32][kind];
            let at = if bhsd { Strided::dense_bhsd(dtype, [2, s, h, d]) } else { Strided::dense(dtype, [2, s, h, d]) };
            let mut memory = vec![0u32; at.bytes() / 4 + 1];
            // SAFETY: the memory has room for `at` and outlives the tensor, and this thread alone uses it.
            let t = unsafe { Tensor::new(memory.as_mut_ptr().cast(), at) };
            let k = Kernels::detect();
            let value = |b: usize, s: usize, h: usize, d: usize| (b * 97 + s * 31 + h * 7 + d) as f32 * 0.5;
            for (b, s, h) in (0..2).flat_map(|b| (0..s).flat_map(move |s| (0..h).map(move |h| (b, s, h)))) {
                t.store([b, s, h], &(0..d).map(|d| value(b, s, h, d)).collect::<Vec<_>>());
            }
            let mut row = vec![0.0; d];
            for (b, s, h) in (0..2).flat_map(|b| (0..s).flat_map(move |s| (0..h).map(move |h| (b, s, h)))) {
                t.load(k, [b, s, h], &mut row);
                prop_assert_eq!(&row, &(0..d).map(|d| value(b, s, h, d)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn every_task_runs_once_and_may_wait_for_earlier_ones() {
        let done: Vec<AtomicUsize> = (0..200).map(|_| AtomicUsize::new(0)).collect();
        each(200, |i, _| {
            while i > 0 && done[i - 1].load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            done[i].fetch_add(1, Ordering::Release);
        });
        assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
    }
}
