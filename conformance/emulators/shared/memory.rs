//! Compiled into every emulator. Device and page-locked memory.
//!
//! Device memory is one sparse file in memory, mapped twice: the client's pointers lead into a mapping without any access,
//! the emulator works in the other.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{LazyLock, Mutex};

use crate::state::{CONFIG, code, count, fail, lock, misuse};

/// Fills new and freed memory: NaN in every float type.
const POISON: u8 = 0xFF;
const ALIGN: usize = 512;

struct Arena {
    client: usize,
    mine: usize,
    size: usize,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// Live allocations: offset to (bytes, id, device).
    live: BTreeMap<usize, (usize, u64, u32)>,
    /// Free gaps: offset to bytes.
    free: BTreeMap<usize, usize>,
    next: u64,
    used: usize,
    peak: usize,
}

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
        if file < 0 || libc::ftruncate(file, size as libc::off_t) != 0 {
            return None;
        }
        let map =
            |access| libc::mmap(std::ptr::null_mut(), size, access, libc::MAP_SHARED | libc::MAP_NORESERVE, file, 0);
        let (client, mine) = (map(libc::PROT_NONE), map(libc::PROT_READ | libc::PROT_WRITE));
        libc::close(file);
        if client == libc::MAP_FAILED || mine == libc::MAP_FAILED {
            return None;
        }
        let blocks = Blocks { free: [(0, size)].into(), ..Blocks::default() };
        Some(Arena { client: client as usize, mine: mine as usize, size, blocks: Mutex::new(blocks) })
    }
});

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
    let Some((size, ..)) = blocks.live.remove(&at) else {
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
        // SAFETY: the whole mapping is the arena's own. If it fails, a kernel (or the host) meets a fault, which is the point.
        unsafe { libc::mprotect(arena.client as *mut c_void, arena.size, access) };
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
        match lock(&arena.blocks).live.get(&self.block) {
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
