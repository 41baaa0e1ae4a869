//! `libhiprtc`, and modules and launches of `libamdhip64`: kernel sources are compiled for the host.
//!
//! ```text
//! compile:  host.h, the source, and a line a kernel with the size of its parameter -> a shared object
//! load:     its bytes to a file in memory; the loader opens that
//! launch:   the parameter is copied; on the stream, device memory is opened and `longspan_host_run` runs the grid
//! ```

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, OsString, c_char, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crate::memory;
use crate::runtime::{put, stream};
use crate::state::{Handles, code, count, fail, lock, misuse};

/// hipRTC's own codes.
mod result {
    pub const OK: i32 = 0;
    pub const INPUT: i32 = 3;
    pub const PROGRAM: i32 = 4;
    pub const OPTION: i32 = 5;
    pub const COMPILATION: i32 = 6;
    pub const INTERNAL: i32 = 11;
}

const HOST: &str = include_str!("host.h");

struct Program {
    source: String,
    name: String,
    built: Mutex<Built>,
}

#[derive(Default)]
struct Built {
    code: Vec<u8>,
    log: CString,
}

type Kernel = unsafe extern "C" fn(*const c_void);
type Run = unsafe extern "C" fn(Kernel, *const c_void, u32, u32, u32, u32) -> *const c_char;

struct Module {
    library: usize,
    run: Run,
}

#[derive(Clone, Copy)]
struct Function {
    kernel: Kernel,
    run: Run,
    param_bytes: usize,
}

static PROGRAMS: Handles<Program> = Handles::new();
static MODULES: Handles<Module> = Handles::new();
static FUNCTIONS: Handles<Function> = Handles::new();
static FILES: AtomicU64 = AtomicU64::new(0);

/// `hiprtc.h`. The minor number is of the shim, so that caches notice another one.
///
/// # Safety
/// Both are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcVersion(major: *mut i32, minor: *mut i32) -> i32 {
    let mut hash = DefaultHasher::new();
    HOST.hash(&mut hash);
    // SAFETY: by the caller.
    unsafe { put(major, 1000) | put(minor, (hash.finish() & 0xff_ffff) as i32) }
}

/// `hiprtc.h`. Headers are not emulated: the kernels have none.
///
/// # Safety
/// `program` is valid for a write, `source` and `name` are C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    name: *const c_char,
    headers: i32,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> i32 {
    if source.is_null() || headers != 0 {
        return misuse(result::INPUT, "a program without source, or with headers");
    }
    // SAFETY: by the caller.
    let text = |at: *const c_char| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned();
    let name = if name.is_null() { "program".to_owned() } else { text(name) };
    let made = Program { source: text(source), name, built: Mutex::default() };
    // SAFETY: by the caller.
    unsafe { put(program, PROGRAMS.add(made)) }
}

/// `hiprtc.h`.
///
/// # Safety
/// `program` points to a program.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcDestroyProgram(program: *mut *mut c_void) -> i32 {
    // SAFETY: by the caller.
    match PROGRAMS.remove(unsafe { program.read() }) {
        Some(_) => result::OK,
        None => misuse(result::PROGRAM, "a program was destroyed that does not live"),
    }
}

/// `hiprtc.h`.
///
/// # Safety
/// `options` points to `n` C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcCompileProgram(program: *mut c_void, n: i32, options: *const *const c_char) -> i32 {
    let Some(program) = PROGRAMS.get(program) else { return misuse(result::PROGRAM, "a program that does not live") };
    let options: Vec<String> = (0..usize::try_from(n).unwrap_or(0))
        // SAFETY: by the caller.
        .map(|i| unsafe { CStr::from_ptr(options.add(i).read()) }.to_string_lossy().into_owned())
        .collect();
    let mut built = lock(&program.built);
    match compile(&program, &options) {
        Ok(code) => {
            count("compilations", 1);
            *built = Built { code, log: CString::default() };
            result::OK
        }
        Err((code, log)) => {
            built.log = CString::new(log.replace('\0', " ")).unwrap_or_default();
            code
        }
    }
}

/// What a failed compilation gives: a code and messages.
type Failed = (i32, String);

fn compile(program: &Program, options: &[String]) -> Result<Vec<u8>, Failed> {
    let mut arguments = vec!["-x", "c++", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-DLONGSPAN_HOST"];
    for option in options {
        match option.strip_prefix("--offload-arch=") {
            Some(arch) if arch.starts_with("gfx9") => arguments.push("-D__GFX9__"),
            Some(arch) if arch.starts_with("gfx11") => arguments.push("-D__GFX11__"),
            Some(arch) => return Err((result::OPTION, format!("{arch} is not emulated"))),
            None if option.starts_with("-D") || option.starts_with("-std=") => arguments.push(option),
            None if option == "-O3" => {}
            None => return Err((result::OPTION, format!("option {option} is not emulated"))),
        }
    }
    let folder = std::env::temp_dir();
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let stem = folder.join(format!("longspan-emulator-{}-{number}", std::process::id()));
    let (text, object) = (stem.with_extension("cc"), stem.with_extension("so"));
    let files = Files([text.clone(), object.clone()]);
    let source = format!("{HOST}\n#line 1 \"{}\"\n{}\n{}", program.name, program.source, sizes(&program.source));
    let io = |e: std::io::Error| (result::INTERNAL, e.to_string());
    std::fs::write(&text, source).map_err(io)?;
    let compiler = compiler().ok_or_else(|| {
        (result::INTERNAL, "there is no C++ compiler; install g++, or name one in LONGSPAN_EMULATOR_CXX".to_owned())
    })?;
    let done = Command::new(compiler).args(arguments).arg(&text).arg("-o").arg(&object).output().map_err(io)?;
    if !done.status.success() {
        return Err((result::COMPILATION, String::from_utf8_lossy(&done.stderr).into_owned()));
    }
    let code = std::fs::read(&object).map_err(io);
    drop(files);
    code
}

/// Temporary files, removed with this.
struct Files([PathBuf; 2]);

impl Drop for Files {
    fn drop(&mut self) {
        // What can't be removed stays in the temporary folder.
        self.0.iter().for_each(|file| drop(std::fs::remove_file(file)));
    }
}

fn compiler() -> Option<&'static OsString> {
    static FOUND: LazyLock<Option<OsString>> = LazyLock::new(|| {
        let named = std::env::var_os("LONGSPAN_EMULATOR_CXX").filter(|c| !c.is_empty());
        let usual = ["c++", "g++", "clang++"].map(OsString::from);
        let works = |c: &OsString| Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success());
        named.into_iter().chain(usual).find(works)
    });
    FOUND.as_ref()
}

/// A line for each kernel: the bytes of its parameter, which a launch has to copy.
fn sizes(source: &str) -> String {
    let mut lines = String::new();
    for head in source.split("KERNEL(").skip(1).filter_map(|rest| rest.split_once(") ")).map(|(_, head)| head) {
        let name = head.split('(').next().unwrap_or_default();
        let parameter = head.split_once("(PARAMS(").and_then(|(_, rest)| rest.split_once(')'));
        if let (Some((parameter, _)), true) = (parameter, name.chars().all(|c| c.is_alphanumeric() || c == '_')) {
            lines += &format!("extern \"C\" const unsigned long long {name}_bytes = sizeof({parameter});\n");
        }
    }
    lines
}

fn of_program<T>(program: *mut c_void, take: impl FnOnce(&Built) -> T) -> Result<T, i32> {
    let program = PROGRAMS.get(program).ok_or_else(|| misuse(result::PROGRAM, "a program that does not live"))?;
    let built = lock(&program.built);
    Ok(take(&built))
}

/// `hiprtc.h`.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcGetProgramLogSize(program: *mut c_void, bytes: *mut usize) -> i32 {
    // SAFETY: by the caller.
    of_program(program, |b| b.log.as_bytes_with_nul().len()).map_or_else(|c| c, |n| unsafe { put(bytes, n) })
}

/// `hiprtc.h`.
///
/// # Safety
/// `log` has as many bytes as were said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcGetProgramLog(program: *mut c_void, log: *mut c_char) -> i32 {
    let copied = of_program(program, |b| {
        let text = b.log.as_bytes_with_nul();
        // SAFETY: by the caller.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), log.cast(), text.len()) };
    });
    copied.err().unwrap_or(result::OK)
}

/// `hiprtc.h`.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcGetCodeSize(program: *mut c_void, bytes: *mut usize) -> i32 {
    // SAFETY: by the caller.
    of_program(program, |b| b.code.len()).map_or_else(|c| c, |n| unsafe { put(bytes, n) })
}

/// `hiprtc.h`.
///
/// # Safety
/// `code` has as many bytes as were said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hiprtcGetCode(program: *mut c_void, code: *mut c_char) -> i32 {
    let copied = of_program(program, |b| {
        // SAFETY: by the caller.
        unsafe { std::ptr::copy_nonoverlapping(b.code.as_ptr(), code.cast(), b.code.len()) };
    });
    copied.err().unwrap_or(result::OK)
}

/// `hiprtc.h`.
#[unsafe(no_mangle)]
pub extern "C" fn hiprtcGetErrorString(code: i32) -> *const c_char {
    match code {
        result::OK => c"HIPRTC_SUCCESS".as_ptr(),
        result::COMPILATION => c"HIPRTC_ERROR_COMPILATION".as_ptr(),
        result::INTERNAL => c"HIPRTC_ERROR_INTERNAL_ERROR".as_ptr(),
        result::OPTION => c"HIPRTC_ERROR_INVALID_OPTION".as_ptr(),
        _ => c"HIPRTC_ERROR_INVALID_INPUT".as_ptr(),
    }
}

/// Bytes of an ELF file: its section headers come last.
///
/// # Safety
/// `image` points to at least 64 bytes.
unsafe fn elf_bytes(image: *const u8) -> Option<usize> {
    // SAFETY: by the caller.
    let head = unsafe { image.cast::<[u8; 64]>().read_unaligned() };
    let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let short = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
    head.starts_with(b"\x7fELF\x02\x01").then_some(long(40) as usize + short(58) * short(60))
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `module` is valid for a write, `image` points to code that hipRTC gave.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> i32 {
    if image.is_null() {
        return misuse(code::INVALID, "no image");
    }
    // SAFETY: by the caller.
    let Some(bytes) = (unsafe { elf_bytes(image.cast()) }) else {
        return misuse(code::IMAGE, "an image that is no ELF file");
    };
    // SAFETY: by the caller, who got so many bytes.
    let image = unsafe { std::slice::from_raw_parts(image.cast::<u8>(), bytes) };
    match load(image) {
        // SAFETY: by the caller.
        Ok(loaded) => unsafe { put(module, MODULES.add(loaded)) },
        Err(error) => misuse(code::IMAGE, error),
    }
}

/// Opens a shared object from memory. It stays open: kernels are never unloaded.
fn load(image: &[u8]) -> Result<Module, String> {
    // SAFETY: plain system calls with valid arguments; failures are checked.
    let file = unsafe { libc::memfd_create(c"longspan-kernel".as_ptr(), 0) };
    if file < 0 {
        return Err("no file in memory".to_owned());
    }
    let path = format!("/proc/self/fd/{file}");
    std::fs::write(Path::new(&path), image).map_err(|e| e.to_string())?;
    let path = CString::new(path).map_err(|e| e.to_string())?;
    // SAFETY: the object is ours, without initialisers.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: a C string of the loader, after a failure.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    // SAFETY: as above.
    let run = unsafe { libc::dlsym(library, c"longspan_host_run".as_ptr()) };
    // The descriptor stays open: the loader tells objects apart by their files, and numbers are used again.
    if run.is_null() {
        return Err("it is not of this emulator".to_owned());
    }
    // SAFETY: host.h gives it this signature.
    Ok(Module { library: library as usize, run: unsafe { std::mem::transmute::<*mut c_void, Run>(run) } })
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `function` is valid for a write, `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> i32 {
    let Some(module) = MODULES.get(module) else { return misuse(code::HANDLE, "a module that does not live") };
    // SAFETY: by the caller.
    let name = unsafe { CStr::from_ptr(name) };
    let size = CString::new([name.to_bytes(), b"_bytes"].concat()).unwrap_or_default();
    let library = module.library as *mut c_void;
    // SAFETY: the library is open; both names are C strings.
    let (kernel, bytes) = unsafe { (libc::dlsym(library, name.as_ptr()), libc::dlsym(library, size.as_ptr())) };
    if kernel.is_null() || bytes.is_null() {
        return fail(code::NOT_FOUND, format!("there is no kernel {}", name.to_string_lossy()));
    }
    // SAFETY: host.h makes kernels functions of one pointer; `sizes` made the number.
    let made = unsafe {
        let kernel = std::mem::transmute::<*mut c_void, Kernel>(kernel);
        Function { kernel, run: module.run, param_bytes: bytes.cast::<u64>().read() as usize }
    };
    // SAFETY: by the caller.
    unsafe { put(function, FUNCTIONS.add(made)) }
}

/// What becomes of a launch.
#[derive(Clone, Copy)]
enum Fault {
    Fail,
    Hang,
}

/// What `LONGSPAN_EMULATOR_FAULT` plants into this launch, if it is the one.
fn planted() -> Option<Fault> {
    static PLAN: LazyLock<Option<(Fault, u64)>> = LazyLock::new(|| {
        let text = std::env::var("LONGSPAN_EMULATOR_FAULT").ok()?;
        let (kind, number) = text.split_once(':')?;
        Some((if kind == "hang" { Fault::Hang } else { Fault::Fail }, number.parse().ok()?))
    });
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let (fault, number) = (*PLAN)?;
    (LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1 == number).then_some(fault)
}

/// `hip_runtime_api.h`.
///
/// # Safety
/// `parameters` points to a pointer to the kernel's parameter.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the vendor's signature
pub unsafe extern "C" fn hipModuleLaunchKernel(
    function: *mut c_void,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    on: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> i32 {
    let Some(function) = FUNCTIONS.get(function) else { return misuse(code::HANDLE, "a kernel that does not live") };
    let stream = match stream(on) {
        Ok(stream) => stream,
        Err(code) => return code,
    };
    let threads = u64::from(grid_x) * u64::from(block_x);
    if grid_x == 0
        || grid_y == 0
        || grid_z != 1
        || block_x == 0
        || block_y != 1
        || block_z != 1
        || threads > u64::from(u32::MAX)
    {
        return misuse(code::INVALID, "an empty grid, more axes than are emulated, or 2^32 threads on an axis");
    }
    if shared_bytes > 64 << 10 || parameters.is_null() || !extra.is_null() {
        return misuse(code::INVALID, "more than 64 KiB of shared memory, or parameters in another form");
    }
    // SAFETY: by the caller; parameters are aligned to 16 bytes at most.
    let params = unsafe {
        let mut copy = vec![0u128; function.param_bytes.div_ceil(16)];
        std::ptr::copy_nonoverlapping(parameters.read().cast::<u8>(), copy.as_mut_ptr().cast(), function.param_bytes);
        copy
    };
    count("launch kernel", 1);
    let fault = planted();
    stream.push(move |running| {
        match fault {
            Some(Fault::Fail) => return Err(code::LAUNCH),
            Some(Fault::Hang) => {
                while !running.aborted() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            None => {}
        }
        let _open = memory::open();
        // SAFETY: the kernel takes this parameter; what its addresses name is the client's to keep alive.
        let fault =
            unsafe { (function.run)(function.kernel, params.as_ptr().cast(), grid_x, grid_y, block_x, shared_bytes) };
        if fault.is_null() {
            return Ok(());
        }
        // SAFETY: a static string of the kernel's.
        Err(misuse(code::LAUNCH, unsafe { CStr::from_ptr(fault) }.to_string_lossy()))
    });
    code::OK
}
