//! Attention on CPU cores: tiled online softmax, forward and backward, in f32 whatever the inputs.
//!
//! | file | concept |
//! |---|---|
//! | `mod.rs` | the trait: what is supported, and arguments brought to memory |
//! | `plan.rs` | slices cut into tasks; bands of a tile |
//! | `forward.rs`, `backward.rs`, `prepare.rs` | the algorithms, over tensors in memory |
//! | `pack.rs` | tensors, packing, scratch of threads, running tasks |
//! | `exp.rs`, `philox.rs` | exp and tanh; dropout masks |
//! | `simd/` | register tile and row kernels, once per instruction set |
//!
//! Results are the same bits for any number of threads, always: every sum has an order that follows from the slices alone.

mod backward;
mod exp;
mod forward;
mod pack;
mod philox;
mod plan;
mod prepare;
mod simd;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use longspan_hal::{
    Accumulate, Attention, Backward, DType, Device, Error, Extras, Forward, Gradient, Prepare, Result, Seed, Slices,
    Spec, Stage, Store, Strided, View, ViewMut,
};

use self::forward::Options;
use self::pack::Tensor;
use self::philox::Dropout;
use self::plan::Plan;
use self::simd::Kernels;
use crate::memory::Buffer;
use crate::personality::Personality;
use crate::table::Access;
use crate::{CpuDevice, CpuStream};

/// Query rows of a block in the forward: a multiple of every register tile's rows.
pub(crate) const BLOCK: usize = 96;
/// Blocks of a forward task at most: they share packed keys.
const TASK_BLOCKS: usize = 12;
/// Keys of a packed tile in the forward: K and V of a tile stay in the second cache, logits of a register tile's rows in the
/// first.
const FORWARD_KEYS: usize = 384;
/// Keys of a tile in the backward: a multiple of every register tile's rows.
const KEY_TILE: usize = 192;
/// Query rows of a block in the backward: as [`BLOCK`].
const QUERY_BLOCK: usize = 96;
/// The largest head_dim and head_dim_v.
const MAX_HEAD_DIM: usize = 256;

/// Attention of a [`CpuDevice`]: every option of [`Spec`], with `head_dim` and `head_dim_v` up to 256.
///
/// Work runs on the global rayon pool (`RAYON_NUM_THREADS`); results are the same bits for any number of threads. The
/// kernels are chosen for the CPU at run time; `LONGSPAN_CPU_ARCH` = `avx512`, `avx2`, `neon` or `portable` picks others.
#[derive(Clone, Debug)]
pub struct CpuAttention {
    kernels: &'static Kernels,
    backend: &'static str,
    personality: Personality,
}

/// The work of one spec and its slices.
#[derive(Clone, Debug)]
pub struct CpuPlan(Arc<Plan>);

impl CpuAttention {
    /// The attention of `device`.
    ///
    /// # Errors
    /// None today.
    pub fn new(device: &CpuDevice) -> Result<Self> {
        Ok(Self { kernels: Kernels::detect(), backend: device.backend(), personality: device.personality() })
    }

    /// Instruction set of the kernels in use: `avx512f`, `avx2+fma`, `neon` or `portable`.
    pub fn kernels(&self) -> &'static str {
        self.kernels.name
    }

    fn unsupported(&self, what: impl Into<String>, instead: &str) -> Error {
        Error::Unsupported { backend: self.backend, what: what.into(), instead: instead.into() }
    }
}

impl Attention<CpuDevice> for CpuAttention {
    type Plan = CpuPlan;

    fn supports(&self, spec: &Spec) -> Result<()> {
        spec.check()?;
        for (what, dim) in [("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)] {
            if dim > MAX_HEAD_DIM {
                return Err(self.unsupported(format!("{what} {dim}"), "it supports 1 to 256"));
            }
        }
        if !matches!(spec.dtype, DType::Bf16 | DType::F16 | DType::F32) {
            return Err(self.unsupported(format!("dtype {}", spec.dtype), "it supports bf16, f16 and f32"));
        }
        if self.personality == Personality::AscendLike && spec.dtype != DType::F32 {
            let instead = "its outputs are in the dtype of the inputs: use f32, or one call without it";
            for (what, wanted) in [("partial", spec.partial), ("accumulate", spec.accumulate)] {
                if wanted {
                    return Err(self.unsupported(format!("{what} with {}", spec.dtype), instead));
                }
            }
        }
        Ok(())
    }

    fn plan(&self, _on: &CpuStream, spec: &Spec, slices: &Slices) -> Result<CpuPlan> {
        self.supports(spec)?;
        Ok(CpuPlan(Arc::new(Plan::new(spec, slices, rayon::current_num_threads()))))
    }

    fn scratch_bytes(&self, plan: &CpuPlan) -> usize {
        let spec = &plan.0.spec;
        if spec.dtype == DType::F32 || spec.accumulate {
            return 0;
        }
        dq_sum(spec).bytes().next_multiple_of(256)
    }

    fn kernels(&self, _plan: &CpuPlan, _backward: bool) -> Vec<String> {
        vec![self.kernels.name.to_owned()]
    }

    fn forward(&self, on: &CpuStream, plan: &CpuPlan, args: &Forward<'_, CpuDevice>) -> Result<()> {
        let mut tensors = Arguments::default();
        let [q, k, v] = [args.q, args.k, args.v].map(|t| tensors.read(t));
        let (partial, results) = match &args.stage {
            Stage::All { out, lse } => (None, Some([out, lse])),
            Stage::Continue(p) | Stage::Start(p) => (Some(p), None),
            Stage::Finish { partial, out, lse } => (Some(partial), Some([out, lse])),
        };
        let partial = partial.map(|p| [&p.acc, &p.m, &p.l].map(|t| tensors.write(*t)));
        let results = results.map(|r| r.map(|t| tensors.write(*t)));
        let start = matches!(args.stage, Stage::All { .. } | Stage::Start(_));
        let extras = tensors.extras(&args.extras)?;
        let (plan, kernels) = (plan.0.clone(), self.kernels);
        on.submit("attention forward", tensors.accesses, move || {
            let options = extras.options(&plan.spec);
            forward::Forward { plan, kernels, q, k, v, options, partial, start, results }.run();
            Ok(())
        })
    }

    fn backward_prepare(&self, on: &CpuStream, spec: &Spec, args: &Prepare<'_, CpuDevice>) -> Result<()> {
        self.supports(spec)?;
        let mut tensors = Arguments::default();
        let prepare = prepare::Prepare {
            kernels: self.kernels,
            head_first: spec.head_first,
            out: tensors.read(args.out),
            dout: tensors.read(args.dout),
            lse: tensors.read(args.lse),
            dlse: args.dlse.map(|t| tensors.read(t)),
            delta: tensors.write(args.delta),
            sinks: args.sinks.map(|(logits, dsinks)| [tensors.read(logits), tensors.write(dsinks)]),
        };
        on.submit("attention backward_prepare", tensors.accesses, move || {
            prepare.run();
            Ok(())
        })
    }

    fn backward(&self, on: &CpuStream, plan: &CpuPlan, args: &Backward<'_, CpuDevice>) -> Result<()> {
        let mut tensors = Arguments::default();
        let [q, k, v] = [args.q, args.k, args.v].map(|t| tensors.read(t));
        let [dout, lse, delta] = [args.dout, args.lse, args.delta].map(|t| tensors.read(t));
        let [dq, dk, dv] = [args.dq, args.dk, args.dv].map(|g| tensors.gradient(g));
        // Nothing is summed where there are no queries, and no scratch is asked for.
        let narrow = args.dq.into.dtype() != DType::F32 && !args.dq.into.at().is_empty();
        let dq_sum = if narrow { Some(tensors.scratch(args.scratch, dq_sum(&plan.0.spec))?) } else { None };
        let extras = tensors.extras(&args.extras)?;
        let (plan, kernels) = (plan.0.clone(), self.kernels);
        on.submit("attention backward", tensors.accesses, move || {
            let options = extras.options(&plan.spec);
            backward::Backward { plan, kernels, q, k, v, dout, lse, delta, options, dq, dk, dv, dq_sum }.run();
            Ok(())
        })
    }

    fn accumulate(&self, on: &CpuStream, args: &Accumulate<'_, CpuDevice>) -> Result<()> {
        let mut tensors = Arguments::default();
        let into = tensors.write(args.into);
        // A term that is the sum itself is already stated, as written.
        let terms: Vec<Tensor> = args.terms.iter().map(|t| tensors.read_unless(*t, args.into)).collect();
        let kernels = self.kernels;
        on.submit("attention accumulate", tensors.accesses, move || {
            prepare::accumulate(kernels, into, &terms);
            Ok(())
        })
    }
}

/// Where dq is summed before it is rounded.
fn dq_sum(spec: &Spec) -> Strided {
    Strided::dense(DType::F32, [spec.batch, spec.q_rows, spec.heads, spec.head_dim])
}

/// Tensors of a call, with what the stream must know of them.
#[derive(Default)]
struct Arguments {
    accesses: Vec<Access>,
}

impl Arguments {
    fn add(&mut self, access: Access) -> Tensor {
        // SAFETY: views lie inside their buffers; the stream keeps the buffers alive until the job ran, and runs it alone on
        // what it states to touch (the ordering contract, which the table of active ranges checks). Tasks of a job write
        // different rows, or in turns.
        let tensor = unsafe { Tensor::new(access.buffer.ptr(), access.at) };
        self.accesses.push(access);
        tensor
    }

    fn read(&mut self, view: View<'_, CpuDevice>) -> Tensor {
        self.add(Access::read(view))
    }

    fn read_unless(&mut self, view: View<'_, CpuDevice>, stated: ViewMut<'_, CpuDevice>) -> Tensor {
        let tensor = self.read(view);
        if CpuDevice::same(view.buffer(), stated.buffer()) && view.at() == stated.at() {
            self.accesses.pop();
        }
        tensor
    }

    fn write(&mut self, view: ViewMut<'_, CpuDevice>) -> Tensor {
        self.add(Access::write(view))
    }

    fn gradient(&mut self, g: Gradient<'_, CpuDevice>) -> (Tensor, Store) {
        (self.write(g.into), g.store)
    }

    fn scratch(&mut self, buffer: Option<&Buffer>, at: Strided) -> Result<Tensor> {
        match buffer {
            Some(buffer) => Ok(self.write(ViewMut::new(buffer, at)?)),
            None => Err(Error::invalid("scratch", format!("the call needs {} bytes (scratch_bytes)", at.bytes()))),
        }
    }

    fn extras(&mut self, extras: &Extras<'_, CpuDevice>) -> Result<Inputs> {
        let seed = match extras.seed {
            Some(Seed::Host(seed)) => Some(SeedAt::Known(seed)),
            // Two words, of whatever type.
            Some(Seed::Device(buffer)) => {
                let words = View::new(buffer, Strided::dense(DType::F32, [1, 1, 1, 2]))?;
                Some(SeedAt::Memory(self.read(words)))
            }
            None => None,
        };
        let [alibi_slopes, sinks] = [extras.alibi_slopes, extras.sinks].map(|t| t.map(|t| self.read(t)));
        Ok(Inputs { alibi_slopes, sinks, seed })
    }
}

/// Inputs of options, read when the call runs.
struct Inputs {
    alibi_slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    seed: Option<SeedAt>,
}

enum SeedAt {
    Known(u64),
    Memory(Tensor),
}

impl Inputs {
    fn options(&self, spec: &Spec) -> Options {
        let seed = self.seed.as_ref().map(|seed| match seed {
            SeedAt::Known(seed) => *seed,
            SeedAt::Memory(at) => {
                let mut words = [0.0f32; 2];
                at.load(Kernels::detect(), [0, 0, 0], &mut words);
                u64::from(words[0].to_bits()) | u64::from(words[1].to_bits()) << 32
            }
        });
        let dropout = spec.dropout.zip(seed).map(|(p, seed)| Dropout::new(seed, spec.dropout_threshold(), p));
        Options { alibi_slopes: self.alibi_slopes, sinks: self.sinks, dropout }
    }
}
