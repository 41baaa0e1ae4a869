//! Attention from batched matmuls and small operators, tiled over queries and keys, so that memory stays small; and fused
//! attention for what it can.
//!
//! The basic one computes everything in f32, whatever the dtype of the inputs. Heads are worked on in *units*: neighbouring KV heads with
//! equally many query heads each, so that `[kv, group * rows, dim]` is one batched matmul for all of them.

mod backward;
mod constants;
mod finite;
mod forward;
mod fused;
mod philox;
mod plan;
mod prepare;
mod space;
mod tile;

use std::sync::Arc;

use longspan_hal::{
    Accumulate, Attention, Backward, Error, Extras, Forward, Prepare, Result, Seed, Slices, Spec, Stage,
};

use crate::copy::Place;
use crate::memory::AscendBuffer;
use crate::ops::Ops;
use crate::stream::{Kept, StreamState};
use crate::{AscendDevice, AscendStream, NAME};

use constants::Constants;
use fused::FusedPlan;
use plan::BasicPlan;
use space::Slots;
use tile::Work;

/// The largest head that is computed.
const HEAD_DIM: usize = 256;

/// A planned call.
#[derive(Debug)]
pub struct AscendPlan(Planned);

#[derive(Debug)]
enum Planned {
    Basic(BasicPlan),
    Fused(FusedPlan),
}

/// Attention of one device.
#[derive(Debug)]
pub struct AscendAttention {
    constants: Arc<Constants>,
    fused: bool,
}

impl AscendAttention {
    /// The attention of `device`; `fused` for `FlashAttentionScore` and its gradient.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(device: &AscendDevice, fused: bool) -> Result<Self> {
        Ok(Self { constants: Arc::new(Constants::new(device, fused)?), fused })
    }

    fn work<'a>(&'a self, on: &'a StreamState, plan: &'a BasicPlan, scratch: &AscendBuffer) -> Work<'a> {
        let slots = Slots::new(scratch.address(), &plan.spec, plan.sizes());
        Work { ops: Ops::new(on), constants: &self.constants, spec: &plan.spec, slots }
    }

    /// The caller's scratch, or the stream's own.
    fn scratch(&self, on: &AscendStream, plan: &AscendPlan, given: Option<&AscendBuffer>) -> Result<AscendBuffer> {
        let wanted = self.scratch_bytes(plan);
        match given {
            Some(scratch) if scratch.bytes() >= wanted => Ok(scratch.clone()),
            Some(scratch) => {
                let why = format!("it has {} bytes, the plan needs {wanted}", scratch.bytes());
                Err(Error::invalid("scratch", why))
            }
            None => on.0.temporary(wanted),
        }
    }
}

fn unsupported(what: impl Into<String>, instead: impl Into<String>) -> Error {
    Error::Unsupported { backend: NAME, what: what.into(), instead: instead.into() }
}

/// A view as a place.
pub(super) fn place<'a>(view: &'a longspan_hal::View<'_, AscendDevice>) -> Place<'a> {
    Place { buffer: view.buffer(), at: view.at() }
}

/// Buffers of options.
fn extra_buffers<'a>(extras: &Extras<'a, AscendDevice>) -> Vec<&'a AscendBuffer> {
    let views = [extras.alibi_slopes, extras.sinks].into_iter().flatten().map(|v| v.buffer());
    let seed = match extras.seed {
        Some(Seed::Device(buffer)) => Some(buffer),
        _ => None,
    };
    views.chain(seed).collect()
}

fn keep(on: &StreamState, buffers: Vec<&AscendBuffer>) -> Result<()> {
    on.keep(Kept { buffers: buffers.into_iter().cloned().collect(), pinned: Vec::new() })
}

impl Attention<AscendDevice> for AscendAttention {
    type Plan = AscendPlan;

    fn supports(&self, spec: &Spec) -> Result<()> {
        spec.check()?;
        let largest = spec.head_dim.max(spec.head_dim_v);
        if largest > HEAD_DIM {
            return Err(unsupported(format!("head_dim {largest}"), format!("it computes heads up to {HEAD_DIM}")));
        }
        if spec.heads > constants::COUNT {
            let instead = format!("it computes up to {} local heads; use more Ulysses ranks", constants::COUNT);
            return Err(unsupported(format!("{} heads", spec.heads), instead));
        }
        if self.fused { fused::supports(spec) } else { Ok(()) }
    }

    fn plan(&self, _on: &AscendStream, spec: &Spec, slices: &Slices) -> Result<AscendPlan> {
        self.supports(spec)?;
        Ok(AscendPlan(if self.fused {
            Planned::Fused(FusedPlan::new(spec, slices))
        } else {
            Planned::Basic(BasicPlan::new(spec, slices))
        }))
    }

    fn scratch_bytes(&self, plan: &AscendPlan) -> usize {
        match &plan.0 {
            Planned::Basic(plan) => plan.scratch_bytes(),
            Planned::Fused(plan) => plan.scratch_bytes(),
        }
    }

    fn held_bytes(&self, streams: usize) -> usize {
        self.constants.buffer().bytes() + streams * crate::stream::HELD
    }

    fn kernels(&self, plan: &AscendPlan, backward: bool) -> Vec<String> {
        let name = match (&plan.0, backward) {
            (Planned::Basic(_), _) => "aclnnBatchMatMul",
            (Planned::Fused(_), false) => "aclnnFlashAttentionScore",
            (Planned::Fused(_), true) => "aclnnFlashAttentionScoreGrad",
        };
        vec![name.to_owned()]
    }

    fn forward(&self, on: &AscendStream, plan: &AscendPlan, args: &Forward<'_, AscendDevice>) -> Result<()> {
        on.0.enter()?;
        let mut buffers = vec![args.q.buffer(), args.k.buffer(), args.v.buffer()];
        buffers.extend(extra_buffers(&args.extras));
        match &args.stage {
            Stage::All { out, lse } => buffers.extend([out.buffer(), lse.buffer()]),
            Stage::Continue(p) | Stage::Start(p) => buffers.extend([p.acc.buffer(), p.m.buffer(), p.l.buffer()]),
            Stage::Finish { partial: p, out, lse } => {
                buffers.extend([p.acc.buffer(), p.m.buffer(), p.l.buffer(), out.buffer(), lse.buffer()]);
            }
        }
        let scratch = self.scratch(on, plan, args.scratch)?;
        match &plan.0 {
            Planned::Basic(plan) => forward::forward(&self.work(&on.0, plan, &scratch), plan, args)?,
            Planned::Fused(plan) => {
                fused::forward(Ops::new(&on.0), &self.constants, plan, args, scratch.address())?;
            }
        }
        buffers.extend([&scratch, self.constants.buffer()]);
        keep(&on.0, buffers)
    }

    fn backward_prepare(&self, on: &AscendStream, spec: &Spec, args: &Prepare<'_, AscendDevice>) -> Result<()> {
        on.0.enter()?;
        let scratch = on.0.temporary(prepare::scratch_bytes(spec))?;
        prepare::prepare(Ops::new(&on.0), spec, args, scratch.address())?;
        let mut buffers = vec![args.out.buffer(), args.dout.buffer(), args.lse.buffer(), args.delta.buffer(), &scratch];
        buffers.extend(args.dlse.map(|v| v.buffer()));
        if let Some((logits, dsinks)) = &args.sinks {
            buffers.extend([logits.buffer(), dsinks.buffer()]);
        }
        keep(&on.0, buffers)
    }

    fn backward(&self, on: &AscendStream, plan: &AscendPlan, args: &Backward<'_, AscendDevice>) -> Result<()> {
        on.0.enter()?;
        let scratch = self.scratch(on, plan, args.scratch)?;
        match &plan.0 {
            Planned::Basic(plan) => backward::backward(&self.work(&on.0, plan, &scratch), plan, args)?,
            Planned::Fused(plan) => {
                fused::backward(Ops::new(&on.0), &self.constants, plan, args, scratch.address())?;
            }
        }
        let mut buffers = vec![args.q.buffer(), args.k.buffer(), args.v.buffer(), args.dout.buffer()];
        buffers.extend([args.lse.buffer(), args.delta.buffer(), &scratch, self.constants.buffer()]);
        buffers.extend([args.dq, args.dk, args.dv].map(|g| g.into.buffer()));
        buffers.extend(extra_buffers(&args.extras));
        keep(&on.0, buffers)
    }

    fn accumulate(&self, on: &AscendStream, args: &Accumulate<'_, AscendDevice>) -> Result<()> {
        on.0.enter()?;
        let scratch = on.0.temporary(prepare::SUM_BYTES)?;
        prepare::accumulate(Ops::new(&on.0), args, scratch.address())?;
        let terms = args.terms.iter().map(longspan_hal::View::buffer);
        keep(&on.0, terms.chain([args.into.buffer(), &scratch]).collect())
    }
}
