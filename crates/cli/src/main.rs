//! The `longspan` program: runs, verifies and explains exact attention over sequences cut among ranks.
//!
//! Tables go to stdout, progress and errors to stderr. Exit codes: 0 ok, 1 failed run, 2 bad usage or input,
//! 3 verification failed.
#![deny(unsafe_code)] // not forbid: the slicing macro of ndarray allows it for itself

mod args;
mod backends;
mod bench;
mod cache;
mod conformance;
mod doctor;
mod engine;
mod failure;
mod fault;
mod file;
mod job;
mod layout;
mod output;
mod parcel;
mod picture;
mod processes;
mod progress;
mod record;
mod report;
mod results;
mod run;
mod sample;
mod synthetic;
mod trace;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        Command::Bench(args) => bench::bench(&args),
        Command::Cache(args) => cache::cache(&args),
        Command::Conformance(args) => conformance::conformance(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Layout(args) => layout::layout(&args),
        Command::Run(args) => run::run(&args),
        Command::Witness { network } => processes::keep_board(network),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print();
            failure.exit_code()
        }
    }
}
