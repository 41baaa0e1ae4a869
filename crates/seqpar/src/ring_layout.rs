//! Memory and messages of the ring, worked out without a device. The algorithm is in `ring.rs`.

use std::ops::Range;

use longspan_hal::{DType, Result};

use crate::message::{Messages, Recv, Send};
use crate::workspace::{Arena, Place, Region};
use crate::{Needed, Plan, Way};

/// A key tensor and a value tensor, or their gradients.
pub(crate) type Pair = [Region; 2];

/// Memory and messages of the ring of one pass.
#[derive(Clone, Debug)]
pub(crate) struct RingLayout {
    /// Received K and V, by `(t - 1) % len`, in the window.
    pub kv: Vec<Pair>,
    /// acc, m and l of the forward.
    pub partial: Option<[Region; 3]>,
    pub gradients: Option<GradientLayout>,
    /// By head group and step; step 0 is empty.
    pub hops: Vec<Vec<Messages>>,
}

/// Memory and messages of the ring's backward.
#[derive(Clone, Debug)]
pub(crate) struct GradientLayout {
    /// dk, dv of the own block.
    pub home: Pair,
    /// dk, dv of the block of step `t`, by `(t - 1) % len`.
    pub fresh: Vec<Pair>,
    /// Sums of hop runs without their owners' part, in the window.
    pub travel: Pair,
    /// Direct runs of the own block that came home, in the window.
    pub came_home: Pair,
    /// By head group and step; step 0 is empty.
    pub returns: Vec<Vec<Messages>>,
}

impl RingLayout {
    /// Lays out the pass of a plan with more than one ring rank.
    pub fn new(plan: &Plan, backward: bool, arena: &mut Arena) -> Result<Self> {
        let steps = plan.legs.len();
        let largest = plan.legs[1..].iter().map(|l| l.rows).max().unwrap_or(0);
        let dtype = plan.problem.dtype;
        let slots = (steps - 1).min(2);
        let kv = (0..slots).map(|_| pair(plan, Place::Window, dtype, largest, arena)).collect::<Result<Vec<_>>>()?;
        let partial = if backward { None } else { Some(partials(plan, arena)?) };
        let hops = by_group_and_step(plan, |g, t| if t == 0 { Ok(Messages::default()) } else { hop(plan, g, t, &kv) })?;
        let gradients = if backward { Some(GradientLayout::new(plan, largest, arena)?) } else { None };
        Ok(Self { kv, partial, gradients, hops })
    }
}

impl GradientLayout {
    fn new(plan: &Plan, largest: usize, arena: &mut Arena) -> Result<Self> {
        let (own, slots) = (plan.k_block(), (plan.legs.len() - 1).min(2));
        let hops = plan.legs.iter().filter(|l| runs(&l.needed, Way::Hop).next().is_some()).map(|l| l.rows).max();
        let asked = plan.legs.iter().any(|l| !l.asked.is_empty());
        let mut take = |place, rows| pair(plan, place, DType::F32, rows, arena);
        let home = take(Place::Buffer, own)?;
        let fresh = (0..slots).map(|_| take(Place::Buffer, largest)).collect::<Result<Vec<_>>>()?;
        let travel = take(Place::Window, hops.unwrap_or(0))?;
        let came_home = take(Place::Window, if asked { own } else { 0 })?;
        let returns = by_group_and_step(plan, |g, t| ret(plan, g, t, &travel, &came_home))?;
        Ok(Self { home, fresh, travel, came_home, returns })
    }
}

fn by_group_and_step(plan: &Plan, make: impl Fn(usize, usize) -> Result<Messages>) -> Result<Vec<Vec<Messages>>> {
    (0..plan.cut.groups()).map(|g| (0..plan.legs.len()).map(|t| make(g, t)).collect()).collect()
}

/// The runs among `needed` that travel `way`.
pub(crate) fn runs(needed: &[Needed], way: Way) -> impl Iterator<Item = &Needed> {
    needed.iter().filter(move |n| n.way == way)
}

/// K and V regions that fit every head group.
fn pair(plan: &Plan, place: Place, dtype: DType, rows: usize, arena: &mut Arena) -> Result<Pair> {
    let p = &plan.problem;
    let heads = (0..plan.cut.groups()).map(|g| kv_heads(plan, g)).max().unwrap_or(0);
    Ok([
        arena.take(place, dtype, [p.batch, rows, heads, p.head_dim])?,
        arena.take(place, dtype, [p.batch, rows, heads, p.head_dim_v])?,
    ])
}

fn partials(plan: &Plan, arena: &mut Arena) -> Result<[Region; 3]> {
    let p = &plan.problem;
    let heads = (0..plan.cut.groups()).map(|g| q_heads(plan, g)).max().unwrap_or(0);
    let mut take = |dim| arena.take(Place::Buffer, DType::F32, [p.batch, plan.q_block(), heads, dim]);
    Ok([take(p.head_dim_v)?, take(1)?, take(1)?])
}

pub(crate) fn kv_heads(plan: &Plan, g: usize) -> usize {
    plan.cut.of(g, plan.at.ulysses as usize).kv.len()
}

pub(crate) fn q_heads(plan: &Plan, g: usize) -> usize {
    plan.cut.of(g, plan.at.ulysses as usize).q.len()
}

/// The pair as dense tensors of `rows` rows with the KV heads of group `g`.
pub(crate) fn shaped(plan: &Plan, pair: &Pair, g: usize, rows: usize) -> Result<Pair> {
    let p = &plan.problem;
    Ok([
        pair[0].with_extent([p.batch, rows, kv_heads(plan, g), p.head_dim])?,
        pair[1].with_extent([p.batch, rows, kv_heads(plan, g), p.head_dim_v])?,
    ])
}

/// Sources of a hop: held K, held V, own K, own V.
fn hop(plan: &Plan, g: usize, t: usize, kv: &[Pair]) -> Result<Messages> {
    let (next, previous) = plan.neighbours();
    let (leg, held) = (&plan.legs[t], &plan.legs[t - 1]);
    let mut list = Builder::new(plan, g, plan.problem.dtype);
    for n in runs(&held.needed, Way::Hop) {
        list.send(next, 0, &n.rows);
    }
    for n in &leg.asked {
        list.send(plan.ring_peer(plan.at.ring + t as u32), 2, &n.rows);
    }
    let into = shaped(plan, &kv[(t - 1) % kv.len()], g, leg.rows)?;
    for n in runs(&leg.needed, Way::Hop) {
        list.recv(previous, &into, &n.rows)?;
    }
    for n in runs(&leg.needed, Way::Direct) {
        list.recv(plan.ring_peer(leg.owner), &into, &n.rows)?;
    }
    Ok(list.messages)
}

/// Sources of a return at step `t > 0`: fresh dk, fresh dv.
fn ret(plan: &Plan, g: usize, t: usize, travel: &Pair, came_home: &Pair) -> Result<Messages> {
    if t == 0 {
        return Ok(Messages::default());
    }
    let (next, previous) = plan.neighbours();
    let (leg, following) = (&plan.legs[t], &plan.legs[(t + 1) % plan.legs.len()]);
    let mut list = Builder::new(plan, g, DType::F32);
    for n in runs(&leg.needed, Way::Hop) {
        list.send(next, 0, &n.rows);
    }
    for n in runs(&leg.needed, Way::Direct) {
        list.send(plan.ring_peer(leg.owner), 0, &n.rows);
    }
    let into = shaped(plan, travel, g, following.rows)?;
    for n in runs(&following.needed, Way::Hop) {
        list.recv(previous, &into, &n.rows)?;
    }
    if !leg.asked.is_empty() {
        let into = shaped(plan, came_home, g, plan.k_block())?;
        for n in &leg.asked {
            list.recv(plan.ring_peer(plan.at.ring + t as u32), &into, &n.rows)?;
        }
    }
    Ok(list.messages)
}

/// Builds messages that move rows of a key tensor and of a value tensor.
struct Builder<'a> {
    plan: &'a Plan,
    heads: usize,
    dtype: DType,
    messages: Messages,
}

impl<'a> Builder<'a> {
    fn new(plan: &'a Plan, g: usize, dtype: DType) -> Self {
        Self { plan, heads: kv_heads(plan, g), dtype, messages: Messages::default() }
    }

    fn send(&mut self, to: u32, source: usize, rows: &Range<usize>) {
        let p = &self.plan.problem;
        for (i, dim) in [p.head_dim, p.head_dim_v].into_iter().enumerate() {
            self.messages.sends.push(Send {
                to,
                source: source + i,
                rows: rows.clone(),
                heads: 0..self.heads,
                dtype: self.dtype,
                extent: [p.batch, rows.len(), self.heads, dim],
            });
        }
    }

    fn recv(&mut self, from: u32, into: &Pair, rows: &Range<usize>) -> Result<()> {
        for region in into {
            self.messages.recvs.push(Recv { from, into: region.rows(rows.clone())? });
        }
        Ok(())
    }
}
