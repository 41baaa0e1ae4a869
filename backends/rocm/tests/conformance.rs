//! The conformance suite over the emulator: `cargo test -p longspan-rocm --test conformance`.
//!
//! The vendor's libraries are the emulator's shared object, which Cargo built beside this test. Every kernel is compiled by the
//! host's C++ compiler when it is first used, about a second each: so `cargo test` runs every [`SAMPLE`]-th case.
//!
//! | variable | what it does |
//! |---|---|
//! | `LONGSPAN_FILTER` | some cases, and all of them that match |
//! | `LONGSPAN_SAMPLE` | every n-th case; 1: all |
//! | `LONGSPAN_RANKS` | up to so many ranks (8) |
//! | `LONGSPAN_TIER=full` | the full tier |
//! | `LONGSPAN_EMULATOR_ARCH` | `gfx942` (the default), `gfx90a` or `gfx1100` |
//! | `LONGSPAN_EXCHANGE=nccl` | messages by the emulated RCCL, a device a rank |
//! | `LONGSPAN_GPU=1` | the machine's own libraries and GPUs |
//! | `LONGSPAN_JSON` | path of a report |

#[path = "../../gpu/tests/lent/mod.rs"]
mod lent;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use longspan_conformance::{Case, CaseReport, Options, Outcome, Tier, cases, expectations, run_cases};
use longspan_rocm::{Amd, Rocm};

/// `cargo test` runs every so many-th case of the quick tier.
const SAMPLE: usize = 9;

fn main() -> ExitCode {
    // `cargo test` hands arguments over that name tests; listing has nothing to list.
    if std::env::args().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let variable = |name: &str| std::env::var(name).ok();
    let gpu = variable("LONGSPAN_GPU").is_some();
    if !gpu {
        let Some(emulator) = emulator() else {
            eprintln!("the emulator's shared object is not beside this test");
            return ExitCode::FAILURE;
        };
        for library in ["LONGSPAN_LIBAMDHIP64", "LONGSPAN_LIBHIPRTC", "LONGSPAN_LIBRCCL"] {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(library, &emulator) };
        }
        if std::env::var_os("LONGSPAN_CACHE").is_none() {
            // Machine code for this machine's CPU: not into the user's cache.
            // SAFETY: as above.
            unsafe { std::env::set_var("LONGSPAN_CACHE", emulator.with_file_name("emulated-kernels")) };
        }
        if std::env::var_os("LONGSPAN_LOUD").is_none() {
            // SAFETY: as above.
            unsafe { std::env::set_var("LONGSPAN_QUIET", "1") };
        }
    }
    let number = |name: &str| variable(name).and_then(|n| n.parse::<usize>().ok());
    let mut options = Options { name: "rocm".into(), filter: variable("LONGSPAN_FILTER"), ..Options::default() };
    options.machine = if gpu { "GPU" } else { "emulator" }.into();
    options.ranks = number("LONGSPAN_RANKS").map_or(8, |n| n as u32);
    options.share_devices = variable("LONGSPAN_EXCHANGE").as_deref() != Some("nccl");
    // Kernels are compiled while peers wait.
    options.limit = Duration::from_secs(120);
    if variable("LONGSPAN_TIER").as_deref() == Some("full") {
        options.tier = Tier::Full;
    }
    let step = number("LONGSPAN_SAMPLE").unwrap_or(if options.filter.is_some() || gpu { 1 } else { SAMPLE }).max(1);
    let known = expectations::built_in("rocm");
    let whole = step == 1 && options.filter.is_none();
    if whole {
        options.expectations = known.to_owned();
    }
    // A list of known faults is for the whole table; of a part, what is on the list by name is left out.
    let wanted = |c: &Case<Rocm>| {
        (options.tier == Tier::Full || c.tier == Tier::Quick) && (whole || !known.contains(&format!("{:?}", c.name)))
    };
    let table = cases::table::<Rocm>("rocm", options.seed, false).into_iter().chain(lent::cases::<Amd>());
    let table = table.filter(wanted).step_by(step).collect();
    let loud = variable("LONGSPAN_LOUD").is_some();
    let mut seen = |case: &CaseReport, done: usize, all: usize| {
        if loud || matches!(case.outcome, Outcome::Fail | Outcome::NoMachine) {
            eprintln!("{done}/{all} {} {:?} {:.0} ms: {}", case.name, case.outcome, case.millis, case.message);
        }
    };
    let report = match run_cases::<Rocm>(&options, table, &mut seen) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if let (Some(path), Ok(json)) = (variable("LONGSPAN_JSON"), report.to_json())
        && let Err(error) = std::fs::write(path, json)
    {
        eprintln!("{error}");
    }
    println!("{} {}: {:?}", report.backend, report.tier, report.counts);
    report.problems.iter().for_each(|p| eprintln!("problem: {p}"));
    if report.is_ok() && report.counts.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The shared object that Cargo built for this test.
fn emulator() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let name = "liblongspan_rocm_emulator.so";
    [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists())
}
