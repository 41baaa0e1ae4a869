//! Attention from batched matmuls and small operators, tiled over queries and keys, so that memory stays small; and the fused
//! forward where it can.
//!
//! Everything is computed in f32, whatever the dtype of the inputs. Heads are worked on in *units*: neighbouring KV heads with
//! equally many query heads each, so that `[kv, group * rows, dim]` is one batched matmul for all of them.

mod backward;
mod constants;
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
pub use plan::AscendPlan;
use space::Slots;
use tile::Work;

/// The largest head that is computed.
const HEAD_DIM: usize = 256;

/// Attention of one device.
#[derive(Debug)]
pub struct AscendAttention {
    constants: Arc<Constants>,
    fused: bool,
}

impl AscendAttention {
    /// The attention of `device`; `fused` for `FlashAttentionScore` forwards.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(device: &AscendDevice, fused: bool) -> Result<Self> {
        Ok(Self { constants: Arc::new(Constants::new(device)?), fused })
    }

    fn work<'a>(&'a self, on: &'a StreamState, plan: &'a AscendPlan, scratch: &AscendBuffer) -> Work<'a> {
        let slots = Slots::new(scratch.address(), &plan.spec, plan.sizes());
        Work { ops: Ops::new(on), constants: &self.constants, spec: &plan.spec, slots }
    }

    /// The caller's scratch, or the stream's own.
    fn scratch(&self, on: &AscendStream, plan: &AscendPlan, given: Option<&AscendBuffer>) -> Result<AscendBuffer> {
        let wanted = plan.scratch_bytes();
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
        if self.fused {
            fused::check_slices(slices)?;
        }
        Ok(AscendPlan::new(spec, slices))
    }

    fn scratch_bytes(&self, plan: &AscendPlan) -> usize {
        let fused = if self.fused { fused::scratch_bytes(plan) } else { 0 };
        plan.scratch_bytes().max(fused)
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
        if self.fused {
            let scratch = match args.scratch {
                Some(scratch) => scratch.clone(),
                None => on.0.temporary(self.scratch_bytes(plan))?,
            };
            fused::forward(Ops::new(&on.0), &self.constants, plan, args, &scratch)?;
            buffers.push(&scratch);
            return keep(&on.0, buffers);
        }
        let scratch = self.scratch(on, plan, args.scratch)?;
        forward::forward(&self.work(&on.0, plan, &scratch), plan, args)?;
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
        backward::backward(&self.work(&on.0, plan, &scratch), plan, args)?;
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
