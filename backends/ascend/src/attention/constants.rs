//! What every call reads: a triangle that every band's mask is a part of, counting numbers, and two floors.
//!
//! With `U[a][b] = (b > a)`, the part of `U` from `(a, b)` on is true where `j - i > a - b`. So one triangle of twice the tile
//! holds the upper mask of every band, and its transpose every lower mask: nothing about masks is uploaded per plan.

use std::time::Duration;

use ascendcl_sys::aclDataType;
use longspan_hal::{DType, Device, Priority, Result, Strided, ViewMut};

use super::plan::TILE;
use crate::AscendDevice;
use crate::memory::AscendBuffer;
use crate::tensor::Tensor;

/// Counting numbers on the device: bounds heads.
pub(super) const COUNT: usize = 4096;
const SIDE: usize = 2 * TILE;
/// How long the upload may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Device memory with the constants.
#[derive(Debug)]
pub(super) struct Constants(AscendBuffer);

// Byte offsets.
const TRIANGLE: usize = 0;
const COUNTS_F32: usize = TRIANGLE + SIDE * SIDE;
const COUNTS_I64: usize = COUNTS_F32 + COUNT * 4;
const FLOORS: usize = COUNTS_I64 + COUNT * 8;
const COMPRESSED: usize = FLOORS + 64;

/// Side of the compressed mask of fused attention.
const COMPRESSED_SIDE: usize = 2048;

/// Replaces a maximum of -inf in exponents.
const LOWEST: f32 = -f32::MAX;
/// Replaces a sum of 0 in divisors; a row that saw a key has at least 1.
const TINY: f32 = 1e-30;

impl Constants {
    /// Uploads the constants, those of fused attention if it is; waits for it.
    pub fn new(device: &AscendDevice, fused: bool) -> Result<Self> {
        let length = COMPRESSED + if fused { COMPRESSED_SIDE * COMPRESSED_SIDE } else { 0 };
        let mut bytes = vec![0u8; length];
        upper(&mut bytes[TRIANGLE..COUNTS_F32], SIDE);
        upper(&mut bytes[COMPRESSED..], COMPRESSED_SIDE);
        for i in 0..COUNT {
            bytes[COUNTS_F32 + 4 * i..][..4].copy_from_slice(&(i as f32).to_le_bytes());
            bytes[COUNTS_I64 + 8 * i..][..8].copy_from_slice(&(i as i64).to_le_bytes());
        }
        bytes[FLOORS..][..4].copy_from_slice(&LOWEST.to_le_bytes());
        bytes[FLOORS + 4..][..4].copy_from_slice(&TINY.to_le_bytes());
        let (buffer, stream) = (device.alloc(length)?, device.stream(Priority::Normal)?);
        let at = Strided::dense(DType::F32, [1, 1, 1, length / 4]);
        device.upload(&stream, &bytes, ViewMut::new(&buffer, at)?)?;
        device.synchronize(&stream, LIMIT)?;
        Ok(Self(buffer))
    }

    /// The memory.
    pub fn buffer(&self) -> &AscendBuffer {
        &self.0
    }

    /// `[rows, keys]`, true where `j - i > hi`; both sizes at most [`TILE`], `hi` between `-rows` and `keys`.
    pub fn above(&self, hi: i64, [rows, keys]: [usize; 2]) -> Tensor {
        let (a, b) = (hi.max(0) as usize, (-hi).max(0) as usize);
        self.triangle(a * SIDE + b, [rows, keys], [SIDE, 1])
    }

    /// `[rows, keys]`, true where `j - i < lo`.
    pub fn below(&self, lo: i64, [rows, keys]: [usize; 2]) -> Tensor {
        // i - j > -lo: the transpose, with i along the columns.
        let (a, b) = ((-lo).max(0) as usize, lo.max(0) as usize);
        self.triangle(a * SIDE + b, [rows, keys], [1, SIDE])
    }

    fn triangle(&self, at: usize, dims: [usize; 2], strides: [usize; 2]) -> Tensor {
        Tensor {
            address: self.0.address() + TRIANGLE + at,
            dtype: aclDataType::ACL_BOOL,
            dims: dims.map(|d| d as i64).to_vec(),
            strides: strides.map(|s| s as i64).to_vec(),
        }
    }

    /// The compressed causal mask of fused attention, `[2048, 2048]`, true above the diagonal.
    pub fn compressed(&self) -> Tensor {
        Tensor::dense(self.0.address() + COMPRESSED, aclDataType::ACL_BOOL, &[COMPRESSED_SIDE; 2])
    }

    /// `0, 1, 2, ...` in f32 with these dims.
    pub fn counts(&self, dims: &[usize]) -> Tensor {
        Tensor::dense(self.0.address() + COUNTS_F32, aclDataType::ACL_FLOAT, dims)
    }

    /// `0, 1, 2, ...` in i64 with these dims.
    pub fn counts_int(&self, dims: &[usize]) -> Tensor {
        Tensor::dense(self.0.address() + COUNTS_I64, aclDataType::ACL_INT64, dims)
    }

    /// The lowest finite number, `[1, 1, 1]`.
    pub fn lowest(&self) -> Tensor {
        Tensor::dense(self.0.address() + FLOORS, aclDataType::ACL_FLOAT, &[1, 1, 1])
    }

    /// A number above 0 below every sum, `[1, 1, 1]`.
    pub fn tiny(&self) -> Tensor {
        Tensor::dense(self.0.address() + FLOORS + 4, aclDataType::ACL_FLOAT, &[1, 1, 1])
    }
}

/// Ones above the diagonal of a square, if there is one.
fn upper(square: &mut [u8], side: usize) {
    square.chunks_exact_mut(side).enumerate().for_each(|(i, row)| row[i + 1..].fill(1));
}
