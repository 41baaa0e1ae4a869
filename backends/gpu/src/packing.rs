//! The memory in which messages lie dense to travel: one for all exchanges of a group, whose rounds take turns.

use std::sync::{Arc, Mutex};

use longspan_hal::{Device, Error, Result};

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
    /// [`Error::OutOfMemory`]: what there was is there again, unless somebody else took it.
    pub(crate) fn grow(&self, device: &GpuDevice, bytes: usize) -> Result<usize> {
        let mut turns = lock(&self.0);
        let have = turns.memory.as_ref().map_or(0, Buffer::bytes);
        if have >= bytes {
            return Ok(0);
        }
        // Rounds that are under way keep what they were queued with.
        turns.memory = None;
        let larger = device.alloc(bytes);
        turns.memory = match &larger {
            Ok(memory) => Some(memory.clone()),
            Err(_) if have > 0 => device.alloc(have).ok(),
            Err(_) => None,
        };
        larger.map(|_| bytes - have)
    }

    /// The memory for a round of `bytes` that is queued on `on` next, behind all rounds before. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Invalid`] if there is none, since somebody else took it.
    pub(crate) fn turn(&self, on: &GpuStream, bytes: usize) -> Result<Option<Buffer>> {
        if bytes == 0 {
            return Ok(None);
        }
        let mut turns = lock(&self.0);
        let gone = || {
            let why = "its packing memory was given up for a larger one that the device did not have: prepare it again";
            Error::invalid("exchange", why)
        };
        let memory = turns.memory.clone().ok_or_else(gone)?;
        let elsewhere = turns.last.as_ref().filter(|last| !Arc::ptr_eq(last, on.core()));
        if let Some(end) = elsewhere.and_then(|last| last.mark()) {
            on.wait(&end)?;
        }
        memory.used_on(on)?;
        turns.last = Some(Arc::clone(on.core()));
        Ok(Some(memory))
    }
}
