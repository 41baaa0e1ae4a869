//! A backend ties a device, a collective and an attention together under one name.

use std::fmt::Debug;
use std::time::Duration;

use crate::{Attention, Collective, Device, Result};

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
}
