//! Longspan's hardware layer: what a machine must be able to do, and nothing about how sequences are
//! parallelised.
//!
//! Three traits carry everything: [`Device`] (memory, streams, events, strided copies), [`Collective`]
//! (one kind of data movement between ranks: a prepared exchange) and [`Attention`] (partial attention
//! over lists of [`Slice`]s). A [`Backend`] ties the three together. The algorithms in `longspan-seqpar`
//! are written against these traits only; a vendor is one implementation of each.
//!
//! | file | concept | CUDA / NCCL | ROCm / RCCL | Ascend / HCCL | CPU |
//! |---|---|---|---|---|---|
//! | `device.rs` | buffer, stream, event | `CUdeviceptr`, `CUstream`, `CUevent` | `hipDeviceptr_t`, ... | `aclrtMalloc`, `aclrtStream`, `aclrtEvent` | heap memory, worker queues |
//! | `view.rs` | strided view of a buffer | pitch of `cuMemcpy2DAsync` | the same | strides of `aclTensor` | pointer arithmetic |
//! | `collective.rs` | exchange | grouped `ncclSend`/`ncclRecv`, or peer copies | the same | `HcclBatchSendRecv` | one copy between threads |
//! | `attention.rs` | slices of a mask; partials | FlashAttention-2/-3 class kernels | MFMA kernels | matmul + softmax, fused score | tiled online softmax |
//!
//! Who validates: shapes, strides, dtypes and overlaps are checked once, where arguments are made
//! ([`View::new`], [`Slices::new`], [`Forward::new`], [`Backward::new`], ...). Backends receive valid
//! arguments and only check what the machine alone can know.

#![forbid(unsafe_op_in_unsafe_fn)]

pub mod attention;
pub mod backend;
pub mod caps;
pub mod collective;
pub mod device;
pub mod error;
pub mod slice;
pub mod spec;
pub mod view;

pub use attention::{
    Accumulate, Attention, Backward, Extras, Forward, Gradient, Partial, Prepare, Seed, Stage, Store, apart,
};
pub use backend::{Backend, DeviceInfo, Finding, GroupId, KernelClass, Peak, Transport};
pub use caps::Caps;
pub use collective::{Collective, P2p, Step, check_sends};
pub use device::{Device, Memory, Priority};
pub use error::{Error, Result};
pub use slice::{Slice, Slices};
pub use spec::Spec;
pub use view::{DType, Extent, Strided, View, ViewMut};
