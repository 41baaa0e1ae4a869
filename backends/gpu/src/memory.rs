//! Device memory: counted handles of pool memory, windows (this process's and others') and adopted memory.
//!
//! A buffer notes every stream that uses it. When its last handle goes, it is buried behind the work that those streams hold.

use std::any::Any;
use std::fmt::{Debug, Formatter};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use longspan_hal::{Error, Result, Strided};

use crate::abroad::{Export, Import, PAGE};
use crate::context::Context;
use crate::driver::Address;
use crate::event::Event;
use crate::flags::Flags;
use crate::grave::Remains;
use crate::stream::{Core, GpuStream};
use crate::sync::lock;

/// A counted handle of device memory.
#[derive(Clone)]
pub struct Buffer(Arc<Block>);

/// The memory behind a handle.
pub(crate) struct Block {
    context: &'static Context,
    address: Address,
    bytes: usize,
    /// Whether it is another device's, opened by this one.
    far: bool,
    window: Option<u64>,
    home: Mutex<Option<Home>>,
    used: Mutex<Vec<Arc<Core>>>,
}

enum Home {
    /// Somebody else's.
    Adopted { owner: Option<Arc<dyn Any + Send + Sync>> },
    /// A window of another process.
    Import(Import),
    /// Plain memory: a window; other processes may open it by what it is exported as.
    Plain { account: Arc<Account>, export: Option<Export> },
    /// Memory of the pool, from `born` on.
    Pool { account: Arc<Account>, born: Event },
}

/// Bytes in use by one device handle.
#[derive(Debug, Default)]
pub(crate) struct Account {
    used: AtomicU64,
    peak: AtomicU64,
}

/// Alignment that adopted memory must have, in bytes.
const ADOPTED_ALIGN: u64 = 16;

impl Buffer {
    /// Memory of the pool. The context is bound.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub(crate) fn alloc(context: &'static Context, bytes: usize, account: &Arc<Account>) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self::new(context, 0, 0, None, None));
        }
        let (address, born) = context.pool_alloc(bytes)?;
        account.add(bytes as u64);
        Ok(Self::new(context, address, bytes, None, Some(Home::Pool { account: Arc::clone(account), born })))
    }

    /// Memory that peers of `group` may write; those that are other processes meet by `abroad`. The context is bound.
    ///
    /// # Errors
    /// As [`Buffer::alloc`].
    pub(crate) fn window(
        context: &'static Context,
        bytes: usize,
        group: u64,
        account: &Arc<Account>,
        abroad: Option<&Arc<Flags>>,
    ) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self::new(context, 0, 0, Some(group), None));
        }
        let address = context.plain_alloc(if abroad.is_some() { bytes.next_multiple_of(PAGE) } else { bytes })?;
        let export = abroad.map(|flags| Export::new(context, flags, address)).transpose();
        let export = export.inspect_err(|_| context.plain_free(address))?;
        account.add(bytes as u64);
        let home = Home::Plain { account: Arc::clone(account), export };
        Ok(Self::new(context, address, bytes, Some(group), Some(home)))
    }

    /// A window of another process, which is open at `address`; `far` if it is another device's.
    pub(crate) fn import(context: &'static Context, address: Address, bytes: usize, far: bool, import: Import) -> Self {
        let home = Mutex::new(Some(Home::Import(import)));
        Self(Arc::new(Block { context, address, bytes, far, window: None, home, used: Mutex::default() }))
    }

    /// No memory.
    pub(crate) fn nothing(context: &'static Context) -> Self {
        Self::new(context, 0, 0, None, None)
    }

    /// Another handle of a block.
    pub(crate) fn again(block: Arc<Block>) -> Self {
        Self(block)
    }

    /// Its block, which this does not keep.
    pub(crate) fn weak(&self) -> Weak<Block> {
        Arc::downgrade(&self.0)
    }

    /// Applies `of` to what other processes open it by, if they may.
    pub(crate) fn with_export<T>(&self, of: impl FnOnce(&Export) -> T) -> Option<T> {
        match &*lock(&self.0.home) {
            Some(Home::Plain { export: Some(export), .. }) => Some(of(export)),
            _ => None,
        }
    }

    /// Whether it is memory of `context`'s own device.
    pub(crate) fn is_near(&self, context: &'static Context) -> bool {
        !self.0.far && std::ptr::eq(self.0.context, context)
    }

    /// Somebody else's memory. The context is bound.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a null, unaligned or foreign pointer.
    ///
    /// # Safety
    /// As [`longspan_hal::Device::adopt`].
    pub(crate) unsafe fn adopt(
        context: &'static Context,
        address: Address,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        check_pointer(address, bytes)?;
        let mut ordinal = -1i32;
        let attribute = context.machine.facts().codes.pointer_ordinal;
        // SAFETY: the attribute is an int; the driver checks the address itself.
        let known = unsafe { context.driver.pointer_attribute((&raw mut ordinal).cast(), attribute, address) };
        if known.value != 0 || u32::try_from(ordinal).ok() != Some(context.ordinal) {
            let of =
                if known.value == 0 { format!("of device {ordinal}") } else { "not known to the driver".to_owned() };
            return Err(Error::invalid("pointer", format!("{address:#x} is {of}, not of device {}", context.ordinal)));
        }
        Ok(Self::new(context, address, bytes, None, Some(Home::Adopted { owner })))
    }

    fn new(context: &'static Context, address: Address, bytes: usize, window: Option<u64>, home: Option<Home>) -> Self {
        let home = Mutex::new(home);
        let block = Block { context, address, bytes, far: false, window, home, used: Mutex::default() };
        Self(Arc::new(block))
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Whether both name the same memory.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let (a, b) = (&*self.0, &*other.0);
        std::ptr::eq(a, b)
            || (a.bytes > 0 && b.bytes > 0 && a.address == b.address && a.context.ordinal == b.context.ordinal)
    }

    /// Address of the first byte.
    pub(crate) fn address(&self) -> Address {
        self.0.address
    }

    /// Address of the first element of `at`.
    pub(crate) fn address_of(&self, at: &Strided) -> Address {
        self.0.address + (at.offset() * at.dtype().size()) as Address
    }

    /// Whether it is a window of `group`.
    pub(crate) fn is_window_of(&self, group: u64) -> bool {
        self.0.window == Some(group)
    }

    /// Notes that work on `stream` uses it from now on. The stream's context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn used_on(&self, stream: &GpuStream) -> Result<()> {
        let mut used = lock(&self.0.used);
        if used.iter().any(|core| Arc::ptr_eq(core, stream.core())) {
            return Ok(());
        }
        if let Some(Home::Pool { born, .. }) = &*lock(&self.0.home) {
            stream.wait(born)?;
        }
        // Who adopts a stream anew for every call would make the list grow without end.
        used.retain(|core| !core.is_over());
        used.push(Arc::clone(stream.core()));
        Ok(())
    }
}

/// Whether `address` can be adopted at all.
fn check_pointer(address: Address, bytes: usize) -> Result<()> {
    if address == 0 {
        return Err(Error::invalid("pointer", "it is null"));
    }
    if !address.is_multiple_of(ADOPTED_ALIGN) {
        return Err(Error::invalid("pointer", format!("{address:#x} is not aligned to {ADOPTED_ALIGN} bytes")));
    }
    if address.checked_add(bytes as Address).is_none() {
        return Err(Error::invalid("bytes", format!("{bytes} bytes from {address:#x} wrap the address space")));
    }
    Ok(())
}

impl Debug for Buffer {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let kind = match (&*lock(&self.0.home), self.0.window) {
            (_, Some(_)) => "window",
            (Some(Home::Adopted { .. }), _) => "adopted",
            _ => "allocated",
        };
        f.debug_struct("Buffer")
            .field("address", &self.0.address)
            .field("bytes", &self.0.bytes)
            .field("kind", &kind)
            .finish()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let remains = match lock(&self.home).take() {
            Some(Home::Adopted { owner: Some(owner) }) => Remains::Owner { _owner: owner },
            Some(Home::Import(import)) => Remains::Import(self.address, import),
            Some(Home::Plain { account, export }) => {
                account.remove(self.bytes as u64);
                export.map_or(Remains::Plain(self.address), |export| Remains::Export(self.address, export))
            }
            Some(Home::Pool { account, .. }) => {
                account.remove(self.bytes as u64);
                Remains::Pool(self.address)
            }
            Some(Home::Adopted { owner: None }) | None => return,
        };
        // A device that failed for good can't free memory one by one; an owner is let go in any case.
        let Ok(_bound) = self.context.bind() else { return };
        let after = lock(&self.used).iter().filter_map(|stream| stream.mark()).collect();
        self.context.grave.bury(self.context, after, remains);
        self.context.grave.reap(self.context);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_that_cannot_be_adopted_are_refused_before_the_driver_is_asked() {
        for (address, bytes, why) in [(0, 16, "null"), (24, 16, "aligned"), (u64::MAX - 15, 32, "wrap")] {
            let text = check_pointer(address, bytes).expect_err("refused").to_string();
            assert!(text.contains(why), "{text}");
        }
        assert_eq!(check_pointer(4096, 100), Ok(()));
    }

    #[test]
    fn an_account_keeps_the_most() {
        let account = Account::default();
        account.add(5);
        account.add(7);
        account.remove(5);
        account.add(1);
        assert_eq!((account.used(), account.peak()), (8, 12));
    }
}
