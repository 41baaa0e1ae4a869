//! A forward or a backward laid out: its regions and messages, and, once prepared, its exchanges.

use longspan_hal::{Backend, DType, Result};

use crate::message::{Messages, Prepared, Recv, Send};
use crate::ring::Ring;
use crate::ring_layout::RingLayout;
use crate::ulysses::Ulysses;
use crate::ulysses_layout::Gathering;
use crate::workspace::{Arena, Bytes, Place, Region, Workspace};
use crate::{Member, Plan, Traffic};

/// Regions and messages of one pass, worked out without a device.
#[derive(Clone, Debug)]
pub(crate) struct PassLayout {
    pub gathering: Option<Gathering>,
    pub ring: Option<RingLayout>,
    pub rows: Option<RowsLayout>,
    pub bytes: Bytes,
}

/// What a backward keeps beside the all-to-alls and the ring.
#[derive(Clone, Debug)]
pub(crate) struct RowsLayout {
    /// delta of the shard and of the joint rows.
    pub delta: [Region; 2],
    /// The caller's lse, of both, as delta lies: where it travels.
    pub lse: Option<[Region; 2]>,
    /// f32 sum of dq of the block, where it is not summed in the result itself.
    pub dq: Option<Region>,
    pub sinks: Option<SinksLayout>,
}

/// Gradient of the sinks: each rank's part over its own rows, shared with all, summed in rank order by each.
#[derive(Clone, Debug)]
pub(crate) struct SinksLayout {
    /// Parts of the shard and of the joint rows.
    pub parts: [Region; 2],
    /// All ranks' parts, `[2 N, 1, heads, 1]`, in the window.
    pub all: Region,
    pub share: Messages,
}

impl PassLayout {
    pub fn new(plan: &Plan, backward: bool) -> Result<Self> {
        let mut arena = Arena::default();
        let gathering = if plan.gathers() { Some(Gathering::new(plan, backward, &mut arena)?) } else { None };
        let ring = if plan.mesh.ring() > 1 { Some(RingLayout::new(plan, backward, &mut arena)?) } else { None };
        let rows = if backward { Some(RowsLayout::new(plan, &mut arena)?) } else { None };
        Ok(Self { gathering, ring, rows, bytes: arena.bytes() })
    }

    /// Every exchange's messages with phase and index, in the order in which they are prepared.
    pub fn messages(&self) -> Vec<(&'static str, u32, &Messages)> {
        let mut all: Vec<(&'static str, u32, &Messages)> = Vec::new();
        if let Some(x) = &self.gathering {
            all.extend(x.gather.iter().enumerate().map(|(g, m)| ("gather", g as u32, m)));
            all.extend(x.gather_rows.iter().map(|m| ("gather rows", 0, m)));
            all.extend(x.give_back.iter().enumerate().map(|(g, m)| ("give back", g as u32, m)));
            all.extend(x.joint.iter().map(|j| ("share joint", 0, &j.share)));
        }
        if let Some(x) = &self.ring {
            all.extend(x.hops.iter().flatten().enumerate().map(|(i, m)| ("hop", i as u32, m)));
            let returns = x.gradients.iter().flat_map(|g| g.returns.iter().flatten());
            all.extend(returns.enumerate().map(|(i, m)| ("return", i as u32, m)));
        }
        let sinks = self.rows.iter().filter_map(|r| r.sinks.as_ref());
        all.extend(sinks.map(|s| ("share dsinks", 0, &s.share)));
        all
    }

    /// Every message to another rank.
    pub fn traffic(&self, rank: u32) -> Vec<Traffic> {
        self.messages()
            .into_iter()
            .flat_map(|(phase, index, m)| {
                m.bytes_to_others(rank).map(move |(to, bytes)| Traffic { phase, index, to, bytes })
            })
            .collect()
    }
}

impl RowsLayout {
    fn new(plan: &Plan, arena: &mut Arena) -> Result<Self> {
        let p = &plan.problem;
        let mut rows = |rows| arena.take(Place::Buffer, DType::F32, [p.batch, rows, p.heads, 1]);
        let mut both = || Ok([rows(plan.local_rows()[0])?, rows(p.joint)?]);
        let delta = both()?;
        let lse = if plan.gathers() { Some(both()?) } else { None };
        let heads = (0..plan.cut.groups()).map(|g| crate::ring_layout::q_heads(plan, g)).max().unwrap_or(0);
        let dq = if plan.sums_apart() {
            Some(arena.take(Place::Buffer, DType::F32, [p.batch, plan.q_block(), heads, p.head_dim])?)
        } else {
            None
        };
        let sinks = if p.sinks { Some(SinksLayout::new(plan, arena)?) } else { None };
        Ok(Self { delta, lse, dq, sinks })
    }
}

impl SinksLayout {
    fn new(plan: &Plan, arena: &mut Arena) -> Result<Self> {
        let (ranks, heads) = (plan.mesh.size() as usize, plan.problem.heads);
        let mut part = || arena.take(Place::Buffer, DType::F32, [1, 1, heads, 1]);
        let parts = [part()?, part()?];
        let all = arena.take(Place::Window, DType::F32, [2 * ranks, 1, heads, 1])?;
        let mut share = Messages::default();
        for peer in 0..ranks {
            for source in 0..2 {
                share.sends.push(Send {
                    to: peer as u32,
                    source,
                    rows: 0..1,
                    heads: 0..heads,
                    dtype: DType::F32,
                    extent: [1, 1, heads, 1],
                });
                let part = 2 * peer + source;
                let into = Region { place: all.place, at: all.at.narrow(0, part..part + 1)? };
                share.recvs.push(Recv { from: peer as u32, into });
            }
        }
        Ok(Self { parts, all, share })
    }
}

/// A pass that can run.
#[derive(Debug)]
pub(crate) struct Pass<B: Backend> {
    pub ulysses: Option<Ulysses<B>>,
    pub ring: Option<Ring<B>>,
    pub rows: Option<RowsLayout>,
    pub share_sinks: Option<Prepared<B>>,
}

impl<B: Backend> Pass<B> {
    /// Collective: prepares every exchange of `layout`.
    pub fn prepare(layout: PassLayout, member: &Member<B>, workspace: &Workspace<B::Device>) -> Result<Self> {
        let steps = layout.ring.as_ref().map_or(1, |r| r.hops.first().map_or(1, Vec::len));
        let mut ready: Vec<(&'static str, Prepared<B>)> = Vec::new();
        for (phase, index, messages) in layout.messages() {
            ready.push((phase, messages.clone().prepare(member, workspace, phase, index)?));
        }
        let mut of = |phase: &str| -> Vec<Prepared<B>> {
            let (these, others) = std::mem::take(&mut ready).into_iter().partition(|(p, _)| *p == phase);
            ready = others;
            let these: Vec<(&'static str, Prepared<B>)> = these;
            these.into_iter().map(|(_, x)| x).collect()
        };
        let ulysses = layout.gathering.map(|layout| Ulysses {
            layout,
            gather: of("gather"),
            gather_rows: of("gather rows").pop(),
            give_back: of("give back"),
            share: of("share joint").pop(),
        });
        let ring = layout.ring.map(|layout| Ring {
            layout,
            hops: by_group(of("hop"), steps),
            returns: by_group(of("return"), steps),
        });
        let share_sinks = of("share dsinks").pop();
        Ok(Self { ulysses, ring, rows: layout.rows, share_sinks })
    }

    /// Staging of the collective for these exchanges.
    pub fn staging(&self, member: &Member<B>) -> usize {
        use longspan_hal::Collective;
        let of_ulysses =
            self.ulysses.iter().flat_map(|u| u.gather.iter().chain(&u.gather_rows).chain(&u.give_back).chain(&u.share));
        let of_ring = self.ring.iter().flat_map(|r| r.hops.iter().flatten().chain(r.returns.iter().flatten()));
        of_ulysses.chain(of_ring).chain(&self.share_sinks).map(|x| member.collective.staging_bytes(&x.exchange)).sum()
    }
}

fn by_group<B: Backend>(list: Vec<Prepared<B>>, steps: usize) -> Vec<Vec<Prepared<B>>> {
    let mut groups: Vec<Vec<Prepared<B>>> = Vec::new();
    for (i, x) in list.into_iter().enumerate() {
        match groups.last_mut() {
            Some(group) if !i.is_multiple_of(steps) => group.push(x),
            _ => groups.push(vec![x]),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ulysses_layout::{Kind, SLOTS, block_extent};
    use crate::{Coords, Documents, Layout, Mask, Mesh, Placement, Problem, Route};

    /// A problem with layouts, masks and meshes of every kind.
    fn plans() -> impl Strategy<Value = Vec<Plan>> {
        let mesh = (1u32..5, 1u32..5, any::<bool>());
        let heads = (1usize..4, 1usize..4, 1usize..4, 1usize..3);
        (mesh, heads, 0usize..40, 0usize..3, 0usize..6, prop_oneof![3 => Just(0usize), 1 => 1usize..9]).prop_map(
            |((u, r, inner), (kv, group, head_groups, batch), seq, layout, mask, joint)| {
                let placement = if inner { Placement::RingInner } else { Placement::UlyssesInner };
                let mesh = Mesh::new(u, r, placement).expect("not empty");
                let layout = [Layout::contiguous, Layout::zigzag, Layout::stripe][layout](seq, &mesh);
                let bounds = [0, seq as i32 / 3, seq as i32 / 3, seq as i32];
                let documents = || Documents::from_cu_seqlens(&bounds, seq).expect("ascending");
                let mask = match if joint > 0 { 0 } else { mask } {
                    0 => Mask::full(),
                    1 => Mask::causal(),
                    2 => Mask::window(Some(3), Some(0)),
                    3 => Mask::window(Some(1), Some(4)),
                    4 => Mask::causal().with_documents(documents()),
                    _ => Mask::prefix(seq / 2),
                };
                let problem = Problem::new(DType::Bf16, batch, [kv * group, kv], 8)
                    .with_head_dim_v(4)
                    .with_sinks(true)
                    .with_joint(joint)
                    .with_head_groups(head_groups.min(kv * group))
                    .with_backward(true);
                (0..mesh.size()).map(|rank| Plan::new(&problem, &layout, &layout, &mask, rank).expect("fits")).collect()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// What every rank sends, every other expects: number, order, dtype and extent, in every exchange.
        #[test]
        fn messages_of_all_ranks_match(plans in plans(), backward in any::<bool>()) {
            let layouts: Vec<_> = plans.iter().map(|p| PassLayout::new(p, backward).expect("laid out")).collect();
            let all: Vec<_> = layouts.iter().map(PassLayout::messages).collect();
            for list in &all {
                prop_assert_eq!(list.len(), all[0].len());
            }
            for x in 0..all[0].len() {
                for (from, sender) in all.iter().enumerate() {
                    for (to, receiver) in all.iter().enumerate() {
                        let sent = sender[x].2.sends.iter().filter(|s| s.to as usize == to).map(|s| (s.dtype, s.extent));
                        let awaited = receiver[x].2.recvs.iter().filter(|r| r.from as usize == from);
                        let awaited = awaited.map(|r| (r.into.at.dtype(), r.into.at.extent()));
                        prop_assert_eq!(sent.collect::<Vec<_>>(), awaited.collect::<Vec<_>>(), "{} {} -> {}", all[0][x].0, from, to);
                    }
                }
            }
        }

        /// The ring sends what the routes say, and not a byte more.
        #[test]
        fn ring_bytes_are_those_of_the_route(plans in plans()) {
            for plan in plans.iter().filter(|p| p.problem.joint == 0 && p.mesh.ring() > 1) {
                let p = &plan.problem;
                let route = Route::new(&plan.mask, &plan.q.layout, &plan.k.layout, plan.at.ring).expect("fits");
                let heads: usize = (0..plan.cut.groups()).map(|g| crate::ring_layout::kv_heads(plan, g)).sum();
                let row = p.batch * heads * (p.head_dim + p.head_dim_v);
                let moved = |rows: usize, size: usize| (rows * row * size) as u64;
                let traffic = plan.traffic(true).expect("laid out");
                let sent = |phase: &str| traffic.iter().filter(|t| t.phase == phase).map(|t| t.bytes).sum::<u64>();
                prop_assert_eq!(sent("hop"), moved(route.transfers().map(|t| t.3).sum(), p.dtype.size()));
                prop_assert_eq!(sent("return"), moved(route.returns().map(|t| t.3).sum(), 4));
            }
        }

        /// Receives of an exchange lie in the window, inside its bytes, and do not overlap.
        #[test]
        fn receives_have_a_place_of_their_own(plans in plans(), backward in any::<bool>()) {
            for plan in &plans {
                let layout = PassLayout::new(plan, backward).expect("laid out");
                for (phase, _, messages) in layout.messages() {
                    for (i, r) in messages.recvs.iter().enumerate() {
                        prop_assert_eq!(r.into.place, Place::Window);
                        prop_assert!(r.into.at.is_empty() || r.into.at.byte_range().end <= layout.bytes.window, "{}", phase);
                        prop_assert!(messages.recvs[..i].iter().all(|o| !o.into.at.overlaps(&r.into.at)), "{}", phase);
                    }
                }
            }
        }

        /// Tensors of head groups that hold something at the same time do not overlap.
        #[test]
        fn what_is_there_at_the_same_time_lies_apart(plans in plans(), backward in any::<bool>()) {
            for plan in plans.iter().filter(|p| p.gathers()) {
                let layout = PassLayout::new(plan, backward).expect("laid out");
                let x = layout.gathering.as_ref().expect("it gathers");
                let (groups, in_place) = (plan.cut.groups(), backward && plan.sums_apart());
                let none: &[Region] = &[];
                for g in 0..groups {
                    let [inputs, results] = [&x.slot(g).inputs, &x.slot(g).outputs].map(Vec::as_slice);
                    let written = if in_place { none } else { results };
                    let next = if g + 1 < groups { &x.slot(g + 1).inputs } else { none };
                    let (came, before) =
                        if g > 0 { (x.packed(g - 1), x.slot(g - 1).outputs.as_slice()) } else { (none, none) };
                    // That of the last group is not waited for.
                    let still = if g + 1 < groups { none } else { came };
                    // Beside the attention of `g`; beside what is sent of the group before, over which the next one is gathered
                    // row by row; as the results of `g` are rounded and sent.
                    for there in [
                        [inputs, written, next, came],
                        [inputs, written, before, came],
                        [results, next, x.packed(g), still],
                        [results, before, x.packed(g), still],
                    ] {
                        let all = there.concat();
                        for (i, a) in all.iter().enumerate() {
                            let meets = all[..i].iter().any(|b| a.place == b.place && a.at.overlaps(&b.at));
                            prop_assert!(!meets, "group {} of {}: {:?} in {:?}", g, groups, a, all);
                        }
                    }
                }
            }
        }

        /// What comes into a slot lies apart from results of its group before that are still copied: own rows from those of others.
        #[test]
        fn rows_of_a_slot_lie_apart(plans in plans(), backward in any::<bool>()) {
            for plan in plans.iter().filter(|p| p.gathers() && p.cut.groups() > SLOTS) {
                let layout = PassLayout::new(plan, backward).expect("laid out");
                let x = layout.gathering.as_ref().expect("it gathers");
                let rows = |kind: Kind, region: &Region, g: usize, u: u32| {
                    let block = region.with_extent(block_extent(plan, kind, g)).expect("it fits");
                    let segments = kind.rows(plan).segments(Coords { ulysses: u, ..plan.at });
                    segments.map(|s| block.rows(s.block).expect("it has them"))
                };
                for g in 0..plan.cut.groups() - SLOTS {
                    let slot = x.slot(g);
                    for (i, (a, b)) in slot.outputs.iter().zip(&slot.inputs).enumerate().filter(|(_, (a, b))| a.place == b.place) {
                        let (own, others) = (plan.at.ulysses, (0..plan.mesh.ulysses()).filter(|u| *u != plan.at.ulysses));
                        for [left, comes] in others.flat_map(|u| [[own, u], [u, own]]) {
                            let [left, comes] = [rows(x.outputs[i], a, g, left), rows(x.inputs[i], b, g + SLOTS, comes)];
                            prop_assert!(!left.iter().any(|a| comes.iter().any(|b| a.at.overlaps(&b.at))), "group {}", g);
                        }
                    }
                }
            }
        }
    }
}
