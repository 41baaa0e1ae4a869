//! Verification of long sequences: a sample of query rows and of keys.
//!
//! A query row's out, lse and dq need its own keys only, so they are compared with the oracle as they are. A key's dk and dv
//! need the log-sum of *every* query. These are taken from the run itself (its lse and out, of which the sample of query
//! rows is verified), and the sums over queries are done here:
//!
//! ```text
//! delta[i] = dout[i] . out[i]                       for each query i that sees key j:
//! x0 = softcap(scale q[i] . k[j])                   x = x0 - slope |i - j|          p = exp(x - lse[i])
//! ds = p (w dout[i] . v[j] - delta[i]) (1 - (x0 / softcap)^2)
//! dk[j] += scale ds q[i]                            dv[j] += w p dout[i]            w = keep / (1 - p_drop)
//! dsink -= exp(sink - lse[i]) delta[i]
//! ```
//!
//! once in f64, and once as plain attention: scores, probabilities and results rounded to the dtype, sums in f32.

use longspan_conformance::host;
use longspan_conformance::oracle::philox;
use longspan_hal::DType;
use ndarray::{ArrayView1, s};

use crate::verify::{SAMPLE, Sink, Tallies, Whole};

/// Tallies of the sample, of one batch row and the heads of one KV head.
pub(crate) fn part(whole: &Whole<'_>, b: usize, kv: usize) -> Tallies {
    let job = whole.job;
    let rows = spread(job.seq());
    let pair = |_: usize, i: usize, j: usize| job.mask.allows(rows[i], j).then_some((rows[i] as i64, j as i64));
    let (problem, incoming) = whole.problem(b, kv, &rows, &pair);
    let [exact, plain] = whole.answers(&problem, incoming.as_ref());
    let mut tallies = whole.queries(b, kv, &rows, &exact, &plain);
    let (Some(_), Some([_, dk, dv])) = (&whole.dout, &whole.gradients) else { return tallies };
    for key in spread(job.k.extent()[1]) {
        let [exact, plain] =
            [key_gradients(whole, b, kv, key, None), key_gradients(whole, b, kv, key, Some(job.dtype()))];
        tallies.dk.add(dk.slice(s![b, key, kv, ..]), &exact[0], &plain[0]);
        tallies.dv.add(dv.slice(s![b, key, kv, ..]), &exact[1], &plain[1]);
    }
    if let (Some(sinks), Some(got)) = (&job.sinks, whole.dsinks) {
        let one = |h: usize| {
            let part = |round: Option<DType>| sink_gradient(whole, b, h, sinks[h], round);
            Sink::new(h, got[h], part(None), part(Some(DType::F32)))
        };
        tallies.dsinks = (kv * job.group()..(kv + 1) * job.group()).map(one).collect();
    }
    tallies
}

/// Up to [`SAMPLE`] indices below `n`, evenly spread, the first and the last among them.
fn spread(n: usize) -> Vec<usize> {
    let count = SAMPLE.min(n);
    (0..count).map(|i| i * (n - 1) / (count - 1).max(1)).collect()
}

/// Rounding: none, or results to the dtype and sums to f32.
#[derive(Clone, Copy)]
struct Rounding(Option<DType>);

impl Rounding {
    fn value(self, x: f64) -> f64 {
        self.0.map_or(x, |dtype| f64::from(host::round(dtype, x as f32)))
    }

    fn sum(self, x: f64) -> f64 {
        if self.0.is_some() { f64::from(x as f32) } else { x }
    }

    fn dot(self, a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
        match self.0 {
            Some(_) => f64::from(a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()),
            None => a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum(),
        }
    }
}

/// dk and dv of one key.
fn key_gradients(whole: &Whole<'_>, b: usize, kv: usize, key: usize, dtype: Option<DType>) -> [Vec<f64>; 2] {
    let (job, rounding) = (whole.job, Rounding(dtype));
    let mut sums = [vec![0.0; job.k.extent()[3]], vec![0.0; job.v.extent()[3]]];
    for head in kv * job.group()..(kv + 1) * job.group() {
        for row in (0..job.seq()).filter(|&row| job.mask.allows(row, key)) {
            let Some((ds, wp)) = pair(whole, [b, head, kv], [row, key], rounding) else { continue };
            let (q, dout) =
                (whole.q.slice(s![b, row, head, ..]), whole.dout.as_ref().map(|d| d.slice(s![b, row, head, ..])));
            let add = |sums: &mut Vec<f64>, by: f64, x: ArrayView1<'_, f32>| {
                for (sum, &x) in sums.iter_mut().zip(x) {
                    *sum = rounding.sum(*sum + by * f64::from(x));
                }
            };
            add(&mut sums[0], f64::from(job.scale) * ds, q);
            dout.into_iter().for_each(|dout| add(&mut sums[1], wp, dout));
        }
    }
    sums.map(|sum| sum.into_iter().map(|x| rounding.value(x)).collect())
}

/// `ds` and `w p` of one pair; nothing for a row without a finite log-sum.
fn pair(whole: &Whole<'_>, at: [usize; 3], [row, key]: [usize; 2], rounding: Rounding) -> Option<(f64, f64)> {
    let ([b, head, kv], job) = (at, whole.job);
    let lse = f64::from(whole.lse[[b, row, head, 0]]);
    if lse == f64::NEG_INFINITY {
        return None;
    }
    let (k, v) = (whole.k.slice(s![b, key, kv, ..]), whole.v.slice(s![b, key, kv, ..]));
    let mut x0 = f64::from(job.scale) * rounding.dot(whole.q.slice(s![b, row, head, ..]), k);
    let mut capped = 1.0;
    if let Some(c) = job.softcap.map(f64::from) {
        x0 = c * (x0 / c).tanh();
        capped = 1.0 - (x0 / c).powi(2);
    }
    let slope = job.alibi_slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[head]));
    let x = rounding.value(rounding.value(x0) - slope * row.abs_diff(key) as f64);
    let p = rounding.value((x - lse).exp());
    let w = match job.dropout {
        Some(p) if !philox::keeps(p, job.seed, b, head, row as i64, key as i64) => 0.0,
        Some(p) => 1.0 / (1.0 - f64::from(p)),
        None => 1.0,
    };
    let dout = whole.dout.as_ref()?;
    let dp = w * rounding.value(rounding.dot(dout.slice(s![b, row, head, ..]), v));
    let ds = rounding.value(p * (dp - delta(whole, [b, row, head], rounding)) * capped);
    Some((ds, rounding.value(w * p)))
}

/// `dout . out` of a row.
fn delta(whole: &Whole<'_>, [b, row, head]: [usize; 3], rounding: Rounding) -> f64 {
    let out = whole.out.slice(s![b, row, head, ..]);
    whole.dout.as_ref().map_or(0.0, |dout| rounding.dot(dout.slice(s![b, row, head, ..]), out))
}

fn sink_gradient(whole: &Whole<'_>, b: usize, head: usize, sink: f32, dtype: Option<DType>) -> f64 {
    let rounding = Rounding(dtype);
    let term = |row| {
        (f64::from(sink) - f64::from(whole.lse[[b, row, head, 0]])).exp() * delta(whole, [b, row, head], rounding)
    };
    (0..whole.job.seq()).fold(0.0, |sum, row| rounding.sum(sum - term(row)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_has_both_ends_and_no_index_twice() {
        for n in [1, 2, SAMPLE - 1, SAMPLE, SAMPLE + 1, 10_000] {
            let rows = spread(n);
            assert_eq!((rows[0], rows[rows.len() - 1], rows.len()), (0, n - 1, SAMPLE.min(n)));
            assert!(rows.windows(2).all(|w| w[0] < w[1]), "{n}");
        }
    }
}
