//! A vendor of GPUs as a [`Backend`].

use std::marker::PhantomData;
use std::time::Duration;

use longspan_hal::{Backend, DType, DeviceInfo, Error, Finding, GroupId, KernelClass, Peak, Result, Transport};

use crate::findings::findings;
use crate::group::new_id;
use crate::{GpuAttention, GpuCollective, GpuDevice, Vendor};

/// The GPUs of a vendor.
#[derive(Debug)]
pub struct GpuBackend<V: Vendor>(PhantomData<V>);

impl<V: Vendor> Backend for GpuBackend<V> {
    const NAME: &'static str = V::NAME;

    type Device = GpuDevice;
    type Collective = GpuCollective;
    type Attention = GpuAttention;

    fn devices() -> Result<Vec<DeviceInfo>> {
        V::machine().devices()
    }

    fn open(info: &DeviceInfo) -> Result<GpuDevice> {
        let machine = V::machine();
        Ok(GpuDevice::new(machine.context(info.index)?, machine.kernels()?))
    }

    fn group_id() -> Result<GroupId> {
        V::machine().driver()?;
        new_id()
    }

    fn join(device: &GpuDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<GpuCollective> {
        GpuCollective::join(device, id, rank, size, limit)
    }

    fn attention(device: &GpuDevice) -> Result<GpuAttention> {
        Ok(GpuAttention::new(device))
    }

    fn peak(device: &GpuDevice, dtype: DType) -> Result<Peak> {
        let products = V::products().ok_or_else(|| Error::Unsupported {
            backend: V::NAME,
            what: "measuring its own peak".to_owned(),
            instead: "figures are given without a share of it".to_owned(),
        })?;
        products.peak(V::machine().products(&products)?, device, dtype)
    }

    fn set_transport(wanted: Transport) -> Result<()> {
        V::machine().set_transport(wanted);
        Ok(())
    }

    fn set_kernels(wanted: KernelClass) -> Result<()> {
        V::machine().set_kernels(wanted);
        Ok(())
    }

    fn findings() -> Vec<Finding> {
        findings::<V>()
    }
}
