//! The conformance suite over the emulator: `cargo test -p longspan-ascend --test conformance`.
//!
//! The vendor's libraries are the emulator's shared object, which Cargo built beside this test. `LONGSPAN_TIER=full` runs the
//! full tier, `LONGSPAN_FILTER` only some cases, `LONGSPAN_RANKS` fewer ranks, `LONGSPAN_BACKEND=ascend-fused` the fused
//! forward. Small tiles (`LONGSPAN_ASCEND_TILE`) make short sequences cross many of them.

use std::path::PathBuf;
use std::process::ExitCode;

use longspan_ascend::{Ascend, AscendFused};
use longspan_conformance::{Options, Outcome, Report, Tier, expectations, run};

fn main() -> ExitCode {
    // `cargo test` hands arguments over that name tests; listing has nothing to list.
    if std::env::args().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let given = std::env::var_os("LONGSPAN_ASCEND_LIBRARY").map(PathBuf::from);
    let Some(emulator) = given.or_else(emulator) else {
        eprintln!("the emulator's shared object is not beside this test");
        return ExitCode::FAILURE;
    };
    let variable = |name: &str| std::env::var(name).ok();
    for (name, value) in
        [("LONGSPAN_ASCEND_LIBRARY", emulator.to_string_lossy().as_ref()), ("LONGSPAN_ASCEND_TILE", "64")]
    {
        if std::env::var_os(name).is_none() {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
    let fused = variable("LONGSPAN_BACKEND").as_deref() == Some("ascend-fused");
    let name = if fused { "ascend-fused" } else { "ascend" };
    let machine = "emulator".into();
    let mut options = Options { name: name.into(), machine, ..Options::default() };
    options.filter = variable("LONGSPAN_FILTER");
    options.ranks = variable("LONGSPAN_RANKS").and_then(|r| r.parse().ok()).unwrap_or(8);
    options.share_devices = false;
    if variable("LONGSPAN_TIER").as_deref() == Some("full") {
        options.tier = Tier::Full;
    }
    let mut seen = |case: &longspan_conformance::CaseReport, done: usize, all: usize| {
        let loud = variable("LONGSPAN_LOUD").is_some();
        if loud || matches!(case.outcome, Outcome::Fail | Outcome::NoMachine) {
            eprintln!("{done}/{all} {} {:?} {:.0} ms: {}", case.name, case.outcome, case.millis, case.message);
        }
    };
    options.expectations = expectations::built_in(name).to_owned();
    let report = if fused { run::<AscendFused>(&options, &mut seen) } else { run::<Ascend>(&options, &mut seen) };
    match report {
        Ok(report) => verdict(&report),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn verdict(report: &Report) -> ExitCode {
    println!("{} {}: {:?}", report.backend, report.tier, report.counts);
    report.problems.iter().for_each(|p| eprintln!("problem: {p}"));
    if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The shared object that Cargo built for this test.
fn emulator() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let name = "liblongspan_ascend_emulator.so";
    [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists())
}
