//! What GPU vendors share: memory, streams, events, kernels on demand, attention and exchanges, written once over a driver
//! whose functions have the shape of CUDA's (and HIP's) driver interface.
//!
//! A vendor is a [`Vendor`]: one [`Machine`] of [`Facts`], which are data. Nothing is linked: libraries are found when the
//! program runs.
//!
//! | file | concept |
//! |---|---|
//! | `machine.rs`, `driver.rs` | a vendor's facts and loaded libraries; the driver's functions |
//! | `context.rs` | one device in this process: memory pool, errors that poison it |
//! | `device.rs` | one rank's handle: allocation, copies, fills |
//! | `memory.rs`, `grave.rs`, `staging.rs` | buffers; what is freed once queued work ran; pinned host memory |
//! | `stream.rs`, `event.rs` | queues, points in them |
//! | `copy.rs` | strided copies by copy engines or a kernel |
//! | `compiler.rs`, `jit.rs`, `cache.rs`, `launch.rs` | kernels: compiled on demand, kept on disk, launched |
//! | `attention.rs`, `plan.rs` | attention kernels; work lists |
//! | `collective.rs`, `exchange.rs` | communicator; prepared exchanges |
//! | `neighbours.rs`, `peer.rs`, `nccl.rs` | who the ranks are, and how their messages travel |
//! | `letters.rs` | how ranks meet in a round that are threads |
//! | `flags.rs`, `region.rs`, `abroad.rs` | the same for processes of one host; windows between them |
//! | `watch.rs` | ends what a device waits for when a rank is lost |
//! | `findings.rs`, `gemm.rs` | what there is on this machine, for people; the device's peak |
//! | `group.rs` | a rank in its group: common calls, what ended it |

pub use longspan_dylib as dylib;

mod abroad;
mod attention;
mod backend;
mod cache;
mod collective;
mod compiler;
mod context;
mod copy;
mod device;
mod driver;
mod event;
mod exchange;
mod findings;
mod flags;
mod gemm;
mod grave;
mod group;
mod jit;
mod launch;
mod letters;
mod machine;
mod memory;
mod nccl;
mod neighbours;
mod packing;
mod peer;
mod plan;
mod region;
mod staging;
mod stream;
mod sync;
mod tensor_map;
mod watch;

pub use attention::GpuAttention;
pub use backend::GpuBackend;
pub use cache::{Cache, Figures as CacheFigures, Key};
pub use collective::GpuCollective;
pub use compiler::{Compiler, in_site_packages, named_or};
pub use device::GpuDevice;
pub use driver::{Address, Driver, Flavor, Handle, PoolProperties, Rows, Shared};
pub use event::Event;
pub use exchange::GpuExchange;
pub use gemm::Products;
pub use machine::{Asked, Codes, Facts, Machine, Place, Vendor};
pub use memory::Buffer;
pub use plan::GpuPlan;
pub use stream::GpuStream;
