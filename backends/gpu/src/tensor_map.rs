//! Tensor maps: how Hopper's bulk copies find the boxes of a tensor.

use std::ffi::{c_int, c_uint, c_void};

use longspan_dylib::{Library, Returned, table};
use longspan_hal::{DType, Error, Result, Strided};
use longspan_kernels::params::TensorMap;

use crate::driver::Address;

table! {
    /// The driver's encoder; from CUDA 12.0 on.
    struct Functions {
        /// Writes a map.
        fn encode["cuTensorMapEncodeTiled"](
            map: *mut TensorMap, dtype: c_int, rank: c_uint, address: Address, extents: *const u64, strides: *const u64,
            boxes: *const c_uint, steps: *const c_uint, interleave: c_int, swizzle: c_int, promotion: c_int, fill: c_int,
        ) -> c_int;
    }
}

/// Encodes tensor maps.
#[derive(Debug)]
pub(crate) struct TensorMaps(Functions);

/// `CU_TENSOR_MAP_SWIZZLE_128B`: rows of a box are 128 bytes, permuted as `prelude_sm90.cuh` says.
const SWIZZLE: c_int = 3;
/// `CU_TENSOR_MAP_L2_PROMOTION_L2_256B`.
const PROMOTION: c_int = 3;
const BOX_ROW_BYTES: usize = 128;

impl TensorMaps {
    /// # Errors
    /// [`Error::Unavailable`] if the driver is too old.
    pub(crate) fn load(library: Library) -> Result<Self> {
        Functions::load(library, 0).map(Self)
    }

    /// The map of a tensor `[batch, row, head, dim]` whose first element lies at `address`; boxes are `rows` rows of 128 bytes
    /// of one head. No axis is empty, strides are multiples of 16 bytes.
    pub(crate) fn encode(&self, address: Address, at: &Strided, rows: u32) -> Result<(TensorMap, Returned<c_int>)> {
        let dtype = match at.dtype() {
            DType::F16 => 6,
            DType::F32 => 7,
            DType::Bf16 => 9,
            other => return Err(Error::invalid("tensor map", format!("{other} elements"))),
        };
        let size = at.dtype().size();
        let [b, s, h, d] = at.extent();
        let [sb, ss, sh, _] = at.strides();
        let axes = [(s, ss), (h, sh), (b, sb)];
        // The stride of an axis of one step is of no use, but has to be a valid one.
        let whole = (d * size).next_multiple_of(16) as u64;
        let strides = axes.map(|(n, stride)| if n > 1 { (stride * size) as u64 } else { whole });
        let extents = [d, s, h, b].map(|n| n as u64);
        let boxes = [(BOX_ROW_BYTES / size) as c_uint, rows, 1, 1];
        let (mut map, steps) = (TensorMap::default(), [1; 4]);
        // SAFETY: `map` is written, which is aligned as it must be; the arrays have 4, 3, 4 and 4 elements for rank 4.
        let returned = unsafe {
            self.0.encode(
                &mut map,
                dtype,
                4,
                address,
                extents.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                0,
                SWIZZLE,
                PROMOTION,
                0,
            )
        };
        Ok((map, returned))
    }
}

const _: () = assert!(size_of::<*mut c_void>() == size_of::<Address>());
