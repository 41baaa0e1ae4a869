//! Compiled into every emulator, which brings its vendor's `code`s. What the whole process shares: configuration, handles, counters, and the list of misuses.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use crate::code;

/// Locks; a panic of another thread does not matter here.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Configuration from the environment.
pub struct Config {
    pub devices: u32,
    pub memory: usize,
    pub delay: u64,
    pub seed: u64,
    pub timeout: Duration,
    pub loud: bool,
}

/// The configuration of this process.
pub static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    Config {
        devices: number("LONGSPAN_EMULATOR_DEVICES", 8) as u32,
        memory: (number("LONGSPAN_EMULATOR_MEMORY_MIB", 16 * 1024) as usize) << 20,
        delay: number("LONGSPAN_EMULATOR_DELAY_US", 100),
        seed: number("LONGSPAN_EMULATOR_SEED", 1),
        timeout: Duration::from_millis(number("LONGSPAN_EMULATOR_TIMEOUT_MS", 30_000)),
        loud: number("LONGSPAN_EMULATOR_LOUD", 0) != 0,
    }
});

/// Live objects by handle. Handles are numbers that look like pointers into nothing, and are never used again.
pub struct Handles<T>(LazyLock<Mutex<HashMap<usize, Arc<T>>>>);

static NEXT_HANDLE: AtomicUsize = AtomicUsize::new(0x10_0000);

impl<T> Handles<T> {
    pub const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    pub fn add(&self, object: T) -> *mut c_void {
        let handle = NEXT_HANDLE.fetch_add(16, Ordering::Relaxed);
        lock(&self.0).insert(handle, Arc::new(object));
        handle as *mut c_void
    }

    pub fn get(&self, handle: *const c_void) -> Option<Arc<T>> {
        lock(&self.0).get(&(handle as usize)).cloned()
    }

    pub fn remove(&self, handle: *const c_void) -> Option<Arc<T>> {
        lock(&self.0).remove(&(handle as usize))
    }

    pub fn len(&self) -> usize {
        lock(&self.0).len()
    }
}

static COUNTS: LazyLock<Mutex<BTreeMap<String, u64>>> = LazyLock::new(Mutex::default);
static MISUSES: LazyLock<Mutex<Vec<String>>> = LazyLock::new(Mutex::default);
static RANDOM: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Adds to a counter of the report.
pub fn count(name: &str, by: u64) {
    let mut counts = lock(&COUNTS);
    if let Some(n) = counts.get_mut(name) {
        *n += by;
    } else {
        counts.insert(name.to_owned(), by);
    }
}

/// Notes a misuse and sets this thread's message; returns `code`.
pub fn misuse(code: i32, text: impl Into<String>) -> i32 {
    let text = text.into();
    if CONFIG.loud {
        eprintln!("misuse: {text}");
    }
    lock(&MISUSES).push(text.clone());
    fail(code, text)
}

/// Sets this thread's message; returns `code`.
pub fn fail(code: i32, text: impl Into<String>) -> i32 {
    let text = CString::new(text.into()).unwrap_or_default();
    MESSAGE.with(|m| *m.borrow_mut() = text);
    code
}

/// This thread's last message.
pub fn message() -> *const c_char {
    MESSAGE.with(|m| m.borrow().as_ptr())
}

/// A random number below `n`, from the seed of the process.
pub fn random(n: u64) -> u64 {
    let step = RANDOM.fetch_add(1, Ordering::Relaxed).wrapping_add(CONFIG.seed.wrapping_mul(0x9e37_79b9));
    let mut x = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) % n.max(1)
}

/// A counter of the report by its C name, such as `launch aclnnExp`, `bytes sent`, `memory peak`.
///
/// # Safety
/// `name` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn longspan_emulator_count(name: *const c_char) -> u64 {
    // SAFETY: by the caller.
    let name = unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy();
    lock(&COUNTS).get(name.as_ref()).copied().unwrap_or(0)
}

/// Number of misuses so far; with `print` not 0, each on standard error.
#[unsafe(no_mangle)]
pub extern "C" fn longspan_emulator_misuses(print: i32) -> u64 {
    let misuses = lock(&MISUSES);
    if print != 0 {
        misuses.iter().for_each(|m| eprintln!("misuse: {m}"));
    }
    misuses.len() as u64
}

/// Prints all counters and misuses on standard error.
pub fn print_counts() {
    for (name, n) in lock(&COUNTS).iter() {
        eprintln!("{name}: {n}");
    }
    eprintln!("misuses: {}", longspan_emulator_misuses(1));
}
