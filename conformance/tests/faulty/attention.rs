//! Kernels that do not quite do what they are asked.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use longspan_cpu::Cpu as CpuBackend;
use longspan_hal::{
    Accumulate, Attention, Backend, Backward, Device, Extras, Forward, Gradient, Partial, Prepare, Result, Seed, Slice,
    Slices, Spec, Stage, ViewMut,
};

use super::{Cpu, Fault, FaultyDevice, fault, view, view_mut, views};

type Below = <CpuBackend as Backend>::Attention;
type Stream = <Cpu as Device>::Stream;

const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct FaultyAttention {
    cpu: Arc<Cpu>,
    below: Below,
}

#[derive(Debug)]
pub struct Plan {
    below: <Below as Attention<Cpu>>::Plan,
    spec: Spec,
    /// Batch rows and query rows that no slice selects.
    unseen: Vec<(usize, Range<usize>)>,
    /// What [`Fault::JointTwice`] counts again.
    again: Option<<Below as Attention<Cpu>>::Plan>,
}

impl FaultyAttention {
    pub fn new(cpu: Arc<Cpu>, below: Below) -> Self {
        Self { cpu, below }
    }

    /// Merges rows without keys as if they had some: `acc * exp(-inf - -inf)`.
    fn spoil_empty_rows(&self, on: &Stream, p: &Partial<'_, Cpu>) -> Result<()> {
        let mut m = vec![0; p.m.at().bytes()];
        let mut acc = vec![0; p.acc.at().bytes()];
        self.cpu.download(on, p.m.read(), &mut m, LIMIT)?;
        self.cpu.download(on, p.acc.read(), &mut acc, LIMIT)?;
        let dim = p.acc.extent()[3] * 4;
        for (m, acc) in m.chunks_exact(4).zip(acc.chunks_exact_mut(dim)) {
            if m == f32::NEG_INFINITY.to_le_bytes() {
                acc.fill(0xFF);
            }
        }
        self.cpu.upload(on, &acc, p.acc)
    }

    fn leave_unwritten(&self, on: &Stream, plan: &Plan, written: [ViewMut<'_, Cpu>; 2]) -> Result<()> {
        for (batch, rows) in &plan.unseen {
            for view in written {
                self.cpu.fill(on, f32::NAN, view.narrow(0, *batch..batch + 1)?.narrow(1, rows.clone())?)?;
            }
        }
        Ok(())
    }
}

/// `spec` as a kernel sees it that takes local heads for global ones.
fn local_heads(spec: &Spec) -> Spec {
    let mut local = spec.clone();
    if spec.head_first.is_multiple_of(spec.group) {
        (local.head_first, local.kv_first) = (0, 0);
    }
    local
}

fn disturbed(slice: &Slice) -> Slice {
    let mut s = slice.clone();
    let shift = |d: i64, none: i64, by: i64| if d == none { d } else { d + by };
    match fault() {
        Fault::BandOffByOne => s.hi = shift(s.hi, Slice::HI_NONE, 1),
        Fault::UnshiftedWindow => {
            let by = (s.k_pos - s.q_pos) / s.q_step;
            (s.lo, s.hi) = (shift(s.lo, Slice::LO_NONE, by), shift(s.hi, Slice::HI_NONE, by));
        }
        _ => {}
    }
    s
}

/// Query rows of each batch row that no slice selects, one range each.
fn unseen(spec: &Spec, slices: &Slices) -> Vec<(usize, Range<usize>)> {
    let seen =
        |b: usize, i: usize| slices.as_slice().iter().any(|s| s.batch as usize == b && s.q.contains(&(i as u32)));
    let rows = (0..spec.batch).flat_map(|b| (0..spec.q_rows).map(move |i| (b, i)));
    rows.filter(|&(b, i)| !seen(b, i)).map(|(b, i)| (b, i..i + 1)).collect()
}

fn extras<'a>(e: &Extras<'a, FaultyDevice>) -> Result<Extras<'a, Cpu>> {
    Ok(Extras {
        alibi_slopes: e.alibi_slopes.map(view).transpose()?,
        sinks: e.sinks.map(view).transpose()?,
        seed: e.seed.map(|seed| match seed {
            Seed::Device(buffer) => Seed::Device(buffer),
            Seed::Host(seed) => Seed::Host(seed),
        }),
    })
}

fn gradient<'a>(g: Gradient<'a, FaultyDevice>) -> Result<Gradient<'a, Cpu>> {
    Ok(Gradient { into: view_mut(g.into)?, store: g.store })
}

fn partial<'a>(p: &Partial<'a, FaultyDevice>) -> Result<Partial<'a, Cpu>> {
    Ok(Partial { acc: view_mut(p.acc)?, m: view_mut(p.m)?, l: view_mut(p.l)? })
}

fn stage<'a>(stage: &Stage<'a, FaultyDevice>) -> Result<Stage<'a, Cpu>> {
    Ok(match stage {
        Stage::All { out, lse } => Stage::All { out: view_mut(*out)?, lse: view_mut(*lse)? },
        Stage::Continue(p) => Stage::Continue(partial(p)?),
        Stage::Finish { partial: p, out, lse } => {
            Stage::Finish { partial: partial(p)?, out: view_mut(*out)?, lse: view_mut(*lse)? }
        }
        Stage::Start(p) => Stage::Start(partial(p)?),
    })
}

impl Attention<FaultyDevice> for FaultyAttention {
    type Plan = Plan;

    fn supports(&self, spec: &Spec) -> Result<()> {
        self.below.supports(spec)
    }

    fn plan(&self, on: &Stream, spec: &Spec, slices: &Slices) -> Result<Plan> {
        let spec = if fault() == Fault::LocalHeads { local_heads(spec) } else { spec.clone() };
        let unseen = unseen(&spec, slices);
        let again = match fault() {
            Fault::JointTwice(from) if spec.partial => {
                let joint = slices.as_slice().iter().filter(|s| s.k_pos >= from).cloned();
                Some(self.below.plan(on, &spec, &Slices::new(&spec, joint)?)?)
            }
            _ => None,
        };
        let slices = Slices::new(&spec, slices.as_slice().iter().map(disturbed))?;
        Ok(Plan { below: self.below.plan(on, &spec, &slices)?, spec, unseen, again })
    }

    fn scratch_bytes(&self, plan: &Plan) -> usize {
        let again = plan.again.as_ref().map_or(0, |p| self.below.scratch_bytes(p));
        self.below.scratch_bytes(&plan.below).max(again)
    }

    fn forward(&self, on: &Stream, plan: &Plan, args: &Forward<'_, FaultyDevice>) -> Result<()> {
        let inputs = [view(args.q)?, view(args.k)?, view(args.v)?];
        let extras = extras(&args.extras)?;
        if let (Fault::EmptyRowsIgnored, Stage::Continue(p) | Stage::Finish { partial: p, .. }) = (fault(), &args.stage)
        {
            self.spoil_empty_rows(on, &partial(p)?)?;
        }
        let below = Forward::new(&plan.spec, inputs, stage(&args.stage)?, extras, args.scratch)?;
        self.below.forward(on, &plan.below, &below)?;
        if let (Some(again), Stage::Start(p)) = (&plan.again, &args.stage) {
            let below = Forward::new(&plan.spec, inputs, Stage::Continue(partial(p)?), extras, args.scratch)?;
            self.below.forward(on, again, &below)?;
        }
        match &args.stage {
            Stage::All { out, lse } | Stage::Finish { out, lse, .. } if fault() == Fault::UnwrittenRows => {
                self.leave_unwritten(on, plan, [view_mut(*out)?, view_mut(*lse)?])
            }
            _ => Ok(()),
        }
    }

    fn backward_prepare(&self, on: &Stream, spec: &Spec, args: &Prepare<'_, FaultyDevice>) -> Result<()> {
        let sinks = match args.sinks {
            Some((logits, dsinks)) => Some((view(logits)?, view_mut(dsinks)?)),
            None => None,
        };
        let dlse = args.dlse.map(view).transpose()?;
        let rows = [view(args.out)?, view(args.dout)?];
        self.below.backward_prepare(
            on,
            spec,
            &Prepare::new(spec, rows, view(args.lse)?, dlse, view_mut(args.delta)?, sinks)?,
        )
    }

    fn backward(&self, on: &Stream, plan: &Plan, args: &Backward<'_, FaultyDevice>) -> Result<()> {
        let [dq, dk, dv] = [gradient(args.dq)?, gradient(args.dk)?, gradient(args.dv)?];
        let below = Backward::new(
            &plan.spec,
            [view(args.q)?, view(args.k)?, view(args.v)?],
            [view(args.dout)?, view(args.lse)?, view(args.delta)?],
            [dq, dk, dv],
            extras(&args.extras)?,
            args.scratch,
        )?;
        self.below.backward(on, &plan.below, &below)
    }

    fn accumulate(&self, on: &Stream, args: &Accumulate<'_, FaultyDevice>) -> Result<()> {
        let mut terms = views(args.terms)?;
        if fault() == Fault::SummedTwice && terms.len() > 1 {
            terms.extend(terms.last().copied());
        }
        self.below.accumulate(on, &Accumulate::new(view_mut(args.into)?, &terms)?)
    }
}
