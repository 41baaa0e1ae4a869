//! Memory and messages of the all-to-alls, worked out without a device. The algorithm is in `ulysses.rs`.

use std::ops::Range;

use longspan_hal::{DType, Result};

use crate::heads::Which;
use crate::message::{Messages, Recv, Send};
use crate::rows::{Rows, Segment};
use crate::workspace::{Arena, Place, Region, Tensor};
use crate::{Coords, Plan};

/// One tensor that an all-to-all moves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub which: Which,
    pub dim: usize,
    pub dtype: DType,
}

impl Kind {
    /// Rows of the tensor.
    pub fn rows<'a>(&self, plan: &'a Plan) -> &'a Rows {
        match self.which {
            Which::Kv => &plan.k,
            Which::Query => &plan.q,
        }
    }

    /// Heads of the whole problem.
    fn heads_total(&self, plan: &Plan) -> usize {
        match self.which {
            Which::Kv => plan.problem.kv_heads,
            Which::Query => plan.problem.heads,
        }
    }

    /// Whether ranks bring f32 contributions to the same heads, which are summed at home: only gradients of replicated KV heads.
    fn summed(&self, plan: &Plan) -> bool {
        plan.cut.replicates() && matches!(self.which, Which::Kv)
    }

    /// This rank's heads in group `g`.
    pub fn heads<'a>(&self, plan: &'a Plan, g: usize) -> &'a Range<usize> {
        self.which.of(plan.cut.of(g, plan.at.ulysses as usize))
    }
}

/// What a forward (q, k, v) or a backward (also dout) gathers of a head group.
fn inputs(plan: &Plan, backward: bool) -> Vec<Kind> {
    use Which::{Kv, Query};
    let p = &plan.problem;
    let kind = |which, dim, dtype| Kind { which, dim, dtype };
    let mut kinds =
        vec![kind(Query, p.head_dim, p.dtype), kind(Kv, p.head_dim, p.dtype), kind(Kv, p.head_dim_v, p.dtype)];
    if backward {
        kinds.push(kind(Query, p.head_dim_v, p.dtype));
    }
    kinds
}

/// What comes back: out and lse, or dq, dk and dv (f32 where heads are replicated).
fn outputs(plan: &Plan, backward: bool) -> Vec<Kind> {
    use Which::{Kv, Query};
    let p = &plan.problem;
    let kind = |which, dim, dtype| Kind { which, dim, dtype };
    if !backward {
        return vec![kind(Query, p.head_dim_v, p.dtype), kind(Query, 1, DType::F32)];
    }
    let shared = if plan.cut.replicates() { DType::F32 } else { p.dtype };
    vec![kind(Query, p.head_dim, p.dtype), kind(Kv, p.head_dim, shared), kind(Kv, p.head_dim_v, shared)]
}

/// lse and delta.
pub(crate) const ROWS: [Kind; 2] = [Kind { which: Which::Query, dim: 1, dtype: DType::F32 }; 2];

/// Which input dout is.
const DOUT: usize = 3;

/// Head groups in flight: one travels while the other computes.
pub(crate) const SLOTS: usize = 2;

/// The memory of one head group in flight.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// Gathered blocks, in the window.
    pub inputs: Vec<Region>,
    /// Results of the block, in the buffer or in place of inputs.
    pub outputs: Vec<Region>,
}

/// The joint rows of the results.
#[derive(Clone, Debug)]
pub(crate) struct Joint {
    /// This rank's rows, all heads.
    pub own: Vec<Region>,
    /// All rows, in the window.
    pub all: Vec<Region>,
    /// The exchange that shares them.
    pub share: Messages,
}

/// Memory and messages of the all-to-alls of one pass.
#[derive(Clone, Debug)]
pub(crate) struct Gathering {
    pub inputs: Vec<Kind>,
    pub outputs: Vec<Kind>,
    /// Two where there are several head groups, so that one travels while the other computes.
    pub slots: Vec<Slot>,
    /// lse and delta of the block for a backward, this rank's heads of all groups, in the window.
    pub rows: Vec<Region>,
    /// Results of a group that came back, heads packed in rank order, in the window: of all groups but the last, and of the last.
    packed: [Vec<Region>; 2],
    /// f32 sums of dk and dv over all heads, where KV heads are replicated.
    pub sums: Vec<Region>,
    pub joint: Option<Joint>,
    /// By head group.
    pub gather: Vec<Messages>,
    pub gather_rows: Option<Messages>,
    /// By head group.
    pub give_back: Vec<Messages>,
}

impl Gathering {
    /// Lays out the pass.
    pub fn new(plan: &Plan, backward: bool, arena: &mut Arena) -> Result<Self> {
        let (inputs, outputs) = (inputs(plan, backward), outputs(plan, backward));
        let groups = 0..plan.cut.groups();
        let batch = plan.problem.batch;
        let last = plan.cut.groups() - 1;
        let packing = [0..last, last..last + 1].map(|groups| {
            let tensor = |k: &Kind| {
                let heads = groups.clone().map(|g| packed_heads(plan, g, *k).1).max().unwrap_or(0);
                (k.dtype, [batch, local_rows(plan, *k), heads, k.dim])
            };
            outputs.iter().map(tensor).collect::<Vec<Tensor>>()
        });
        let sharing = Sharing { plan, backward, outputs: &outputs };
        let slots = slots(&sharing, &inputs, &packing, arena)?;
        let mut packed = [Vec::new(), Vec::new()];
        for (of, i) in sharing.all_packed() {
            let tensor = packing[of][i];
            packed[of].push(match sharing.packed(of, i) {
                Some((slot, input)) => slots[slot].inputs[input].tensor(tensor)?,
                None => arena.take(Place::Window, tensor.0, tensor.1)?,
            });
        }
        let (rows, gather_rows) =
            if backward { gather_rows(plan, arena).map(|(r, m)| (r, Some(m)))? } else { (Vec::new(), None) };
        let mut sums = Vec::new();
        for k in outputs.iter().filter(|k| k.summed(plan)) {
            let extent = [batch, local_rows(plan, *k), k.heads_total(plan), k.dim];
            sums.push(arena.take(Place::Buffer, DType::F32, extent)?);
        }
        let joint = if plan.problem.joint > 0 { Some(joint(plan, &outputs, backward, arena)?) } else { None };
        let gather = groups.clone().map(|g| {
            let blocks = inputs.iter().zip(&slots[g % SLOTS].inputs);
            let blocks = blocks.map(|(k, r)| r.with_extent(block_extent(plan, *k, g))).collect::<Result<Vec<_>>>()?;
            gather(plan, &inputs, |which, u| which.of(plan.cut.of(g, u)).clone(), &blocks)
        });
        let gather = gather.collect::<Result<_>>()?;
        let give_back = groups.map(|g| give_back(plan, g, &outputs, &packed[usize::from(g == last)]));
        let give_back = give_back.collect::<Result<_>>()?;
        Ok(Self { inputs, outputs, slots, rows, packed, sums, joint, gather, gather_rows, give_back })
    }

    /// Slot of head group `g`.
    pub fn slot(&self, g: usize) -> &Slot {
        &self.slots[g % SLOTS]
    }

    /// Where results of head group `g` come back.
    pub fn packed(&self, g: usize) -> &[Region] {
        &self.packed[usize::from(g + 1 == self.give_back.len())]
    }
}

/// Rows of this rank's own tokens: its shard, then its joint tokens.
fn local_rows(plan: &Plan, kind: Kind) -> usize {
    kind.rows(plan).segments(plan.at).iter().map(|s| s.source.len()).sum()
}

/// Where this rank's own rows lie among its local rows: its shard, its joint tokens.
pub(crate) fn local_parts(plan: &Plan, kind: Kind) -> [Range<usize>; 2] {
    let [shard, joint] = kind.rows(plan).segments(plan.at).map(|s| s.source.len());
    [0..shard, shard..shard + joint]
}

/// Extent of this rank's block of `kind` in group `g`.
pub(crate) fn block_extent(plan: &Plan, kind: Kind, g: usize) -> [usize; 4] {
    [plan.problem.batch, kind.rows(plan).block(plan.at.ring), kind.heads(plan, g).len(), kind.dim]
}

/// Where the heads of each rank lie in `packed`, and their number. The own ones are not packed where nothing is summed.
pub(crate) fn packed_heads(plan: &Plan, g: usize, kind: Kind) -> (Vec<Range<usize>>, usize) {
    let own = plan.at.ulysses as usize;
    plan.cut.packed(g, kind.which, |u| u != own || kind.summed(plan))
}

/// Which results lie in the memory of gathered inputs that nobody reads any more.
struct Sharing<'a> {
    plan: &'a Plan,
    backward: bool,
    outputs: &'a [Kind],
}

impl Sharing<'_> {
    /// The slot in whose input `i` the result `i` of `slot` lies. Gradients rounded from sums lie in place of what they are
    /// gradients of; others are written beside it, where the last of two groups finds the inputs of the first one read.
    ///
    /// In place, inputs of the slot's next group come while results of this one are still copied. Rows keep them apart, if they
    /// lie alike: own rows are copied one after the other, and those of others arrive after they were given back.
    fn result(&self, i: usize, slot: usize) -> Option<usize> {
        let (plan, groups) = (self.plan, self.plan.cut.groups());
        let kind = self.outputs.get(i).filter(|kind| !kind.summed(plan))?;
        if self.backward && plan.sums_apart() {
            let mut heads = (slot..groups).step_by(SLOTS).map(|g| kind.heads(plan, g).len());
            let first = heads.next();
            return heads.all(|n| Some(n) == first).then_some(slot);
        }
        (groups == 2 && slot == 1).then_some(0)
    }

    /// The slot and its input in whose memory results `i` come back, of the last group (`of` is 1) or of those before (0). The
    /// inputs of the last group are all read by then: dq comes into dout, dk and dv into k and v where no result is there. Of two
    /// groups the first one's dout is not gathered again either.
    fn packed(&self, of: usize, i: usize) -> Option<(usize, usize)> {
        let groups = self.plan.cut.groups();
        let slot = if of == 1 { (groups - 1) % SLOTS } else { 0 };
        let dead = self.backward && (of == 1 || groups == 2);
        let free = || of == 1 && (0..SLOTS).all(|other| self.result(i, other) != Some(slot));
        match i {
            _ if !dead => None,
            0 => Some((slot, DOUT)),
            _ => free().then_some((slot, i)),
        }
    }

    /// Everything that [`Sharing::packed`] is asked for.
    fn all_packed(&self) -> impl Iterator<Item = (usize, usize)> {
        let results = self.outputs.len();
        (0..2).flat_map(move |of| (0..results).map(move |i| (of, i)))
    }
}

/// The slots: each for the groups that use it, and with room for what shares their memory.
fn slots(sharing: &Sharing<'_>, inputs: &[Kind], packing: &[Vec<Tensor>; 2], arena: &mut Arena) -> Result<Vec<Slot>> {
    let (plan, outputs) = (sharing.plan, sharing.outputs);
    let count = plan.cut.groups().min(SLOTS);
    let tensor = |k: Kind, slot: usize| {
        let mut extent = block_extent(plan, k, 0);
        extent[2] = (slot..plan.cut.groups()).step_by(SLOTS).map(|g| k.heads(plan, g).len()).max().unwrap_or(0);
        (k.dtype, extent)
    };
    let mut slots = Vec::with_capacity(count);
    for slot in 0..count {
        let inputs = inputs.iter().enumerate().map(|(i, kind)| {
            let results = (0..count).filter(|of| sharing.result(i, *of) == Some(slot)).map(|of| tensor(outputs[i], of));
            let packed = sharing.all_packed().filter(|(of, p)| sharing.packed(*of, *p) == Some((slot, i)));
            let packed = packed.map(|(of, p)| packing[of][p]);
            arena.take_shared(Place::Window, tensor(*kind, slot), &results.chain(packed).collect::<Vec<_>>())
        });
        slots.push(Slot { inputs: inputs.collect::<Result<_>>()?, outputs: Vec::with_capacity(outputs.len()) });
    }
    for slot in 0..count {
        for (i, kind) in outputs.iter().enumerate() {
            let (dtype, extent) = tensor(*kind, slot);
            let region = match sharing.result(i, slot) {
                Some(of) => slots[of].inputs[i].tensor((dtype, extent))?,
                None => arena.take(Place::Buffer, dtype, extent)?,
            };
            slots[slot].outputs.push(region);
        }
    }
    Ok(slots)
}

fn peers(plan: &Plan) -> impl Iterator<Item = (usize, Coords, u32)> {
    let (mesh, ring) = (plan.mesh, plan.at.ring);
    (0..mesh.ulysses()).map(move |ulysses| {
        let at = Coords { ring, ulysses };
        (ulysses as usize, at, mesh.rank(at))
    })
}

/// lse and delta of the block, and the messages that bring them: once a pass, for all head groups.
fn gather_rows(plan: &Plan, arena: &mut Arena) -> Result<(Vec<Region>, Messages)> {
    let own = plan.cut.of_rank(plan.at.ulysses as usize).len();
    let mut take = || arena.take(Place::Window, DType::F32, [plan.problem.batch, plan.q_block(), own, 1]);
    let blocks = vec![take()?, take()?];
    let messages = gather(plan, &ROWS, |_, u| plan.cut.of_rank(u), &blocks)?;
    Ok((blocks, messages))
}

/// Each other rank `u` gets its heads, `of(kind, u)`. Sources are, for each input, the shard and the joint tensor.
fn gather(
    plan: &Plan,
    kinds: &[Kind],
    of: impl Fn(Which, usize) -> Range<usize>,
    blocks: &[Region],
) -> Result<Messages> {
    let mut messages = Messages::default();
    for (u, at, peer) in peers(plan).filter(|(_, at, _)| *at != plan.at) {
        for (i, kind) in kinds.iter().enumerate() {
            let heads = of(kind.which, u);
            for (part, Segment { source, .. }) in kind.rows(plan).segments(plan.at).into_iter().enumerate() {
                messages.sends.push(Send {
                    to: peer,
                    source: 2 * i + part,
                    dtype: kind.dtype,
                    extent: [plan.problem.batch, source.len(), heads.len(), kind.dim],
                    rows: source,
                    heads: heads.clone(),
                });
            }
            for Segment { block: rows, .. } in kind.rows(plan).segments(at) {
                messages.recvs.push(Recv { from: peer, into: blocks[i].rows(rows)? });
            }
        }
    }
    Ok(messages)
}

/// Sources are the outputs of the block. A rank sends itself only what is summed.
fn give_back(plan: &Plan, g: usize, kinds: &[Kind], packed: &[Region]) -> Result<Messages> {
    let mut messages = Messages::default();
    let batch = plan.problem.batch;
    for (u, at, peer) in peers(plan) {
        for (i, kind) in kinds.iter().enumerate().filter(|(_, kind)| at != plan.at || kind.summed(plan)) {
            let mine = kind.heads(plan, g).len();
            for Segment { block, .. } in kind.rows(plan).segments(at) {
                messages.sends.push(Send {
                    to: peer,
                    source: i,
                    dtype: kind.dtype,
                    extent: [batch, block.len(), mine, kind.dim],
                    rows: block,
                    heads: 0..mine,
                });
            }
            let (places, heads) = packed_heads(plan, g, *kind);
            let region = packed[i].with_extent([batch, local_rows(plan, *kind), heads, kind.dim])?;
            for rows in local_parts(plan, *kind) {
                messages.recvs.push(Recv { from: peer, into: region.part(rows, places[u].clone())? });
            }
        }
    }
    Ok(messages)
}

/// Every rank's joint rows of the results go to every rank.
fn joint(plan: &Plan, outputs: &[Kind], backward: bool, arena: &mut Arena) -> Result<Joint> {
    let (mut own, mut all, mut share) = (Vec::new(), Vec::new(), Messages::default());
    let batch = plan.problem.batch;
    for (i, kind) in outputs.iter().enumerate() {
        // What is shared is rounded already.
        let dtype = if backward { plan.problem.dtype } else { kind.dtype };
        let heads = kind.heads_total(plan);
        let rows = |at: Coords| kind.rows(plan).segments(at)[1].source.clone();
        let extent = |rows: usize| [batch, rows, heads, kind.dim];
        own.push(arena.take(Place::Buffer, dtype, extent(rows(plan.at).len()))?);
        all.push(arena.take(Place::Window, dtype, extent(plan.problem.joint))?);
        for peer in 0..plan.mesh.size() {
            let mine = rows(plan.at).len();
            share.sends.push(Send { to: peer, source: i, rows: 0..mine, heads: 0..heads, dtype, extent: extent(mine) });
            share.recvs.push(Recv { from: peer, into: all[i].rows(rows(plan.mesh.coords(peer)))? });
        }
    }
    Ok(Joint { own, all, share })
}
