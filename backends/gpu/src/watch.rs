//! The watch over rounds in which a device waits for another process: it ends waits that would not end by themselves.
//!
//! ```text
//! rounds in flight and the group is over:  note on the device's handle why, then release flags or abort NCCL, until they are through
//! a round by NCCL that takes longer than the limit:  its rank says so; the board says who is behind
//! ```
//!
//! What was waited for has not come then, so results can't be right: synchronizing on the handle is an error, until the
//! communicator is dropped. Rounds between threads need no watch: there no device waits for what is not queued.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result};

use crate::context::Context;
use crate::event::Event;
use crate::flags::Flags;
use crate::group::Group;
use crate::nccl::Comm;
use crate::stream::GpuStream;
use crate::sync::lock;

/// How often rounds in flight are looked at.
const NAP: Duration = Duration::from_millis(5);
/// How often a watch with nothing to do looks whether it is still needed.
const IDLE: Duration = Duration::from_millis(100);

/// Why what a device computed can't be right; shared by the handles of one rank.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lost(Arc<Mutex<Option<Loss>>>);

#[derive(Debug)]
struct Loss {
    /// Of this communicator.
    key: u64,
    error: Error,
    /// Said once: the communicator is gone.
    once: bool,
}

impl Lost {
    /// # Errors
    /// What was noted.
    pub(crate) fn check(&self) -> Result<()> {
        let mut lost = lock(&self.0);
        let error = lost.as_ref().map(|loss| loss.error.clone());
        lost.take_if(|loss| loss.once);
        error.map_or(Ok(()), Err)
    }

    fn note(&self, key: u64, error: Error, once: bool) {
        lock(&self.0).get_or_insert(Loss { key, error, once });
    }

    fn clear(&self, key: u64) {
        lock(&self.0).take_if(|loss| loss.key == key);
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
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Round {
    number: u64,
    /// Where the limit is on the device's time.
    before: Option<Event>,
    after: Event,
    started: Option<Instant>,
    reported: bool,
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
        let before = matches!(self.by, By::Nccl(_)).then(|| on.record(false)).transpose()?;
        let result = queue();
        // Also of a round that failed half way, whose waits are queued.
        let after = on.record(false)?;
        *last = Some(after.clone());
        lock(&self.rounds).push(Round { number, before, after, started: None, reported: false });
        self.wake.notify_all();
        result
    }

    /// The communicator is dropped: the rank leaves now, or once its rounds are through.
    pub(crate) fn end(&self) {
        self.lost.clear(self.group.key);
        self.ended.store(true, Ordering::Release);
        let through = self.context.bind().is_ok_and(|_bound| !lock(&self.rounds).iter().any(Round::is_open));
        self.wake.notify_all();
        let thread = lock(&self.thread).take();
        if let (true, Some(thread)) = (through, thread) {
            // This process may be about to end: it leaves in order, and the thread is in no library.
            let _ = thread.join();
        }
    }

    fn run(&self) {
        // Without the context nothing can be watched.
        let Ok(_bound) = self.context.bind() else { return };
        loop {
            let mut rounds = lock(&self.rounds);
            rounds.retain(Round::is_open);
            let nap = if rounds.is_empty() {
                if self.ended.load(Ordering::Acquire) {
                    return self.group.member.leave();
                }
                IDLE
            } else if let Some(error) = self.group.member.fault("exchange") {
                drop(rounds);
                self.note(error);
                self.release();
                rounds = lock(&self.rounds);
                Duration::from_millis(1)
            } else {
                self.look(&mut rounds);
                NAP
            };
            drop(self.wake.wait_timeout(rounds, nap).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Says so where the caller synchronizes, unless a communicator that is gone told it before.
    fn note(&self, error: Error) {
        let ended = self.ended.load(Ordering::Acquire);
        let noted = self.noted.swap(true, Ordering::AcqRel);
        let known = ended && self.group.told();
        if !noted && !known {
            self.lost.note(self.group.key, error, ended);
        }
    }

    fn release(&self) {
        match &self.by {
            By::Flags(flags) => flags.release(),
            By::Nccl(comm) => comm.abort(),
        }
    }

    /// Hosts meet before they wait for flags, so those come while their process lives. NCCL's kernels may wait for a process
    /// that hangs.
    fn look(&self, rounds: &mut [Round]) {
        let By::Nccl(comm) = &self.by else { return };
        if comm.is_sick() {
            return self.group.abort();
        }
        for round in rounds {
            if round.started.is_none() && round.before.as_ref().is_some_and(|e| e.happened().unwrap_or(false)) {
                round.started = Some(Instant::now());
            }
            let late = round.started.is_some_and(|s| s.elapsed() > self.group.member.limit);
            if late && !std::mem::replace(&mut round.reported, true) {
                self.group.member.stuck(round.number, self.group.rank());
            }
        }
    }
}

impl Round {
    /// Where the device failed for good, nothing is in flight.
    fn is_open(&self) -> bool {
        matches!(self.after.happened(), Ok(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_loss_stays_until_its_communicator_goes() {
        let (lost, error) = (Lost::default(), Error::invalid("a", "b"));
        assert_eq!(lost.check(), Ok(()));
        lost.note(1, error.clone(), false);
        lost.note(2, Error::invalid("c", "d"), false);
        assert_eq!(lost.check(), Err(error.clone()));
        assert_eq!(lost.clone().check(), Err(error.clone()));
        lost.clear(2);
        assert_eq!(lost.check(), Err(error));
        lost.clear(1);
        assert_eq!(lost.check(), Ok(()));
        lost.note(3, Error::invalid("a", "b"), true);
        assert_eq!([lost.check().is_err(), lost.check().is_err()], [true, false], "said once");
    }
}
