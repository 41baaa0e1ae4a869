//! Streams: what queued work keeps alive, the workspace of operators, and the first error.
//!
//! ```text
//! a call:  enter (bind the context, refuse a failed stream) -> queue -> keep(buffers) records an event behind it
//! later:   an event that has happened releases what was kept under it
//! drop:    the stream moves to the device's graveyard and ends once its last event happened
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use ascendcl_sys::{aclError, aclrtStream};
use longspan_hal::{Error, Result};

use crate::context::{Context, check, lock};
use crate::event::{AscendEvent, Pool, RawEvent};
use crate::memory::{AscendBuffer, Meter, Pinned};

/// The workspace that a stream starts with; it doubles when an operator wants more.
const WORKSPACE: usize = 1 << 20;
/// The scratch that a stream starts with, for calls that bring none.
const TEMPORARY: usize = 4 << 20;
/// Device bytes of a stream, unless an operator wants more.
pub(crate) const HELD: usize = WORKSPACE + TEMPORARY;
/// How long the end of a device may wait for one stream.
const END: Duration = Duration::from_secs(10);

/// A queue of work.
#[derive(Debug)]
pub struct AscendStream(pub(crate) Arc<StreamState>);

/// What a queued call uses.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub buffers: Vec<AscendBuffer>,
    pub pinned: Vec<Pinned>,
}

/// A stream, shared with the watch over its exchanges.
#[derive(Debug)]
pub(crate) struct StreamState {
    pub context: Arc<Context>,
    pub pool: Arc<Pool>,
    meter: Arc<Meter>,
    graveyard: Arc<Graveyard>,
    raw: usize,
    own: bool,
    kept: Mutex<VecDeque<(Arc<RawEvent>, Kept)>>,
    workspace: Mutex<Option<AscendBuffer>>,
    temporary: Mutex<Option<AscendBuffer>>,
    error: Mutex<Option<Error>>,
    /// Streams that wait for events of this one.
    followers: Mutex<Vec<(Arc<RawEvent>, Weak<StreamState>)>>,
}

/// Dropped streams that still have work.
#[derive(Debug, Default)]
pub(crate) struct Graveyard(Mutex<Vec<Grave>>);

#[derive(Debug)]
struct Grave {
    context: Arc<Context>,
    raw: usize,
    own: bool,
    last: Option<Arc<RawEvent>>,
    _kept: Vec<(Arc<RawEvent>, Kept)>,
    _memory: [Option<AscendBuffer>; 2],
}

impl StreamState {
    /// A stream around the vendor's handle, which it ends if it is its `own`.
    pub fn new(
        context: &Arc<Context>,
        pool: &Arc<Pool>,
        meter: &Arc<Meter>,
        graveyard: &Arc<Graveyard>,
        raw: aclrtStream,
        own: bool,
    ) -> Result<Arc<Self>> {
        let state = Arc::new(Self {
            context: Arc::clone(context),
            pool: Arc::clone(pool),
            meter: Arc::clone(meter),
            graveyard: Arc::clone(graveyard),
            raw: raw as usize,
            own,
            kept: Mutex::default(),
            workspace: Mutex::default(),
            temporary: Mutex::default(),
            error: Mutex::default(),
            followers: Mutex::default(),
        });
        // Taken now, so that runs allocate nothing.
        state.grown(&mut lock(&state.workspace), WORKSPACE)?;
        state.grown(&mut lock(&state.temporary), TEMPORARY)?;
        Ok(state)
    }

    /// The vendor's handle.
    pub fn raw(&self) -> aclrtStream {
        self.raw as aclrtStream
    }

    /// Binds the context; refuses a stream that failed.
    pub fn enter(&self) -> Result<()> {
        self.context.bind()?;
        self.error().map_or(Ok(()), Err)
    }

    /// The first error of the stream.
    pub fn error(&self) -> Option<Error> {
        lock(&self.error).clone()
    }

    /// Makes the stream fail with `error`, unless it has.
    pub fn fail(&self, error: &Error) {
        lock(&self.error).get_or_insert_with(|| error.clone());
    }

    /// Records the point after everything queued so far.
    pub fn record(&self) -> Result<Arc<RawEvent>> {
        let event = self.pool.take()?;
        // SAFETY: event and stream live and are of this context.
        check("aclrtRecordEvent", unsafe { (self.context.api.runtime.aclrtRecordEvent)(event.raw(), self.raw()) })?;
        Ok(event)
    }

    /// Continues only after `event`.
    pub fn wait(self: &Arc<Self>, event: &AscendEvent) -> Result<()> {
        if let Some(source) = event.stream.upgrade() {
            if let Some(error) = source.error() {
                self.fail(&error);
                return Ok(());
            }
            let mut followers = lock(&source.followers);
            followers.retain(|(event, _)| !event.is_complete().unwrap_or(true));
            followers.push((Arc::clone(&event.raw), Arc::downgrade(self)));
        }
        // SAFETY: event and stream live and are of this context.
        let code = unsafe { (self.context.api.runtime.aclrtStreamWaitEvent)(self.raw(), event.raw.raw()) };
        check("aclrtStreamWaitEvent", code)
    }

    /// Keeps `kept` alive until everything queued so far ran.
    pub fn keep(&self, kept: Kept) -> Result<()> {
        let event = self.record()?;
        self.reap();
        lock(&self.kept).push_back((event, kept));
        Ok(())
    }

    /// Releases what queued work no longer uses.
    pub fn reap(&self) {
        let mut done = Vec::new();
        let mut kept = lock(&self.kept);
        while kept.front().is_some_and(|(event, _)| event.is_complete().unwrap_or(false)) {
            done.extend(kept.pop_front());
        }
        drop(kept);
        self.graveyard.sweep();
    }

    /// Runs `queue` with a workspace of at least `bytes`, which stays this stream's until `queue` returned.
    pub fn with_workspace<T>(&self, bytes: u64, queue: impl FnOnce(&AscendBuffer) -> Result<T>) -> Result<T> {
        let mut workspace = lock(&self.workspace);
        let buffer = self.grown(&mut workspace, bytes as usize)?;
        queue(&buffer)
    }

    /// Scratch of this stream for calls that bring none; calls on a stream run in order, so they share it.
    pub fn temporary(&self, bytes: usize) -> Result<AscendBuffer> {
        self.grown(&mut lock(&self.temporary), bytes)
    }

    fn grown(&self, slot: &mut Option<AscendBuffer>, bytes: usize) -> Result<AscendBuffer> {
        if let Some(buffer) = slot.as_ref().filter(|b| b.bytes() >= bytes) {
            return Ok(buffer.clone());
        }
        let bytes = bytes.next_power_of_two().max(WORKSPACE);
        let new = AscendBuffer::new(&self.context, &self.meter, bytes, 0)?;
        if let Some(old) = slot.replace(new.clone()) {
            self.keep(Kept { buffers: vec![old], pinned: Vec::new() })?;
        }
        Ok(new)
    }

    /// Blocks until everything queued ran, for at most `limit`.
    pub fn synchronize(&self, limit: Duration) -> Result<()> {
        self.context.bind()?;
        // A limit further away than the clock can say is none.
        let until = Instant::now().checked_add(limit);
        loop {
            let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
            // In short naps: a stream that is given up from another thread must not hold this one.
            let nap = left.min(Duration::from_millis(200));
            let code = self.nap(nap);
            if let Some(error) = self.error() {
                return Err(error);
            }
            match code {
                aclError::ACL_ERROR_RT_STREAM_SYNC_TIMEOUT if until.is_some_and(|until| Instant::now() >= until) => {
                    return Err(Error::Timeout { call: "synchronize", limit });
                }
                aclError::ACL_ERROR_RT_STREAM_SYNC_TIMEOUT => {}
                code => {
                    let result = check("aclrtSynchronizeStreamWithTimeout", code);
                    if let Err(error) = &result {
                        self.fail(error);
                    }
                    self.reap();
                    return result;
                }
            }
        }
    }

    fn nap(&self, limit: Duration) -> aclError {
        let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: the stream lives.
        unsafe { (self.context.api.runtime.aclrtSynchronizeStreamWithTimeout)(self.raw(), millis) }
    }

    /// Gives up what is queued here and on streams that wait for it; all of them fail with `error`.
    pub fn abort(&self, error: &Error) {
        if lock(&self.error).is_some() {
            return;
        }
        self.fail(error);
        let followers: Vec<_> = lock(&self.followers).drain(..).collect();
        for (event, follower) in followers {
            if let Some(follower) = follower.upgrade()
                && !event.is_complete().unwrap_or(false)
            {
                follower.abort(error);
            }
        }
        // SAFETY: the stream lives. A failure leaves the device's own timeout to end the wait.
        let _ = unsafe { (self.context.api.runtime.aclrtStreamAbort)(self.raw()) };
        if self.nap(Duration::from_secs(1)) != aclError::ACL_ERROR_RT_STREAM_SYNC_TIMEOUT {
            lock(&self.kept).clear();
        }
    }
}

impl Drop for StreamState {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        let memory = [lock(&self.workspace).take(), lock(&self.temporary).take()];
        let kept: Vec<_> = lock(&self.kept).drain(..).collect();
        // A failed stream has nothing queued any more.
        let last = if lock(&self.error).is_some() { None } else { self.record().ok() };
        let context = Arc::clone(&self.context);
        let grave = Grave { context, raw: self.raw, own: self.own, last, _kept: kept, _memory: memory };
        lock(&self.graveyard.0).push(grave);
        self.graveyard.sweep();
    }
}

impl Graveyard {
    /// Ends the streams whose work is done.
    pub fn sweep(&self) {
        let mut graves = lock(&self.0);
        let (done, pending) = graves.drain(..).partition(Grave::is_done);
        *graves = pending;
        drop(graves);
        let _: Vec<Grave> = done;
    }
}

impl Grave {
    fn is_done(&self) -> bool {
        self.last.as_ref().is_none_or(|event| event.is_complete().unwrap_or(true))
    }
}

impl Drop for Grave {
    fn drop(&mut self) {
        if !self.own || self.context.bind().is_err() {
            return;
        }
        let runtime = &self.context.api.runtime;
        let millis = END.as_millis() as i32;
        // SAFETY: the stream lives and is ended once. What does not end in time is left behind.
        unsafe {
            if self.is_done() || (runtime.aclrtSynchronizeStreamWithTimeout)(self.raw as aclrtStream, millis).0 == 0 {
                let _ = (runtime.aclrtSynchronizeStreamWithTimeout)(self.raw as aclrtStream, millis);
                let _ = (runtime.aclrtDestroyStream)(self.raw as aclrtStream);
            }
        }
    }
}
