//! Exchanges between two processes, beside MPI's own calls and `memcpy`, in one run: `mpirun -n 2 exchange`.
//!
//! Every figure is GB/s of one direction, the best of several rounds of a ping-pong: process 0 sends, process 1 sends back.
//!
//! | column | what |
//! |---|---|
//! | dense | an exchange of contiguous bytes |
//! | MPI | `MPI_Send` and `MPI_Recv` of the same bytes from the same memory, which is what the library can do |
//! | strided | an exchange of every second head: a derived datatype, or packed inside where it is large |
//! | packed | the same packed by a copy on the device, sent dense, and unpacked by a copy |
//! | memcpy | one copy of the bytes within a process, without any exchange |

use std::time::{Duration, Instant};

use longspan_cpu::{Buffer, CpuDevice, CpuStream};
use longspan_hal::{Backend, Collective, DType, Device, GroupId, P2p, Priority, Result, Strided, View, ViewMut};
use longspan_mpi::{Mpi, MpiCollective, broadcast, finalize, world};
use mpi::traits::{Communicator, Destination, Source};

const LIMIT: Duration = Duration::from_secs(120);
const ROUNDS: usize = 4;

/// Heads and head size of the strided views: rows of 256 bytes, as a Ulysses all-to-all sends them.
const HEADS: usize = 8;
const DIM: usize = 64;

struct Rank {
    device: CpuDevice,
    group: MpiCollective,
    stream: CpuStream,
    me: u32,
}

fn main() -> Result<()> {
    let world = world()?;
    assert_eq!(world.size, 2, "start it with mpirun -n 2");
    let made = if world.rank == 0 { Mpi::group_id()?.0 } else { Vec::new() };
    let device = Mpi::open(&Mpi::devices()?[0])?;
    let group = Mpi::join(&device, &GroupId(broadcast(&made)?), world.rank, 2, LIMIT)?;
    let stream = device.stream(Priority::High)?;
    let rank = Rank { device, group, stream, me: world.rank };
    if rank.me == 0 {
        println!(
            "{:>10} {:>7} {:>7} {:>6} {:>7} {:>7} {:>7}",
            "bytes", "dense", "MPI", "ratio", "strided", "packed", "memcpy"
        );
    }
    for shift in [12, 16, 20, 23, 26] {
        rank.row(1 << shift)?;
    }
    drop(rank);
    finalize();
    Ok(())
}

impl Rank {
    fn row(&self, bytes: usize) -> Result<()> {
        let rows = bytes / (HEADS * DIM * 4);
        let dense = Strided::dense(DType::F32, [1, rows, HEADS, DIM]);
        let wide = Strided::new(DType::F32, 0, [1, rows, HEADS, DIM], [0, 2 * HEADS * DIM, 2 * DIM, 1])?;
        let window = self.group.window(2 * bytes)?;
        let [source, staging] = [self.device.alloc(2 * bytes)?, self.device.alloc(bytes)?];
        let touched = Strided::dense(DType::F32, [1, rows, 2 * HEADS, DIM]);
        for buffer in [&window, &source] {
            self.device.fill(&self.stream, 1.0, ViewMut::new(buffer, touched)?)?;
        }
        self.device.fill(&self.stream, 1.0, ViewMut::new(&staging, dense)?)?;
        let repeats = ((64 << 20) / bytes).clamp(2, 100);
        let plain = self.exchanges(bytes, repeats, [dense, dense], &window, &source, None)?;
        let strided = self.exchanges(bytes, repeats, [wide, wide], &window, &source, None)?;
        let packed = self.exchanges(bytes, repeats, [dense, dense], &window, &source, Some((&staging, wide)))?;
        let (library, memcpy) = (library(self.me, bytes, repeats), memcpy(bytes, repeats));
        if self.me == 0 {
            println!(
                "{bytes:>10} {plain:>7.2} {library:>7.2} {:>6.2} {strided:>7.2} {packed:>7.2} {memcpy:>7.2}",
                plain / library
            );
        }
        Ok(())
    }

    /// A ping-pong of exchanges. With `pack`, what is sent is copied from the strided view to the staging first, and what came
    /// is copied to the strided view.
    fn exchanges(
        &self,
        bytes: usize,
        repeats: usize,
        [sent, received]: [Strided; 2],
        window: &Buffer,
        source: &Buffer,
        pack: Option<(&Buffer, Strided)>,
    ) -> Result<f64> {
        let send = |to| P2p::Send { to, dtype: sent.dtype(), extent: sent.extent() };
        let there = match self.me {
            0 => self.group.prepare(&[send(1)])?,
            _ => self.group.prepare(&[P2p::Recv { from: 0, into: ViewMut::new(window, received)? }])?,
        };
        let back = match self.me {
            0 => self.group.prepare(&[P2p::Recv { from: 1, into: ViewMut::new(window, received)? }])?,
            _ => self.group.prepare(&[send(0)])?,
        };
        let copy = |from: &Buffer, a, to: &Buffer, b| {
            self.device.copy(&self.stream, View::new(from, a)?, ViewMut::new(to, b)?)
        };
        let mut best = f64::MAX;
        for _ in 0..ROUNDS {
            self.group.barrier(&self.stream)?;
            self.device.synchronize(&self.stream, LIMIT)?;
            let start = Instant::now();
            for _ in 0..repeats {
                for (exchange, sends) in [(&there, self.me == 0), (&back, self.me == 1)] {
                    if let Some((staging, strided)) = pack.filter(|_| sends) {
                        copy(source, strided, staging, sent)?;
                        self.group.exchange(&self.stream, exchange, &[View::new(staging, sent)?])?;
                    } else if sends {
                        self.group.exchange(&self.stream, exchange, &[View::new(source, sent)?])?;
                    } else {
                        self.group.exchange(&self.stream, exchange, &[])?;
                        if let Some((_, strided)) = pack {
                            copy(window, received, source, strided)?;
                        }
                    }
                }
            }
            self.device.synchronize(&self.stream, LIMIT)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(speed(bytes, repeats, best))
    }
}

/// GB/s of one direction, of `repeats` ping-pongs.
fn speed(bytes: usize, repeats: usize, seconds: f64) -> f64 {
    (2 * repeats * bytes) as f64 / seconds / 1e9
}

/// The library's own ping-pong. No exchange is under way meanwhile, so blocking calls hinder nobody.
fn library(me: u32, bytes: usize, repeats: usize) -> f64 {
    let world = mpi::topology::SimpleCommunicator::world();
    let peer = world.process_at_rank(1 - me as i32);
    let (out, mut into) = (vec![1u8; bytes], vec![2u8; bytes]);
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..repeats {
            if me == 0 {
                peer.send(&out[..]);
                peer.receive_into(&mut into[..]);
            } else {
                peer.receive_into(&mut into[..]);
                peer.send(&out[..]);
            }
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    speed(bytes, repeats, best)
}

fn memcpy(bytes: usize, repeats: usize) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..repeats {
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    speed(bytes, repeats, best) / 2.0
}
