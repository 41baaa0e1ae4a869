//! Unified sequence parallelism: DeepSpeed-Ulysses (all-to-all over heads) x ring attention, forward and backward, written
//! once against the traits of `longspan-hal`.
//!
//! The way through the crate, from the outside in:
//!
//! 1. A [`Mesh`] says how many ranks there are and how they are placed; a [`Layout`] says which tokens each holds; a [`Mask`]
//!    says which keys a query sees; a [`Problem`] gives shapes and options.
//! 2. A [`Plan`] is what one rank will do, worked out without a device: [`Route`]s from mask and layout, heads, bytes.
//! 3. [`Usp::prepare`] plans kernels, takes memory and prepares exchanges on a [`Member`] of the group; then
//!    [`Usp::forward`] and [`Usp::backward`] queue work on the caller's stream, any number of times.
//!
//! The algorithms are in `ulysses.rs`, `ring.rs` and `usp.rs`, a page each; `*_layout.rs` beside them hold their memory and
//! messages.
#![forbid(unsafe_code)]

pub mod heads;
pub mod layout;
pub mod mask;
pub mod mesh;
pub mod picture;
pub mod route;
pub mod trace;

mod args;
mod kernels;
mod member;
mod message;
mod pass;
mod plan;
mod problem;
mod ring;
mod ring_layout;
mod rows;
mod run;
mod ulysses;
mod ulysses_layout;
mod usp;
mod workspace;

pub use layout::{Layout, Run};
pub use mask::{Documents, Mask};
pub use member::Member;
pub use mesh::{Coords, Mesh, Placement};
pub use plan::{Plan, Traffic};
pub use problem::Problem;
pub use route::{Needed, Route, Way};
pub use trace::{Span, Trace, Work};
pub use usp::{Gradients, Inputs, OutputRows, Outputs, Usp};
pub use workspace::Bytes;
