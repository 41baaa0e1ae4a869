//! One rank of a sequence-parallel group: its device, communicator and kernels.

use std::time::Duration;

use longspan_hal::{Backend, DeviceInfo, GroupId, Result};

/// One rank of a sequence-parallel group.
#[derive(Debug)]
pub struct Member<B: Backend> {
    /// Its device.
    pub device: B::Device,
    /// Its communicator.
    pub collective: B::Collective,
    /// Its kernels.
    pub attention: B::Attention,
}

impl<B: Backend> Member<B> {
    /// Collective. Opens the device and joins the group `id` as `rank` of `size`; `limit` bounds every wait for a peer.
    ///
    /// # Errors
    /// As [`Backend::open`], [`Backend::join`] and [`Backend::attention`].
    pub fn join(info: &DeviceInfo, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let device = B::open(info)?;
        let attention = B::attention(&device)?;
        let collective = B::join(&device, id, rank, size, limit)?;
        Ok(Self { device, collective, attention })
    }
}
