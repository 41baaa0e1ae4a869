//! Streams: queues of work, each with a worker thread of its own.
//!
//! Nothing runs on the caller's thread, and two streams really run beside each other, so a missing `wait` is a bug here
//! as it is on a GPU. The worker starts with the first call.
//!
//! ```text
//! worker:  for task in queue, in order:
//!   run(accesses, job):  skip if the stream has failed
//!                        begin every access (conflict: the stream fails with Race); job(); end every access
//!                        error or panic: the stream fails
//!   record(event):       event = (now, clock, error of the stream)
//!   wait(event):         block until it happened; the stream fails as that one did; clock = max(both)
//! ```

use std::any::Any;
use std::collections::VecDeque;
use std::fmt::{Debug, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, current};
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result};

use crate::clock::Clock;
use crate::device::Core;
use crate::event::{CpuEvent, Happened};
use crate::sync::{Deadline, lock, wait};
use crate::table::{Access, Starting, Who};

/// A queue of work that runs in order on a thread of its own.
///
/// Dropping it does not block: what is queued still runs, then the worker ends by itself.
pub struct CpuStream {
    shared: Arc<Shared>,
}

/// What a job may ask of the stream that runs it.
pub(crate) struct Running<'a> {
    stream: &'a Shared,
}

struct Shared {
    id: u64,
    number: u32,
    device: Arc<Core>,
    queue: Mutex<Queue>,
    /// Signals the worker.
    work: Condvar,
    /// Signals those who synchronise.
    progress: Condvar,
    clock: Mutex<Clock>,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    submitted: u64,
    done: u64,
    closed: bool,
    /// The least count of done tasks that somebody synchronises with.
    awaited: Option<u64>,
    failed: Option<Error>,
    worker: Option<JoinHandle<()>>,
}

struct Task {
    /// What the host knew when it queued the task, in checked mode.
    host: Option<Arc<Clock>>,
    work: Work,
}

type Job = Box<dyn FnOnce(&Running<'_>) -> Result<()> + Send>;

enum Work {
    Record(CpuEvent),
    Run { op: &'static str, accesses: Vec<Access>, job: Job },
    Wait(CpuEvent),
}

static NEXT_STREAM: AtomicU64 = AtomicU64::new(1);
static NEXT_OPERATION: AtomicU64 = AtomicU64::new(1);

impl CpuStream {
    /// A stream of `device`.
    pub(crate) fn new(device: Arc<Core>) -> Self {
        let shared = Shared {
            id: NEXT_STREAM.fetch_add(1, Ordering::Relaxed),
            number: device.next_stream(),
            device,
            queue: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
            clock: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Queues `job`, which touches `accesses` and nothing else of device memory.
    ///
    /// A race with another operation, an error of the job and its panic make the stream fail.
    ///
    /// # Errors
    /// [`Error::Driver`] if the worker thread cannot be started.
    pub(crate) fn submit(
        &self,
        op: &'static str,
        accesses: Vec<Access>,
        job: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.submit_with(op, accesses, |_| job())
    }

    /// [`CpuStream::submit`] for a job that exchanges clocks with other streams.
    pub(crate) fn submit_with(
        &self,
        op: &'static str,
        accesses: Vec<Access>,
        job: impl FnOnce(&Running<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.push(Work::Run { op, accesses, job: Box::new(job) })
    }

    /// The point after everything queued so far.
    pub(crate) fn record(&self) -> Result<CpuEvent> {
        let event = CpuEvent::default();
        self.push(Work::Record(event.clone()))?;
        Ok(event)
    }

    /// Everything queued from now on runs after `event`.
    pub(crate) fn wait(&self, event: &CpuEvent) -> Result<()> {
        self.push(Work::Wait(event.clone()))
    }

    /// Blocks until everything queued so far ran, and returns the first error of the stream.
    pub(crate) fn synchronize(&self, call: &'static str, limit: Duration) -> Result<()> {
        let deadline = Deadline::after(limit);
        let shared = &*self.shared;
        let mut queue = lock(&shared.queue);
        let target = queue.submitted;
        while queue.done < target {
            queue.awaited = Some(queue.awaited.map_or(target, |other| other.min(target)));
            if deadline.passed() {
                return Err(deadline.timeout(call));
            }
            queue = deadline.wait(&shared.progress, queue);
        }
        let failed = queue.failed.clone();
        drop(queue);
        if shared.device.checked() {
            shared.device.host().raise(&lock(&shared.clock));
        }
        failed.map_or(Ok(()), Err)
    }

    /// Why it failed, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        lock(&self.shared.queue).failed.clone()
    }

    fn push(&self, work: Work) -> Result<()> {
        let host = self.shared.device.checked().then(|| self.shared.device.host().now());
        let mut queue = lock(&self.shared.queue);
        if queue.worker.is_none() {
            queue.worker = Some(self.spawn()?);
        }
        queue.submitted += 1;
        queue.tasks.push_back(Task { host, work });
        drop(queue);
        self.shared.work.notify_one();
        Ok(())
    }

    fn spawn(&self) -> Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name(format!("longspan-{}", shared.who("stream")));
        builder.spawn(move || shared.work()).map_err(|e| Error::Driver {
            backend: self.shared.device.backend(),
            call: "thread::spawn",
            code: i64::from(e.raw_os_error().unwrap_or(-1)),
            message: format!("{e}; a stream needs a worker thread"),
        })
    }
}

impl Debug for CpuStream {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let queue = lock(&self.shared.queue);
        f.debug_struct("CpuStream")
            .field("number", &self.shared.number)
            .field("queued", &(queue.submitted - queue.done))
            .field("failed", &queue.failed)
            .finish()
    }
}

impl Drop for CpuStream {
    fn drop(&mut self) {
        let idle = {
            let mut queue = lock(&self.shared.queue);
            queue.closed = true;
            let idle = queue.done == queue.submitted;
            queue.worker.take().filter(|worker| idle && worker.thread().id() != current().id())
        };
        self.shared.work.notify_one();
        if let Some(worker) = idle {
            // An idle worker ends at once. Its result says nothing: jobs' panics are caught.
            let _ = worker.join();
        }
    }
}

impl Running<'_> {
    /// The clock of the stream, in checked mode.
    pub(crate) fn clock(&self) -> Option<Clock> {
        self.stream.device.checked().then(|| lock(&self.stream.clock).clone())
    }

    /// Everything in `clock` has run before what follows on the stream.
    pub(crate) fn merge(&self, clock: &Clock) {
        lock(&self.stream.clock).merge(clock);
    }
}

impl Shared {
    /// The worker's life.
    fn work(&self) {
        while let Some((task, failed)) = self.next() {
            let result = self.perform(task, failed);
            let mut queue = lock(&self.queue);
            queue.done += 1;
            if let (Err(error), None) = (result, &queue.failed) {
                queue.failed = Some(error);
            }
            // Nobody is woken for a task that is not the last one waited for; who waits for more asks again.
            let reached = queue.awaited.is_some_and(|target| target <= queue.done);
            if reached {
                queue.awaited = None;
                drop(queue);
                self.progress.notify_all();
            }
        }
    }

    fn next(&self) -> Option<(Task, Option<Error>)> {
        let mut queue: MutexGuard<'_, Queue> = lock(&self.queue);
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                return Some((task, queue.failed.clone()));
            }
            if queue.closed {
                return None;
            }
            queue = wait(&self.work, queue);
        }
    }

    fn perform(&self, task: Task, failed: Option<Error>) -> Result<()> {
        if let Some(host) = &task.host {
            lock(&self.clock).merge(host);
        }
        match task.work {
            Work::Record(event) => {
                let clock = self.device.checked().then(|| lock(&self.clock).clone());
                event.happen(Happened { at: Instant::now(), clock, failed });
                Ok(())
            }
            _ if failed.is_some() => Ok(()),
            Work::Run { op, accesses, job } => self.run(op, &accesses, job),
            Work::Wait(event) => {
                let happened = event.wait();
                if let Some(clock) = &happened.clock {
                    lock(&self.clock).merge(clock);
                }
                happened.failed.map_or(Ok(()), Err)
            }
        }
    }

    fn run(&self, op: &'static str, accesses: &[Access], job: Job) -> Result<()> {
        let id = NEXT_OPERATION.fetch_add(1, Ordering::Relaxed);
        let clock = self.device.checked().then(|| {
            let mut clock = lock(&self.clock);
            clock.tick(self.id);
            clock.clone()
        });
        let device = self.device.id();
        let starting = Starting { id, who: self.who(op), stream: self.id, device, clock: clock.as_ref() };
        let begun = accesses.iter().try_for_each(|access| access.buffer.table().begin(&starting, access));
        let result = begun.and_then(|()| {
            catch_unwind(AssertUnwindSafe(|| job(&Running { stream: self })))
                .unwrap_or_else(|panic| Err(self.panicked(op, panic.as_ref())))
        });
        let mut last = None;
        for access in accesses {
            if last.replace(access.buffer.id()) != Some(access.buffer.id()) {
                access.buffer.table().end(id);
            }
        }
        result
    }

    fn panicked(&self, op: &'static str, panic: &(dyn Any + Send)) -> Error {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let message = format!("the job panicked: {}", text.as_deref().unwrap_or("no message"));
        Error::Driver { backend: self.device.backend(), call: op, code: -1, message }
    }

    fn who(&self, op: &'static str) -> Who {
        Who { op, rank: self.device.rank(), stream: self.number }
    }
}
