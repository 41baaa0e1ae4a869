//! Host tensors: rounding to a dtype, bytes, and seeded random values.

use half::{bf16, f16};
use longspan_hal::{DType, Error, Extent, Strided};
use ndarray::Array4;

/// `x` rounded to `dtype` (nearest, ties to even).
pub fn round(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// `values` as little-endian elements of `dtype`.
pub fn encode(dtype: DType, values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    let values = values.into_iter();
    match dtype {
        DType::Bf16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    }
}

/// The values of little-endian elements of `dtype`.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Seeded random numbers (SplitMix64; Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014): the
/// same on every rank and machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n` (0 for 0).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A number in `lo..=hi`.
    pub fn between(&mut self, lo: usize, hi: usize) -> usize {
        lo + self.below(hi.saturating_sub(lo) + 1)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `of`.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Shuffles in place.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }

    /// A number in `(0, 1]`.
    fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// A normal number (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let (a, b) = (self.unit(), self.unit());
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    /// A tensor of normal numbers, rounded to `dtype`.
    pub fn tensor(&mut self, dtype: DType, extent: Extent) -> Array4<f32> {
        Array4::from_shape_simple_fn((extent[0], extent[1], extent[2], extent[3]), || round(dtype, self.normal()))
    }
}

/// A random way to lay a tensor: any order of the outer axes, gaps between them, from `offset` elements on.
///
/// # Errors
/// [`Error::Invalid`] on overflow.
pub fn random_strided(random: &mut Random, dtype: DType, offset: usize, extent: Extent) -> Result<Strided, Error> {
    let mut order = [0, 1, 2];
    random.shuffle(&mut order);
    let mut strides = [1; 4];
    let mut span = extent[3].max(1);
    for axis in order {
        strides[axis] = span + random.below(4);
        span += extent[axis].saturating_sub(1) * strides[axis];
    }
    Strided::new(dtype, offset, extent, strides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_survive_the_round_trip() {
        let mut random = Random::new(1);
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let values: Vec<f32> = (0..500).map(|_| round(dtype, random.normal())).collect();
            assert_eq!(decode(dtype, &encode(dtype, values.iter().copied())), values);
        }
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let mut random = Random::new(2);
        let x: Vec<f64> = (0..40_000).map(|_| f64::from(random.normal())).collect();
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}
