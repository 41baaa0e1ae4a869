//! Longspan's GPU kernels as text, and what a backend needs to compile and launch them. No GPU library is touched here.
//!
//! * [`Source`]: the CUDA C++ and HIP sources (`cu/`), one kernel a file. A [`Prelude`] holds everything that only one vendor
//!   has (`cu/prelude_cuda.cuh`, `cu/prelude_hip.cuh`), under the same names.
//! * [`Specialization`]: a source with its macros, launch shape and shared memory, chosen for a [`Spec`](longspan_hal::Spec)
//!   and a [`Target`].
//! * [`params`]: the structures that kernels take.
//! * [`WorkList`]: slices cut into tiles, which kernels take their work from.
//!
//! A forward is one launch over [`WorkList::by_queries`]; a backward is one launch over [`WorkList::by_keys`], and in the
//! deterministic mode a second one over query tiles.

mod amd;
mod flash2;
mod hopper;
pub mod params;
pub mod source;
pub mod specialize;
pub mod tiling;

pub use source::{Prelude, Source};
pub use specialize::{Family, Specialization, Target, View};
pub use tiling::WorkList;
