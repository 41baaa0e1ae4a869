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
    Record(Arc<Record>),
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

/// An event. A wait is for the record that was the last one when the wait was queued, also if the event is recorded again.
pub struct Event {
    /// The context that it belongs to.
    pub context: usize,
    /// Whether it carries a time.
    pub timed: bool,
    last: Mutex<Option<Arc<Record>>>,
}

/// One record of an event.
#[derive(Default)]
struct Record {
    state: Mutex<RecordState>,
    wake: Condvar,
}

#[derive(Default)]
struct RecordState {
    done: bool,
    failed: Option<i32>,
    at: Option<Instant>,
    /// It was discarded: it will not happen, and the event may end.
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
        let record = Arc::<Record>::default();
        *lock(&event.last) = Some(Arc::clone(&record));
        self.add(Task::Record(record));
    }

    /// Queues a wait for the last record of `event` at this moment.
    pub fn wait(&self, event: &Arc<Event>) {
        if let Some(record) = lock(&event.last).clone() {
            self.push(move |running| record.wait(running));
        }
    }

    /// Discards what is queued, and ends what waits. Discarded records never happen.
    pub fn abort(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let mut queue = lock(&self.queue);
        for (_, task) in queue.tasks.drain(..) {
            if let Task::Record(record) = task {
                lock(&record.state).abandoned = true;
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
                if let Task::Record(record) = &task {
                    lock(&record.state).abandoned = true;
                }
                continue;
            }
            let result = match (task, failed) {
                (Task::Work(body), None) => body(&Running { stream: self, epoch }),
                (Task::Work(_), Some(_)) => Ok(()),
                (Task::Record(record), failed) => {
                    record.happen(failed);
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
        Arc::new(Self { context, timed, last: Mutex::default() })
    }

    fn last<T>(&self, of: impl FnOnce(&RecordState) -> T) -> Option<T> {
        lock(&self.last).as_ref().map(|record| of(&lock(&record.state)))
    }

    /// Whether the last record has run.
    pub fn is_complete(&self) -> bool {
        self.last(|state| state.done).unwrap_or(true)
    }

    /// The code of the stream that it was recorded on, if that failed before.
    pub fn failed(&self) -> Option<i32> {
        self.last(|state| state.failed).flatten()
    }

    /// Whether nothing of it is queued.
    pub fn may_end(&self) -> bool {
        self.last(|state| state.done || state.abandoned).unwrap_or(true)
    }

    /// When the last record ran.
    pub fn time(&self) -> Option<Instant> {
        self.last(|state| state.at).flatten()
    }
}

impl Record {
    fn happen(&self, failed: Option<i32>) {
        let mut state = lock(&self.state);
        *state = RecordState { done: true, failed, at: Some(Instant::now()), abandoned: false };
        self.wake.notify_all();
    }

    fn wait(&self, running: &Running<'_>) -> Result<(), i32> {
        let mut state = lock(&self.state);
        while !state.done {
            if running.aborted() {
                return Err(code::EXCEPTION);
            }
            let nap = Duration::from_millis(2);
            state = self.wake.wait_timeout(state, nap).map_or_else(|e| e.into_inner().0, |(s, _)| s);
        }
        state.failed.map_or(Ok(()), Err)
    }
}
