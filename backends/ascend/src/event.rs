//! Events, pooled: what lies behind one is recorded again once its last record ran.

use std::sync::{Arc, Mutex, Weak};

use ascendcl_sys::{ACL_EVENT_SYNC, ACL_EVENT_TIME_LINE, aclrtEvent, aclrtEventRecordedStatus};
use longspan_hal::Result;

use crate::context::{Context, check, lock};
use crate::stream::StreamState;

/// A point in a stream.
#[derive(Debug)]
pub struct AscendEvent {
    pub(crate) raw: Arc<RawEvent>,
    /// The stream that it was recorded on: a failed one makes the streams that wait for it fail.
    pub(crate) stream: Weak<StreamState>,
}

/// Events that are free to be recorded again.
#[derive(Debug)]
pub(crate) struct Pool {
    context: Arc<Context>,
    free: Mutex<Vec<usize>>,
}

/// One event of a pool.
#[derive(Debug)]
pub(crate) struct RawEvent {
    pool: Arc<Pool>,
    raw: usize,
}

impl Pool {
    /// An empty pool.
    pub fn new(context: &Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), free: Mutex::default() })
    }

    /// An event that nothing queued records.
    pub fn take(self: &Arc<Self>) -> Result<Arc<RawEvent>> {
        self.context.bind()?;
        let mut free = lock(&self.free);
        let ready = free.iter().position(|raw| self.is_complete(*raw).unwrap_or(false));
        let raw = match ready {
            Some(at) => free.swap_remove(at),
            None => self.create()?,
        };
        Ok(Arc::new(RawEvent { pool: Arc::clone(self), raw }))
    }

    fn create(&self) -> Result<usize> {
        let mut raw: aclrtEvent = std::ptr::null_mut();
        let flags = ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE;
        // SAFETY: the pointer is valid for the write.
        let code = unsafe { (self.context.api.runtime.aclrtCreateEventExWithFlag)(&mut raw, flags) };
        check("aclrtCreateEventExWithFlag", code)?;
        Ok(raw as usize)
    }

    fn is_complete(&self, raw: usize) -> Result<bool> {
        let mut status = aclrtEventRecordedStatus::ACL_EVENT_RECORDED_STATUS_NOT_READY;
        // SAFETY: the event lives; the pointer is valid for the write.
        let code = unsafe { (self.context.api.runtime.aclrtQueryEventStatus)(raw as aclrtEvent, &mut status) };
        check("aclrtQueryEventStatus", code)?;
        Ok(status == aclrtEventRecordedStatus::ACL_EVENT_RECORDED_STATUS_COMPLETE)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            for raw in lock(&self.free).drain(..) {
                // SAFETY: created by this pool, ended once; events keep their pool alive. A failure leaks.
                let _ = unsafe { (self.context.api.runtime.aclrtDestroyEvent)(raw as aclrtEvent) };
            }
        }
    }
}

impl RawEvent {
    /// The vendor's handle.
    pub fn raw(&self) -> aclrtEvent {
        self.raw as aclrtEvent
    }

    /// Whether its record has run; the calling thread has bound the context.
    pub fn is_complete(&self) -> Result<bool> {
        self.pool.is_complete(self.raw)
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        lock(&self.pool.free).push(self.raw);
    }
}
