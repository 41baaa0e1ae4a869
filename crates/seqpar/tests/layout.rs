//! A layout is a bijection, and everything that asks it agrees.

mod common;

use common::{block, documents, layouts, meshes, named};
use longspan_hal::Error;
use longspan_seqpar::layout::{Layout, Run, near_equal};
use longspan_seqpar::mask::Documents;
use longspan_seqpar::mesh::{Mesh, Placement};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn every_token_has_one_slot(layout in layouts(0usize..60)) {
        let mut held = vec![0; layout.seq()];
        for rank in 0..layout.mesh().size() {
            let positions = layout.positions(rank);
            prop_assert_eq!(positions.len(), layout.rows(rank));
            for (slot, &token) in positions.iter().enumerate() {
                held[token] += 1;
                prop_assert_eq!(layout.locate(token), (rank, slot));
                prop_assert_eq!(layout.token(rank, slot), Some(token));
            }
            prop_assert_eq!(layout.token(rank, positions.len()), None);
        }
        prop_assert!(held.iter().all(|&n| n == 1), "{:?}", held);
        prop_assert_eq!(layout.locate(layout.seq()), (layout.mesh().size(), 0));
        prop_assert_eq!(layout.token(layout.mesh().size(), 0), None);
    }

    #[test]
    fn parts_cut_a_block_in_order(layout in layouts(0usize..60)) {
        let mesh = *layout.mesh();
        for ring in 0..mesh.ring() {
            let runs = layout.ring_runs(ring);
            prop_assert!(runs.iter().all(|run| run.len > 0 && run.step > 0));
            prop_assert_eq!(block(&layout, ring), runs.iter().flat_map(Run::positions).collect::<Vec<_>>());
            prop_assert!(layout.ring_rows(ring) <= layout.max_ring_rows());
            let (mut row, parts): (_, Vec<_>) = (0, mesh.ulysses_group(ring).map(|rank| layout.part(rank)).collect());
            prop_assert_eq!(parts[0].start, 0);
            prop_assert_eq!(parts[parts.len() - 1].end, layout.ring_rows(ring));
            for pair in parts.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!(pair[0].len() >= pair[1].len() && pair[0].len() <= parts[parts.len() - 1].len() + 1);
            }
            for (n, run) in runs.iter().enumerate() {
                prop_assert_eq!(layout.run_rows(ring, n), row..row + run.len);
                row += run.len;
            }
        }
        prop_assert!((0..mesh.ring()).any(|r| layout.ring_rows(r) == layout.max_ring_rows()));
    }

    #[test]
    fn shards_come_back(layout in layouts(0usize..40), batch in 0usize..3, row in 0usize..4) {
        let global: Vec<u32> = (0..(batch * layout.seq() * row) as u32).collect();
        let shard = |rank| layout.shard(rank, &global, batch, row);
        let shards: Vec<Vec<u32>> = (0..layout.mesh().size()).map(shard).collect::<Result<_, _>>()?;
        for (rank, shard) in (0..).zip(&shards) {
            for (n, value) in shard.iter().enumerate() {
                let (b, slot, x) = (n / row / layout.rows(rank), n / row % layout.rows(rank), n % row);
                let token = layout.token(rank, slot).expect("in range");
                prop_assert_eq!(*value, global[(b * layout.seq() + token) * row + x]);
            }
        }
        prop_assert_eq!(layout.unshard(&shards, batch, row)?, global);
    }

    #[test]
    fn positions_restart_with_documents(
        (layout, documents) in layouts(0usize..40).prop_flat_map(|l| { let s = l.seq(); (Just(l), documents(s)) })
    ) {
        for rank in 0..layout.mesh().size() {
            let restarted = layout.document_positions(rank, &documents);
            prop_assert_eq!(restarted.len(), layout.rows(rank));
            for (token, position) in layout.positions(rank).into_iter().zip(restarted) {
                let range = documents.range(documents.of(token));
                prop_assert!(range.contains(&token));
                prop_assert_eq!(position, token - range.start);
            }
        }
    }

    #[test]
    fn near_equal_parts_cover(len in 0usize..100, parts in 1usize..20) {
        let cut: Vec<_> = (0..parts).map(|i| near_equal(len, parts, i)).collect();
        prop_assert_eq!(cut.iter().cloned().flatten().collect::<Vec<_>>(), (0..len).collect::<Vec<_>>());
        prop_assert!(cut.windows(2).all(|pair| pair[0].len() >= pair[1].len()));
        prop_assert!(cut[0].len() - cut[parts - 1].len() <= 1);
    }

    #[test]
    fn from_runs_takes_what_the_named_layouts_hold(
        (mesh, seq, kind) in ((1u32..6).prop_flat_map(meshes), 0usize..60, 0usize..3)
    ) {
        let layout = named(kind, seq, &mesh);
        let lists = (0..mesh.ring()).map(|ring| layout.ring_runs(ring).to_vec()).collect();
        let again = Layout::from_runs(seq, &mesh, lists)?;
        prop_assert_eq!(again.kind(), "custom");
        for rank in 0..mesh.size() {
            prop_assert_eq!(again.positions(rank), layout.positions(rank));
        }
    }

    #[test]
    fn from_runs_names_a_token_that_is_missing_or_doubled(
        seq in 1usize..40, cut in any::<prop::sample::Index>(), moved in 0usize..3
    ) {
        let mesh = Mesh::new(2, 2, Placement::UlyssesInner)?;
        let at = cut.index(seq + 1);
        let run = |start, len| Run { start, len, step: 1 };
        let result = Layout::from_runs(seq, &mesh, vec![vec![run(0, at)], vec![run(at + moved, seq - at)]]);
        match moved {
            0 => prop_assert!(result.is_ok()),
            _ if at == seq => prop_assert!(result.is_ok(), "the second run is empty"),
            _ => prop_assert!(matches!(result, Err(Error::Invalid { what: "layout", .. })), "{result:?}"),
        }
        if at > 0 {
            let doubled = Layout::from_runs(seq, &mesh, vec![vec![run(at - 1, seq - at + 1)], vec![run(0, at)]]);
            let why = format!("invalid layout: token {} is held twice, the second time by ring rank 1", at - 1);
            prop_assert_eq!(doubled.map_err(|e| e.to_string()), Err(why));
            let missing = Layout::from_runs(seq, &mesh, vec![vec![run(at, seq - at)], vec![run(0, at - 1)]]);
            let why = format!("invalid layout: token {} is held by no rank", at - 1);
            prop_assert_eq!(missing.map_err(|e| e.to_string()), Err(why));
        }
    }
}

#[test]
fn zigzag_gives_each_ring_rank_an_early_and_a_late_chunk() {
    let mesh = Mesh::new(2, 2, Placement::UlyssesInner).expect("ok");
    let layout = Layout::zigzag(10, &mesh);
    // Chunks of 3, 3, 2, 2 tokens.
    let block = |ring| layout.ring_runs(ring).iter().flat_map(Run::positions).collect::<Vec<_>>();
    assert_eq!(block(0), [0, 1, 2, 8, 9]);
    assert_eq!(block(1), [3, 4, 5, 6, 7]);
    assert_eq!(layout.positions(0), [0, 1, 2]);
    assert_eq!(layout.positions(1), [8, 9]);
    assert_eq!(layout.kind(), "zigzag");
}

#[test]
fn bad_runs_are_refused() {
    let mesh = Mesh::new(1, 1, Placement::UlyssesInner).expect("ok");
    let one = |start, len, step| Layout::from_runs(8, &mesh, vec![vec![Run { start, len, step }]]);
    assert!(one(0, 8, 1).is_ok());
    assert!(one(0, 9, 1).is_err());
    assert!(one(0, 8, 0).is_err());
    assert!(one(0, 2, usize::MAX).is_err());
    assert!(one(usize::MAX, 2, 1).is_err());
    assert!(one(0, usize::MAX, 1).is_err());
    assert!(Layout::from_runs(8, &mesh, vec![]).is_err());
    assert!(Layout::from_runs(usize::MAX, &mesh, vec![vec![]]).is_err());
    assert!(Layout::from_runs(1, &mesh, vec![vec![Run { start: 0, len: 1, step: 0 }]]).is_ok());
}

#[test]
fn wrong_lengths_are_refused() {
    let layout = Layout::stripe(5, &Mesh::new(1, 2, Placement::UlyssesInner).expect("ok"));
    assert!(layout.shard(0, &[0; 10], 1, 2).is_ok());
    assert!(layout.shard(2, &[0; 10], 1, 2).is_err());
    assert!(layout.shard(0, &[0; 11], 1, 2).is_err());
    assert!(layout.shard(0, &[0; 10], usize::MAX, 2).is_err());
    assert!(layout.unshard(&[vec![0; 6], vec![0; 4]], 1, 2).is_ok());
    assert!(layout.unshard(&[vec![0; 4], vec![0; 6]], 1, 2).is_err());
    assert!(layout.unshard(&[vec![0; 6]], 1, 2).is_err());
}

#[test]
fn cu_seqlens_are_checked() {
    let documents = |list: &[i32], seq| Documents::from_cu_seqlens(list, seq);
    assert!(documents(&[], 0).is_err());
    assert!(documents(&[1, 4], 4).is_err());
    assert!(documents(&[0, 3], 4).is_err());
    assert!(documents(&[0, 5], 4).is_err());
    assert!(documents(&[0, 3, 2, 4], 4).is_err());
    assert!(documents(&[0, -1, 4], 4).is_err());
    let packed = documents(&[0, 0, 2, 2, 4, 4], 4).expect("empty documents are fine");
    assert_eq!(packed.len(), 5);
    assert_eq!([0, 1, 2, 3, 4].map(|token| packed.of(token)), [1, 1, 3, 3, 5]);
    assert_eq!(packed.range(3), 2..4);
    assert_eq!(packed.range(9), 4..4);
    assert!(documents(&[0], 0).expect("no document").is_empty());
}
