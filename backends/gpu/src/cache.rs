//! Machine code on disk, so that a kernel is compiled once per machine.
//!
//! A file is named by its key: a hash of everything that determines the code. It holds a head (magic, key, length, hash of the
//! code) and the code. It is written under a temporary name and renamed, so that readers in other processes see all of it or
//! nothing. A file that is not what its head says is treated as absent and is replaced. A folder that can't be written costs a
//! warning, once.
//!
//! The folder: `LONGSPAN_CACHE`, else `longspan/` in `XDG_CACHE_HOME`, else in `~/.cache`.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use longspan_hal::{Error, Result};

use crate::jit::say;

/// A folder of machine code. Without a folder, nothing is found and nothing is kept.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

/// What determines machine code.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Key(u128);

/// What [`Cache::clear`] removed, or [`Cache::figures`] counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Figures {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

const MAGIC: &[u8; 8] = b"LSPKERN1";
const HEAD: usize = 8 + 16 + 8 + 16;
const EXTENSION: &str = "kernel";
const TEMPORARY: &str = "tmp";

/// Age of a temporary file that nobody writes any more.
const ABANDONED: Duration = Duration::from_secs(60);

static WARNED: AtomicBool = AtomicBool::new(false);
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Key {
    /// The key of everything that determines the code, such as source, flags, compiler version and architecture.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        Self(parts.into_iter().fold(FNV_OFFSET, |h, part| {
            // The length keeps parts from running together.
            fnv1a(fnv1a(h, &(part.len() as u64).to_le_bytes()), part.as_bytes())
        }))
    }

    fn file(self) -> String {
        format!("{:032x}.{EXTENSION}", self.0)
    }
}

impl Cache {
    /// The user's cache for a backend.
    pub fn open(backend: &str) -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        Self { folder: folder(variable).map(|f| f.join(backend)) }
    }

    /// The cache in `folder`.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()) }
    }

    /// Where it is.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The code of `key`, if it is there and whole.
    pub fn get(&self, key: Key) -> Option<Vec<u8>> {
        let mut file = fs::read(self.folder.as_ref()?.join(key.file())).ok()?;
        let whole = file.split_at_checked(HEAD).is_some_and(|(start, code)| start == head(key, code));
        let code = whole.then(|| file.split_off(HEAD));
        if code.is_none() {
            say(&format!("{} in the kernel cache is damaged; it is made again", key.file()));
        }
        code
    }

    /// Keeps `code`. Where that is not possible, says so once and goes on.
    pub fn put(&self, key: Key, code: &[u8]) {
        let Some(folder) = &self.folder else { return };
        if let Err(error) = write(folder, key, code)
            && !WARNED.swap(true, Ordering::Relaxed)
        {
            let folder = folder.display();
            say(&format!("kernels can't be kept in {folder} ({error}); every process compiles them again"));
        }
    }

    /// Number and bytes of its files.
    pub fn figures(&self) -> Figures {
        self.files()
            .into_iter()
            .fold(Figures::default(), |sum, (_, bytes)| Figures { files: sum.files + 1, bytes: sum.bytes + bytes })
    }

    /// Removes its files, but for those that another process may be writing.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first file that can't be removed.
    pub fn clear(&self) -> Result<Figures> {
        let mut removed = Figures::default();
        for (path, bytes) in self.files().into_iter().filter(|(path, _)| !is_being_written(path)) {
            match fs::remove_file(&path) {
                Ok(()) => removed = Figures { files: removed.files + 1, bytes: removed.bytes + bytes },
                // Since it was listed, somebody else has renamed or removed it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::invalid("cache", format!("{}: {e}", path.display()))),
            }
        }
        Ok(removed)
    }

    fn files(&self) -> Vec<(PathBuf, u64)> {
        let Some(Ok(list)) = self.folder.as_ref().map(fs::read_dir) else { return Vec::new() };
        let ours = |path: &PathBuf| path.extension().is_some_and(|e| e == EXTENSION || e == TEMPORARY);
        let sized = |path: PathBuf| fs::metadata(&path).ok().map(|m| (path, m.len()));
        list.flatten().map(|entry| entry.path()).filter(ours).filter_map(sized).collect()
    }
}

/// Whether a file is a temporary one that is so young that its writer may still want to rename it.
fn is_being_written(path: &Path) -> bool {
    let modified = || fs::metadata(path).and_then(|m| m.modified());
    path.extension().is_some_and(|e| e == TEMPORARY)
        && modified().is_ok_and(|at| at.elapsed().map_or(true, |age| age < ABANDONED))
}

fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name| variable(name).map(PathBuf::from);
    path("LONGSPAN_CACHE")
        .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("longspan")))
        .or_else(|| path("HOME").map(|p| p.join(".cache/longspan")))
}

fn head(key: Key, code: &[u8]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(key.0.to_le_bytes());
    head.extend((code.len() as u64).to_le_bytes());
    head.extend(fnv1a(FNV_OFFSET, code).to_le_bytes());
    head
}

fn write(folder: &Path, key: Key, code: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let unique = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!("{:032x}-{}-{unique}.{TEMPORARY}", key.0, std::process::id()));
    let fill = || -> io::Result<()> {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&head(key, code))?;
        file.write_all(code)?;
        drop(file);
        fs::rename(&temporary, folder.join(key.file()))
    };
    let result = fill();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

const FNV_OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const FNV_PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

/// FNV-1a over 128 bits.
fn fnv1a(start: u128, bytes: &[u8]) -> u128 {
    bytes.iter().fold(start, |h, b| (h ^ u128::from(*b)).wrapping_mul(FNV_PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::at(folder.path().join("a/b"));
        (folder, cache)
    }

    #[test]
    fn what_is_put_is_found_under_its_own_key_only() {
        let (_folder, cache) = temporary();
        let (a, b) = (Key::of(["x", "y"]), Key::of(["xy", ""]));
        assert_ne!(a, b);
        assert_eq!(cache.get(a), None);
        cache.put(a, b"code");
        assert_eq!(cache.get(a).as_deref(), Some(&b"code"[..]));
        assert_eq!(cache.get(b), None);
        cache.put(b, b"");
        assert_eq!(cache.get(b).as_deref(), Some(&b""[..]));
        assert_eq!(cache.figures(), Figures { files: 2, bytes: 2 * HEAD as u64 + 4 });
        assert_eq!(cache.clear().expect("writable").files, 2);
        assert_eq!((cache.get(a), cache.figures()), (None, Figures::default()));
    }

    #[test]
    fn every_kind_of_damage_is_found_and_repaired() {
        let (_folder, cache) = temporary();
        let key = Key::of(["k"]);
        let code: Vec<u8> = (0..200).collect();
        cache.put(key, &code);
        let path = cache.folder().expect("given").join(key.file());
        let whole = fs::read(&path).expect("written");
        let mut flipped: Vec<Vec<u8>> = (0..whole.len()).map(|_| whole.clone()).collect();
        flipped.iter_mut().enumerate().for_each(|(i, bytes)| bytes[i] ^= 1);
        let cut = (0..whole.len()).map(|n| whole[..n].to_vec());
        let longer = [whole.clone(), b"x".to_vec()].concat();
        for damaged in flipped.into_iter().chain(cut).chain([longer]) {
            fs::write(&path, &damaged).expect("writable");
            assert_eq!(cache.get(key), None);
        }
        // Another kernel's file under this name.
        let other = Key::of(["other"]);
        cache.put(other, &code);
        fs::copy(cache.folder().expect("given").join(other.file()), &path).expect("writable");
        assert_eq!(cache.get(key), None);
        cache.put(key, &code);
        assert_eq!(cache.get(key), Some(code));
    }

    #[test]
    fn readers_see_all_or_nothing_while_many_write() {
        let (_folder, cache) = temporary();
        let key = Key::of(["shared"]);
        let code = |n: u8| vec![n; 100_000];
        std::thread::scope(|scope| {
            for n in 0..4 {
                let cache = &cache;
                scope.spawn(move || (0..20).for_each(|_| cache.put(key, &code(n))));
            }
            for _ in 0..200 {
                if let Some(found) = cache.get(key) {
                    assert!((0..4).any(|n| found == code(n)));
                }
            }
        });
        assert!(cache.get(key).is_some());
        // No temporary file is left.
        assert_eq!(cache.figures().files, 1);
    }

    #[test]
    fn clearing_beside_a_writer_takes_nothing_from_it_and_does_not_fail() {
        let (_folder, cache) = temporary();
        let key = Key::of(["k"]);
        cache.put(key, b"code");
        let folder = cache.folder().expect("given");
        let [young, old] = ["young.tmp", "old.tmp"].map(|name| folder.join(name));
        fs::write(&young, b"x").expect("writable");
        let file = fs::File::create(&old).expect("writable");
        file.set_modified(std::time::SystemTime::now() - 2 * ABANDONED).expect("writable");
        assert_eq!(cache.clear().expect("writable").files, 2, "the kernel and what somebody left behind");
        assert!(young.exists() && !old.exists());
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..100).for_each(|_| cache.put(key, b"code")));
            }
            let clear = || (0..100).all(|_| cache.clear().is_ok());
            let both = [scope.spawn(clear), scope.spawn(clear)];
            assert!(both.map(|thread| thread.join().expect("no panic")).into_iter().all(|fine| fine));
        });
        cache.put(key, b"code");
        assert_eq!(cache.get(key).as_deref(), Some(&b"code"[..]));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("file");
        fs::write(&file, b"").expect("writable");
        // A file where a folder should be: nobody, root included, can write below it.
        let cache = Cache::at(file.join("below"));
        cache.put(Key::of(["k"]), b"code");
        assert_eq!(cache.get(Key::of(["k"])), None);
        assert_eq!(cache.clear().expect("nothing to do"), Figures::default());
    }

    /// In a process of its own, whose files may have a kilobyte and no more: writing fails in the middle, as on a full disk.
    #[cfg(unix)]
    #[test]
    fn a_full_disk_is_a_warning_and_nothing_is_half_written() {
        const FOLDER: &str = "LONGSPAN_TEST_FULL_DISK";
        if let Some(folder) = std::env::var_os(FOLDER) {
            let cache = Cache::at(folder);
            (0..3).for_each(|_| cache.put(Key::of(["k"]), &[1; 8192]));
            assert_eq!((cache.get(Key::of(["k"])), cache.figures()), (None, Figures::default()));
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = std::process::Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "sh"])
            .arg(std::env::current_exe().expect("this test"))
            .args(["--exact", "cache::tests::a_full_disk_is_a_warning_and_nothing_is_half_written", "--nocapture"])
            .env(FOLDER, folder.path())
            .env_remove("LONGSPAN_QUIET")
            .output()
            .expect("a shell");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).matches("kernels can't be kept").count(), 1, "{output:?}");
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0, "nothing is left");
    }

    #[test]
    fn the_folder_follows_the_environment() {
        let of = |list: &[(&str, &str)]| {
            let find = |name: &str| list.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            folder(find).map(|p| p.display().to_string())
        };
        assert_eq!(of(&[("LONGSPAN_CACHE", "/c"), ("HOME", "/h")]).as_deref(), Some("/c"));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).as_deref(), Some("/x/longspan"));
        assert_eq!(of(&[("HOME", "/h")]).as_deref(), Some("/h/.cache/longspan"));
        assert_eq!(of(&[]), None);
    }
}
