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
use crate::ops::Ops;
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
const BYTES: usize = FLOORS + 64;

/// Replaces a maximum of -inf in exponents.
const LOWEST: f32 = -f32::MAX;
/// Replaces a sum of 0 in divisors; a row that saw a key has at least 1.
const TINY: f32 = 1e-30;

impl Constants {
    /// Uploads the constants; waits for it.
    pub fn new(device: &AscendDevice) -> Result<Self> {
        let mut bytes = vec![0u8; BYTES];
        for a in 0..SIDE {
            bytes[a * SIDE + a + 1..(a + 1) * SIDE].fill(1);
        }
        for i in 0..COUNT {
            bytes[COUNTS_F32 + 4 * i..][..4].copy_from_slice(&(i as f32).to_le_bytes());
            bytes[COUNTS_I64 + 8 * i..][..8].copy_from_slice(&(i as i64).to_le_bytes());
        }
        bytes[FLOORS..][..4].copy_from_slice(&LOWEST.to_le_bytes());
        bytes[FLOORS + 4..][..4].copy_from_slice(&TINY.to_le_bytes());
        let (buffer, stream) = (device.alloc(BYTES)?, device.stream(Priority::Normal)?);
        let at = Strided::dense(DType::F32, [1, 1, 1, BYTES / 4]);
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

/// Side of the compressed mask of fused attention.
const COMPRESSED: usize = 2048;

impl Constants {
    /// Writes the compressed causal mask of fused attention, `[2048, 2048]`, true above the diagonal, from parts of the triangle.
    pub fn compressed(&self, ops: Ops<'_>, to: &Tensor) -> Result<()> {
        let tiles = COMPRESSED / TILE;
        for i in 0..tiles {
            let rows = to.narrow(0, i * TILE..(i + 1) * TILE);
            // Tiles on the diagonal hold the triangle, those right of it are true, those left of it false.
            for j in 0..tiles {
                let tile = rows.narrow(1, j * TILE..(j + 1) * TILE);
                let hi = match j.cmp(&i) {
                    std::cmp::Ordering::Less => TILE as i64,
                    std::cmp::Ordering::Equal => 0,
                    std::cmp::Ordering::Greater => -(TILE as i64),
                };
                ops.copy(&self.above(hi, [TILE, TILE]), &tile)?;
            }
        }
        Ok(())
    }
}
