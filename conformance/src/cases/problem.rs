//! One-rank attention problems: what is computed, how it lies in memory, in which calls; run and judged.

use longspan_hal::{
    Attention, Backend, Backward, DType, Device, Error, Extent, Extras, Forward, Gradient, Partial, Prepare, Seed,
    Slice, Slices, Spec, Stage, Store, Strided,
};
use ndarray::{Array4, Axis, s};

use crate::bound::{Judge, Judged, judge_sinks};
use crate::host::{Random, random_strided, round};
use crate::oracle::{self, Answers, Incoming, Problem, What};
use crate::rank::{Buffer, Failure, Rank, Tensor, check};

/// How tensors lie.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Memory {
    /// `[batch, heads, seq, dim]`.
    Bhsd,
    /// `[batch, seq, heads, dim]`; with one batch row also THD.
    Bshd,
    /// q, k and v are parts of one `[batch, seq, heads + 2 kv_heads, dim]`.
    Packed,
    /// Any order, with gaps.
    Random,
}

/// How gradients are stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Gradients {
    /// Added to random f32 numbers, one call a piece.
    Add,
    /// Written in the I/O dtype.
    Narrow,
    /// Written in f32 by the first piece, added to by the others.
    Wide,
}

/// A problem.
#[derive(Clone, Debug)]
pub struct Config {
    /// Shapes and options; `partial` and `accumulate` follow from the other fields.
    pub spec: Spec,
    /// The mask.
    pub slices: Vec<Slice>,
    /// How tensors lie.
    pub memory: Memory,
    /// Number of forward calls (and backward calls, unless gradients are narrow).
    pub pieces: usize,
    /// How gradients are stored.
    pub gradients: Gradients,
    /// Whether the log-sum has a gradient.
    pub dlse: bool,
    /// Whether one element of q, k and v in a thousand has N(0, 100) added (Shah et al., FlashAttention-3, 2024, section 4.3).
    pub outliers: bool,
}

impl Config {
    /// Dense BSHD, one call, narrow gradients.
    pub fn new(spec: Spec, slices: Vec<Slice>) -> Self {
        Self {
            spec,
            slices,
            memory: Memory::Bshd,
            pieces: 1,
            gradients: Gradients::Narrow,
            dlse: false,
            outliers: false,
        }
    }

    /// Sets what follows: `partial` and `accumulate`.
    pub fn settle(&mut self) {
        self.spec.partial = self.pieces > 1;
        self.spec.accumulate = self.gradients != Gradients::Narrow;
        let s = &self.spec;
        if self.memory == Memory::Packed && (s.q_rows != s.k_rows || s.head_dim != s.head_dim_v) {
            self.memory = Memory::Bhsd;
        }
    }

    /// Its options in words that expectation patterns can name.
    pub fn words(&self) -> String {
        let s = &self.spec;
        let mut words = vec![s.dtype.to_string()];
        let options = [
            ("partial", s.partial),
            ("accumulate", s.accumulate),
            ("softcap", s.softcap.is_some()),
            ("alibi", s.alibi),
            ("sinks", s.sinks),
            ("dropout", s.dropout.is_some()),
            ("dlse", self.dlse),
            ("deterministic", s.deterministic),
            ("mla", s.head_dim != s.head_dim_v),
        ];
        words.extend(options.iter().filter(|(_, on)| *on).map(|(word, _)| (*word).to_owned()));
        words.join("-")
    }

    /// All of it, for the report.
    pub fn describe(&self) -> String {
        let s = &self.spec;
        format!(
            "batch {} rows {}x{} heads {}:{} (from {} of {}, groups of {}) dim {}/{} {} slices, {:?}, {} pieces, {:?}",
            s.batch,
            s.q_rows,
            s.k_rows,
            s.heads,
            s.kv_heads,
            s.head_first,
            s.heads_total,
            s.group,
            s.head_dim,
            s.head_dim_v,
            self.slices.len(),
            self.memory,
            self.pieces,
            self.gradients
        )
    }
}

/// Positions of every pair that slices select: the mask as the oracle wants it.
#[derive(Debug)]
pub struct Grid {
    rows: [usize; 2],
    pairs: Vec<Option<(i64, i64)>>,
}

impl Grid {
    /// The pairs of `slices`.
    pub fn new(spec: &Spec, slices: &[Slice]) -> Self {
        let rows = [spec.q_rows, spec.k_rows];
        let mut pairs = vec![None; spec.batch * rows[0] * rows[1]];
        for s in slices {
            for q in s.q.clone() {
                for k in s.k.clone() {
                    let (i, j) = (i64::from(q - s.q.start), i64::from(k - s.k.start));
                    if (s.lo..=s.hi).contains(&(j - i)) {
                        let at = (s.batch as usize * rows[0] + q as usize) * rows[1] + k as usize;
                        pairs[at] = Some((s.q_pos + i * s.q_step, s.k_pos + j * s.k_step));
                    }
                }
            }
        }
        Self { rows, pairs }
    }

    /// The positions of a pair.
    pub fn of(&self, b: usize, q: usize, k: usize) -> Option<(i64, i64)> {
        self.pairs[(b * self.rows[0] + q) * self.rows[1] + k]
    }
}

/// Host values of a problem.
#[derive(Clone, Debug)]
pub struct Values {
    /// q, k, v.
    pub qkv: [Array4<f32>; 3],
    /// Incoming gradients.
    pub incoming: Incoming,
    /// ALiBi slopes of all heads.
    pub slopes: Vec<f32>,
    /// Sinks of all heads.
    pub sinks: Vec<f32>,
    /// Dropout seed.
    pub seed: u64,
}

impl Values {
    /// Random values for `config`.
    pub fn random(config: &Config, random: &mut Random) -> Self {
        let s = &config.spec;
        let mut q = random.tensor(s.dtype, [s.batch, s.q_rows, s.heads, s.head_dim]);
        let mut k = random.tensor(s.dtype, [s.batch, s.k_rows, s.kv_heads, s.head_dim]);
        let mut v = random.tensor(s.dtype, [s.batch, s.k_rows, s.kv_heads, s.head_dim_v]);
        if config.outliers {
            for x in [&mut q, &mut k, &mut v].into_iter().flatten() {
                if random.one_in(1000) {
                    *x = round(s.dtype, *x + 10.0 * random.normal());
                }
            }
        }
        let dout = random.tensor(s.dtype, [s.batch, s.q_rows, s.heads, s.head_dim_v]);
        let dlse = random.tensor(DType::F32, [s.batch, s.q_rows, s.heads, 1]).remove_axis(Axis(3));
        let slopes = (0..s.heads_total).map(|h| 2f32.powf(-8.0 * (h + 1) as f32 / s.heads_total as f32)).collect();
        let sinks = (0..s.heads_total).map(|_| random.normal()).collect();
        let incoming = Incoming { dout, dlse: config.dlse.then_some(dlse) };
        Self { qkv: [q, k, v], incoming, slopes, sinks, seed: random.bits() }
    }

    /// The oracle's problem.
    pub fn problem<'a>(&self, spec: &Spec, pair: oracle::Pair<'a>) -> Problem<'a> {
        let mut problem = Problem::new(spec, self.qkv.clone(), pair);
        problem.slopes = spec.alibi.then(|| self.slopes.clone());
        problem.sinks = spec.sinks.then(|| self.sinks.clone());
        problem.dropout = spec.dropout.map(|p| (p, self.seed));
        problem
    }
}

/// The problem on the device: inputs with NaN in every row that no slice selects, outputs poisoned.
#[derive(Debug)]
pub struct Loaded<B: Backend> {
    /// q, k, v.
    pub qkv: [Tensor<B>; 3],
    /// Incoming gradient of `out`.
    pub dout: Tensor<B>,
    /// Incoming gradient of the log-sum.
    pub dlse: Option<Tensor<B>>,
    slopes: Tensor<B>,
    sinks: Tensor<B>,
    seed: u64,
}

/// A thin f32 tensor that lies as `[batch, heads, rows]`.
pub fn thin(spec: &Spec) -> Strided {
    Strided::dense_bhsd(DType::F32, [spec.batch, spec.q_rows, spec.heads, 1])
}

impl<B: Backend> Loaded<B> {
    /// Uploads `values`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(
        rank: &Rank<B>,
        config: &Config,
        grid: &Grid,
        values: &Values,
        random: &mut Random,
    ) -> Result<Self, Failure> {
        let s = &config.spec;
        let [mut q, mut k, mut v] = values.qkv.clone();
        for b in 0..s.batch {
            for i in (0..s.q_rows).filter(|&i| (0..s.k_rows).all(|j| grid.of(b, i, j).is_none())) {
                q.slice_mut(s![b, i, .., ..]).fill(f32::NAN);
            }
            for j in (0..s.k_rows).filter(|&j| (0..s.q_rows).all(|i| grid.of(b, i, j).is_none())) {
                k.slice_mut(s![b, j, .., ..]).fill(f32::NAN);
                v.slice_mut(s![b, j, .., ..]).fill(f32::NAN);
            }
        }
        let qkv = if config.memory == Memory::Packed {
            let heads = s.heads + 2 * s.kv_heads;
            let packed = rank.blank(Strided::dense(s.dtype, [s.batch, s.q_rows, heads, s.head_dim]))?;
            let cuts = [0..s.heads, s.heads..s.heads + s.kv_heads, s.heads + s.kv_heads..heads];
            let part = |cut| Ok::<_, Error>(Tensor { buffer: packed.buffer.clone(), at: packed.at.narrow(2, cut)? });
            let [a, b, c] = cuts.map(part);
            let parts = [a?, b?, c?];
            for (part, values) in parts.iter().zip([&q, &k, &v]) {
                rank.write(part, values)?;
            }
            parts
        } else {
            let mut put = |x: &Array4<f32>| rank.put(lay(config.memory, s.dtype, extent_of(x), random)?, x);
            [put(&q)?, put(&k)?, put(&v)?]
        };
        let dout = &values.incoming.dout;
        let dout = rank.put(lay(config.memory, s.dtype, extent_of(dout), random)?, dout)?;
        let dlse = values.incoming.dlse.as_ref().map(|d| rank.put(thin(s), &d.clone().insert_axis(Axis(3))));
        let heads = Strided::dense(DType::F32, [1, 1, s.heads_total, 1]);
        let per_head = |x: &[f32]| rank.put(heads, &crate::rank::array(heads.extent(), x.to_vec())?);
        let (slopes, sinks) = (per_head(&values.slopes)?, per_head(&values.sinks)?);
        Ok(Self { qkv, dout, dlse: dlse.transpose()?, slopes, sinks, seed: values.seed })
    }

    /// Inputs of the options of `spec`.
    ///
    /// # Errors
    /// None, in practice.
    pub fn extras(&self, spec: &Spec) -> Result<Extras<'_, B::Device>, Error> {
        Ok(Extras {
            alibi_slopes: if spec.alibi { Some(self.slopes.view()?) } else { None },
            sinks: if spec.sinks { Some(self.sinks.view()?) } else { None },
            seed: spec.dropout.map(|_| Seed::Host(self.seed)),
        })
    }
}

/// Sizes of an array.
pub fn extent_of<T>(x: &Array4<T>) -> Extent {
    let (b, s, h, d) = x.dim();
    [b, s, h, d]
}

/// Where a tensor lies.
///
/// # Errors
/// [`Error::Invalid`] on overflow.
pub fn lay(memory: Memory, dtype: DType, extent: Extent, random: &mut Random) -> Result<Strided, Error> {
    match memory {
        Memory::Bhsd => Ok(Strided::dense_bhsd(dtype, extent)),
        Memory::Bshd | Memory::Packed => Ok(Strided::dense(dtype, extent)),
        Memory::Random => {
            let offset = random.below(20);
            random_strided(random, dtype, offset, extent)
        }
    }
}

/// Outputs of a problem.
#[derive(Debug)]
pub struct Outputs<B: Backend> {
    /// In the I/O dtype.
    pub out: Tensor<B>,
    /// f32, thin.
    pub lse: Tensor<B>,
}

impl<B: Backend> Outputs<B> {
    /// Poisoned.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(rank: &Rank<B>, config: &Config, random: &mut Random) -> Result<Self, Error> {
        let s = &config.spec;
        let out = lay(config.memory, s.dtype, [s.batch, s.q_rows, s.heads, s.head_dim_v], random)?;
        Ok(Self { out: rank.blank(out)?, lse: rank.blank(thin(s))? })
    }
}

/// Plans a list of slices; scratch included.
type Planned<B> = (<<B as Backend>::Attention as Attention<<B as Backend>::Device>>::Plan, Option<Buffer<B>>);

/// Plans `slices` of `spec`.
///
/// # Errors
/// Those of the backend.
pub fn plan<B: Backend>(rank: &Rank<B>, spec: &Spec, slices: &[Slice]) -> Result<Planned<B>, Error> {
    let plan = rank.attention.plan(&rank.stream, spec, &Slices::new(spec, slices.iter().cloned())?)?;
    let bytes = rank.attention.scratch_bytes(&plan);
    let scratch = if bytes > 0 { Some(rank.device.alloc(bytes)?) } else { None };
    if let Some(scratch) = &scratch {
        rank.poison(scratch)?;
    }
    Ok((plan, scratch))
}

/// Queues the forward of the planned pieces.
///
/// # Errors
/// Those of the backend.
pub fn forward<B: Backend>(
    rank: &Rank<B>,
    spec: &Spec,
    plans: &[Planned<B>],
    loaded: &Loaded<B>,
    outputs: &Outputs<B>,
) -> Result<(), Failure> {
    let acc = Strided::dense(DType::F32, [spec.batch, spec.q_rows, spec.heads, spec.head_dim_v]);
    let [acc, m, l] = [acc, thin(spec), thin(spec)].map(|at| rank.blank(at));
    let (acc, m, l) = (acc?, m?, l?);
    for (i, (plan, scratch)) in plans.iter().enumerate() {
        rank.step("forward", i as u32);
        let partial = Partial { acc: acc.view_mut()?, m: m.view_mut()?, l: l.view_mut()? };
        let (out, lse) = (outputs.out.view_mut()?, outputs.lse.view_mut()?);
        let stage = match (i, plans.len()) {
            (_, 1) => Stage::All { out, lse },
            (0, _) => Stage::Start(partial),
            (i, n) if i + 1 == n => Stage::Finish { partial, out, lse },
            _ => Stage::Continue(partial),
        };
        let [q, k, v] = [loaded.qkv[0].view()?, loaded.qkv[1].view()?, loaded.qkv[2].view()?];
        let args = Forward::new(spec, [q, k, v], stage, loaded.extras(spec)?, scratch.as_ref())?;
        rank.attention.forward(&rank.stream, plan, &args)?;
    }
    for (what, tensor) in [("acc", &acc), ("m", &m), ("l", &l), ("out", &outputs.out), ("lse", &outputs.lse)] {
        rank.check_around(what, tensor)?;
    }
    Ok(())
}

/// Gradients on the device.
#[derive(Debug)]
pub struct Backed<B: Backend> {
    /// dq, dk, dv.
    pub gradients: [Tensor<B>; 3],
    /// f32, thin.
    pub delta: Tensor<B>,
    /// f32 `[1, 1, heads, 1]`.
    pub dsinks: Tensor<B>,
    /// What was in the gradients before.
    pub before: [Array4<f32>; 3],
}

/// Queues the backward of the planned pieces.
///
/// # Errors
/// Those of the backend.
pub fn backward<B: Backend>(
    rank: &Rank<B>,
    config: &Config,
    plans: &[Planned<B>],
    loaded: &Loaded<B>,
    outputs: &Outputs<B>,
    random: &mut Random,
) -> Result<Backed<B>, Failure> {
    let s = &config.spec;
    rank.step("backward", 0);
    let delta = rank.blank(thin(s))?;
    let dsinks = rank.blank(Strided::dense(DType::F32, [1, 1, s.heads, 1]))?;
    let sinks = if s.sinks { Some((loaded.sinks.view()?, dsinks.view_mut()?)) } else { None };
    let dlse = loaded.dlse.as_ref().map(Tensor::view).transpose()?;
    let (out, dout, lse) = (outputs.out.view()?, loaded.dout.view()?, outputs.lse.view()?);
    let args = Prepare::new(s, [out, dout], lse, dlse, delta.view_mut()?, sinks)?;
    rank.attention.backward_prepare(&rank.stream, s, &args)?;

    let dtype = if config.gradients == Gradients::Narrow { s.dtype } else { DType::F32 };
    let extents = [0, 1, 2].map(|i| loaded.qkv[i].at.extent());
    let mut before = extents.map(|e| Array4::<f32>::zeros((e[0], e[1], e[2], e[3])));
    let mut tensors = Vec::new();
    for (i, (extent, before)) in extents.into_iter().zip(&mut before).enumerate() {
        let tensor = rank.blank(lay(config.memory, dtype, extent, random)?)?;
        if config.gradients == Gradients::Add && !(i == 0 && s.sums_dq()) {
            *before = random.tensor(DType::F32, extent);
            rank.write(&tensor, before)?;
        }
        tensors.push(tensor);
    }
    for (i, (plan, scratch)) in plans.iter().enumerate() {
        rank.step("backward", i as u32 + 1);
        let into = |n: usize| -> Result<_, Failure> {
            let written = i == 0 && (config.gradients != Gradients::Add || (n == 0 && s.sums_dq()));
            Ok(Gradient { into: tensors[n].view_mut()?, store: if written { Store::Write } else { Store::Add } })
        };
        let gradients = [into(0)?, into(1)?, into(2)?];
        let [q, k, v] = [loaded.qkv[0].view()?, loaded.qkv[1].view()?, loaded.qkv[2].view()?];
        let rows = [dout, lse, delta.view()?];
        let args = Backward::new(s, [q, k, v], rows, gradients, loaded.extras(s)?, scratch.as_ref())?;
        rank.attention.backward(&rank.stream, plan, &args)?;
    }
    if s.sums_dq() {
        rank.check_around("sums of dq", &tensors[0])?;
        let dq = rank.blank(lay(config.memory, s.dtype, extents[0], random)?)?;
        rank.attention.finish_dq(&rank.stream, s, dq.view_mut()?, tensors[0].view()?)?;
        tensors[0] = dq;
    }
    for (what, tensor) in ["dq", "dk", "dv"].iter().zip(&tensors) {
        rank.check_around(what, tensor)?;
    }
    rank.check_around("delta", &delta)?;
    let Ok(gradients) = <[Tensor<B>; 3]>::try_from(tensors) else {
        return Err(Failure::wrong("three gradients were made"));
    };
    Ok(Backed { gradients, delta, dsinks, before })
}

/// Runs `config` forward and backward and judges everything against the oracle.
///
/// # Errors
/// [`Failure::Refused`] where the backend refuses rightly; [`Failure::Wrong`]; errors of the backend.
pub fn run<B: Backend>(rank: &mut Rank<B>, config: &Config) -> Result<(), Failure> {
    let s = &config.spec;
    let mut random = rank.random();
    if let Err(error) = rank.attention.supports(s) {
        return Err(refusal(rank, config, error)?);
    }
    let grid = Grid::new(s, &config.slices);
    let values = Values::random(config, &mut random);
    let loaded = Loaded::new(rank, config, &grid, &values, &mut random)?;
    let outputs = Outputs::new(rank, config, &mut random)?;
    let pieces = super::slices::pieces(&config.slices, config.pieces, &mut random);
    let plans = pieces.iter().map(|p| plan(rank, s, p)).collect::<Result<Vec<_>, _>>()?;
    forward(rank, s, &plans, &loaded, &outputs)?;
    let whole = if config.gradients == Gradients::Narrow && plans.len() > 1 {
        Some(plan(rank, s, &config.slices)?)
    } else {
        None
    };
    let back = whole.as_ref().map_or(&plans[..], std::slice::from_ref);
    let backed = backward(rank, config, back, &loaded, &outputs, &mut random)?;

    rank.step("judge", 0);
    judge_all(rank, config, &grid, &values, &outputs, &backed)
}

fn judge_all<B: Backend>(
    rank: &mut Rank<B>,
    config: &Config,
    grid: &Grid,
    values: &Values,
    outputs: &Outputs<B>,
    backed: &Backed<B>,
) -> Result<(), Failure> {
    let spec = &config.spec;
    let pair = |b, i, j| grid.of(b, i, j);
    let answers = |values: &Values| Answers::new(&values.problem(spec, &pair), &values.incoming, spec.dtype);
    let seed = rank.random().bits();
    let again = |draw: u64| answers(&Values::random(config, &mut Random::new(seed.wrapping_add(draw))));
    let mut judge = Judge::new(spec, answers(values), &again)?;
    let wide = |x: Array4<f32>| x.into_iter().map(f64::from);
    let mut judged = vec![
        ("out", judge.judge(What::Out, wide(rank.read(&outputs.out)?))?),
        ("lse", judge.judge(What::Lse, wide(rank.read(&outputs.lse)?))?),
        ("delta", judge.judge(What::Delta, wide(rank.read(&backed.delta)?))?),
    ];
    for (i, (name, what)) in [("dq", What::Dq), ("dk", What::Dk), ("dv", What::Dv)].into_iter().enumerate() {
        let got = rank.read(&backed.gradients[i])?;
        let got = got.iter().zip(&backed.before[i]).map(|(x, before)| f64::from(*x) - f64::from(*before));
        judged.push((name, judge.judge(what, got)?));
    }
    if spec.sinks {
        rank.check_around("dsinks", &backed.dsinks)?;
        let got: Vec<f32> = rank.read(&backed.dsinks)?.into_iter().collect();
        let (sinks, lse) = (&values.sinks[spec.head_first..], &judge.answers().exact.lse);
        judged.push(("dsinks", judge_sinks(&got, sinks, &rank.read(&outputs.out)?, lse, &values.incoming)?));
    }
    report(rank, judged);
    Ok(())
}

/// Notes how much of its bound each tensor used.
pub fn report<B: Backend>(rank: &mut Rank<B>, judged: Vec<(&str, Judged)>) {
    for (what, judged) in judged {
        rank.figure(format!("{what} used of bound"), judged.used());
        rank.figure(format!("{what} max error"), judged.errors.max);
    }
}

/// Checks a refusal: an [`Error::Unsupported`] that names the option, and [`Attention::plan`] refuses as well.
///
/// # Errors
/// [`Failure::Wrong`] if the refusal is not right.
pub fn refusal<B: Backend>(rank: &Rank<B>, config: &Config, error: Error) -> Result<Failure, Failure> {
    let Error::Unsupported { backend, what, instead } = &error else {
        return Err(Failure::wrong(format!("`supports` must say Unsupported, it says: {error}")));
    };
    check(*backend == B::NAME || !backend.is_empty(), || "the refusal does not name the backend".into())?;
    check(!what.is_empty() && !instead.is_empty(), || {
        format!("the refusal says not what, or not what instead: {error}")
    })?;
    match plan(rank, &config.spec, &config.slices) {
        Err(Error::Unsupported { .. }) => Ok(Failure::Refused(error.to_string())),
        Err(other) => Err(Failure::wrong(format!("`supports` says `{error}`, `plan` says `{other}`"))),
        Ok(_) => Err(Failure::wrong(format!("`supports` says `{error}`, `plan` accepts"))),
    }
}
