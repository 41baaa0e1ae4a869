//! The watch over rounds in which a device may wait for another: it ends waits that would not end by themselves.
//!
//! ```text
//! a round is in flight from before the host queues it, since NCCL's host calls may wait too, until its end on the device
//! rounds in flight and the group is over:    note on the device's handle why, then release flags or abort NCCL, until they are through
//! a round that takes longer than the limit:  its rank says so; the board says who is behind
//! a device or communicator that failed:      its rank gives the group up, since nothing that it queued will come
//! ```
//!
//! What was waited for has not come then, so results can't be right: synchronizing on the handle is an error, until the
//! communicator is dropped; if nobody was told by then, once more. Peer copies between threads need no watch: there no device
//! waits for what is not queued.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result};

use crate::context::Context;
use crate::event::Event;
use crate::flags::Flags;
use crate::group::Group;
use crate::nccl::Comm;
use crate::stream::GpuStream;
use crate::sync::{Deadline, lock};

/// How often rounds in flight are looked at.
const NAP: Duration = Duration::from_millis(5);
/// How often a watch with nothing to do looks whether it is still needed.
const IDLE: Duration = Duration::from_millis(100);
/// How long the board may take to say who died, or is behind.
const ANSWER: Duration = Duration::from_secs(3);
/// How long a rank whose group is over waits for the end of its communicator.
const OVER: Duration = Duration::from_secs(5);

/// Why what a device computed can't be right; shared by the handles of one rank.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lost(Arc<Mutex<Option<Loss>>>);

#[derive(Debug)]
struct Loss {
    /// Of this communicator.
    key: u64,
    error: Error,
    /// A caller got it.
    said: bool,
    /// Said once: the communicator is gone.
    once: bool,
}

impl Lost {
    /// # Errors
    /// What was noted.
    pub(crate) fn check(&self) -> Result<()> {
        let mut lost = lock(&self.0);
        let error = lost.as_mut().map(|loss| {
            loss.said = true;
            loss.error.clone()
        });
        lost.take_if(|loss| loss.once);
        error.map_or(Ok(()), Err)
    }

    /// `once` is asked while nobody clears.
    fn note(&self, key: u64, error: Error, once: impl FnOnce() -> bool) {
        let mut lost = lock(&self.0);
        lost.get_or_insert_with(|| Loss { key, error, said: false, once: once() });
    }

    /// The communicator is gone; `told` if a caller knows why.
    fn clear(&self, key: u64, told: bool) {
        let mut lost = lock(&self.0);
        if let Some(loss) = lost.as_mut().filter(|loss| loss.key == key) {
            loss.once = true;
        }
        lost.take_if(|loss| loss.key == key && (loss.said || told));
    }
}

/// What a device waits by.
#[derive(Debug)]
pub(crate) enum By {
    /// Flags in shared memory.
    Flags(Arc<Flags>),
    /// NCCL's kernels.
    Nccl(Arc<Comm>),
}

/// Rounds in flight of one communicator, shared with the watching thread.
#[derive(Debug)]
pub(crate) struct Watch {
    context: &'static Context,
    group: Arc<Group>,
    by: By,
    lost: Lost,
    rounds: Mutex<Vec<Round>>,
    last: Mutex<Option<Event>>,
    wake: Condvar,
    ended: AtomicBool,
    noted: AtomicBool,
    /// When a round was late, or the communicator sick.
    reported: OnceLock<Instant>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Round {
    number: u64,
    before: Event,
    /// `None` while the host queues it.
    after: Option<Event>,
    /// Since when the limit counts: on the host from the start, then on the device.
    since: Option<Instant>,
}

impl Watch {
    /// Starts watching.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a thread.
    pub(crate) fn start(context: &'static Context, group: &Arc<Group>, by: By, lost: &Lost) -> Result<Arc<Self>> {
        let watch = Arc::new(Self {
            context,
            group: Arc::clone(group),
            by,
            lost: lost.clone(),
            rounds: Mutex::default(),
            last: Mutex::default(),
            wake: Condvar::new(),
            ended: AtomicBool::new(false),
            noted: AtomicBool::new(false),
            reported: OnceLock::new(),
            thread: Mutex::default(),
        });
        let own = Arc::clone(&watch);
        let started = std::thread::Builder::new().name("longspan watch".into()).spawn(move || own.run());
        let thread = started.map_err(|e| Error::Unavailable {
            library: "a thread".to_owned(),
            why: e.to_string(),
            how_to_get_it: "raise the process's thread limit".to_owned(),
        })?;
        *lock(&watch.thread) = Some(thread);
        Ok(watch)
    }

    /// Runs `queue` as round `number` on `on`, behind the round before it, whatever stream that was on. The context is bound.
    ///
    /// # Errors
    /// Those of `queue`; [`Error::Driver`].
    pub(crate) fn round(&self, on: &GpuStream, number: u64, queue: impl FnOnce() -> Result<()>) -> Result<()> {
        self.group.member.queued(number);
        let mut last = lock(&self.last);
        if let Some(event) = &*last {
            on.wait(event)?;
        }
        let (before, since) = (on.record(false)?, Some(Instant::now()));
        lock(&self.rounds).push(Round { number, before, after: None, since });
        self.wake.notify_all();
        let result = queue();
        // Also of a round that failed half way, whose waits are queued.
        let after = on.record(false);
        let mut rounds = lock(&self.rounds);
        match after {
            Ok(after) => {
                rounds.iter_mut().filter(|r| r.number == number).for_each(|r| r.queued(&after));
                *last = Some(after);
                result
            }
            Err(error) => {
                rounds.retain(|r| r.number != number);
                result.and(Err(error))
            }
        }
    }

    /// The communicator is dropped: the rank leaves now, or once its rounds are through. NCCL's end is waited for.
    pub(crate) fn end(&self) {
        let through = {
            let rounds = lock(&self.rounds);
            self.ended.store(true, Ordering::Release);
            self.wake.notify_all();
            self.context.bind().is_ok_and(|_bound| rounds.iter().all(|r| matches!(r.is_open(), Ok(false))))
        };
        self.lost.clear(self.group.key, self.group.told());
        let thread = lock(&self.thread).take().filter(|_| through || matches!(self.by, By::Nccl(_)));
        if let Some(thread) = thread {
            // This process may be about to end: it leaves in order, and the thread is not in NCCL then. That may take peers.
            let member = &self.group.member;
            let limit = if member.fault("leave").is_some() { OVER.min(member.limit) } else { member.limit };
            let _ = Deadline::after(limit).poll("leave", || Ok(thread.is_finished()));
        }
    }

    fn run(&self) {
        let Ok(_bound) = self.context.bind() else {
            // Without the context nothing can be watched, nor queued.
            self.group.abort();
            return self.leave();
        };
        loop {
            let mut rounds = lock(&self.rounds);
            self.retire(&mut rounds);
            let nap = if rounds.is_empty() {
                if self.ended.load(Ordering::Acquire) {
                    drop(rounds);
                    return self.leave();
                }
                IDLE
            } else if let Some(error) = self.group.member.fault("exchange") {
                drop(rounds);
                self.note(error);
                self.release();
                rounds = lock(&self.rounds);
                Duration::from_millis(1)
            } else {
                self.look(&rounds);
                NAP
            };
            drop(self.wake.wait_timeout(rounds, nap).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Notes how far the device is. Where it failed for good nothing is in flight, and others must not wait for it.
    fn retire(&self, rounds: &mut Vec<Round>) {
        let (mut began, mut failed) = (None, false);
        rounds.retain_mut(|round| {
            if round.began() {
                began = Some(round.number);
            }
            round.is_open().unwrap_or_else(|_| {
                failed = true;
                false
            })
        });
        if let Some(number) = began {
            self.group.member.began(number);
        }
        if failed {
            self.group.abort();
        }
    }

    /// Reports a round that does not end; the answer ends the group. A sick communicator has lost somebody, and that is seen without
    /// a report, or is sick by itself: then, or without an answer, the rank gives up.
    fn look(&self, rounds: &[Round]) {
        let late = |round: &&Round| round.since.is_some_and(|since| since.elapsed() > self.group.member.limit);
        if let Some(at) = self.reported.get() {
            if at.elapsed() > ANSWER {
                self.group.abort();
            }
        } else if let Some(round) = rounds.iter().find(late) {
            self.reported.get_or_init(Instant::now);
            self.group.member.stuck(round.number, self.group.rank(), true);
        } else if matches!(&self.by, By::Nccl(comm) if comm.is_sick()) {
            self.reported.get_or_init(Instant::now);
        }
    }

    /// Says so where the caller synchronizes, unless a communicator that is gone told it before.
    fn note(&self, error: Error) {
        let ended = || self.ended.load(Ordering::Acquire);
        let known = ended() && self.group.told();
        if !self.noted.swap(true, Ordering::AcqRel) && !known {
            self.lost.note(self.group.key, error, ended);
        }
    }

    fn release(&self) {
        match &self.by {
            By::Flags(flags) => flags.release(),
            By::Nccl(comm) => comm.abort(),
        }
    }

    /// The rank leaves its group, then NCCL's, which keeps what it sent until that arrived, unless the group is over.
    fn leave(&self) {
        let over = self.group.member.fault("leave").is_some();
        self.group.member.leave();
        match &self.by {
            By::Nccl(comm) if over => comm.abort(),
            By::Nccl(comm) => comm.finish(),
            By::Flags(_) => {}
        }
    }
}

impl Round {
    /// The host has queued it, up to `after`.
    fn queued(&mut self, after: &Event) {
        (self.after, self.since) = (Some(after.clone()), None);
    }

    /// Whether the device came to it. Once the host is done with it, the limit counts from then.
    fn began(&mut self) -> bool {
        let began = matches!(self.before.happened(), Ok(true));
        if began && self.since.is_none() {
            self.since = Some(Instant::now());
        }
        began
    }

    /// Whether it is in flight.
    ///
    /// # Errors
    /// Those of the device.
    fn is_open(&self) -> Result<bool> {
        match &self.after {
            None => self.before.happened().map(|_| true),
            Some(after) => after.happened().map(|happened| !happened),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_loss_stays_until_its_communicator_goes() {
        let (lost, error) = (Lost::default(), Error::invalid("a", "b"));
        assert_eq!(lost.check(), Ok(()));
        lost.note(1, error.clone(), || false);
        lost.note(2, Error::invalid("c", "d"), || false);
        assert_eq!(lost.check(), Err(error.clone()));
        assert_eq!(lost.clone().check(), Err(error.clone()));
        lost.clear(2, true);
        assert_eq!(lost.check(), Err(error));
        lost.clear(1, false);
        assert_eq!(lost.check(), Ok(()));
        lost.note(3, Error::invalid("a", "b"), || true);
        assert_eq!([lost.check().is_err(), lost.check().is_err()], [true, false], "said once");
    }

    #[test]
    fn a_loss_that_nobody_was_told_of_is_said_once_more() {
        for (told, after) in [(false, [true, false]), (true, [false, false])] {
            let lost = Lost::default();
            lost.note(1, Error::invalid("a", "b"), || false);
            lost.clear(1, told);
            assert_eq!([lost.check().is_err(), lost.check().is_err()], after);
        }
    }
}
