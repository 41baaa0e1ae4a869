//! The conformance suite over the emulator: `cargo test -p longspan-ascend --test conformance`.
//!
//! The vendor's libraries are the emulator's shared object, which Cargo built beside this test. Variables: `LONGSPAN_TIER=full`
//! for the full tier; `LONGSPAN_FILTER` for some cases; `LONGSPAN_RANKS` for more than the 2 ranks that keep `cargo test` short
//! (CI sets 8); `LONGSPAN_BACKEND=ascend-fused` for the fused forward; `LONGSPAN_NPU=1` for the machine's own libraries. Small
//! tiles (`LONGSPAN_ASCEND_TILE`) make short sequences cross many of them.

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
    let npu = variable("LONGSPAN_NPU").is_some();
    for (name, value) in
        [("LONGSPAN_ASCEND_LIBRARY", emulator.to_string_lossy().as_ref()), ("LONGSPAN_ASCEND_TILE", "64")]
    {
        if !npu && std::env::var_os(name).is_none() {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
    let fused = variable("LONGSPAN_BACKEND").as_deref() == Some("ascend-fused");
    let name = if fused { "ascend-fused" } else { "ascend" };
    let machine = if npu { "NPU" } else { "emulator" }.into();
    let mut options = Options { name: name.into(), machine, ..Options::default() };
    options.filter = variable("LONGSPAN_FILTER");
    options.ranks = variable("LONGSPAN_RANKS").and_then(|r| r.parse().ok()).unwrap_or(2);
    options.share_devices = false;
    if variable("LONGSPAN_TIER").as_deref() == Some("full") {
        options.tier = Tier::Full;
    }
    let mut seen = |case: &longspan_conformance::CaseReport, done: usize, all: usize| {
        let loud = variable("LONGSPAN_LOUD").is_some();
        let expected = fused && case.message.contains("in fused attention");
        if loud || (!expected && matches!(case.outcome, Outcome::Fail | Outcome::NoMachine)) {
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
    if report.backend == "ascend-fused" {
        return fused_verdict(report);
    }
    report.problems.iter().for_each(|p| eprintln!("problem: {p}"));
    if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The fused forward refuses most options, some of them by mask, which no list of case names can say: here a failure is
/// whatever is neither right nor refused with its reason.
fn fused_verdict(report: &Report) -> ExitCode {
    const KNOWN: [(&str, &str); 2] = [
        ("attention/non-finite-values", "of the basic backward and of masked tiles, as for `ascend`"),
        (
            "attention/option-big-logits-f32",
            "dk is 3 % over its bound: lse = max + ln sum loses bits before the backward",
        ),
    ];
    let known = |name: &str| KNOWN.iter().any(|(n, _)| *n == name);
    let failed = |c: &&longspan_conformance::CaseReport| c.outcome == Outcome::Fail;
    let (refused, wrong): (Vec<_>, Vec<_>) =
        report.cases.iter().filter(failed).partition(|c| c.message.contains("in fused attention"));
    let (known, wrong): (Vec<_>, Vec<_>) = wrong.into_iter().partition(|c| known(&c.name));
    let counts = (report.counts.passed, refused.len(), known.len(), wrong.len());
    println!("fused: {} right, {} refused, {} known to be wrong, {} wrong", counts.0, counts.1, counts.2, counts.3);
    wrong.iter().for_each(|c| eprintln!("wrong: {}: {}", c.name, c.message));
    if wrong.is_empty() && report.counts.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The shared object that Cargo built for this test.
fn emulator() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let name = "liblongspan_ascend_emulator.so";
    [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists())
}
