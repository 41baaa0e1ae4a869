//! Pinned host memory for copies between host and device: taken by size class, used again.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Mutex;

use longspan_hal::{Error, Result};

use crate::context::Context;
use crate::driver::Address;
use crate::event::Event;
use crate::grave::Remains;
use crate::sync::lock;

/// Pinned memory that waits to be used again.
#[derive(Debug, Default)]
pub(crate) struct Pinned(Mutex<Shelf>);

#[derive(Debug, Default)]
struct Shelf {
    /// Addresses by size.
    free: BTreeMap<usize, Vec<usize>>,
    bytes: usize,
}

/// A piece of pinned memory.
#[derive(Debug)]
pub(crate) struct Block {
    address: usize,
    bytes: usize,
}

/// A [`Block`] in use. Dropping it buries it behind the last event that was noted.
#[derive(Debug)]
pub(crate) struct Staged {
    context: &'static Context,
    block: Option<Block>,
    after: Vec<Event>,
}

/// Smallest class.
const SMALLEST: usize = 4 << 10;
/// Larger blocks are sized in steps of this.
const STEP: usize = 16 << 20;
/// The most that is kept for use again.
const KEEP: usize = 256 << 20;

/// Bytes that are taken for `bytes`.
fn class(bytes: usize) -> usize {
    if bytes > STEP { bytes.next_multiple_of(STEP) } else { bytes.next_power_of_two().max(SMALLEST) }
}

impl Pinned {
    /// At least `bytes`. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`] if the host has not so much to pin.
    pub(crate) fn take(&self, context: &'static Context, bytes: usize) -> Result<Staged> {
        context.grave.reap(context);
        let bytes = class(bytes);
        let mut shelf = lock(&self.0);
        let kept = shelf.free.get_mut(&bytes).and_then(Vec::pop);
        if kept.is_some() {
            shelf.bytes -= bytes;
        }
        drop(shelf);
        let address = match kept {
            Some(address) => address,
            None => {
                let mut host = std::ptr::null_mut::<c_void>();
                // SAFETY: `host` is written; 1: pinned for every context.
                context.check(unsafe { context.driver.host_alloc(&mut host, bytes, 1) })?;
                host as usize
            }
        };
        Ok(Staged { context, block: Some(Block { address, bytes }), after: Vec::new() })
    }

    /// Keeps a block that nothing uses any more, or frees it.
    pub(crate) fn put_back(&self, context: &Context, block: Block) {
        let mut shelf = lock(&self.0);
        if shelf.bytes + block.bytes <= KEEP {
            shelf.bytes += block.bytes;
            shelf.free.entry(block.bytes).or_default().push(block.address);
            return;
        }
        drop(shelf);
        // SAFETY: it came from `host_alloc` and is freed once.
        let _ = unsafe { context.driver.host_free(block.address as *mut c_void) };
    }
}

impl Staged {
    fn host(&self) -> usize {
        self.block.as_ref().map_or(0, |b| b.address)
    }

    fn bytes(&self) -> usize {
        self.block.as_ref().map_or(0, |b| b.bytes)
    }

    /// Its address for the driver's copies.
    pub(crate) fn pointer(&self) -> *mut c_void {
        self.host() as *mut c_void
    }

    /// Its address for kernels, which read and write it directly.
    pub(crate) fn address(&self) -> Address {
        self.host() as Address
    }

    /// Writes `from` to its start.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is longer than the block.
    pub(crate) fn write(&mut self, from: &[u8]) -> Result<()> {
        self.fits(from.len())?;
        // SAFETY: the block has so many bytes, and the device does not use it before it is told.
        unsafe { self.pointer().cast::<u8>().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Reads its start; what the device wrote has arrived.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `to` is longer than the block.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<()> {
        self.fits(to.len())?;
        // SAFETY: the block has so many bytes.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(self.pointer().cast::<u8>(), to.len()) };
        Ok(())
    }

    fn fits(&self, bytes: usize) -> Result<()> {
        if bytes <= self.bytes() {
            return Ok(());
        }
        Err(Error::invalid("staging", format!("{bytes} bytes in a block of {}", self.bytes())))
    }

    /// It is in use until `event`.
    pub(crate) fn until(&mut self, event: Event) {
        self.after = vec![event];
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            // Unbound contexts leave it to a later call: burying with events needs no driver.
            self.context.grave.bury(self.context, std::mem::take(&mut self.after), Remains::Pinned(block));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_class_holds_its_bytes_and_wastes_at_most_half_or_a_step(bytes in 0usize..1 << 40) {
            let taken = class(bytes);
            prop_assert!(taken >= bytes && taken >= SMALLEST);
            prop_assert!(taken <= (2 * bytes).max(SMALLEST) || taken < bytes + STEP);
            prop_assert_eq!(class(taken), taken);
        }
    }
}
