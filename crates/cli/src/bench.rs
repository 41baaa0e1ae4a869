//! `longspan bench`: speed, exchange, overlap and memory of attention over ranks, measured.
//!
//! ```text
//! for each length, Ulysses size, ring size, and packing:
//!     the peak of every device that is used
//!     the same work alone: each device with its share of the heads, without exchange
//!     the work on all ranks: repetitions that start with a barrier, then one with a trace
//! table, JSON, page
//! ```

mod cases;
mod chart;
mod heat;
mod measure;
mod page;
mod record;
mod table;

use std::path::Path;

use crate::args::Bench;
use crate::bench::cases::Case;
use crate::bench::measure::Bencher;
use crate::bench::record::{Refused, Report};
use crate::failure::{Failure, Result};
use crate::record::Record;
use crate::report::say;
use crate::{backends, output, processes, progress, trace};

/// Measures as the command line says.
///
/// # Errors
/// [`Failure::Input`] for bad usage, or if nothing could be measured since the backend refused it; [`Failure::Run`].
pub fn bench(args: &Bench) -> Result<()> {
    processes::alone("bench", &args.backend)?;
    backends::check(&args.backend)?;
    backends::choose(&args.backend, args.exchange, args.kernel)?;
    output::check_all(&[&args.json, &args.html, &args.trace], None)?;
    let cases = cases::list(args)?;
    let bar = progress::bar("measuring");
    bar.set_length(cases.len() as u64);
    let measured = measure(args, &cases, || bar.inc(1));
    bar.finish_and_clear();
    let Measured { report, record, failure } = measured?;
    say(&table::text(&report))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::run)?;
        write(path, &(text + "\n"))?;
    }
    if let Some(path) = &args.html {
        write(path, &page::html(&report))?;
    }
    if let (Some(path), Some(record)) = (&args.trace, &record) {
        write(path, &trace::trace(record).to_string())?;
    }
    failure.map_or(Ok(()), Err)
}

/// What came of all cases.
struct Measured {
    report: Report,
    /// What the ranks of the last case did.
    record: Option<Record>,
    /// What to end with if a case failed.
    failure: Option<Failure>,
}

/// Measures `cases`. One that was refused is said in the report, unless it was the only one.
fn measure(args: &Bench, cases: &[Case], done: impl Fn()) -> Result<Measured> {
    let mut bencher = Bencher::new(args, cases)?;
    let (mut rows, mut record, mut refused, mut failed) = (Vec::new(), None, Vec::new(), None);
    for case in cases {
        match bencher.measure(case) {
            Ok((measured, recorded)) => {
                rows.extend(measured);
                record = recorded;
            }
            Err(failure) if cases.len() == 1 => return Err(failure),
            Err(failure) => {
                refused.push(Refused::new(case, failure.to_string()));
                if matches!(failure, Failure::Run(_)) {
                    failed = Some(failure);
                }
            }
        }
        done();
    }
    match refused.first() {
        Some(first) if rows.is_empty() => Err(failed.unwrap_or_else(|| Failure::Input(first.why.clone()))),
        _ => Ok(Measured { report: bencher.report(rows, refused), record, failure: failed }),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    output::write_with(path, |file| std::fs::write(file, text).map_err(Failure::run))?;
    say(&format!("Wrote {}\n", path.display()))
}
