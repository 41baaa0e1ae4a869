//! The CPU as a [`Backend`]: one device under several personalities, which differ in [`Options`] only.

use std::time::Duration;

use longspan_hal::{Backend, DType, DeviceInfo, Error, GroupId, Peak, Result};

use crate::caps::{name, total_memory};
use crate::peak::peak;
use crate::{CpuAttention, CpuCollective, CpuDevice, Options, Personality};

/// Names and behaviour of the CPU's devices, by index. All are the same cores; the first is the one to compute with, the
/// others exist to judge algorithms.
const DEVICES: [(&str, Options); 5] = [
    ("cpu", Options::new(Personality::Plain, false)),
    ("cpu-checked", Options::new(Personality::Plain, true)),
    ("cpu-nccl-like", Options::new(Personality::NcclLike, true)),
    ("cpu-push", Options::new(Personality::Push, true)),
    ("cpu-ascend-like", Options::new(Personality::AscendLike, true)),
];

/// The CPU as a [`Backend`].
#[derive(Debug)]
pub struct Cpu;

impl Cpu {
    /// Names of the CPU's devices: `cpu`, and `cpu-checked`, `cpu-nccl-like`, `cpu-push`, `cpu-ascend-like`, which run in
    /// checked mode.
    pub fn names() -> impl Iterator<Item = &'static str> {
        DEVICES.iter().map(|d| d.0)
    }

    /// The device of this name.
    pub fn named(wanted: &str) -> Option<DeviceInfo> {
        let index = DEVICES.iter().position(|d| d.0 == wanted)?;
        Some(DeviceInfo::new(index as u32, name(), total_memory()))
    }
}

impl Backend for Cpu {
    const NAME: &'static str = "cpu";

    type Device = CpuDevice;
    type Collective = CpuCollective;
    type Attention = CpuAttention;

    /// The device to compute with; [`Cpu::named`] gives the others.
    fn devices() -> Result<Vec<DeviceInfo>> {
        Ok(vec![DeviceInfo::new(0, name(), total_memory())])
    }

    fn open(info: &DeviceInfo) -> Result<CpuDevice> {
        let Some((name, options)) = DEVICES.get(info.index as usize) else {
            let why = format!("{} of backend cpu: all ranks share this machine's device 0", info.index);
            return Err(Error::invalid("device", why));
        };
        Ok(CpuDevice::open(name, *options))
    }

    fn group_id() -> Result<GroupId> {
        Ok(CpuCollective::group_id())
    }

    fn join(device: &CpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<CpuCollective> {
        CpuCollective::join(device, id, rank, size, limit)
    }

    fn attention(device: &CpuDevice) -> Result<CpuAttention> {
        CpuAttention::new(device)
    }

    fn peak(_device: &CpuDevice, _dtype: DType) -> Result<Peak> {
        Ok(peak())
    }
}
