//! Exchanges between two processes, beside MPI's own calls and `memcpy`, in one run: `mpirun -n 2 exchange`.
//!
//! Every figure is GB/s of one direction, the best of several rounds of a ping-pong: process 0 sends, process 1 sends back.
//! All use the same memory on the same thread, and take turns.
//!
//! | column | what |
//! |---|---|
//! | dense | an exchange of contiguous bytes |
//! | MPI | `MPI_Send` and `MPI_Recv` of the same bytes, which is what the library can do |
//! | us more | by how many microseconds a dense message takes longer than MPI's own |
//! | strided | an exchange of every second head: a derived datatype, or packed inside where it is large |
//! | packed | the same packed by a copy on the device, sent dense, and unpacked by a copy |
//! | memcpy | one copy of the bytes within a process, without any exchange |

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longspan_cpu::transport::{Part, queue};
use longspan_cpu::{Buffer, CpuDevice, CpuStream};
use longspan_hal::{Backend, Collective, DType, Device, GroupId, P2p, Priority, Result, Strided, View, ViewMut};
use longspan_mpi::{Mpi, MpiCollective, MpiExchange, broadcast, finalize, world};
use mpi::ffi;

const LIMIT: Duration = Duration::from_secs(120);
const ROUNDS: usize = 8;

/// Heads and head size of the strided views: rows of 256 bytes, as a Ulysses all-to-all sends them.
const HEADS: usize = 8;
const DIM: usize = 64;

struct Rank {
    device: CpuDevice,
    group: MpiCollective,
    stream: CpuStream,
    me: u32,
}

/// The memory of a row.
struct Memory {
    window: Buffer,
    source: Buffer,
    staging: Buffer,
    dense: Strided,
    wide: Strided,
}

/// What process 0 sends, and what process 1 sends back.
type Pair = [Arc<MpiExchange>; 2];

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
            "{:>10} {:>7} {:>7} {:>6} {:>7} {:>7} {:>7} {:>7}",
            "bytes", "dense", "MPI", "ratio", "us more", "strided", "packed", "memcpy"
        );
    }
    for shift in [12, 16, 18, 20, 23, 26] {
        rank.row(1 << shift)?;
    }
    drop(rank);
    finalize();
    Ok(())
}

impl Rank {
    fn row(&self, bytes: usize) -> Result<()> {
        let memory = self.memory(bytes)?;
        let Memory { dense, wide, .. } = memory;
        let repeats = ((32 << 20) / bytes).clamp(1, 200);
        let pairs = [self.pair(&memory, dense)?, self.pair(&memory, wide)?];
        let mut best = [f64::MAX; 4];
        for _ in 0..ROUNDS {
            let seconds = [
                self.timed(repeats, |n| self.exchanges(&pairs[0], n, View::new(&memory.source, dense)?))?,
                self.timed(repeats, |n| self.library(n, &memory))?,
                self.timed(repeats, |n| self.exchanges(&pairs[1], n, View::new(&memory.source, wide)?))?,
                self.timed(repeats, |n| self.copied(&pairs[0], n, &memory))?,
            ];
            for (best, seconds) in best.iter_mut().zip(seconds) {
                *best = best.min(seconds / (2 * repeats) as f64);
            }
        }
        if self.me == 0 {
            let [plain, library, strided, packed] = best.map(|seconds| bytes as f64 / seconds / 1e9);
            let (ratio, more, memcpy) = (plain / library, (best[0] - best[1]) * 1e6, memcpy(bytes, repeats));
            println!(
                "{bytes:>10} {plain:>7.2} {library:>7.2} {ratio:>6.2} {more:>7.1} {strided:>7.2} {packed:>7.2} {memcpy:>7.2}"
            );
        }
        Ok(())
    }

    fn memory(&self, bytes: usize) -> Result<Memory> {
        let rows = bytes / (HEADS * DIM * 4);
        let dense = Strided::dense(DType::F32, [1, rows, HEADS, DIM]);
        let wide = Strided::new(DType::F32, 0, [1, rows, HEADS, DIM], [0, 2 * HEADS * DIM, 2 * DIM, 1])?;
        let window = self.group.window(2 * bytes)?;
        let [source, staging] = [self.device.alloc(2 * bytes)?, self.device.alloc(bytes)?];
        // Every page is there before anything is measured.
        let all = Strided::dense(DType::F32, [1, rows, 2 * HEADS, DIM]);
        for (buffer, at) in [(&window, all), (&source, all), (&staging, dense)] {
            self.device.fill(&self.stream, 1.0, ViewMut::new(buffer, at)?)?;
        }
        Ok(Memory { window, source, staging, dense, wide })
    }

    /// Exchanges of views like `at`, which arrive in the window.
    fn pair(&self, memory: &Memory, at: Strided) -> Result<Pair> {
        let one = |sender| {
            let op = match sender == self.me {
                true => P2p::Send { to: 1 - self.me, dtype: at.dtype(), extent: at.extent() },
                false => P2p::Recv { from: sender, into: ViewMut::new(&memory.window, at)? },
            };
            self.group.prepare(&[op])
        };
        Ok([one(0)?, one(1)?])
    }

    /// Seconds of `repeats` of what `queue` puts on the stream, from a common start, with caches as the same work leaves them.
    fn timed(&self, repeats: usize, queue: impl Fn(usize) -> Result<()>) -> Result<f64> {
        queue(repeats)?;
        self.group.barrier(&self.stream)?;
        self.device.synchronize(&self.stream, LIMIT)?;
        let start = Instant::now();
        queue(repeats)?;
        self.device.synchronize(&self.stream, LIMIT)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn exchanges(&self, pair: &Pair, repeats: usize, source: View<'_, CpuDevice>) -> Result<()> {
        for _ in 0..repeats {
            for (exchange, sender) in pair.iter().zip(0..) {
                let sends = if sender == self.me { std::slice::from_ref(&source) } else { &[] };
                self.group.exchange(&self.stream, exchange, sends)?;
            }
        }
        Ok(())
    }

    /// What is sent is copied from the strided view to the staging first, and what came is copied to a strided view.
    fn copied(&self, pair: &Pair, repeats: usize, memory: &Memory) -> Result<()> {
        let Memory { window, source, staging, dense, wide } = memory;
        let copy = |from: (&Buffer, Strided), to: (&Buffer, Strided)| {
            self.device.copy(&self.stream, View::new(from.0, from.1)?, ViewMut::new(to.0, to.1)?)
        };
        for _ in 0..repeats {
            for (exchange, sender) in pair.iter().zip(0..) {
                if sender == self.me {
                    copy((source, *wide), (staging, *dense))?;
                    self.group.exchange(&self.stream, exchange, &[View::new(staging, *dense)?])?;
                } else {
                    self.group.exchange(&self.stream, exchange, &[])?;
                    copy((window, *dense), (source, *wide))?;
                }
            }
        }
        Ok(())
    }

    /// The library's own ping-pong, as one piece of work of the stream.
    fn library(&self, repeats: usize, memory: &Memory) -> Result<()> {
        let source = Part::of(&View::new(&memory.source, memory.dense)?);
        let window = Part::of_mut(&ViewMut::new(&memory.window, memory.dense)?);
        let (me, bytes, peer) = (self.me, memory.dense.bytes() as i32, 1 - self.me as i32);
        let [reads, writes] = [[source.clone()], [window.clone()]];
        queue(&self.stream, "library", &reads, &writes, move || {
            for sender in (0..2).cycle().take(2 * repeats) {
                // SAFETY: no exchange is under way, so this thread alone is in MPI. This job named both parts, whose bytes
                // these are; constants and handles are MPI's.
                let code = unsafe {
                    let (comm, bytes_of) = (ffi::RSMPI_COMM_WORLD, ffi::RSMPI_UINT8_T);
                    if sender == me {
                        ffi::MPI_Send(source.first().cast::<c_void>(), bytes, bytes_of, peer, 0, comm)
                    } else {
                        let into = window.first().cast::<c_void>();
                        ffi::MPI_Recv(into, bytes, bytes_of, peer, 0, comm, ffi::RSMPI_STATUS_IGNORE)
                    }
                };
                assert_eq!(code, ffi::MPI_SUCCESS as i32);
            }
            Ok(())
        })
    }
}

/// GB/s of a copy within this process.
fn memcpy(bytes: usize, repeats: usize) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..repeats {
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
        }
        best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
    }
    bytes as f64 / best / 1e9
}
