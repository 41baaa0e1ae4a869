//! A backend ties a device, a collective and an attention together under one name.

use std::fmt::Debug;
use std::time::Duration;

use crate::{Attention, Collective, DType, Device, Error, Result};

/// A device that could be opened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Index for the user: the `1` of `cuda:1`.
    pub index: u32,
    /// Name of the device.
    pub name: String,
    /// Total memory in bytes.
    pub memory_bytes: u64,
}

impl DeviceInfo {
    /// Info from its parts.
    pub fn new(index: u32, name: impl Into<String>, memory_bytes: u64) -> Self {
        Self { index, name: name.into(), memory_bytes }
    }
}

/// What the ranks of one group share before they can talk: made by one, handed to all (in one process, by MPI, by a
/// file), given to [`Backend::join`].
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GroupId(
    /// The backend's own bytes (`ncclUniqueId`, `HcclRootInfo`, a registry key, ...).
    pub Vec<u8>,
);

/// How messages travel between the devices of one group.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Transport {
    /// What the backend takes for the fastest that works here.
    #[default]
    Auto,
    /// The vendor's library of collective operations (NCCL, RCCL).
    Library,
    /// Copies between the devices' memories.
    Peer,
}

/// Class of the attention kernels.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum KernelClass {
    /// What the backend takes for the fastest that can do the work.
    #[default]
    Auto,
    /// FlashAttention-2 class: tensor cores fed by every warp for itself.
    Flash2,
    /// FlashAttention-3 class: Hopper's warpgroup products and bulk copies; what they can't do is refused.
    Flash3,
}

/// The most that a device computes: measured, not taken from a data sheet.
#[derive(Clone, Debug, PartialEq)]
pub struct Peak {
    /// Floating-point operations per second; a multiply-add is two.
    pub flops_per_second: f64,
    /// What was measured, such as `cublasGemmEx, 8192 x 8192 x 8192`.
    pub how: String,
}

/// One thing that a backend found on this machine, or misses.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// What it is, such as `driver` or `GPU 0`.
    pub what: String,
    /// What there is to say of it; [`Error::Unavailable`] says how to get it.
    pub state: Result<String>,
}

impl Finding {
    /// A finding from its parts.
    pub fn new(what: impl Into<String>, state: Result<String>) -> Self {
        Self { what: what.into(), state }
    }
}

/// One vendor.
pub trait Backend: Sized + Debug + Send + Sync + 'static {
    /// The name that `--backend` takes.
    const NAME: &'static str;

    /// Device of this backend.
    type Device: Device;
    /// Communicator of this backend.
    type Collective: Collective<Self::Device>;
    /// Attention of this backend.
    type Attention: Attention<Self::Device>;

    /// The devices of this machine.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if a library is missing, with how to get it.
    fn devices() -> Result<Vec<DeviceInfo>>;

    /// Opens a device. Every rank opens its own handle, also where ranks share a device.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`], [`crate::Error::Driver`].
    fn open(info: &DeviceInfo) -> Result<Self::Device>;

    /// A new group's id.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`], [`crate::Error::Driver`].
    fn group_id() -> Result<GroupId>;

    /// Collective. Joins the group `id` as `rank` of `size`; `limit` bounds this and every later wait for a peer.
    ///
    /// # Errors
    /// [`crate::Error::Timeout`] naming how many ranks came; [`crate::Error::Invalid`] for a rank out of range or
    /// taken.
    fn join(device: &Self::Device, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self::Collective>;

    /// The attention of `device`.
    ///
    /// # Errors
    /// [`crate::Error::Driver`].
    fn attention(device: &Self::Device) -> Result<Self::Attention>;

    /// The most that `device` computes in products of matrices of `dtype`, measured now, which takes a second or so.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no way to measure it; [`Error::Unavailable`] if a library is missing;
    /// [`Error::Driver`].
    fn peak(_device: &Self::Device, dtype: DType) -> Result<Peak> {
        Err(Error::Unsupported {
            backend: Self::NAME,
            what: format!("measuring its own peak in {dtype}"),
            instead: "figures are given without a share of it".to_owned(),
        })
    }

    /// Chooses how messages of groups that are joined from now on travel.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no choice.
    fn set_transport(wanted: Transport) -> Result<()> {
        match wanted {
            Transport::Auto => Ok(()),
            other => Err(Error::Unsupported {
                backend: Self::NAME,
                what: format!("a choice of how messages travel ({})", format!("{other:?}").to_lowercase()),
                instead: "it has one way only: auto".to_owned(),
            }),
        }
    }

    /// Chooses the attention kernels of devices that are opened from now on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no choice.
    fn set_kernels(wanted: KernelClass) -> Result<()> {
        match wanted {
            KernelClass::Auto => Ok(()),
            other => Err(Error::Unsupported {
                backend: Self::NAME,
                what: format!("a choice of kernels ({})", format!("{other:?}").to_lowercase()),
                instead: "it has one class only: auto".to_owned(),
            }),
        }
    }

    /// What there is of this backend on this machine: libraries and their versions, devices, links. Loads libraries.
    fn findings() -> Vec<Finding> {
        match Self::devices() {
            Ok(devices) => {
                devices.into_iter().map(|d| Finding::new(format!("device {}", d.index), Ok(d.name))).collect()
            }
            Err(error) => vec![Finding::new("devices", Err(error))],
        }
    }
}
