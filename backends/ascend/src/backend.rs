//! The Ascend backends: one device and collective, attention basic or fused.

use std::sync::Arc;
use std::time::Duration;

use ascendcl_sys as sys;
use longspan_hal::{Backend, DeviceInfo, Error, Finding, GroupId, Result};

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

/// The runtime's version, and the devices with their memory.
fn findings() -> Vec<Finding> {
    let api = match sys::Ascend::get() {
        Ok(api) => api,
        Err(error) => return vec![Finding::new("CANN", Err(error))],
    };
    let version = || {
        start(api)?;
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        // SAFETY: the pointers are valid for writes.
        check("aclrtGetVersion", unsafe { (api.runtime.aclrtGetVersion)(&mut major, &mut minor, &mut patch) })?;
        Ok(format!("AscendCL {major}.{minor}.{patch}"))
    };
    let mut found = vec![Finding::new("runtime", version())];
    if let Some(library) = std::env::var_os("LONGSPAN_ASCEND_LIBRARY") {
        let text = format!("{} instead of CANN's (LONGSPAN_ASCEND_LIBRARY)", library.to_string_lossy());
        found.push(Finding::new("library", Ok(text)));
    }
    match devices() {
        Ok(devices) if devices.is_empty() => {
            found.push(Finding::new("devices", Ok("none: AscendCL lists no NPU".into())));
        }
        Ok(devices) => found.extend(devices.into_iter().map(|d| {
            let text = format!("{}, {:.1} GiB", d.name, d.memory_bytes as f64 / f64::from(1 << 30));
            Finding::new(format!("NPU {}", d.index), Ok(text))
        })),
        Err(error) => found.push(Finding::new("devices", Err(error))),
    }
    found
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

            fn findings() -> Vec<Finding> {
                findings()
            }

            fn attention(device: &AscendDevice) -> Result<AscendAttention> {
                AscendAttention::new(device, $fused)
            }
        }
    };
}

backend!(Ascend, "ascend", false);
backend!(AscendFused, "ascend-fused", true);
