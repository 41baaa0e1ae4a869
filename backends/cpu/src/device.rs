//! The CPU as a device: memory, streams, events, strided copies. See the ordering contract in `longspan_hal::device`.

use std::any::Any;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::{Caps, Device, Error, Memory, Priority, Result, Strided, View, ViewMut};

use crate::caps::{caps, free_memory};
use crate::clock::HostClock;
use crate::copy;
use crate::event::CpuEvent;
use crate::memory::{Account, Buffer, Purpose};
use crate::personality::Personality;
use crate::stream::CpuStream;
use crate::sync::lock;
use crate::table::Access;

/// How a device handle behaves.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// How exchanges behave.
    pub personality: Personality,
    /// Checked mode: every operation is compared with those before it, and a conflict without an order between them is
    /// an error even when the race did not strike. Fresh memory holds NaN patterns.
    pub checked: bool,
}

impl Options {
    /// Options from their parts.
    pub const fn new(personality: Personality, checked: bool) -> Self {
        Self { personality, checked }
    }
}

/// One rank's handle of the CPU. Clones are the same handle: one account of memory, one host clock.
#[derive(Clone, Debug)]
pub struct CpuDevice(Arc<Core>);

/// What streams and buffers of a handle share.
#[derive(Debug)]
pub(crate) struct Core {
    id: u64,
    backend: &'static str,
    options: Options,
    caps: Caps,
    account: Arc<Account>,
    host: HostClock,
    streams: AtomicU32,
    rank: AtomicU32,
}

/// A handle that joined no group.
const NO_RANK: u32 = u32::MAX;

static NEXT_DEVICE: AtomicU64 = AtomicU64::new(1);

impl CpuDevice {
    /// Opens a handle; `backend` is the name that its errors carry.
    pub fn open(backend: &'static str, options: Options) -> Self {
        Self(Arc::new(Core {
            id: NEXT_DEVICE.fetch_add(1, Ordering::Relaxed),
            backend,
            options,
            caps: caps(!options.personality.packs()),
            account: Arc::default(),
            host: HostClock::default(),
            streams: AtomicU32::new(0),
            rank: AtomicU32::new(NO_RANK),
        }))
    }

    /// How exchanges behave.
    pub fn personality(&self) -> Personality {
        self.0.options.personality
    }

    /// The backend's name, as errors carry it.
    pub fn backend(&self) -> &'static str {
        self.0.backend
    }

    /// The rank that messages name from now on.
    pub(crate) fn set_rank(&self, rank: u32) {
        self.0.rank.store(rank, Ordering::Relaxed);
    }

    /// Memory that peers of `group` may write.
    pub(crate) fn window(&self, bytes: usize, group: u64) -> Result<Buffer> {
        Buffer::alloc(bytes, self.purpose(Some(group)), &self.0.account)
    }

    fn purpose(&self, window: Option<u64>) -> Purpose {
        Purpose { poison: self.0.options.checked || cfg!(debug_assertions), window }
    }
}

impl Core {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn backend(&self) -> &'static str {
        self.backend
    }

    pub(crate) fn checked(&self) -> bool {
        self.options.checked
    }

    pub(crate) fn host(&self) -> &HostClock {
        &self.host
    }

    /// The rank in the group that the handle joined last.
    pub(crate) fn rank(&self) -> Option<u32> {
        Some(self.rank.load(Ordering::Relaxed)).filter(|&rank| rank != NO_RANK)
    }

    /// The number of the next stream.
    pub(crate) fn next_stream(&self) -> u32 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }
}

impl Device for CpuDevice {
    type Buffer = Buffer;
    type Stream = CpuStream;
    type Event = CpuEvent;

    fn caps(&self) -> &Caps {
        &self.0.caps
    }

    fn memory(&self) -> Result<Memory> {
        Ok(Memory::new(self.0.account.used(), self.0.account.peak(), free_memory()))
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Buffer::alloc(bytes, self.purpose(None), &self.0.account)
    }

    unsafe fn adopt(
        &self,
        ptr: *mut c_void,
        bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Buffer> {
        Buffer::adopt(ptr, bytes, owner, self.purpose(None))
    }

    fn bytes(buffer: &Buffer) -> usize {
        buffer.bytes()
    }

    fn same(a: &Buffer, b: &Buffer) -> bool {
        a.same(b)
    }

    fn stream(&self, _priority: Priority) -> Result<CpuStream> {
        Ok(CpuStream::new(Arc::clone(&self.0)))
    }

    unsafe fn adopt_stream(&self, _raw: *mut c_void) -> Result<CpuStream> {
        Err(Error::Unsupported {
            backend: self.0.backend,
            what: "a stream that somebody else made: streams of the CPU have no foreign form".to_owned(),
            instead: "make one with `Device::stream`, and synchronize it before the framework goes on".to_owned(),
        })
    }

    fn record(&self, on: &CpuStream) -> Result<CpuEvent> {
        on.record()
    }

    fn wait(&self, on: &CpuStream, event: &CpuEvent) -> Result<()> {
        on.wait(event)
    }

    fn elapsed(&self, from: &CpuEvent, to: &CpuEvent) -> Result<Duration> {
        from.elapsed(to)
    }

    fn synchronize(&self, on: &CpuStream, limit: Duration) -> Result<()> {
        on.synchronize("synchronize", limit)
    }

    fn upload(&self, on: &CpuStream, from: &[u8], to: ViewMut<'_, Self>) -> Result<()> {
        check_bytes(from.len(), to.at())?;
        let mut bytes = Vec::new();
        let refused = |_| Error::OutOfMemory { wanted: from.len() as u64, free: free_memory() };
        bytes.try_reserve_exact(from.len().div_ceil(size_of::<Word>())).map_err(refused)?;
        bytes.extend(from.chunks(size_of::<Word>()).map(word));
        let (buffer, at) = (to.buffer().clone(), *to.at());
        on.submit("upload", vec![Access::write(to)], move || {
            let dense = Strided::dense(at.dtype(), at.extent());
            // SAFETY: `bytes` holds the dense elements, aligned; the view was checked against its buffer, and the
            // ordering contract keeps other operations away.
            unsafe { copy::copy(bytes.as_ptr().cast(), &dense, buffer.ptr(), &at) };
            Ok(())
        })
    }

    fn download(&self, on: &CpuStream, from: View<'_, Self>, to: &mut [u8], limit: Duration) -> Result<()> {
        check_bytes(to.len(), from.at())?;
        let target = Arc::new(Mutex::new(Some(HostBytes(to.as_mut_ptr()))));
        let (buffer, at, lent) = (from.buffer().clone(), *from.at(), Arc::clone(&target));
        on.submit("download", vec![Access::read(from)], move || {
            if let Some(HostBytes(to)) = &*lock(&lent) {
                // SAFETY: `to` has exactly the bytes of the view, and the host waits below, or takes the pointer back
                // under the lock, before it lets go of them. The source is as in `copy`.
                unsafe { pack_bytes(&buffer, &at, *to) };
            }
            Ok(())
        })?;
        let result = on.synchronize("download", limit);
        *lock(&target) = None;
        result
    }

    fn copy(&self, on: &CpuStream, from: View<'_, Self>, to: ViewMut<'_, Self>) -> Result<()> {
        if from.dtype() != to.dtype() || from.extent() != to.extent() {
            let (a, b) = ((from.dtype(), from.extent()), (to.dtype(), to.extent()));
            return Err(Error::invalid("copy", format!("from {} {:?} to {} {:?}", a.0, a.1, b.0, b.1)));
        }
        if to.aliases(from.buffer(), from.at()) {
            return Err(Error::invalid("copy", "source and destination overlap"));
        }
        let accesses = vec![Access::read(from), Access::write(to)];
        let (source, target) = (accesses[0].clone(), accesses[1].clone());
        on.submit("copy", accesses, move || {
            copy_between(&source.buffer, &source.at, &target.buffer, &target.at);
            Ok(())
        })
    }

    fn fill(&self, on: &CpuStream, value: f32, to: ViewMut<'_, Self>) -> Result<()> {
        let (buffer, at) = (to.buffer().clone(), *to.at());
        on.submit("fill", vec![Access::write(to)], move || {
            // SAFETY: the view was checked against its buffer, and the ordering contract keeps others away.
            unsafe { copy::fill(value, buffer.ptr(), &at) };
            Ok(())
        })
    }
}

/// Copies between views of equal dtype and extent in memory that a running operation registered.
pub(crate) fn copy_between(from: &Buffer, at_from: &Strided, to: &Buffer, at_to: &Strided) {
    // SAFETY: views are checked against their buffers where they are made; the running operations on both sides have
    // registered them as read and written, so others are kept away by the ordering contract; both buffers are alive.
    unsafe { copy::copy(from.ptr(), at_from, to.ptr(), at_to) };
}

/// Host bytes on loan to a stream.
struct HostBytes(*mut u8);

// SAFETY: the pointer is used under the lock that holds it only, while its lender waits.
unsafe impl Send for HostBytes {}

/// Holds uploads with the alignment of any element.
type Word = u64;

fn word(bytes: &[u8]) -> Word {
    let mut word = [0; size_of::<Word>()];
    word[..bytes.len()].copy_from_slice(bytes);
    Word::from_ne_bytes(word)
}

/// # Safety
/// As [`copy::copy`]; `to` has the bytes of the elements and need not be aligned.
unsafe fn pack_bytes(from: &Buffer, at: &Strided, to: *mut u8) {
    let dense = Strided::dense(at.dtype(), at.extent());
    if at.is_dense() {
        // SAFETY: the elements lie without gaps from the view's offset.
        unsafe { to.copy_from_nonoverlapping(from.ptr().add(at.byte_range().start), at.bytes()) };
    } else if (to as usize).is_multiple_of(at.dtype().size()) {
        // SAFETY: aligned, and by the caller.
        unsafe { copy::copy(from.ptr(), at, to, &dense) };
    } else {
        let mut aligned: Vec<Word> = vec![0; at.bytes().div_ceil(size_of::<Word>())];
        // SAFETY: `aligned` holds the dense elements.
        unsafe { copy::copy(from.ptr(), at, aligned.as_mut_ptr().cast(), &dense) };
        // SAFETY: both have the bytes of the elements.
        unsafe { to.copy_from_nonoverlapping(aligned.as_ptr().cast(), at.bytes()) };
    }
}

fn check_bytes(have: usize, at: &Strided) -> Result<()> {
    if have == at.bytes() {
        return Ok(());
    }
    Err(Error::invalid("host bytes", format!("{have} bytes for a view of {} bytes", at.bytes())))
}
