//! Random meshes, layouts and masks, shared by the tests.
#![allow(dead_code)]

use longspan_seqpar::layout::{Layout, Run};
use longspan_seqpar::mask::{Documents, Mask};
use longspan_seqpar::mesh::{Coords, Mesh, Placement};
use proptest::prelude::*;

pub fn meshes(ring: u32) -> impl Strategy<Value = Mesh> {
    let placement = prop_oneof![Just(Placement::RingInner), Just(Placement::UlyssesInner)];
    (1u32..5, placement).prop_map(move |(u, placement)| Mesh::new(u, ring, placement).expect("small"))
}

/// The layouts with a name.
pub fn named(kind: usize, seq: usize, mesh: &Mesh) -> Layout {
    match kind {
        0 => Layout::contiguous(seq, mesh),
        1 => Layout::zigzag(seq, mesh),
        _ => Layout::stripe(seq, mesh),
    }
}

/// Chunks of random lengths with random owners in random order; some are split into runs of `step`, some are empty.
pub fn custom(seq: usize, mesh: Mesh, steps: std::ops::Range<usize>) -> impl Strategy<Value = Layout> {
    let chunk = (0usize..12, 0..mesh.ring(), steps, any::<prop::sample::Index>());
    prop::collection::vec(chunk, 1..8).prop_map(move |chunks| {
        let mut lists = vec![Vec::new(); mesh.ring() as usize];
        let (mut start, last) = (0, chunks.len() - 1);
        for (n, (len, owner, step, place)) in chunks.into_iter().enumerate() {
            let len = if n == last { seq - start } else { len.min(seq - start) };
            for i in 0..step {
                let run = Run { start: start + i, len: (len + step - 1 - i) / step, step };
                let list: &mut Vec<Run> = &mut lists[(owner as usize + i) % mesh.ring() as usize];
                list.insert(place.index(list.len() + 1), run);
            }
            start += len;
        }
        Layout::from_runs(seq, &mesh, lists).expect("a bijection by construction")
    })
}

/// Any layout of `seq` tokens whose runs all have one step.
pub fn layouts_of(seq: usize, mesh: Mesh) -> impl Strategy<Value = Layout> {
    prop_oneof![3 => (0usize..3).prop_map(move |kind| named(kind, seq, &mesh)), 1 => custom(seq, mesh, 1..2)]
}

/// Any layout, also one of unequal steps.
pub fn layouts(seq: impl Strategy<Value = usize>) -> impl Strategy<Value = Layout> {
    (seq, 1u32..6).prop_flat_map(|(seq, ring)| meshes(ring).prop_map(move |mesh| (seq, mesh))).prop_flat_map(
        |(seq, mesh)| {
            prop_oneof![3 => (0usize..3).prop_map(move |kind| named(kind, seq, &mesh)), 2 => custom(seq, mesh, 1..4)]
        },
    )
}

pub fn documents(seq: usize) -> impl Strategy<Value = Documents> {
    prop::collection::vec(0..=seq as i32, 0..6).prop_map(move |mut borders| {
        borders.extend([0, seq as i32]);
        borders.sort_unstable();
        Documents::from_cu_seqlens(&borders, seq).expect("sorted")
    })
}

pub fn masks(seq: usize) -> impl Strategy<Value = Mask> {
    let side = || prop_oneof![3 => (0usize..12).prop_map(Some), 1 => Just(None), 1 => Just(Some(usize::MAX))];
    let shape = prop_oneof![
        Just(Mask::causal()),
        Just(Mask::full()),
        (0usize..20).prop_map(Mask::prefix),
        (side(), side()).prop_map(|(left, right)| Mask::window(left, right)),
    ];
    (shape, prop::option::of(documents(seq))).prop_map(|(mask, documents)| match documents {
        Some(documents) => mask.with_documents(documents),
        None => mask,
    })
}

/// Global positions of the rows of a ring rank's block: the parts of its Ulysses ranks, in order.
pub fn block(layout: &Layout, ring: u32) -> Vec<usize> {
    let rank = |ulysses| layout.mesh().rank(Coords { ring, ulysses });
    (0..layout.mesh().ulysses()).flat_map(|u| layout.positions(rank(u))).collect()
}
