//! `longspan conformance`: one suite judges a backend.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use longspan::{DeviceInfo, Processes, Visit};
use longspan_conformance::{Options, Outcome, Report, Tier, expectations};
use longspan_hal::Backend;

use crate::args::{Conformance, Personality, TierArg};
use crate::failure::{Failure, Result};
use crate::processes::{Job, together};
use crate::report::{complain, say};
use crate::{backends, doctor, output, processes, progress};

/// Runs the suite as the command line says.
///
/// # Errors
/// [`Failure::Input`] for bad usage, or if no case was asked for; [`Failure::Run`] if a case failed.
pub fn conformance(args: &Conformance) -> Result<()> {
    let selector = selector(args)?;
    backends::check(&selector)?;
    backends::choose(&selector, args.exchange, args.kernel)?;
    processes::within(&selector, |job| judge(args, &selector, job))
}

fn judge(args: &Conformance, selector: &str, job: Option<&Job>) -> Result<()> {
    let leads = job.is_none_or(Job::leads);
    let checked = args.json.as_ref().filter(|_| leads).map_or(Ok(()), |path| output::check(path, None));
    together(job, "checks", checked)?;
    let bar = progress::bar("judging");
    let processes = job.map(|job| Arc::clone(&job.processes));
    let report = longspan::select(selector, Suite { args, bar: &bar, name: name(selector), processes });
    bar.finish_and_clear();
    let report = together(job, "suite", report.map_err(Failure::from))?;
    if let Some(filter) = args.filter.as_ref().filter(|_| report.cases.is_empty()) {
        let why = format!("no case of the {} tier with up to {} ranks has it in its name", report.tier, report.ranks);
        return Err(Failure::input(format!("--filter {filter}"), why));
    }
    if let Some(path) = args.json.as_ref().filter(|_| leads) {
        write(path, &report)?;
    }
    say(&format!("{}\n", report.summary()))?;
    if report.is_ok() { Ok(()) } else { Err(Failure::Run(format!("{} does not conform", report.backend))) }
}

struct Suite<'a> {
    args: &'a Conformance,
    bar: &'a ProgressBar,
    /// The backend's name in the report, without devices.
    name: String,
    processes: Option<Arc<Processes>>,
}

impl Visit for Suite<'_> {
    type Output = Report;

    fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> longspan::Result<Report> {
        let leads = self.processes.as_ref().is_none_or(|p| p.rank() == 0);
        let options = Options {
            tier: match self.args.tier {
                TierArg::Full => Tier::Full,
                TierArg::Quick => Tier::Quick,
            },
            filter: self.args.filter.clone(),
            ranks: self.args.ranks.unwrap_or_else(|| self.processes.as_ref().map_or(8, |p| p.size().min(8))),
            seed: self.args.seed,
            expectations: expectations::built_in(&self.name).to_owned(),
            devices,
            name: self.name,
            processes: self.processes,
            limit: Duration::from_secs(self.args.limit),
            machine: doctor::machine_line(),
            date: today(),
            ..Options::default()
        };
        longspan_conformance::run::<B>(&options, &mut |case, done, all| {
            self.bar.set_length(all as u64);
            self.bar.set_position(done as u64);
            if case.outcome == Outcome::Fail && leads {
                self.bar.suspend(|| complain(format_args!("FAIL {}", case.name)));
            }
        })
    }
}

/// The backend's selector with the personality, which only the CPU has; each is a device of its own.
fn selector(args: &Conformance) -> Result<String> {
    let habit = match args.personality {
        Personality::AscendLike => "ascend-like",
        Personality::Checked => "checked",
        Personality::NcclLike => "nccl-like",
        Personality::Plain => return Ok(args.backend.clone()),
        Personality::Push => "push",
    };
    if args.backend != "cpu" {
        let why = format!("--personality {habit} is one of the backend `cpu`, not of `{}`", args.backend);
        return Err(Failure::Input(why));
    }
    Ok(format!("cpu-{habit}"))
}

/// A selector without its devices.
fn name(selector: &str) -> String {
    selector.split(':').next().unwrap_or(selector).to_owned()
}

fn write(path: &Path, report: &Report) -> Result<()> {
    output::write_with(path, |file| std::fs::write(file, report.to_json()? + "\n").map_err(Failure::run))
}

/// Today in UTC, `YYYY-MM-DD` (Howard Hinnant's civil-from-days: years that start in March, in eras of 400).
pub(crate) fn today() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
    date(days)
}

fn date(days_since_1970: u64) -> String {
    let days = days_since_1970 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, wrap) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + wrap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let known = [(0, "1970-01-01"), (11_016, "2000-02-29"), (11_017, "2000-03-01"), (20_453, "2025-12-31")];
        for (days, text) in known {
            assert_eq!(date(days), text);
        }
    }
}
