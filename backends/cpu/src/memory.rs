//! Memory of the CPU device: counted handles of heap blocks, windows and adopted memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::ffi::c_void;
use std::fmt::{Debug, Formatter};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use longspan_hal::{Error, Result};

use crate::caps::free_memory;
use crate::table::Table;

/// Alignment of every allocation, in bytes.
pub(crate) const ALIGN: usize = 256;

/// Alignment that adopted memory must have, in bytes.
const ADOPTED_ALIGN: usize = 16;

/// Allocations from this size on are compared with what the machine has free, since an operating system that
/// overcommits hands out what it does not have.
const LARGE: usize = 64 << 20;

/// What fresh memory is filled with in checked mode and debug builds: NaN in every dtype.
const POISON: u8 = 0xFF;

/// A counted handle of memory. Not Rust memory: two queued operations may conflict, and the ordering contract, the table
/// of active ranges and checked mode keep them apart.
#[derive(Clone)]
pub struct Buffer(Arc<Block>);

/// Bytes in use by one device handle.
#[derive(Debug, Default)]
pub(crate) struct Account {
    used: AtomicU64,
    peak: AtomicU64,
}

struct Block {
    id: u64,
    base: NonNull<u8>,
    bytes: usize,
    home: Home,
    table: Arc<Table>,
    window: Option<u64>,
}

enum Home {
    /// The owner is kept until the block is dropped.
    Adopted { _owner: Option<Arc<dyn Any + Send + Sync>> },
    /// Where the heap block starts, before alignment.
    Allocated { raw: NonNull<u8>, layout: Layout, account: Arc<Account> },
    /// Zero bytes.
    Empty,
}

/// What an allocation is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Purpose {
    /// Filled with NaN patterns.
    pub poison: bool,
    /// The group whose peers may write it.
    pub window: Option<u64>,
}

static NEXT_BLOCK: AtomicU64 = AtomicU64::new(1);

/// One table for all adopted memory: several handles may name the same bytes.
static ADOPTED: LazyLock<Arc<Table>> = LazyLock::new(Arc::default);

// SAFETY: a block is an address range with no Rust references into it; every access goes through raw pointers in
// queued jobs, which the ordering contract orders and the table of active ranges checks.
unsafe impl Send for Block {}
// SAFETY: as above; the fields themselves are never changed after construction.
unsafe impl Sync for Block {}

impl Buffer {
    /// `bytes` of memory aligned to [`ALIGN`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn alloc(bytes: usize, purpose: Purpose, account: &Arc<Account>) -> Result<Self> {
        if bytes == 0 {
            let base = NonNull::new(std::ptr::without_provenance_mut(ALIGN)).unwrap_or(NonNull::dangling());
            return Ok(Self::new(base, 0, Home::Empty, Arc::default(), purpose));
        }
        let refused = || Error::OutOfMemory { wanted: bytes as u64, free: free_memory() };
        if bytes >= LARGE && bytes as u64 > free_memory() {
            return Err(refused());
        }
        // Aligned by hand: with the small alignment that `calloc` gives, large zeroed blocks cost no page until touched.
        let padded = bytes.checked_add(ALIGN).ok_or_else(refused)?;
        let layout = Layout::from_size_align(padded, ADOPTED_ALIGN).map_err(|_| refused())?;
        // SAFETY: the layout's size is not zero.
        let raw = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        // SAFETY: at most ALIGN - 1 bytes further, and the block is ALIGN longer than `bytes`.
        let base = unsafe { raw.add(raw.align_offset(ALIGN)) };
        if purpose.poison {
            // SAFETY: `bytes` from `base` lie inside the block, which nobody else knows yet.
            unsafe { base.write_bytes(POISON, bytes) };
        }
        account.add(bytes as u64);
        let home = Home::Allocated { raw, layout, account: Arc::clone(account) };
        Ok(Self::new(base, bytes, home, Arc::default(), purpose))
    }

    /// Memory of somebody else; the caller of [`longspan_hal::Device::adopt`] guarantees that it stays valid.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a null or unaligned pointer, or a range that wraps.
    pub(crate) fn adopt(
        ptr: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
        purpose: Purpose,
    ) -> Result<Self> {
        let base = NonNull::new(ptr.cast::<u8>()).ok_or_else(|| Error::invalid("pointer", "it is null"))?;
        let address = base.as_ptr() as usize;
        if !address.is_multiple_of(ADOPTED_ALIGN) {
            let why = format!("{address:#x} is not aligned to {ADOPTED_ALIGN} bytes");
            return Err(Error::invalid("pointer", why));
        }
        if bytes > isize::MAX as usize || address.checked_add(bytes).is_none() {
            return Err(Error::invalid("bytes", format!("{bytes} bytes from {address:#x} wrap the address space")));
        }
        Ok(Self::new(base, bytes, Home::Adopted { _owner: owner }, Arc::clone(&ADOPTED), purpose))
    }

    fn new(base: NonNull<u8>, bytes: usize, home: Home, table: Arc<Table>, purpose: Purpose) -> Self {
        let id = NEXT_BLOCK.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Block { id, base, bytes, home, table, window: purpose.window }))
    }

    /// Address of the first byte.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.0.base.as_ptr()
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Whether both name the same bytes.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.0.id == other.0.id
            || (Arc::ptr_eq(&self.0.table, &other.0.table) && self.ptr() == other.ptr() && self.bytes() > 0)
    }

    /// Distinct for every allocation and adoption of the process.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// The accesses of this memory.
    pub(crate) fn table(&self) -> &Table {
        &self.0.table
    }

    /// Whether it is a window of `group`.
    pub(crate) fn is_window_of(&self, group: u64) -> bool {
        self.0.window == Some(group)
    }
}

impl Debug for Buffer {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let kind = match (&self.0.home, self.0.window) {
            (_, Some(_)) => "window",
            (Home::Adopted { .. }, _) => "adopted",
            _ => "allocated",
        };
        f.debug_struct("Buffer").field("id", &self.0.id).field("bytes", &self.0.bytes).field("kind", &kind).finish()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match &self.home {
            Home::Adopted { .. } => self.table.forget(self.id),
            Home::Allocated { raw, layout, account } => {
                account.remove(self.bytes as u64);
                // SAFETY: `raw` came from the allocator with this layout, and this was the last handle.
                unsafe { dealloc(raw.as_ptr(), *layout) };
            }
            Home::Empty => {}
        }
    }
}

impl Account {
    /// Bytes in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The most bytes that were in use at once.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(used, Ordering::Relaxed);
    }

    fn remove(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}
