//! The conformance suite over the emulator.
//!
//! The vendor's libraries are the emulator's shared object, which Cargo built beside this test. Variables: `LONGSPAN_TIER=full`
//! for the full tier; `LONGSPAN_FILTER` for some cases; `LONGSPAN_RANKS` for more than the 2 ranks that keep `cargo test` short;
//! `LONGSPAN_LOUD=1` for a line a case; `LONGSPAN_NPU=1` for the machine's own libraries; `LONGSPAN_JSON` for a file with the
//! report. Small tiles (`LONGSPAN_ASCEND_TILE`) make short sequences cross many of them.

#![allow(dead_code)] // not every test uses all of it

mod lent;

use std::path::PathBuf;
use std::process::ExitCode;

use longspan_conformance::{CaseReport, Options, Outcome, Report, Tier, expectations, run_cases, table};
use longspan_hal::Backend;

/// Runs the suite against `B`.
pub fn main<B: Backend>() -> ExitCode {
    // `cargo test` hands arguments over that name tests; listing has nothing to list.
    if std::env::args().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let variable = |name: &str| std::env::var(name).ok();
    let npu = variable("LONGSPAN_NPU").is_some();
    if !npu && !prepare() {
        eprintln!("the emulator's shared object is not beside this test");
        return ExitCode::FAILURE;
    }
    let machine = if npu { "NPU" } else { "emulator" }.into();
    let mut options = Options { name: B::NAME.into(), machine, share_devices: false, ..Options::default() };
    options.filter = variable("LONGSPAN_FILTER");
    options.ranks = variable("LONGSPAN_RANKS").and_then(|r| r.parse().ok()).unwrap_or(2);
    if variable("LONGSPAN_TIER").as_deref() == Some("full") {
        options.tier = Tier::Full;
    }
    options.expectations = expectations::built_in(B::NAME).to_owned();
    let loud = variable("LONGSPAN_LOUD").is_some();
    let mut seen = |case: &CaseReport, done: usize, all: usize| {
        if loud || matches!(case.outcome, Outcome::Fail | Outcome::NoMachine) {
            eprintln!("{done}/{all} {} {:?} {:.0} ms: {}", case.name, case.outcome, case.millis, case.message);
        }
    };
    let mut cases = table::<B>(B::NAME, options.seed, false);
    cases.extend(lent::cases());
    let report = match run_cases(&options, cases, &mut seen) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(path) = variable("LONGSPAN_JSON")
        && let Err(error) = write(&report, &path)
    {
        eprintln!("{path}: {error}");
        return ExitCode::FAILURE;
    }
    verdict(&report)
}

fn write(report: &Report, path: &str) -> Result<(), Box<dyn std::error::Error>> {
    Ok(std::fs::write(path, report.to_json()?)?)
}

fn verdict(report: &Report) -> ExitCode {
    println!("{} {}: {:?}", report.backend, report.tier, report.counts);
    println!("{} passed, {} failed", report.counts.passed, report.counts.failed + report.problems.len());
    report.problems.iter().for_each(|p| eprintln!("problem: {p}"));
    if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Points the backend to the emulator, unless the caller did; whether there is one.
pub fn prepare() -> bool {
    let given = std::env::var_os("LONGSPAN_ASCEND_LIBRARY").map(PathBuf::from);
    let Some(emulator) = given.or_else(emulator) else { return false };
    for (name, value) in
        [("LONGSPAN_ASCEND_LIBRARY", emulator.to_string_lossy().as_ref()), ("LONGSPAN_ASCEND_TILE", "64")]
    {
        if std::env::var_os(name).is_none() {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
    true
}

/// The shared object that Cargo built for this test.
fn emulator() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let name = "liblongspan_ascend_emulator.so";
    [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists())
}
