//! The C ABI of `libamdhip64`, `libhiprtc` and `librccl` in one shared object, computed on a CPU and hostile on purpose: what a
//! real GPU punishes only sometimes is punished here always, or soon.
//!
//! It shares no code with the backend. Only what Longspan uses is there, with the semantics of the vendor's documents:
//!
//! | property | how |
//! |---|---|
//! | streams really run later | a worker thread a stream, random delays before tasks |
//! | the host can't touch device memory | no access outside of kernels; copies use the emulator's own mapping |
//! | nothing is zero by luck | new and freed memory, and shared memory of a block, hold NaN bits |
//! | early free | a copy whose memory was freed fails its stream; kernels read NaN |
//! | kernels out of bounds | memory behind every allocation is checked when it is freed; shared memory at every access |
//! | strict handles | handles are numbers, never reused; ending one twice or using it after is refused |
//! | the current device is thread-local | a stream of another device is refused |
//! | allocations and frees of a pool take their turn | memory is poisoned when the stream gets there |
//! | rendezvous | a send ends when its receive ran; the first group with a peer waits for that on the host; nobody is told of a lost peer |
//! | memory of another process | opening one's own is refused; so is closing twice, freeing what another has open, using what was freed |
//! | values that streams wait for | only in registered memory, at the device's address of it; a wait never gives up |
//!
//! hipRTC compiles the kernel sources themselves with the host's C++ compiler (`LONGSPAN_EMULATOR_CXX`, else `c++`, `g++`,
//! `clang++`), after `host.h`: blocks run one after the other, threads as fibers, matrix instructions as the manuals say.
//!
//! Everything that was refused or went wrong by misuse is kept as text and counted: [`longspan_emulator_misuses`]; with
//! `LONGSPAN_EMULATOR_LOUD=1` it is also printed when it happens.
//!
//! Environment: `LONGSPAN_EMULATOR_ARCH` (gfx942), `LONGSPAN_EMULATOR_DEVICES` (8), `LONGSPAN_EMULATOR_MEMORY_MIB` (16384 of
//! address space a process), `LONGSPAN_EMULATOR_DELAY_US` (100), `LONGSPAN_EMULATOR_SEED` (1), `LONGSPAN_EMULATOR_TIMEOUT_MS`
//! of communication (30000), `LONGSPAN_EMULATOR_PEERS` (1; 0: no device reaches another's memory), `LONGSPAN_EMULATOR_FIRST_BUS`
//! (16; where device 0 is plugged in: a process that sees other devices than the rest has another), `LONGSPAN_EMULATOR_IPC` (1; 0:
//! no memory of another process can be opened, as in some containers), `LONGSPAN_EMULATOR_FAULT` (`fail:N`, `hang:N`: what becomes of
//! the N-th kernel of the process).

#![allow(non_snake_case)] // the vendor's names

mod between;
mod code;
mod kernels;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/link.rs"]
mod link;
#[path = "../../shared/memory.rs"]
mod memory;
mod pools;
mod rccl;
mod runtime;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/state.rs"]
mod state;
#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/stream.rs"]
mod stream;

pub use between::*;
pub use kernels::*;
pub use pools::*;
pub use rccl::*;
pub use runtime::*;
pub use state::{longspan_emulator_count, longspan_emulator_misuses};
