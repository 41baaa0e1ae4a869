//! Longspan on CPUs: ranks are threads, streams are real queues with a worker thread each.
//!
//! It is a backend to compute with, and the one that judges the algorithms: the table of active ranges turns two
//! conflicting operations that run at once into an error, and [`Options::checked`] mode does so for every pair without an
//! order between them, also across ranks. [`Personality`] imitates how other machines exchange.
//!
//! | file | concept |
//! |---|---|
//! | `attention/` | tiled online softmax, forward and backward |
//! | `backend.rs` | names under which all this is opened |
//! | `device.rs` | one rank's handle: allocation, copies, fills |
//! | `memory.rs` | buffers: heap blocks, windows, adopted memory |
//! | `stream.rs`, `event.rs` | queues, points in them |
//! | `table.rs`, `clock.rs` | who touches what now; who came before whom (checked mode) |
//! | `copy.rs` | strided copies |
//! | `collective.rs`, `exchange.rs` | communicator; prepared exchanges |
//! | `group.rs`, `matching.rs`, `round.rs`, `board.rs` | what ranks share: common calls, rounds, the progress board |
//! | `transport.rs` | what a collective of another crate needs of the device |
//! | `peak.rs` | the most that the CPU computes, measured |
//! | `personality.rs` | imitations of other machines |

mod attention;
mod backend;
mod board;
mod caps;
mod clock;
mod collective;
mod copy;
mod device;
mod event;
mod exchange;
mod group;
mod matching;
mod memory;
mod peak;
mod personality;
mod round;
mod stream;
mod sync;
mod table;
pub mod transport;

pub use attention::{CpuAttention, CpuPlan};
pub use backend::Cpu;
pub use collective::CpuCollective;
pub use device::{CpuDevice, Options};
pub use event::CpuEvent;
pub use exchange::CpuExchange;
pub use memory::Buffer;
pub use peak::multiply_adds;
pub use personality::Personality;
pub use stream::CpuStream;

#[cfg(test)]
mod tests;
