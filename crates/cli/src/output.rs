//! Tensors out to a safetensors file: all of it or nothing.
//!
//! The file is written under a temporary name in the same folder, flushed to disk and renamed, so that no reader ever sees
//! a part of it and a run that fails leaves what was there.

use std::borrow::Cow;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, View, serialize_to_file};
use tempfile::NamedTempFile;

use crate::failure::{Failure, Result};

/// One tensor of the file.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// Its name.
    pub name: &'static str,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, little endian, row major.
    pub bytes: &'a [u8],
}

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Checks, before anything runs, that `output` can be written, and that it is not `input`.
///
/// # Errors
/// [`Failure::Input`] saying what is wrong; nothing is left behind.
pub fn check(output: &Path, input: Option<&Path>) -> Result<()> {
    let bad = |why: String| Err(Failure::input(format!("output {}", output.display()), why));
    if output.file_name().is_none() {
        return bad("is not the name of a file".into());
    }
    if let Ok(meta) = fs::metadata(output) {
        if !meta.is_file() {
            return bad("exists and is not a regular file".into());
        }
        if input.is_some_and(|input| same_file(input, output)) {
            return bad("is the input file; choose another name".into());
        }
    }
    if fs::symlink_metadata(output).is_ok_and(|meta| meta.is_symlink()) {
        return bad("is a symbolic link; name the file itself".into());
    }
    match temporary(output) {
        Ok(_removed_on_drop) => Ok(()),
        Err(e) => bad(format!("cannot be written: {e}")),
    }
}

/// [`check`]s every output of a command, and that no two are one.
///
/// # Errors
/// As [`check`].
pub fn check_all(outputs: &[&Option<PathBuf>], input: Option<&Path>) -> Result<()> {
    let outputs: Vec<&PathBuf> = outputs.iter().copied().flatten().collect();
    for (i, path) in outputs.iter().enumerate() {
        check(path, input)?;
        if outputs[..i].iter().any(|other| same_place(other, path)) {
            return Err(Failure::input(format!("output {}", path.display()), "is named twice; choose two names"));
        }
    }
    Ok(())
}

/// Writes `entries` to `output`, replacing what is there.
///
/// # Errors
/// [`Failure::Run`]; `output` is then as it was.
pub fn write(output: &Path, entries: &[Entry<'_>]) -> Result<()> {
    let named = entries.iter().map(|entry| (entry.name, entry));
    write_with(output, |file| serialize_to_file(named, None, file).map_err(Failure::run))
}

/// Writes `text` to `output`, replacing what is there.
///
/// # Errors
/// [`Failure::Run`]; `output` is then as it was.
pub fn write_text(output: &Path, text: &str) -> Result<()> {
    write_with(output, |file| fs::write(file, text).map_err(Failure::run))
}

/// Whether two paths, of which neither need exist, name one place in one folder.
fn same_place(a: &Path, b: &Path) -> bool {
    a.file_name() == b.file_name() && same_file(&folder(a), &folder(b)) || same_file(a, b)
}

/// Writes `output` with `fill`, which is given the path of a temporary file in the same folder.
///
/// # Errors
/// [`Failure::Run`]; `output` is then as it was.
pub fn write_with(output: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let bad = |e: &dyn std::fmt::Display| Failure::Run(format!("output {} was not written: {e}", output.display()));
    let file = temporary(output).map_err(|e| bad(&e))?;
    fill(file.path()).map_err(|e| bad(&e))?;
    File::open(file.path()).and_then(|f| f.sync_all()).map_err(|e| bad(&e))?;
    file.persist(output).map_err(|e| bad(&e.error))?;
    Ok(())
}

/// An empty file in the folder of `output`, removed when dropped, with the permissions that a new file gets.
fn temporary(output: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".longspan-").suffix(".tmp");
    #[cfg(unix)]
    let rights = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(rights);
    builder.tempfile_in(folder(output))
}

fn folder(output: &Path) -> PathBuf {
    match output.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether two existing paths name one file, also through links.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(a), Ok(b)) = (fs::metadata(a), fs::metadata(b)) {
            return (a.dev(), a.ino()) == (b.dev(), b.ino());
        }
    }
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(bytes: &[u8]) -> Entry<'_> {
        Entry { name: "lse", dtype: Dtype::F32, shape: vec![bytes.len() / 4], bytes }
    }

    #[test]
    fn replaces_a_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out.safetensors");
        fs::write(&path, "old").expect("writable");
        check(&path, None).expect("writable");
        assert_eq!(fs::read(&path).expect("still there"), b"old", "checking writes nothing");
        write(&path, &[entry(&[0, 0, 128, 63])]).expect("writable");
        let bytes = fs::read(&path).expect("written");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
        assert_eq!(file.tensor("lse").expect("there").data(), [0, 0, 128, 63]);
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "no temporary file is left");
    }

    #[cfg(unix)]
    #[test]
    fn refuses_the_input_under_another_name_and_devices() {
        let folder = tempfile::tempdir().expect("a folder");
        let (a, b, c) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
        fs::write(&a, "x").expect("writable");
        fs::hard_link(&a, &b).expect("links");
        std::os::unix::fs::symlink(&a, &c).expect("links");
        for same in [&a, &b, &c] {
            let why = check(same, Some(&a)).expect_err("the same file").to_string();
            assert!(why.contains("is the input file"), "{why}");
        }
        assert!(check(&c, None).is_err_and(|e| e.to_string().contains("symbolic link")));
        assert!(check(Path::new("/dev/null"), None).is_err_and(|e| e.to_string().contains("not a regular file")));
        assert!(check(folder.path(), None).is_err_and(|e| e.to_string().contains("not a regular file")));
        assert!(
            check(&folder.path().join("no/such"), None).is_err_and(|e| e.to_string().contains("cannot be written"))
        );
    }
}
