//! DeepSpeed-Ulysses: all-to-all from sequence shards to head shards and back (Jacobs et al., 2309.14509, section 3).
//!
//! With ring rank `r` fixed, Ulysses rank `u` brings part `u` of the block of `r` with all heads, and attends with the whole
//! block for its own heads. One exchange moves all tensors, a view each, whatever their strides:
//!
//! ```text
//! gather(g):  for each other Ulysses rank p, each input tensor x:
//!                 send     x[my rows, heads(p, g)]           -> p
//!                 receive  block[rows of p, my heads(g)]     <- p
//! gather_rows: the same with lse and delta, for all groups at once
//! take(g):    copy x[my rows, my heads(g)] to the block
//! give_back(g): for each other Ulysses rank p, each output tensor y:
//!                 send     block[rows of p, my heads(g)]     -> p
//!                 receive  packed[my rows, heads(p, g)]      <- p
//! keep(g):    copy block[my rows, my heads(g)] to the caller's tensors
//! collect(g): copy `packed` to the caller's tensors; f32 contributions to replicated KV heads, the own ones too, are
//!             summed instead, in the order of groups and ranks, and rounded once at the end.
//! ```
//!
//! Messages may need no kernel, but copies within a device do, and a kernel beside attention waits for its end, and what is
//! queued behind it with it. So they have a stream of their own, `aside`, where they find room as attention ends, and the first
//! and the last ones are beside messages:
//!
//! ```text
//! transfer: gather(0)             gather(1)         give_back(0)                   gather(2)         ...
//! compute:  -                     attention(0)                                     attention(1)      ...
//! aside:    take(0), take(1)                        keep(0), collect(0), take(2)                     ...
//! ```
//!
//! Head counts need not divide: see [`crate::heads`]. Joint tokens are a second source of rows; after the last group every
//! rank shares its joint rows of the results with all ranks, so replicas are bitwise equal.

use std::ops::Range;

use longspan_hal::{Backend, Device, Error, Result, View, ViewMut};

use crate::message::Prepared;
use crate::rows::Segment;
use crate::run::{Event, Run, Stream, missing};
use crate::ulysses_layout::{Gathering, Kind, ROWS, SLOTS, block_extent, local_parts, packed_heads};
use crate::workspace::Region;

/// The all-to-alls of one pass: layout and exchanges, by head group.
#[derive(Debug)]
pub(crate) struct Ulysses<B: Backend> {
    pub layout: Gathering,
    pub gather: Vec<Prepared<B>>,
    pub gather_rows: Option<Prepared<B>>,
    pub give_back: Vec<Prepared<B>>,
    pub share: Option<Prepared<B>>,
}

/// Where the caller wants one result: its shard, and, with joint tokens, the replicated joint rows.
#[derive(Debug)]
pub(crate) struct Target<'a, B: Backend> {
    pub shard: ViewMut<'a, B::Device>,
    pub joint: Option<ViewMut<'a, B::Device>>,
}

/// How far the copies of one pass are queued.
pub(crate) struct Copies<B: Backend> {
    /// Behind this rank's own part of the blocks, by slot.
    taken: [Option<Event<B>>; SLOTS],
    /// Behind what came last.
    collected: Option<Event<B>>,
}

impl<B: Backend> Ulysses<B> {
    /// Queues the all-to-all of group `g` towards heads; `sources` are, for each input, the shard and the joint tensor.
    ///
    /// Its slot is free: the exchange that gave back group `g - 2` is ahead of it on the same stream.
    pub fn gather(&self, run: &Run<'_, B>, g: usize, sources: &[View<'_, B::Device>]) -> Result<Event<B>> {
        run.exchange(&self.gather[g], sources)
    }

    /// Queues the all-to-all of lse and delta, of all groups, and the copies of this rank's own part; sources as those of
    /// [`Ulysses::gather`].
    pub fn gather_rows(&self, run: &Run<'_, B>, sources: &[View<'_, B::Device>]) -> Result<Event<B>> {
        let rows = self.gather_rows.as_ref().ok_or_else(|| Error::invalid("backward", "it was not laid out"))?;
        let gathered = run.exchange(rows, sources)?;
        let heads = run.plan.cut.of_rank(run.plan.at.ulysses as usize);
        let blocks: Vec<_> = self.layout.rows.iter().zip(ROWS).map(|(r, kind)| (kind, heads.clone(), *r)).collect();
        take(run, run.compute, &blocks, sources)?;
        Ok(gathered)
    }

    /// Queues copies of this rank's own part of the blocks of the first head groups.
    pub fn first(&self, run: &Run<'_, B>, sources: &[View<'_, B::Device>]) -> Result<Copies<B>> {
        let taken = [self.take(run, 0, sources)?, self.take(run, 1, sources)?];
        Ok(Copies { taken, collected: None })
    }

    /// What reads the blocks of group `g` from now on waits for this rank's own part of them: attention, and the ring.
    pub fn before(&self, run: &Run<'_, B>, g: usize, copies: &Copies<B>) -> Result<()> {
        let taken = copies.taken[g % SLOTS].as_ref();
        run.wait(run.compute, taken)?;
        run.wait(run.transfer, taken)
    }

    /// Queues, behind the compute queued so far: the all-to-all of group `g` back to rows, and behind that of `rest`, which no
    /// message waits for: this rank's own part of it, what came, and its own part of the group that has the slot next.
    pub fn after(
        &self,
        run: &Run<'_, B>,
        g: usize,
        sources: &[View<'_, B::Device>],
        targets: &[Target<'_, B>],
        copies: &mut Copies<B>,
        rest: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        run.order(run.compute, run.transfer)?;
        // `packed` is free; that of the last group always was.
        if g + 1 < run.plan.cut.groups() {
            run.wait(run.transfer, copies.collected.as_ref())?;
        }
        let gave = run.exchange(&self.give_back[g], &self.results(run, g)?)?;
        rest()?;
        run.order(run.compute, run.aside)?;
        run.aside("keep", g, || self.keep(run, g, targets))?;
        run.wait(run.aside, Some(&gave))?;
        run.aside("collect", g, || self.collect(run, g, targets))?;
        copies.collected = Some(run.record(run.aside)?);
        // Attention waits for this, and so for `collect`, which else could miss the time between two attentions once more, and with
        // it hold up the next all-to-alls.
        copies.taken[g % SLOTS] = self.take(run, g + SLOTS, sources)?;
        Ok(())
    }

    /// Queues copies of this rank's own part of the blocks of group `g`, if there is one.
    fn take(&self, run: &Run<'_, B>, g: usize, sources: &[View<'_, B::Device>]) -> Result<Option<Event<B>>> {
        if g >= run.plan.cut.groups() {
            return Ok(None);
        }
        let kinds = self.layout.inputs.iter().zip(&self.layout.slot(g).inputs);
        let blocks = kinds.map(|(kind, region)| {
            let block = region.with_extent(block_extent(run.plan, *kind, g))?;
            Ok((*kind, kind.heads(run.plan, g).clone(), block))
        });
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        run.aside("take", g, || take(run, run.aside, &blocks, sources))?;
        run.record(run.aside).map(Some)
    }

    /// lse and delta of the block, the heads of group `g`.
    pub fn rows<'a>(&self, run: &Run<'a, B>, g: usize) -> Result<Vec<View<'a, B::Device>>> {
        let (mine, u) = (self.layout.rows.iter(), run.plan.at.ulysses as usize);
        let (heads, first) = (&run.plan.cut.of(g, u).q, run.plan.cut.of_rank(u).start);
        mine.map(|r| run.workspace.view(r)?.narrow(2, heads.start - first..heads.end - first)).collect()
    }

    /// The gathered blocks of group `g`.
    pub fn inputs<'a>(&self, run: &Run<'a, B>, g: usize) -> Result<Vec<View<'a, B::Device>>> {
        let slot = self.layout.slot(g);
        let kinds = self.layout.inputs.iter().zip(&slot.inputs);
        kinds.map(|(k, r)| run.workspace.view(&r.with_extent(block_extent(run.plan, *k, g))?)).collect()
    }

    /// Where the results of the block of group `g` are computed.
    pub fn outputs<'a>(&self, run: &Run<'a, B>, g: usize) -> Result<Vec<ViewMut<'a, B::Device>>> {
        let slot = self.layout.slot(g);
        let kinds = self.layout.outputs.iter().zip(&slot.outputs);
        kinds.map(|(k, r)| run.workspace.view_mut(&r.with_extent(block_extent(run.plan, *k, g))?)).collect()
    }

    /// Queues, before the first group: f32 sums of replicated KV heads start at 0.
    pub fn start(&self, run: &Run<'_, B>) -> Result<()> {
        for region in self.layout.sums.iter().filter(|r| !r.at.is_empty()) {
            run.member.device.fill(run.aside, 0.0, run.workspace.view_mut(region)?)?;
        }
        Ok(())
    }

    /// The results of the block of group `g`.
    fn results<'a>(&self, run: &Run<'a, B>, g: usize) -> Result<Vec<View<'a, B::Device>>> {
        Ok(self.outputs(run, g)?.iter().map(ViewMut::read).collect())
    }

    /// Copies this rank's own part of the results of group `g`.
    fn keep(&self, run: &Run<'_, B>, g: usize, targets: &[Target<'_, B>]) -> Result<()> {
        let results = self.results(run, g)?;
        for (i, kind) in self.layout.outputs.iter().enumerate().filter(|(i, _)| self.sum(*i).is_none()) {
            let heads = kind.heads(run.plan, g);
            for (part, segment) in kind.rows(run.plan).segments(run.plan.at).into_iter().enumerate() {
                if let Some(into) = self.own(run, i, part, targets)? {
                    run.copy(run.aside, results[i].narrow(1, segment.block)?, into.narrow(2, heads.clone())?)?;
                }
            }
        }
        Ok(())
    }

    fn collect(&self, run: &Run<'_, B>, g: usize, targets: &[Target<'_, B>]) -> Result<()> {
        let plan = run.plan;
        for (i, kind) in self.layout.outputs.iter().enumerate() {
            let (places, heads) = packed_heads(plan, g, *kind);
            let packed = &self.layout.packed(g)[i];
            let [batch, rows, _, dim] = packed.at.extent();
            let packed = run.workspace.view(&packed.with_extent([batch, rows, heads, dim])?)?;
            let summed = self.sum(i).is_some();
            let came = places.iter().enumerate().filter(|(u, _)| summed || *u != plan.at.ulysses as usize);
            for (u, place) in came {
                let of_rank = kind.which.of(plan.cut.of(g, u)).clone();
                for (part, rows) in local_parts(plan, *kind).into_iter().enumerate() {
                    let came = packed.narrow(1, rows.clone())?.narrow(2, place.clone())?;
                    if let Some(sum) = self.sum(i) {
                        let sum = run.workspace.view_mut(sum)?.narrow(1, rows)?.narrow(2, of_rank.clone())?;
                        run.accumulate(run.aside, sum, &[sum.read(), came])?;
                    } else if let Some(into) = self.own(run, i, part, targets)? {
                        run.copy(run.aside, came, into.narrow(2, of_rank.clone())?)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Queues, after the last group: sums are rounded, joint rows are shared.
    pub fn finish(&self, run: &Run<'_, B>, targets: &[Target<'_, B>]) -> Result<()> {
        if !self.layout.sums.is_empty() {
            run.aside("collect", run.plan.cut.groups() - 1, || self.round(run, targets))?;
        }
        let (Some(joint), Some(share)) = (&self.layout.joint, &self.share) else {
            return Ok(());
        };
        let own = joint.own.iter().map(|r| run.workspace.view(r)).collect::<Result<Vec<_>>>()?;
        run.order(run.aside, run.transfer)?;
        run.exchange(share, &own)?;
        for (all, target) in joint.all.iter().zip(targets) {
            run.copy(run.transfer, run.workspace.view(all)?, target.joint.ok_or_else(|| missing("joint"))?)?;
        }
        Ok(())
    }

    fn round(&self, run: &Run<'_, B>, targets: &[Target<'_, B>]) -> Result<()> {
        for (i, kind) in self.layout.outputs.iter().enumerate() {
            let Some(sum) = self.sum(i) else { continue };
            for (part, rows) in local_parts(run.plan, *kind).into_iter().enumerate() {
                if let Some(into) = self.own(run, i, part, targets)? {
                    run.accumulate(run.aside, into, &[run.workspace.view(sum)?.narrow(1, rows)?])?;
                }
            }
        }
        Ok(())
    }

    /// The f32 sum of output `i`, where its heads are replicated.
    fn sum(&self, i: usize) -> Option<&Region> {
        if self.layout.sums.is_empty() { None } else { i.checked_sub(1).and_then(|i| self.layout.sums.get(i)) }
    }

    /// Where this rank's own rows of output `i` go: the caller's shard, or this rank's joint rows.
    fn own<'a>(
        &self,
        run: &'a Run<'_, B>,
        i: usize,
        part: usize,
        targets: &'a [Target<'_, B>],
    ) -> Result<Option<ViewMut<'a, B::Device>>> {
        match (part, &self.layout.joint) {
            (0, _) => Ok(Some(targets[i].shard)),
            (_, Some(joint)) => run.workspace.view_mut(&joint.own[i]).map(Some),
            (_, None) => Ok(None),
        }
    }
}

/// Copies this rank's own rows and heads of `sources` to its blocks.
fn take<B: Backend>(
    run: &Run<'_, B>,
    on: &Stream<B>,
    blocks: &[(Kind, Range<usize>, Region)],
    sources: &[View<'_, B::Device>],
) -> Result<()> {
    for (i, (kind, heads, block)) in blocks.iter().enumerate() {
        let block = run.workspace.view_mut(block)?;
        for (part, Segment { block: rows, source }) in kind.rows(run.plan).segments(run.plan.at).into_iter().enumerate()
        {
            let from = sources[2 * i + part].narrow(1, source)?.narrow(2, heads.clone())?;
            run.copy(on, from, block.narrow(1, rows)?)?;
        }
    }
    Ok(())
}
