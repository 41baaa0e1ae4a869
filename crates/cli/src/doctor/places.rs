//! Where libraries and programs may lie.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Folders to look in, in order.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Folders of shared libraries.
    pub libraries: Vec<PathBuf>,
    /// Folders of programs.
    pub programs: Vec<PathBuf>,
}

/// Folders of vendors: the variable that names the root, roots that are usual (the last part may end in `*`), and the
/// folders below a root.
const VENDORS: [(&str, &[&str], &[&str]); 5] = [
    ("ASCEND_HOME_PATH", &["/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann*"], &["lib64"]),
    ("ASCEND_DRIVER_PATH", &["/usr/local/Ascend/driver"], &["lib64", "lib64/driver"]),
    ("CUDA_HOME", &["/usr/local/cuda*"], &["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"]),
    ("MPI_HOME", &["/usr/lib64/openmpi", "/usr/lib64/mpich", "/opt/openmpi*"], &["lib", "lib64"]),
    ("ROCM_PATH", &["/opt/rocm*"], &["lib", "lib64"]),
];

impl Places {
    /// The loader's folders, the usual folders of the vendors, and Python's packages (which carry NVIDIA's libraries).
    pub fn of_this_machine() -> Self {
        let mut libraries = paths_of("LD_LIBRARY_PATH");
        for (variable, roots, below) in VENDORS {
            let named = env::var_os(variable).map(PathBuf::from);
            let roots = named.into_iter().chain(roots.iter().flat_map(|root| expand(Path::new(root))));
            libraries.extend(roots.flat_map(|root| below.iter().map(move |b| root.join(b))));
        }
        libraries.extend(loader_configuration(Path::new("/etc/ld.so.conf"), 0));
        for system in ["/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/lib/wsl/lib"] {
            libraries.push(system.into());
        }
        libraries.push(format!("/usr/lib/{}-linux-gnu", env::consts::ARCH).into());
        // Where Debian puts libclang.
        libraries.extend(expand(Path::new("/usr/lib/llvm-*")).into_iter().map(|root| root.join("lib")));
        libraries.extend(python_folders());
        Self { libraries, programs: paths_of("PATH") }
    }

    /// The file of library `name` (such as `libnccl`): `name.so`, `name.so.2`, or with a suffix, `libopapi_math.so`.
    pub fn library(&self, name: &str) -> Option<PathBuf> {
        self.libraries.iter().find_map(|folder| {
            let mut found: Vec<PathBuf> = entries(folder)
                .into_iter()
                .filter(|path| path.file_name().and_then(|f| f.to_str()).is_some_and(|f| is_library(f, name)))
                .collect();
            found.sort();
            found.into_iter().next()
        })
    }

    /// The file of program `name`.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        self.programs.iter().map(|folder| folder.join(name)).find(|path| path.is_file())
    }
}

/// `libx.so`, `libx.so.N...`, `libx_part.so`.
fn is_library(file: &str, name: &str) -> bool {
    let Some(rest) = file.strip_prefix(name) else { return false };
    let rest = if rest.starts_with('_') { rest.trim_start_matches(|c| c != '.') } else { rest };
    rest == ".so" || rest.strip_prefix(".so.").is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
}

fn paths_of(variable: &str) -> Vec<PathBuf> {
    env::var_os(variable).map(|value| env::split_paths(&value).collect()).unwrap_or_default()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|all| all.filter_map(|e| e.ok().map(|e| e.path())).collect()).unwrap_or_default()
}

/// `pattern` itself, or, where its last part ends in `*`, what starts so, the newest name first.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let text = pattern.to_string_lossy();
    let Some(stem) = text.strip_suffix('*') else { return vec![pattern.to_owned()] };
    let folder = stem.rfind('/').map_or(".", |slash| &stem[..=slash]);
    let mut all: Vec<PathBuf> =
        entries(Path::new(folder)).into_iter().filter(|path| path.to_string_lossy().starts_with(stem)).collect();
    all.sort();
    all.reverse();
    all
}

/// The folders of `ld.so.conf`, with the files that it includes.
fn loader_configuration(file: &Path, depth: u32) -> Vec<PathBuf> {
    let Ok(text) = fs::read_to_string(file) else { return Vec::new() };
    let mut folders = Vec::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or("").trim()) {
        match line.strip_prefix("include") {
            Some(pattern) if depth < 4 => {
                let pattern = pattern.trim().trim_end_matches(".conf");
                let included =
                    expand(Path::new(pattern)).into_iter().filter(|f| f.extension().is_some_and(|e| e == "conf"));
                folders.extend(included.flat_map(|f| loader_configuration(&f, depth + 1)));
            }
            None if !line.is_empty() => folders.push(line.into()),
            _ => {}
        }
    }
    folders
}

/// `lib` and `site-packages/nvidia/*/lib` below the Pythons that this user would start: where pip puts MPI and NVIDIA's
/// libraries.
fn python_folders() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    roots.extend(env::var_os("CONDA_PREFIX").map(PathBuf::from));
    roots.extend(env::var_os("HOME").map(|home| Path::new(&home).join(".local")));
    roots.extend(["/usr/local".into(), "/usr".into()]);
    let mut folders = Vec::new();
    for root in roots {
        folders.push(root.join("lib"));
        for python in expand(&root.join("lib/python3*")) {
            for packages in ["site-packages", "dist-packages"].map(|name| python.join(name)) {
                folders.extend(entries(&packages.join("nvidia")).into_iter().map(|part| part.join("lib")));
            }
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_parts_count_and_other_libraries_do_not() {
        for good in ["libnccl.so", "libnccl.so.2", "libnccl.so.2.28.3", "libnccl_static.so"] {
            assert!(is_library(good, "libnccl"), "{good}");
        }
        for bad in ["libnccl.a", "libnccl-net.so", "libncclx.so", "libnccl.so.old", "nccl.so"] {
            assert!(!is_library(bad, "libnccl"), "{bad}");
        }
    }

    #[test]
    fn the_first_folder_wins_and_a_missing_folder_is_no_error() {
        let (a, b) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        fs::write(b.path().join("libmpi.so.40"), "").expect("writable");
        let libraries = vec!["/no/such/folder".into(), a.path().to_owned(), b.path().to_owned()];
        let places = Places { libraries, programs: vec![b.path().to_owned()] };
        assert_eq!(places.library("libmpi"), Some(b.path().join("libmpi.so.40")));
        fs::write(a.path().join("libmpi.so"), "").expect("writable");
        assert_eq!(places.library("libmpi"), Some(a.path().join("libmpi.so")));
        assert_eq!(places.program("mpirun"), None);
    }

    #[test]
    fn included_configuration_files_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let conf = folder.path().join("ld.so.conf");
        fs::create_dir(folder.path().join("d")).expect("writable");
        fs::write(folder.path().join("d/x.conf"), "# none\n/opt/x/lib\n").expect("writable");
        fs::write(&conf, format!("include {}/d/*.conf\n/opt/y/lib # why\n", folder.path().display()))
            .expect("writable");
        assert_eq!(loader_configuration(&conf, 0), [PathBuf::from("/opt/x/lib"), "/opt/y/lib".into()]);
    }
}
