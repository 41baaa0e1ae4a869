//! Seeded normal tensors: each has a seed of its own, so that q does not change when dout is drawn too.

use std::str::FromStr;

use longspan::{DType, Extent, Tensor};

use crate::failure::{Failure, Result};

/// Shapes of a synthetic problem: `B,S,H,HK,D[,DV]`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// Batch rows.
    pub batch: usize,
    /// Tokens.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Size of a query and key head.
    pub head_dim: usize,
    /// Size of a value head.
    pub head_dim_v: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number =
            |n: &str| n.trim().parse::<usize>().map_err(|_| format!("`{n}` is not a whole number of at least 1"));
        let numbers: Vec<usize> = text.split(',').map(number).collect::<Result<_, _>>()?;
        let (batch, seq, heads, kv_heads, head_dim, head_dim_v) = match numbers[..] {
            [b, s, h, hk, d] => (b, s, h, hk, d, d),
            [b, s, h, hk, d, dv] => (b, s, h, hk, d, dv),
            _ => return Err(format!("{} numbers given, B,S,H,HK,D or B,S,H,HK,D,DV wanted", numbers.len())),
        };
        if numbers.contains(&0) {
            return Err("every number must be at least 1".into());
        }
        if heads % kv_heads != 0 {
            return Err(format!("H % HK != 0: {heads} query heads are not a multiple of {kv_heads} kv heads"));
        }
        let sizes = [batch, seq, heads, head_dim.max(head_dim_v), size_of::<f32>()];
        if sizes.into_iter().try_fold(1usize, usize::checked_mul).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err("the tensors would not fit the address space".into());
        }
        Ok(Self { batch, seq, heads, kv_heads, head_dim, head_dim_v })
    }
}

/// Which tensor is drawn: each has a stream of numbers of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stream {
    /// Gradient of the output.
    Dout,
    /// Keys.
    K,
    /// Queries.
    Q,
    /// Sink logits.
    Sinks,
    /// Values.
    V,
}

/// A tensor of N(0, 1) numbers, rounded to `dtype`; the same on every machine.
///
/// # Errors
/// [`Failure::Run`] if there is no memory for it.
pub fn tensor(dtype: DType, extent: Extent, seed: u64, stream: Stream) -> Result<Tensor> {
    // Asks for the f32 values and the elements at once, as the drawing will.
    let bytes = extent.iter().product::<usize>().saturating_mul(size_of::<f32>() + dtype.size());
    if Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
        return Err(Failure::Run(format!("no memory for a synthetic {dtype} tensor of {extent:?}")));
    }
    Ok(Tensor::normal(dtype, extent, seed.wrapping_mul(8).wrapping_add(stream as u64)))
}

/// `heads` sink logits from N(0, 1).
///
/// # Errors
/// As [`tensor`].
pub fn sinks(heads: usize, seed: u64) -> Result<Vec<f32>> {
    Ok(tensor(DType::F32, [1, 1, heads, 1], seed, Stream::Sinks)?.to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_normal_and_depend_on_seed_and_stream() {
        let draw = |seed, stream| tensor(DType::F32, [1, 1000, 10, 10], seed, stream).expect("small").to_f32();
        let x = draw(7, Stream::Q);
        let moment = |p: i32| x.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / x.len() as f64;
        assert!(moment(1).abs() < 0.02, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.03, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "fourth moment {}", moment(4));
        assert_ne!(x[..8], draw(8, Stream::Q)[..8]);
        assert_ne!(x[..8], draw(7, Stream::K)[..8]);
        assert_eq!(x, draw(7, Stream::Q));
    }

    #[test]
    fn shapes_are_read_and_refused() {
        let shape: Shape = "2,100,8,2,64".parse().expect("five numbers");
        assert_eq!((shape.batch, shape.seq, shape.heads, shape.kv_heads), (2, 100, 8, 2));
        assert_eq!((shape.head_dim, shape.head_dim_v), (64, 64));
        assert_eq!("1,1,1,1,192,128".parse::<Shape>().map(|s| s.head_dim_v), Ok(128));
        for bad in ["", "1,2,3", "1,2,3,2,8", "1,0,4,2,8", "1,2,-4,2,8", "a,b,c,d,e", "1,2,4,2,8,8,8"] {
            assert!(bad.parse::<Shape>().is_err(), "{bad}");
        }
        let huge = format!("{0},{0},1,1,64", usize::MAX / 2);
        assert!(huge.parse::<Shape>().is_err_and(|why| why.contains("address space")));
    }

    #[test]
    fn a_tensor_without_memory_is_an_error() {
        assert!(tensor(DType::F32, [1, 1 << 40, 1 << 10, 1 << 8], 0, Stream::Q).is_err());
    }
}
