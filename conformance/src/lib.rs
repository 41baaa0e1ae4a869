//! One suite that judges every Longspan backend.
//!
//! A case is a function that every rank runs (SPMD) against the traits of `longspan-hal` or the algorithms of
//! `longspan-seqpar`; rank 0 gathers the ranks' bytes and compares them with an f64 [`oracle`]. A backend's whole harness is
//! one call of [`run`] with its type and its [`Expectations`].
//!
//! ```text
//! table of cases -> filter, tier, ranks -> team of rank threads (device, group, attention, stream each)
//!   -> every rank runs the case -> verdict = AND over ranks -> expectations (never, broken) -> outcome -> Report
//! ```
//!
//! | outcome | meaning |
//! |---|---|
//! | passed | every rank was right |
//! | refused | the backend's list says that it never does this, and the refusal itself was right: right error, outputs untouched |
//! | broken | fails, and the list of known faults says so with a link |
//! | no machine | the devices that it needs are not here; `LONGSPAN_REQUIRE=<backend>` makes this a failure |
//! | failed | everything else: wrong results, hangs (the watchdog names ranks and steps), refusals nobody listed, listed faults that pass |

#![deny(unsafe_code)]

pub mod bound;
pub mod cases;
pub mod expectations;
pub mod gather;
pub mod host;
pub mod oracle;
pub mod rank;
pub mod report;
mod runner;
mod team;

pub use cases::{Body, Case, Tier, table};
pub use expectations::Expectations;
pub use rank::{Failure, Rank, Tensor};
pub use report::{CaseReport, Counts, Outcome, Report};
pub use runner::{Options, RawFailure, judge, run, run_cases};
