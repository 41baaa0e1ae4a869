//! The error rule: how far a result may be from the oracle.
//!
//! The largest error of a tensor is at most `factor` times that of plain attention (scores, probabilities and results
//! rounded to the dtype), plus 1e-5; the same holds for the root mean square. `factor` is 2, with softcap 3.
//!
//! Plain's error is a matter of luck where few numbers are rounded: of two equally precise computations of one number, the
//! first is more than twice as wrong as the second three times in ten (`1 - 2/pi atan 2`, for normal errors). So where a small
//! case misses its bound, plain's errors are the largest over [`DRAWS`] draws of the case's values. A large case needs none:
//! it has enough numbers for its largest error to be typical.
//!
//! Gradients of sinks are one number a head. Plain attention's error of one number may be 0 by luck, and says nothing about
//! what is possible. They are a plain sum over results that are judged already, so they are held to that sum ([`judge_sinks`]),
//! which is far stricter: only the rounding of an f32 sum is allowed.

use std::cmp::Ordering;

use longspan_hal::Spec;
use ndarray::{Array3, Array4, ArrayViewD, s};

use crate::Failure;
use crate::oracle::{Answers, Incoming, What};

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

/// Most draws of a case's values.
pub const DRAWS: u64 = 32;

/// Multiply-adds of a score matrix and its product with the values that more draws may cost, in all.
const MORE: usize = 1 << 26;

/// The error rule for one case.
pub struct Judge<'a> {
    factor: f64,
    answers: Answers,
    /// Plain attention's errors, in the order of [`What::ALL`].
    plain: [Errors; 6],
    /// Draws that have not been looked at yet.
    draws: std::ops::Range<u64>,
    again: &'a dyn Fn(u64) -> Answers,
}

impl<'a> Judge<'a> {
    /// Judges by `answers`, and if need be by the answers to draw 1, 2, ... of the same case's values.
    ///
    /// # Errors
    /// [`Failure::Wrong`] if the answers have no gradients, or plain attention is not finite where it should be.
    pub fn new(spec: &Spec, answers: Answers, again: &'a dyn Fn(u64) -> Answers) -> Result<Self, Failure> {
        let work = spec.batch * spec.heads * spec.q_rows * spec.k_rows * (spec.head_dim + spec.head_dim_v);
        let draws = ((MORE / work.max(1)) as u64).min(DRAWS);
        Ok(Self { factor: factor(spec), plain: plain_errors(&answers)?, answers, draws: 1..draws.max(1), again })
    }

    /// The answers to the case's own values.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Judges a tensor, in the order of the oracle's.
    ///
    /// # Errors
    /// [`Failure::Wrong`] as [`errors`], or when a bound is not met.
    pub fn judge(&mut self, what: What, got: impl IntoIterator<Item = f64>) -> Result<Judged, Failure> {
        let errors = errors(&what.to_string(), got, self.exact(what)?.iter())?;
        if !self.judged(what, errors).holds() {
            self.draw_more()?;
        }
        let judged = self.judged(what, errors);
        if judged.holds() {
            return Ok(judged);
        }
        Err(Failure::wrong(format!(
            "{what}: error max {:.3e} rms {:.3e}, allowed are max {:.3e} rms {:.3e}",
            errors.max, errors.rms, judged.bound.max, judged.bound.rms
        )))
    }

    fn exact(&self, what: What) -> Result<ArrayViewD<'_, f64>, Failure> {
        let [exact, _] = self.answers.of(what).ok_or_else(no_gradients)?;
        Ok(exact)
    }

    fn judged(&self, what: What, errors: Errors) -> Judged {
        let plain = self.plain[What::ALL.iter().position(|w| *w == what).unwrap_or_default()];
        let limit = |x: f64| self.factor * x + FLOOR;
        Judged { errors, bound: Errors { max: limit(plain.max), rms: limit(plain.rms) } }
    }

    fn draw_more(&mut self) -> Result<(), Failure> {
        for draw in std::mem::take(&mut self.draws) {
            for (plain, other) in self.plain.iter_mut().zip(plain_errors(&(self.again)(draw))?) {
                *plain = Errors { max: plain.max.max(other.max), rms: plain.rms.max(other.rms) };
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Judge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge").field("factor", &self.factor).field("plain", &self.plain).finish_non_exhaustive()
    }
}

fn plain_errors(answers: &Answers) -> Result<[Errors; 6], Failure> {
    let mut all = [Errors::default(); 6];
    for (what, into) in What::ALL.into_iter().zip(&mut all) {
        let [exact, plain] = answers.of(what).ok_or_else(no_gradients)?;
        *into = errors(&format!("plain {what}"), plain.iter().copied(), exact.iter())?;
    }
    Ok(all)
}

fn no_gradients() -> Failure {
    Failure::wrong("the oracle was not asked for gradients")
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
    use longspan_hal::DType;

    use super::*;
    use crate::oracle::{Answer, Gradients};

    /// Answers whose delta, of `rows` rows, is `exact` and plainly `plain`; everything else is 0.
    fn answers(exact: &[f64], plain: &[f64]) -> Answers {
        let thin = (1, exact.len(), 1);
        let gradients = |delta: &[f64]| Gradients {
            dq: Array4::zeros((1, 1, 1, 1)),
            dk: Array4::zeros((1, 1, 1, 1)),
            dv: Array4::zeros((1, 1, 1, 1)),
            dsinks: None,
            delta: Array3::from_shape_fn(thin, |(_, i, _)| delta[i]),
        };
        let zero = Answer { out: Array4::zeros((1, 1, 1, 1)), lse: Array3::zeros((1, 1, 1)), gradients: None };
        let with = |delta| Answer { gradients: Some(gradients(delta)), ..zero.clone() };
        Answers { exact: with(exact), plain: with(plain), fine: zero.clone() }
    }

    fn spec(rows: usize) -> Spec {
        Spec::new(DType::F32, 1, [rows, rows], [1, 1], 1)
    }

    fn none(_: u64) -> Answers {
        unreachable!("the case is too large to be drawn again")
    }

    #[test]
    fn meets_and_misses_its_bound() {
        let large = spec(1 << 14);
        let judge = |got: [f64; 2]| {
            Judge::new(&large, answers(&[1.0, 2.0], &[1.01, 2.0]), &none).and_then(|mut j| j.judge(What::Delta, got))
        };
        assert!(judge([1.015, 2.0]).is_ok());
        assert!(judge([1.03, 2.0]).is_err());
        // The largest error alone would pass, the mean of squares does not.
        assert!(judge([1.019, 2.019]).is_err());
    }

    #[test]
    fn kinds_and_lengths_must_agree() {
        let judged = |got: &[f64], exact: &[f64]| errors("x", got.iter().copied(), exact);
        let inf = f64::NEG_INFINITY;
        assert!(judged(&[inf], &[inf]).is_ok());
        for (got, exact) in
            [(&[f64::INFINITY][..], inf), (&[-1e30], inf), (&[f64::NAN], 1.0), (&[1.0, 1.0], 1.0), (&[], 1.0)]
        {
            assert!(judged(got, &[exact]).is_err(), "{got:?} for {exact}");
        }
    }

    #[test]
    fn a_small_case_is_not_judged_by_plains_luck() {
        // Plain is right by chance on the case's own values, and wrong by up to 0.31 on others.
        let again = |draw: u64| answers(&[1.0], &[1.0 + draw as f64 / 100.0]);
        let judge = |got: f64| {
            let mut judge = Judge::new(&spec(1), answers(&[1.0], &[1.0]), &again)?;
            judge.judge(What::Delta, [got])
        };
        assert!(judge(1.61).is_ok() && judge(0.39).is_ok());
        assert!(judge(1.63).is_err() && judge(0.37).is_err() && judge(f64::NAN).is_err());
        // The draws are the last resort: a result that needs none is held to its own bound.
        assert!(judge(1.0).is_ok_and(|j| j.bound.max == FLOOR));
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
