//! A team: ranks that joined one group and run case after case together. Each is a thread, of this process or of a process
//! of its own.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use longspan::{Board, Place, Processes};
use longspan_hal::{Backend, Collective, Device as _, DeviceInfo, Error, GroupId, Priority};
use longspan_peers::{Fields, Reader};
use longspan_seqpar::Member;

use crate::cases::Body;
use crate::gather::{Gather, OnBoard, SharedMemory};
use crate::rank::{Failure, Rank, Steps};

/// How long ranks may take to stop after their group was given up.
const GRACE: Duration = Duration::from_secs(10);

/// What a rank says when a case is over.
struct Done {
    rank: u32,
    result: Result<(), Failure>,
    figures: Figures,
}

struct Job<B: Backend> {
    body: Body<B>,
    seed: u64,
}

type Groups<B> = Arc<Mutex<Vec<Arc<Member<B>>>>>;

/// What the ranks of a case did, in rank order, and the figures of all.
type Outcome = (Vec<Result<(), Failure>>, Figures);

/// Figures of a rank by name.
type Figures = BTreeMap<String, f64>;

/// What a case did in the end, and the figures of all ranks.
type Verdict = (Result<(), Failure>, Figures);

/// Rank threads of one group: all of them, or that of this process, if the case has so many ranks.
pub(crate) struct Team<B: Backend> {
    pub(crate) size: u32,
    limit: Duration,
    /// The first rank of this process.
    first: u32,
    processes: Option<Arc<Processes>>,
    jobs: Vec<Sender<Job<B>>>,
    done: Receiver<Done>,
    steps: Arc<Steps>,
    gather: Option<Arc<dyn Gather>>,
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
    processes: bool,
    gather: Arc<dyn Gather>,
    steps: Arc<Steps>,
}

impl<B: Backend> Team<B> {
    /// Starts a thread for each of `infos`, which opens its device and joins the group.
    pub(crate) fn launch(infos: &[DeviceInfo], limit: Duration) -> Result<Self, Failure> {
        let (size, id) = (infos.len() as u32, B::group_id()?);
        let gather: Arc<dyn Gather> = Arc::new(SharedMemory::new(size));
        let (mut team, done_in) = Self::new(size, limit);
        team.gather = Some(gather.clone());
        for (rank, info) in (0..size).zip(infos) {
            let (gather, steps) = (gather.clone(), team.steps.clone());
            let seat = Seat { info: info.clone(), id: id.clone(), rank, size, limit, processes: false, gather, steps };
            team.start(seat, done_in.clone())?;
        }
        drop(done_in);
        verdict(&team.wait(limit * 2).0).map(|()| team)
    }

    /// Collective over all processes: as many of them as `infos` join a group, each as the rank of its number.
    ///
    /// # Errors
    /// [`Error::PeerLost`] if a process died. What else goes wrong is a failure of the team, the same on every process.
    pub(crate) fn of_processes(
        processes: &Arc<Processes>,
        infos: &[DeviceInfo],
        limit: Duration,
    ) -> Result<Result<Self, Failure>, Error> {
        let (me, size) = (processes.rank(), infos.len() as u32);
        let made = if me == 0 { offer_of(Self::invite(processes)) } else { Fields::default() };
        let said = processes.share("team", &made.0)?;
        let (place, id) = match invitation(&said[0]) {
            Ok(both) => both,
            Err(failure) => return Ok(Err(failure)),
        };
        let (mut team, done_in) = Self::new(size, limit);
        team.processes = Some(processes.clone());
        team.first = me;
        if me < size {
            let seat = |gather: Arc<dyn Gather>, info: &DeviceInfo| {
                let (id, steps) = (id.clone(), team.steps.clone());
                Seat { info: info.clone(), id, rank: me, size, limit, processes: true, gather, steps }
            };
            let joined = OnBoard::join(&place, me, size, limit).and_then(|gather| {
                let gather: Arc<dyn Gather> = Arc::new(gather);
                Ok((gather.clone(), seat(gather, processes.device(infos, B::NAME)?)))
            });
            let started = joined.and_then(|(gather, seat)| {
                team.gather = Some(gather);
                team.start(seat, done_in.clone())
            });
            if let Err(failure) = started {
                // The others hear of it where they hear of everything.
                let _ = done_in.send(Done { rank: me, result: Err(failure), figures: BTreeMap::new() });
                team.jobs = vec![channel().0];
            }
        }
        drop(done_in);
        let outcome = team.wait(limit * 2);
        Ok(verdict(&team.settle(outcome)?.0).map(|()| team))
    }

    /// Where the ranks of a new team meet on the host side, and the id of their group.
    fn invite(processes: &Processes) -> Result<(Place, GroupId), Error> {
        let place = Board::open(processes.reach()).map_err(|e| Error::invalid("board", e.to_string()))?;
        Ok((place, B::group_id()?))
    }

    fn new(size: u32, limit: Duration) -> (Self, Sender<Done>) {
        let (done_in, done) = channel();
        let team = Self {
            size,
            limit,
            first: 0,
            processes: None,
            jobs: Vec::new(),
            done,
            steps: Arc::new(Steps::new(size)),
            gather: None,
            groups: Arc::default(),
            threads: Vec::new(),
        };
        (team, done_in)
    }

    fn start(&mut self, seat: Seat, done: Sender<Done>) -> Result<(), Failure> {
        let ((job_in, jobs), rank, groups) = (channel(), seat.rank, self.groups.clone());
        let thread = std::thread::Builder::new()
            .name(format!("rank {rank}"))
            .spawn(move || serve::<B>(seat, &groups, &jobs, &done))
            .map_err(|e| Failure::wrong(format!("can't start a thread for rank {rank}: {e}")))?;
        self.jobs.push(job_in);
        self.threads.push(thread);
        Ok(())
    }

    /// Runs a case on every rank and waits for all, for at most `patience`.
    ///
    /// # Errors
    /// [`Error::PeerLost`] if a process died.
    pub(crate) fn run(&mut self, body: &Body<B>, seed: u64, patience: Duration) -> Result<Verdict, Error> {
        for rank in 0..self.size {
            self.steps.set(rank, "start".into());
        }
        for job in &self.jobs {
            // A rank that is gone shows when its answer is missing.
            let _ = job.send(Job { body: body.clone(), seed });
        }
        let outcome = self.wait(patience);
        let (results, figures) = self.settle(outcome)?;
        Ok((verdict(&results), figures))
    }

    /// Waits until every rank of this process is done; the watchdog.
    fn wait(&self, patience: Duration) -> Outcome {
        let mut results: Vec<Option<Result<(), Failure>>> = vec![None; self.jobs.len()];
        let mut figures = Figures::new();
        let until = Instant::now() + patience;
        while results.iter().any(Option::is_none) {
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(done) => {
                    results[(done.rank - self.first) as usize] = Some(done.result);
                    merge(&mut figures, done.figures);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.abort();
                    let hung = |i: usize| self.hung(self.first + i as u32, patience);
                    let all = results.into_iter().enumerate();
                    return (all.map(|(i, r)| r.unwrap_or_else(|| Err(hung(i)))).collect(), figures);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = || Err(Failure::wrong("the rank's thread ended without an answer"));
                    return (results.into_iter().map(|r| r.unwrap_or_else(ended)).collect(), figures);
                }
            }
        }
        (results.into_iter().flatten().collect(), figures)
    }

    /// Says where a rank hangs.
    fn hung(&self, rank: u32, patience: Duration) -> Failure {
        Failure::wrong(format!("hung for {patience:?} (at: {})", self.steps.of(rank)))
    }

    /// Collective over all processes: what the ranks of all of them did.
    fn settle(&self, own: Outcome) -> Result<Outcome, Error> {
        let Some(processes) = &self.processes else { return Ok(own) };
        let (mut results, mut figures) = (Vec::new(), BTreeMap::new());
        for (rank, bytes) in (0..self.size).zip(processes.share("outcome", &encode(&own))?) {
            let (result, more) = decode(&bytes);
            results.push(result.unwrap_or_else(|| Err(Failure::wrong(format!("rank {rank} did not say what it did")))));
            merge(&mut figures, more);
        }
        Ok((results, figures))
    }

    fn abort(&self) {
        if let Some(gather) = &self.gather {
            gather.give_up(0);
        }
        for member in self.groups.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            member.collective.abort();
        }
    }
}

/// The largest of every figure.
fn merge(into: &mut Figures, more: impl IntoIterator<Item = (String, f64)>) {
    for (name, value) in more {
        let entry = into.entry(name).or_insert(value);
        *entry = entry.max(value);
    }
}

fn offer_of(invitation: Result<(Place, GroupId), Error>) -> Fields {
    match invitation {
        Ok((place, id)) => Fields::default().number(1).bytes(&place.to_bytes()).bytes(&id.0),
        Err(error) => Fields::default().number(0).bytes(error.to_string().as_bytes()),
    }
}

fn invitation(bytes: &[u8]) -> Result<(Place, GroupId), Failure> {
    let mut fields = Reader(bytes);
    let unreadable = |e: std::io::Error| Failure::wrong(format!("the invitation of process 0 can't be read: {e}"));
    if fields.number().map_err(unreadable)? == 0 {
        return Err(Failure::wrong(fields.text().map_err(unreadable)?));
    }
    let place = Place::from_bytes(fields.bytes().map_err(unreadable)?).map_err(unreadable)?;
    Ok((place, GroupId(fields.bytes().map_err(unreadable)?.to_vec())))
}

/// The outcome of the one rank of a process, for the others; empty for a process without.
fn encode((results, figures): &Outcome) -> Vec<u8> {
    let Some(result) = results.first() else { return Vec::new() };
    let said = Fields::default();
    let said = match result {
        Ok(()) => said.number(0),
        Err(Failure::Lost(rank) | Failure::Error(Error::PeerLost { rank, .. })) => {
            said.number(1).number(u64::from(*rank))
        }
        Err(Failure::Refused(why)) => said.number(2).bytes(why.as_bytes()),
        Err(other) => said.number(3).bytes(other.to_string().as_bytes()),
    };
    figures.iter().fold(said, |f, (name, value)| f.bytes(name.as_bytes()).number(value.to_bits())).0
}

fn decode(bytes: &[u8]) -> (Option<Result<(), Failure>>, Figures) {
    let mut fields = Reader(bytes);
    let mut result = || {
        Some(match fields.number().ok()? {
            0 => Ok(()),
            1 => Err(Failure::lost(fields.number().ok()? as u32)),
            2 => Err(Failure::Refused(fields.text().ok()?)),
            _ => Err(Failure::Wrong(fields.text().ok()?)),
        })
    };
    let result = result();
    let mut figures = Figures::new();
    while let (Ok(name), Ok(bits)) = (fields.text(), fields.number()) {
        figures.insert(name, f64::from_bits(bits));
    }
    (result, figures)
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
    let Seat { info, id, rank, size, limit, processes, gather, steps } = seat;
    steps.set(rank, "open and join".into());
    let member = Member::<B>::join(&info, &id, rank, size, limit).map_err(|error| match error {
        Error::Unsupported { .. } => Failure::Refused(error.to_string()),
        error => error.into(),
    })?;
    let member = Arc::new(member);
    groups.lock().unwrap_or_else(PoisonError::into_inner).push(member.clone());
    let stream = member.device.stream(Priority::Normal)?;
    Ok(Rank { member, stream, limit, info, processes, gather, steps, seed: 0, figures: BTreeMap::new(), lend: None })
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
    fn what_a_rank_did_comes_back_from_its_bytes() {
        let figures = BTreeMap::from([("bytes".to_owned(), 12.5), ("time".to_owned(), -1.0)]);
        for result in [
            Ok(()),
            Err(Failure::lost(3)),
            Err(Failure::Refused("no".into())),
            Err(Failure::wrong("wrong")),
            Err(Failure::Error(Error::invalid("x", "y"))),
        ] {
            let text = |r: &Result<(), Failure>| r.as_ref().map_err(ToString::to_string).cloned();
            let (back, more) = decode(&encode(&(vec![result.clone()], figures.clone())));
            assert_eq!(back.as_ref().map(text), Some(text(&result)));
            assert_eq!(more, figures);
        }
        assert!(decode(&encode(&(vec![], figures))).0.is_none(), "a process without a rank");
    }

    #[test]
    fn an_invitation_comes_back_from_its_bytes() {
        let (place, id) = (Place::known(vec![], b"word"), GroupId(vec![1, 2]));
        let back = invitation(&offer_of(Ok((place.clone(), id.clone()))).0).expect("written above");
        assert_eq!(back, (place, id));
        let refused = invitation(&offer_of(Err(Error::invalid("x", "y"))).0).expect_err("refused").to_string();
        assert!(refused.contains("invalid x: y") && invitation(&[1]).is_err());
    }

    #[test]
    fn a_panic_is_a_failure() {
        let failure = guarded::<()>(|| panic!("at {}", 3)).expect_err("it panicked");
        assert_eq!(failure.to_string(), "panicked: at 3");
    }
}
