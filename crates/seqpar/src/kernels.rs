//! Which calls of attention a rank makes, planned before anything runs.

use longspan_hal::{Attention, Backend, Result, Slice, Slices};

use crate::run::Stream;
use crate::{Member, Plan};

/// The plan of one attention.
pub(crate) type KernelPlan<B> = <<B as Backend>::Attention as Attention<<B as Backend>::Device>>::Plan;

/// Kernel plans by head group.
#[derive(Debug)]
pub(crate) struct KernelPlans<B: Backend> {
    /// By step.
    pub steps: Vec<Vec<KernelPlan<B>>>,
    /// For the halves of the own keys in the backward of a ring.
    pub halves: Vec<[KernelPlan<B>; 2]>,
    /// For the last head group of a forward without a ring: rows of others, and own rows.
    pub last: Option<[KernelPlan<B>; 2]>,
}

impl<B: Backend> KernelPlans<B> {
    /// All plans, the scratch that the largest call needs, and the bytes of all plans.
    pub fn new(member: &Member<B>, on: &Stream<B>, plan: &Plan) -> Result<(Self, usize, usize)> {
        let (mut scratch, mut lists) = (0, 0);
        let (queries, last) = (plan.q_block(), plan.cut.groups() - 1);
        let mut of = |g: usize, rows: [usize; 2], slices: Vec<Slice>| {
            let spec = plan.spec(g, rows);
            member.attention.supports(&spec)?;
            let kernel = member.attention.plan(on, &spec, &Slices::new(&spec, slices)?)?;
            scratch = scratch.max(member.attention.scratch_bytes(&kernel));
            lists += member.attention.plan_bytes(&kernel);
            Ok(kernel)
        };
        let groups = 0..plan.cut.groups();
        let mut kernels = Self { steps: Vec::with_capacity(groups.len()), halves: Vec::new(), last: None };
        for g in groups {
            let steps = plan.legs.iter().map(|leg| of(g, [queries, leg.rows], leg.slices.clone()));
            kernels.steps.push(steps.collect::<Result<_>>()?);
            if plan.problem.backward && plan.mesh.ring() > 1 {
                let [first, second] = plan.halves().map(|rows| {
                    let keys = rows.start as u32..rows.end as u32;
                    of(g, [queries, rows.len()], plan.legs[0].slices.iter().map(|s| s.of_keys(keys.clone())).collect())
                });
                kernels.halves.push([first?, second?]);
            }
        }
        if let Some(own) = plan.own_rows() {
            let (leg, rows) = (&plan.legs[0], own.start as u32..own.end as u32);
            let [before, behind] = [0..rows.start, rows.end..queries as u32];
            let others = leg.slices.iter().flat_map(|s| {
                let back = |part: Slice, by| Slice { q: part.q.start + by..part.q.end + by, ..part };
                [s.of_queries(before.clone()), back(s.of_queries(behind.clone()), behind.start)]
            });
            let others = of(last, [queries, leg.rows], others.collect())?;
            let mine = leg.slices.iter().map(|s| s.of_queries(rows.clone())).collect();
            kernels.last = Some([others, of(last, [own.len(), leg.rows], mine)?]);
        }
        Ok((kernels, scratch, lists))
    }

    /// Names of the kernels that a forward (or backward) runs, each once.
    pub fn names(&self, member: &Member<B>, backward: bool) -> Vec<String> {
        let last = self.last.iter().flatten().filter(|_| !backward);
        let halves = self.halves.iter().flatten().filter(|_| backward);
        let plans = self.steps.iter().flatten().chain(halves).chain(last);
        let mut names: Vec<String> = plans.flat_map(|plan| member.attention.kernels(plan, backward)).collect();
        names.sort();
        names.dedup();
        names
    }
}
