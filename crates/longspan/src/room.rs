//! Whether a rank's memory suffices, before it runs.

use longspan_hal::{DType, Error, Memory, Result, Strided};
use longspan_seqpar::{Bytes, Layout, Plan, Problem};

/// Checks that the tensors of `ranks`, which share a device, together fit all of its `total` bytes, before they are planned: a plan
/// of what can't be takes time and memory, too. What is free would depend on who was first.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn check_tensors(problem: &Problem, layouts: [&Layout; 2], ranks: &[u32], total: u64) -> Result<()> {
    // A rank that a layout does not have is refused with the plan.
    let rows = |layout: &Layout, rank| if rank < layout.mesh().size() { layout.rows(rank) } else { 0 };
    let of_rank = |&rank: &u32| tensor_bytes(problem, layouts.map(|layout| rows(layout, rank))) as u64;
    fits(ranks.iter().map(of_rank).fold(0, u64::saturating_add), total)
}

/// Checks that `bytes` and the tensors of a forward (and backward) of `plan` fit the device. `memory` is that of the engine's own
/// handle of the device, all of whose memory it has given up since.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn check(plan: &Plan, bytes: Bytes, memory: Memory) -> Result<()> {
    let wanted = bytes.total().saturating_add(tensor_bytes(plan.problem(), plan.local_rows()));
    fits(wanted as u64, memory.free.saturating_add(memory.used))
}

fn fits(wanted: u64, free: u64) -> Result<()> {
    if wanted > free { Err(Error::OutOfMemory { wanted, free }) } else { Ok(()) }
}

/// Bytes of q, k, v, out and lse of `[queries, keys]`, and of what a backward has beside them; the largest number for more than
/// can be counted. Inputs that come with a call, such as sinks, are not counted.
fn tensor_bytes(problem: &Problem, rows: [usize; 2]) -> usize {
    let &Problem { dtype, batch, heads, kv_heads, head_dim, head_dim_v, joint, .. } = problem;
    let [queries, keys] = rows.map(|rows| rows.saturating_add(joint));
    let of = |dtype, rows, heads, dim| Strided::dense(dtype, [batch, rows, heads, dim]).bytes();
    let all = [
        of(dtype, queries, heads, head_dim),
        of(dtype, keys, kv_heads, head_dim),
        of(dtype, keys, kv_heads, head_dim_v),
        of(dtype, queries, heads, head_dim_v),
    ];
    let all = all.into_iter().fold(0, usize::saturating_add);
    let times = if problem.backward { 2 } else { 1 };
    all.saturating_mul(times).saturating_add(of(DType::F32, queries, heads, 1))
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use longspan_seqpar::{Layout, Mask, Mesh, Placement};

    use super::*;
    use crate::{Engine, Extra, Tensor, on_ranks};

    /// Each rank's three fifths of the memory would fit.
    #[test]
    fn what_does_not_fit_together_is_refused() {
        let mesh = Mesh::new(1, 2, Placement::default()).expect("a mesh");
        let (rows, dim) = (1 << 16, 64);
        let layout = Layout::contiguous(2 * rows, &mesh);
        let ranks = on_ranks("cpu", &mesh, |engine| {
            let total = engine.caps().memory_bytes;
            let heads = total as usize / 5 * 3 / (rows * (4 * dim + 1) * 4);
            let problem = Problem::new(DType::F32, 1, [heads, heads], dim);
            Ok((total, engine.prepare(&problem, [&layout, &layout], &Mask::causal()).map(drop)))
        });
        for (total, refused) in ranks.expect("it runs") {
            let told = matches!(refused, Err(Error::OutOfMemory { wanted, free }) if wanted > total && free == total);
            assert!(told, "{refused:?} of {total}");
        }
    }

    #[test]
    fn sizes_beyond_all_memory_do_not_wrap() {
        let problem = Problem::new(DType::F32, 1, [4_000_000_000; 2], 4_000_000_000);
        assert_eq!(tensor_bytes(&problem, [4_000_000_000; 2]), usize::MAX);
    }

    #[test]
    fn the_tensors_of_a_run_are_predicted() {
        let mesh = Mesh::new(2, 2, Placement::default()).expect("a mesh");
        let layout = Layout::zigzag(37, &mesh);
        for (dtype, backward, joint) in [(DType::F32, false, 0), (DType::Bf16, true, 0), (DType::F16, true, 3)] {
            let problem =
                Problem::new(dtype, 2, [4, 2], 8).with_head_dim_v(16).with_backward(backward).with_joint(joint);
            let body = |engine: &mut dyn Engine| {
                engine.prepare(&problem, [&layout, &layout], &Mask::full())?;
                let one = |rows, heads, dim| Tensor::normal(dtype, [2, rows, heads, dim], 1);
                let three = |rows| [one(rows, 4, 8), one(rows, 2, 8), one(rows, 2, 16)];
                let rows = layout.rows(engine.rank());
                let extra = Extra { joint: (joint > 0).then(|| three(joint)), ..Extra::default() };
                let [q, k, v] = three(rows);
                engine.forward([&q, &k, &v], &extra)?;
                if backward {
                    let joint_dout = (joint > 0).then(|| one(joint, 4, 16));
                    engine.backward_joint(&one(rows, 4, 16), None, joint_dout.as_ref().map(|dout| (dout, None)))?;
                }
                assert_eq!(engine.report()?.tensor_bytes, tensor_bytes(&problem, [rows; 2]) as u64);
                Ok(())
            };
            on_ranks("cpu", &mesh, body).expect("it runs");
        }
    }

    #[test]
    fn what_cannot_be_counted_is_out_of_memory_before_it_is_planned() {
        let mesh = Mesh::new(1, 1, Placement::default()).expect("a mesh");
        let layout = Layout::contiguous(1, &mesh);
        for batch in [1 << 32, usize::MAX] {
            let problem = Problem::new(DType::Bf16, batch, [8, 8], 128).with_backward(true);
            let body = |engine: &mut dyn Engine| engine.prepare(&problem, [&layout, &layout], &Mask::full());
            assert!(matches!(on_ranks("cpu", &mesh, body), Err(Error::OutOfMemory { .. })), "{batch}");
        }
    }
}
