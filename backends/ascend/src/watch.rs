//! The watch over a communicator's rounds: it ends waits that the device would never end by itself.
//!
//! HCCL has no abort, and a lost peer shows only as a timeout, if at all. So a thread looks at the rounds in flight: when the
//! group is over, or a round's receives do not come within the limit after the work before it ran, the streams with rounds in
//! flight are given up (`aclrtStreamAbort`), and so are streams that wait for them.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use longspan_peers::Member;

use crate::context::{Context, lock};
use crate::event::RawEvent;
use crate::stream::StreamState;

/// How often rounds in flight are looked at.
const NAP: Duration = Duration::from_millis(5);

/// Rounds in flight, shared with the watching thread.
#[derive(Debug)]
pub(crate) struct Watch {
    /// The vendor's communicator: it lives as long as its rounds.
    _comm: Option<Arc<dyn Any + Send + Sync>>,
    context: Arc<Context>,
    member: Arc<Member>,
    rounds: Mutex<Vec<Round>>,
    wake: Condvar,
    ended: AtomicBool,
}

#[derive(Debug)]
struct Round {
    number: u64,
    stream: Arc<StreamState>,
    before: Arc<RawEvent>,
    after: Arc<RawEvent>,
    started: Option<Instant>,
    reported: bool,
}

impl Watch {
    /// Starts watching.
    pub fn start(
        context: &Arc<Context>,
        member: &Arc<Member>,
        comm: Option<Arc<dyn Any + Send + Sync>>,
    ) -> std::io::Result<Arc<Self>> {
        let watch = Arc::new(Self {
            _comm: comm,
            context: Arc::clone(context),
            member: Arc::clone(member),
            rounds: Mutex::default(),
            wake: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let own = Arc::clone(&watch);
        std::thread::Builder::new().name("longspan watch".into()).spawn(move || own.run())?;
        Ok(watch)
    }

    /// Adds a round between two events of `stream`.
    pub fn add(&self, number: u64, stream: &Arc<StreamState>, before: Arc<RawEvent>, after: Arc<RawEvent>) {
        let stream = Arc::clone(stream);
        lock(&self.rounds).push(Round { number, stream, before, after, started: None, reported: false });
        self.wake.notify_all();
    }

    /// Ends the thread once its rounds are done.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake.notify_all();
    }

    fn run(&self) {
        // Without the context nothing can be watched; the device's own timeouts remain.
        if self.context.bind().is_err() {
            return;
        }
        loop {
            let mut rounds = lock(&self.rounds);
            rounds.retain(|round| {
                let done = round.after.is_complete().unwrap_or(true);
                if done {
                    self.member.began(round.number);
                }
                !done
            });
            if rounds.is_empty() {
                if self.ended.load(Ordering::Acquire) {
                    return;
                }
                drop(self.wake.wait_timeout(rounds, Duration::from_millis(100)));
                continue;
            }
            if let Some(error) = self.member.fault("exchange") {
                let given_up: Vec<Round> = rounds.drain(..).collect();
                drop(rounds);
                given_up.iter().for_each(|r| r.stream.abort(&error));
                continue;
            }
            self.look(&mut rounds);
            drop(self.wake.wait_timeout(rounds, NAP));
        }
    }

    fn look(&self, rounds: &mut [Round]) {
        for round in rounds {
            if round.started.is_none() && round.before.is_complete().unwrap_or(false) {
                round.started = Some(Instant::now());
                self.member.began(round.number);
            }
            let late = round.started.is_some_and(|s| s.elapsed() > self.member.limit);
            if late && !std::mem::replace(&mut round.reported, true) {
                self.member.stuck(round.number, self.member.rank, true);
            }
        }
    }
}
