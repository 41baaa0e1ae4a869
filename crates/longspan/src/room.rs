//! Whether a rank's memory suffices, before any of it is taken.

use longspan_hal::{DType, Error, Memory, Result};
use longspan_seqpar::{Layout, Plan, Problem};

/// Checks that the tensors of `rank` fit the device, before they are planned: a plan of what can't be takes time and memory,
/// too. `memory` is that of the engine's own handle of the device, all of whose memory it has just given up.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn check_tensors(problem: &Problem, layouts: [&Layout; 2], rank: u32, memory: Memory) -> Result<()> {
    // A rank that a layout does not have is refused with the plan.
    let rows = |layout: &Layout| if rank < layout.mesh().size() { layout.rows(rank) } else { 0 };
    check(tensor_bytes(problem, layouts.map(rows)), memory)
}

/// Checks that what `plan` needs fits the device, with the tensors of a forward (and backward).
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn check_plan(plan: &Plan, memory: Memory) -> Result<()> {
    check(tensor_bytes(plan.problem(), plan.local_rows()).saturating_add(plan.bytes()?.total() as u64), memory)
}

fn check(wanted: u64, memory: Memory) -> Result<()> {
    let free = memory.free.saturating_add(memory.used);
    if wanted > free { Err(Error::OutOfMemory { wanted, free }) } else { Ok(()) }
}

/// Bytes of q, k, v, out and lse of `[queries, keys]`, and of what a backward has beside them; the largest number for more than
/// can be counted. Inputs that come with a call, such as sinks, are not counted.
fn tensor_bytes(problem: &Problem, [queries, keys]: [usize; 2]) -> u64 {
    let &Problem { dtype, batch, heads, kv_heads, head_dim, head_dim_v, joint, .. } = problem;
    let bytes = |dtype: DType, rows: usize, heads: usize, dim: usize| {
        let factors = [batch, rows.saturating_add(joint), heads, dim, dtype.size()];
        factors.into_iter().fold(1u64, |n, factor| n.saturating_mul(factor as u64))
    };
    let [q, out] = [head_dim, head_dim_v].map(|dim| bytes(dtype, queries, heads, dim));
    let [k, v] = [head_dim, head_dim_v].map(|dim| bytes(dtype, keys, kv_heads, dim));
    let gradients = if problem.backward { [q, k, v, out] } else { [0; 4] };
    let lse = bytes(DType::F32, queries, heads, 1);
    [q, k, v, out, lse].into_iter().chain(gradients).fold(0, u64::saturating_add)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use longspan_seqpar::{Layout, Mask, Mesh, Placement};

    use super::*;
    use crate::{Engine, Extra, Tensor, on_ranks};

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
                    engine.backward_joint(&one(rows, 4, 16), None, joint_dout.as_ref())?;
                }
                assert_eq!(engine.report()?.tensor_bytes, tensor_bytes(&problem, [rows; 2]));
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
