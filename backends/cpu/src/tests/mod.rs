//! Tests of the backend as a whole: ordering, exchanges, losing a peer.

mod exchange;
mod loss;
mod memory;
mod ordering;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use longspan_hal::{DType, Device, Extent, GroupId, Priority, Result, Strided, View, ViewMut};

use crate::{Buffer, CpuCollective, CpuDevice, CpuStream, Options, Personality};

/// More than any test needs, unless it hangs.
const LONG: Duration = Duration::from_secs(20);

/// Every personality, checked, and the unchecked plain one.
const ALL: [Options; 5] = [
    Options::new(Personality::Plain, false),
    Options::new(Personality::Plain, true),
    Options::new(Personality::NcclLike, true),
    Options::new(Personality::Push, true),
    Options::new(Personality::AscendLike, true),
];

const CHECKED: Options = ALL[1];
const PLAIN: Options = ALL[0];

/// One rank: its device, group and transfer stream.
struct Rank {
    device: CpuDevice,
    group: CpuCollective,
    stream: CpuStream,
}

fn device(options: Options) -> CpuDevice {
    CpuDevice::open("cpu", options)
}

fn stream(device: &CpuDevice) -> CpuStream {
    device.stream(Priority::Normal).expect("streams are made lazily")
}

fn join(id: &GroupId, rank: u32, size: u32, options: Options, limit: Duration) -> Result<Rank> {
    let device = device(options);
    let group = CpuCollective::join(&device, id, rank, size, limit)?;
    let stream = stream(&device);
    Ok(Rank { device, group, stream })
}

/// Runs `body` on every rank of a group; `None` for a rank that panicked.
fn ranks<T: Send>(size: u32, options: Options, limit: Duration, body: impl Fn(Rank) -> T + Sync) -> Vec<Option<T>> {
    let id = CpuCollective::group_id();
    let run = |rank| {
        let rank = join(&id, rank, size, options, limit).expect("all ranks join");
        catch_unwind(AssertUnwindSafe(|| body(rank))).ok()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|t| t.join().expect("panics are caught")).collect()
    })
}

/// Like [`ranks`], where no rank may panic.
fn all<T: Send>(size: u32, options: Options, body: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    let results = ranks(size, options, LONG, body);
    results.into_iter().map(|r| r.expect("a rank panicked; its message is above")).collect()
}

fn dense(extent: Extent) -> Strided {
    Strided::dense(DType::F32, extent)
}

fn read<'a>(buffer: &'a Buffer, at: Strided) -> View<'a, CpuDevice> {
    View::new(buffer, at).expect("inside its buffer")
}

fn write<'a>(buffer: &'a Buffer, at: Strided) -> ViewMut<'a, CpuDevice> {
    ViewMut::new(buffer, at).expect("inside its buffer")
}

impl Rank {
    /// Fresh memory with these f32 values, uploaded on the rank's stream.
    fn upload(&self, values: &[f32]) -> Buffer {
        let buffer = self.device.alloc(values.len() * 4).expect("little memory");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let to = write(&buffer, dense([1, 1, 1, values.len()]));
        self.device.upload(&self.stream, &bytes, to).expect("queued");
        buffer
    }

    fn download(&self, buffer: &Buffer, at: Strided) -> Result<Vec<f32>> {
        download(&self.device, &self.stream, buffer, at)
    }
}

/// Returns once everything queued on `on` ran, without an order that checked mode knows of.
fn watch(device: &CpuDevice, on: &CpuStream) {
    let event = device.record(on).expect("queued");
    while device.elapsed(&event, &event).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn download(device: &CpuDevice, on: &CpuStream, buffer: &Buffer, at: Strided) -> Result<Vec<f32>> {
    let mut bytes = vec![0; at.bytes()];
    device.download(on, read(buffer, at), &mut bytes, LONG)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}
