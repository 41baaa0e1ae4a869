//! The context of one device, shared by all handles of it in the process: pool, events, pinned memory, kernels.

use std::fmt::{Debug, Formatter};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use longspan_dylib::Returned;
use longspan_hal::{Error, Result};
use longspan_kernels::Target;

use crate::driver::{Address, Driver, Handle, PoolProperties};
use crate::event::{Event, Events};
use crate::grave::Grave;
use crate::jit::Jit;
use crate::machine::Machine;
use crate::staging::Pinned;
use crate::sync::{Deadline, lock};

/// One device in this process. Never dropped.
pub struct Context {
    /// The vendor.
    pub(crate) machine: &'static Machine,
    /// Its driver.
    pub(crate) driver: &'static Driver,
    /// Index of the device.
    pub(crate) ordinal: u32,
    /// The driver's context.
    pub(crate) raw: Handle,
    /// What the device is.
    pub(crate) figures: Figures,
    /// Events to be used again.
    pub(crate) events: Events,
    /// Pinned host memory to be used again.
    pub(crate) pinned: Pinned,
    /// What still is in use by queued work.
    pub(crate) grave: Grave,
    /// Kernels.
    pub(crate) jit: Jit,
    pool: Handle,
    /// Allocations and frees of the pool run here, and nothing else.
    pool_stream: Mutex<Handle>,
    poison: OnceLock<Error>,
}

/// Numbers of a device.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// Its name.
    pub name: String,
    /// Total memory.
    pub memory_bytes: u64,
    /// What the compiler calls its architecture.
    pub arch: String,
    /// Multiprocessors.
    pub units: u32,
    /// Bytes of the last cache.
    pub cache_bytes: usize,
    /// What kernels may use.
    pub target: Target,
    /// Version of the driver's interface.
    pub driver_version: i32,
    /// Stream priorities: normal, high.
    pub priorities: [i32; 2],
}

/// The context is current on this thread while this lives.
pub(crate) struct Bound {
    context: &'static Context,
    before: Handle,
}

impl Debug for Context {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "Context({}:{})", self.machine.facts().name, self.ordinal)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = self.context.driver.pop_context(self.before);
    }
}

impl Context {
    /// Takes the context that all users of the device share.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such device, [`Error::Unavailable`] without memory pools, [`Error::Driver`].
    pub(crate) fn new(machine: &'static Machine, driver: &'static Driver, ordinal: u32) -> Result<Self> {
        let info = machine.devices()?.into_iter().find(|d| d.index == ordinal);
        let info = info.ok_or_else(|| Error::invalid("device", format!("there is no device {ordinal}")))?;
        let (mut device, mut raw) = (0, 0);
        // SAFETY: `device` is written.
        machine.check(driver, unsafe { driver.device(&mut device, ordinal as i32) })?;
        let figures = Figures::of(machine, driver, device, info.name, info.memory_bytes)?;
        machine.check(driver, driver.retain_context(&mut raw, device))?;
        let mut context = Self {
            machine,
            driver,
            ordinal,
            raw,
            figures,
            events: Events::default(),
            pinned: Pinned::default(),
            grave: Grave::default(),
            jit: Jit::default(),
            pool: 0,
            pool_stream: Mutex::new(0),
            poison: OnceLock::new(),
        };
        context.set_up()?;
        Ok(context)
    }

    fn set_up(&mut self) -> Result<()> {
        let mut before = 0;
        self.check(self.driver.push_context(self.raw, &mut before))?;
        let result = self.set_up_bound();
        let _ = self.driver.pop_context(before);
        result
    }

    fn set_up_bound(&mut self) -> Result<()> {
        let (driver, codes) = (self.driver, self.machine.facts().codes);
        let ordinal = self.ordinal as i32;
        let wanted =
            PoolProperties { kind: 1, handles: 0, location: 1, ordinal, security: 0, limit: 0, reserved: [0; 7] };
        // SAFETY: `pool` is written, `wanted` is read.
        let created = unsafe { driver.pool_create(&mut self.pool, &wanted) };
        self.check(created)?;
        // Memory comes back once it is free for good (see `grave.rs`), so streams need not wait for each other.
        let (mut no, mut all) = (0i32, u64::MAX);
        for (attribute, value) in
            [(codes.pool_internal_dependencies, (&raw mut no).cast()), (codes.pool_threshold, (&raw mut all).cast())]
        {
            // SAFETY: the value has the attribute's type.
            self.check(unsafe { driver.pool_set(self.pool, attribute, value) })?;
        }
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both are written.
        self.check(unsafe { driver.priorities(&mut least, &mut greatest) })?;
        self.figures.priorities = [least, greatest];
        let mut stream = 0;
        // SAFETY: `stream` is written; 1: it does not wait for the default stream.
        self.check(unsafe { driver.stream_create(&mut stream, 1, greatest) })?;
        self.pool_stream = Mutex::new(stream);
        Ok(())
    }

    /// Makes the context current on this thread.
    ///
    /// # Errors
    /// The error that made the device useless, if there was one; [`Error::Driver`].
    pub(crate) fn bind(&'static self) -> Result<Bound> {
        if let Some(error) = self.poison.get() {
            return Err(error.clone());
        }
        let mut before = 0;
        self.check(self.driver.push_context(self.raw, &mut before))?;
        Ok(Bound { context: self, before })
    }

    /// An error for what a call of the driver returned, unless that is 0. After some errors the device is of no use to this
    /// process: then all later calls fail with the first of them.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn check(&self, returned: Returned<i32>) -> Result<()> {
        let Err(mut error) = self.machine.check(self.driver, returned) else { return Ok(()) };
        if self.machine.facts().codes.sticky.contains(&returned.value) {
            if let Error::Driver { message, .. } = &mut error {
                message.push_str("; this process can't use the device any more, start it again");
            }
            return Err(self.poison.get_or_init(|| error).clone());
        }
        Err(error)
    }

    /// Whether something has happened, from a query.
    pub(crate) fn ready(&self, returned: Returned<i32>) -> Result<bool> {
        if returned.value == self.machine.facts().codes.not_ready {
            return Ok(false);
        }
        self.check(returned).map(|()| true)
    }

    /// Whether an error is about memory, from what a call returned.
    fn short(&self, returned: Returned<i32>) -> Result<bool> {
        if returned.value == self.machine.facts().codes.out_of_memory {
            return Ok(true);
        }
        self.check(returned).map(|()| false)
    }

    /// Memory of the pool, and the event after which streams may use it. The context is bound.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub(crate) fn pool_alloc(&'static self, bytes: usize) -> Result<(Address, Event)> {
        let address = self.with_room(bytes, |address| {
            let stream = lock(&self.pool_stream);
            // SAFETY: `address` is written; pool and stream live as long as the context.
            unsafe { self.driver.pool_alloc(address, bytes, self.pool, *stream) }
        })?;
        let born = Event::record(self, *lock(&self.pool_stream), false)?;
        Ok((address, born))
    }

    /// Plain memory, which peers may access. The context is bound.
    ///
    /// # Errors
    /// As [`Context::pool_alloc`].
    pub(crate) fn plain_alloc(&'static self, bytes: usize) -> Result<Address> {
        // SAFETY: `address` is written.
        self.with_room(bytes, |address| unsafe { self.driver.alloc(address, bytes) })
    }

    /// Allocates; where memory is short, once more after everything that can be freed is free.
    fn with_room(&'static self, bytes: usize, take: impl Fn(&mut Address) -> Returned<i32>) -> Result<Address> {
        self.grave.reap(self);
        let mut address = 0;
        if bytes as u64 <= self.figures.memory_bytes {
            if !self.short(take(&mut address))? {
                return Ok(address);
            }
            // What is queued and not done in time keeps its memory.
            let waited = self.make_room();
            if !matches!(waited, Err(Error::Timeout { .. })) {
                waited?;
            }
            if !self.short(take(&mut address))? {
                return Ok(address);
            }
        }
        Err(Error::OutOfMemory { wanted: bytes as u64, free: self.free_bytes()? })
    }

    fn make_room(&'static self) -> Result<()> {
        self.grave.wait(self, Deadline::after(Duration::from_secs(60)))?;
        let freed = Event::record(self, *lock(&self.pool_stream), false)?;
        Deadline::after(Duration::from_secs(60)).poll("freeing memory", || freed.happened())?;
        // SAFETY: the pool lives as long as the context.
        self.check(unsafe { self.driver.pool_trim(self.pool, 0) })
    }

    /// Bytes that could be allocated. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are written.
        self.check(unsafe { self.driver.memory_info(&mut free, &mut total) })?;
        let [reserved, used] = self.machine.facts().codes.pool_figures.map(|attribute| {
            let mut value = 0u64;
            // SAFETY: the attribute is 64 bits wide.
            let asked = unsafe { self.driver.pool_get(self.pool, attribute, (&raw mut value).cast()) };
            if asked.value == 0 { value } else { 0 }
        });
        Ok(free as u64 + reserved.saturating_sub(used))
    }

    /// The first pair of `devices` of which one can't access the other's memory.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn unreachable(&self, devices: &[u32]) -> Result<Option<(u32, u32)>> {
        for &a in devices {
            for &b in devices.iter().filter(|b| **b != a) {
                if !self.machine.reaches(self.driver, a, b)? {
                    return Ok(Some((a, b)));
                }
            }
        }
        Ok(None)
    }

    /// Lets this context access the memory of the other devices.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn enable_peers(&'static self, devices: &[u32]) -> Result<()> {
        for &other in devices.iter().filter(|d| **d != self.ordinal) {
            let peer = self.machine.context(other)?;
            let _bound = self.bind()?;
            let enabled = self.driver.enable_peer(peer.raw);
            if enabled.value != self.machine.facts().codes.peer_enabled {
                self.check(enabled)?;
            }
        }
        Ok(())
    }

    /// Gives memory of the pool back; nothing uses it any more.
    pub(crate) fn pool_free(&self, address: Address) {
        // SAFETY: it came from `pool_alloc` and is freed once.
        let _ = unsafe { self.driver.pool_free(address, *lock(&self.pool_stream)) };
    }

    /// Gives plain memory back; nothing uses it any more.
    pub(crate) fn plain_free(&self, address: Address) {
        // SAFETY: it came from `plain_alloc` and is freed once.
        let _ = unsafe { self.driver.free(address) };
    }
}

impl Figures {
    fn of(machine: &Machine, driver: &Driver, device: i32, name: String, memory_bytes: u64) -> Result<Self> {
        let codes = machine.facts().codes;
        let ask = |attribute: i32| machine.ask(driver, device, attribute);
        if ask(codes.pools)? == 0 {
            return Err(Error::Unavailable {
                library: format!("{name} as a device with memory pools"),
                why: "its driver has none for it".to_owned(),
                how_to_get_it: "use a newer driver, outside of a restricted virtual machine".to_owned(),
            });
        }
        let mut driver_version = 0;
        // SAFETY: `driver_version` is written.
        machine.check(driver, unsafe { driver.version(&mut driver_version) })?;
        let asked = machine.asked(driver, device, name)?;
        let (arch, target) = (machine.facts().target)(&asked)?;
        Ok(Self {
            name: asked.name,
            memory_bytes,
            arch,
            units: ask(codes.units)?,
            cache_bytes: ask(codes.cache_bytes)? as usize,
            target,
            driver_version,
            priorities: [0; 2],
        })
    }
}
