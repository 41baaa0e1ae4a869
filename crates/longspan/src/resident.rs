//! Tensors that stay on the device while a pass runs again and again: what a benchmark measures.
//!
//! ```text
//! reside:  seeded normal numbers into q, k, v (and dout); one forward (and backward), which compiles what is compiled late
//! repeat:  barrier; the pass; event; the pass; event; ...; wait for all.  Times are those between the events.
//! ```
//!
//! So the host is ahead of the device, as it is in a model of many layers: what it takes to queue a pass is not in its time unless it
//! is more than the pass. Nothing is uploaded, downloaded or allocated by a repetition.

use std::time::Duration;

use longspan_hal::{Backend, Collective, DType, Device, Error, Priority, Result, Strided, ViewMut};
use longspan_seqpar::{Gradients as DeviceGradients, OutputRows, Outputs, Problem, Trace};

use crate::Tensor;
use crate::engine::{EngineOf, Extra, Kept, OnDevice};

/// What is repeated.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Pass {
    /// A backward.
    Backward,
    /// A forward.
    Forward,
    /// A forward and then its backward, without a break.
    Step,
}

/// Tensors of a rank that stay.
#[derive(Debug)]
pub(crate) struct Resident<D: Device> {
    kept: Kept<D>,
    backward: Option<Backward<D>>,
}

/// dout, and where the gradients go.
#[derive(Debug)]
struct Backward<D: Device> {
    dout: OnDevice<D>,
    gradients: [OnDevice<D>; 3],
    dsinks: Option<OnDevice<D>>,
}

/// Numbers that tensors are filled with, over and over. A prime, so that no two rows are alike for long.
const NUMBERS: usize = 1_000_003;

/// Bytes of one upload.
const PIECE: usize = 32 << 20;

impl<B: Backend> EngineOf<B> {
    /// [`crate::Engine::reside`].
    pub(crate) fn put_residents(&mut self, packed: bool, extra: &Extra) -> Result<()> {
        let (problem, rows) = self.planned()?;
        if problem.joint > 0 {
            return Err(Error::invalid("joint", "tensors that stay have no joint tokens"));
        }
        (self.kept, self.resident, self.tensor_bytes) = (None, None, 0);
        let numbers = Tensor::normal(problem.dtype, [1, 1, 1, NUMBERS], u64::from(self.member.collective.rank()));
        let shards = self.triple(&problem, rows, packed)?;
        for (i, shard) in shards.iter().enumerate() {
            self.fill(shard, &numbers, i)?;
        }
        let wide = [problem.batch, rows[0], problem.heads, problem.head_dim_v];
        let thin = [problem.batch, rows[0], problem.heads, 1];
        let kept = Kept {
            shards,
            joint: None,
            slopes: self.per_head(extra.alibi_slopes.as_ref())?,
            sinks: self.per_head(extra.sinks.as_ref())?,
            seed: extra.seed,
            results: [self.empty(problem.dtype, wide)?, self.empty(DType::F32, thin)?],
            joint_results: None,
        };
        let backward = if problem.backward {
            let dout = self.empty(problem.dtype, wide)?;
            self.fill(&dout, &numbers, 3)?;
            let gradients = self.triple(&problem, rows, packed)?;
            let dsinks = problem.sinks.then(|| self.empty(DType::F32, [1, 1, problem.heads, 1])).transpose()?;
            Some(Backward { dout, gradients, dsinks })
        } else {
            None
        };
        let pass = if backward.is_some() { Pass::Step } else { Pass::Forward };
        self.resident = Some(Resident { kept, backward });
        self.run_again(pass, 0).map(drop)
    }

    /// [`crate::Engine::repeat`].
    pub(crate) fn run_again(&mut self, pass: Pass, times: u32) -> Result<Vec<Duration>> {
        self.traces.clear();
        let (device, stream) = (&self.member.device, &self.stream);
        let waits = device.stream(Priority::Normal)?;
        self.member.collective.barrier(stream)?;
        self.queue_all(pass, None)?;
        let mut between = vec![device.record(stream)?];
        for n in 0..times as usize {
            self.queue_all(pass, None)?;
            between.push(device.record(stream)?);
            // One run is queued ahead, no more: so a wait is for one run, whatever their number.
            device.wait(&waits, &between[n])?;
            device.synchronize(&waits, self.limit)?;
        }
        device.synchronize(stream, self.limit)?;
        between.windows(2).map(|pair| device.elapsed(&pair[0], &pair[1])).collect()
    }

    /// [`crate::Engine::trace`].
    pub(crate) fn run_traced(&mut self, pass: Pass) -> Result<()> {
        let mut traces = Vec::new();
        self.member.collective.barrier(&self.stream)?;
        self.queue_all(pass, Some(&mut traces))?;
        self.member.device.synchronize(&self.stream, self.limit)?;
        self.traces = traces;
        Ok(())
    }

    fn queue_all(&self, pass: Pass, mut traces: Option<&mut Vec<Trace<B::Device>>>) -> Result<()> {
        let passes: &[bool] = match pass {
            Pass::Backward => &[true],
            Pass::Forward => &[false],
            Pass::Step => &[false, true],
        };
        for &backward in passes {
            let mut trace = traces.is_some().then(Trace::default);
            self.queue(backward, trace.as_mut())?;
            if let Some(traces) = traces.as_mut() {
                traces.extend(trace);
            }
        }
        Ok(())
    }

    fn queue(&self, backward: bool, trace: Option<&mut Trace<B::Device>>) -> Result<()> {
        let resident = self.resident.as_ref().ok_or_else(|| Error::invalid("engine", "call reside first"))?;
        let usp = self.usp.as_ref().ok_or_else(|| Error::invalid("engine", "call prepare first"))?;
        let (kept, inputs) = (&resident.kept, resident.kept.inputs()?);
        if !backward {
            let outputs = Outputs { out: kept.results[0].view_mut()?, lse: kept.results[1].view_mut()?, joint: None };
            return usp.forward(&self.member, &self.stream, &inputs, &outputs, trace);
        }
        let Some(Backward { dout, gradients: [dq, dk, dv], dsinks }) = &resident.backward else {
            return Err(Error::invalid("backward", "the problem was prepared without it: set `with_backward(true)`"));
        };
        let rows =
            OutputRows { out: kept.results[0].view()?, lse: kept.results[1].view()?, dout: dout.view()?, dlse: None };
        let gradients = DeviceGradients {
            dq: dq.view_mut()?,
            dk: dk.view_mut()?,
            dv: dv.view_mut()?,
            joint: None,
            dsinks: dsinks.as_ref().map(OnDevice::view_mut).transpose()?,
        };
        usp.backward(&self.member, &self.stream, &inputs, &rows, None, &gradients, trace)
    }

    /// Memory for q, k and v (or their gradients): each its own, or `packed`, heads side by side in every row of one
    /// `[batch, rows, heads + 2 * kv_heads, head_dim]`.
    fn triple(&mut self, problem: &Problem, rows: [usize; 2], packed: bool) -> Result<[OnDevice<B::Device>; 3]> {
        let &Problem { dtype, batch, heads, kv_heads, head_dim, head_dim_v, .. } = problem;
        if !packed {
            return Ok([
                self.empty(dtype, [batch, rows[0], heads, head_dim])?,
                self.empty(dtype, [batch, rows[1], kv_heads, head_dim])?,
                self.empty(dtype, [batch, rows[1], kv_heads, head_dim_v])?,
            ]);
        }
        if head_dim != head_dim_v || rows[0] != rows[1] {
            let why = "q, k and v in one buffer need one head size and as many keys as queries";
            return Err(Error::invalid("packed", why));
        }
        let all = self.empty(dtype, [batch, rows[0], heads + 2 * kv_heads, head_dim])?;
        let part = |first: usize, count: usize| -> Result<OnDevice<B::Device>> {
            Ok(OnDevice { buffer: all.buffer.clone(), at: all.at.narrow(2, first..first + count)? })
        };
        Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
    }

    /// Fills a tensor with `numbers`, over and over, from another one for each `which`.
    fn fill(&self, tensor: &OnDevice<B::Device>, numbers: &Tensor, which: usize) -> Result<()> {
        let [batch, rows, heads, dim] = tensor.at.extent();
        let size = tensor.at.dtype().size();
        let step = (PIECE / (batch * heads * dim * size).max(1)).max(1);
        let mut at = which * (NUMBERS / 4);
        for first in (0..rows).step_by(step) {
            let part: Strided = tensor.at.narrow(1, first..rows.min(first + step))?;
            let bytes = over_and_over(numbers.bytes(), at * size, part.elements() * size);
            at = (at + part.elements()) % NUMBERS;
            self.member.device.upload(&self.stream, &bytes, ViewMut::new(&tensor.buffer, part)?)?;
        }
        Ok(())
    }
}

/// `count` bytes of `all`, from `at` on, starting over at its end.
fn over_and_over(all: &[u8], mut at: usize, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        let part = &all[at..all.len().min(at + count - bytes.len())];
        bytes.extend_from_slice(part);
        at = (at + part.len()) % all.len();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results of a step on two ranks: out, dq, dk, dv of each.
    #[cfg(feature = "cpu")]
    fn step(packed: bool) -> Vec<[Tensor; 4]> {
        use longspan_seqpar::{Layout, Mask, Mesh, Placement};

        use crate::{DEFAULT_LIMIT, Engine, spawn};
        let mesh = Mesh::new(1, 2, Placement::default()).expect("a mesh");
        let layout = Layout::zigzag(40, &mesh);
        let problem = Problem::new(DType::F32, 2, [4, 2], 8).with_backward(true);
        let devices = longspan_cpu::Cpu::devices().expect("a CPU");
        let ranks = spawn::<longspan_cpu::Cpu, _>(&devices, 2, DEFAULT_LIMIT, |member| {
            let mut engine = EngineOf::new(member, vec![], DEFAULT_LIMIT)?;
            engine.prepare(&problem, [&layout, &layout], &Mask::causal())?;
            engine.put_residents(packed, &Extra::default())?;
            engine.run_traced(Pass::Step)?;
            assert!(!engine.report()?.spans.is_empty());
            let times = engine.run_again(Pass::Step, 3)?;
            assert!(times.len() == 3 && times.iter().all(|time| *time > Duration::ZERO), "{times:?}");
            assert!(engine.report()?.spans.is_empty());
            let resident = engine.resident.as_ref().expect("put there");
            let [dq, dk, dv] = &resident.backward.as_ref().expect("prepared").gradients;
            let all = [&resident.kept.results[0], dq, dk, dv].map(|t| engine.download(t));
            let [out, dq, dk, dv] = all;
            Ok([out?, dq?, dk?, dv?])
        });
        ranks.expect("devices").into_iter().map(|rank| rank.expect("it runs")).collect()
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn packed_and_apart_give_the_same_bits() {
        let apart = step(false);
        assert_eq!(apart, step(true));
        let different =
            |t: &Tensor| t.to_f32().iter().any(|x| x.abs() > 1e-3) && t.to_f32().iter().all(|x| x.is_finite());
        assert!(apart.iter().flatten().all(different), "there is something to compare");
        assert_ne!(apart[0][0], apart[1][0]);
    }

    #[test]
    fn bytes_start_over_at_the_end() {
        let all = [0, 1, 2, 3, 4];
        for (at, count) in [(0, 0), (0, 5), (3, 2), (3, 12), (4, 1), (2, 5)] {
            let wanted: Vec<u8> = all.iter().copied().cycle().skip(at).take(count).collect();
            assert_eq!(over_and_over(&all, at, count), wanted, "{count} from {at}");
        }
    }
}
