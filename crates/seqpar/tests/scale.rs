//! One rank of 4,096 derives its share of 4M tokens within 1 s and 64 MiB.
//!
//! A test of its own file, since it measures the memory of its process.

mod common;

use std::time::{Duration, Instant};

use common::named;
use longspan_hal::Slice;
use longspan_seqpar::layout::Layout;
use longspan_seqpar::mask::{Documents, Mask};
use longspan_seqpar::mesh::{Mesh, Placement};
use longspan_seqpar::route::Route;

const SEQ: usize = 4 << 20;
const SIZE: u32 = 4096;

/// The most memory that this process had resident, in bytes.
fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

fn derive(kind: usize, mask: &Mask, mesh: &Mesh, ring_rank: u32) -> (Layout, Route, Vec<Vec<Slice>>) {
    let layout = named(kind, SEQ, mesh);
    let route = Route::new(mask, &layout, &layout, ring_rank).expect("ok");
    let slices = |step| mask.slices(&layout, ring_rank, &layout, route.block(step), 1).expect("ok");
    let slices = (0..mesh.ring()).map(slices).collect();
    (layout, route, slices)
}

#[test]
fn one_rank_of_4096_is_quick_and_small() {
    let limit = if cfg!(debug_assertions) { Duration::from_secs(4) } else { Duration::from_secs(1) };
    let packed = |each: usize| {
        let cu_seqlens: Vec<i32> = (0..=SEQ / each).map(|i| (i * each) as i32).collect();
        Documents::from_cu_seqlens(&cu_seqlens, SEQ).expect("ok")
    };
    let masks = [
        Mask::causal().with_documents(packed(1 << 16)),
        Mask::causal().with_documents(packed(SEQ / 2)),
        Mask::full().with_documents(packed(SEQ)),
        Mask::causal(),
        Mask::full(),
        Mask::prefix(SEQ / 3),
        Mask::window(Some(4096), Some(0)),
        Mask::window(Some(4093), Some(0)),
        Mask::window(Some(0), Some(4090)),
        Mask::window(Some(SEQ / 2), Some(64)),
        Mask::window(Some(SEQ), Some(SEQ)),
    ];
    let before = peak();
    let mut slowest = Duration::ZERO;
    for ulysses in [1, 8, 4096] {
        let mesh = Mesh::new(ulysses, SIZE / ulysses, Placement::UlyssesInner).expect("ok");
        for (kind, mask) in (0..3).flat_map(|kind| masks.iter().map(move |mask| (kind, mask))) {
            let ring_rank = mesh.ring() / 3;
            // The best of three: other processes of the machine are not what this measures.
            let mut took = Duration::MAX;
            for _ in 0..3 {
                let start = Instant::now();
                let (layout, route, slices) = derive(kind, mask, &mesh, ring_rank);
                took = took.min(start.elapsed());
                let needed = (0..mesh.ring()).any(|step| !route.needed(step).is_empty());
                assert!(
                    needed && slices.iter().flatten().all(|s| s.pairs() > 0) && layout.rows(0) == SEQ / SIZE as usize
                );
                if took < limit {
                    break;
                }
            }
            assert!(took < limit, "layout {kind}, {mask}, {mesh}: {took:?}");
            slowest = slowest.max(took);
        }
    }
    println!("slowest: {slowest:?}");
    if let (Some(before), Some(after)) = (before, peak()) {
        println!("resident: {} KiB more", (after - before) / 1024);
        assert!(after - before < 64 << 20, "{} bytes", after - before);
    }
}
