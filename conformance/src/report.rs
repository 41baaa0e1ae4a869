//! What a run found: for people, for machines, and as an exit status.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// What became of a case.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Failed, as the list of known faults says.
    Broken,
    /// Wrong.
    Fail,
    /// Its devices are not here.
    NoMachine,
    /// Right.
    Pass,
    /// Refused, as the list says, and refused rightly.
    Refused,
}

impl Outcome {
    /// The word that reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Broken => "broken",
            Self::Fail => "FAIL",
            Self::NoMachine => "no machine",
            Self::Pass => "pass",
            Self::Refused => "refused",
        }
    }
}

/// One case of a run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub name: String,
    /// Number of ranks.
    pub ranks: u32,
    /// What became of it.
    pub outcome: Outcome,
    /// Why; empty for a pass.
    pub message: String,
    /// Seed of its random numbers.
    pub seed: u64,
    /// Its configuration in words.
    pub config: String,
    /// Measured figures, such as errors as a part of their bound.
    pub figures: BTreeMap<String, f64>,
    /// Wall time in milliseconds.
    pub millis: f64,
}

/// Number of cases by outcome.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// [`Outcome::Pass`].
    pub passed: usize,
    /// [`Outcome::Fail`].
    pub failed: usize,
    /// [`Outcome::Refused`].
    pub refused: usize,
    /// [`Outcome::NoMachine`].
    pub no_machine: usize,
    /// [`Outcome::Broken`].
    pub broken: usize,
}

/// A whole run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// Name of the backend.
    pub backend: String,
    /// `quick` or `full`.
    pub tier: String,
    /// Where it ran, in the caller's words.
    pub machine: String,
    /// When, in the caller's words.
    pub date: String,
    /// The run's seed.
    pub seed: u64,
    /// The most ranks of a case.
    pub ranks: u32,
    /// The filter, if there was one.
    pub filter: Option<String>,
    /// Whether "no machine" is a failure (`LONGSPAN_REQUIRE`).
    pub required: bool,
    /// By outcome.
    pub counts: Counts,
    /// What is wrong with the run itself, such as a pattern that matches nothing.
    pub problems: Vec<String>,
    /// Every case, in the order of the table.
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Counts the outcomes of `cases`.
    pub fn count(cases: &[CaseReport]) -> Counts {
        let of = |outcome| cases.iter().filter(|c| c.outcome == outcome).count();
        Counts {
            passed: of(Outcome::Pass),
            failed: of(Outcome::Fail),
            refused: of(Outcome::Refused),
            no_machine: of(Outcome::NoMachine),
            broken: of(Outcome::Broken),
        }
    }

    /// Whether the run is a success: nothing failed, nothing is wrong with the run, and no machine was missing that was
    /// required.
    pub fn is_ok(&self) -> bool {
        self.counts.failed == 0 && self.problems.is_empty() && !(self.required && self.counts.no_machine > 0)
    }

    /// 0 for a success, otherwise 1.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.is_ok())
    }

    /// The report as JSON.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Invalid`] if a figure can't be written.
    pub fn to_json(&self) -> longspan_hal::Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| longspan_hal::Error::invalid("report", e.to_string()))
    }

    /// What failed and why, a table by group, and a last line like a test runner's.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for case in self.cases.iter().filter(|c| c.outcome == Outcome::Fail) {
            let _ = writeln!(text, "FAIL {} (ranks {}, seed {:#x})", case.name, case.ranks, case.seed);
            if !case.config.is_empty() {
                let _ = writeln!(text, "     {}", case.config);
            }
            let _ = writeln!(text, "     {}", case.message.replace('\n', "\n     "));
        }
        for problem in &self.problems {
            let _ = writeln!(text, "PROBLEM {problem}");
        }
        let _ = writeln!(
            text,
            "{:<12} {:>8} {:>8} {:>8} {:>11} {:>8} {:>9}",
            "", "pass", "fail", "refused", "no machine", "broken", "seconds"
        );
        for (group, cases) in self.groups() {
            let (c, seconds) = (Self::count(&cases), cases.iter().map(|c| c.millis).sum::<f64>() / 1e3);
            let _ = writeln!(
                text,
                "{group:<12} {:>8} {:>8} {:>8} {:>11} {:>8} {seconds:>9.1}",
                c.passed, c.failed, c.refused, c.no_machine, c.broken
            );
        }
        let Counts { passed, failed, refused, no_machine, broken } = self.counts;
        let _ = write!(
            text,
            "{passed} passed, {failed} failed, {refused} refused, {no_machine} no machine, {broken} broken"
        );
        text
    }

    /// Cases by the first part of their names.
    fn groups(&self) -> BTreeMap<&str, Vec<CaseReport>> {
        let mut groups: BTreeMap<&str, Vec<CaseReport>> = BTreeMap::new();
        for case in &self.cases {
            groups.entry(case.name.split('/').next().unwrap_or_default()).or_default().push(case.clone());
        }
        groups
    }
}
