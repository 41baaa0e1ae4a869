//! The C ABI of `libascendcl`, `libnnopbase`, `libopapi` and `libhccl` in one shared object, computed on a CPU and hostile on
//! purpose: what a real NPU punishes only sometimes is punished here always, or soon.
//!
//! It shares no code with the backend. Only what Longspan uses is there, with the semantics of the vendor's documents:
//!
//! | property | how |
//! |---|---|
//! | streams really run later | a worker thread a stream, random delays before tasks |
//! | the host can't touch device memory | pointers lead into a mapping without access; the emulator has its own |
//! | nothing is zero by luck | new and freed memory, and workspaces before an operator, hold NaN bits |
//! | early free | a queued task whose memory was freed fails its stream |
//! | strict handles | handles are numbers, never reused; ending one twice or using it after is refused |
//! | contexts are thread-local | 107002 without one, 107003 for a stream of another |
//! | executors run once | a second run, a leak, and tensors ended before phase 2 are refused or reported |
//! | workspaces are never zero | 512 bytes at least; too small a one is refused |
//! | rendezvous | between threads and processes alike a send ends when its receive ran; nobody is told of a lost peer, only a timeout ends the wait |
//! | fused attention | f16/bf16 outputs are rounded, statistics are eight copies, masked logits are `-FLT_MAX` |
//!
//! Everything that was refused or went wrong by misuse is kept as text and counted: [`longspan_emulator_misuses`],
//! [`longspan_emulator_report`].
//!
//! Environment: `LONGSPAN_EMULATOR_DEVICES` (8), `LONGSPAN_EMULATOR_MEMORY_MIB` (16384 of address space a process),
//! `LONGSPAN_EMULATOR_DELAY_US` (100), `LONGSPAN_EMULATOR_SEED` (1), `LONGSPAN_EMULATOR_TIMEOUT_MS` of communication (30000),
//! `LONGSPAN_EMULATOR_REPORT` (any value: counts of launches and bytes on standard error when the process ends).

#![allow(non_snake_case)] // the vendor's names

mod attention;
mod code;
mod elementwise;
mod hccl;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/link.rs"]
mod link;
mod matmul;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/memory.rs"]
mod memory;
mod objects;
mod operator;
mod runtime;
#[path = "../../shared/state.rs"]
mod state;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/stream.rs"]
mod stream;
mod tensor;

pub use hccl::*;
pub use objects::*;
pub use runtime::*;
pub use state::{longspan_emulator_count, longspan_emulator_misuses};

/// Every symbol of the operators, for tests that call them by name.
pub mod operators {
    pub use crate::attention::*;
    pub use crate::elementwise::*;
    pub use crate::matmul::*;
}
