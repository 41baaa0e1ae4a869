//! Whether a rank's memory suffices, before any of it is taken.

use longspan_hal::{DType, Error, Memory, Result};
use longspan_seqpar::{Plan, Problem};

/// Checks that what `plan` needs fits the device, with the tensors of a forward (and backward). `memory` is that of the engine's own
/// handle of the device, all of whose memory it has just given up.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn check(plan: &Plan, memory: Memory) -> Result<()> {
    let wanted = (plan.bytes()?.total() + tensor_bytes(plan.problem(), plan.local_rows())) as u64;
    let free = memory.free.saturating_add(memory.used);
    if wanted > free { Err(Error::OutOfMemory { wanted, free }) } else { Ok(()) }
}

/// Bytes of q, k, v, out and lse of `[queries, keys]`, and of what a backward has beside them. Inputs that come with a call, such as
/// sinks, are not counted.
fn tensor_bytes(problem: &Problem, rows: [usize; 2]) -> usize {
    let &Problem { batch, heads, kv_heads, head_dim, head_dim_v, joint, .. } = problem;
    let [queries, keys] = rows.map(|rows| batch * (rows + joint));
    let inputs = queries * heads * head_dim + keys * kv_heads * (head_dim + head_dim_v);
    let out = queries * heads * head_dim_v;
    let times = if problem.backward { 2 } else { 1 };
    times * (inputs + out) * problem.dtype.size() + queries * heads * DType::F32.size()
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
                    engine.backward_joint(&one(rows, 4, 16), None, joint_dout.as_ref().map(|dout| (dout, None)))?;
                }
                assert_eq!(engine.report()?.tensor_bytes, tensor_bytes(&problem, [rows; 2]) as u64);
                Ok(())
            };
            on_ranks("cpu", &mesh, body).expect("it runs");
        }
    }
}
