//! What a collective of another crate needs of this device: windows, places in memory, and work on a stream that touches
//! them. Ranks that are processes reuse the device and its attention so, and bring only their messages.

use longspan_hal::{Result, Strided, View, ViewMut};

use crate::device::copy_between;
use crate::group::next_key;
use crate::memory::Buffer;
use crate::table::Access;
use crate::{CpuDevice, CpuStream};

/// A group's key: windows are those of one group. Distinct for every group of this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Key(u64);

impl Key {
    /// The key of a new group.
    pub fn next() -> Self {
        Self(next_key())
    }
}

/// Elements of device memory, kept alive.
#[derive(Clone, Debug)]
pub struct Part {
    buffer: Buffer,
    at: Strided,
}

impl Part {
    /// The elements of a view.
    pub fn of(view: &View<'_, CpuDevice>) -> Self {
        Self { buffer: view.buffer().clone(), at: *view.at() }
    }

    /// The elements of a view that is written.
    pub fn of_mut(view: &ViewMut<'_, CpuDevice>) -> Self {
        Self { buffer: view.buffer().clone(), at: *view.at() }
    }

    /// The elements `at` of `buffer`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Invalid`] if they do not lie in it.
    pub fn new(buffer: &Buffer, at: Strided) -> Result<Self> {
        View::<CpuDevice>::new(buffer, at).map(|view| Self::of(&view))
    }

    /// Which elements.
    pub fn at(&self) -> &Strided {
        &self.at
    }

    /// The address of the first element. To be used within a job of [`queue`] that named this part.
    pub fn first(&self) -> *mut u8 {
        // Wrapping: an empty part may lie at the end of its memory. Parts with elements lie inside.
        self.buffer.ptr().wrapping_add(self.at.offset() * self.at.dtype().size())
    }

    /// Whether it lies in a window of the group.
    pub fn is_in_window_of(&self, group: Key) -> bool {
        self.buffer.is_window_of(group.0)
    }

    /// Whether both have an element in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.buffer.same(&other.buffer) && self.at.overlaps(&other.at)
    }

    /// Copies the elements to `to`, which has the same dtype and extent.
    ///
    /// # Safety
    /// Called within a job of [`queue`] that named this part as read and `to` as written, unless nobody but the caller knows
    /// their memory; the two do not overlap.
    pub unsafe fn copy_to(&self, to: &Self) {
        copy_between(&self.buffer, &self.at, &to.buffer, &to.at);
    }
}

/// Memory that peers of `group` may write.
///
/// # Errors
/// [`longspan_hal::Error::OutOfMemory`].
pub fn window(device: &CpuDevice, bytes: usize, group: Key) -> Result<Buffer> {
    device.window(bytes, group.0)
}

/// Names `rank` in the messages of `device`.
pub fn set_rank(device: &CpuDevice, rank: u32) {
    device.set_rank(rank);
}

/// Queues `job` on `on`: it reads `reads`, writes `writes`, and touches no other device memory. They are kept alive until it
/// ran, or was skipped because its stream has failed.
///
/// # Errors
/// [`longspan_hal::Error::Driver`] if the stream's thread cannot be started; later failures at `synchronize`.
pub fn queue(
    on: &CpuStream,
    call: &'static str,
    reads: &[Part],
    writes: &[Part],
    job: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<()> {
    let access = |part: &Part, write| Access { buffer: part.buffer.clone(), at: part.at, write };
    let reads = reads.iter().map(|part| access(part, false));
    on.submit(call, reads.chain(writes.iter().map(|part| access(part, true))).collect(), job)
}
