//! Sequence-parallel problems: sharded, run forward and backward on every rank, unsharded and judged.

use longspan_hal::{Backend, DType, Device, Error, Extent, Extras, Seed, Spec, Strided};
use longspan_seqpar::{Gradients, Inputs, Layout, Mask, Mesh, OutputRows, Outputs, Plan, Problem, Trace, Usp, Work};
use ndarray::{Array3, Array4, Axis, concatenate, s};

use super::problem::{Memory, extent_of, lay, report};
use crate::bound::{Judge, judge_sinks};
use crate::host::Random;
use crate::oracle::{self, Answers, Incoming, What};
use crate::rank::{Failure, Rank, Tensor, array, check};

/// A problem and how it is cut.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Shapes and options; with backward.
    pub problem: Problem,
    /// Who holds which queries.
    pub q: Layout,
    /// Who holds which keys.
    pub k: Layout,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Whether the log-sum has a gradient.
    pub dlse: bool,
    /// How tensors lie.
    pub memory: Memory,
}

impl Setup {
    /// Self attention, dense, without dlse.
    pub fn new(problem: Problem, layout: Layout, mask: Mask) -> Self {
        let (problem, k) = (problem.with_backward(true), layout.clone());
        Self { problem, q: layout, k, mask, dlse: false, memory: Memory::Bshd }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        self.q.mesh()
    }

    fn extents(&self, q_rows: usize, k_rows: usize) -> [Extent; 4] {
        let p = &self.problem;
        [
            [p.batch, q_rows, p.heads, p.head_dim],
            [p.batch, k_rows, p.kv_heads, p.head_dim],
            [p.batch, k_rows, p.kv_heads, p.head_dim_v],
            [p.batch, q_rows, p.heads, p.head_dim_v],
        ]
    }
}

/// Host values of the whole problem; joint rows come after the sequence.
#[derive(Clone, Debug)]
pub struct Whole {
    /// q, k, v.
    pub qkv: [Array4<f32>; 3],
    /// Incoming gradients.
    pub incoming: Incoming,
    /// Of all heads.
    pub slopes: Vec<f32>,
    /// Of all heads.
    pub sinks: Vec<f32>,
    /// Of dropout.
    pub seed: u64,
}

impl Whole {
    /// Random values for `setup`: the same on every rank, if `random` is.
    pub fn random(setup: &Setup, random: &mut Random) -> Self {
        let p = &setup.problem;
        let [q, k, v, dout] = setup
            .extents(setup.q.seq() + p.joint, setup.k.seq() + p.joint)
            .map(|extent| random.tensor(p.dtype, extent));
        let (b, rows, heads, _) = dout.dim();
        let dlse = random.tensor(DType::F32, [b, rows, heads, 1]).remove_axis(Axis(3));
        let slopes = (0..heads).map(|h| 2f32.powf(-8.0 * (h + 1) as f32 / heads as f32)).collect();
        let sinks = (0..heads).map(|_| random.normal()).collect();
        let incoming = Incoming { dout, dlse: setup.dlse.then_some(dlse) };
        Self { qkv: [q, k, v], incoming, slopes, sinks, seed: random.bits() }
    }

    /// The oracle's problem.
    pub fn problem<'a>(&self, setup: &Setup, spec: &Spec, pair: oracle::Pair<'a>) -> oracle::Problem<'a> {
        let mut problem = oracle::Problem::new(spec, self.qkv.clone(), pair);
        problem.slopes = setup.problem.alibi.then(|| self.slopes.clone());
        problem.sinks = setup.problem.sinks.then(|| self.sinks.clone());
        problem.dropout = setup.problem.dropout.map(|d| (d, self.seed));
        problem
    }
}

/// Inputs and outputs of some rows on the device: of a shard, or of the joint tokens.
#[derive(Debug)]
pub struct Part<B: Backend> {
    qkv: [Tensor<B>; 3],
    dout: Tensor<B>,
    dlse: Option<Tensor<B>>,
    /// In the I/O dtype.
    pub out: Tensor<B>,
    lse: Tensor<B>,
    gradients: [Tensor<B>; 3],
}

/// Everything that one rank holds.
#[derive(Debug)]
pub struct Loaded<B: Backend> {
    /// This rank's rows of the sequence.
    pub shard: Part<B>,
    joint: Option<Part<B>>,
    slopes: Tensor<B>,
    sinks: Tensor<B>,
    dsinks: Tensor<B>,
    seed: u64,
}

/// The rows of `x` that `rank` holds.
fn shard(layout: &Layout, rank: u32, x: &Array4<f32>) -> Result<Array4<f32>, Error> {
    let sequence = x.slice(s![.., ..layout.seq(), .., ..]);
    let (batch, _, heads, dim) = sequence.dim();
    let flat: Vec<f32> = sequence.iter().copied().collect();
    array([batch, layout.rows(rank), heads, dim], layout.shard(rank, &flat, batch, heads * dim)?)
}

impl<B: Backend> Part<B> {
    fn new(
        rank: &Rank<B>,
        setup: &Setup,
        random: &mut Random,
        qkv: &[Array4<f32>; 3],
        [dout, dlse]: [Option<Array4<f32>>; 2],
    ) -> Result<Self, Error> {
        let dtype = setup.problem.dtype;
        let [b, rows, heads, _] = extent_of(&qkv[0]);
        let wide = [b, rows, heads, setup.problem.head_dim_v];
        let thin = Strided::dense_bhsd(DType::F32, [b, rows, heads, 1]);
        let mut put = |x: &Array4<f32>| rank.put(lay(setup.memory, dtype, extent_of(x), random)?, x);
        let inputs = [put(&qkv[0])?, put(&qkv[1])?, put(&qkv[2])?];
        let dout = put(&dout.unwrap_or_else(|| Array4::zeros((b, rows, heads, wide[3]))))?;
        let mut blank = |extent| rank.blank(lay(setup.memory, dtype, extent, random)?);
        let gradients = [blank(extent_of(&qkv[0]))?, blank(extent_of(&qkv[1]))?, blank(extent_of(&qkv[2]))?];
        let out = blank(wide)?;
        let dlse = dlse.map(|d| rank.put(thin, &d)).transpose()?;
        Ok(Self { qkv: inputs, dout, dlse, out, lse: rank.blank(thin)?, gradients })
    }

    /// Rows of the results and their gradients.
    ///
    /// # Errors
    /// As [`Loaded::inputs`].
    pub fn rows(&self) -> Result<OutputRows<'_, B::Device>, Error> {
        let dlse = self.dlse.as_ref().map(Tensor::view).transpose()?;
        Ok(OutputRows { out: self.out.view()?, lse: self.lse.view()?, dout: self.dout.view()?, dlse })
    }

    fn outputs(&self) -> [&Tensor<B>; 5] {
        let [dq, dk, dv] = &self.gradients;
        [&self.out, &self.lse, dq, dk, dv]
    }
}

impl<B: Backend> Loaded<B> {
    /// Uploads this rank's part of `whole`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(rank: &Rank<B>, setup: &Setup, whole: &Whole) -> Result<Self, Failure> {
        let (me, mut random) = (rank.index(), Random::new(rank.seed ^ (u64::from(rank.index()) << 7)));
        let [q, k, v] = &whole.qkv;
        let thin = |d: &Array3<f32>| d.clone().insert_axis(Axis(3));
        let (dout, dlse) = (&whole.incoming.dout, whole.incoming.dlse.as_ref().map(thin));
        let own = [shard(&setup.q, me, q)?, shard(&setup.k, me, k)?, shard(&setup.k, me, v)?];
        let own_dlse = dlse.as_ref().map(|d| shard(&setup.q, me, d)).transpose()?;
        let shard = Part::new(rank, setup, &mut random, &own, [Some(shard(&setup.q, me, dout)?), own_dlse])?;
        let joint = if setup.problem.joint > 0 {
            let tail = |x: &Array4<f32>, seq: usize| x.slice(s![.., seq.., .., ..]).to_owned();
            let (n, m) = (setup.q.seq(), setup.k.seq());
            let rows = [tail(q, n), tail(k, m), tail(v, m)];
            Some(Part::new(rank, setup, &mut random, &rows, [Some(tail(dout, n)), dlse.map(|d| tail(&d, n))])?)
        } else {
            None
        };
        let heads = Strided::dense(DType::F32, [1, 1, setup.problem.heads, 1]);
        let per_head = |x: &[f32]| rank.put(heads, &array(heads.extent(), x.to_vec())?);
        let (slopes, sinks) = (per_head(&whole.slopes)?, per_head(&whole.sinks)?);
        Ok(Self { shard, joint, slopes, sinks, dsinks: rank.blank(heads)?, seed: whole.seed })
    }

    /// What a call reads.
    ///
    /// # Errors
    /// None, as each fits its buffer.
    pub fn inputs(&self, problem: &Problem) -> Result<Inputs<'_, B::Device>, Error> {
        let extras = Extras {
            alibi_slopes: if problem.alibi { Some(self.slopes.view()?) } else { None },
            sinks: if problem.sinks { Some(self.sinks.view()?) } else { None },
            seed: problem.dropout.map(|_| Seed::Host(self.seed)),
        };
        let [q, k, v] = &self.shard.qkv;
        let joint = match &self.joint {
            Some(j) => Some([j.qkv[0].view()?, j.qkv[1].view()?, j.qkv[2].view()?]),
            None => None,
        };
        Ok(Inputs { q: q.view()?, k: k.view()?, v: v.view()?, joint, extras })
    }

    /// What a forward writes.
    ///
    /// # Errors
    /// As [`Loaded::inputs`].
    pub fn forward_into(&self) -> Result<Outputs<'_, B::Device>, Error> {
        let joint = match &self.joint {
            Some(j) => Some([j.out.view_mut()?, j.lse.view_mut()?]),
            None => None,
        };
        Ok(Outputs { out: self.shard.out.view_mut()?, lse: self.shard.lse.view_mut()?, joint })
    }

    /// What a backward writes.
    ///
    /// # Errors
    /// As [`Loaded::inputs`].
    pub fn backward_into(&self, problem: &Problem) -> Result<Gradients<'_, B::Device>, Error> {
        let joint = match &self.joint {
            Some(j) => Some([j.gradients[0].view_mut()?, j.gradients[1].view_mut()?, j.gradients[2].view_mut()?]),
            None => None,
        };
        let [dq, dk, dv] = &self.shard.gradients;
        let dsinks = if problem.sinks { Some(self.dsinks.view_mut()?) } else { None };
        Ok(Gradients { dq: dq.view_mut()?, dk: dk.view_mut()?, dv: dv.view_mut()?, joint, dsinks })
    }

    /// Queues a forward.
    ///
    /// # Errors
    /// Those of [`Usp::forward`].
    pub fn forward(&self, rank: &Rank<B>, usp: &Usp<B>, trace: Option<&mut Trace<B::Device>>) -> Result<(), Error> {
        usp.forward(&rank.member, &rank.stream, &self.inputs(usp.plan().problem())?, &self.forward_into()?, trace)
    }

    /// Queues a backward.
    ///
    /// # Errors
    /// Those of [`Usp::backward`].
    pub fn backward(&self, rank: &Rank<B>, usp: &Usp<B>, trace: Option<&mut Trace<B::Device>>) -> Result<(), Error> {
        let problem = usp.plan().problem();
        let gradients = self.backward_into(problem)?;
        let joint = self.joint.as_ref().map(Part::rows).transpose()?;
        let inputs = self.inputs(problem)?;
        usp.backward(&rank.member, &rank.stream, &inputs, &self.shard.rows()?, joint.as_ref(), &gradients, trace)
    }

    /// Every output of this rank: the shard's, the joint rows', dsinks.
    pub fn outputs(&self) -> Vec<&Tensor<B>> {
        let parts = [Some(&self.shard), self.joint.as_ref()];
        parts.into_iter().flatten().flat_map(Part::outputs).chain([&self.dsinks]).collect()
    }

    /// The values of every output, as little-endian f32, in the order of `outputs`.
    ///
    /// # Errors
    /// Those of the device and the stream; [`Failure::Wrong`] if memory around an output was written.
    pub fn results(&self, rank: &Rank<B>) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        for (i, tensor) in self.outputs().into_iter().enumerate() {
            rank.check_around(&format!("output {i}"), tensor)?;
            bytes.extend(rank.read(tensor)?.iter().flat_map(|x| x.to_le_bytes()));
        }
        Ok(bytes)
    }
}

/// Prepares `setup` on this rank.
///
/// # Errors
/// [`Failure::Refused`] where the backend refuses and `loaded` stayed untouched; errors of [`Usp::prepare`].
pub fn prepare<B: Backend>(rank: &Rank<B>, setup: &Setup, loaded: &Loaded<B>) -> Result<Usp<B>, Failure> {
    rank.step("prepare", 0);
    let plan = Plan::new(&setup.problem, &setup.q, &setup.k, &setup.mask, rank.index())?;
    match Usp::prepare(&rank.member, &rank.stream, plan, |bytes| rank.alloc(bytes)) {
        Ok(usp) => Ok(usp),
        Err(error @ Error::Unsupported { .. }) => {
            for tensor in loaded.outputs() {
                rank.check_untouched("an output of a refused call", tensor)?;
            }
            Err(Failure::Refused(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs `setup` forward and backward and judges the results on rank 0; bytes sent must equal the plan's table, and a run takes
/// no device memory beside the workspace.
///
/// # Errors
/// [`Failure::Refused`], [`Failure::Wrong`], errors of any call.
pub fn run<B: Backend>(rank: &mut Rank<B>, setup: &Setup) -> Result<(), Failure> {
    let whole = Whole::random(setup, &mut rank.random());
    let loaded = Loaded::new(rank, setup, &whole)?;
    let usp = prepare(rank, setup, &loaded)?;
    rank.synchronize()?;
    let held = rank.device.memory()?.used;
    rank.step("forward", 0);
    let mut traces = [Trace::default(), Trace::default()];
    loaded.forward(rank, &usp, Some(&mut traces[0]))?;
    rank.step("backward", 0);
    loaded.backward(rank, &usp, Some(&mut traces[1]))?;
    rank.synchronize()?;
    let after = rank.device.memory()?.used;
    check(after <= held, || format!("a run took {} bytes of device memory for itself", after - held))?;
    for (trace, backward) in traces.iter().zip([false, true]) {
        let sent = trace.total(&rank.device, Work::Exchange)?.1;
        let table: u64 = usp.plan().traffic(backward)?.iter().map(|t| t.bytes).sum();
        check(sent == table, || format!("backward {backward}: {sent} bytes were sent, the table says {table}"))?;
    }
    let results = loaded.results(rank)?;
    if let Some(all) = rank.gather(results)? {
        let all: Vec<Vec<f32>> = all.iter().map(|bytes| crate::host::decode(DType::F32, bytes)).collect();
        judge_all(rank, setup, &whole, &all)?;
    }
    rank.share(Vec::new()).map(drop)
}

/// The whole results, put together from those of all ranks.
struct Together {
    tensors: [Array4<f32>; 5],
    dsinks: Vec<f32>,
}

fn together(setup: &Setup, all: &[Vec<f32>]) -> Result<Together, Failure> {
    let p = &setup.problem;
    let shapes = |q_rows, k_rows| {
        let [q, k, v, out] = setup.extents(q_rows, k_rows);
        [out, [p.batch, q_rows, p.heads, 1], q, k, v]
    };
    let mut at = vec![0; all.len()];
    let mut take = |rank: usize, n: usize| -> Result<Vec<f32>, Failure> {
        let values =
            all[rank].get(at[rank]..at[rank] + n).ok_or_else(|| Failure::wrong("a rank gave too few values"))?;
        at[rank] += n;
        Ok(values.to_vec())
    };
    let layouts = [&setup.q, &setup.q, &setup.q, &setup.k, &setup.k];
    let mut sequence = Vec::new();
    for (i, layout) in layouts.into_iter().enumerate() {
        let mut shards = Vec::new();
        for r in 0..all.len() {
            let [b, s, h, d] = shapes(setup.q.rows(r as u32), setup.k.rows(r as u32))[i];
            shards.push(take(r, b * s * h * d)?);
        }
        let [b, s, h, d] = shapes(setup.q.seq(), setup.k.seq())[i];
        sequence.push(array([b, s, h, d], layout.unshard(&shards, b, h * d)?)?);
    }
    let mut replica = |n: usize| -> Result<Vec<f32>, Failure> {
        let first = take(0, n)?;
        for r in 1..all.len() {
            let other = take(r, n)?;
            let same = first.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            check(same, || format!("ranks 0 and {r} have different replicas"))?;
        }
        Ok(first)
    };
    if p.joint > 0 {
        for (i, tensor) in sequence.iter_mut().enumerate() {
            let [b, s, h, d] = shapes(p.joint, p.joint)[i];
            let joint = array([b, s, h, d], replica(b * s * h * d)?)?;
            *tensor =
                concatenate(Axis(1), &[tensor.view(), joint.view()]).map_err(|e| Failure::wrong(e.to_string()))?;
        }
    }
    let dsinks = replica(p.heads)?;
    let tensors = <[Array4<f32>; 5]>::try_from(sequence).map_err(|_| Failure::wrong("five tensors were made"))?;
    Ok(Together { tensors, dsinks })
}

fn judge_all<B: Backend>(rank: &mut Rank<B>, setup: &Setup, whole: &Whole, all: &[Vec<f32>]) -> Result<(), Failure> {
    rank.step("judge", 0);
    let Together { tensors: [out, lse, dq, dk, dv], dsinks } = together(setup, all)?;
    let p = &setup.problem;
    let spec = p.spec([out.dim().1, dk.dim().1]);
    let (n, m) = (setup.q.seq(), setup.k.seq());
    let pair =
        |_: usize, i: usize, j: usize| (i >= n || j >= m || setup.mask.allows(i, j)).then_some((i as i64, j as i64));
    let answers = |whole: &Whole| Answers::new(&whole.problem(setup, &spec, &pair), &whole.incoming, p.dtype);
    let seed = rank.random().bits();
    let again = |draw: u64| answers(&Whole::random(setup, &mut Random::new(seed.wrapping_add(draw))));
    let mut judge = Judge::new(&spec, answers(whole), &again)?;
    let wide = |x: Array4<f32>| x.into_iter().map(f64::from);
    let mut judged = vec![
        ("out", judge.judge(What::Out, wide(out.clone()))?),
        ("lse", judge.judge(What::Lse, wide(lse))?),
        ("dq", judge.judge(What::Dq, wide(dq))?),
        ("dk", judge.judge(What::Dk, wide(dk))?),
        ("dv", judge.judge(What::Dv, wide(dv))?),
    ];
    if p.sinks {
        let lse = &judge.answers().exact.lse;
        judged.push(("dsinks", judge_sinks(&dsinks, &whole.sinks, &out, lse, &whole.incoming)?));
    }
    report(rank, judged);
    Ok(())
}
