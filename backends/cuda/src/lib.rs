//! Longspan on NVIDIA GPUs: what only they have. Everything else is in `longspan-gpu`.
//!
//! Needed at run time: the driver (`libcuda.so.1`) and NVRTC (`libnvrtc.so`); NCCL (`libnccl.so.2`) for devices that can't
//! reach each other's memory. No CUDA toolkit is needed, neither to build nor to run.
//!
//! | variable | what it does |
//! |---|---|
//! | `LONGSPAN_EXCHANGE` | `auto` (the default), `peer` or `nccl`: how messages travel |
//! | `LONGSPAN_KERNEL` | `auto` (the default), `flash2` or `flash3`: class of the attention kernels (`flash3` on Hopper only) |
//! | `LONGSPAN_LIBCUDA`, `LONGSPAN_LIBNVRTC`, `LONGSPAN_LIBNCCL`, `LONGSPAN_LIBCUBLAS` | path of a library, and no other is tried |
//! | `LONGSPAN_CACHE` | folder of compiled kernels |
//! | `LONGSPAN_QUIET` | no lines about compiled kernels |

use std::ffi::OsString;
use std::path::PathBuf;

use longspan_gpu::{
    Asked, Codes, Facts, Flavor, GpuBackend, Machine, Place, Products, Vendor, in_site_packages, named_or,
};
pub use longspan_gpu::{Cache, CacheFigures};
use longspan_hal::Result;
use longspan_kernels::{Prelude, Target};

/// NVIDIA GPUs as a backend: `cuda`.
pub type Cuda = GpuBackend<Nvidia>;

/// The [`Vendor`] of `cuda`.
#[derive(Debug)]
pub enum Nvidia {}

impl Vendor for Nvidia {
    const NAME: &'static str = "cuda";

    fn machine() -> &'static Machine {
        static MACHINE: Machine = Machine::new(FACTS);
        &MACHINE
    }

    fn products() -> Option<Products> {
        Some(PRODUCTS)
    }

    fn driver_release() -> Option<String> {
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
    }
}

const FACTS: Facts = Facts {
    name: Nvidia::NAME,
    flavor: Flavor::Cuda,
    prelude: Prelude::Cuda,
    driver: Place {
        what: "libcuda",
        candidates: driver,
        beside: &[],
        how_to_get_it: "install the NVIDIA driver (525 or newer) on a machine with an NVIDIA GPU, or name the library in \
                        LONGSPAN_LIBCUDA",
    },
    compiler: Place {
        what: "libnvrtc",
        candidates: compiler,
        beside: &["libnvrtc-builtins.so"],
        how_to_get_it: "pip install nvidia-cuda-nvrtc, or install a CUDA toolkit and set CUDA_HOME, or name the library in \
                        LONGSPAN_LIBNVRTC",
    },
    nccl: Place {
        what: "libnccl",
        candidates: nccl,
        beside: &[],
        how_to_get_it: "pip install nvidia-nccl-cu13, or install libnccl2, or name the library in LONGSPAN_LIBNCCL",
    },
    codes: CODES,
    target,
    arch_flag: "--gpu-architecture=",
    flags: &["-std=c++17"],
    // CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: over NVLink they are, over PCIe not.
    fast_link: Some((3, "NVLink")),
    oldest: (12_000, "driver 525 (CUDA 12.0)"),
};

/// cuBLAS with the numbers of `library_types.h` and `cublas_api.h`: `CUDA_R_16BF`, `CUDA_R_16F`, `CUDA_R_32F`,
/// `CUBLAS_COMPUTE_32F`, `CUBLAS_GEMM_DEFAULT`.
const PRODUCTS: Products = Products {
    place: Place {
        what: "libcublas",
        candidates: products,
        beside: &["libcublasLt.so"],
        how_to_get_it: "pip install nvidia-cublas, or install a CUDA toolkit, or name the library in LONGSPAN_LIBCUBLAS; only \
                        the share of peak of `longspan bench` needs it",
    },
    dtypes: [14, 2, 0],
    compute: 68,
    algorithm: -1,
};

/// Numbers of `cuda.h`.
const CODES: Codes = Codes {
    out_of_memory: 2,
    not_ready: 600,
    peer_enabled: 704,
    // Double-bit ECC, invalid PTX state and NVLink faults, then everything that corrupts a context: illegal address,
    // launch timeout, assert, hardware stack error, illegal instruction, misaligned address, invalid address space,
    // invalid program counter, launch failed; and the system and device being lost.
    sticky: &[46, 214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 802, 999],
    pointer_ordinal: 9,
    capability: [75, 76],
    units: 16,
    block_bytes: 97,
    unit_bytes: 81,
    cache_bytes: 38,
    pools: 115,
    pool_internal_dependencies: 3,
    pool_threshold: 4,
    pool_figures: [5, 7],
};

/// The compute capability says it all.
fn target(asked: &Asked) -> Result<(String, Target)> {
    let Asked { major, minor, block_bytes, unit_bytes, .. } = *asked;
    Ok((arch(major, minor), Target::new(10 * major + minor, block_bytes, unit_bytes)))
}

/// `sm_90a`: from 9.0 on with what only this architecture has.
fn arch(major: u32, minor: u32) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

fn driver() -> Vec<OsString> {
    let usual = ["libcuda.so.1", "libcuda.so", "/usr/local/nvidia/lib64/libcuda.so.1"];
    named_or("LONGSPAN_LIBCUDA", || usual.map(OsString::from).into())
}

fn compiler() -> Vec<OsString> {
    let versions = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    named_or("LONGSPAN_LIBNVRTC", || {
        let mut list: Vec<OsString> = versions.map(OsString::from).into();
        let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
        for home in homes.chain([PathBuf::from("/usr/local/cuda")]) {
            for folder in ["lib64", "lib", "targets/x86_64-linux/lib"] {
                list.extend(versions.map(|name| home.join(folder).join(name).into_os_string()));
            }
        }
        list.extend(in_site_packages("nvidia", "libnvrtc.so"));
        list
    })
}

fn nccl() -> Vec<OsString> {
    named_or("LONGSPAN_LIBNCCL", || {
        let mut list: Vec<OsString> = ["libnccl.so.2", "libnccl.so"].map(OsString::from).into();
        list.extend(in_site_packages("nvidia", "libnccl.so"));
        list
    })
}

fn products() -> Vec<OsString> {
    let versions = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];
    named_or("LONGSPAN_LIBCUBLAS", || {
        let mut list: Vec<OsString> = versions.map(OsString::from).into();
        list.extend(versions.map(|name| PathBuf::from("/usr/local/cuda/lib64").join(name).into_os_string()));
        list.extend(in_site_packages("nvidia", "libcublas.so"));
        list
    })
}

#[cfg(test)]
mod tests;
