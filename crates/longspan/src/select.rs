//! Backends by name. A backend is a type; a visitor is called with the one that a name selects.

use longspan_hal::{Backend, DeviceInfo, Error, Finding, KernelClass, Result, Transport};

/// Code that runs on whichever backend was selected.
pub trait Visit {
    /// What it returns.
    type Output;

    /// Called with the selected backend; `devices` are the selected ones, in the order given.
    ///
    /// # Errors
    /// The visitor's own.
    fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> Result<Self::Output>;
}

/// How to get the backend `mpi`.
#[cfg(not(feature = "mpi"))]
pub(crate) const BUILD_MPI: &str = "build with `--features mpi`; that needs an MPI and libclang: apt install libopenmpi-dev openmpi-bin \
    libclang-dev, or pip install mpich libclang and set MPICC, LIBCLANG_PATH and LD_LIBRARY_PATH to what they brought";

/// Names of the backends that were compiled in.
pub fn backends() -> Vec<&'static str> {
    #[allow(unused_mut)] // without any backend
    let mut names = Vec::new();
    #[cfg(feature = "ascend")]
    names.extend([longspan_ascend::Ascend::NAME, longspan_ascend::AscendFused::NAME]);
    #[cfg(feature = "cpu")]
    names.extend(longspan_cpu::Cpu::names());
    #[cfg(feature = "cuda")]
    names.extend([longspan_cuda::Cuda::NAME]);
    #[cfg(feature = "rocm")]
    names.extend([longspan_rocm::Rocm::NAME]);
    #[cfg(feature = "mpi")]
    names.extend([longspan_mpi::Mpi::NAME]);
    names
}

/// Calls `visitor` with the backend that `selector` names: `NAME`, or `NAME:INDEX[,INDEX...]` to choose devices.
///
/// # Errors
/// [`Error::Invalid`] for an unknown name (lists those compiled in and how to get others) or device; [`Error::Unavailable`]
/// if a library is missing.
#[cfg_attr(
    not(any(feature = "ascend", feature = "cpu", feature = "cuda", feature = "mpi", feature = "rocm")),
    allow(unused_variables)
)] // without any backend, nothing is visited
pub fn select<V: Visit>(selector: &str, visitor: V) -> Result<V::Output> {
    let (name, indices) = parse(selector)?;
    match name {
        #[cfg(feature = "ascend")]
        "ascend" => open::<longspan_ascend::Ascend, V>(&indices, visitor),
        #[cfg(feature = "ascend")]
        "ascend-fused" => open::<longspan_ascend::AscendFused, V>(&indices, visitor),
        #[cfg(feature = "cpu")]
        "cpu" => open::<longspan_cpu::Cpu, V>(&indices, visitor),
        #[cfg(feature = "cpu")]
        name if longspan_cpu::Cpu::named(name).is_some() => match indices[..] {
            [] => visitor.visit::<longspan_cpu::Cpu>(longspan_cpu::Cpu::named(name).into_iter().collect()),
            _ => Err(Error::invalid("backend", format!("{name} is one device: write {name:?}, not {selector:?}"))),
        },
        #[cfg(feature = "cuda")]
        "cuda" => open::<longspan_cuda::Cuda, V>(&indices, visitor),
        #[cfg(feature = "rocm")]
        "rocm" => open::<longspan_rocm::Rocm, V>(&indices, visitor),
        #[cfg(feature = "mpi")]
        "mpi" => open::<longspan_mpi::Mpi, V>(&indices, visitor),
        #[cfg(not(feature = "mpi"))]
        "mpi" => Err(Error::Unavailable {
            library: "MPI".into(),
            why: "this build has no MPI".into(),
            how_to_get_it: BUILD_MPI.into(),
        }),
        _ => Err(Error::invalid(
            "backend",
            format!(
                "{name:?} is not compiled in; this build has {}. Others are cargo features of longspan",
                backends().join(", ")
            ),
        )),
    }
}

/// The devices that `selector` names.
///
/// # Errors
/// As [`select`].
pub fn devices(selector: &str) -> Result<Vec<DeviceInfo>> {
    struct Devices;
    impl Visit for Devices {
        type Output = Vec<DeviceInfo>;

        fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> Result<Vec<DeviceInfo>> {
            Ok(devices)
        }
    }
    select(selector, Devices)
}

/// Chooses how messages of the backend that `selector` names travel, in groups that are made from now on.
///
/// # Errors
/// As [`select`]; [`Error::Unsupported`] where the backend has no choice.
pub fn set_transport(selector: &str, wanted: Transport) -> Result<()> {
    struct Set(Transport);
    impl Visit for Set {
        type Output = ();

        fn visit<B: Backend>(self, _devices: Vec<DeviceInfo>) -> Result<()> {
            B::set_transport(self.0)
        }
    }
    select(selector, Set(wanted))
}

/// Chooses the class of attention kernels of the backend that `selector` names, for devices that are opened from now on.
///
/// # Errors
/// As [`select`]; [`Error::Unsupported`] where the backend has no choice.
pub fn set_kernels(selector: &str, wanted: KernelClass) -> Result<()> {
    struct Set(KernelClass);
    impl Visit for Set {
        type Output = ();

        fn visit<B: Backend>(self, _devices: Vec<DeviceInfo>) -> Result<()> {
            B::set_kernels(self.0)
        }
    }
    select(selector, Set(wanted))
}

/// What there is of a backend on this machine; `None` if `name` is not compiled in. Loads its libraries, a broken one of which
/// may end the process.
pub fn findings(name: &str) -> Option<Vec<Finding>> {
    match name {
        #[cfg(feature = "ascend")]
        "ascend" | "ascend-fused" => Some(longspan_ascend::Ascend::findings()),
        #[cfg(feature = "cpu")]
        name if longspan_cpu::Cpu::named(name).is_some() => Some(longspan_cpu::Cpu::findings()),
        #[cfg(feature = "cuda")]
        "cuda" => Some(longspan_cuda::Cuda::findings()),
        #[cfg(feature = "rocm")]
        "rocm" => Some(longspan_rocm::Rocm::findings()),
        _ => None,
    }
}

fn parse(selector: &str) -> Result<(&str, Vec<u32>)> {
    let Some((name, list)) = selector.split_once(':') else {
        return Ok((selector, Vec::new()));
    };
    let bad = |_| Error::invalid("backend", format!("{list:?} is not a list of device indices such as 0,1"));
    Ok((name, list.split(',').map(str::parse).collect::<Result<_, _>>().map_err(bad)?))
}

#[cfg_attr(
    not(any(feature = "ascend", feature = "cpu", feature = "cuda", feature = "mpi", feature = "rocm")),
    allow(dead_code)
)]
fn open<B: Backend, V: Visit>(indices: &[u32], visitor: V) -> Result<V::Output> {
    let all = B::devices()?;
    if indices.is_empty() {
        return visitor.visit::<B>(all);
    }
    let chosen = indices
        .iter()
        .map(|i| {
            all.iter().find(|d| d.index == *i).cloned().ok_or_else(|| {
                let have: Vec<String> = all.iter().map(|d| d.index.to_string()).collect();
                Error::invalid("backend", format!("{} has no device {i}, it has {}", B::NAME, have.join(", ")))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    visitor.visit::<B>(chosen)
}
