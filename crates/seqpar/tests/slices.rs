//! Slices against the plain definition of a mask.

mod common;

use std::collections::HashMap;

use common::{block, layouts, layouts_of, masks, meshes, named};
use longspan_hal::{DType, Error, Slice, Slices, Spec};
use longspan_seqpar::layout::Layout;
use longspan_seqpar::mask::{Documents, Mask, Shape};
use longspan_seqpar::mesh::{Mesh, Placement};
use proptest::prelude::*;

/// How often each (batch, query, key) of global positions is selected, over all pairs of ring ranks.
fn selected(mask: &Mask, q: &Layout, k: &Layout, batch: u32) -> Result<HashMap<(u32, usize, usize), u32>, Error> {
    let mut times = HashMap::new();
    for q_ring in 0..q.mesh().ring() {
        for k_ring in 0..k.mesh().ring() {
            let slices = mask.slices(q, q_ring, k, k_ring, batch)?;
            let rows = [q.ring_rows(q_ring), k.ring_rows(k_ring)];
            let spec = Spec::new(DType::F32, batch as usize, rows, [1, 1], 8);
            assert_eq!(
                Slices::new(&spec, slices.clone()).expect("the kernels take them").as_slice().len(),
                slices.len()
            );
            let (queries, keys) = (block(q, q_ring), block(k, k_ring));
            for s in &slices {
                check_fields(s, &queries, &keys);
                for row in s.q.clone() {
                    for key in s.keys_of(row) {
                        *times.entry((s.batch, queries[row as usize], keys[key as usize])).or_default() += 1;
                    }
                }
            }
        }
    }
    Ok(times)
}

/// A slice selects something, says where its rows stand, and has no bound that excludes nothing.
fn check_fields(s: &Slice, queries: &[usize], keys: &[usize]) {
    assert!(s.pairs() > 0, "{s:?}");
    for (i, row) in (0..).zip(s.q.clone()) {
        assert_eq!(queries[row as usize] as i64, s.q_pos + i * s.q_step, "{s:?}");
    }
    for (j, row) in (0..).zip(s.k.clone()) {
        assert_eq!(keys[row as usize] as i64, s.k_pos + j * s.k_step, "{s:?}");
    }
    assert_eq!(s.is_full(), s.lo == Slice::LO_NONE && s.hi == Slice::HI_NONE, "{s:?}");
}

fn expected(mask: &Mask, q_seq: usize, k_seq: usize, batch: u32) -> HashMap<(u32, usize, usize), u32> {
    let pairs = (0..batch).flat_map(|b| (0..q_seq).flat_map(move |q| (0..k_seq).map(move |k| (b, q, k))));
    pairs.filter(|&(_, q, k)| mask.allows(q, k)).map(|pair| (pair, 1)).collect()
}

/// The definition once more, from the list of document starts and signed distances.
fn allowed_by_hand(mask: &Mask, q: usize, k: usize) -> bool {
    let mut start = 0;
    if let Some(documents) = mask.documents() {
        let of = |token| (0..documents.len()).find(|&i| documents.range(i).contains(&token)).expect("covered");
        if of(q) != of(k) {
            return false;
        }
        start = documents.range(of(q)).start;
    }
    let ahead = k as i128 - q as i128;
    match mask.shape() {
        Shape::Causal => ahead <= 0,
        Shape::Full => true,
        Shape::Prefix(keys) => ahead <= 0 || k < start + keys,
        Shape::Window { left, right } => {
            left.is_none_or(|left| -ahead <= left as i128) && right.is_none_or(|right| ahead <= right as i128)
        }
        other => panic!("{other:?} has no definition here"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn slices_cover_each_allowed_pair_once(
        (layout, mask) in (0usize..40, 1u32..6)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (layouts_of(seq, mesh), masks(seq))),
        batch in 1u32..3,
    ) {
        let seq = layout.seq();
        prop_assert_eq!(selected(&mask, &layout, &layout, batch)?, expected(&mask, seq, seq, batch));
    }

    #[test]
    fn unequal_steps_are_exact_or_refused(
        (layout, mask) in layouts(0usize..40).prop_flat_map(|layout| { let seq = layout.seq(); (Just(layout), masks(seq)) })
    ) {
        match selected(&mask, &layout, &layout, 1) {
            Ok(times) => prop_assert_eq!(times, expected(&mask, layout.seq(), layout.seq(), 1)),
            Err(e) => {
                prop_assert!(matches!(e, Error::Invalid { what: "layout", .. }), "{e}");
                prop_assert_eq!(layout.kind(), "custom");
                prop_assert_ne!(mask.shape(), Shape::Full);
            }
        }
    }

    #[test]
    fn queries_and_keys_may_lie_in_different_layouts(
        (q, k, mask) in (0usize..30, 1u32..5)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (0usize..2, 0usize..2, masks(seq))
                .prop_map(move |(a, b, mask)| (named(a, seq, &mesh), named(b, seq, &mesh), mask)))
    ) {
        prop_assert_eq!(selected(&mask, &q, &k, 1)?, expected(&mask, q.seq(), k.seq(), 1));
    }

    #[test]
    fn cross_attention_is_full(
        (q, k) in (0usize..30, 0usize..30, 1u32..5)
            .prop_flat_map(|(q, k, ring)| (Just(q), Just(k), meshes(ring)))
            .prop_flat_map(|(q, k, mesh)| (layouts_of(q, mesh), layouts_of(k, mesh)))
    ) {
        prop_assert_eq!(selected(&Mask::full(), &q, &k, 1)?, expected(&Mask::full(), q.seq(), k.seq(), 1));
        if q.seq() != k.seq() {
            prop_assert!(Mask::causal().slices(&q, 0, &k, 0, 1).is_err());
        }
    }

    #[test]
    fn the_definition_is_the_definition(
        (seq, mask) in (1usize..30).prop_flat_map(|seq| (Just(seq), masks(seq)))
    ) {
        for q in 0..seq {
            for k in 0..seq {
                prop_assert_eq!(mask.allows(q, k), allowed_by_hand(&mask, q, k), "query {} key {}", q, k);
            }
        }
    }

    #[test]
    fn words_come_back(mask in masks(0)) {
        let read: Mask = mask.to_string().parse()?;
        prop_assert_eq!(read.shape(), mask.shape());
    }
}

#[test]
fn masks_are_read_as_the_command_line_says() {
    let read = |text: &str| text.parse::<Mask>().ok();
    assert_eq!(read("causal"), Some(Mask::causal()));
    assert_eq!(read("full"), Some(Mask::full()));
    assert_eq!(read("window:64"), Some(Mask::window(Some(64), Some(0))));
    assert_eq!(read("window:64,3"), Some(Mask::window(Some(64), Some(3))));
    assert_eq!(read("prefix:0"), Some(Mask::prefix(0)));
    let bad = ["", "Causal", "causal:", "window", "window:", "window:-1", "window:+1", "window:1,", "window:1,-1"];
    let worse = ["window:1,2,3", "window: 1", "prefix", "prefix:", "prefix:-1", "prefix:all", "full:3", "window:1e3"];
    for text in bad.into_iter().chain(worse).chain(["window:99999999999999999999999"]) {
        assert!(matches!(text.parse::<Mask>(), Err(Error::Invalid { what: "mask", .. })), "{text:?}");
    }
}

#[test]
fn undefined_combinations_are_refused() {
    let documents = |seq| Documents::from_cu_seqlens(&[0, 3, seq], seq as usize).expect("ok");
    for mask in
        [Mask::causal(), Mask::prefix(2), Mask::window(Some(3), None), Mask::full().with_documents(documents(8))]
    {
        assert!(mask.check(8, 8).is_ok());
        assert!(mask.check(8, 9).is_err(), "{mask}");
        assert!(mask.check(7, 8).is_err(), "{mask}");
    }
    assert!(Mask::full().check(8, 9).is_ok());
    assert!(Mask::causal().with_documents(documents(8)).check(9, 9).is_err());
    assert!(Mask::full().check(usize::MAX, 1).is_err());
    let layout = Layout::zigzag(8, &Mesh::new(1, 2, Placement::UlyssesInner).expect("ok"));
    assert!(Mask::causal().slices(&layout, 2, &layout, 0, 1).is_err());
    assert!(Mask::causal().slices(&layout, 0, &layout, 2, 1).is_err());
}

#[test]
fn causal_zigzag_is_balanced_and_its_halves_are_full() {
    let layout = Layout::zigzag(64, &Mesh::new(1, 4, Placement::UlyssesInner).expect("ok"));
    let pairs = |q| -> u64 {
        let slices = (0..4).flat_map(|k| Mask::causal().slices(&layout, q, &layout, k, 1).expect("ok"));
        slices.map(|s| s.pairs()).sum()
    };
    assert_eq!([0, 1, 2, 3].map(pairs), [64 * 65 / 2 / 4; 4]);
    // An earlier block: both query chunks see its early chunk whole. A later block: the late queries see both, whole.
    let off_diagonal = |q, k| Mask::causal().slices(&layout, q, &layout, k, 1).expect("ok");
    assert!(off_diagonal(2, 1).iter().all(|s| s.is_full() && s.k == (0..8)));
    assert!(off_diagonal(1, 2).iter().all(|s| s.is_full() && s.q == (8..16)));
}
