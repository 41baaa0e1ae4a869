//! What attention is, as plainly as possible: full score matrices in f64, no tiles, no partials, no ranks.
//!
//! For query row `i`, key row `j`, head `h` (formulas of [`longspan_hal::Spec`]):
//!
//! ```text
//! x0   = softcap(scale * q[i] . k[j])
//! x    = x0 - slope[h] * |qpos - kpos|                   -inf where the pair is not allowed
//! lse  = ln(sum_j exp(x) + exp(sink[h]))
//! p    = exp(x - lse)                                    0 where lse = -inf
//! w    = keep / (1 - p_drop)
//! out  = (w p) v
//! delta = rowsum(dout * out) - dlse
//! ds   = p * (w dout v^T - delta) * (1 - (x0 / softcap)^2)
//! dq   = scale ds k      dk = scale ds^T q      dv = (w p)^T dout      dsink = -sum_i exp(sink - lse) delta
//! ```
//!
//! The same code over f32 with scores, probabilities and results rounded to a dtype is *plain* attention: what a careful
//! programmer gets without thinking about precision. Its error sets the bound for everybody else ([`crate::bound`]).

pub mod philox;

use longspan_hal::{DType, Spec};
use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayViewD, NdFloat, s};

use crate::host;

/// Positions of an allowed pair: batch row, query row and key row to `(query position, key position)`, `None` where the
/// mask forbids the pair.
pub type Pair<'a> = &'a (dyn Fn(usize, usize, usize) -> Option<(i64, i64)> + Sync);

/// One attention problem. Tensors hold f32 values that are exact in the problem's dtype.
#[derive(Clone)]
pub struct Problem<'a> {
    /// Queries, `[batch, q_rows, heads, head_dim]`.
    pub q: Array4<f32>,
    /// Keys, `[batch, k_rows, kv_heads, head_dim]`.
    pub k: Array4<f32>,
    /// Values, `[batch, k_rows, kv_heads, head_dim_v]`.
    pub v: Array4<f32>,
    /// Query heads a KV head, in the whole problem.
    pub group: usize,
    /// Global index of batch row 0 (dropout).
    pub batch_first: usize,
    /// Global index of query head 0 (groups, slopes, sinks, dropout).
    pub head_first: usize,
    /// Global index of KV head 0.
    pub kv_first: usize,
    /// Factor on the dot product.
    pub scale: f32,
    /// `c` of `c tanh(x / c)`.
    pub softcap: Option<f32>,
    /// ALiBi slopes of all heads of the whole problem.
    pub slopes: Option<Vec<f32>>,
    /// Sink logits of all heads of the whole problem.
    pub sinks: Option<Vec<f32>>,
    /// Probability and seed.
    pub dropout: Option<(f32, u64)>,
    /// The mask.
    pub pair: Pair<'a>,
}

impl<'a> Problem<'a> {
    /// The problem that `spec` describes, without slopes, sinks and dropout, which bring values of their own.
    pub fn new(spec: &Spec, [q, k, v]: [Array4<f32>; 3], pair: Pair<'a>) -> Self {
        Self {
            q,
            k,
            v,
            group: spec.group,
            batch_first: spec.batch_first,
            head_first: spec.head_first,
            kv_first: spec.kv_first,
            scale: spec.scale,
            softcap: spec.softcap,
            slopes: None,
            sinks: None,
            dropout: None,
            pair,
        }
    }

    fn kv_head(&self, head: usize) -> usize {
        (self.head_first + head) / self.group - self.kv_first
    }
}

impl std::fmt::Debug for Problem<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Problem").field("q", &self.q.shape()).field("k", &self.k.shape()).finish_non_exhaustive()
    }
}

/// Gradients that come in.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Gradient of `out`, `[batch, q_rows, heads, head_dim_v]`.
    pub dout: Array4<f32>,
    /// Gradient of `lse`, `[batch, q_rows, heads]`.
    pub dlse: Option<Array3<f32>>,
}

/// Results, in the precision of the computation widened to f64.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `[batch, q_rows, heads, head_dim_v]`.
    pub out: Array4<f64>,
    /// `[batch, q_rows, heads]`.
    pub lse: Array3<f64>,
    /// With incoming gradients.
    pub gradients: Option<Gradients>,
}

/// Gradients that go out.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// As `q`.
    pub dq: Array4<f64>,
    /// As `k`.
    pub dk: Array4<f64>,
    /// As `v`.
    pub dv: Array4<f64>,
    /// With sinks: of each local query head.
    pub dsinks: Option<Array1<f64>>,
    /// `rowsum(dout * out) - dlse`, `[batch, q_rows, heads]`.
    pub delta: Array3<f64>,
}

/// Everything that one draw of values is judged by.
#[derive(Clone, Debug)]
pub struct Answers {
    /// In f64.
    pub exact: Answer,
    /// Plain in the I/O dtype.
    pub plain: Answer,
    /// Plain in f32, which the log-sum has whatever the I/O dtype is; without gradients.
    pub fine: Answer,
}

impl Answers {
    /// The answers to `problem` in `dtype`.
    pub fn new(problem: &Problem, incoming: &Incoming, dtype: DType) -> Self {
        Self {
            exact: exact(problem, Some(incoming)),
            plain: plain(problem, Some(incoming), dtype),
            fine: plain(problem, None, DType::F32),
        }
    }

    /// The exact and the plain values of a tensor.
    pub fn of(&self, what: What) -> Option<[ArrayViewD<'_, f64>; 2]> {
        let (exact, plain) = (self.exact.gradients.as_ref()?, self.plain.gradients.as_ref()?);
        Some(match what {
            What::Delta => [exact.delta.view().into_dyn(), plain.delta.view().into_dyn()],
            What::Dk => [exact.dk.view().into_dyn(), plain.dk.view().into_dyn()],
            What::Dq => [exact.dq.view().into_dyn(), plain.dq.view().into_dyn()],
            What::Dv => [exact.dv.view().into_dyn(), plain.dv.view().into_dyn()],
            What::Lse => [self.exact.lse.view().into_dyn(), self.fine.lse.view().into_dyn()],
            What::Out => [self.exact.out.view().into_dyn(), self.plain.out.view().into_dyn()],
        })
    }
}

/// A tensor that is judged by the error rule.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum What {
    /// `rowsum(dout * out) - dlse`.
    Delta,
    /// Gradient of the keys.
    Dk,
    /// Gradient of the queries.
    Dq,
    /// Gradient of the values.
    Dv,
    /// The log-sum.
    Lse,
    /// The output.
    Out,
}

impl What {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Delta, Self::Dk, Self::Dq, Self::Dv, Self::Lse, Self::Out];
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Delta => "delta",
            Self::Dk => "dk",
            Self::Dq => "dq",
            Self::Dv => "dv",
            Self::Lse => "lse",
            Self::Out => "out",
        })
    }
}

/// The answer in f64.
pub fn exact(problem: &Problem, incoming: Option<&Incoming>) -> Answer {
    attend::<f64>(problem, incoming, &|x| x)
}

/// Plain attention: f32 arithmetic, with scores, probabilities and results rounded to `dtype`.
pub fn plain(problem: &Problem, incoming: Option<&Incoming>, dtype: DType) -> Answer {
    attend::<f32>(problem, incoming, &|x| host::round(dtype, x))
}

/// The precision of a computation.
trait Real: NdFloat + Into<f64> {
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
}

/// Query rows computed at once, so that a long sequence needs a stretch of the score matrix only.
const STRETCH: usize = 256;

fn attend<T: Real>(problem: &Problem, incoming: Option<&Incoming>, round: &dyn Fn(T) -> T) -> Answer {
    let (batch, q_rows, heads, head_dim_v) =
        (problem.q.dim().0, problem.q.dim().1, problem.q.dim().2, problem.v.dim().3);
    let mut answer = Answer {
        out: Array4::zeros((batch, q_rows, heads, head_dim_v)),
        lse: Array3::zeros((batch, q_rows, heads)),
        gradients: incoming.map(|_| Gradients {
            dq: Array4::zeros(problem.q.raw_dim()),
            dk: Array4::zeros(problem.k.raw_dim()),
            dv: Array4::zeros(problem.v.raw_dim()),
            dsinks: problem.sinks.as_ref().map(|_| Array1::zeros(heads)),
            delta: Array3::zeros((batch, q_rows, heads)),
        }),
    };
    // Sums over rows and over the heads of a group are kept in T, and rounded once.
    let mut sums = Sums::<T> {
        dk: Array4::zeros(problem.k.raw_dim()),
        dv: Array4::zeros(problem.v.raw_dim()),
        dsinks: Array1::zeros(heads),
    };
    for b in 0..batch {
        for h in 0..heads {
            for first in (0..q_rows).step_by(STRETCH) {
                let rows = Rows { b, h, kv: problem.kv_head(h), first, end: q_rows.min(first + STRETCH) };
                stretch(problem, incoming, round, &rows, &mut answer, &mut sums);
            }
        }
    }
    if let Some(g) = &mut answer.gradients {
        g.dk = sums.dk.mapv(|x| round(x).into());
        g.dv = sums.dv.mapv(|x| round(x).into());
        g.dsinks = g.dsinks.as_ref().map(|_| sums.dsinks.mapv(Into::into));
    }
    answer
}

struct Sums<T> {
    dk: Array4<T>,
    dv: Array4<T>,
    dsinks: Array1<T>,
}

/// A stretch of query rows of one head of one batch row.
struct Rows {
    b: usize,
    h: usize,
    kv: usize,
    first: usize,
    end: usize,
}

fn stretch<T: Real>(
    problem: &Problem,
    incoming: Option<&Incoming>,
    round: &dyn Fn(T) -> T,
    rows: &Rows,
    answer: &mut Answer,
    sums: &mut Sums<T>,
) {
    let &Rows { b, h, kv, first, end } = rows;
    let lift = |x: ArrayView2<'_, f32>| x.mapv(|x| T::of(f64::from(x)));
    let q = lift(problem.q.slice(s![b, first..end, h, ..]));
    let k = lift(problem.k.slice(s![b, .., kv, ..]));
    let v = lift(problem.v.slice(s![b, .., kv, ..]));

    let Soft { x0, lse, p, w } = soften(problem, round, rows, &q, &k);
    let wp = (&w * &p).mapv(round);
    let out = wp.dot(&v).mapv(round);
    answer.out.slice_mut(s![b, first..end, h, ..]).assign(&out.mapv(Into::into));
    answer.lse.slice_mut(s![b, first..end, h]).assign(&lse.mapv(Into::into));

    let (Some(incoming), Some(gradients)) = (incoming, &mut answer.gradients) else { return };
    let dout = lift(incoming.dout.slice(s![b, first..end, h, ..]));
    let mut delta = (&dout * &out).sum_axis(ndarray::Axis(1));
    if let Some(dlse) = &incoming.dlse {
        delta -= &dlse.slice(s![b, first..end, h]).mapv(|x| T::of(f64::from(x)));
    }
    let mut ds = dout.dot(&v.t()).mapv(round) * &w - delta.view().insert_axis(ndarray::Axis(1));
    ds *= &p;
    if let Some(c) = problem.softcap {
        ds *= &x0.mapv(|x| T::one() - (x / T::of(c.into())) * (x / T::of(c.into())));
    }
    ds.mapv_inplace(round);
    let scale = T::of(problem.scale.into());
    let dq = (ds.dot(&k) * scale).mapv(round);
    gradients.dq.slice_mut(s![b, first..end, h, ..]).assign(&dq.mapv(Into::into));
    gradients.delta.slice_mut(s![b, first..end, h]).assign(&delta.mapv(Into::into));
    let mut dk = sums.dk.slice_mut(s![b, .., kv, ..]);
    dk += &(ds.t().dot(&q) * scale);
    let mut dv = sums.dv.slice_mut(s![b, .., kv, ..]);
    dv += &wp.t().dot(&dout);
    if let Some(sinks) = &problem.sinks {
        let sink = T::of(sinks[problem.head_first + h].into());
        for (lse, delta) in lse.iter().zip(&delta) {
            sums.dsinks[h] -= (sink - *lse).exp() * *delta;
        }
    }
}

/// Capped logits before ALiBi, log-sums, probabilities, and dropout weights (0 where the pair is not allowed).
struct Soft<T> {
    x0: Array2<T>,
    lse: Array1<T>,
    p: Array2<T>,
    w: Array2<T>,
}

fn soften<T: Real>(problem: &Problem, round: &dyn Fn(T) -> T, rows: &Rows, q: &Array2<T>, k: &Array2<T>) -> Soft<T> {
    let scale = T::of(problem.scale.into());
    let mut x0 = q.dot(&k.t()) * scale;
    if let Some(c) = problem.softcap {
        let c = T::of(c.into());
        x0.mapv_inplace(|x| c * (x / c).tanh());
    }
    x0.mapv_inplace(round);
    let head = problem.head_first + rows.h;
    let mut x = x0.clone();
    let mut w = Array2::<T>::zeros(x.raw_dim());
    for ((i, j), x) in x.indexed_iter_mut() {
        let Some((q_pos, k_pos)) = (problem.pair)(rows.b, rows.first + i, j) else {
            *x = T::neg_infinity();
            continue;
        };
        if let Some(slopes) = &problem.slopes {
            *x = round(*x - T::of(f64::from(slopes[head]) * (q_pos - k_pos).abs() as f64));
        }
        w[[i, j]] = match problem.dropout {
            Some((p, seed)) if !philox::keeps(p, seed, problem.batch_first + rows.b, head, q_pos, k_pos) => T::zero(),
            Some((p, _)) => T::one() / (T::one() - T::of(p.into())),
            None => T::one(),
        };
    }
    let sink = problem.sinks.as_ref().map(|sinks| T::of(sinks[head].into()));
    let lse: Array1<T> = x.outer_iter().map(|row| log_sum(row.iter().copied().chain(sink))).collect();
    let p = Array2::from_shape_fn(x.raw_dim(), |(i, j)| {
        if lse[i] == T::neg_infinity() { T::zero() } else { round((x[[i, j]] - lse[i]).exp()) }
    });
    Soft { x0, lse, p, w }
}

/// `ln sum exp(x)`; `-inf` of nothing.
fn log_sum<T: Real>(x: impl Iterator<Item = T> + Clone) -> T {
    let max = x.clone().fold(T::neg_infinity(), T::max);
    if max == T::neg_infinity() {
        return max;
    }
    max + x.fold(T::zero(), |sum, x| sum + (x - max).exp()).ln()
}

#[cfg(test)]
mod tests;
