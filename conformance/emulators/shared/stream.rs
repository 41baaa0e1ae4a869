//! Compiled into every emulator. Streams and events: a worker thread a stream, tasks in order, random delays.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::state::{CONFIG, code, count, lock, random};

/// What a task knows of its stream when it runs.
pub struct Running<'a> {
    stream: &'a Stream,
    epoch: u64,
}

impl Running<'_> {
    /// Whether the stream was aborted since the task was queued.
    pub fn aborted(&self) -> bool {
        self.stream.epoch.load(Ordering::Acquire) != self.epoch
    }
}

type Body = Box<dyn FnOnce(&Running<'_>) -> Result<(), i32> + Send>;

enum Task {
    Work(Body),
    Record(Arc<Event>, u64),
}

/// A stream.
pub struct Stream {
    /// The context that it belongs to.
    pub context: usize,
    queue: Mutex<Queue>,
    wake: Condvar,
    idle: Condvar,
    epoch: AtomicU64,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<(u64, Task)>,
    busy: bool,
    failed: Option<i32>,
    ended: bool,
}

/// An event: how often it was recorded, and which records have run.
pub struct Event {
    /// The context that it belongs to.
    pub context: usize,
    /// Whether it carries a time.
    pub timed: bool,
    state: Mutex<EventState>,
    wake: Condvar,
}

#[derive(Default)]
struct EventState {
    recorded: u64,
    done: u64,
    failed: Option<i32>,
    at: Option<Instant>,
    /// A record was discarded: it will not happen, and the event may end.
    abandoned: bool,
}

impl Stream {
    /// A new stream with its worker.
    pub fn start(context: usize) -> Arc<Self> {
        let stream = Arc::new(Self {
            context,
            queue: Mutex::default(),
            wake: Condvar::new(),
            idle: Condvar::new(),
            epoch: AtomicU64::new(0),
        });
        let worker = Arc::clone(&stream);
        // A process that can't start threads can't be emulated; its streams then never run.
        let _ = std::thread::Builder::new().name("device stream".into()).spawn(move || worker.work());
        stream
    }

    /// Queues work.
    pub fn push(&self, body: impl FnOnce(&Running<'_>) -> Result<(), i32> + Send + 'static) {
        self.add(Task::Work(Box::new(body)));
    }

    fn add(&self, task: Task) {
        let mut queue = lock(&self.queue);
        queue.tasks.push_back((self.epoch.load(Ordering::Acquire), task));
        self.wake.notify_all();
    }

    /// Queues a record of `event`.
    pub fn record(&self, event: &Arc<Event>) {
        let mut state = lock(&event.state);
        state.recorded += 1;
        let version = state.recorded;
        drop(state);
        self.add(Task::Record(Arc::clone(event), version));
    }

    /// Queues a wait for the last record of `event` at this moment.
    pub fn wait(&self, event: &Arc<Event>) {
        let (event, version) = (Arc::clone(event), lock(&event.state).recorded);
        self.push(move |running| event.wait(version, running));
    }

    /// Discards what is queued, and ends what waits. Discarded records never happen.
    pub fn abort(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let mut queue = lock(&self.queue);
        for (_, task) in queue.tasks.drain(..) {
            if let Task::Record(event, _) = task {
                lock(&event.state).abandoned = true;
            }
        }
        self.wake.notify_all();
        self.idle.notify_all();
    }

    /// Waits until everything ran; the stream's code, or a timeout.
    pub fn synchronize(&self, limit: Option<Duration>) -> i32 {
        let until = limit.map(|l| Instant::now() + l);
        let mut queue = lock(&self.queue);
        while queue.busy || !queue.tasks.is_empty() {
            let left = until.map_or(Duration::from_secs(3600), |u| u.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return code::SYNC_TIMEOUT;
            }
            queue = self.idle.wait_timeout(queue, left).map_or_else(|e| e.into_inner().0, |(q, _)| q);
        }
        queue.failed.unwrap_or(code::OK)
    }

    /// Lets the worker end once it is idle; whether work was still queued.
    pub fn end(&self) -> bool {
        let mut queue = lock(&self.queue);
        queue.ended = true;
        self.wake.notify_all();
        queue.busy || !queue.tasks.is_empty()
    }

    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            queue.busy = false;
            self.idle.notify_all();
            let (epoch, task) = loop {
                if let Some(task) = queue.tasks.pop_front() {
                    break task;
                }
                if queue.ended {
                    return;
                }
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            queue.busy = true;
            let failed = queue.failed;
            drop(queue);
            delay();
            if self.epoch.load(Ordering::Acquire) != epoch {
                if let Task::Record(event, _) = &task {
                    lock(&event.state).abandoned = true;
                }
                continue;
            }
            let result = match (task, failed) {
                (Task::Work(body), None) => body(&Running { stream: self, epoch }),
                (Task::Work(_), Some(_)) => Ok(()),
                (Task::Record(event, version), failed) => {
                    event.happen(version, failed);
                    Ok(())
                }
            };
            if let Err(code) = result
                && self.epoch.load(Ordering::Acquire) == epoch
            {
                count("failed tasks", 1);
                lock(&self.queue).failed.get_or_insert(code);
            }
        }
    }
}

/// One task in sixty-four is late.
fn delay() {
    if CONFIG.delay > 0 && random(64) == 0 {
        std::thread::sleep(Duration::from_micros(random(CONFIG.delay)));
    }
}

impl Event {
    /// A new event.
    pub fn new(context: usize, timed: bool) -> Arc<Self> {
        Arc::new(Self { context, timed, state: Mutex::default(), wake: Condvar::new() })
    }

    fn happen(&self, version: u64, failed: Option<i32>) {
        let mut state = lock(&self.state);
        state.done = state.done.max(version);
        state.failed = failed;
        state.at = Some(Instant::now());
        self.wake.notify_all();
    }

    fn wait(&self, version: u64, running: &Running<'_>) -> Result<(), i32> {
        let mut state = lock(&self.state);
        while state.done < version {
            if running.aborted() {
                return Err(code::EXCEPTION);
            }
            let nap = Duration::from_millis(2);
            state = self.wake.wait_timeout(state, nap).map_or_else(|e| e.into_inner().0, |(s, _)| s);
        }
        state.failed.map_or(Ok(()), Err)
    }

    /// Whether the last record has run.
    pub fn is_complete(&self) -> bool {
        let state = lock(&self.state);
        state.done >= state.recorded
    }

    /// The code of the stream that it was recorded on, if that failed before.
    pub fn failed(&self) -> Option<i32> {
        lock(&self.state).failed
    }

    /// Whether nothing of it is queued.
    pub fn may_end(&self) -> bool {
        let state = lock(&self.state);
        state.done >= state.recorded || state.abandoned
    }

    /// When the last record ran.
    pub fn time(&self) -> Option<Instant> {
        let state = lock(&self.state);
        state.at.filter(|_| state.done >= state.recorded)
    }
}
