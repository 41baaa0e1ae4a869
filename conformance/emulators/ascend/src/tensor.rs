//! Strided tensors, and access to their rows as f32 or i64.

use crate::memory::Span;

/// Element types by the vendor's numbers.
pub mod dtype {
    pub const F32: i32 = 0;
    pub const F16: i32 = 1;
    pub const I32: i32 = 3;
    pub const U8: i32 = 4;
    pub const I64: i32 = 9;
    pub const BOOL: i32 = 12;
    pub const BF16: i32 = 27;

    /// Bytes of an element, if the emulator knows the type.
    pub fn size(dtype: i32) -> Option<usize> {
        match dtype {
            F32 | I32 => Some(4),
            F16 | BF16 => Some(2),
            U8 | BOOL => Some(1),
            I64 => Some(8),
            _ => None,
        }
    }

    /// Whether it holds real numbers.
    pub fn is_float(dtype: i32) -> bool {
        matches!(dtype, F32 | F16 | BF16)
    }
}

/// A tensor as `aclCreateTensor` described it. Strides count elements.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: i32,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
    /// From the first element to the last; none for an empty tensor.
    pub span: Option<Span>,
    /// Address of the first element as the client gave it.
    pub first: usize,
}

/// A tensor whose memory is there now.
#[derive(Clone, Debug)]
pub struct Ready {
    pub dtype: i32,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
    base: *mut u8,
}

impl Tensor {
    pub fn is_dense(&self) -> bool {
        let mut expected = 1;
        (0..self.dims.len()).rev().all(|a| {
            let ok = self.dims[a] <= 1 || self.strides[a] == expected;
            expected *= self.dims[a];
            ok
        })
    }

    /// Whether both name exactly the same elements in the same order.
    pub fn same(&self, other: &Self) -> bool {
        self.first == other.first
            && self.dims == other.dims
            && self.strides == other.strides
            && self.dtype == other.dtype
    }

    /// Whether their byte ranges meet (not exact for interleaved tensors).
    pub fn meets(&self, other: &Self) -> bool {
        match (self.span, other.span) {
            (Some(a), Some(b)) => self.first < other.first + b.bytes() && other.first < self.first + a.bytes(),
            _ => false,
        }
    }

    /// Finds the memory.
    pub fn ready(&self) -> Result<Ready, i32> {
        let base = self.span.map_or(Ok(std::ptr::null_mut()), |s| s.address())?;
        Ok(Ready { dtype: self.dtype, dims: self.dims.clone(), strides: self.strides.clone(), base })
    }
}

impl Ready {
    /// Strides when this is read as a tensor of `dims`: broadcast axes have 0.
    pub fn broadcast(&self, dims: &[usize]) -> Vec<usize> {
        let skip = dims.len() - self.dims.len();
        (0..dims.len()).map(|a| if a < skip || self.dims[a - skip] == 1 { 0 } else { self.strides[a - skip] }).collect()
    }

    /// Loads `to.len()` elements from element `at` on, `stride` apart.
    pub fn load(&self, at: usize, stride: usize, to: &mut [f32]) {
        let place = |i: usize| at + i * stride;
        // SAFETY: offsets lie inside the tensor's span, which was checked when the tensor was made ready.
        unsafe {
            match self.dtype {
                dtype::F32 if stride == 1 => {
                    std::ptr::copy_nonoverlapping(self.base.cast::<f32>().add(at), to.as_mut_ptr(), to.len());
                }
                dtype::F32 => each(to, |i| self.base.cast::<f32>().add(place(i)).read_unaligned()),
                dtype::F16 => each(to, |i| self.base.cast::<half::f16>().add(place(i)).read_unaligned().to_f32()),
                dtype::BF16 => each(to, |i| self.base.cast::<half::bf16>().add(place(i)).read_unaligned().to_f32()),
                dtype::I32 => each(to, |i| self.base.cast::<i32>().add(place(i)).read_unaligned() as f32),
                dtype::I64 => each(to, |i| self.base.cast::<i64>().add(place(i)).read_unaligned() as f32),
                _ => each(to, |i| f32::from(self.base.add(place(i)).read())),
            }
        }
    }

    /// [`Self::load`] of integers.
    pub fn load_int(&self, at: usize, stride: usize, to: &mut [i64]) {
        let place = |i: usize| at + i * stride;
        // SAFETY: as in `load`.
        unsafe {
            match self.dtype {
                dtype::I64 if stride == 1 => {
                    std::ptr::copy_nonoverlapping(self.base.cast::<i64>().add(at), to.as_mut_ptr(), to.len());
                }
                dtype::I32 => each(to, |i| i64::from(self.base.cast::<i32>().add(place(i)).read_unaligned())),
                dtype::I64 => each(to, |i| self.base.cast::<i64>().add(place(i)).read_unaligned()),
                dtype::F32 => each(to, |i| self.base.cast::<f32>().add(place(i)).read_unaligned() as i64),
                _ => each(to, |i| i64::from(self.base.add(place(i)).read())),
            }
        }
    }

    /// Stores elements, rounded to the tensor's type.
    pub fn store(&self, at: usize, stride: usize, from: &[f32]) {
        if self.dtype == dtype::F32 && stride == 1 {
            // SAFETY: as in `load`.
            return unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.cast::<f32>().add(at), from.len());
            };
        }
        for (i, &x) in from.iter().enumerate() {
            let at = at + i * stride;
            // SAFETY: as in `load`.
            unsafe {
                match self.dtype {
                    dtype::F32 => self.base.cast::<f32>().add(at).write_unaligned(x),
                    dtype::F16 => self.base.cast::<half::f16>().add(at).write_unaligned(half::f16::from_f32(x)),
                    dtype::BF16 => self.base.cast::<half::bf16>().add(at).write_unaligned(half::bf16::from_f32(x)),
                    dtype::I32 => self.base.cast::<i32>().add(at).write_unaligned(x as i32),
                    dtype::I64 => self.base.cast::<i64>().add(at).write_unaligned(x as i64),
                    dtype::BOOL => self.base.add(at).write(u8::from(x != 0.0)),
                    _ => self.base.add(at).write(x as u8),
                }
            }
        }
    }

    /// [`Self::store`] of integers.
    pub fn store_int(&self, at: usize, stride: usize, from: &[i64]) {
        if self.dtype == dtype::I64 && stride == 1 {
            // SAFETY: as in `load`.
            return unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.cast::<i64>().add(at), from.len());
            };
        }
        for (i, &x) in from.iter().enumerate() {
            let at = at + i * stride;
            // SAFETY: as in `load`.
            unsafe {
                match self.dtype {
                    dtype::I32 => self.base.cast::<i32>().add(at).write_unaligned(x as i32),
                    dtype::I64 => self.base.cast::<i64>().add(at).write_unaligned(x),
                    dtype::F32 => self.base.cast::<f32>().add(at).write_unaligned(x as f32),
                    dtype::BOOL => self.base.add(at).write(u8::from(x != 0)),
                    _ => self.base.add(at).write(x as u8),
                }
            }
        }
    }

    /// Copies the bits of `n` elements from `from`, a tensor of the same type.
    pub fn copy_bits(&self, [at, stride]: [usize; 2], from: &Self, [from_at, from_stride]: [usize; 2], n: usize) {
        let size = dtype::size(self.dtype).unwrap_or(1);
        if stride == 1 && from_stride == 1 {
            // SAFETY: as in `load`.
            return unsafe { std::ptr::copy(from.base.add(from_at * size), self.base.add(at * size), n * size) };
        }
        for i in 0..n {
            // SAFETY: as in `load`.
            unsafe {
                let source = from.base.add((from_at + i * from_stride) * size);
                std::ptr::copy(source, self.base.add((at + i * stride) * size), size);
            }
        }
    }

    /// All elements in row-major order.
    pub fn dense(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.dims.iter().product()];
        let n = self.dims.last().copied().unwrap_or(1);
        let stride = self.strides.last().copied().unwrap_or(1);
        let mut row = 0;
        rows(&self.dims, &[&self.strides], |at| {
            self.load(at[0], stride, &mut all[row..row + n]);
            row += n;
        });
        all
    }

    /// Stores all elements from row-major order.
    pub fn store_dense(&self, from: &[f32]) {
        let n = self.dims.last().copied().unwrap_or(1);
        let stride = self.strides.last().copied().unwrap_or(1);
        let mut row = 0;
        rows(&self.dims, &[&self.strides], |at| {
            self.store(at[0], stride, &from[row..row + n]);
            row += n;
        });
    }
}

fn each<T>(to: &mut [T], f: impl Fn(usize) -> T) {
    for (i, x) in to.iter_mut().enumerate() {
        *x = f(i);
    }
}

/// Calls `f` with the offsets of every row (all axes but the last) of tensors of `dims`.
pub fn rows(dims: &[usize], strides: &[&Vec<usize>], mut f: impl FnMut(&[usize])) {
    if dims.contains(&0) {
        return;
    }
    let outer = dims.len().saturating_sub(1);
    let (mut index, mut at) = (vec![0usize; outer], vec![0usize; strides.len()]);
    loop {
        f(&at);
        let mut axis = outer;
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            at.iter_mut().zip(strides).for_each(|(a, s)| *a += s[axis]);
            if index[axis] < dims[axis] {
                break;
            }
            at.iter_mut().zip(strides).for_each(|(a, s)| *a -= s[axis] * dims[axis]);
            index[axis] = 0;
        }
    }
}
