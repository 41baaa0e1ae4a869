//! Memory, streams and events of one device.
//!
//! # The ordering contract
//!
//! It governs every method of [`Device`], [`crate::Collective`] and [`crate::Attention`] that takes `on`.
//!
//! 1. Work on one stream runs in call order. Streams are unordered among each other until
//!    [`Device::record`] on one and [`Device::wait`] on the other:
//!
//!    ```text
//!    attention.forward(compute, ...)?;          // writes `out`
//!    let done = device.record(compute)?;        // everything queued on `compute` so far
//!    device.wait(transfer, &done)?;             // `transfer` continues only after it
//!    collective.exchange(transfer, ..., &[out])?;
//!    ```
//! 2. `Ok` means *queued*. A failure that shows later makes its stream fail: every later operation on that
//!    stream, and on streams that wait for it, is skipped, and [`Device::synchronize`] returns the first
//!    error.
//! 3. Views are borrowed for the call only. A backend keeps every buffer that a queued call uses (its own
//!    and, by their counted handles, the caller's) alive until that call ran. Memory adopted without an
//!    owner must live until the work that is queued on the *caller's* stream when the call returns has run.
//! 4. A function that forks work to a stream of its own joins it back to the caller's stream before it
//!    returns, also when it returns an error. The caller's stream alone orders everything.
//! 5. Nothing synchronises behind the caller's back. The only calls that block the host until device work
//!    is done are [`Device::synchronize`] and [`Device::download`].
//! 6. Any method may be called from any thread. Calls on one stream from several threads are ordered as
//!    the callers order them.
//! 7. Memory that a call does not name in its views or, for attention, that its slices do not select, may
//!    hold any bits (NaN too) and does not influence the result.

use std::any::Any;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::{Caps, Result, View, ViewMut};

/// Priority of a stream: transfers ask for [`Priority::High`], so that they start beside compute.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Priority {
    /// Ahead of normal work.
    High,
    /// The default.
    #[default]
    Normal,
}

/// Memory figures of a device, in bytes, as seen by this process.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Memory {
    /// Allocated through this device handle now.
    pub used: u64,
    /// The most that was allocated through this device handle at once.
    pub peak: u64,
    /// Free on the device.
    pub free: u64,
}

impl Memory {
    /// Figures from their parts.
    pub const fn new(used: u64, peak: u64, free: u64) -> Self {
        Self { used, peak, free }
    }
}

/// One device: memory, streams and events. See the [ordering contract](self).
pub trait Device: Sized + Debug + Send + Sync + 'static {
    /// A counted handle of device memory. Not Rust memory: two queued operations may conflict, and the
    /// ordering contract, not the borrow checker, keeps them apart.
    type Buffer: Clone + Debug + Send + Sync + 'static;
    /// A queue of work that runs in order.
    type Stream: Debug + Send + Sync + 'static;
    /// A point in a stream. Backends pool what lies behind it.
    type Event: Debug + Send + Sync + 'static;

    /// What the device says of itself.
    fn caps(&self) -> &Caps;

    /// Memory figures.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn memory(&self) -> Result<Memory>;

    /// `bytes` of device memory with undefined content, aligned to 256 bytes. Zero bytes are fine.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Driver`].
    fn alloc(&self, bytes: usize) -> Result<Self::Buffer>;

    /// Memory that somebody else allocated, such as a framework's tensor. With `owner`, the handle keeps it alive.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if the pointer is null, unaligned (16 bytes) or of another device.
    ///
    /// # Safety
    /// `ptr` points to `bytes` of memory of this device that stay valid as item 3 of the ordering contract says.
    unsafe fn adopt(
        &self,
        ptr: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self::Buffer>;

    /// Size of a buffer in bytes.
    fn bytes(buffer: &Self::Buffer) -> usize;

    /// Whether two handles name the same memory.
    fn same(a: &Self::Buffer, b: &Self::Buffer) -> bool;

    /// A new stream.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn stream(&self, priority: Priority) -> Result<Self::Stream>;

    /// A stream that somebody else made (`CUstream`, `hipStream_t`, `aclrtStream`).
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a handle of another device; [`crate::Error::Unsupported`] where streams have no
    /// foreign form (CPU).
    ///
    /// # Safety
    /// `raw` is a live stream of this device that outlives the returned handle.
    unsafe fn adopt_stream(&self, raw: *mut c_void) -> Result<Self::Stream>;

    /// The point after everything queued on `on` so far.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn record(&self, on: &Self::Stream) -> Result<Self::Event>;

    /// Work queued on `on` from now on runs after `event`. Does not block the host.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn wait(&self, on: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Time on the device between two events that have both happened.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if one has not happened yet.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration>;

    /// Blocks the host until everything queued on `on` ran, for at most `limit`.
    ///
    /// # Errors
    /// The first error of the stream; [`crate::Error::Timeout`].
    fn synchronize(&self, on: &Self::Stream, limit: Duration) -> Result<()>;

    /// Queues a copy of dense host bytes (row-major order of `to`'s extent) to the device. The host bytes may be
    /// reused when this returns.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if `from.len()` is not the view's bytes; [`crate::Error::Driver`].
    fn upload(&self, on: &Self::Stream, from: &[u8], to: ViewMut<'_, Self>) -> Result<()>;

    /// Copies to dense host bytes (row-major order of `from`'s extent), after everything queued on `on` so far, and
    /// blocks the host until done, for at most `limit`.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if `to.len()` is not the view's bytes; the first error of the stream;
    /// [`crate::Error::Timeout`].
    fn download(&self, on: &Self::Stream, from: View<'_, Self>, to: &mut [u8], limit: Duration) -> Result<()>;

    /// Queues a copy between views of equal dtype and extent, whatever their strides. They do not overlap.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if dtypes or extents differ or the views overlap; [`crate::Error::Driver`].
    fn copy(&self, on: &Self::Stream, from: View<'_, Self>, to: ViewMut<'_, Self>) -> Result<()>;

    /// Queues a write of `value`, rounded to the view's dtype, to every element.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn fill(&self, on: &Self::Stream, value: f32, to: ViewMut<'_, Self>) -> Result<()>;
}
