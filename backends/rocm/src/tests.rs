//! What can be tested without a GPU.

use longspan_gpu::dylib::{Library, Search};
use longspan_gpu::{Driver, Vendor};
use longspan_hal::{Backend, Error};

use super::*;

/// With a GPU there is no absence to test, and conformance runs.
fn has_gpu() -> bool {
    Rocm::devices().is_ok_and(|list| !list.is_empty())
}

/// Without ROCm the library is missing; with a ROCm that finds no device (Debian's, say) that is the reason.
#[test]
fn without_a_device_every_way_in_says_how_to_get_it() {
    if has_gpu() {
        return;
    }
    let info = longspan_hal::DeviceInfo::new(0, "x", 0);
    let errors = [Rocm::devices().map(drop), Rocm::open(&info).map(drop), Rocm::group_id().map(drop)];
    for error in errors.map(|r| r.expect_err("there is no GPU")) {
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable { .. }), "{text}");
        assert!(text.contains("libamdhip64") && text.contains("install ROCm"), "{text}");
    }
}

#[test]
fn a_library_that_is_not_a_driver_is_unavailable_and_names_the_symbol() {
    let search =
        Search { what: "libamdhip64", candidates: vec!["libc.so.6".into()], beside: &[], how_to_get_it: "ROCm" };
    let library = Library::open(&search).expect("libc is part of the system");
    let text = Driver::load(library, Flavor::Hip).expect_err("libc is no driver").to_string();
    assert!(text.contains("hipInit") && text.contains("libc.so.6"), "{text}");
}

#[test]
fn libraries_are_looked_for_in_known_places() {
    assert!(runtime().contains(&OsString::from("libamdhip64.so.6")));
    assert!(runtime().contains(&OsString::from("/opt/rocm/lib/libamdhip64.so")));
    assert!(compiler().contains(&OsString::from("libhiprtc.so.7")));
    assert!(rccl().contains(&OsString::from("librccl.so.1")));
    assert_eq!(Amd::machine().facts().name, Rocm::NAME);
}

#[test]
fn architectures_without_kernels_are_refused_with_those_that_have_some() {
    let asked = |arch: &str| Asked {
        major: 9,
        minor: 0,
        block_bytes: 64 << 10,
        unit_bytes: 64 << 10,
        arch: Some(arch.to_owned()),
        name: "a GPU".to_owned(),
    };
    let (name, known) = target(&asked("gfx942:sramecc+:xnack-")).expect("known");
    assert_eq!((name.as_str(), known.arch), ("gfx942:sramecc+:xnack-", 0x942));
    let text = target(&asked("gfx908")).expect_err("no kernels").to_string();
    assert!(text.contains("gfx908") && text.contains("gfx90a") && text.contains("gfx110x"), "{text}");
}

/// Where a real HIP runtime is installed but no GPU, as Debian's libamdhip64 is in CI: it is loaded, and says that there is no
/// device.
#[test]
fn a_runtime_without_a_device_says_so() {
    let search = Search { what: "libamdhip64", candidates: runtime(), beside: &[], how_to_get_it: "ROCm" };
    let Ok(library) = Library::open(&search) else { return };
    if has_gpu() {
        return;
    }
    Driver::load(library, Flavor::Hip).expect("it has every function");
    let text = Rocm::devices().expect_err("there is no GPU").to_string();
    assert!(text.contains("hipInit failed with code 10"), "{text}");
}

/// Where hipRTC is installed (it needs no GPU): kernels compile for gfx90a, which Debian's of 2022 knows too.
#[test]
fn the_compiler_makes_machine_code_for_gfx90a() {
    use longspan_hal::{DType, Spec};
    use longspan_kernels::{Specialization, View};
    let Ok(compiler) = Amd::machine().compiler() else { return };
    let known = Target::amd("gfx90a", 64 << 10, 64 << 10).expect("known");
    let view = View { aligned: true, mapped: false };
    let spec = |dtype| Spec::new(dtype, 1, [64, 64], [2, 1], 64);
    let bf16 = spec(DType::Bf16).with_softcap(Some(20.0)).with_deterministic(true);
    let kernels = [
        Specialization::forward("rocm", &spec(DType::F16), known, view),
        Specialization::backward("rocm", &spec(DType::Bf16), known, view),
        Specialization::backward_dq("rocm", &bf16, known, view),
        Specialization::forward("rocm", &spec(DType::F32), known, view),
        Ok(Specialization::copy(16)),
    ];
    for kernel in kernels {
        let kernel = kernel.expect("supported");
        let mut options = vec!["--offload-arch=gfx90a".to_owned()];
        options.extend(FACTS.flags.iter().map(|flag| (*flag).to_owned()));
        options.extend(kernel.defines.iter().map(|d| format!("-D{d}")));
        let code = compiler.compile(&kernel.source.text(Prelude::Hip), kernel.source.file, &options);
        let code = code.unwrap_or_else(|e| panic!("{}: {e}", kernel.name()));
        assert!(code.starts_with(b"\x7fELF") || code.starts_with(b"__CLANG_OFFLOAD_BUNDLE__"), "{}", kernel.name());
    }
}
