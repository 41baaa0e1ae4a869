//! The conformance suite for `cuda` alone, and its own cases, in parts: what `ci/gpu.sh` runs on a machine with GPUs.
//!
//! ```text
//! conformance PART/PARTS REPORT.json [FILTER [RANKS]]
//! ```
//!
//! Cases are dealt to the parts in turn, so that every core of the machine can compile kernels. Failures go to standard output.
//! Exit status 0: all passed or were refused as expected.

mod foreign;
#[path = "../../../gpu/tests/lent/mod.rs"]
mod lent;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use longspan_conformance::{Options, Outcome, cases, expectations, run_cases};
use longspan_cuda::{Cuda, Nvidia};
use longspan_hal::Backend;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [part, path, rest @ ..] = args.as_slice() else {
        return Err("usage: conformance PART/PARTS REPORT.json [FILTER [RANKS]]".into());
    };
    let (part, parts) = part.split_once('/').ok_or("the part is not such as 3/16")?;
    let (part, parts): (usize, usize) = (part.parse()?, part_count(parts)?);
    let ranks = rest.get(1).map_or(Ok(8), |ranks| ranks.parse())?;
    let options = Options {
        ranks,
        filter: rest.first().cloned(),
        // Kernels are compiled while peers wait.
        limit: Duration::from_secs(60),
        expectations: if parts == 1 { expectations::built_in(Cuda::NAME).to_owned() } else { String::new() },
        ..Options::default()
    };
    let mut table = cases::table::<Cuda>(Cuda::NAME, options.seed, false);
    table.extend(foreign::cases());
    table.extend(lent::cases::<Nvidia>());
    let mine = table.into_iter().enumerate().filter(|(i, _)| i % parts == part).map(|(_, case)| case).collect();
    let report = run_cases::<Cuda>(&options, mine, &mut |case, _, _| {
        if case.outcome == Outcome::Fail {
            println!("FAIL {}: {}", case.name, case.message);
        }
    })?;
    std::fs::write(path, report.to_json()?)?;
    let counts = report.counts;
    println!(
        "part {part}/{parts}: {} passed, {} failed, {} without a machine",
        counts.passed, counts.failed, counts.no_machine
    );
    Ok(if counts.failed + counts.no_machine == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn part_count(text: &str) -> Result<usize, Box<dyn Error>> {
    match text.parse()? {
        0 => Err("there is at least one part".into()),
        n => Ok(n),
    }
}
