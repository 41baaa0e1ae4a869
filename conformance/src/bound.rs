//! The error rule: how far a result may be from the oracle.
//!
//! The largest error of a tensor is at most `factor` times that of plain attention (scores, probabilities and results
//! rounded to the dtype), plus 1e-5; the same holds for the root mean square. `factor` is 2, with softcap 3.

use longspan_hal::Spec;

use crate::Failure;

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
}
