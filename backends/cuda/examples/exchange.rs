//! Rate of an exchange between two ranks, both directions at once: dense messages, and rows cut out of wider ones as an
//! all-to-all over heads does.
//!
//! ```text
//! exchange [DEVICE,DEVICE]        0,1 unless given; LONGSPAN_EXCHANGE chooses peer or nccl
//! ```

use std::time::Duration;

use longspan_cuda::Cuda;
use longspan_hal::{
    Backend, Collective, DType, Device, DeviceInfo, Error, GroupId, P2p, Priority, Result, Strided, View, ViewMut,
};

const LIMIT: Duration = Duration::from_secs(60);
const ROUNDS: u32 = 10;

fn main() -> Result<()> {
    let list = std::env::args().nth(1).unwrap_or_else(|| "0,1".into());
    let wanted: Vec<usize> = list.split(',').filter_map(|n| n.parse().ok()).collect();
    let all = Cuda::devices()?;
    let find =
        |&i: &usize| all.get(i).cloned().ok_or_else(|| Error::invalid("device", format!("there is no device {i}")));
    let infos = wanted.iter().map(find).collect::<Result<Vec<_>>>()?;
    let id = Cuda::group_id()?;
    let [first, second] = infos.as_slice() else {
        return Err(Error::invalid("devices", "two are needed, such as 0,1"));
    };
    let lines = std::thread::scope(|scope| {
        let other = scope.spawn(|| rank(second, &id, 1));
        let lines = rank(first, &id, 0);
        match other.join() {
            Ok(Ok(_)) => lines,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::invalid("rank 1", "it panicked")),
        }
    })?;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn rank(info: &DeviceInfo, id: &GroupId, me: u32) -> Result<Vec<String>> {
    let device = Cuda::open(info)?;
    let group = Cuda::join(&device, id, me, 2, LIMIT)?;
    let stream = device.stream(Priority::High)?;
    let mut lines = Vec::new();
    for mib in [1usize, 16, 64, 256, 1024] {
        for row in [None, Some(256), Some(1024)] {
            let rate = measure(&device, &group, &stream, mib << 20, row)?;
            let kind = row.map_or("dense".to_owned(), |row| format!("rows of {row} B"));
            lines.push(format!("{mib} MiB {kind}: {rate:.0} GB/s each way"));
        }
    }
    Ok(lines)
}

type Stream = <<Cuda as Backend>::Device as Device>::Stream;
type Gpu = <Cuda as Backend>::Device;
type Group = <Cuda as Backend>::Collective;

/// GB/s that this rank sends, the median of some rounds.
fn measure(device: &Gpu, group: &Group, stream: &Stream, bytes: usize, row: Option<usize>) -> Result<f64> {
    let (me, dim) = (group.rank(), row.unwrap_or(4096) / 2);
    let heads = if row.is_some() { 8 } else { 1 };
    let source = Strided::dense(DType::Bf16, [1, bytes / 2 / dim, heads, dim]);
    let part = source.narrow(2, 0..1)?;
    let (memory, window) = (device.alloc(source.bytes())?, group.window(bytes)?);
    let into = ViewMut::new(&window, Strided::dense(DType::Bf16, part.extent()))?;
    let send = P2p::Send { to: 1 - me, dtype: DType::Bf16, extent: part.extent() };
    let exchange = group.prepare(&[send, P2p::Recv { from: 1 - me, into }])?;
    let view = View::new(&memory, part)?;
    device.fill(stream, 1.0, ViewMut::new(&memory, source)?)?;
    group.exchange(stream, &exchange, &[view])?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        group.barrier(stream)?;
        let from = device.record(stream)?;
        group.exchange(stream, &exchange, &[view])?;
        let to = device.record(stream)?;
        device.synchronize(stream, LIMIT)?;
        times.push(device.elapsed(&from, &to)?);
    }
    times.sort();
    Ok(bytes as f64 / times[times.len() / 2].as_secs_f64() / 1e9)
}
