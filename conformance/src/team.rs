//! A team: rank threads that joined one group and run case after case together.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use longspan_hal::{Backend, Collective, Device as _, DeviceInfo, Error, GroupId, Priority};
use longspan_seqpar::Member;

use crate::cases::Body;
use crate::gather::{Gather, SharedMemory};
use crate::rank::{Failure, Rank, Steps};

/// How long ranks may take to stop after their group was given up.
const GRACE: Duration = Duration::from_secs(10);

/// What a rank says when a case is over.
struct Done {
    rank: u32,
    result: Result<(), Failure>,
    figures: BTreeMap<String, f64>,
}

struct Job<B: Backend> {
    body: Body<B>,
    seed: u64,
}

type Groups<B> = Arc<Mutex<Vec<Arc<Member<B>>>>>;

/// Rank threads of one group.
pub(crate) struct Team<B: Backend> {
    pub(crate) size: u32,
    limit: Duration,
    jobs: Vec<Sender<Job<B>>>,
    done: Receiver<Done>,
    steps: Arc<Steps>,
    gather: Arc<dyn Gather>,
    groups: Groups<B>,
    threads: Vec<JoinHandle<()>>,
}

/// What each rank of a new team gets.
struct Seat {
    info: DeviceInfo,
    id: GroupId,
    rank: u32,
    size: u32,
    limit: Duration,
    gather: Arc<dyn Gather>,
    steps: Arc<Steps>,
}

impl<B: Backend> Team<B> {
    /// Starts a thread for each of `infos`, which opens its device and joins the group.
    pub(crate) fn launch(infos: &[DeviceInfo], limit: Duration) -> Result<Self, Failure> {
        let (size, id) = (infos.len() as u32, B::group_id()?);
        let (gather, steps) = (Arc::new(SharedMemory::new(size)), Arc::new(Steps::new(size)));
        let (done_in, done) = channel();
        let mut team = Self {
            size,
            limit,
            jobs: Vec::new(),
            done,
            steps: steps.clone(),
            gather: gather.clone(),
            groups: Arc::default(),
            threads: Vec::new(),
        };
        for (rank, info) in (0..size).zip(infos) {
            let (job_in, jobs) = channel();
            let (gather, steps) = (gather.clone(), steps.clone());
            let seat = Seat { info: info.clone(), id: id.clone(), rank, size, limit, gather, steps };
            let (groups, done_in) = (team.groups.clone(), done_in.clone());
            let thread = std::thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn(move || serve::<B>(seat, &groups, &jobs, &done_in))
                .map_err(|e| Failure::wrong(format!("can't start a thread for rank {rank}: {e}")))?;
            team.jobs.push(job_in);
            team.threads.push(thread);
        }
        drop(done_in);
        team.collect(limit * 2).0.map(|()| team)
    }

    /// Runs a case on every rank and waits for all, for at most `patience`.
    pub(crate) fn run(
        &mut self,
        body: &Body<B>,
        seed: u64,
        patience: Duration,
    ) -> (Result<(), Failure>, BTreeMap<String, f64>) {
        for rank in 0..self.size {
            self.steps.set(rank, "start".into());
        }
        for job in &self.jobs {
            // A rank that is gone shows when its answer is missing.
            let _ = job.send(Job { body: body.clone(), seed });
        }
        self.collect(patience)
    }

    /// Waits until every rank is done; the watchdog.
    fn collect(&self, patience: Duration) -> (Result<(), Failure>, BTreeMap<String, f64>) {
        let mut results: Vec<Option<Result<(), Failure>>> = (0..self.size).map(|_| None).collect();
        let mut figures: BTreeMap<String, f64> = BTreeMap::new();
        let until = Instant::now() + patience;
        while results.iter().any(Option::is_none) {
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(done) => {
                    results[done.rank as usize] = Some(done.result);
                    for (name, value) in done.figures {
                        let entry = figures.entry(name).or_insert(value);
                        *entry = entry.max(value);
                    }
                }
                Err(RecvTimeoutError::Timeout) => return (Err(self.hung(&results, patience)), figures),
                Err(RecvTimeoutError::Disconnected) => {
                    return (Err(Failure::wrong("a rank's thread ended without an answer")), figures);
                }
            }
        }
        (verdict(&results.into_iter().flatten().collect::<Vec<_>>()), figures)
    }

    /// Gives the group up and says who hung where.
    fn hung(&self, results: &[Option<Result<(), Failure>>], patience: Duration) -> Failure {
        let at = |rank: usize| format!("rank {rank} (at: {})", self.steps.of(rank as u32));
        let hung: Vec<String> = (0..results.len()).filter(|&r| results[r].is_none()).map(at).collect();
        let mut why = format!("hung for {patience:?}: {}", hung.join(", "));
        for (rank, result) in results.iter().enumerate() {
            if let Some(Err(failure)) = result {
                why.push_str(&format!("\nrank {rank} failed: {failure}"));
            }
        }
        self.abort();
        Failure::Wrong(why)
    }

    fn abort(&self) {
        self.gather.give_up(0);
        for member in self.groups.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            member.collective.abort();
        }
    }
}

impl<B: Backend> Drop for Team<B> {
    /// Ends the threads. One that hangs for good is left behind rather than waited for.
    fn drop(&mut self) {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.jobs.clear();
        let until = Instant::now() + GRACE.min(self.limit);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

/// A rank's thread: opens, joins, then runs what comes.
fn serve<B: Backend>(seat: Seat, groups: &Groups<B>, jobs: &Receiver<Job<B>>, done: &Sender<Done>) {
    let rank = seat.rank;
    let opened = guarded(|| open::<B>(seat, groups));
    let (result, opened) = match opened {
        Ok(opened) => (Ok(()), Some(opened)),
        Err(failure) => (Err(failure), None),
    };
    let _ = done.send(Done { rank, result, figures: BTreeMap::new() });
    let Some(mut state) = opened else { return };
    for job in jobs {
        state.seed = job.seed;
        state.figures.clear();
        let result = guarded(|| {
            (job.body)(&mut state)?;
            state.synchronize()?;
            Ok(())
        });
        if matches!(&result, Err(failure) if !matches!(failure, Failure::Refused(_))) {
            state.gather.give_up(rank);
            state.collective.abort();
        }
        drop(job);
        let _ = done.send(Done { rank, result, figures: std::mem::take(&mut state.figures) });
    }
}

fn open<B: Backend>(seat: Seat, groups: &Groups<B>) -> Result<Rank<B>, Failure> {
    let Seat { info, id, rank, size, limit, gather, steps } = seat;
    steps.set(rank, "open and join".into());
    let member = Arc::new(Member::<B>::join(&info, &id, rank, size, limit)?);
    groups.lock().unwrap_or_else(PoisonError::into_inner).push(member.clone());
    let stream = member.device.stream(Priority::Normal)?;
    Ok(Rank { member, stream, limit, gather, steps, seed: 0, figures: BTreeMap::new() })
}

/// Runs `f`; a panic is a failure.
fn guarded<T>(f: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(Failure::wrong(format!("panicked: {}", text(&*panic)))))
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// The AND over ranks: all passed, or all refused; otherwise the failures, causes before consequences.
fn verdict(results: &[Result<(), Failure>]) -> Result<(), Failure> {
    let failed = |r: &Result<(), Failure>| r.as_ref().err().cloned();
    let mut failures: Vec<(usize, Failure)> =
        results.iter().enumerate().filter_map(|(i, r)| Some((i, failed(r)?))).collect();
    if failures.is_empty() {
        return Ok(());
    }
    if let [(_, Failure::Refused(why)), ..] = &failures[..]
        && failures.len() == results.len()
        && failures.iter().all(|(_, f)| matches!(f, Failure::Refused(_)))
    {
        return Err(Failure::Refused(why.clone()));
    }
    if let [(0, Failure::Error(error))] = &failures[..]
        && results.len() == 1
    {
        return Err(Failure::Error(error.clone()));
    }
    failures.sort_by_key(|(_, f)| f.is_consequence());
    let lines: Vec<String> = failures.iter().map(|(rank, f)| format!("rank {rank}: {f}")).collect();
    // Keep the kind of an unavailable machine.
    if let Some((_, Failure::Error(e @ Error::Unavailable { .. }))) = failures.first() {
        return Err(Failure::Error(e.clone()));
    }
    Err(Failure::Wrong(lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_rank_is_enough_and_causes_come_first() {
        assert!(verdict(&[Ok(()), Ok(())]).is_ok());
        let both = verdict(&[Err(Failure::lost(1)), Err(Failure::wrong("cause"))]).expect_err("failed").to_string();
        assert_eq!(both, "rank 1: cause\nrank 0: rank 1 failed first");
    }

    #[test]
    fn a_refusal_counts_only_if_every_rank_refuses() {
        let no = || Err(Failure::Refused("no".into()));
        assert!(matches!(verdict(&[no(), no()]), Err(Failure::Refused(_))));
        assert!(matches!(verdict(&[no(), Ok(())]), Err(Failure::Wrong(_))));
    }

    #[test]
    fn a_panic_is_a_failure() {
        let failure = guarded::<()>(|| panic!("at {}", 3)).expect_err("it panicked");
        assert_eq!(failure.to_string(), "panicked: at 3");
    }
}
