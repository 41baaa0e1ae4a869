//! What one vendor brings: names, numbers and flags as data, and the libraries once they are loaded.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Debug;
use std::sync::{Mutex, OnceLock};

use longspan_dylib::{Library, Search};
use longspan_hal::{DeviceInfo, Error, KernelClass, Result, Transport};
use longspan_kernels::{Prelude, Target};

use crate::compiler::Compiler;
use crate::context::Context;
use crate::driver::{Driver, Flavor};
use crate::gemm::{Functions, Products};
use crate::nccl::Nccl;
use crate::sync::lock;
use crate::tensor_map::TensorMaps;

/// A vendor of GPUs whose driver has the shape of [`Driver`].
pub trait Vendor: Debug + Send + Sync + 'static {
    /// The name that `--backend` takes.
    const NAME: &'static str;

    /// Its one machine.
    fn machine() -> &'static Machine;

    /// Its library of matrix products, against which the device's peak is measured.
    fn products() -> Option<Products> {
        None
    }

    /// What the installed driver calls itself, where the system tells.
    fn driver_release() -> Option<String> {
        None
    }
}

/// A vendor's facts, and what of it is loaded in this process.
#[derive(Debug)]
pub struct Machine {
    facts: Facts,
    driver: OnceLock<Result<Driver>>,
    compiler: OnceLock<Result<Compiler>>,
    nccl: OnceLock<Result<Nccl>>,
    tensor_maps: OnceLock<Result<TensorMaps>>,
    products: OnceLock<Result<Functions>>,
    transport: Mutex<Option<Transport>>,
    kernels: Mutex<Option<KernelClass>>,
    contexts: Mutex<BTreeMap<u32, &'static Context>>,
}

/// What a vendor's machine is, as data.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Name of the backend, as errors carry it.
    pub name: &'static str,
    /// The shape of its driver, and the column of symbols in the tables.
    pub flavor: Flavor,
    /// What its kernels begin with.
    pub prelude: Prelude,
    /// The driver's library.
    pub driver: Place,
    /// The run-time compiler's library.
    pub compiler: Place,
    /// The library of collective operations.
    pub nccl: Place,
    /// Numbers of the driver's interface.
    pub codes: Codes,
    /// What the compiler calls a device's architecture, and what kernels may use of it.
    pub target: fn(&Asked) -> Result<(String, Target)>,
    /// The compiler's flag for the architecture, up to its name.
    pub arch_flag: &'static str,
    /// Flags of the compiler, beside the architecture and macros.
    pub flags: &'static [&'static str],
    /// The attribute of a pair of devices that says whether they have a link with atomics of its own, and what that link is.
    pub fast_link: Option<(i32, &'static str)>,
    /// The driver's oldest version that works, and what that is to people.
    pub oldest: (i32, &'static str),
}

/// What a device says of itself.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Compute capability.
    pub major: u32,
    /// Compute capability.
    pub minor: u32,
    /// Shared memory of a block, in bytes.
    pub block_bytes: u32,
    /// Shared memory of a multiprocessor, in bytes.
    pub unit_bytes: u32,
    /// Name of the architecture, where the driver knows it.
    pub arch: Option<String>,
    /// Name of the device.
    pub name: String,
}

/// Where a library is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its name in messages.
    pub what: &'static str,
    /// Paths and names, in order.
    pub candidates: fn() -> Vec<OsString>,
    /// What lies beside it and must be loaded first: starts of file names.
    pub beside: &'static [&'static str],
    /// What the user can do if it is missing.
    pub how_to_get_it: &'static str,
}

impl Place {
    fn open(&self) -> Result<Library> {
        let Self { what, candidates, beside, how_to_get_it } = *self;
        Library::open(&Search { what, candidates: candidates(), beside, how_to_get_it })
    }
}

/// Numbers of the driver's interface.
#[derive(Clone, Copy, Debug)]
pub struct Codes {
    /// Error: not enough memory.
    pub out_of_memory: i32,
    /// Answer: not yet.
    pub not_ready: i32,
    /// Error: peer access is enabled already.
    pub peer_enabled: i32,
    /// Errors after which a context is of no use.
    pub sticky: &'static [i32],
    /// Pointer attribute: ordinal of the device.
    pub pointer_ordinal: i32,
    /// Device attribute: compute capability, major and minor.
    pub capability: [i32; 2],
    /// Device attribute: number of multiprocessors.
    pub units: i32,
    /// Device attribute: shared memory of a block, at most.
    pub block_bytes: i32,
    /// Device attribute: shared memory of a multiprocessor.
    pub unit_bytes: i32,
    /// Device attribute: bytes of the last cache.
    pub cache_bytes: i32,
    /// Device attribute: whether pools are supported.
    pub pools: i32,
    /// Pool attribute: whether memory may be reused by making streams wait for each other.
    pub pool_internal_dependencies: i32,
    /// Pool attribute: bytes that are kept when they are not in use.
    pub pool_threshold: i32,
    /// Pool attributes: bytes reserved and bytes in use.
    pub pool_figures: [i32; 2],
}

impl Machine {
    /// A machine of which nothing is loaded yet.
    pub const fn new(facts: Facts) -> Self {
        Self {
            facts,
            driver: OnceLock::new(),
            compiler: OnceLock::new(),
            nccl: OnceLock::new(),
            tensor_maps: OnceLock::new(),
            products: OnceLock::new(),
            transport: Mutex::new(None),
            kernels: Mutex::new(None),
            contexts: Mutex::new(BTreeMap::new()),
        }
    }

    /// The vendor's facts.
    pub const fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The driver, loaded and started by the first call.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without the library or a device, or if the driver is too old.
    pub fn driver(&'static self) -> Result<&'static Driver> {
        let load = || {
            let driver = Driver::load(self.facts.driver.open()?, self.facts.flavor)?;
            self.start(&driver)?;
            Ok(driver)
        };
        self.driver.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    fn start(&self, driver: &Driver) -> Result<()> {
        // SAFETY: no pointers.
        let started = unsafe { driver.init(0) };
        let mut version = 0;
        // SAFETY: `version` is written.
        let asked = unsafe { driver.version(&mut version) };
        let Place { what, how_to_get_it, .. } = self.facts.driver;
        let unavailable =
            |why: String| Error::Unavailable { library: what.to_owned(), why, how_to_get_it: how_to_get_it.to_owned() };
        if asked.value == 0 && version < self.facts.oldest.0 {
            return Err(unavailable(format!("it is too old; {} is the oldest that works", self.facts.oldest.1)));
        }
        if started.value != 0 {
            let text = driver.error_text(started.value);
            return Err(unavailable(format!("{} failed with code {}: {text}", started.call, started.value)));
        }
        Ok(())
    }

    /// The run-time compiler, loaded by the first call.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub fn compiler(&self) -> Result<&Compiler> {
        let load = || Compiler::load(self.facts.name, self.facts.compiler.open()?, self.facts.flavor.column());
        self.compiler.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    /// The library of collective operations, loaded by the first call.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub(crate) fn nccl(&'static self) -> Result<&'static Nccl> {
        let load = || Nccl::load(self.facts.nccl.open()?, self.facts.flavor.column());
        self.nccl.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    /// The driver's encoder of tensor maps, loaded by the first call.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub(crate) fn tensor_maps(&'static self) -> Result<&'static TensorMaps> {
        let load = || TensorMaps::load(self.facts.driver.open()?);
        self.tensor_maps.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    /// The library of matrix products, loaded by the first call.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub(crate) fn products(&self, of: &Products) -> Result<&Functions> {
        self.products.get_or_init(|| of.load(self)).as_ref().map_err(Clone::clone)
    }

    /// The class of attention kernels: what was said, or else the variable `LONGSPAN_KERNEL`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another word in the variable.
    pub(crate) fn kernels(&self) -> Result<KernelClass> {
        if let Some(wanted) = *lock(&self.kernels) {
            return Ok(wanted);
        }
        match std::env::var("LONGSPAN_KERNEL").as_deref() {
            Err(_) | Ok("" | "auto") => Ok(KernelClass::Auto),
            Ok("flash2") => Ok(KernelClass::Flash2),
            Ok("flash3") => Ok(KernelClass::Flash3),
            Ok(other) => Err(Error::invalid("LONGSPAN_KERNEL", format!("{other:?} is not auto, flash2 or flash3"))),
        }
    }

    /// Says which class of attention kernels devices use that are opened later.
    pub(crate) fn set_kernels(&self, wanted: KernelClass) {
        *lock(&self.kernels) = Some(wanted);
    }

    /// How messages are to travel, if that was said.
    pub(crate) fn transport(&self) -> Option<Transport> {
        *lock(&self.transport)
    }

    /// Says how messages of later groups are to travel.
    pub(crate) fn set_transport(&self, wanted: Transport) {
        *lock(&self.transport) = Some(wanted);
    }

    /// The context of device `ordinal`. It lives as long as the process: its kernels stay loaded.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Invalid`] for a device that is not there, [`Error::Driver`].
    pub(crate) fn context(&'static self, ordinal: u32) -> Result<&'static Context> {
        let driver = self.driver()?;
        let mut contexts = lock(&self.contexts);
        if let Some(context) = contexts.get(&ordinal) {
            return Ok(context);
        }
        let context: &'static Context = Box::leak(Box::new(Context::new(self, driver, ordinal)?));
        contexts.insert(ordinal, context);
        Ok(context)
    }

    /// The devices of this machine.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Driver`].
    pub fn devices(&'static self) -> Result<Vec<DeviceInfo>> {
        let driver = self.driver()?;
        let mut count = 0;
        // SAFETY: `count` is written.
        self.check(driver, unsafe { driver.device_count(&mut count) })?;
        (0..u32::try_from(count).unwrap_or(0)).map(|ordinal| self.describe(driver, ordinal)).collect()
    }

    fn describe(&self, driver: &Driver, ordinal: u32) -> Result<DeviceInfo> {
        let (mut device, mut bytes, mut name) = (0, 0, [0u8; 256]);
        // SAFETY: `device` is written.
        self.check(driver, unsafe { driver.device(&mut device, ordinal as i32) })?;
        // SAFETY: `bytes` is written.
        self.check(driver, unsafe { driver.device_memory(&mut bytes, device) })?;
        // SAFETY: at most 255 bytes of `name` are written.
        self.check(driver, unsafe { driver.device_name(name.as_mut_ptr().cast(), 255, device) })?;
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        Ok(DeviceInfo::new(ordinal, String::from_utf8_lossy(&name[..end]), bytes as u64))
    }

    /// Architecture and number of multiprocessors of a device, without a context on it.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn arch(&self, driver: &Driver, ordinal: u32) -> Result<(String, u32)> {
        let device = self.device(driver, ordinal)?;
        let units = self.ask(driver, device, self.facts.codes.units)?;
        Ok(((self.facts.target)(&self.asked(driver, device, String::new())?)?.0, units))
    }

    /// A figure of a device.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn ask(&self, driver: &Driver, device: i32, attribute: i32) -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is written.
        self.check(driver, unsafe { driver.device_attribute(&mut value, attribute, device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// What a device, called `name`, says of itself.
    ///
    /// # Errors
    /// [`Error::Driver`], [`Error::Unavailable`].
    pub(crate) fn asked(&self, driver: &Driver, device: i32, name: String) -> Result<Asked> {
        let (codes, ask) = (&self.facts.codes, |attribute| self.ask(driver, device, attribute));
        Ok(Asked {
            major: ask(codes.capability[0])?,
            minor: ask(codes.capability[1])?,
            block_bytes: ask(codes.block_bytes)?,
            unit_bytes: ask(codes.unit_bytes)?,
            arch: driver.arch_name(device)?,
            name,
        })
    }

    /// Whether device `a` can access memory of device `b`.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn reaches(&self, driver: &Driver, a: u32, b: u32) -> Result<bool> {
        let (from, to) = (self.device(driver, a)?, self.device(driver, b)?);
        let mut can = 0;
        // SAFETY: `can` is written.
        self.check(driver, unsafe { driver.can_access_peer(&mut can, from, to) })?;
        Ok(can != 0)
    }

    /// The driver's number of device `ordinal`.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(crate) fn device(&self, driver: &Driver, ordinal: u32) -> Result<i32> {
        let mut device = 0;
        // SAFETY: `device` is written.
        self.check(driver, unsafe { driver.device(&mut device, ordinal as i32) })?;
        Ok(device)
    }

    /// An error for what a call of the driver returned, unless that is 0.
    pub(crate) fn check(&self, driver: &Driver, returned: longspan_dylib::Returned<i32>) -> Result<()> {
        if returned.value == 0 {
            return Ok(());
        }
        Err(Error::Driver {
            backend: self.facts.name,
            call: returned.call,
            code: i64::from(returned.value),
            message: driver.error_text(returned.value),
        })
    }
}

/// A C string, or a placeholder for null.
///
/// # Safety
/// `text` is null or a C string.
pub(crate) unsafe fn c_text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: by the caller.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
