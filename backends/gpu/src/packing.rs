//! The memory in which messages lie dense to travel: one for all exchanges of a group, whose rounds take turns.

use std::sync::{Arc, Mutex};

use longspan_hal::{Device, Result};

use crate::device::GpuDevice;
use crate::memory::Buffer;
use crate::stream::{Core, GpuStream};
use crate::sync::lock;

/// The packing memory of a group: as much as the largest of its exchanges needs.
#[derive(Debug, Default)]
pub(crate) struct Packing(Mutex<Turns>);

#[derive(Debug, Default)]
struct Turns {
    memory: Option<Buffer>,
    /// The stream of the round before.
    last: Option<Arc<Core>>,
}

impl Packing {
    /// Has `bytes` from now on; by how many it grew.
    ///
    /// # Errors
    /// [`longspan_hal::Error::OutOfMemory`].
    pub(crate) fn grow(&self, device: &GpuDevice, bytes: usize) -> Result<usize> {
        let mut turns = lock(&self.0);
        let have = turns.memory.as_ref().map_or(0, Buffer::bytes);
        if have >= bytes {
            return Ok(0);
        }
        // Rounds that are under way keep what they were queued with.
        turns.memory = None;
        turns.memory = Some(device.alloc(bytes)?);
        Ok(bytes - have)
    }

    /// The memory for a round of `bytes` that is queued on `on` next, behind all rounds before. The context is bound.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Driver`].
    pub(crate) fn turn(&self, on: &GpuStream, bytes: usize) -> Result<Option<Buffer>> {
        let mut turns = lock(&self.0);
        let Some(memory) = turns.memory.clone().filter(|_| bytes > 0) else {
            return Ok(None);
        };
        let elsewhere = turns.last.as_ref().filter(|last| !Arc::ptr_eq(last, on.core()));
        if let Some(end) = elsewhere.and_then(|last| last.mark()) {
            on.wait(&end)?;
        }
        memory.used_on(on)?;
        turns.last = Some(Arc::clone(on.core()));
        Ok(Some(memory))
    }
}
