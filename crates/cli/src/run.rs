//! `longspan run`: check, run, verify, write, report.
//!
//! Nothing is written before every check that needs no run has passed, and the output is written only if the verification,
//! where asked for, holds.

use std::time::{Duration, Instant};

use crate::args::{MOST_THREADS, Run};
use crate::failure::Result;
use crate::job::{self, Job};
use crate::picture::timeline;
use crate::processes::together;
use crate::record::Record;
use crate::report::say;
use crate::results::{Recorded, Results};
use crate::verify::{self, Verdict};
use crate::{backends, engine, output, processes, progress, report, trace};

/// Runs attention as the command line says.
///
/// # Errors
/// [`crate::failure::Failure::Input`] for bad input, with nothing started or written; [`crate::failure::Failure::Run`];
/// [`crate::failure::Failure::Verification`].
pub fn run(args: &Run) -> Result<()> {
    backends::check(&args.backend)?;
    backends::choose(&args.backend, args.exchange, args.kernel)?;
    processes::within(&args.backend, |job| run_in(args, job))
}

fn run_in(args: &Run, processes: Option<&processes::Job>) -> Result<()> {
    let job = together(processes, "checks", check_all(args, processes))?;
    say(&title(args, &job))?;
    let spinner = progress::spinner("running");
    let start = Instant::now();
    let limit = Duration::from_secs(args.limit);
    let results = match processes {
        Some(processes) => engine::run_part(&job, processes, &args.backend, limit, args.fault, recorded(args)),
        None => engine::run(&job, &args.backend, limit, args.fault, recorded(args)).map(Some),
    };
    spinner.finish_and_clear();
    let took = start.elapsed();
    let told = match results? {
        Some(results) => tell(args, &job, results, took),
        // Process 0 has them all.
        None => Ok(()),
    };
    together(processes, "verdict", told)
}

/// Whether times of the ranks are wanted.
fn recorded(args: &Run) -> bool {
    args.trace.is_some() || args.timeline.is_some()
}

/// Every check that needs no run.
fn check_all(args: &Run, processes: Option<&processes::Job>) -> Result<Job> {
    if processes.is_none_or(processes::Job::leads) {
        output::check_all(&[&args.output, &args.trace, &args.timeline], args.source.input.as_deref())?;
    }
    longspan::devices(&args.backend)?;
    let job = Job::new(args)?;
    match processes {
        Some(processes) => processes.processes.check(job.mesh())?,
        None => job::at_most(MOST_THREADS, job.mesh())?,
    }
    if args.verify {
        verify::check_inputs(&job)?;
    }
    Ok(job)
}

/// Prints, verifies and writes the results.
fn tell(args: &Run, job: &Job, results: Results, took: Duration) -> Result<()> {
    say(&ranks(&results, took))?;
    if args.verify {
        check(job, &results)?;
    }
    if let Some(path) = &args.output {
        let encoded = results.encode();
        let entries = results.entries(&encoded);
        output::write(path, &entries)?;
        let names: Vec<&str> = entries.iter().map(|entry| entry.name).collect();
        say(&format!("\nWrote {} to {}\n", names.join(", "), path.display()))?;
    }
    pictures(args, job, results)
}

/// Writes the trace and the timeline, where they are wanted.
fn pictures(args: &Run, job: &Job, results: Results) -> Result<()> {
    let Some(Recorded { reports, traffic }) = results.recorded else { return Ok(()) };
    let record = Record::new(summary(args, job), *job.mesh(), reports, traffic);
    if let Some(path) = &args.trace {
        output::write_text(path, &trace::trace(&record).to_string())?;
        say(&format!("\nWrote what every rank did to {}: open it in https://ui.perfetto.dev\n", path.display()))?;
    }
    if let Some(path) = &args.timeline {
        output::write_text(path, &timeline::timeline(&record))?;
        say(&format!("\nDrew what every rank did to {}\n", path.display()))?;
    }
    Ok(())
}

/// The run in one line.
fn summary(args: &Run, job: &Job) -> String {
    let [batch, seq, heads, head_dim] = job.q.extent();
    let documents = job.mask.documents().map_or(String::new(), |d| format!(" within {} documents", d.len()));
    let mut parts = vec![
        format!("batch {batch}, seq {seq}, heads {heads}:{}, head dim {head_dim}, {}", job.kv_heads(), job.dtype()),
        format!("{}{documents}", job.mask),
        format!("{}, {}", job.mesh(), args.cut.layout.name()),
        format!("backend {}", args.backend),
    ];
    parts.extend(options(job));
    parts.join("; ")
}

fn check(job: &Job, results: &Results) -> Result<()> {
    let bar = progress::bar("verifying");
    let verdicts = verify::verify(job, results, &|done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let verdicts = verdicts?;
    say(&verification(job, &verdicts))?;
    verify::judge(&verdicts)
}

fn title(args: &Run, job: &Job) -> String {
    let [batch, seq, heads, head_dim] = job.q.extent();
    let [_, k_seq, kv_heads, head_dim_v] = job.v.extent();
    let source = match &args.source.input {
        Some(path) => path.display().to_string(),
        None => format!("normal numbers of seed {}", args.seed),
    };
    let mut table = report::Table::new(&["", ""]);
    let mut row = |what: &str, value: String| table.row([what.to_owned(), value]);
    row("input", source);
    let keys = if k_seq == seq { String::new() } else { format!(", keys {k_seq}") };
    row(
        "shape",
        format!(
            "batch {batch}, seq {seq}{keys}, heads {heads}, kv heads {kv_heads}, head dim {head_dim} / {head_dim_v}, {}",
            job.dtype()
        ),
    );
    let documents = job.mask.documents().map_or(String::new(), |d| format!(" within {} documents", d.len()));
    row("mask", format!("{}{documents}", job.mask));
    row(
        "ranks",
        format!("{} = {}, {} layout, backend {}", job.mesh().size(), job.mesh(), args.cut.layout.name(), args.backend),
    );
    let options = options(job);
    if !options.is_empty() {
        row("options", options.join(", "));
    }
    row("passes", if job.dout.is_some() { "forward and backward" } else { "forward" }.to_owned());
    table.body()
}

fn options(job: &Job) -> Vec<String> {
    let mut options = Vec::new();
    let mut add = |on: bool, text: String| {
        if on {
            options.push(text);
        }
    };
    add(job.scale != 1.0 / (job.q.extent()[3] as f32).sqrt(), format!("scale {}", job.scale));
    job.softcap.into_iter().for_each(|c| add(true, format!("softcap {c}")));
    add(job.alibi_slopes.is_some(), "alibi".into());
    add(job.sinks.is_some(), "sinks".into());
    job.dropout.into_iter().for_each(|p| add(true, format!("dropout {p} with seed {}", job.seed)));
    add(job.deterministic, "deterministic".into());
    let groups = job.head_groups();
    add(groups > 1, format!("{groups} head groups"));
    options
}

fn ranks(results: &Results, wall: Duration) -> String {
    let mut table = report::Table::new(&[
        "rank",
        "tokens",
        "compute",
        "exchange",
        "sent",
        "by the table",
        "workspace",
        "predicted",
    ]);
    for (rank, figures) in results.ranks.iter().enumerate() {
        table.row([
            rank.to_string(),
            figures.rows.to_string(),
            report::time(figures.compute),
            report::time(figures.exchange),
            report::bytes(figures.sent),
            equal(figures.sent, figures.table),
            report::bytes(figures.peak),
            equal(figures.peak, figures.predicted),
        ]);
    }
    format!("\nRanks (all took {})\n{}", report::time(wall), table.render())
}

/// A predicted number of bytes, said as `equal` where it is.
fn equal(found: u64, predicted: u64) -> String {
    if found == predicted {
        "equal".into()
    } else {
        format!("{} B ({:+})", predicted, found as i128 - i128::from(predicted))
    }
}

fn verification(job: &Job, verdicts: &[Verdict]) -> String {
    let mut table = report::Table::new(&["tensor", "max error", "allowed", "rms error", "allowed", "verdict"]);
    for v in verdicts {
        let verdict = match (v.holds(), v.wrong_kind) {
            (true, _) => "ok".to_owned(),
            (false, 0) => "OUTSIDE".to_owned(),
            (false, n) => format!("{n} NOT FINITE ALIKE"),
        };
        let number = |x: f64| format!("{x:.2e}");
        table.row([
            v.name.to_owned(),
            number(v.got.max),
            number(v.bound.max),
            number(v.got.rms),
            number(v.bound.rms),
            verdict,
        ]);
    }
    let seq = job.seq().max(job.k.extent()[1]);
    let rows = if seq <= verify::ALL_ROWS {
        "every row".to_owned()
    } else {
        format!("a sample: {0} query rows and {0} keys of {seq}, every head", verify::SAMPLE)
    };
    format!("\nVerified against attention in f64 ({rows})\n{}", table.render())
}
