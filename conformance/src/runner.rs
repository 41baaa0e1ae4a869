//! Runs the table of cases against one backend and judges what came out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longspan::Processes;
use longspan_hal::{Backend, DeviceInfo, Error, Result};

use crate::cases::{Case, Tier, table};
use crate::expectations::{Expectations, Expected, matches};
use crate::rank::Failure;
use crate::report::{CaseReport, Outcome, Report};
use crate::team::Team;

/// What to run, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// How much.
    pub tier: Tier,
    /// Only cases whose names contain this text (with `*`: match it as a pattern).
    pub filter: Option<String>,
    /// The most ranks of a case, 1 to 8.
    pub ranks: u32,
    /// Seed of every random choice.
    pub seed: u64,
    /// Expectations, as TOML text (see [`crate::expectations`]).
    pub expectations: String,
    /// Devices that ranks take in turn; empty means all that the backend lists.
    pub devices: Vec<DeviceInfo>,
    /// The name in the report; empty means the backend's.
    pub name: String,
    /// The processes of this job, if each is one rank; otherwise ranks are threads. Every process runs the suite with the same
    /// options and gets the same report; a case of fewer ranks leaves the last processes idle.
    pub processes: Option<Arc<Processes>>,
    /// Whether several ranks may sit on one device. Without it a case with more ranks than devices finds no machine.
    pub share_devices: bool,
    /// What bounds every wait for a peer or a stream; a case as a whole may take six times as long.
    pub limit: Duration,
    /// The machine, in words, for the report.
    pub machine: String,
    /// The date, in words, for the report.
    pub date: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tier: Tier::Quick,
            filter: None,
            ranks: 8,
            seed: 1,
            expectations: String::new(),
            devices: Vec::new(),
            name: String::new(),
            processes: None,
            share_devices: true,
            limit: Duration::from_secs(20),
            machine: String::new(),
            date: String::new(),
        }
    }
}

/// Runs the suite against `B`. `progress` hears of every case as it ends, with the number of cases done and of all.
///
/// # Errors
/// [`Error::Invalid`] for options that can't be: ranks out of 1..=8 or more than there are processes, unreadable expectations;
/// [`Error::PeerLost`] if a process died. What a backend does wrong is in the report.
pub fn run<B: Backend>(options: &Options, progress: &mut dyn FnMut(&CaseReport, usize, usize)) -> Result<Report> {
    let name = if options.name.is_empty() { B::NAME } else { &options.name };
    run_cases(options, table::<B>(name, options.seed, options.processes.is_some()), progress)
}

/// [`run`] with a table of the caller's: what planted-fault tests and a backend's own cases use.
///
/// # Errors
/// As [`run`].
pub fn run_cases<B: Backend>(
    options: &Options,
    table: Vec<Case<B>>,
    progress: &mut dyn FnMut(&CaseReport, usize, usize),
) -> Result<Report> {
    if !(1..=8).contains(&options.ranks) {
        return Err(Error::invalid("ranks", format!("{} is not in 1..=8", options.ranks)));
    }
    if let Some(p) = options.processes.as_ref().filter(|p| p.size() < options.ranks) {
        let why = format!(
            "{} ranks are asked for, and the job has {} processes: start more, or ask for fewer",
            options.ranks,
            p.size()
        );
        return Err(Error::invalid("ranks", why));
    }
    let expectations = Expectations::parse(&options.expectations)?;
    let names: Vec<&str> = table.iter().map(|c| c.name.as_str()).collect();
    let mut problems: Vec<String> =
        expectations.idle(&names).iter().map(|p| format!("the expectation `{p}` matches no case")).collect();
    let cases: Vec<Case<B>> = table.into_iter().filter(|c| wanted(options, c)).collect();
    if cases.is_empty() {
        problems.push("no case was selected".into());
    }
    let machine = Machine::of::<B>(options);
    let cases = run_all(options, &expectations, &machine, &cases, progress)?;
    let name = if options.name.is_empty() { B::NAME } else { &options.name };
    let required = std::env::var("LONGSPAN_REQUIRE").is_ok_and(|r| r.split(',').any(|n| n.trim() == B::NAME));
    Ok(Report {
        backend: name.into(),
        tier: options.tier.name().into(),
        machine: options.machine.clone(),
        date: options.date.clone(),
        seed: options.seed,
        ranks: options.ranks,
        filter: options.filter.clone(),
        required,
        counts: Report::count(&cases),
        problems,
        cases,
    })
}

fn wanted<B: Backend>(options: &Options, case: &Case<B>) -> bool {
    let named = options.filter.as_ref().is_none_or(|filter| {
        if filter.contains('*') { matches(filter, &case.name) } else { case.name.contains(filter.as_str()) }
    });
    named && case.ranks <= options.ranks && (case.tier == Tier::Quick || options.tier == Tier::Full)
}

/// The devices of this machine, or why there are none.
struct Machine {
    devices: std::result::Result<Vec<DeviceInfo>, String>,
    share: bool,
}

impl Machine {
    fn of<B: Backend>(options: &Options) -> Self {
        let share = options.share_devices;
        if !options.devices.is_empty() {
            return Self { devices: Ok(options.devices.clone()), share };
        }
        let devices = match B::devices() {
            Ok(all) if all.is_empty() => Err("no device".into()),
            Ok(all) => Ok(all),
            Err(error) => Err(error.to_string()),
        };
        Self { devices, share }
    }

    /// Whether so many ranks share devices.
    fn shares(&self, ranks: u32) -> bool {
        self.devices.as_ref().is_ok_and(|devices| devices.len() < ranks as usize)
    }

    /// A device for each of `ranks`.
    fn seats(&self, ranks: u32) -> std::result::Result<Vec<DeviceInfo>, String> {
        let devices = self.devices.as_ref().map_err(Clone::clone)?;
        if !self.share && devices.len() < ranks as usize {
            return Err(format!("{ranks} devices are needed, there are {}", devices.len()));
        }
        Ok(devices.iter().cycle().take(ranks as usize).cloned().collect())
    }
}

/// Runs cases of one number of ranks after each other with the same team; returns reports in the order of `cases`.
fn run_all<B: Backend>(
    options: &Options,
    expectations: &Expectations,
    machine: &Machine,
    cases: &[Case<B>],
    progress: &mut dyn FnMut(&CaseReport, usize, usize),
) -> Result<Vec<CaseReport>> {
    let mut order: Vec<usize> = (0..cases.len()).collect();
    order.sort_by_key(|&i| cases[i].ranks);
    let mut reports: BTreeMap<usize, CaseReport> = BTreeMap::new();
    let mut team: Option<Team<B>> = None;
    for (n, i) in order.into_iter().enumerate() {
        let case = &cases[i];
        let seed = seed_of(options.seed, &case.name);
        let start = Instant::now();
        let (raw, figures) = run_one(options, machine, case, seed, &mut team)?;
        let (outcome, message) = match raw {
            Err(RawFailure::Sharing(why)) if expectations.sharing.is_some() => (Outcome::Refused, why),
            raw => judge(expectations.of(&case.name), raw),
        };
        let report = CaseReport {
            name: case.name.clone(),
            ranks: case.ranks,
            outcome,
            message,
            seed,
            config: case.config.clone(),
            figures,
            millis: start.elapsed().as_secs_f64() * 1e3,
        };
        progress(&report, n + 1, cases.len());
        reports.insert(i, report);
    }
    Ok(reports.into_values().collect())
}

/// What a case did, before expectations; `Err(None)` means that there is no machine for it.
type Raw = std::result::Result<(), RawFailure>;

/// Why a case did not pass, before expectations.
#[derive(Clone, Debug)]
pub enum RawFailure {
    /// It ran and failed, or was refused.
    Case(Failure),
    /// There is no machine for it.
    NoMachine(String),
    /// Several ranks on one device were refused.
    Sharing(String),
}

fn run_one<B: Backend>(
    options: &Options,
    machine: &Machine,
    case: &Case<B>,
    seed: u64,
    team: &mut Option<Team<B>>,
) -> Result<(Raw, BTreeMap<String, f64>)> {
    let none = BTreeMap::new();
    let seats = match machine.seats(case.ranks) {
        Ok(seats) => seats,
        Err(why) => return Ok((Err(RawFailure::NoMachine(why)), none)),
    };
    let mut ready = match team.take() {
        Some(team) if team.size == case.ranks => team,
        other => {
            drop(other);
            let launched = match &options.processes {
                Some(processes) => Team::of_processes(processes, &seats, options.limit)?,
                None => Team::launch(&seats, options.limit),
            };
            match launched {
                Ok(team) => team,
                Err(Failure::Error(e @ Error::Unavailable { .. })) => {
                    return Ok((Err(RawFailure::NoMachine(e.to_string())), none));
                }
                Err(Failure::Refused(why)) if machine.shares(case.ranks) => {
                    return Ok((Err(RawFailure::Sharing(why)), none));
                }
                Err(failure) => return Ok((Err(RawFailure::Case(failure)), none)),
            }
        }
    };
    let (result, figures) = ready.run(&case.body, seed, options.limit * 6)?;
    if result.is_ok() && !case.spends_team {
        *team = Some(ready);
    }
    Ok((result.map_err(RawFailure::Case), figures))
}

/// The outcome of a case that did `raw`, and its message.
pub fn judge(expected: Expected<'_>, raw: Raw) -> (Outcome, String) {
    use RawFailure::{Case, NoMachine, Sharing};
    match (expected, raw) {
        (_, Err(NoMachine(why))) => (Outcome::NoMachine, why),
        (_, Err(Sharing(why))) => {
            (Outcome::Fail, format!("several ranks on a device are refused, and no list says so: {why}"))
        }
        (Expected::Broken(why), Ok(())) => {
            (Outcome::Fail, format!("listed as broken ({why}), but it passes: take it off"))
        }
        (Expected::Never(why), Ok(())) => {
            (Outcome::Fail, format!("listed as never ({why}), but it passes: take it off"))
        }
        (Expected::Pass, Ok(())) => (Outcome::Pass, String::new()),
        (Expected::Never(_), Err(Case(Failure::Refused(why)))) => (Outcome::Refused, why),
        (_, Err(Case(Failure::Refused(why)))) => (Outcome::Fail, format!("refused, and no list says so: {why}")),
        (Expected::Broken(why), Err(Case(failure))) => (Outcome::Broken, format!("{why}: {failure}")),
        (Expected::Never(why), Err(Case(failure))) => {
            (Outcome::Fail, format!("listed as never ({why}), but instead of refusing: {failure}"))
        }
        (Expected::Pass, Err(Case(failure))) => (Outcome::Fail, failure.to_string()),
    }
}

/// The case's own seed: FNV-1a of its name, mixed with the run's seed.
fn seed_of(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    hash ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_is_good() {
        let (no, wrong) = (
            || Err(RawFailure::Case(Failure::Refused("no".into()))),
            || Err(RawFailure::Case(Failure::wrong("wrong"))),
        );
        for (expected, raw, outcome) in [
            (Expected::Pass, Ok(()), Outcome::Pass),
            (Expected::Pass, no(), Outcome::Fail),
            (Expected::Pass, wrong(), Outcome::Fail),
            (Expected::Never("x"), Ok(()), Outcome::Fail),
            (Expected::Never("x"), no(), Outcome::Refused),
            (Expected::Never("x"), wrong(), Outcome::Fail),
            (Expected::Broken("x"), Ok(()), Outcome::Fail),
            (Expected::Broken("x"), no(), Outcome::Fail),
            (Expected::Broken("x"), wrong(), Outcome::Broken),
            (Expected::Broken("x"), Err(RawFailure::NoMachine("gone".into())), Outcome::NoMachine),
        ] {
            assert_eq!(judge(expected, raw.clone()).0, outcome, "{expected:?} {raw:?}");
        }
    }

    #[test]
    fn every_case_has_a_seed_of_its_own() {
        assert_ne!(seed_of(1, "a"), seed_of(1, "b"));
        assert_ne!(seed_of(1, "a"), seed_of(2, "a"));
    }
}
