//! Memory that processes of one host share: a file in memory, named until everybody mapped it.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Mapped memory, zero at first. Words in it are atomic, since other processes write them.
#[derive(Debug)]
pub(crate) struct Region {
    base: usize,
    bytes: usize,
}

impl Region {
    /// New memory and its name.
    pub(crate) fn create(bytes: usize) -> Result<(Self, PathBuf)> {
        let folder = Path::new("/dev/shm");
        let path = folder.join(format!("longspan-{}-{:016x}", std::process::id(), random()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let region = file.set_len(bytes as u64).and_then(|()| Self::map(&file, bytes));
        match region {
            Ok(region) => Ok((region, path)),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Memory of another process, by its name.
    pub(crate) fn open(path: &Path, bytes: usize) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != bytes as u64 {
            return Err(Error::other("it has another size than this process expects"));
        }
        Self::map(&file, bytes)
    }

    fn map(file: &File, bytes: usize) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of a file that has these bytes.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { base: base as usize, bytes })
    }

    /// Address of the first byte.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// Size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The word at byte `at`.
    pub(crate) fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at + 8 <= self.bytes && at.is_multiple_of(8));
        // SAFETY: inside the mapping, aligned, and only ever accessed as an atomic.
        unsafe { &*((self.base + at) as *const AtomicU64) }
    }

    /// The half word at byte `at`.
    pub(crate) fn half(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at + 4 <= self.bytes && at.is_multiple_of(4));
        // SAFETY: as in `word`.
        unsafe { &*((self.base + at) as *const AtomicU32) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and borrows of its words have ended.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.bytes) };
    }
}

/// A number that no other process has.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Whether process `pid` of this host still runs.
pub(crate) fn lives(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state stands behind the name, which is in parentheses; Z and X are dead.
        Ok(text) => !text.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_writes_the_other_reads() {
        let (a, path) = Region::create(4096).expect("/dev/shm");
        assert!(Region::open(&path, 8192).is_err(), "another size");
        let b = Region::open(&path, 4096).expect("just made");
        std::fs::remove_file(&path).expect("just made");
        assert!(Region::open(&path, 4096).is_err(), "no name any more");
        a.word(8).store(7, Ordering::Release);
        a.half(4092).store(9, Ordering::Release);
        assert_eq!((b.word(8).load(Ordering::Acquire), b.half(4092).load(Ordering::Acquire)), (7, 9));
    }

    #[test]
    fn this_process_lives_and_a_waited_for_child_does_not() {
        let mut child = std::process::Command::new("true").spawn().expect("it starts");
        let pid = child.id();
        // Ended, and nobody asked for its status yet: a zombie.
        let gone = (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            !lives(pid)
        });
        child.wait().expect("it ended");
        assert!(gone && !lives(pid) && lives(std::process::id()));
        assert_ne!(random(), random());
    }
}
