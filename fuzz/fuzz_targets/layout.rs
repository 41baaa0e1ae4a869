//! Any layout, mask and slices: indices are a bijection, slices are the mask, and nothing overflows.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use longspan::{DType, Documents, Layout, Mask, Mesh, Placement, Plan, Problem, Run};
use longspan_hal::{Slice, Slices, Spec};
use longspan_seqpar::Route;
use longspan_seqpar::picture::patches;

#[derive(Arbitrary, Debug)]
enum Kind {
    Contiguous,
    Lists(Vec<Vec<(u16, u16, u8)>>),
    Stripe,
    Zigzag,
}

#[derive(Arbitrary, Debug)]
enum Shape {
    Causal,
    Full,
    Prefix(usize),
    Window(Option<usize>, Option<usize>),
}

#[derive(Arbitrary, Debug)]
struct Problems {
    seq: u8,
    /// Shifted to the left by so many bits: long sequences.
    long: u8,
    ulysses: u8,
    ring: u8,
    inner: bool,
    kind: Kind,
    shape: Shape,
    documents: Option<Vec<i32>>,
    heads: (u8, u8, u8),
    backward: bool,
    slices: Vec<(u32, u32, u32, u32, i64, i64)>,
}

fuzz_target!(|p: Problems| {
    slices(&p);
    let placement = if p.inner { Placement::RingInner } else { Placement::UlyssesInner };
    let Ok(mesh) = Mesh::new(u32::from(p.ulysses % 6), u32::from(p.ring % 9), placement) else { return };
    let seq = (usize::from(p.seq)) << (p.long % 48);
    let Some(layout) = layout(&p, seq, &mesh) else { return };
    let mut mask = match p.shape {
        Shape::Causal => Mask::causal(),
        Shape::Full => Mask::full(),
        Shape::Prefix(keys) => Mask::prefix(keys),
        Shape::Window(left, right) => Mask::window(left, right),
    };
    if let Some(bounds) = &p.documents {
        let Ok(documents) = Documents::from_cu_seqlens(bounds, seq) else { return };
        mask = mask.with_documents(documents);
    }
    bijection(&layout);
    whole(&layout, &mask);
    plan(&p, &layout, &mask);
});

fn layout(p: &Problems, seq: usize, mesh: &Mesh) -> Option<Layout> {
    match &p.kind {
        Kind::Contiguous => Some(Layout::contiguous(seq, mesh)),
        Kind::Stripe => Some(Layout::stripe(seq, mesh)),
        Kind::Zigzag => Some(Layout::zigzag(seq, mesh)),
        Kind::Lists(lists) => {
            let run =
                |&(start, len, step): &(u16, u16, u8)| Run { start: start.into(), len: len.into(), step: step.into() };
            let lists = lists.iter().map(|list| list.iter().map(run).collect()).collect();
            // It keeps a bit for every token: memory for what is there, not for what is claimed.
            Layout::from_runs(seq.min(1 << 16), mesh, lists).ok()
        }
    }
}

/// Tokens and slots are inverse; only the ends of long sequences are asked.
fn bijection(layout: &Layout) {
    let seq = layout.seq();
    for token in (0..seq.min(64)).chain(seq.saturating_sub(64)..seq) {
        let (rank, slot) = layout.locate(token);
        assert_eq!(layout.token(rank, slot), Some(token));
    }
    assert_eq!(layout.locate(seq).0, layout.mesh().size());
    let held: usize = (0..layout.mesh().size()).map(|rank| layout.rows(rank)).sum();
    assert_eq!(held, seq);
}

/// All slices of all ring ranks are the mask: pair by pair in short sequences, by number of pairs under causal masks in others.
fn whole(layout: &Layout, mask: &Mask) {
    let seq = layout.seq();
    let Ok(patches) = patches(mask, layout, layout) else { return };
    if seq > 64 {
        let pairs: u128 = patches.iter().map(|patch| u128::from(patch.pairs())).sum();
        let n = seq as u128;
        match mask {
            m if *m == Mask::full() => assert_eq!(pairs, n * n),
            m if *m == Mask::causal() => assert_eq!(pairs, n * (n + 1) / 2),
            _ => assert!(pairs <= n * n),
        }
        return;
    }
    let mut seen = vec![0u8; seq * seq];
    for slice in patches.iter().flat_map(|patch| &patch.slices) {
        for row in slice.q.clone() {
            let query = slice.q_pos + slice.q_step * i64::from(row - slice.q.start);
            for key in slice.keys_of(row) {
                let key = slice.k_pos + slice.k_step * i64::from(key - slice.k.start);
                seen[query as usize * seq + key as usize] += 1;
            }
        }
    }
    for (at, &count) in seen.iter().enumerate() {
        assert_eq!(count, u8::from(mask.allows(at / seq, at % seq)), "query {} key {}", at / seq, at % seq);
    }
}

/// What one ring rank sends in a forward, another expects; plans of all ranks can be made or are all refused.
fn plan(p: &Problems, layout: &Layout, mask: &Mask) {
    let ring = layout.mesh().ring();
    let routes: Vec<_> = (0..ring).map(|r| Route::new(mask, layout, layout, r)).collect();
    assert!(routes.iter().all(|r| r.is_ok() == routes[0].is_ok()));
    let routes: Vec<Route> = routes.into_iter().filter_map(Result::ok).collect();
    for route in &routes {
        for (step, _, to, rows) in route.transfers() {
            let receiver = &routes[to as usize];
            let awaited: usize = receiver.needed(step).iter().map(|run| run.rows.len()).sum();
            assert!(rows <= awaited + receiver.hops(step).map(|run| run.rows.len()).sum::<usize>());
        }
    }
    let (kv, group, groups) = p.heads;
    let heads = usize::from(kv % 5) * usize::from(group % 4);
    let problem = Problem::new(DType::Bf16, 1, [heads, usize::from(kv % 5)], 8)
        .with_head_groups(usize::from(groups % 4))
        .with_backward(p.backward);
    let plans: Vec<_> = (0..layout.mesh().size()).map(|rank| Plan::new(&problem, layout, layout, mask, rank)).collect();
    assert!(plans.iter().all(|plan| plan.is_ok() == plans[0].is_ok()));
    for plan in plans.iter().flatten() {
        let _ = (plan.bytes(), plan.traffic(p.backward));
    }
}

/// Slices that somebody else made.
fn slices(p: &Problems) {
    let spec = Spec::new(DType::F32, 1, [1 << 20, 1 << 20], [1, 1], 8);
    let list = p.slices.iter().map(|&(q, m, k, n, lo, hi)| Slice {
        lo,
        hi,
        ..Slice::full(0, q..q.saturating_add(m), k..k.saturating_add(n))
    });
    let list: Vec<Slice> = list.collect();
    for slice in &list {
        let (pairs, m, n) = (slice.pairs(), slice.q.len() as u128, slice.k.len() as u128);
        assert!(u128::from(pairs) <= m * n);
        assert!(!slice.is_full() || u128::from(pairs) == m * n);
        if m.max(n) <= 256 {
            let counted: usize = slice.q.clone().map(|row| slice.keys_of(row).len()).sum();
            let turned: usize = slice.k.clone().map(|row| slice.queries_of(row).len()).sum();
            assert_eq!((counted as u64, turned as u64), (pairs, pairs));
        }
    }
    if let Ok(checked) = Slices::new(&spec, list.clone()) {
        assert!(checked.pairs() <= list.iter().map(Slice::pairs).sum());
    }
}
