//! What can be tested without a GPU.

use longspan_gpu::{Driver, Vendor};
use longspan_hal::{Backend, Error};

use super::*;

/// Whether this machine has a working GPU; then the tests of its absence have nothing to test, and conformance runs.
fn has_gpu() -> bool {
    Cuda::devices().is_ok()
}

#[test]
fn without_a_driver_every_way_in_says_how_to_get_it() {
    if has_gpu() {
        return;
    }
    let info = longspan_hal::DeviceInfo::new(0, "x", 0);
    let errors = [Cuda::devices().map(drop), Cuda::open(&info).map(drop), Cuda::group_id().map(drop)];
    for error in errors.map(|r| r.expect_err("there is no GPU")) {
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable { .. }), "{text}");
        assert!(text.contains("libcuda") && text.contains("NVIDIA driver"), "{text}");
    }
}

/// What NVIDIA's machine would be with other libraries than this one has.
fn machine(facts: Facts) -> &'static Machine {
    Box::leak(Box::new(Machine::new(facts)))
}

#[track_caller]
fn unavailable<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let error = result.expect_err("it is not there");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    words.iter().for_each(|word| assert!(error.to_string().contains(word), "no `{word}` in {error}"));
}

#[test]
fn a_missing_driver_or_compiler_says_how_to_get_it() {
    let nowhere = |place| Place { candidates: || vec!["/nowhere/lib.so".into()], beside: &[], ..place };
    let none = machine(Facts { driver: nowhere(FACTS.driver), compiler: nowhere(FACTS.compiler), ..FACTS });
    unavailable(none.driver(), &["/nowhere/lib.so", "install the NVIDIA driver", "LONGSPAN_LIBCUDA"]);
    unavailable(none.devices(), &["install the NVIDIA driver"]);
    unavailable(none.compiler(), &["/nowhere/lib.so", "pip install nvidia-cuda-nvrtc", "LONGSPAN_LIBNVRTC"]);
}

/// A driver made of `tests/driver.c` by the C compiler that Rust links with.
#[cfg(target_os = "linux")]
fn made(name: &str, flags: &[&str]) -> Vec<OsString> {
    thread_local!(static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a folder"));
    let library = FOLDER.with(|folder| folder.path().join(name));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tests/driver.c");
    let mut compiler = std::process::Command::new("cc");
    let output =
        compiler.args(["-shared", "-fPIC", source, "-o"]).arg(&library).args(flags).output().expect("cc starts");
    assert!(output.status.success(), "{output:?}");
    vec![library.into_os_string()]
}

#[cfg(target_os = "linux")]
#[test]
fn drivers_that_are_too_old_or_find_no_gpu_say_so() {
    let with = |candidates| machine(Facts { driver: Place { candidates, ..FACTS.driver }, ..FACTS });
    let old = with(|| made("old.so", &["-DVERSION=11080", "-DINIT=0"]));
    unavailable(old.driver(), &["it is too old", "driver 525 (CUDA 12.0)", "install the NVIDIA driver (525 or newer)"]);
    let older = with(|| made("older.so", &["-DVERSION=11010", "-DINIT=0", "-DOLD"]));
    unavailable(older.driver(), &["no symbol cuMemPoolCreate", "probably too old", "525 or newer"]);
    let no_gpu = with(|| made("no-gpu.so", &["-DVERSION=13000", "-DINIT=100"]));
    unavailable(no_gpu.driver(), &["cuInit failed with code 100: its text", "on a machine with an NVIDIA GPU"]);
    let none = with(|| made("none.so", &["-DVERSION=13000", "-DINIT=0"]));
    assert_eq!(none.devices(), Ok(Vec::new()));
}

#[test]
fn a_library_that_is_not_a_driver_is_unavailable_and_names_the_symbol() {
    use longspan_gpu::dylib::{Library, Search};
    let search =
        Search { what: "libcuda", candidates: vec!["libc.so.6".into()], beside: &[], how_to_get_it: "a driver" };
    let library = Library::open(&search).expect("libc is part of the system");
    let text = Driver::load(library, Flavor::Cuda).expect_err("libc is no driver").to_string();
    assert!(text.contains("cuInit") && text.contains("libc.so.6"), "{text}");
}

#[test]
fn architectures_are_named_as_the_compiler_names_them() {
    let names = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)].map(|(major, minor)| arch(major, minor));
    assert_eq!(names, ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_121a"]);
}

#[test]
fn libraries_are_looked_for_in_known_places() {
    assert!(driver().contains(&OsString::from("libcuda.so.1")));
    assert!(compiler().contains(&OsString::from("libnvrtc.so.13")));
    assert!(nccl().contains(&OsString::from("libnccl.so.2")));
    assert_eq!(Nvidia::machine().facts().name, Cuda::NAME);
}

/// Where NVRTC is installed (it needs no GPU): the driver-independent half of the JIT.
#[test]
fn the_compiler_makes_machine_code_and_says_what_is_wrong() {
    let Ok(compiler) = Nvidia::machine().compiler() else { return };
    let flags = [arch(9, 0), arch(8, 0)].map(|arch| [format!("--gpu-architecture={arch}"), "-std=c++17".to_owned()]);
    for options in &flags {
        let code = compiler.compile("extern \"C\" __global__ void f(int *p) { *p = 1; }", "f.cu", options);
        assert!(code.expect("it is right").starts_with(b"\x7fELF"));
    }
    let error = compiler.compile("extern \"C\" __global__ void f() { nothing(); }", "f.cu", &flags[0]);
    let text = error.expect_err("`nothing` is not declared").to_string();
    assert!(text.contains("nvrtcCompileProgram") && text.contains("nothing") && text.contains("f.cu"), "{text}");
    assert!(compiler.compile("a\0b", "f.cu", &[]).is_err());
}

#[test]
fn the_copy_kernels_compile() {
    let Ok(compiler) = Nvidia::machine().compiler() else { return };
    use longspan_hal::DType;
    use longspan_kernels::Specialization;
    let copies = [2, 4, 8, 16].map(Specialization::copy);
    let fills = [DType::Bf16, DType::F16, DType::F32].map(Specialization::fill);
    for kernel in copies.iter().chain(&fills) {
        let mut options = vec![format!("--gpu-architecture={}", arch(9, 0)), "-std=c++17".to_owned()];
        options.extend(kernel.defines.iter().map(|d| format!("-D{d}")));
        compiler.compile(&kernel.source.text(Prelude::Cuda), kernel.source.file, &options).expect("it compiles");
    }
}

#[test]
fn findings_say_what_is_missing_and_how_to_get_it() {
    let findings = Cuda::findings();
    for what in ["driver (libcuda)", "compiler (libnvrtc)", "collectives (libnccl)", "matrix products (libcublas)"] {
        let finding = findings.iter().find(|f| f.what == what).unwrap_or_else(|| panic!("{what} in {findings:?}"));
        match &finding.state {
            Ok(text) => assert!(text.contains("lib"), "its path: {text}"),
            Err(Error::Unavailable { how_to_get_it, .. }) => {
                assert!(how_to_get_it.contains("install"), "{how_to_get_it}");
            }
            Err(other) => panic!("{what}: {other}"),
        }
    }
    assert!(findings.iter().any(|f| f.what == "kernel cache" && f.state.is_ok()));
    assert_eq!(has_gpu(), findings.iter().any(|f| f.what == "GPU 0"));
    assert_eq!(longspan::findings("cuda").map(|f| f.len()), Some(findings.len()));
}

#[test]
fn the_cache_of_kernels_is_found_without_a_gpu() {
    let caches = longspan::kernel_caches();
    let cuda = caches.iter().find(|c| c.backend == "cuda").expect("it keeps kernels");
    assert!(cuda.folder.as_ref().is_none_or(|folder| folder.ends_with("cuda")), "{cuda:?}");
}

#[test]
fn how_messages_travel_can_be_chosen() {
    use longspan_hal::Transport;
    for transport in [Transport::Library, Transport::Peer, Transport::Auto] {
        assert_eq!(Cuda::set_transport(transport), Ok(()));
    }
}
