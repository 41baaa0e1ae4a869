//! The CPU backends: one implementation under several names, which differ in [`Options`] only.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::time::Duration;

use longspan_hal::{Backend, DeviceInfo, Error, GroupId, Result};

use crate::caps::{name, total_memory};
use crate::{CpuAttention, CpuCollective, CpuDevice, Options, Personality};

/// What distinguishes one CPU backend from another.
pub trait Flavor: Debug + Send + Sync + 'static {
    /// The backend's name.
    const NAME: &'static str;
    /// How its devices behave.
    const OPTIONS: Options;
}

/// The CPU as a [`Backend`].
#[derive(Debug)]
pub struct CpuBackend<F: Flavor>(PhantomData<F>);

macro_rules! flavors {
    ($($(#[$doc:meta])* $alias:ident = $flavor:ident($name:literal, $personality:ident, $checked:literal);)*) => {
        $(
            $(#[$doc])*
            pub type $alias = CpuBackend<$flavor>;

            #[doc = concat!("The [`Flavor`] of `", $name, "`.")]
            #[derive(Debug)]
            pub enum $flavor {}

            impl Flavor for $flavor {
                const NAME: &'static str = $name;
                const OPTIONS: Options = Options::new(Personality::$personality, $checked);
            }
        )*
    };
}

flavors! {
    /// `cpu`: to compute with.
    Cpu = Plain("cpu", Plain, false);
    /// `cpu-ascend-like`: checked, [`Personality::AscendLike`].
    CpuAscendLike = AscendLike("cpu-ascend-like", AscendLike, true);
    /// `cpu-checked`: checked mode.
    CpuChecked = Checked("cpu-checked", Plain, true);
    /// `cpu-nccl-like`: checked, [`Personality::NcclLike`].
    CpuNcclLike = NcclLike("cpu-nccl-like", NcclLike, true);
    /// `cpu-push`: checked, [`Personality::Push`].
    CpuPush = Push("cpu-push", Push, true);
}

impl<F: Flavor> Backend for CpuBackend<F> {
    const NAME: &'static str = F::NAME;

    type Device = CpuDevice;
    type Collective = CpuCollective;
    type Attention = CpuAttention;

    fn devices() -> Result<Vec<DeviceInfo>> {
        Ok(vec![DeviceInfo::new(0, name(), total_memory())])
    }

    fn open(info: &DeviceInfo) -> Result<CpuDevice> {
        if info.index != 0 {
            let why =
                format!("{} of backend {}: this machine is device 0, and all ranks share it", info.index, F::NAME);
            return Err(Error::invalid("device", why));
        }
        Ok(CpuDevice::open(F::NAME, F::OPTIONS))
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
}
