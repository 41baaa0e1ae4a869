//! The vendor's run-time compiler: source text in, machine code for one architecture out.

use std::ffi::{CString, OsString, c_char, c_int};
use std::path::{Path, PathBuf};

use longspan_dylib::{Library, Returned, table};
use longspan_hal::{Error, Result};

use crate::driver::Handle;
use crate::machine::c_text;

table! {
    /// NVRTC or hipRTC: `libnvrtc.so`, `libhiprtc.so`. All functions return 0 or an error code.
    struct Functions {
        /// Version, major and minor.
        fn version["nvrtcVersion", "hiprtcVersion"](major: *mut c_int, minor: *mut c_int) -> c_int;
        /// A program from text.
        fn create["nvrtcCreateProgram", "hiprtcCreateProgram"](
            program: *mut Handle, source: *const c_char, name: *const c_char,
            header_count: c_int, headers: *const *const c_char, names: *const *const c_char,
        ) -> c_int;
        /// Frees a program.
        fn destroy["nvrtcDestroyProgram", "hiprtcDestroyProgram"](program: *mut Handle) -> c_int;
        /// Compiles a program.
        fn compile["nvrtcCompileProgram", "hiprtcCompileProgram"](
            program: Handle, option_count: c_int, options: *const *const c_char,
        ) -> c_int;
        /// Bytes of the messages.
        fn log_bytes["nvrtcGetProgramLogSize", "hiprtcGetProgramLogSize"](program: Handle, bytes: *mut usize) -> c_int;
        /// The messages.
        fn log["nvrtcGetProgramLog", "hiprtcGetProgramLog"](program: Handle, log: *mut c_char) -> c_int;
        /// Bytes of the machine code.
        fn code_bytes["nvrtcGetCUBINSize", "hiprtcGetCodeSize"](program: Handle, bytes: *mut usize) -> c_int;
        /// The machine code.
        fn code["nvrtcGetCUBIN", "hiprtcGetCode"](program: Handle, code: *mut c_char) -> c_int;
        /// Text of an error.
        fn error_text["nvrtcGetErrorString", "hiprtcGetErrorString"](code: c_int) -> *const c_char;
    }
}

/// A loaded compiler.
#[derive(Debug)]
pub struct Compiler {
    backend: &'static str,
    functions: Functions,
    version: [i32; 2],
}

/// A program of the compiler's, freed with this.
struct Program<'a> {
    compiler: &'a Compiler,
    raw: Handle,
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: it was created by this compiler and is freed once.
        let _ = unsafe { self.compiler.functions.destroy(&mut self.raw) };
    }
}

impl Compiler {
    /// Takes the compiler's functions from `library`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if a function is missing, [`Error::Driver`].
    pub fn load(backend: &'static str, library: Library, flavor: usize) -> Result<Self> {
        let mut this = Self { backend, functions: Functions::load(library, flavor)?, version: [0; 2] };
        let [major, minor] = &mut this.version;
        // SAFETY: both are written.
        let asked = unsafe { this.functions.version(major, minor) };
        this.check(asked, String::new)?;
        Ok(this)
    }

    /// Version, as `major.minor`.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version[0], self.version[1])
    }

    /// Where it was loaded from.
    pub fn path(&self) -> &OsString {
        self.functions.library().path()
    }

    /// Machine code for `source` (named `name` in messages) with `options`.
    ///
    /// # Errors
    /// [`Error::Driver`] with the compiler's messages.
    pub fn compile(&self, source: &str, name: &str, options: &[String]) -> Result<Vec<u8>> {
        let (source, name) = (c_string("source", source)?, c_string("name", name)?);
        let options = options.iter().map(|o| c_string("option", o)).collect::<Result<Vec<_>>>()?;
        let list: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut raw = 0;
        let none = std::ptr::null();
        // SAFETY: `raw` is written; both strings live beyond the call; there are no headers.
        let created = unsafe { self.functions.create(&mut raw, source.as_ptr(), name.as_ptr(), 0, none, none) };
        self.check(created, String::new)?;
        let program = Program { compiler: self, raw };
        // SAFETY: the options live beyond the call, and there are so many.
        let compiled = unsafe { self.functions.compile(raw, list.len() as c_int, list.as_ptr()) };
        self.check(compiled, || program.log())?;
        let mut code = Vec::new();
        let mut bytes = 0;
        // SAFETY: `bytes` is written.
        self.check(unsafe { self.functions.code_bytes(raw, &mut bytes) }, String::new)?;
        code.resize(bytes, 0u8);
        // SAFETY: `code` has so many bytes.
        self.check(unsafe { self.functions.code(raw, code.as_mut_ptr().cast()) }, String::new)?;
        Ok(code)
    }

    fn check(&self, returned: Returned<c_int>, log: impl FnOnce() -> String) -> Result<()> {
        if returned.value == 0 {
            return Ok(());
        }
        // SAFETY: the text is a static string.
        let text = unsafe { c_text(self.functions.error_text(returned.value).value) };
        let log = log();
        Err(Error::Driver {
            backend: self.backend,
            call: returned.call,
            code: i64::from(returned.value),
            message: if log.is_empty() { text } else { format!("{text}\n{log}") },
        })
    }
}

impl Program<'_> {
    /// What the compiler said.
    fn log(&self) -> String {
        let functions = &self.compiler.functions;
        let mut bytes = 0;
        // SAFETY: `bytes` is written.
        if unsafe { functions.log_bytes(self.raw, &mut bytes) }.value != 0 {
            return String::new();
        }
        let mut log = vec![0u8; bytes];
        // SAFETY: `log` has so many bytes.
        let _ = unsafe { functions.log(self.raw, log.as_mut_ptr().cast()) };
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }
}

fn c_string(what: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(what, "it holds a zero byte"))
}

/// The library that `variable` names, and no other: a name that can't be loaded is an error, not a reason to take something else.
/// Without one, `usual`.
pub fn named_or(variable: &str, usual: impl FnOnce() -> Vec<OsString>) -> Vec<OsString> {
    match std::env::var_os(variable).filter(|path| !path.is_empty()) {
        Some(path) => vec![path],
        None => usual(),
    }
}

/// Files in Python's site-packages whose path there is `parent/DIR/lib/NAME...`, newest version first: the wheels of
/// vendors' libraries, for programs without an installed toolkit.
pub fn in_site_packages(parent: &str, name: &str) -> Vec<OsString> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(root) = std::env::var_os(variable) {
            roots.push(PathBuf::from(root).join("lib"));
        }
    }
    if let Some(home) = std::env::var_os("HOME") {
        roots.push(PathBuf::from(home).join(".local/lib"));
    }
    roots.extend(["/usr/local/lib", "/usr/lib", "/opt/conda/lib"].map(PathBuf::from));
    let mut packages: Vec<PathBuf> =
        std::env::var_os("PYTHONPATH").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    for python in roots.iter().flat_map(|root| entries(root, "python3")) {
        packages.extend([python.join("site-packages"), python.join("dist-packages")]);
    }
    let mut found = Vec::new();
    for package in packages {
        for library in entries(&package.join(parent), "") {
            found.extend(entries(&library.join("lib"), name).into_iter().map(PathBuf::into_os_string));
        }
    }
    found
}

/// Entries of `folder` whose names start with `start`, last name first; none if it can't be read.
fn entries(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(list) = std::fs::read_dir(folder) else { return Vec::new() };
    let named = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(start);
    let mut found: Vec<PathBuf> = list.flatten().filter(named).map(|entry| entry.path()).collect();
    found.sort();
    found.reverse();
    found
}
