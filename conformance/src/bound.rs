//! The error rule: how far a result may be from the oracle.
//!
//! The largest error of a tensor is at most `factor` times that of plain attention (scores, probabilities and results
//! rounded to the dtype), plus 1e-5; the same holds for the root mean square. `factor` is 2, with softcap 3.
//!
//! Gradients of sinks are one number a head. Plain attention's error of one number may be 0 by luck, and says nothing about
//! what is possible. They are a plain sum over results that are judged already, so they are held to that sum ([`judge_sinks`]),
//! which is far stricter: only the rounding of an f32 sum is allowed.

use std::cmp::Ordering;

use longspan_hal::Spec;
use ndarray::{Array3, Array4, s};

use crate::Failure;
use crate::oracle::Incoming;

/// Added to every bound.
pub const FLOOR: f64 = 1e-5;

/// The factor on plain attention's error.
pub fn factor(spec: &Spec) -> f64 {
    if spec.softcap.is_some() { 3.0 } else { 2.0 }
}

/// Distance of one tensor from the oracle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Largest.
    pub max: f64,
    /// Root mean square.
    pub rms: f64,
}

/// A tensor's errors, and the bound that they must meet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// Of the result.
    pub errors: Errors,
    /// Of plain attention, times the factor, plus the floor.
    pub bound: Errors,
}

impl Judged {
    /// Whether both errors meet their bounds.
    pub fn holds(&self) -> bool {
        self.errors.max <= self.bound.max && self.errors.rms <= self.bound.rms
    }

    /// Largest part of a bound that is used; 1 is the limit.
    pub fn used(&self) -> f64 {
        (self.errors.max / self.bound.max).max(self.errors.rms / self.bound.rms)
    }
}

/// Errors of `got` against `exact`, both in the same order. Where `exact` is infinite, `got` must be the same; where it is
/// finite, `got` must be finite.
///
/// # Errors
/// [`Failure::Wrong`] naming the first element of a different length or kind.
pub fn errors<'a>(
    what: &str,
    got: impl IntoIterator<Item = f64>,
    exact: impl IntoIterator<Item = &'a f64>,
) -> Result<Errors, Failure> {
    let (mut max, mut squares, mut count) = (0.0f64, 0.0, 0usize);
    let mut got = got.into_iter();
    for (i, &exact) in exact.into_iter().enumerate() {
        let Some(got) = got.next() else {
            return Err(Failure::wrong(format!("{what} has {i} elements, the oracle has more")));
        };
        if exact.is_finite() != got.is_finite() || (!exact.is_finite() && exact.to_bits() != got.to_bits()) {
            return Err(Failure::wrong(format!("{what}: element {i} is {got}, the oracle has {exact}")));
        }
        if exact.is_finite() {
            let error = (got - exact).abs();
            max = max.max(error);
            squares += error * error;
        }
        count += 1;
    }
    if got.next().is_some() {
        return Err(Failure::wrong(format!("{what} has more than the oracle's {count} elements")));
    }
    Ok(Errors { max, rms: (squares / count.max(1) as f64).sqrt() })
}

/// Judges `got` against `exact` with the error of `plain` and `factor` as bound.
///
/// # Errors
/// [`Failure::Wrong`] as [`errors`], or when a bound is not met.
pub fn judge<'a>(
    what: &str,
    got: impl IntoIterator<Item = f64>,
    exact: impl IntoIterator<Item = &'a f64> + Clone,
    plain: impl IntoIterator<Item = &'a f64>,
    factor: f64,
) -> Result<Judged, Failure> {
    let plain = errors(what, plain.into_iter().copied(), exact.clone())?;
    let errors = errors(what, got, exact)?;
    let limit = |x: f64| factor * x + FLOOR;
    let judged = Judged { errors, bound: Errors { max: limit(plain.max), rms: limit(plain.rms) } };
    if judged.holds() {
        return Ok(judged);
    }
    Err(Failure::wrong(format!(
        "{what}: error max {:.3e} rms {:.3e}, allowed are max {:.3e} rms {:.3e}",
        errors.max, errors.rms, judged.bound.max, judged.bound.rms
    )))
}

/// Judges the gradients of sinks `got`, `[heads]`, against `-sum exp(sink - lse) (rowsum(dout * out) - dlse)` in f64 over the
/// backend's own `out` and the oracle's `lse`; allowed are 1e-5, and 1e-6 of the sum of all absolute products.
///
/// # Errors
/// [`Failure::Wrong`] if the bound is not met.
pub fn judge_sinks(
    got: &[f32],
    sinks: &[f32],
    out: &Array4<f32>,
    lse: &Array3<f64>,
    incoming: &Incoming,
) -> Result<Judged, Failure> {
    let mut worst = Judged::default();
    for (h, (got, sink)) in got.iter().zip(sinks).enumerate() {
        let (mut sum, mut size) = (0.0, 0.0);
        for ((b, i), lse) in lse.slice(s![.., .., h]).indexed_iter() {
            let weight = (f64::from(*sink) - lse).exp();
            let products = out.slice(s![b, i, h, ..]).to_owned() * incoming.dout.slice(s![b, i, h, ..]);
            let products = products.iter().map(|x| f64::from(*x));
            let dlse = incoming.dlse.as_ref().map_or(0.0, |d| f64::from(d[[b, i, h]]));
            sum -= weight * (products.clone().sum::<f64>() - dlse);
            size += weight * (products.map(f64::abs).sum::<f64>() + dlse.abs());
        }
        let (error, bound) = ((f64::from(*got) - sum).abs(), FLOOR + 1e-6 * size);
        if !matches!(error.partial_cmp(&bound), Some(Ordering::Less | Ordering::Equal)) {
            return Err(Failure::wrong(format!("dsinks: head {h} is {got}, wanted is {sum} within {bound:.3e}")));
        }
        let judged = Judged { errors: Errors { max: error, rms: error }, bound: Errors { max: bound, rms: bound } };
        if worst.bound.max == 0.0 || judged.used() > worst.used() {
            worst = judged;
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meets_and_misses_its_bound() {
        let (exact, plain) = ([1.0, 2.0], [1.01, 2.0]);
        assert!(judge("x", [1.015, 2.0], &exact, &plain, 2.0).is_ok());
        assert!(judge("x", [1.03, 2.0], &exact, &plain, 2.0).is_err());
        // The largest error alone would pass, the mean of squares does not.
        assert!(judge("x", [1.019, 2.019], &exact, &plain, 2.0).is_err());
    }

    #[test]
    fn kinds_and_lengths_must_agree() {
        let inf = [f64::NEG_INFINITY];
        assert!(judge("x", inf, &inf, &inf, 2.0).is_ok());
        assert!(judge("x", [f64::INFINITY], &inf, &inf, 2.0).is_err());
        assert!(judge("x", [-1e30], &inf, &inf, 2.0).is_err());
        assert!(judge("x", [f64::NAN], &[1.0], &[1.0], 2.0).is_err());
        assert!(judge("x", [1.0, 1.0], &[1.0], &[1.0], 2.0).is_err());
        assert!(judge("x", [], &[1.0], &[1.0], 2.0).is_err());
    }

    #[test]
    fn sinks_are_held_to_their_sum() {
        let out = Array4::from_shape_fn((1, 3, 2, 4), |(_, i, h, d)| (i + h + d) as f32);
        let dout = out.mapv(|x| 1.0 - 0.1 * x);
        let lse = Array3::from_shape_fn((1, 3, 2), |(_, i, _)| i as f64);
        let incoming = Incoming { dout: dout.clone(), dlse: None };
        let sum = |h: usize| -> f64 {
            let row = |i: usize| (0..4).map(|d| f64::from(out[[0, i, h, d]] * dout[[0, i, h, d]])).sum::<f64>();
            -(0..3).map(|i| (0.5 - i as f64).exp() * row(i)).sum::<f64>()
        };
        let right = [sum(0) as f32, sum(1) as f32];
        assert!(judge_sinks(&right, &[0.5, 0.5], &out, &lse, &incoming).is_ok());
        for wrong in [[right[0] + 1e-3, right[1]], [right[0], f32::NAN], [right[1], right[0]]] {
            assert!(judge_sinks(&wrong, &[0.5, 0.5], &out, &lse, &incoming).is_err());
        }
    }
}
