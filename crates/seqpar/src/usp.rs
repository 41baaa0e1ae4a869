//! Unified sequence parallelism: Ulysses over heads x ring over the sequence (Fang and Zhao, 2405.07719).
//!
//! ```text
//! forward:  gather(0)
//!           for each head group g:
//!               ring over the blocks of g            beside it: gather(g + 1)
//!               give back out, lse of g              beside it: the ring of g + 1, or own rows of the last group
//!           share joint rows
//! backward: delta = rowsum(dout * out) - dlse, dsinks: on the shard, so `out` never travels; beside it: gather(0)
//!           gather lse and delta, of all head groups
//!           the same loop with dout gathered too, and dq, dk, dv given back
//! ```
//!
//! With U = 1 and no joint tokens nothing is gathered and kernels read the caller's tensors; with R = 1 nothing hops.
//! Everything is queued; the caller's stream alone orders it. The sequence of trait calls depends on plan and problem only.

use std::cell::RefCell;

use longspan_hal::{
    Attention, Backend, Collective, DType, Device, Error, Extent, Extras, Prepare, Priority, Result, View, ViewMut,
};

use crate::kernels::KernelPlans;
use crate::pass::{Pass, PassLayout};
use crate::ring::Circling;
use crate::run::{Run, Stream, missing};
use crate::trace::Trace;
use crate::ulysses::Target;
use crate::workspace::{Bytes, Region, Workspace};
use crate::{Member, Plan, Problem};

/// A device buffer of a backend.
type Buffer<B> = <<B as Backend>::Device as Device>::Buffer;

/// What a forward reads. Shards are `[batch, local rows, heads, dim]`; joint tensors `[batch, joint, heads, dim]` are the same
/// on every rank.
#[derive(Debug)]
pub struct Inputs<'a, D: Device> {
    /// Queries.
    pub q: View<'a, D>,
    /// Keys.
    pub k: View<'a, D>,
    /// Values.
    pub v: View<'a, D>,
    /// Joint q, k and v.
    pub joint: Option<[View<'a, D>; 3]>,
    /// ALiBi slopes, sinks, dropout seed, for all heads of the problem.
    pub extras: Extras<'a, D>,
}

/// What a forward writes.
#[derive(Debug)]
pub struct Outputs<'a, D: Device> {
    /// Output of the shard, `[batch, local query rows, heads, head_dim_v]`, in the I/O dtype.
    pub out: ViewMut<'a, D>,
    /// Natural-log sums of the shard, f32 `[batch, local query rows, heads, 1]`.
    pub lse: ViewMut<'a, D>,
    /// Joint out and lse, bitwise the same on every rank.
    pub joint: Option<[ViewMut<'a, D>; 2]>,
}

/// Rows of the forward's results and of their gradients.
#[derive(Debug)]
pub struct OutputRows<'a, D: Device> {
    /// Output of the forward.
    pub out: View<'a, D>,
    /// Log-sums of the forward.
    pub lse: View<'a, D>,
    /// Gradient of `out`.
    pub dout: View<'a, D>,
    /// Gradient of `lse`; absent means 0.
    pub dlse: Option<View<'a, D>>,
}

/// Where gradients go, in the I/O dtype, rounded once.
#[derive(Debug)]
pub struct Gradients<'a, D: Device> {
    /// Of the shard's queries.
    pub dq: ViewMut<'a, D>,
    /// Of the shard's keys.
    pub dk: ViewMut<'a, D>,
    /// Of the shard's values.
    pub dv: ViewMut<'a, D>,
    /// Of the joint q, k and v: whole gradients, bitwise the same on every rank.
    pub joint: Option<[ViewMut<'a, D>; 3]>,
    /// Of the sinks: whole gradient, f32 `[1, 1, heads, 1]`, bitwise the same on every rank.
    pub dsinks: Option<ViewMut<'a, D>>,
}

/// The caller's stream, that of transfers, and that of copies beside both.
const STREAMS: usize = 3;

/// One rank's attention, ready to run any number of times (all layers of a model share it).
#[derive(Debug)]
pub struct Usp<B: Backend> {
    plan: Plan,
    workspace: Workspace<B::Device>,
    scratch: Option<Buffer<B>>,
    bytes: Bytes,
    transfer: Stream<B>,
    aside: Stream<B>,
    kernels: KernelPlans<B>,
    forward: Pass<B>,
    backward: Option<Pass<B>>,
}

impl<B: Backend> Usp<B> {
    /// Collective: checks that the backend supports the problem, plans the kernels, takes the memory and prepares every
    /// exchange. `memory` gives ordinary device memory (the device's own `alloc`, or a framework's allocator).
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Invalid`], [`Error::OutOfMemory`], [`Error::PeerLost`], [`Error::Timeout`].
    pub fn prepare(
        member: &Member<B>,
        on: &Stream<B>,
        plan: Plan,
        mut memory: impl FnMut(usize) -> Result<Buffer<B>>,
    ) -> Result<Self> {
        let size = plan.mesh.size();
        if member.collective.size() != size || member.collective.rank() != plan.rank {
            return Err(Error::invalid(
                "mesh",
                format!(
                    "the plan is for rank {} of {size}, the group has rank {} of {}",
                    plan.rank,
                    member.collective.rank(),
                    member.collective.size()
                ),
            ));
        }
        let (kernels, scratch_bytes, list_bytes) = KernelPlans::new(member, on, &plan)?;
        let forward = PassLayout::new(&plan, false)?;
        let backward = if plan.problem.backward { Some(PassLayout::new(&plan, true)?) } else { None };
        let mut bytes = plan.bytes()?;
        let workspace = Workspace { window: member.collective.window(bytes.window)?, buffer: memory(bytes.buffer)? };
        let scratch = if scratch_bytes > 0 { Some(memory(scratch_bytes)?) } else { None };
        let transfer = member.device.stream(Priority::High)?;
        let aside = member.device.stream(Priority::High)?;
        let forward = Pass::prepare(forward, member, &workspace)?;
        let backward = backward.map(|b| Pass::prepare(b, member, &workspace)).transpose()?;
        bytes.buffer += scratch_bytes + list_bytes;
        bytes.held = member.attention.held_bytes(STREAMS);
        bytes.staging = forward.staging(member) + backward.as_ref().map_or(0, |b| b.staging(member));
        Ok(Self { plan, workspace, scratch, bytes, transfer, aside, kernels, forward, backward })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes of device memory that this and its kernels hold beside the caller's tensors: exact, and all that they will ever
    /// take.
    pub fn workspace(&self) -> Bytes {
        self.bytes
    }

    /// Names of the kernels that a forward (or backward) runs, each once.
    pub fn kernels(&self, member: &Member<B>, backward: bool) -> Vec<String> {
        self.kernels.names(member, backward)
    }

    /// Queues a forward on the caller's stream.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor that does not fit; whatever the backend returns. The transfer stream is joined
    /// back to `on` in every case.
    pub fn forward(
        &self,
        member: &Member<B>,
        on: &Stream<B>,
        inputs: &Inputs<'_, B::Device>,
        outputs: &Outputs<'_, B::Device>,
        trace: Option<&mut Trace<B::Device>>,
    ) -> Result<()> {
        self.check_inputs(inputs)?;
        let problem = &self.plan.problem;
        let [rows, _] = self.plan.local_rows();
        let (out, lse) = (wide(problem, rows, problem.head_dim_v), wide(problem, rows, 1));
        expect("out", outputs.out.dtype(), outputs.out.extent(), problem.dtype, out)?;
        expect("lse", outputs.lse.dtype(), outputs.lse.extent(), DType::F32, lse)?;
        check_joint(problem, "joint outputs", outputs.joint.is_some())?;
        if let Some([out, lse]) = &outputs.joint {
            let j = problem.joint;
            expect("joint out", out.dtype(), out.extent(), problem.dtype, wide(problem, j, problem.head_dim_v))?;
            expect("joint lse", lse.dtype(), lse.extent(), DType::F32, wide(problem, j, 1))?;
        }
        inputs.check_forward(outputs)?;
        let run = self.run(member, on, false, trace);
        run.forked(|| self.queue_forward(&run, inputs, outputs))
    }

    fn queue_forward(
        &self,
        run: &Run<'_, B>,
        inputs: &Inputs<'_, B::Device>,
        outputs: &Outputs<'_, B::Device>,
    ) -> Result<()> {
        let pass = &self.forward;
        let mut ring = Circling::new(run, pass.ring.as_ref(), &self.kernels);
        let Some(ulysses) = &pass.ulysses else {
            for g in 0..self.plan.cut.groups() {
                let heads = self.plan.cut.of(g, 0);
                let [q, k, v] = [
                    inputs.q.narrow(2, heads.q.clone())?,
                    inputs.k.narrow(2, heads.kv.clone())?,
                    inputs.v.narrow(2, heads.kv.clone())?,
                ];
                let results = [outputs.out.narrow(2, heads.q.clone())?, outputs.lse.narrow(2, heads.q.clone())?];
                ring.forward(g, [q, k, v], results, inputs.extras, &mut || Ok(()))?;
            }
            return Ok(());
        };
        let joint = inputs.joint.unwrap_or([inputs.q, inputs.k, inputs.v]);
        let sources = [inputs.q, joint[0], inputs.k, joint[1], inputs.v, joint[2]];
        let targets = targets([outputs.out, outputs.lse], outputs.joint);
        let mut gathered = Some(ulysses.gather(run, 0, &sources)?);
        let mut copies = ulysses.first(run, &sources)?;
        for g in 0..self.plan.cut.groups() {
            run.wait(run.compute, gathered.take().as_ref())?;
            ulysses.before(run, g, &copies)?;
            let (blocks, results) = (ulysses.inputs(run, g)?, ulysses.outputs(run, g)?);
            ring.forward(g, [blocks[0], blocks[1], blocks[2]], [results[0], results[1]], inputs.extras, &mut || {
                if g + 1 < self.plan.cut.groups() {
                    gathered = Some(ulysses.gather(run, g + 1, &sources)?);
                }
                Ok(())
            })?;
            ulysses.after(run, g, &sources, &targets, &mut copies, || {
                ring.own_rows(g, [blocks[0], blocks[1], blocks[2]], [results[0], results[1]], inputs.extras)
            })?;
        }
        ulysses.finish(run, &targets)
    }

    /// Queues a backward on the caller's stream. `joint` are the joint rows of the results, the same on every rank.
    ///
    /// # Errors
    /// As [`Usp::forward`]; [`Error::Invalid`] if the problem was prepared without backward.
    pub fn backward(
        &self,
        member: &Member<B>,
        on: &Stream<B>,
        inputs: &Inputs<'_, B::Device>,
        rows: &OutputRows<'_, B::Device>,
        joint: Option<&OutputRows<'_, B::Device>>,
        gradients: &Gradients<'_, B::Device>,
        trace: Option<&mut Trace<B::Device>>,
    ) -> Result<()> {
        let Some(pass) = &self.backward else {
            return Err(Error::invalid("backward", "the problem was prepared without it: set `with_backward(true)`"));
        };
        self.check_inputs(inputs)?;
        self.check_gradients(inputs, gradients)?;
        self.check_rows(self.plan.local_rows()[0], rows)?;
        check_joint(&self.plan.problem, "joint rows", joint.is_some())?;
        if let Some(joint) = joint {
            self.check_rows(self.plan.problem.joint, joint)?;
        }
        inputs.check_backward(rows, joint, gradients)?;
        let run = self.run(member, on, true, trace);
        run.forked(|| self.queue_backward(&run, pass, inputs, rows, joint, gradients))
    }

    /// delta of the shard and of this rank's joint rows, and their parts of dsinks.
    fn queue_delta<'a>(
        &self,
        run: &Run<'a, B>,
        pass: &Pass<B>,
        inputs: &Inputs<'_, B::Device>,
        rows: &OutputRows<'_, B::Device>,
        joint: Option<&OutputRows<'_, B::Device>>,
    ) -> Result<[View<'a, B::Device>; 2]> {
        let layout = pass.rows.as_ref().ok_or_else(|| Error::invalid("backward", "it was not laid out"))?;
        let [shard_delta, joint_delta] =
            [run.workspace.view_mut(&layout.delta[0])?, run.workspace.view_mut(&layout.delta[1])?];
        let parts = [(rows, 0..self.plan.local_rows()[0], shard_delta)].into_iter();
        let own_joint = self.plan.q.segments(self.plan.at)[1].source.clone();
        let parts = parts.chain(joint.map(|j| (j, own_joint, joint_delta)));
        if let Some(sinks) = &layout.sinks {
            run.member.device.fill(run.compute, 0.0, run.workspace.view_mut(&sinks.parts[1])?)?;
        }
        for (i, (rows, range, delta)) in parts.enumerate() {
            let spec = self.plan.problem.spec([range.len(), 0]);
            let dsinks = match (&layout.sinks, inputs.extras.sinks) {
                (Some(sinks), Some(logits)) => Some((logits, run.workspace.view_mut(&sinks.parts[i])?)),
                _ => None,
            };
            let args = Prepare::new(
                &spec,
                [rows.out.narrow(1, range.clone())?, rows.dout.narrow(1, range.clone())?],
                rows.lse.narrow(1, range.clone())?,
                rows.dlse.map(|d| d.narrow(1, range.clone())).transpose()?,
                delta.narrow(1, range.clone())?,
                dsinks,
            )?;
            run.compute("delta", i, || run.member.attention.backward_prepare(run.compute, &spec, &args))?;
        }
        Ok([shard_delta.read(), joint_delta.read()])
    }

    /// The caller's lse, of the shard and of the joint rows, copied to lie as delta does.
    fn queue_lse<'a>(
        &self,
        run: &Run<'a, B>,
        pass: &Pass<B>,
        rows: &OutputRows<'_, B::Device>,
        joint: Option<&OutputRows<'_, B::Device>>,
    ) -> Result<[View<'a, B::Device>; 2]> {
        let layout = pass.rows.as_ref().and_then(|r| r.lse.as_ref());
        let [shard, of_joint] = layout.ok_or_else(|| Error::invalid("backward", "it was not laid out"))?;
        let [shard, of_joint] = [run.workspace.view_mut(shard)?, run.workspace.view_mut(of_joint)?];
        run.copy(run.compute, rows.lse, shard)?;
        if let Some(joint) = joint {
            run.copy(run.compute, joint.lse, of_joint)?;
        }
        Ok([shard.read(), of_joint.read()])
    }

    /// Parts of dsinks go to every rank, which sums them in rank order.
    fn queue_sinks(&self, run: &Run<'_, B>, pass: &Pass<B>, gradients: &Gradients<'_, B::Device>) -> Result<()> {
        let sinks = pass.rows.as_ref().and_then(|r| r.sinks.as_ref());
        let (Some(sinks), Some(share)) = (sinks, &pass.share_sinks) else {
            return Ok(());
        };
        let view = |r: &Region| run.workspace.view(r);
        run.order(run.compute, run.transfer)?;
        run.exchange(share, &[view(&sinks.parts[0])?, view(&sinks.parts[1])?])?;
        let all = view(&sinks.all)?;
        let terms = (0..all.extent()[0]).map(|i| all.narrow(0, i..i + 1)).collect::<Result<Vec<_>>>()?;
        let dsinks = gradients.dsinks.ok_or_else(|| missing("dsinks"))?;
        run.order(run.transfer, run.aside)?;
        run.aside("collect", 0, || run.accumulate(run.aside, dsinks, &terms))
    }

    fn queue_backward(
        &self,
        run: &Run<'_, B>,
        pass: &Pass<B>,
        inputs: &Inputs<'_, B::Device>,
        rows: &OutputRows<'_, B::Device>,
        joint: Option<&OutputRows<'_, B::Device>>,
        gradients: &Gradients<'_, B::Device>,
    ) -> Result<()> {
        let groups = self.plan.cut.groups();
        let extras = Extras { sinks: inputs.extras.sinks, ..inputs.extras };
        let mut ring = Circling::new(run, pass.ring.as_ref(), &self.kernels);
        let Some(ulysses) = &pass.ulysses else {
            let delta = self.queue_delta(run, pass, inputs, rows, joint)?;
            self.queue_sinks(run, pass, gradients)?;
            for g in 0..groups {
                let heads = self.plan.cut.of(g, 0);
                let (q, kv) = (heads.q.clone(), heads.kv.clone());
                let blocks =
                    [inputs.q.narrow(2, q.clone())?, inputs.k.narrow(2, kv.clone())?, inputs.v.narrow(2, kv.clone())?];
                let of_rows =
                    [rows.dout.narrow(2, q.clone())?, rows.lse.narrow(2, q.clone())?, delta[0].narrow(2, q.clone())?];
                let results =
                    [gradients.dq.narrow(2, q)?, gradients.dk.narrow(2, kv.clone())?, gradients.dv.narrow(2, kv)?];
                ring.backward(g, blocks, of_rows, results, self.dq_sum(run, pass, g)?, extras, &mut || Ok(()))?;
            }
            return Ok(());
        };
        let j = inputs.joint.unwrap_or([inputs.q, inputs.k, inputs.v]);
        let sources = [inputs.q, j[0], inputs.k, j[1], inputs.v, j[2], rows.dout, joint.map_or(rows.dout, |j| j.dout)];
        let targets = targets([gradients.dq, gradients.dk, gradients.dv], gradients.joint);
        ulysses.start(run)?;
        ulysses.gather(run, 0, &sources)?;
        let mut copies = ulysses.first(run, &sources)?;
        let delta = self.queue_delta(run, pass, inputs, rows, joint)?;
        let lse = self.queue_lse(run, pass, rows, joint)?;
        self.queue_sinks(run, pass, gradients)?;
        run.order(run.compute, run.transfer)?;
        let mut gathered = Some(ulysses.gather_rows(run, &[lse[0], lse[1], delta[0], delta[1]])?);
        for g in 0..groups {
            run.wait(run.compute, gathered.take().as_ref())?;
            ulysses.before(run, g, &copies)?;
            let (b, s, r) = (ulysses.inputs(run, g)?, ulysses.rows(run, g)?, ulysses.outputs(run, g)?);
            let sum = self.dq_sum(run, pass, g)?;
            ring.backward(g, [b[0], b[1], b[2]], [b[3], s[0], s[1]], [r[0], r[1], r[2]], sum, extras, &mut || {
                if g + 1 < groups {
                    gathered = Some(ulysses.gather(run, g + 1, &sources)?);
                }
                Ok(())
            })?;
            ulysses.after(run, g, &sources, &targets, &mut copies, || Ok(()))?;
        }
        ulysses.finish(run, &targets)
    }

    /// The f32 sum of dq of group `g`, where the result itself is not f32.
    fn dq_sum<'a>(&self, run: &Run<'a, B>, pass: &Pass<B>, g: usize) -> Result<Option<ViewMut<'a, B::Device>>> {
        let Some(region) = pass.rows.as_ref().and_then(|r| r.dq.as_ref()) else {
            return Ok(None);
        };
        let [batch, rows, _, dim] = region.at.extent();
        let heads = crate::ring_layout::q_heads(&self.plan, g);
        run.workspace.view_mut(&region.with_extent([batch, rows, heads, dim])?).map(Some)
    }

    fn run<'a>(
        &'a self,
        member: &'a Member<B>,
        on: &'a Stream<B>,
        backward: bool,
        trace: Option<&'a mut Trace<B::Device>>,
    ) -> Run<'a, B> {
        Run {
            plan: &self.plan,
            member,
            workspace: &self.workspace,
            scratch: self.scratch.as_ref(),
            compute: on,
            transfer: &self.transfer,
            aside: &self.aside,
            backward,
            trace: RefCell::new(trace),
        }
    }

    fn check_inputs(&self, inputs: &Inputs<'_, B::Device>) -> Result<()> {
        let p = &self.plan.problem;
        let [q_rows, k_rows] = self.plan.local_rows();
        expect_input(p, "q", &inputs.q, [p.batch, q_rows, p.heads, p.head_dim])?;
        expect_input(p, "k", &inputs.k, [p.batch, k_rows, p.kv_heads, p.head_dim])?;
        expect_input(p, "v", &inputs.v, [p.batch, k_rows, p.kv_heads, p.head_dim_v])?;
        inputs.extras.check(&p.spec([q_rows, k_rows]))?;
        check_joint(p, "joint inputs", inputs.joint.is_some())?;
        if let Some([q, k, v]) = &inputs.joint {
            expect_input(p, "joint q", q, [p.batch, p.joint, p.heads, p.head_dim])?;
            expect_input(p, "joint k", k, [p.batch, p.joint, p.kv_heads, p.head_dim])?;
            expect_input(p, "joint v", v, [p.batch, p.joint, p.kv_heads, p.head_dim_v])?;
        }
        Ok(())
    }

    fn check_rows(&self, rows: usize, given: &OutputRows<'_, B::Device>) -> Result<()> {
        let p = &self.plan.problem;
        expect_input(p, "out", &given.out, wide(p, rows, p.head_dim_v))?;
        expect_input(p, "dout", &given.dout, wide(p, rows, p.head_dim_v))?;
        for (what, view) in [("lse", Some(&given.lse)), ("dlse", given.dlse.as_ref())] {
            if let Some(v) = view {
                expect(what, v.dtype(), v.extent(), DType::F32, wide(p, rows, 1))?;
            }
        }
        Ok(())
    }

    fn check_gradients(&self, inputs: &Inputs<'_, B::Device>, gradients: &Gradients<'_, B::Device>) -> Result<()> {
        let p = &self.plan.problem;
        let Gradients { dq, dk, dv, joint, dsinks } = gradients;
        for (what, g, x) in [("dq", dq, &inputs.q), ("dk", dk, &inputs.k), ("dv", dv, &inputs.v)] {
            expect(what, g.dtype(), g.extent(), p.dtype, x.extent())?;
        }
        check_joint(p, "joint gradients", joint.is_some())?;
        if let (Some(gradients), Some(inputs)) = (joint, &inputs.joint) {
            for (g, x) in gradients.iter().zip(inputs) {
                expect("joint gradients", g.dtype(), g.extent(), p.dtype, x.extent())?;
            }
        }
        if dsinks.is_some() != p.sinks {
            return Err(Error::invalid("dsinks", "given exactly where the problem has sinks"));
        }
        dsinks.map_or(Ok(()), |d| expect("dsinks", d.dtype(), d.extent(), DType::F32, [1, 1, p.heads, 1]))
    }
}

fn targets<'a, B: Backend, const N: usize>(
    shards: [ViewMut<'a, B::Device>; N],
    joint: Option<[ViewMut<'a, B::Device>; N]>,
) -> Vec<Target<'a, B>> {
    let mut joint = joint.into_iter().flatten();
    shards.into_iter().map(|shard| Target { shard, joint: joint.next() }).collect()
}

fn wide(problem: &Problem, rows: usize, dim: usize) -> Extent {
    [problem.batch, rows, problem.heads, dim]
}

fn expect_input<D: Device>(problem: &Problem, what: &'static str, view: &View<'_, D>, shape: Extent) -> Result<()> {
    expect(what, view.dtype(), view.extent(), problem.dtype, shape)
}

fn expect(what: &'static str, dtype: DType, extent: Extent, wanted: DType, shape: Extent) -> Result<()> {
    if dtype == wanted && extent == shape {
        return Ok(());
    }
    Err(Error::invalid(what, format!("it is {dtype} {extent:?}, this rank's is {wanted} {shape:?}")))
}

fn check_joint(problem: &Problem, what: &'static str, given: bool) -> Result<()> {
    if given == (problem.joint > 0) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("given exactly where the problem has joint tokens, it has {}", problem.joint)))
}
