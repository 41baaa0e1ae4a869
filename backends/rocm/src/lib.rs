//! Longspan on AMD GPUs: what only they have. Everything else is in `longspan-gpu`.
//!
//! Needed at run time: ROCm's HIP runtime (`libamdhip64.so`) and hipRTC (`libhiprtc.so`); RCCL (`librccl.so.1`) for devices
//! that can't reach each other's memory. Nothing of ROCm is needed to build.
//!
//! Kernels exist for CDNA 2 and 3 (gfx90a, gfx942, gfx950) and RDNA 3 (gfx110x, gfx115x).
//!
//! | variable | what it does |
//! |---|---|
//! | `LONGSPAN_EXCHANGE` | `auto` (the default), `peer` or `nccl` (which is RCCL here): how messages travel |
//! | `LONGSPAN_LIBAMDHIP64`, `LONGSPAN_LIBHIPRTC`, `LONGSPAN_LIBRCCL` | path of a library, and no other is tried |
//! | `ROCM_PATH` | where ROCm is installed, if not in `/opt/rocm` |
//! | `LONGSPAN_CACHE` | folder of compiled kernels |
//! | `LONGSPAN_QUIET` | no lines about compiled kernels |

use std::ffi::OsString;
use std::path::PathBuf;

use longspan_gpu::{Asked, Codes, Facts, Flavor, GpuBackend, Machine, Place, Vendor, named_or};
pub use longspan_gpu::{Cache, CacheFigures};
use longspan_hal::{Error, Result};
use longspan_kernels::{Prelude, Target};

/// AMD GPUs as a backend: `rocm`.
pub type Rocm = GpuBackend<Amd>;

/// The [`Vendor`] of `rocm`.
#[derive(Debug)]
pub enum Amd {}

impl Vendor for Amd {
    const NAME: &'static str = "rocm";

    fn machine() -> &'static Machine {
        static MACHINE: Machine = Machine::new(FACTS);
        &MACHINE
    }
}

const FACTS: Facts = Facts {
    name: Amd::NAME,
    flavor: Flavor::Hip,
    prelude: Prelude::Hip,
    driver: Place {
        what: "libamdhip64",
        candidates: runtime,
        beside: &[],
        how_to_get_it: "install ROCm (6.0 or newer) on a machine with an AMD GPU, and be in the groups render and video; or name \
                        the library in LONGSPAN_LIBAMDHIP64",
    },
    compiler: Place {
        what: "libhiprtc",
        candidates: compiler,
        beside: &[],
        how_to_get_it: "install ROCm's hip-runtime-amd (hiprtc), or name the library in LONGSPAN_LIBHIPRTC",
    },
    nccl: Place {
        what: "librccl",
        candidates: rccl,
        beside: &[],
        how_to_get_it: "install ROCm's rccl, or name the library in LONGSPAN_LIBRCCL",
    },
    codes: CODES,
    target,
    arch_flag: "--offload-arch=",
    flags: &["-std=c++17", "-O3"],
    fast_link: None,
    oldest: (50_200_000, "ROCm 5.2"),
};

/// Numbers of `hip_runtime_api.h`; those of attributes are the same in ROCm 5 and 6.
const CODES: Codes = Codes {
    out_of_memory: 2,
    not_ready: 600,
    peer_enabled: 704,
    // Uncorrectable ECC; illegal address, launch timeout, context destroyed, assert, launch failed; unknown, and what the
    // layer below reports.
    sticky: &[214, 700, 702, 709, 710, 719, 999, 1052, 1053],
    pointer_ordinal: 9,
    capability: [23, 61],
    units: 63,
    block_bytes: 74,
    unit_bytes: 10_002,
    cache_bytes: 19,
    pools: 88,
    pool_internal_dependencies: 3,
    pool_threshold: 4,
    pool_figures: [5, 7],
};

/// The driver names the architecture.
fn target(asked: &Asked) -> Result<(String, Target)> {
    let arch = asked.arch.clone().unwrap_or_default();
    match Target::amd(&arch, asked.block_bytes, asked.unit_bytes) {
        Some(target) => Ok((arch, target)),
        None => Err(Error::Unsupported {
            backend: Amd::NAME,
            what: format!("{}, whose architecture is {arch:?}", asked.name),
            instead: "gfx90a, gfx942 and gfx950 (Instinct MI200 and MI300 series), gfx110x and gfx115x (RDNA 3) are"
                .to_owned(),
        }),
    }
}

fn runtime() -> Vec<OsString> {
    let names = ["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"];
    named_or("LONGSPAN_LIBAMDHIP64", || places(&names))
}

/// Until ROCm 6 the runtime's own library has hipRTC too.
fn compiler() -> Vec<OsString> {
    let own = ["libhiprtc.so", "libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so.5"];
    named_or("LONGSPAN_LIBHIPRTC", || [places(&own), runtime()].concat())
}

fn rccl() -> Vec<OsString> {
    named_or("LONGSPAN_LIBRCCL", || places(&["librccl.so.1", "librccl.so"]))
}

/// `names` as the loader finds them; then in ROCm's folders.
fn places(names: &[&str]) -> Vec<OsString> {
    let mut list: Vec<OsString> = names.iter().map(OsString::from).collect();
    let home = std::env::var_os("ROCM_PATH").filter(|v| !v.is_empty()).map(PathBuf::from);
    for folder in home.into_iter().chain([PathBuf::from("/opt/rocm")]) {
        list.extend(names.iter().map(|name| folder.join("lib").join(name).into_os_string()));
    }
    list
}

#[cfg(test)]
mod tests;
