//! Longspan on Huawei Ascend NPUs.
//!
//! | Longspan | Ascend |
//! |---|---|
//! | device, buffer, stream, event | a device's own context, `aclrtMalloc`, `aclrtStream`, `aclrtEvent` (re-recordable) |
//! | strided copy, fill | `InplaceCopy`, `InplaceFillScalar` on strided `aclTensor`s |
//! | exchange | packing copies, then one `HcclBatchSendRecv` with one item a peer and direction |
//! | attention | [`Ascend`]: batched matmuls and small operators in f32, every option; [`AscendFused`]: `FlashAttentionScore` where it can |
//! | matching, progress board, loss of a peer | `longspan-peers`: a small TCP star beside HCCL, whose errors name no rank |
//!
//! Operators run in two phases: the first sizes a workspace and makes an executor, the second queues it. Workspaces are kept a
//! stream; every tensor object ends when phase 2 returned; memory lives until an event after the call.
//!
//! The context is thread-local in AscendCL. Every call binds the device's context to the calling thread first, destructors
//! included; it is left bound.
//!
//! State: the prototypes are checked against the vendor's headers, the code runs on an emulator; it never ran on an NPU yet.

mod attention;
mod backend;
mod collective;
mod context;
mod copy;
mod device;
mod event;
mod exchange;
mod memory;
mod ops;
mod stream;
mod tensor;
mod watch;

pub use attention::{AscendAttention, AscendPlan};
pub use backend::{Ascend, AscendFused};
pub use collective::AscendCollective;
pub use device::AscendDevice;
pub use event::AscendEvent;
pub use exchange::AscendExchange;
pub use memory::AscendBuffer;
pub use stream::AscendStream;

/// The backend's name in errors.
const NAME: &str = "ascend";
