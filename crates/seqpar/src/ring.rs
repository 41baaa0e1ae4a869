//! Ring attention over (acc, m, l) partials, forward and backward (Liu et al., 2310.01889; the travelling gradients as in
//! its section 3, the order of exchange and compute is ours).
//!
//! Ring rank `r` attends at step `t` with the block of `r - t`, for `t = 0 .. R`. A run of keys that every ring rank needs
//! *hops*: rank `r` hands what it holds to `r + 1`. A run that only some need goes *direct*, owner to needer, and its
//! gradient goes straight home. What no one needs does not move.
//!
//! ```text
//! forward                                          backward
//! for t in 0..R:                                   for t in 0..R:
//!     transfer: hop(t + 1)      beside                 transfer: hop(t + 1)
//!     compute:  wait hop(t)                            compute:  wait hop(t)
//!               attend(q, kv(t))                                 dq += ..; fresh = dk, dv of block(t)
//!               Start | Continue | Finish                        wait ret(t - 1)
//!                                                                fresh += travel    (hop runs: the sum so far)
//!                                                                home  += came home (direct runs)
//!                                                      transfer: ret(t): fresh hop runs -> r + 1
//!                                                                        fresh direct runs -> block(t)
//!                                                  compute: dq += ..; home of the other half of the own keys
//!                                                           wait ret(R - 1)
//!                                                           dk, dv = round(home + travel), round(home + came home)
//! ```
//!
//! `fresh` is computed while the previous sum still travels: adding in place would serialise the ring. At `t = 0` half of the
//! own keys are attended with, and nothing is sent: gradients of the own block stay in `home`. The other half is beside the
//! last return, which else had nothing beside it.

use longspan_hal::{
    Attention, Backend, Backward, Device, Extras, Forward, Gradient, Partial, Result, Stage, Store, View, ViewMut,
};

use crate::Way;
use crate::kernels::{KernelPlan, KernelPlans};
use crate::message::Prepared;
use crate::ring_layout::{self, GradientLayout, Pair, RingLayout, runs, shaped};
use crate::run::{Event, Run};

/// The ring of one pass: its layout, its exchanges, and the kernels' plans, by head group and step.
#[derive(Debug)]
pub(crate) struct Ring<B: Backend> {
    pub layout: RingLayout,
    pub hops: Vec<Vec<Prepared<B>>>,
    pub returns: Vec<Vec<Prepared<B>>>,
}

/// What all attentions of a backward have in common.
struct Call<'a, B: Backend> {
    q: View<'a, B::Device>,
    /// dout, lse and delta.
    rows: [View<'a, B::Device>; 3],
    dq: ViewMut<'a, B::Device>,
    extras: Extras<'a, B::Device>,
}

/// One ring in flight over all head groups: which received K/V slot is read until when.
pub(crate) struct Circling<'a, 'r, B: Backend> {
    run: &'a Run<'r, B>,
    ring: Option<&'a Ring<B>>,
    plans: &'a KernelPlans<B>,
    read_until: Vec<Option<Event<B>>>,
}

impl<'a, 'r, B: Backend> Circling<'a, 'r, B> {
    pub fn new(run: &'a Run<'r, B>, ring: Option<&'a Ring<B>>, plans: &'a KernelPlans<B>) -> Self {
        Self { run, ring, plans, read_until: vec![None, None] }
    }

    /// The forward of head group `g`: attends with the own block and with every block that comes round. `travelling` queues
    /// what the next head group needs: behind the last hop, and behind the last attention, which no device should await its
    /// host for.
    pub fn forward(
        &mut self,
        g: usize,
        [q, k, v]: [View<'_, B::Device>; 3],
        [out, lse]: [ViewMut<'_, B::Device>; 2],
        extras: Extras<'_, B::Device>,
        travelling: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (run, steps) = (self.run, self.run.plan.legs.len());
        let mut arrived = None;
        for t in 0..steps {
            let next = if t + 1 < steps { Some(self.hop(g, t + 1, [k, v])?) } else { None };
            run.wait(run.compute, arrived.as_ref())?;
            let stage = match self.partial(g)? {
                None => Stage::All { out, lse },
                Some(partial) if t == 0 => Stage::Start(partial),
                Some(partial) if t + 1 == steps => Stage::Finish { partial, out, lse },
                Some(partial) => Stage::Continue(partial),
            };
            let idle = run.plan.legs[t].slices.is_empty() && matches!(stage, Stage::Continue(_));
            if !idle && ring_layout::q_heads(run.plan, g) > 0 {
                let [k, v] = self.block(g, t, [k, v])?;
                let kernel = match &self.plans.last {
                    Some([others, _]) if g + 1 == run.plan.cut.groups() => others,
                    _ => &self.plans.steps[g][t],
                };
                let spec = run.plan.spec(g, [run.plan.q_block(), run.plan.legs[t].rows]);
                let args = Forward::new(&spec, [q, k, v], stage, extras, run.scratch)?;
                run.compute("attention forward", g * steps + t, || {
                    run.member.attention.forward(run.compute, kernel, &args)
                })?;
            }
            if next.is_none() {
                travelling()?;
            }
            self.read(t)?;
            arrived = next;
        }
        Ok(())
    }

    /// The forward of this rank's own rows of head group `g`, where [`Circling::forward`] left them for the end: beside the
    /// messages with those of others.
    pub fn own_rows(
        &self,
        g: usize,
        [q, k, v]: [View<'_, B::Device>; 3],
        results: [ViewMut<'_, B::Device>; 2],
        extras: Extras<'_, B::Device>,
    ) -> Result<()> {
        let run = self.run;
        let (Some([_, kernel]), Some(rows)) = (&self.plans.last, run.plan.own_rows()) else {
            return Ok(());
        };
        if g + 1 < run.plan.cut.groups() || ring_layout::q_heads(run.plan, g) == 0 {
            return Ok(());
        }
        let spec = run.plan.spec(g, [rows.len(), k.extent()[1]]);
        let [out, lse] = [results[0].narrow(1, rows.clone())?, results[1].narrow(1, rows.clone())?];
        let args = Forward::new(&spec, [q.narrow(1, rows)?, k, v], Stage::All { out, lse }, extras, run.scratch)?;
        run.compute("attention forward", g, || run.member.attention.forward(run.compute, kernel, &args))
    }

    /// The backward of head group `g` into `[dq, dk, dv]`, which are rounded once. dq is summed in f32 in `accumulator`
    /// where there is one.
    pub fn backward(
        &mut self,
        g: usize,
        inputs: [View<'_, B::Device>; 3],
        rows: [View<'_, B::Device>; 3],
        results: [ViewMut<'_, B::Device>; 3],
        accumulator: Option<ViewMut<'_, B::Device>>,
        extras: Extras<'_, B::Device>,
        travelling: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (run, steps) = (self.run, self.run.plan.legs.len());
        let [q, k, v] = inputs;
        let call = Call { q, rows, dq: accumulator.unwrap_or(results[0]), extras };
        let (mut arrived, mut returned) = (None, None);
        for t in 0..steps {
            let next = if t + 1 < steps { Some(self.hop(g, t + 1, [k, v])?) } else { None };
            run.wait(run.compute, arrived.as_ref())?;
            match self.gradients() {
                Some((_, gradients)) if t == 0 => self.half(&call, gradients, [g, 0], [k, v])?,
                Some((_, gradients)) => self.fresh_gradients(&call, gradients, g, t)?,
                None => {
                    let into = [results[1], results[2]].map(|into| Gradient { into, store: Store::Write });
                    self.attend(&call, [g, t], &self.plans.steps[g][t], [k, v], into, Store::Write)?;
                }
            }
            if next.is_none() {
                travelling()?;
            }
            self.read(t)?;
            if let (Some((ring, gradients)), true) = (self.gradients(), t > 0) {
                run.wait(run.compute, returned.as_ref())?;
                if t > 1 {
                    run.sum(g * steps + t, || {
                        self.add_travelled(gradients, g, t)?;
                        self.add_came_home(gradients, g, t - 1)
                    })?;
                }
                run.order(run.compute, run.transfer)?;
                let sources = self.fresh(gradients, g, t)?.map(|x| x.read());
                returned = Some(run.exchange(&ring.returns[g][t], &sources)?);
            }
            arrived = next;
        }
        // Under the last return.
        if let Some((_, gradients)) = self.gradients() {
            self.half(&call, gradients, [g, 1], [k, v])?;
        }
        if let Some(sums) = accumulator {
            run.sum((g + 1) * steps - 1, || {
                run.finish_dq(&run.plan.spec(g, [run.plan.q_block(), run.plan.k_block()]), results[0], sums.read())
            })?;
        }
        if let Some((_, gradients)) = self.gradients() {
            run.wait(run.compute, returned.as_ref())?;
            run.sum((g + 1) * steps - 1, || self.round_home(gradients, g, [results[1], results[2]]))?;
        }
        Ok(())
    }

    /// Queues the backward of keys of the block of step `t`.
    fn attend(
        &self,
        call: &Call<'_, B>,
        [g, t]: [usize; 2],
        kernel: &KernelPlan<B>,
        [k, v]: [View<'_, B::Device>; 2],
        [dk, dv]: [Gradient<'_, B::Device>; 2],
        store: Store,
    ) -> Result<()> {
        let run = self.run;
        if ring_layout::q_heads(run.plan, g) == 0 {
            return Ok(());
        }
        let spec = run.plan.spec(g, [run.plan.q_block(), k.extent()[1]]);
        let gradients = [Gradient { into: call.dq, store }, dk, dv];
        let args = Backward::new(&spec, [call.q, k, v], call.rows, gradients, call.extras, run.scratch)?;
        run.compute("attention backward", g * run.plan.legs.len() + t, || {
            run.member.attention.backward(run.compute, kernel, &args)
        })
    }

    /// `fresh = dk, dv` of the block of step `t > 0`.
    fn fresh_gradients(&self, call: &Call<'_, B>, gradients: &GradientLayout, g: usize, t: usize) -> Result<()> {
        let leg = &self.run.plan.legs[t];
        let Some(ring) = self.ring.filter(|_| !leg.slices.is_empty() || !leg.needed.is_empty()) else {
            return Ok(());
        };
        let into = self.fresh(gradients, g, t)?.map(|into| Gradient { into, store: Store::Write });
        self.attend(call, [g, t], &self.plans.steps[g][t], self.received(ring, g, t)?, into, Store::Add)
    }

    /// `home` of a half of the own keys: 0 is attended with first, 1 last, when what came home early may have been added.
    fn half(
        &self,
        call: &Call<'_, B>,
        gradients: &GradientLayout,
        [g, half]: [usize; 2],
        own: [View<'_, B::Device>; 2],
    ) -> Result<()> {
        let (run, plan) = (self.run, self.run.plan);
        let [first, second] = plan.halves();
        let (home, early) = (self.pair(&gradients.home, g, plan.k_block())?, plan.comes_home_early());
        if half == 1 && second.is_empty() {
            return Ok(());
        }
        if half == 0 && early {
            for part in home {
                let part = part.narrow(1, second.clone())?;
                if !part.at().is_empty() {
                    run.member.device.fill(run.compute, 0.0, part)?;
                }
            }
        }
        let (rows, store, store_dq) = match half {
            0 => (first, Store::Write, Store::Write),
            _ => (second, if early { Store::Add } else { Store::Write }, Store::Add),
        };
        let into = |x: ViewMut<'a, B::Device>| Ok(Gradient { into: x.narrow(1, rows.clone())?, store });
        let kv = [own[0].narrow(1, rows.clone())?, own[1].narrow(1, rows.clone())?];
        self.attend(call, [g, 0], &self.plans.halves[g][half], kv, [into(home[0])?, into(home[1])?], store_dq)
    }

    fn gradients(&self) -> Option<(&'a Ring<B>, &'a GradientLayout)> {
        let ring = self.ring?;
        Some((ring, ring.layout.gradients.as_ref()?))
    }

    /// Queues hop `t`: its slot is free once the attention that read it last is done.
    fn hop(&mut self, g: usize, t: usize, own: [View<'_, B::Device>; 2]) -> Result<Event<B>> {
        let run = self.run;
        let Some(ring) = self.ring else {
            return run.record(run.transfer);
        };
        let slot = (t - 1) % ring.layout.kv.len();
        run.wait(run.transfer, self.read_until[slot].as_ref())?;
        let held = self.block(g, t - 1, own)?;
        run.exchange(&ring.hops[g][t], &[held[0], held[1], own[0], own[1]])
    }

    /// Notes that everything that reads the block of step `t` is queued.
    fn read(&mut self, t: usize) -> Result<()> {
        if let (Some(ring), true) = (self.ring, t > 0) {
            self.read_until[(t - 1) % ring.layout.kv.len()] = Some(self.run.record(self.run.compute)?);
        }
        Ok(())
    }

    /// K and V of the block of step `t`.
    fn block<'b>(&self, g: usize, t: usize, own: [View<'b, B::Device>; 2]) -> Result<[View<'b, B::Device>; 2]>
    where
        'a: 'b,
    {
        match self.ring {
            Some(ring) if t > 0 => self.received(ring, g, t),
            _ => Ok(own),
        }
    }

    /// K and V of the block of step `t > 0`.
    fn received(&self, ring: &Ring<B>, g: usize, t: usize) -> Result<[View<'a, B::Device>; 2]> {
        let pair = &ring.layout.kv[(t - 1) % ring.layout.kv.len()];
        let [k, v] = shaped(self.run.plan, pair, g, self.run.plan.legs[t].rows)?;
        Ok([self.run.workspace.view(&k)?, self.run.workspace.view(&v)?])
    }

    fn partial(&self, g: usize) -> Result<Option<Partial<'a, B::Device>>> {
        let Some(regions) = self.ring.and_then(|r| r.layout.partial.as_ref()) else {
            return Ok(None);
        };
        let heads = ring_layout::q_heads(self.run.plan, g);
        let view = |i: usize| {
            let [batch, rows, _, dim] = regions[i].at.extent();
            self.run.workspace.view_mut(&regions[i].with_extent([batch, rows, heads, dim])?)
        };
        Ok(Some(Partial { acc: view(0)?, m: view(1)?, l: view(2)? }))
    }

    fn pair(&self, pair: &Pair, g: usize, rows: usize) -> Result<[ViewMut<'a, B::Device>; 2]> {
        let [k, v] = shaped(self.run.plan, pair, g, rows)?;
        Ok([self.run.workspace.view_mut(&k)?, self.run.workspace.view_mut(&v)?])
    }

    /// Where dk and dv of step `t > 0` are computed.
    fn fresh(&self, gradients: &GradientLayout, g: usize, t: usize) -> Result<[ViewMut<'a, B::Device>; 2]> {
        self.pair(&gradients.fresh[(t - 1) % gradients.fresh.len()], g, self.run.plan.legs[t].rows)
    }

    /// `fresh(t) += travel`, in the hop runs of the block of step `t`.
    fn add_travelled(&self, gradients: &GradientLayout, g: usize, t: usize) -> Result<()> {
        let leg = &self.run.plan.legs[t];
        let fresh = self.fresh(gradients, g, t)?;
        for n in runs(&leg.needed, Way::Hop) {
            let travel = self.pair(&gradients.travel, g, leg.rows)?;
            for (sum, part) in fresh.iter().zip(travel) {
                let sum = sum.narrow(1, n.rows.clone())?;
                self.run.accumulate(self.run.compute, sum, &[sum.read(), part.narrow(1, n.rows.clone())?.read()])?;
            }
        }
        Ok(())
    }

    /// `home += came_home`, in the direct runs that came back after step `t`.
    fn add_came_home(&self, gradients: &GradientLayout, g: usize, t: usize) -> Result<()> {
        let own = self.run.plan.k_block();
        let asked = &self.run.plan.legs[t].asked;
        if asked.is_empty() {
            return Ok(());
        }
        let home = self.pair(&gradients.home, g, own)?;
        let came = self.pair(&gradients.came_home, g, own)?;
        for n in asked {
            for (sum, part) in home.iter().zip(&came) {
                let sum = sum.narrow(1, n.rows.clone())?;
                self.run.accumulate(self.run.compute, sum, &[sum.read(), part.narrow(1, n.rows.clone())?.read()])?;
            }
        }
        Ok(())
    }

    /// Rounds the own block's dk and dv: `home` and what the last return brought, sums of hop runs in `travel`.
    fn round_home(&self, gradients: &GradientLayout, g: usize, into: [ViewMut<'_, B::Device>; 2]) -> Result<()> {
        let (own, legs) = (self.run.plan.k_block(), &self.run.plan.legs);
        let last = &legs[legs.len() - 1].asked;
        for n in &legs[0].needed {
            let from = match n.way {
                Way::Direct if last.contains(n) => vec![&gradients.home, &gradients.came_home],
                Way::Direct => vec![&gradients.home],
                Way::Hop => vec![&gradients.home, &gradients.travel],
            };
            let from = from.into_iter().map(|pair| self.pair(pair, g, own)).collect::<Result<Vec<_>>>()?;
            for (i, into) in into.iter().enumerate() {
                let terms = from.iter().map(|pair| Ok(pair[i].narrow(1, n.rows.clone())?.read()));
                let terms = terms.collect::<Result<Vec<_>>>()?;
                self.run.accumulate(self.run.compute, into.narrow(1, n.rows.clone())?, &terms)?;
            }
        }
        Ok(())
    }
}
