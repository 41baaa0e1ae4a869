//! Longspan on CPUs whose ranks are processes of an MPI job (Open MPI, MPICH): one process, one rank.
//!
//! Device and attention are those of `longspan-cpu`; only the collective is of MPI:
//!
//! | Longspan | MPI |
//! |---|---|
//! | exchange | `MPI_Irecv`, `MPI_Issend`; small strided blocks as derived datatypes, large ones packed |
//! | progress while attention computes | the stream's own thread tests the requests, and naps between |
//! | matching, progress board, loss of a peer | `longspan-peers`, a TCP star beside MPI, whose errors name no rank |
//! | start of a job | `world`, `broadcast`: also for backends that only want to hand out their group's id |
//!
//! | file | concept |
//! |---|---|
//! | `backend.rs` | the name `mpi` |
//! | `collective.rs`, `exchange.rs` | communicator; prepared exchanges |
//! | `datatype.rs` | strided views as MPI types |
//! | `flight.rs` | requests on their way: waits that end, whatever the peer does |
//! | `pace.rs` | how often a wait tests: who waits shares the core with who computes |
//! | `world.rs` | MPI itself: start, end, error codes, one lock |
//!
//! MPI's errors are returned, never fatal. No call of this crate blocks inside MPI but for those that start and end the job.
#![cfg(feature = "mpi")]

mod backend;
mod collective;
mod datatype;
mod exchange;
mod flight;
mod pace;
#[cfg(test)]
mod tests;
mod world;

pub use backend::Mpi;
pub use collective::MpiCollective;
pub use exchange::MpiExchange;
pub use world::{World, abort, broadcast, finalize, world};
