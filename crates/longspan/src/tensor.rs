//! Host tensors: dense `[batch, seq, heads, dim]` bytes with a dtype.

use half::{bf16, f16};
use longspan_hal::{DType, Error, Extent, Result};
use longspan_peers::{Fields, Reader};
use longspan_seqpar::Layout;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

/// A dense host tensor `[batch, seq, heads, dim]` (BSHD order).
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    dtype: DType,
    extent: Extent,
    bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor over little-endian `bytes` in row-major order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if their number is not that of the extent.
    pub fn new(dtype: DType, extent: Extent, bytes: Vec<u8>) -> Result<Self> {
        let wanted = extent.iter().try_fold(dtype.size(), |n, e| n.checked_mul(*e));
        if wanted != Some(bytes.len()) {
            return Err(Error::invalid("tensor", format!("{} bytes for {dtype} {extent:?}", bytes.len())));
        }
        Ok(Self { dtype, extent, bytes })
    }

    /// A tensor of zeros.
    pub fn zeros(dtype: DType, extent: Extent) -> Self {
        Self { dtype, extent, bytes: vec![0; extent.iter().product::<usize>() * dtype.size()] }
    }

    /// Values in row-major order, each rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if their number is not that of the extent.
    pub fn from_f32(dtype: DType, extent: Extent, values: &[f32]) -> Result<Self> {
        let mut bytes = Vec::with_capacity(values.len() * dtype.size());
        for &x in values {
            match dtype {
                DType::Bf16 => bytes.extend_from_slice(&bf16::from_f32(x).to_le_bytes()),
                DType::F16 => bytes.extend_from_slice(&f16::from_f32(x).to_le_bytes()),
                _ => bytes.extend_from_slice(&x.to_le_bytes()),
            }
        }
        Self::new(dtype, extent, bytes)
    }

    /// Seeded standard normal values, rounded to `dtype`; the same on every machine.
    pub fn normal(dtype: DType, extent: Extent, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = extent.iter().product();
        let values: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(n).collect();
        Self::from_f32(dtype, extent, &values).unwrap_or_else(|_| Self::zeros(dtype, extent))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of the axes `[batch, seq, heads, dim]`.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Little-endian bytes in row-major order.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Dtype, extent and elements as bytes, for another process of the job.
    pub fn to_bytes(&self) -> Vec<u8> {
        let dtype = match self.dtype {
            DType::Bf16 => 0,
            DType::F16 => 1,
            _ => 2,
        };
        let head = self.extent.iter().fold(Fields::default().number(dtype), |f, &n| f.number(n as u64));
        head.bytes(&self.bytes).0
    }

    /// The tensor that [`Tensor::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are of something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut fields = Reader(bytes);
        let mut number = || fields.number().map(|n| n as usize);
        let head = number().and_then(|d| Ok((d, [number()?, number()?, number()?, number()?])));
        let (Ok((dtype, extent)), Ok(bytes)) = (head, fields.bytes()) else {
            return Err(Error::invalid("tensor", "the bytes of another process can't be read"));
        };
        Self::new([DType::Bf16, DType::F16, DType::F32][dtype.min(2)], extent, bytes.to_vec())
    }

    /// Values in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::Bf16 => self.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            DType::F16 => self.bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    /// The rows that `rank` holds under `layout`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tensor's sequence is not the layout's.
    pub fn shard(&self, layout: &Layout, rank: u32) -> Result<Self> {
        let [batch, seq, heads, dim] = self.extent;
        if seq != layout.seq() {
            return Err(Error::invalid("tensor", format!("its sequence is {seq}, the layout's is {}", layout.seq())));
        }
        let bytes = layout.shard(rank, &self.bytes, batch, heads * dim * self.dtype.size())?;
        Self::new(self.dtype, [batch, layout.rows(rank), heads, dim], bytes)
    }

    /// The whole tensor from the shards of all ranks, in rank order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shards do not fit the layout or each other.
    pub fn unshard(layout: &Layout, shards: &[Self]) -> Result<Self> {
        let first = shards.first().ok_or_else(|| Error::invalid("shards", "there are none"))?;
        let [batch, _, heads, dim] = first.extent;
        for (rank, s) in shards.iter().enumerate() {
            let rows = layout.rows(rank as u32);
            if s.dtype != first.dtype || s.extent != [batch, rows, heads, dim] {
                return Err(Error::invalid(
                    "shards",
                    format!(
                        "rank {rank} has {} {:?}, wanted {} {:?}",
                        s.dtype,
                        s.extent,
                        first.dtype,
                        [batch, rows, heads, dim]
                    ),
                ));
            }
        }
        let row = heads * dim * first.dtype.size();
        let bytes: Vec<Vec<u8>> = shards.iter().map(|s| s.bytes.clone()).collect();
        Self::new(first.dtype, [batch, layout.seq(), heads, dim], layout.unshard(&bytes, batch, row)?)
    }
}
