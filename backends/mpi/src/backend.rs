//! `mpi`: the CPU's device and attention, with processes as ranks.

use std::time::Duration;

use longspan_cpu::{Cpu, CpuAttention, CpuDevice, Options, Personality};
use longspan_hal::{Backend, DeviceInfo, Error, GroupId, Result};

use crate::MpiCollective;
use crate::world::{NAME, world};

/// CPU ranks that are processes of an MPI job.
#[derive(Debug)]
pub enum Mpi {}

impl Backend for Mpi {
    const NAME: &'static str = NAME;

    type Device = CpuDevice;
    type Collective = MpiCollective;
    type Attention = CpuAttention;

    /// This process's share of its host.
    fn devices() -> Result<Vec<DeviceInfo>> {
        world()?;
        Cpu::devices()
    }

    fn open(info: &DeviceInfo) -> Result<CpuDevice> {
        if info.index != 0 {
            return Err(Error::invalid(
                "device",
                format!("{} of backend mpi: a process has device 0 alone", info.index),
            ));
        }
        Ok(CpuDevice::open(NAME, Options::new(Personality::Plain, false)))
    }

    fn group_id() -> Result<GroupId> {
        MpiCollective::group_id()
    }

    fn join(device: &CpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<MpiCollective> {
        MpiCollective::join(device, id, rank, size, limit)
    }

    fn attention(device: &CpuDevice) -> Result<CpuAttention> {
        CpuAttention::new(device)
    }
}
