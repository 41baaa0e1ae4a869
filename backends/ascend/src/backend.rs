//! The Ascend backends: one device and collective, attention basic or fused.

use std::sync::Arc;
use std::time::Duration;

use ascendcl_sys as sys;
use longspan_hal::{Backend, DeviceInfo, Error, GroupId, Result};

use crate::context::{Context, check, start};
use crate::{AscendAttention, AscendCollective, AscendDevice};

/// `ascend`: attention from matmuls and small operators, with every option.
#[derive(Debug)]
pub enum Ascend {}

/// `ascend-fused`: `FlashAttentionScore` and its gradient where they can, refused where they can't.
#[derive(Debug)]
pub enum AscendFused {}

/// The devices of this machine.
fn devices() -> Result<Vec<DeviceInfo>> {
    let api = sys::Ascend::get()?;
    start(api)?;
    let mut count = 0;
    // SAFETY: the pointer is valid for the write.
    check("aclrtGetDeviceCount", unsafe { (api.runtime.aclrtGetDeviceCount)(&mut count) })?;
    (0..count)
        .map(|index| {
            let (_, total) = Context::new(index)?.memory()?;
            // SAFETY: AscendCL returns static text.
            let name = unsafe { crate::context::text((api.runtime.aclrtGetSocName)()) };
            Ok(DeviceInfo::new(index, format!("Huawei {name}"), total as u64))
        })
        .collect()
}

fn group_id() -> Result<GroupId> {
    AscendCollective::group_id(&Arc::new(Context::new(0)?))
}

macro_rules! backend {
    ($Name:ident, $name:literal, $fused:literal) => {
        impl Backend for $Name {
            const NAME: &'static str = $name;

            type Device = AscendDevice;
            type Collective = AscendCollective;
            type Attention = AscendAttention;

            fn devices() -> Result<Vec<DeviceInfo>> {
                devices()
            }

            fn open(info: &DeviceInfo) -> Result<AscendDevice> {
                AscendDevice::open(info.index)
            }

            fn group_id() -> Result<GroupId> {
                group_id()
            }

            fn join(
                device: &AscendDevice,
                id: &GroupId,
                rank: u32,
                size: u32,
                limit: Duration,
            ) -> Result<AscendCollective> {
                if size == 0 {
                    return Err(Error::invalid("size", "a group has at least one rank"));
                }
                AscendCollective::join(device, id, rank, size, limit)
            }

            fn attention(device: &AscendDevice) -> Result<AscendAttention> {
                AscendAttention::new(device, $fused)
            }
        }
    };
}

backend!(Ascend, "ascend", false);
backend!(AscendFused, "ascend-fused", true);
