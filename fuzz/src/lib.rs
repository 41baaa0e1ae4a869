//! The parts of the program that read what a user gives. The program is no library, so its own files are compiled here.
#![allow(dead_code, missing_docs)]

#[path = "../../crates/cli/src/args.rs"]
pub mod args;
#[path = "../../crates/cli/src/failure.rs"]
pub mod failure;
#[path = "../../crates/cli/src/fault.rs"]
pub mod fault;
#[path = "../../crates/cli/src/file.rs"]
pub mod file;
#[path = "../../crates/cli/src/job.rs"]
pub mod job;
#[path = "../../crates/cli/src/picture/mod.rs"]
pub mod picture;
#[path = "../../crates/cli/src/record.rs"]
pub mod record;
#[path = "../../crates/cli/src/report.rs"]
pub mod report;
#[path = "../../crates/cli/src/synthetic.rs"]
pub mod synthetic;
