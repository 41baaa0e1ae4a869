//! Results against plain attention in f64.
//!
//! The error rule: the largest error of a tensor, and its root mean square, are at most twice (with softcap three times)
//! those of *plain* attention in the run's dtype, plus 1e-5 ([`longspan_conformance::bound`]).
//!
//! ```text
//! up to 8192 tokens: for each batch row, for each KV head with its query heads:     (parallel)
//!     exact = oracle in f64, plain = oracle rounded to the dtype (lse: to f32)
//!     add |result - exact| and |plain - exact| of out, lse, dq, dk, dv, dsinks to their tallies
//! above: the same for a sample of query rows (out, lse, dq) and of keys (dk, dv; see `sample.rs`)
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use longspan::Tensor;
use longspan_conformance::bound::{FLOOR, factor};
use longspan_conformance::oracle::{Answer, Incoming, Problem, exact, plain};
use longspan_hal::{DType, Spec};
use ndarray::{Array4, s};

use crate::failure::{Failure, Result};
use crate::job::Job;
use crate::results::Results;
use crate::sample;

/// Sequences up to this long are verified in every row.
pub const ALL_ROWS: usize = 8192;

/// Query rows and keys that are verified of longer ones.
pub const SAMPLE: usize = 64;

/// How far one tensor is from the oracle, and how far it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The tensor.
    pub name: &'static str,
    /// Errors of the result.
    pub got: Errors,
    /// The most that is allowed.
    pub bound: Errors,
    /// Elements where the result is finite and the oracle is not, or the other way round.
    pub wrong_kind: usize,
}

impl Verdict {
    /// Whether the tensor is within its bound.
    pub fn holds(&self) -> bool {
        self.wrong_kind == 0 && self.got.max <= self.bound.max && self.got.rms <= self.bound.rms
    }
}

/// Largest and root mean square error.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Largest.
    pub max: f64,
    /// Root mean square.
    pub rms: f64,
}

/// Checks that the oracle can judge the job: its matrix products would carry a number that is not finite into rows whose
/// mask leaves it out, where the run rightly has none.
///
/// # Errors
/// [`Failure::Input`] naming the tensor.
pub fn check_inputs(job: &Job) -> Result<()> {
    let tensors = [("q", Some(&job.q)), ("k", Some(&job.k)), ("v", Some(&job.v)), ("dout", job.dout.as_ref())];
    let tensors = tensors.into_iter().filter_map(|(name, tensor)| Some((name, tensor?.to_f32())));
    let per_head = [("sinks", &job.sinks), ("alibi_slopes", &job.alibi_slopes)];
    let per_head = per_head.into_iter().filter_map(|(name, numbers)| Some((name, numbers.clone()?)));
    for (name, numbers) in tensors.chain(per_head) {
        let count = numbers.iter().filter(|x| !x.is_finite()).count();
        if count > 0 {
            let why =
                format!("--verify: `{name}` has {count} numbers that are not finite, which the oracle can't judge");
            return Err(Failure::Input(why));
        }
    }
    Ok(())
}

/// Compares `results` with the oracle. `done` is called with the number of finished parts and their total.
///
/// # Errors
/// [`Failure::Run`] if a shape does not fit, which is a fault of this program.
pub fn verify(job: &Job, results: &Results, done: &(dyn Fn(usize, usize) + Sync)) -> Result<Vec<Verdict>> {
    let parts: Vec<(usize, usize)> =
        (0..job.batch()).flat_map(|b| (0..job.kv_heads()).map(move |kv| (b, kv))).collect();
    let whole = Whole::new(job, results)?;
    let tallies = Mutex::new(Tallies::default());
    let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(&(b, kv)) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let part = whole.part(b, kv);
            if let Ok(mut all) = tallies.lock() {
                all.merge(&part);
            }
            done(finished.fetch_add(1, Ordering::Relaxed) + 1, parts.len());
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(parts.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let tallies = tallies.into_inner().map_err(|_| Failure::Run("the verification stopped in the middle".into()))?;
    Ok(tallies.verdicts(factor(&Spec::new(job.dtype(), 1, [1, 1], [1, 1], 1).with_softcap(job.softcap))))
}

/// The verdict as an error, if a tensor is outside its bound.
///
/// # Errors
/// [`Failure::Verification`] naming the tensors.
pub fn judge(verdicts: &[Verdict]) -> Result<()> {
    let outside: Vec<&str> = verdicts.iter().filter(|v| !v.holds()).map(|v| v.name).collect();
    if outside.is_empty() {
        return Ok(());
    }
    Err(Failure::Verification(format!("{} outside the bound", outside.join(", "))))
}

/// The whole problem and its results as arrays.
pub(crate) struct Whole<'a> {
    pub job: &'a Job,
    pub q: Array4<f32>,
    pub k: Array4<f32>,
    pub v: Array4<f32>,
    pub dout: Option<Array4<f32>>,
    pub out: Array4<f32>,
    /// `[batch, seq, heads, 1]`.
    pub lse: Array4<f32>,
    /// dq, dk, dv.
    pub gradients: Option<[Array4<f32>; 3]>,
    pub dsinks: Option<&'a [f32]>,
}

impl<'a> Whole<'a> {
    fn new(job: &'a Job, results: &'a Results) -> Result<Self> {
        let gradients = match &results.gradients {
            Some(g) => Some([array(&g.dq)?, array(&g.dk)?, array(&g.dv)?]),
            None => None,
        };
        Ok(Self {
            job,
            q: array(&job.q)?,
            k: array(&job.k)?,
            v: array(&job.v)?,
            dout: job.dout.as_ref().map(array).transpose()?,
            out: array(&results.out)?,
            lse: array(&results.lse)?,
            gradients,
            dsinks: results.gradients.as_ref().and_then(|g| g.dsinks.as_deref()),
        })
    }

    fn part(&self, b: usize, kv: usize) -> Tallies {
        if self.job.seq().max(self.job.k.extent()[1]) > ALL_ROWS {
            sample::part(self, b, kv)
        } else {
            self.all_rows(b, kv)
        }
    }

    fn all_rows(&self, b: usize, kv: usize) -> Tallies {
        let mask = &self.job.mask;
        let pair = |_: usize, i: usize, j: usize| mask.allows(i, j).then_some((i as i64, j as i64));
        let rows: Vec<usize> = (0..self.job.seq()).collect();
        let (problem, incoming) = self.problem(b, kv, &rows, &pair);
        let [a, p] = self.answers(&problem, incoming.as_ref());
        let mut tallies = self.queries(b, kv, &rows, &a, &p);
        let (Some([_, dk, dv]), Some(a), Some(p)) = (&self.gradients, &a.gradients, &p.gradients) else {
            return tallies;
        };
        let block = s![b..=b, .., kv..=kv, ..];
        tallies.dk.add(dk.slice(block), &a.dk, &p.dk);
        tallies.dv.add(dv.slice(block), &a.dv, &p.dv);
        if let (Some(got), Some(a), Some(p)) = (self.dsinks, &a.dsinks, &p.dsinks) {
            let heads = kv * self.job.group()..(kv + 1) * self.job.group();
            // A batch row gives a part of the sum only: collected by head, compared at the end.
            tallies.dsinks =
                heads.map(|h| Sink::new(h, got[h], a[h % self.job.group()], p[h % self.job.group()])).collect();
        }
        tallies
    }

    /// The oracle's problem of query rows `rows` of one batch row and the heads of one KV head.
    pub fn problem<'p>(
        &self,
        b: usize,
        kv: usize,
        rows: &[usize],
        pair: longspan_conformance::oracle::Pair<'p>,
    ) -> (Problem<'p>, Option<Incoming>) {
        let (job, group) = (self.job, self.job.group());
        let heads = kv * group..(kv + 1) * group;
        let chosen = |x: &Array4<f32>| x.slice(s![b..=b, .., heads.clone(), ..]).select(ndarray::Axis(1), rows);
        let keys = |x: &Array4<f32>| x.slice(s![b..=b, .., kv..=kv, ..]).to_owned();
        let spec = Spec::new(job.dtype(), 1, [rows.len(), job.k.extent()[1]], [group, 1], job.q.extent()[3])
            .with_head_cut(heads.start, group, job.heads(), group)
            .with_scale(job.scale)
            .with_softcap(job.softcap);
        let mut problem = Problem::new(&spec, [chosen(&self.q), keys(&self.k), keys(&self.v)], pair);
        problem.batch_first = b;
        problem.slopes.clone_from(&job.alibi_slopes);
        problem.sinks.clone_from(&job.sinks);
        problem.dropout = job.dropout.map(|p| (p, job.seed));
        (problem, self.dout.as_ref().map(|dout| Incoming { dout: chosen(dout), dlse: None }))
    }

    /// The exact and the plain answer. The log-sum is f32 whatever the dtype of the others is, and so is plain's.
    pub fn answers(&self, problem: &Problem, incoming: Option<&Incoming>) -> [Answer; 2] {
        let mut plain_answer = plain(problem, incoming, self.job.dtype());
        if self.job.dtype() != DType::F32 {
            plain_answer.lse = plain(problem, None, DType::F32).lse;
        }
        [exact(problem, incoming), plain_answer]
    }

    /// Tallies of out, lse and dq of query rows `rows`.
    pub fn queries(&self, b: usize, kv: usize, rows: &[usize], exact: &Answer, plain: &Answer) -> Tallies {
        let heads = kv * self.job.group()..(kv + 1) * self.job.group();
        let chosen = |x: &Array4<f32>| x.slice(s![b..=b, .., heads.clone(), ..]).select(ndarray::Axis(1), rows);
        let mut tallies = Tallies::default();
        tallies.out.add(chosen(&self.out).view(), &exact.out, &plain.out);
        tallies.lse.add(chosen(&self.lse).view(), &exact.lse, &plain.lse);
        if let (Some([dq, ..]), Some(exact), Some(plain)) = (&self.gradients, &exact.gradients, &plain.gradients) {
            tallies.dq.add(chosen(dq).view(), &exact.dq, &plain.dq);
        }
        tallies
    }
}

fn array(tensor: &Tensor) -> Result<Array4<f32>> {
    let [b, s, h, d] = tensor.extent();
    Array4::from_shape_vec((b, s, h, d), tensor.to_f32())
        .map_err(|e| Failure::Run(format!("a tensor of {:?} has other bytes: {e}", tensor.extent())))
}

/// Sums over the elements of one tensor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    got: Sum,
    plain: Sum,
    count: usize,
    wrong_kind: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    max: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, error: f64) {
        self.max = self.max.max(error);
        self.squares += error * error;
    }

    fn merge(&mut self, other: Self) {
        self.max = self.max.max(other.max);
        self.squares += other.squares;
    }

    fn errors(&self, count: usize) -> Errors {
        Errors { max: self.max, rms: (self.squares / count.max(1) as f64).sqrt() }
    }
}

impl Tally {
    /// Adds elements in the same order.
    pub fn add<'a>(
        &mut self,
        got: impl IntoIterator<Item = &'a f32>,
        exact: impl IntoIterator<Item = &'a f64>,
        plain: impl IntoIterator<Item = &'a f64>,
    ) {
        for ((&got, &exact), &plain) in got.into_iter().zip(exact).zip(plain) {
            self.element(f64::from(got), exact, plain);
        }
    }

    fn element(&mut self, got: f64, exact: f64, plain: f64) {
        self.count += 1;
        let same_kind = got.is_finite() == exact.is_finite()
            && (exact.is_finite() || got == exact || (got.is_nan() && exact.is_nan()));
        if !same_kind {
            self.wrong_kind += 1;
        } else if exact.is_finite() {
            self.got.add((got - exact).abs());
            // Where plain attention overflows it allows nothing more.
            self.plain.add(if plain.is_finite() { (plain - exact).abs() } else { 0.0 });
        }
    }

    fn merge(&mut self, other: &Self) {
        self.got.merge(other.got);
        self.plain.merge(other.plain);
        self.count += other.count;
        self.wrong_kind += other.wrong_kind;
    }

    fn verdict(&self, name: &'static str, factor: f64) -> Option<Verdict> {
        let plain = self.plain.errors(self.count);
        let bound = Errors { max: factor * plain.max + FLOOR, rms: factor * plain.rms + FLOOR };
        let (got, wrong_kind) = (self.got.errors(self.count), self.wrong_kind);
        (self.count > 0).then_some(Verdict { name, got, bound, wrong_kind })
    }
}

/// Parts of one head's sink gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sink {
    head: usize,
    got: f64,
    exact: f64,
    plain: f64,
}

impl Sink {
    /// The result of a head, and the parts of the sum that one batch row gives.
    pub fn new(head: usize, got: f32, exact: f64, plain: f64) -> Self {
        Self { head, got: f64::from(got), exact, plain }
    }
}

/// Tallies of all results.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tallies {
    pub out: Tally,
    pub lse: Tally,
    pub dq: Tally,
    pub dk: Tally,
    pub dv: Tally,
    pub dsinks: Vec<Sink>,
}

impl Tallies {
    fn merge(&mut self, other: &Self) {
        self.out.merge(&other.out);
        self.lse.merge(&other.lse);
        self.dq.merge(&other.dq);
        self.dk.merge(&other.dk);
        self.dv.merge(&other.dv);
        for sink in &other.dsinks {
            match self.dsinks.iter_mut().find(|s| s.head == sink.head) {
                Some(sum) => (sum.exact, sum.plain) = (sum.exact + sink.exact, sum.plain + sink.plain),
                None => self.dsinks.push(*sink),
            }
        }
    }

    fn verdicts(&self, factor: f64) -> Vec<Verdict> {
        let mut dsinks = Tally::default();
        for sink in &self.dsinks {
            dsinks.element(sink.got, sink.exact, sink.plain);
        }
        let all = [
            ("out", self.out),
            ("lse", self.lse),
            ("dq", self.dq),
            ("dk", self.dk),
            ("dv", self.dv),
            ("dsinks", dsinks),
        ];
        all.iter().filter_map(|(name, tally)| tally.verdict(name, factor)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};
    use crate::engine;

    fn tally(got: &[f32], exact: &[f64], plain: &[f64]) -> Verdict {
        let mut tally = Tally::default();
        tally.add(got, exact, plain);
        tally.verdict("x", 2.0).expect("elements")
    }

    #[test]
    fn the_bound_is_twice_plain_attention() {
        assert!(tally(&[1.0, 2.0], &[1.0, 2.0], &[1.0, 2.0]).holds());
        assert!(tally(&[1.0156, 2.0], &[1.0, 2.0], &[1.01, 2.0]).holds());
        let outside = tally(&[1.03, 2.0], &[1.0, 2.0], &[1.01, 2.0]);
        assert!(!outside.holds() && judge(&[outside]).is_err_and(|e| e.to_string().contains("x outside")));
        assert!(!tally(&[1.015, 2.015], &[1.0, 2.0], &[1.01, 2.0]).holds(), "the mean of squares counts too");
    }

    #[test]
    fn a_number_where_the_oracle_has_none_fails_whatever_the_bound() {
        let none = f64::NEG_INFINITY;
        assert!(tally(&[f32::NEG_INFINITY], &[none], &[none]).holds());
        assert!(!tally(&[-1e30], &[none], &[none]).holds());
        assert!(!tally(&[f32::NAN], &[1.0], &[1.0]).holds());
        assert!(!tally(&[f32::INFINITY], &[none], &[none]).holds());
        assert!(tally(&[f32::NAN], &[f64::NAN], &[f64::NAN]).holds(), "NaN in, NaN out");
    }

    /// The log-sum is f32 where everything else has fewer bits: in every row, and in a sample.
    #[test]
    fn a_log_sum_that_is_wrong_in_its_sixth_digit_is_seen_whatever_the_dtype() {
        for (shape, dtype) in [("1,64,4,2,16", "bf16"), ("1,64,4,2,16", "f16"), ("1,8200,1,1,8", "bf16")] {
            let words = ["longspan", "run", "--synthetic", shape, "--dtype", dtype, "--mask", "window:100"];
            let Command::Run(args) = Args::try_parse_from(words).expect("good words").command else { panic!("run") };
            let job = Job::new(&args).expect("fits");
            let mut results = engine::run(&job, "cpu", Duration::from_secs(120), None, false).expect("it runs");
            let judged = |results: &Results| judge(&verify(&job, results, &|_, _| ()).expect("fits"));
            assert_eq!(judged(&results), Ok(()), "{shape} {dtype}");
            let wrong: Vec<f32> = results.lse.to_f32().into_iter().map(|x| x + 1e-4).collect();
            results.lse = Tensor::from_f32(DType::F32, results.lse.extent(), &wrong).expect("fits");
            let failure = Failure::Verification("lse outside the bound".into());
            assert_eq!(judged(&results), Err(failure), "{shape} {dtype}");
        }
    }

    #[test]
    fn sink_gradients_of_batch_rows_are_summed_before_they_are_compared() {
        let mut all = Tallies::default();
        for part in [0.25, 0.75] {
            all.merge(&Tallies { dsinks: vec![Sink::new(3, 1.0, part, part)], ..Tallies::default() });
        }
        let verdict = all.verdicts(2.0)[0];
        assert!(verdict.name == "dsinks" && verdict.holds() && verdict.got.max == 0.0);
    }
}
