//! Longspan: exact attention over sequences that do not fit one accelerator.
//!
//! Unified sequence parallelism (DeepSpeed-Ulysses x ring attention), forward and backward, on the backend that a cargo
//! feature selects. Three ways in, from the simplest:
//!
//! - [`on_ranks`] starts the ranks of a mesh in this process and gives each an [`Engine`], which works on host tensors:
//!
//! ```
//! use longspan::{DType, Layout, Mask, Mesh, Placement, Problem, Tensor};
//!
//! fn main() -> longspan::Result<()> {
//!     let extent = [1, 64, 4, 16]; // batch, seq, heads, head_dim
//!     let mesh = Mesh::new(2, 2, Placement::UlyssesInner)?; // 2 Ulysses x 2 ring ranks
//!     let layout = Layout::zigzag(64, &mesh); // balances causal work
//!     let problem = Problem::new(DType::F32, 1, [4, 4], 16).with_backward(true);
//!     let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| Tensor::normal(DType::F32, extent, seed));
//!
//!     let ranks = longspan::on_ranks("cpu", &mesh, |engine| {
//!         let mine = |whole: &Tensor| whole.shard(&layout, engine.rank());
//!         let (q, k, v, dout) = (mine(&q)?, mine(&k)?, mine(&v)?, mine(&dout)?);
//!         engine.prepare(&problem, [&layout, &layout], &Mask::causal())?;
//!         let forward = engine.forward([&q, &k, &v], &Default::default())?;
//!         let gradients = engine.backward(&dout, None)?;
//!         Ok((forward.out, gradients.dq))
//!     })?;
//!
//!     let (outs, dqs): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
//!     assert_eq!(Tensor::unshard(&layout, &outs)?.extent(), extent);
//!     assert_eq!(Tensor::unshard(&layout, &dqs)?.extent(), extent);
//!     Ok(())
//! }
//! ```
//!
//! - [`Processes`] is the same for ranks that are processes, which `mpirun` or `torchrun` started on any number of hosts.
//! - `longspan_seqpar::Usp` works on device views of one backend, on the caller's stream: what a framework embeds. It needs the
//!   crates `longspan-seqpar`, `longspan-hal` and a backend's (`longspan-cpu`, `longspan-cuda`, `longspan-rocm`); the example
//!   `embed` has all of it. Ranks meet by `Member::join` with a `GroupId`, whose bytes one rank made and the framework carried to
//!   all. `Device::adopt` takes the framework's memory (aligned to 16 bytes, alive until the work queued on it has run, or with an
//!   owner that is kept), `Device::adopt_stream` its stream; a `Strided` says where a tensor lies, packed ones too. Forward and
//!   backward are queued on that stream and run in the order of the calls.
//! - `longspan_hal` has the traits that a new backend implements.
#![forbid(unsafe_code)]

mod cache;
mod clock;
mod engine;
mod processes;
mod ranks;
mod resident;
mod room;
mod select;
mod tensor;

pub use cache::{KernelCache, clear_kernel_caches, kernel_caches};
pub use clock::align;
pub use engine::{DeviceReport, Engine, Extra, Forwarded, Gradients, SpanReport};
pub use longspan_hal::{
    Caps, DType, DeviceInfo, Error, Extent, Finding, KernelClass, Memory, Peak, Result, Step, Transport,
};
pub use longspan_peers::{Board, Lost, Place, Reach};
pub use longspan_seqpar::heads::head_groups;
pub use longspan_seqpar::{Bytes, Coords, Documents, Layout, Mask, Mesh, Placement, Plan, Problem, Run, Traffic, Work};
pub use processes::{Processes, in_group};
pub use ranks::{DEFAULT_LIMIT, on_devices, on_ranks, on_ranks_within, spawn};
pub use resident::Pass;
pub use select::{Visit, backends, devices, findings, select, set_kernels, set_transport};
pub use tensor::Tensor;
