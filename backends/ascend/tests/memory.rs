//! What was predicted before a run is what was allocated: `cargo test -p longspan-ascend --test memory`.

mod suite;

use std::time::Duration;

use longspan::{Engine, Layout, Mask, Mesh, Placement, Problem, Tensor, in_group};
use longspan_ascend::{Ascend, AscendFused};
use longspan_hal::{Backend, DType};

const LIMIT: Duration = Duration::from_secs(60);
const SEQ: usize = 256;

/// Predicted bytes, and the most that were allocated beside the caller's tensors.
fn run(engine: &mut dyn Engine, mesh: &Mesh) -> longspan::Result<[u64; 2]> {
    let layout = Layout::zigzag(SEQ, mesh);
    let problem = Problem::new(DType::F32, 1, [4, 4], 32).with_backward(true);
    let shard = |seed| Tensor::normal(DType::F32, [1, SEQ, 4, 32], seed).shard(&layout, engine.rank());
    let (q, k, v, dout) = (shard(1)?, shard(2)?, shard(3)?, shard(4)?);
    let predicted = engine.prepare(&problem, [&layout, &layout], &Mask::causal())?.total();
    engine.forward([&q, &k, &v], &Default::default())?;
    engine.backward(&dout, None)?;
    let report = engine.report()?;
    Ok([predicted as u64, report.memory.peak - report.tensor_bytes])
}

fn is_predicted<B: Backend>((ulysses, ring): (u32, u32)) {
    let mesh = Mesh::new(ulysses, ring, Placement::UlyssesInner).expect("a mesh");
    let (devices, id) = (B::devices().expect("emulated"), B::group_id().expect("a group"));
    let one = |rank: u32| {
        let place = [rank, mesh.size()];
        in_group::<B, _>(&devices[rank as usize], &id, place, LIMIT, |engine| run(engine, &mesh))
    };
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..mesh.size()).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    for (rank, figures) in ranks.into_iter().enumerate() {
        let [predicted, peak] = figures.expect("it runs");
        assert_eq!(predicted, peak, "{} on {mesh}, rank {rank}", B::NAME);
    }
}

#[test]
fn predicted_bytes_are_the_allocated_ones() {
    assert!(suite::prepare(), "the emulator's shared object is not beside this test");
    for mesh in [(1, 1), (2, 2)] {
        is_predicted::<Ascend>(mesh);
        is_predicted::<AscendFused>(mesh);
    }
}
