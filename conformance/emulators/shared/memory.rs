//! Compiled into every emulator. Device and page-locked memory.
//!
//! Device memory is one sparse file in memory, mapped twice: the client's pointers lead into a mapping without any access,
//! the emulator works in the other. Behind it the file has a table of what other processes have open, and behind the mappings
//! there is room for memory of other processes.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};

use crate::state::{CONFIG, code, count, fail, lock, misuse};

/// Fills new and freed memory: NaN in every float type.
const POISON: u8 = 0xFF;
const ALIGN: usize = 512;

struct Arena {
    client: usize,
    mine: usize,
    size: usize,
    file: i32,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// Live allocations: offset to (bytes, id, device).
    live: BTreeMap<usize, (usize, u64, u32)>,
    /// Free gaps: offset to bytes.
    free: BTreeMap<usize, usize>,
    /// What other processes may open: offset to its slot in the table.
    exports: BTreeMap<usize, usize>,
    /// Memory of other processes: offset of its pages to what it is.
    imports: BTreeMap<usize, Import>,
    next: u64,
    used: usize,
    peak: usize,
}

/// Memory of another process.
struct Import {
    /// Bytes of its pages.
    pages: usize,
    /// Where it starts, and its size.
    block: usize,
    slot: &'static Slot,
    /// What it is in its own process.
    id: u64,
}

/// An entry of the table behind the blocks.
struct Slot {
    /// The allocation; 0 once it was freed.
    id: AtomicU64,
    /// Processes that have it open.
    open: [AtomicU32; 14],
}

const SLOTS: usize = 1024;
const TABLE: usize = SLOTS * size_of::<Slot>();
const PAGE: usize = 4096;
/// Marks a handle of exported memory.
const EXPORTED: u64 = 0x6c6f_6e67_7370_616e;

/// Part of an allocation, found when a call was made; good until the allocation is freed.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    offset: usize,
    bytes: usize,
    block: usize,
    id: u64,
}

static ARENA: LazyLock<Option<Arena>> = LazyLock::new(|| {
    let size = CONFIG.memory;
    // SAFETY: plain system calls with valid arguments; failures are checked.
    unsafe {
        let file = libc::memfd_create(c"longspan-emulator".as_ptr(), libc::MFD_CLOEXEC);
        if file < 0 || libc::ftruncate(file, (size + TABLE) as libc::off_t) != 0 {
            return None;
        }
        let map = |access, bytes| {
            let nowhere = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), 2 * size + TABLE, libc::PROT_NONE, nowhere, -1, 0);
            if at == libc::MAP_FAILED || !map_file(at as usize, bytes, access, file, 0) {
                None
            } else {
                Some(at as usize)
            }
        };
        let mine = map(libc::PROT_READ | libc::PROT_WRITE, size + TABLE)?;
        let blocks = Blocks { free: [(0, size)].into(), ..Blocks::default() };
        Some(Arena { client: map(libc::PROT_NONE, size)?, mine, size, file, blocks: Mutex::new(blocks) })
    }
});

/// Maps part of a file over what is at `at`.
///
/// # Safety
/// The pages there are the arena's own, and nobody uses what they held.
unsafe fn map_file(at: usize, bytes: usize, access: i32, file: i32, offset: usize) -> bool {
    let how = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: by the caller.
    unsafe { libc::mmap(at as *mut c_void, bytes, access, how, file, offset as libc::off_t) != libc::MAP_FAILED }
}

/// Page-locked host memory: address to bytes.
static PINNED: LazyLock<Mutex<BTreeMap<usize, usize>>> = LazyLock::new(Mutex::default);

/// Allocates device memory. Behind it lies a stretch of its own that nobody may write.
pub fn allocate(bytes: usize, device: u32) -> Result<*mut c_void, i32> {
    let arena = ARENA.as_ref().ok_or_else(|| fail(code::MEMORY, "no address space"))?;
    let size = bytes.max(1).checked_next_multiple_of(ALIGN).and_then(|size| size.checked_add(ALIGN));
    let size = size.ok_or_else(|| fail(code::MEMORY, "size overflows"))?;
    let mut blocks = lock(&arena.blocks);
    let gap = blocks.free.iter().find(|(_, have)| **have >= size).map(|(at, have)| (*at, *have));
    let Some((at, have)) = gap else { return Err(fail(code::MEMORY, format!("no {bytes} bytes left"))) };
    blocks.free.remove(&at);
    if have > size {
        blocks.free.insert(at + size, have - size);
    }
    blocks.next += 1;
    let id = blocks.next;
    blocks.live.insert(at, (size, id, device));
    blocks.used += size;
    if blocks.used > blocks.peak {
        count("memory peak", (blocks.used - blocks.peak) as u64);
        blocks.peak = blocks.used;
    }
    drop(blocks);
    // SAFETY: the block lies inside the arena's own mapping.
    unsafe { std::ptr::write_bytes((arena.mine + at) as *mut u8, POISON, size) };
    Ok((arena.client + at) as *mut c_void)
}

/// Frees device memory at once, whatever is queued.
pub fn free(pointer: *mut c_void) -> i32 {
    let Some(arena) = ARENA.as_ref() else { return code::INVALID };
    let at = (pointer as usize).wrapping_sub(arena.client);
    let mut blocks = lock(&arena.blocks);
    if let Some(slot) = blocks.exports.remove(&at) {
        arena.withdraw(slot);
    }
    let own = if at < arena.size { blocks.live.remove(&at) } else { None };
    let Some((size, ..)) = own else {
        return misuse(code::INVALID, "a free of device memory that is not allocated (freed twice?)");
    };
    // SAFETY: the block lies inside the arena's own mapping. Large blocks go back to the system; they read as 0 then, and are
    // poisoned when they are allocated again.
    unsafe {
        let memory = (arena.mine + at) as *mut u8;
        if std::slice::from_raw_parts(memory.add(size - ALIGN), ALIGN).iter().any(|b| *b != POISON) {
            misuse(code::EXCEPTION, "something was written behind an allocation");
        }
        if size >= 1 << 20 && at % 4096 == 0 {
            libc::madvise(memory.cast(), size & !4095, libc::MADV_REMOVE);
        } else {
            std::ptr::write_bytes(memory, POISON, size);
        }
    }
    blocks.used -= size;
    let (mut start, mut length) = (at, size);
    if let Some((&before, &have)) = blocks.free.range(..at).next_back()
        && before + have == at
    {
        blocks.free.remove(&before);
        (start, length) = (before, have + length);
    }
    if let Some(have) = blocks.free.remove(&(at + size)) {
        length += have;
    }
    blocks.free.insert(start, length);
    code::OK
}

/// Number of kernels that run, which alone may use the client's mapping.
static OPEN: Mutex<u32> = Mutex::new(0);

/// The client's mapping can be accessed while this lives.
pub struct Open;

/// Opens the client's mapping to a kernel.
pub fn open() -> Open {
    let mut kernels = lock(&OPEN);
    if *kernels == 0 {
        protect(libc::PROT_READ | libc::PROT_WRITE);
    }
    *kernels += 1;
    Open
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut kernels = lock(&OPEN);
        *kernels -= 1;
        if *kernels == 0 {
            protect(libc::PROT_NONE);
        }
    }
}

fn protect(access: i32) {
    if let Some(arena) = ARENA.as_ref() {
        // SAFETY: the mappings are the arena's own. If it fails, a kernel (or the host) meets a fault, which is the point.
        unsafe {
            libc::mprotect(arena.client as *mut c_void, arena.size, access);
            for (at, import) in &lock(&arena.blocks).imports {
                libc::mprotect((arena.client + at) as *mut c_void, import.pages, access);
            }
        }
    }
}

/// The device that memory at `pointer` was allocated on.
pub fn owner(pointer: *const c_void) -> Option<u32> {
    let arena = ARENA.as_ref()?;
    let offset = (pointer as usize).checked_sub(arena.client)?;
    let blocks = lock(&arena.blocks);
    let (&block, &(size, _, device)) = blocks.live.range(..=offset).next_back()?;
    (offset < block + size).then_some(device)
}

/// Free and total bytes.
pub fn figures() -> (usize, usize) {
    ARENA.as_ref().map_or((0, 0), |a| (a.size - lock(&a.blocks).used, a.size))
}

/// Device memory at `pointer`, if it is `bytes` of one live allocation.
pub fn span(pointer: *const c_void, bytes: usize) -> Option<Span> {
    let arena = ARENA.as_ref()?;
    let offset = (pointer as usize).checked_sub(arena.client)?;
    let blocks = lock(&arena.blocks);
    let (&block, &(size, id, _)) = blocks.live.range(..=offset).next_back()?;
    (offset + bytes <= block + size - ALIGN).then_some(Span { offset, bytes, block, id })
}

impl Span {
    /// The emulator's own address of it, if the allocation still lives.
    pub fn address(&self) -> Result<*mut u8, i32> {
        let Some(arena) = ARENA.as_ref() else { return Err(code::EXCEPTION) };
        let blocks = lock(&arena.blocks);
        let foreign = blocks.imports.range(..=self.block).next_back().map(|(_, import)| import);
        if foreign.is_some_and(|i| i.block == self.block && i.slot.id.load(Ordering::Acquire) != i.id) {
            return Err(misuse(code::EXCEPTION, "queued work ran after another process freed its memory"));
        }
        match blocks.live.get(&self.block) {
            Some((_, id, _)) if *id == self.id => Ok((arena.mine + self.offset) as *mut u8),
            _ => Err(misuse(code::EXCEPTION, "queued work ran after its device memory was freed")),
        }
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills it with NaN bits.
    pub fn poison(&self) -> Result<(), i32> {
        let to = self.address()?;
        // SAFETY: the allocation lives and has these bytes.
        unsafe { std::ptr::write_bytes(to, POISON, self.bytes) };
        Ok(())
    }
}

impl Arena {
    fn slot(&self, slot: usize) -> &'static Slot {
        // SAFETY: the table lies behind the blocks, in a mapping that is never undone.
        unsafe { &*((self.mine + self.size) as *const Slot).add(slot) }
    }

    /// The memory of a slot is freed.
    fn withdraw(&self, slot: usize) {
        let slot = self.slot(slot);
        slot.id.store(0, Ordering::Release);
        for pid in slot.open.iter().map(|pid| pid.swap(0, Ordering::AcqRel)).filter(|pid| *pid != 0) {
            if lives(pid) {
                misuse(code::EXCEPTION, format!("memory was freed that process {pid} has open"));
            }
        }
    }
}

/// Whether a process runs: also one that ended is there until it was waited for.
fn lives(pid: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// A handle for other processes of the allocation that starts at `pointer`.
pub fn export(pointer: *const c_void) -> Result<[u64; 8], i32> {
    let arena = ARENA.as_ref().ok_or(code::INVALID)?;
    let at = (pointer as usize).wrapping_sub(arena.client);
    let mut blocks = lock(&arena.blocks);
    let own = if at < arena.size { blocks.live.get(&at).copied() } else { None };
    let Some((size, id, device)) = own else {
        return Err(misuse(code::INVALID, "a handle of memory that is not the start of an allocation of this process"));
    };
    let slot = match blocks.exports.get(&at) {
        Some(slot) => *slot,
        None => {
            let free = (0..SLOTS).find(|slot| arena.slot(*slot).id.load(Ordering::Acquire) == 0);
            free.ok_or_else(|| fail(code::MEMORY, "too much memory is exported"))?
        }
    };
    arena.slot(slot).id.store(id, Ordering::Release);
    blocks.exports.insert(at, slot);
    let slot = slot as u64 | u64::from(device) << 32;
    Ok([
        EXPORTED,
        u64::from(std::process::id()),
        arena.file as u64,
        at as u64,
        size as u64,
        id,
        slot,
        arena.size as u64,
    ])
}

/// Opens memory of another process.
pub fn import(handle: [u64; 8]) -> Result<*mut c_void, i32> {
    let arena = ARENA.as_ref().ok_or(code::INVALID)?;
    let [magic, pid, file, at, size, id, slot, end] = handle;
    if magic != EXPORTED || pid == u64::from(std::process::id()) {
        return Err(misuse(code::INVALID, "a handle that is none, or of this process's own memory"));
    }
    let (at, size, device) = (at as usize, size as usize, (slot >> 32) as u32);
    let gone = |_| fail(code::INVALID, "the process of a memory handle is gone");
    let theirs = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/fd/{file}")).map_err(gone)?;
    let (first, pages) = (at & !(PAGE - 1), (at % PAGE + size).next_multiple_of(PAGE));
    let kernels = lock(&OPEN);
    let mut blocks = lock(&arena.blocks);
    let mut room = arena.size + TABLE;
    for (at, import) in &blocks.imports {
        if room + pages <= *at {
            break;
        }
        room = at + import.pages;
    }
    // SAFETY: fresh mappings; those of the arena lie in its room for memory of other processes, where nothing is.
    let (mapped, table) = unsafe {
        let (fd, all, how) = (theirs.as_raw_fd(), libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let access = if *kernels > 0 { all } else { libc::PROT_NONE };
        let mapped = room + pages <= 2 * arena.size + TABLE
            && map_file(arena.mine + room, pages, all, fd, first)
            && map_file(arena.client + room, pages, access, fd, first);
        (mapped, libc::mmap(std::ptr::null_mut(), TABLE, all, how, fd, end as libc::off_t))
    };
    if !mapped || table == libc::MAP_FAILED {
        return Err(fail(code::MEMORY, "memory of another process can't be mapped"));
    }
    // SAFETY: the table's mapping is never undone.
    let slot: &'static Slot = unsafe { &*(table as *const Slot).add(slot as u32 as usize) };
    let me = std::process::id();
    let noted = slot.open.iter().any(|o| o.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire).is_ok());
    if !noted || slot.id.load(Ordering::Acquire) != id {
        return Err(misuse(code::INVALID, "memory was opened that its process has freed, or that too many have open"));
    }
    let block = room + at % PAGE;
    blocks.next += 1;
    let own = blocks.next;
    blocks.live.insert(block, (size, own, device));
    blocks.imports.insert(room, Import { pages, block, slot, id });
    Ok((arena.client + block) as *mut c_void)
}

/// Closes memory of another process.
pub fn close(pointer: *mut c_void) -> i32 {
    let Some(arena) = ARENA.as_ref() else { return code::INVALID };
    let block = (pointer as usize).wrapping_sub(arena.client);
    let mut blocks = lock(&arena.blocks);
    let room = blocks.imports.iter().find(|(_, import)| import.block == block).map(|(room, _)| *room);
    let Some((room, import)) = room.and_then(|room| Some((room, blocks.imports.remove(&room)?))) else {
        return misuse(code::INVALID, "memory was closed that is not another process's, or twice");
    };
    blocks.live.remove(&block);
    let me = std::process::id();
    import.slot.open.iter().any(|o| o.compare_exchange(me, 0, Ordering::AcqRel, Ordering::Acquire).is_ok());
    let nowhere = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    for base in [arena.mine, arena.client] {
        // SAFETY: the pages were the import's, in the arena's own room.
        unsafe { libc::mmap((base + room) as *mut c_void, import.pages, libc::PROT_NONE, nowhere, -1, 0) };
    }
    code::OK
}

/// Allocates page-locked host memory.
pub fn allocate_host(bytes: usize) -> *mut c_void {
    // SAFETY: a plain allocation.
    let memory = unsafe { libc::malloc(bytes.max(1)) };
    if !memory.is_null() {
        // SAFETY: just allocated with these bytes.
        unsafe { std::ptr::write_bytes(memory.cast::<u8>(), POISON, bytes) };
        lock(&PINNED).insert(memory as usize, bytes.max(1));
    }
    memory
}

/// Frees page-locked host memory.
pub fn free_host(pointer: *mut c_void) -> i32 {
    match lock(&PINNED).remove(&(pointer as usize)) {
        Some(bytes) => {
            // SAFETY: it came from `allocate_host`, once.
            unsafe {
                std::ptr::write_bytes(pointer.cast::<u8>(), POISON, bytes);
                libc::free(pointer);
            }
            code::OK
        }
        None => misuse(code::INVALID, "a free of host memory that is not allocated"),
    }
}

/// Whether `bytes` at `pointer` are page-locked.
pub fn is_pinned(pointer: *const c_void, bytes: usize) -> bool {
    let at = pointer as usize;
    let pinned = lock(&PINNED);
    pinned.range(..=at).next_back().is_some_and(|(start, have)| at + bytes <= start + have)
}
