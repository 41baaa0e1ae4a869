//! This program as one of several processes that a launcher started: process 0 prints, every process's errors are seen, and all
//! end with the same exit code.
//!
//! ```text
//! join      the launcher's job, if there is one; process 0 starts the witness, which keeps the job's board
//! together  after each part of the work: if one failed, all end with the errors of all, by rank, which process 0 prints
//! leave     in order; or, if a process is lost, each prints what it knows and ends the job
//! ```
//!
//! The witness is this program again, outside of the job. A launcher kills the survivors of a dead process within
//! milliseconds (MPICH's names no rank), so somebody has to be left to say who died. It ends when every process has.

use std::io::{BufRead, BufReader, Error, Read, Result as IoResult, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use longspan::{Board, Lost, Place, Processes, Reach, Step};
use longspan_peers::{Fields, Reader};

use crate::failure::{Failure, Result};
use crate::{progress, report};

/// Time for every process to say what it knows before the job is ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The processes of the job, if a launcher started several, and whether all of them still answer.
#[derive(Debug)]
pub struct Job {
    /// The processes.
    pub processes: Arc<Processes>,
    broken: AtomicBool,
}

impl Job {
    /// The job that this process was started in; `None` if ranks are threads. Only process 0 prints from now on.
    ///
    /// # Errors
    /// [`Failure::Input`] if the backend can't be had so.
    pub fn join(selector: &str) -> Result<Option<Self>> {
        let Some(processes) = Processes::join(selector, witness)? else { return Ok(None) };
        if processes.rank() > 0 {
            report::silence();
            progress::silence();
        }
        Ok(Some(Self { processes: Arc::new(processes), broken: AtomicBool::new(false) }))
    }

    /// Whether this is process 0.
    pub fn leads(&self) -> bool {
        self.processes.rank() == 0
    }

    /// Collective: `own` if every process did well. `part` names the work.
    ///
    /// # Errors
    /// The failure of all, the same on every process: a refusal that all agree on is said once, otherwise each by its rank.
    pub fn together<T>(&self, part: &'static str, own: Result<T>) -> Result<T> {
        let said = own.as_ref().map_or_else(encode, |_| Vec::new());
        let all = match self.processes.share(part, &said) {
            Ok(all) => all,
            Err(error) => {
                self.broken.store(true, Ordering::Relaxed);
                return Err(own.err().unwrap_or_else(|| error.into()));
            }
        };
        let failures: Vec<(usize, Failure)> =
            all.iter().enumerate().filter_map(|(rank, bytes)| Some((rank, decode(bytes)?))).collect();
        match (own, combine(failures)) {
            (Ok(value), None) => Ok(value),
            (Err(own), None) => Err(own),
            (_, Some(failure)) => Err(failure),
        }
    }

    /// Collective: the bytes of every process, on process 0.
    ///
    /// # Errors
    /// [`Failure::Run`] if a process is lost.
    pub fn gather(&self, what: &'static str, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.processes.gather(what, bytes).map_err(|error| self.lost(&error))
    }

    /// A failure that left the processes without a common end.
    fn lost(&self, error: &longspan::Error) -> Failure {
        self.broken.store(true, Ordering::Relaxed);
        Failure::run(error)
    }

    /// Collective: ends the job, and with `result` this process's part in it. Returns what is left to print.
    ///
    /// Launchers end a job, and drop what its processes still have to say, as soon as one process ends with an error. So
    /// process 0 says it before the others leave, and ends before them.
    pub fn leave(self, result: Result<()>) -> Result<()> {
        let leads = self.leads();
        // Whoever holds a copy is done with it: parts of the work have ended.
        let Some(processes) = Arc::into_inner(self.processes) else { return result };
        if self.broken.into_inner() {
            if let Err(failure) = &result {
                report::complain(format_args!("error: rank {}: {failure}", processes.rank()));
            }
            std::thread::sleep(LAST_WORDS);
            processes.abort(1);
        }
        let said = result.map_err(|failure| {
            if leads {
                failure.print();
            }
            Failure::Said(failure.code())
        });
        processes.leave();
        if said.is_err() && !leads {
            std::thread::sleep(LAST_WORDS);
        }
        said
    }
}

/// Collective: `own`, if all processes of the job did well; without a job, `own`.
///
/// # Errors
/// As [`Job::together`].
pub fn together<T>(job: Option<&Job>, part: &'static str, own: Result<T>) -> Result<T> {
    match job {
        Some(job) => job.together(part, own),
        None => own,
    }
}

/// Checks that this process is the only one, for a command whose ranks are threads: a launcher would run all of it in each.
///
/// # Errors
/// [`Failure::Input`] if a launcher started several, or the backend's ranks are processes.
pub fn alone(command: &str, selector: &str) -> Result<()> {
    let why = if selector.split(':').next() == Some("mpi") {
        "those of the backend `mpi` are processes: take `cpu`"
    } else if Processes::launched()? {
        "a launcher started several processes: start it once"
    } else {
        return Ok(());
    };
    Err(Failure::Input(format!("{command}'s ranks are threads, and {why}")))
}

/// Runs `work` as this process's part of its job, or alone.
///
/// # Errors
/// Those of `work`.
pub fn within(selector: &str, work: impl FnOnce(Option<&Job>) -> Result<()>) -> Result<()> {
    match Job::join(selector)? {
        None => work(None),
        Some(job) => {
            let result = work(Some(&job));
            job.leave(result)
        }
    }
}

/// One failure for all: what every process says alike is said once, unless it is about what happened to a rank.
fn combine(failures: Vec<(usize, Failure)>) -> Option<Failure> {
    let (_, first) = failures.first()?;
    let same = failures.iter().all(|(_, f)| f == first);
    // A verification has one judge; a refusal is the same on every rank that could refuse.
    if matches!(first, Failure::Verification(_)) || (same && matches!(first, Failure::Input(_))) {
        return Some(first.clone());
    }
    let lines: Vec<String> = failures.iter().map(|(rank, f)| format!("rank {rank}: {f}")).collect();
    let text = format!("the run failed\n  {}", lines.join("\n  "));
    let input = failures.iter().all(|(_, f)| matches!(f, Failure::Input(_)));
    Some(if input { Failure::Input(text) } else { Failure::Run(text) })
}

fn encode(failure: &Failure) -> Vec<u8> {
    let (Failure::Run(why) | Failure::Input(why) | Failure::Verification(why)) = failure else { return Vec::new() };
    Fields::default().number(u64::from(failure.code())).bytes(why.as_bytes()).0
}

fn decode(bytes: &[u8]) -> Option<Failure> {
    let mut fields = Reader(bytes);
    let (code, why) = (fields.number().ok()?, fields.text().ok()?);
    Some(match code {
        2 => Failure::Input(why),
        3 => Failure::Verification(why),
        _ => Failure::Run(why),
    })
}

/// Starts the witness; where its board is.
fn witness(reach: Reach) -> IoResult<Place> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("witness");
    if reach == Reach::Network {
        command.arg("--network");
    }
    // Its own process group: a launcher that kills this one's, and a terminal's Ctrl-C, pass it by.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut line = String::new();
    if let Some(stdout) = stdout {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    // Open as long as this process lives: its end tells the witness.
    std::mem::forget(stdin);
    let bytes = unhex(line.trim()).ok_or_else(|| Error::other("the witness process did not start"))?;
    Place::from_bytes(&bytes)
}

/// `longspan witness`: keeps the board of a job until its processes left, and says on stderr which one was lost first.
///
/// # Errors
/// [`Failure::Run`] if no socket can be opened.
pub fn keep_board(network: bool) -> Result<()> {
    std::thread::spawn(|| {
        // Process 0 is gone. What there is to say of it is said before this is over.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::thread::sleep(Duration::from_secs(5));
        std::process::exit(1);
    });
    let reach = if network { Reach::Network } else { Reach::Host };
    let announce = |place: &Place| {
        let mut out = std::io::stdout();
        writeln!(out, "{}", hex(&place.to_bytes())).and_then(|()| out.flush())
    };
    Board::host(reach, announce, |lost| report::complain(format_args!("longspan: {}", obituary(&lost))))
        .map_err(Failure::run)
}

fn obituary(lost: &Lost) -> String {
    let Lost { rank, who, step } = lost;
    let step = if *step == Step::default() { String::new() } else { format!(" after step {step}") };
    format!("lost rank {rank} ({who}){step}: it ended without a word, so the job ends")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    (!text.is_empty()).then(|| digits.map(byte).collect()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_comes_back_from_its_bytes() {
        for failure in [Failure::Input("a".into()), Failure::Run("b".into()), Failure::Verification("c".into())] {
            assert_eq!(decode(&encode(&failure)), Some(failure));
        }
        assert_eq!(decode(&[]), None, "who did well says nothing");
    }

    #[test]
    fn what_all_refuse_is_said_once_and_what_happened_by_rank() {
        let no = || Failure::Input("no".into());
        assert_eq!(combine(vec![]), None);
        assert_eq!(combine(vec![(0, no()), (1, no())]), Some(no()));
        let mixed = combine(vec![(0, Failure::Run("lost rank 1".into())), (1, no())]).expect("failed");
        assert_eq!(mixed, Failure::Run("the run failed\n  rank 0: lost rank 1\n  rank 1: no".into()));
        assert_eq!(mixed.code(), 1);
        let wrong = || Failure::Verification("dq".into());
        assert_eq!(combine(vec![(0, wrong())]), Some(wrong()));
    }

    #[test]
    fn places_travel_as_hex() {
        let bytes = [0, 7, 255, 16];
        assert_eq!(unhex(&hex(&bytes)), Some(bytes.to_vec()));
        assert_eq!([unhex(""), unhex("0g"), unhex("é")], [None, None, None]);
    }

    #[test]
    fn the_obituary_names_rank_process_and_step() {
        let lost = Lost { rank: 2, who: "process 7 on node1".into(), step: Step { phase: "ring forward", index: 1 } };
        let text = obituary(&lost);
        assert!(text.contains("rank 2 (process 7 on node1) after step ring forward 1"), "{text}");
        assert!(!obituary(&Lost { step: Step::default(), ..lost }).contains("after"));
    }
}
