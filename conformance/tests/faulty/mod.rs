//! The checked CPU backend with one thing disturbed: what the suite must notice.

mod attention;
mod collective;
mod device;

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use longspan_cpu::Cpu as CpuBackend;
use longspan_hal::{Backend, DeviceInfo, GroupId, Result, View, ViewMut};

pub use attention::FaultyAttention;
pub use collective::FaultyCollective;
pub use device::FaultyDevice;

/// What is disturbed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Every band reaches one key too far.
    BandOffByOne,
    /// Gradients of keys and values are lost on their way home.
    DroppedReturn,
    /// Rows that saw nothing yet are merged as `exp(-inf - -inf)`.
    EmptyRowsIgnored,
    /// Keys from this position on (joint tokens) are counted again by the first step of the ring.
    JointTwice(i64),
    /// Slopes, sinks and dropout take the local head's index.
    LocalHeads,
    /// Nothing.
    None,
    /// Every rank gets its own part of dsinks only.
    OwnSinksOnly,
    /// Every so many-th wait is left out.
    RemovedWaits(usize),
    /// The last term of every sum is added twice.
    SummedTwice,
    /// Off the diagonal, windows lie as on it.
    UnshiftedWindow,
    /// Finish writes only rows that its slices select.
    UnwrittenRows,
}

static FAULT: RwLock<Fault> = RwLock::new(Fault::None);
static ALONE: Mutex<()> = Mutex::new(());

/// The fault in force.
pub fn fault() -> Fault {
    *FAULT.read().unwrap_or_else(PoisonError::into_inner)
}

/// Puts a fault in force until dropped; tests with faults run one after the other.
pub struct Planted(#[allow(dead_code)] MutexGuard<'static, ()>);

impl Planted {
    pub fn new(fault: Fault) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        *FAULT.write().unwrap_or_else(PoisonError::into_inner) = fault;
        Self(alone)
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        *FAULT.write().unwrap_or_else(PoisonError::into_inner) = Fault::None;
    }
}

/// The checked CPU backend behind the fault in force.
#[derive(Debug)]
pub struct Faulty;

/// The device below.
type Cpu = <CpuBackend as Backend>::Device;

impl Backend for Faulty {
    const NAME: &'static str = "faulty";

    type Device = FaultyDevice;
    type Collective = FaultyCollective;
    type Attention = FaultyAttention;

    fn devices() -> Result<Vec<DeviceInfo>> {
        Ok(CpuBackend::named("cpu-checked").into_iter().collect())
    }

    fn open(info: &DeviceInfo) -> Result<FaultyDevice> {
        Ok(FaultyDevice::new(CpuBackend::open(info)?))
    }

    fn group_id() -> Result<GroupId> {
        CpuBackend::group_id()
    }

    fn join(device: &FaultyDevice, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<FaultyCollective> {
        Ok(FaultyCollective::new(device.cpu(), CpuBackend::join(&device.cpu(), id, rank, size, limit)?))
    }

    fn attention(device: &FaultyDevice) -> Result<FaultyAttention> {
        Ok(FaultyAttention::new(device.cpu(), CpuBackend::attention(&device.cpu())?))
    }
}

fn view<'a>(v: View<'a, FaultyDevice>) -> Result<View<'a, Cpu>> {
    View::new(v.buffer(), *v.at())
}

fn view_mut<'a>(v: ViewMut<'a, FaultyDevice>) -> Result<ViewMut<'a, Cpu>> {
    ViewMut::new(v.buffer(), *v.at())
}

fn views<'a>(list: &[View<'a, FaultyDevice>]) -> Result<Vec<View<'a, Cpu>>> {
    list.iter().map(|v| view(*v)).collect()
}
