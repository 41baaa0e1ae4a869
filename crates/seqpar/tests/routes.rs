//! Routes: what is needed follows the slices, ranks agree pairwise, and everything arrives.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{custom, layouts, layouts_of, masks, meshes, named};
use longspan_hal::Error;
use longspan_seqpar::layout::{Layout, Run};
use longspan_seqpar::mask::{Documents, Mask};
use longspan_seqpar::mesh::{Mesh, Placement};
use longspan_seqpar::route::{Needed, Route, Transfer, Way};
use proptest::prelude::*;

fn routes(mask: &Mask, q: &Layout, k: &Layout) -> Result<Vec<Route>, Error> {
    (0..q.mesh().ring()).map(|ring| Route::new(mask, q, k, ring)).collect()
}

/// Whether ring rank `r` sees a key of run `run` of ring rank `owner`, by the definition of the mask.
fn sees(mask: &Mask, q: &Layout, k: &Layout, r: u32, owner: u32, run: usize) -> bool {
    let keys: Vec<usize> = k.ring_runs(owner)[run].positions().collect();
    let mut queries = q.ring_runs(r).iter().flat_map(Run::positions);
    queries.any(|query| keys.iter().any(|&key| mask.allows(query, key)))
}

/// A run is needed where the mask selects a pair of it, with the right rows and way, and where a slice says so.
fn check_needs(mask: &Mask, q: &Layout, k: &Layout, routes: &[Route]) -> Result<(), TestCaseError> {
    let ring = q.mesh().ring();
    for owner in 0..ring {
        for run in 0..k.ring_runs(owner).len() {
            let needers: Vec<u32> = (0..ring).filter(|&r| sees(mask, q, k, r, owner, run)).collect();
            let way = if needers.len() == ring as usize { Way::Hop } else { Way::Direct };
            let needed = Needed { run, rows: k.run_rows(owner, run), way };
            for r in 0..ring {
                let route = &routes[r as usize];
                let step = (0..ring).find(|&step| route.block(step) == owner).expect("each block once");
                let has = route.needed(step).iter().filter(|n| n.run == run).cloned().collect::<Vec<_>>();
                let wanted = needers.contains(&r) || r == owner;
                prop_assert_eq!(has, if wanted { vec![needed.clone()] } else { vec![] });
                let slices = mask.slices(q, r, k, owner, 1)?;
                let selected = slices.iter().any(|s| needed.rows.contains(&(s.k.start as usize)));
                prop_assert_eq!(selected, needers.contains(&r));
            }
        }
    }
    Ok(())
}

/// Plays the forward of all ring ranks: each sends only what it holds, and receives what it needs.
fn play_forward(routes: &[Route], k: &Layout) -> Result<(), TestCaseError> {
    let ring = routes.len() as u32;
    let mut hops: Vec<BTreeSet<(u32, usize)>> = vec![BTreeSet::new(); routes.len()];
    let mut sent: Vec<BTreeMap<(u32, u32), usize>> = vec![BTreeMap::new(); routes.len()];
    for step in 0..ring {
        let before = hops.clone();
        for (r, route) in (0u32..).zip(routes) {
            let owner = route.block(step);
            let previous = ((r + ring - 1) % ring) as usize;
            if step == 0 {
                prop_assert_eq!(owner, r);
                prop_assert_eq!(route.needed(0).len(), k.ring_runs(r).len());
                prop_assert!(route.asked(0).is_empty());
            } else {
                let arriving: Vec<_> = route.hops(step).map(|n| (owner, n.run)).collect();
                prop_assert!(arriving.iter().all(|hop| before[previous].contains(hop)));
                let forwarded: Vec<_> = routes[previous].hops(step - 1).map(|n| (owner, n.run)).collect();
                prop_assert_eq!(&arriving, &forwarded);
                let rows = route.hops(step).map(|n| n.rows.len()).sum::<usize>();
                *sent[previous].entry((step, r)).or_default() += rows;
                let asked = routes[owner as usize].asked(step);
                prop_assert_eq!(route.direct(step).cloned().collect::<Vec<_>>(), asked);
                let rows = asked.iter().map(|n| n.rows.len()).sum::<usize>();
                *sent[owner as usize].entry((step, r)).or_default() += rows;
            }
            hops[r as usize] = route.hops(step).map(|n| (owner, n.run)).collect();
            let rows = route.needed(step).iter().map(|n| n.rows.len()).sum::<usize>();
            prop_assert!(rows <= k.ring_rows(owner) && route.needed(step).iter().all(|n| !n.rows.is_empty()));
        }
    }
    for ((r, route), sent) in (0u32..).zip(routes).zip(sent) {
        let listed: BTreeMap<_, _> = route.transfers().map(|(step, from, to, rows)| ((from, step, to), rows)).collect();
        let sent: BTreeMap<_, _> = sent.into_iter().map(|((step, to), rows)| ((r, step, to), rows)).collect();
        prop_assert_eq!(listed.len(), route.transfers().count());
        prop_assert_eq!(listed, sent.into_iter().filter(|(_, rows)| *rows > 0).collect());
    }
    Ok(())
}

/// Plays the way home of gradients: each needer's contribution to each run arrives at the owner once.
fn play_backward(routes: &[Route]) -> Result<(), TestCaseError> {
    let ring = routes.len() as u32;
    let mut home: BTreeMap<(u32, usize, u32), u32> = BTreeMap::new();
    let mut expected = BTreeMap::new();
    let mut sums: Vec<BTreeMap<usize, Vec<u32>>> = vec![BTreeMap::new(); routes.len()];
    let mut sent: Vec<Transfer> = Vec::new();
    for step in 0..ring {
        let mut travelling = vec![BTreeMap::new(); routes.len()];
        for (r, route) in (0u32..).zip(routes) {
            let (owner, next) = (route.block(step), (r + 1) % ring);
            for needed in route.needed(step) {
                expected.insert((owner, needed.run, r), 1);
                let to = if needed.way == Way::Hop { next } else { owner };
                if step > 0 {
                    sent.push((step, r, to, needed.rows.len()));
                }
                if needed.way == Way::Direct || step == 0 {
                    *home.entry((owner, needed.run, r)).or_default() += 1;
                } else {
                    let mut sum = sums[r as usize].remove(&needed.run).unwrap_or_default();
                    prop_assert_eq!(sum.len() + 1, step as usize);
                    sum.push(r);
                    travelling[next as usize].insert(needed.run, sum);
                }
            }
            prop_assert!(sums[r as usize].is_empty(), "a sum of gradients was dropped");
        }
        sums = travelling;
    }
    for (owner, arrived) in (0..).zip(sums) {
        for (run, contributors) in arrived {
            contributors.iter().for_each(|&r| *home.entry((owner, run, r)).or_default() += 1);
        }
    }
    prop_assert_eq!(home, expected);
    prop_assert_eq!(merged(sent), merged(routes.iter().flat_map(Route::returns)));
    Ok(())
}

fn merged(transfers: impl IntoIterator<Item = Transfer>) -> BTreeMap<(u32, u32, u32), usize> {
    let mut rows = BTreeMap::new();
    for (step, from, to, n) in transfers {
        *rows.entry((step, from, to)).or_default() += n;
    }
    rows
}

fn check(mask: &Mask, q: &Layout, k: &Layout) -> Result<(), TestCaseError> {
    let routes = routes(mask, q, k)?;
    check_needs(mask, q, k, &routes)?;
    play_forward(&routes, k)?;
    play_backward(&routes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn routes_follow_masks_and_agree(
        (layout, mask) in (0usize..40, 1u32..7)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (layouts_of(seq, mesh), masks(seq)))
    ) {
        check(&mask, &layout, &layout)?;
    }

    #[test]
    fn cross_attention_and_mixed_layouts(
        (q, k, mask) in (0usize..30, 0usize..30, 1u32..6)
            .prop_flat_map(|(q, k, ring)| (Just(q), Just(k), meshes(ring)))
            .prop_flat_map(|(q, k, mesh)| (0usize..2, 0usize..2, masks(q), any::<bool>()).prop_map(
                move |(a, b, mask, cross)| match cross {
                    true => (named(a, q, &mesh), named(b, k, &mesh), Mask::full()),
                    false => (named(a, q, &mesh), named(b, q, &mesh), mask),
                }))
    ) {
        check(&mask, &q, &k)?;
    }

    #[test]
    fn all_ring_ranks_refuse_or_none(
        (layout, mask) in layouts(0usize..30).prop_flat_map(|layout| { let seq = layout.seq(); (Just(layout), masks(seq)) })
    ) {
        let routes: Vec<_> = (0..layout.mesh().ring()).map(|r| Route::new(&mask, &layout, &layout, r)).collect();
        match &routes[0] {
            Ok(_) => {
                let routes = routes.into_iter().collect::<Result<Vec<_>, _>>()?;
                check_needs(&mask, &layout, &layout, &routes)?;
            }
            Err(e) => prop_assert!(routes.iter().all(|other| other.as_ref().err() == Some(e))),
        }
    }

    #[test]
    fn wide_windows_over_strides(
        (layout, left, right) in (1usize..60, 2u32..7)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (
                prop_oneof![(0usize..3).prop_map(move |kind| named(kind, seq, &mesh)), custom(seq, mesh, 1..2)],
                0..=seq,
                0..=seq,
            ))
    ) {
        let routes = routes(&Mask::window(Some(left), Some(right)), &layout, &layout)?;
        check_needs(&Mask::window(Some(left), Some(right)), &layout, &layout, &routes)?;
    }
}

fn mesh(ring: u32) -> Mesh {
    Mesh::new(1, ring, Placement::UlyssesInner).expect("ok")
}

fn all_transfers(mask: &Mask, layout: &Layout) -> Vec<Transfer> {
    let routes = routes(mask, layout, layout).expect("ok");
    routes.iter().flat_map(|route| route.transfers().collect::<Vec<_>>()).collect()
}

#[test]
fn a_window_needs_the_published_transfers() {
    let (mask, mesh) = (Mask::window(Some(64), Some(0)), mesh(8));
    let count = |layout: Layout| all_transfers(&mask, &layout).len();
    assert_eq!(count(Layout::zigzag(2048, &mesh)), 14);
    assert_eq!(count(Layout::contiguous(2048, &mesh)), 7);
    assert_eq!(count(Layout::stripe(2048, &mesh)), 56);
    let layout = Layout::zigzag(2048, &mesh);
    for route in routes(&mask, &layout, &layout).expect("ok") {
        assert!((0..8).all(|step| route.hops(step).next().is_none()), "zigzag goes from owner to needer");
    }
}

#[test]
fn causal_zigzag_hops_early_chunks_and_sends_late_ones_to_those_who_see_them() {
    let layout = Layout::zigzag(64, &mesh(4));
    let route = Route::new(&Mask::causal(), &layout, &layout, 1).expect("ok");
    let needed = |step| route.needed(step).iter().map(|n| (n.run, n.way)).collect::<Vec<_>>();
    assert_eq!(needed(0), [(0, Way::Hop), (1, Way::Direct)]);
    assert_eq!((route.block(1), needed(1)), (0, vec![(0, Way::Hop)]));
    assert_eq!((route.block(2), needed(2)), (3, vec![(0, Way::Hop), (1, Way::Hop)]));
    assert_eq!((route.block(3), needed(3)), (2, vec![(0, Way::Hop), (1, Way::Direct)]));
    let asked = |step| route.asked(step).iter().map(|n| n.run).collect::<Vec<_>>();
    assert_eq!([asked(1), asked(2), asked(3)], [vec![], vec![], vec![1]], "only ring rank 0 comes later than chunk 6");
    assert_eq!(route.transfers().collect::<Vec<_>>(), [(1, 1, 2, 8), (2, 1, 2, 8), (3, 1, 2, 16), (3, 1, 0, 8)]);
    assert_eq!(route.returns().collect::<Vec<_>>(), [(1, 1, 2, 8), (2, 1, 2, 16), (3, 1, 2, 16)]);
}

#[test]
fn a_full_mask_only_hops_and_separate_documents_send_nothing() {
    let layout = Layout::contiguous(64, &mesh(4));
    let full = all_transfers(&Mask::full(), &layout);
    assert_eq!(full.len(), 12);
    assert!(full.iter().all(|&(_, from, to, rows)| to == (from + 1) % 4 && rows == 16));
    let documents = Documents::from_cu_seqlens(&[0, 16, 32, 48, 64], 64).expect("ok");
    assert_eq!(all_transfers(&Mask::causal().with_documents(documents), &layout), []);
}

#[test]
fn bad_routes_are_refused() {
    let layout = Layout::zigzag(16, &mesh(4));
    assert!(Route::new(&Mask::causal(), &layout, &layout, 4).is_err());
    assert!(Route::new(&Mask::full(), &layout, &Layout::zigzag(16, &mesh(2)), 0).is_err());
    assert!(Route::new(&Mask::causal(), &layout, &Layout::zigzag(17, &mesh(4)), 0).is_err());
    let route = Route::new(&Mask::causal(), &layout, &layout, 3).expect("ok");
    assert!(route.needed(4).is_empty() && route.asked(4).is_empty());
}
