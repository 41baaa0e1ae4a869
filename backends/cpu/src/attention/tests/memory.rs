//! Plain memory for tests.

use longspan_hal::{DType, Strided};

use crate::attention::pack::Tensor;
use crate::attention::simd::Kernels;

/// Memory of one tensor; what it does not name is NaN.
pub struct Memory {
    pub words: Vec<u64>,
    pub at: Strided,
}

impl Memory {
    pub fn new(at: Strided) -> Self {
        Self { words: vec![u64::MAX; at.byte_range().end / 8 + 1], at }
    }

    /// A tensor with `values`, laid out by `layout`.
    pub fn with(dtype: DType, extent: [usize; 4], layout: usize, values: &[f64]) -> Self {
        let mut this = Self::new(strided(dtype, extent, layout));
        this.rows(|t, row, i| {
            let n = extent[3];
            t.store(row, &values[i * n..][..n].iter().map(|x| *x as f32).collect::<Vec<_>>());
        });
        this
    }

    pub fn rows(&mut self, mut f: impl FnMut(&Tensor, [usize; 3], usize)) {
        let t = self.tensor();
        let [b, s, h, _] = self.at.extent();
        for i in 0..b * s * h {
            f(&t, [i / (s * h), i / h % s, i % h], i);
        }
    }

    pub fn tensor(&mut self) -> Tensor {
        // SAFETY: the words hold the elements of `at`; tests keep the memory until the call ran, and don't share it.
        unsafe { Tensor::new(self.words.as_mut_ptr().cast(), self.at) }
    }

    pub fn values(&mut self) -> Vec<f64> {
        let mut all = Vec::new();
        let mut row_of = vec![0.0; self.at.extent()[3]];
        self.rows(|t, row, _| {
            t.load(Kernels::detect(), row, &mut row_of);
            all.extend(row_of.iter().map(|x| f64::from(*x)));
        });
        all
    }
}

/// Dense BSHD, BHSD, or with gaps and an offset (as a part of packed QKV).
pub fn strided(dtype: DType, extent: [usize; 4], layout: usize) -> Strided {
    let [_, s, h, d] = extent;
    match layout % 3 {
        0 => Strided::dense(dtype, extent),
        1 => Strided::dense_bhsd(dtype, extent),
        _ => Strided::new(dtype, 3 * d + 5, extent, [s * 3 * h * d + 7, 3 * h * d, d, 1]).expect("nested"),
    }
}
