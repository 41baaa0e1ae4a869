//! Tensors as operators take them: an address, a type, dims and strides. A value; the vendor's object is made for one call.

use ascendcl_sys::aclDataType;
use longspan_hal::{DType, Strided};

use crate::memory::AscendBuffer;

/// Strided elements of device memory. The memory's handle is kept by the call that uses it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Address of the first element.
    pub address: usize,
    pub dtype: aclDataType,
    pub dims: Vec<i64>,
    pub strides: Vec<i64>,
}

/// The vendor's type of a view's elements.
pub(crate) fn of(dtype: DType) -> aclDataType {
    match dtype {
        DType::Bf16 => aclDataType::ACL_BF16,
        DType::F16 => aclDataType::ACL_FLOAT16,
        _ => aclDataType::ACL_FLOAT,
    }
}

/// Bytes of an element.
pub(crate) fn size(dtype: aclDataType) -> usize {
    match dtype {
        aclDataType::ACL_BOOL | aclDataType::ACL_UINT8 => 1,
        aclDataType::ACL_BF16 | aclDataType::ACL_FLOAT16 => 2,
        aclDataType::ACL_INT64 => 8,
        _ => 4,
    }
}

impl Tensor {
    /// Row-major elements without gaps.
    pub fn dense(address: usize, dtype: aclDataType, dims: &[usize]) -> Self {
        let mut strides = vec![1; dims.len()];
        for axis in (1..dims.len()).rev() {
            strides[axis - 1] = strides[axis] * dims[axis].max(1) as i64;
        }
        Self { address, dtype, dims: dims.iter().map(|&d| d as i64).collect(), strides }
    }

    /// All four axes of a view.
    pub fn view(buffer: &AscendBuffer, at: &Strided) -> Self {
        let dtype = of(at.dtype());
        Self {
            address: buffer.address() + at.offset() * at.dtype().size(),
            dtype,
            dims: at.extent().map(|d| d as i64).to_vec(),
            strides: at.strides().map(|s| s as i64).to_vec(),
        }
    }

    /// `[heads, rows, dim]` of one batch row of a view.
    pub fn heads(buffer: &AscendBuffer, at: &Strided, batch: usize) -> Self {
        let all = Self::view(buffer, at);
        let pick = |list: &[i64]| vec![list[2], list[1], list[3]];
        let address = all.address + batch * all.strides[0] as usize * size(all.dtype);
        Self { address, dtype: all.dtype, dims: pick(&all.dims), strides: pick(&all.strides) }
    }

    /// The part `from..to` of an axis.
    pub fn narrow(&self, axis: usize, range: std::ops::Range<usize>) -> Self {
        let mut part = self.clone();
        part.address += range.start * self.strides[axis] as usize * size(self.dtype);
        part.dims[axis] = range.len() as i64;
        part
    }

    /// Dense elements read with other dims of the same number.
    pub fn reshaped(&self, dims: &[usize]) -> Self {
        Self::dense(self.address, self.dtype, dims)
    }

    /// The last two axes exchanged.
    pub fn transposed(&self) -> Self {
        let (mut t, n) = (self.clone(), self.dims.len());
        t.dims.swap(n - 1, n - 2);
        t.strides.swap(n - 1, n - 2);
        t
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.dims.contains(&0)
    }

    /// Elements from the first to the last, gaps included.
    pub fn span(&self) -> i64 {
        if self.is_empty() {
            return 0;
        }
        1 + self.dims.iter().zip(&self.strides).map(|(d, s)| (d - 1) * s).sum::<i64>()
    }
}
