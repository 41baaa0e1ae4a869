//! Attention against the machine's multiply-add peak, both measured in the same run.
//!
//! ```text
//! cargo bench -p longspan-cpu --bench attention -- [FILTER] [--runs N] [--seq S] [--cpu]
//! ```
//!
//! A row is `dtype head_dim mask direction`, such as `f32 d128 causal fwd`; FILTER keeps the rows that contain it. 8 heads,
//! batch 1. FLOPs of a forward: `4 * heads * seq^2 * head_dim`, half of it if causal; of a backward: 2.5 times that.
//!
//! The figure of a row is the best of its runs, and so is the peak, which is measured again before each run: other work on
//! the machine, and clocks that sink under load, disturb both alike. With `--cpu` both are per second that the threads ran
//! (Linux), instead of per second that passed: the figure to tune with on a machine that others use.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use longspan_cpu::{Buffer, CpuAttention, CpuDevice, CpuStream, Options, Personality, multiply_adds};
use longspan_hal::{
    Attention, Backward, DType, Device, Extras, Forward, Gradient, Priority, Result, Slice, Slices, Spec, Stage, Store,
    Strided, View, ViewMut,
};

const HEADS: usize = 8;
const LIMIT: Duration = Duration::from_secs(600);

struct Args {
    filter: String,
    runs: usize,
    seq: Option<usize>,
    clock: Clock,
}

fn args() -> Args {
    let mut args = Args { filter: String::new(), runs: 5, seq: None, clock: Clock(false) };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|n| n.parse().ok());
        match word.as_str() {
            "--bench" => {}
            "--cpu" => args.clock = Clock(true),
            "--runs" => args.runs = number().unwrap_or(args.runs),
            "--seq" => args.seq = number(),
            _ => args.filter = word,
        }
    }
    args
}

fn main() -> Result<()> {
    let args = args();
    let device = CpuDevice::open("cpu", Options::new(Personality::Plain, false));
    let attention = CpuAttention::new(&device)?;
    let threads = rayon::current_num_threads();
    println!("kernels {}, {threads} threads, best of {} runs", attention.kernels(), args.runs);
    println!("{:<28} {:>6} {:>10} {:>12} {:>7}", "row", "seq", "GFLOP/s", "peak GFLOP/s", "ratio");
    for dtype in [DType::F32, DType::Bf16] {
        for dim in [64, 128] {
            for (mask, seq) in [("full", 2048), ("causal", 4096)] {
                for direction in ["fwd", "bwd"] {
                    let name = format!("{dtype} d{dim} {mask} {direction}");
                    if name.contains(&args.filter) {
                        let seq = args.seq.unwrap_or(seq);
                        let case = Case::new(&device, &attention, dtype, dim, seq, mask == "causal")?;
                        let (rate, peak) = case.measure(direction == "bwd", args.runs, args.clock)?;
                        println!("{name:<28} {seq:>6} {rate:>10.1} {peak:>12.1} {:>6.1}%", 100.0 * rate / peak);
                    }
                }
            }
        }
    }
    Ok(())
}

/// One problem in memory.
struct Case<'a> {
    device: &'a CpuDevice,
    attention: &'a CpuAttention,
    stream: CpuStream,
    spec: Spec,
    slices: Slices,
    causal: bool,
    /// q, k, v, dout, out, dq, dk, dv.
    wide: [Buffer; 8],
    /// lse, delta.
    thin: [Buffer; 2],
}

impl<'a> Case<'a> {
    fn new(
        device: &'a CpuDevice,
        attention: &'a CpuAttention,
        dtype: DType,
        dim: usize,
        seq: usize,
        causal: bool,
    ) -> Result<Self> {
        let spec = Spec::new(dtype, 1, [seq, seq], [HEADS, HEADS], dim);
        let hi = if causal { 0 } else { Slice::HI_NONE };
        let slices = Slices::new(&spec, [Slice { hi, ..Slice::full(0, 0..seq as u32, 0..seq as u32) }])?;
        let stream = device.stream(Priority::Normal)?;
        let noise = |seed: u32| -> Result<Buffer> {
            let at = Strided::dense(dtype, [1, seq, HEADS, dim]);
            let buffer = device.alloc(at.bytes())?;
            let mut state = seed;
            let bytes: Vec<u8> = (0..at.elements())
                .flat_map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let x = (state >> 8) as f32 / 8_388_608.0 - 1.0;
                    match dtype {
                        DType::F32 => x.to_le_bytes().to_vec(),
                        _ => ((x.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
                    }
                })
                .collect();
            device.upload(&stream, &bytes, ViewMut::new(&buffer, at)?)?;
            Ok(buffer)
        };
        let wide = [noise(1)?, noise(2)?, noise(3)?, noise(4)?, noise(5)?, noise(6)?, noise(7)?, noise(8)?];
        let thin = [device.alloc(4 * seq * HEADS)?, device.alloc(4 * seq * HEADS)?];
        device.fill(&stream, 0.0, ViewMut::new(&thin[1], Strided::dense(DType::F32, [1, seq, HEADS, 1]))?)?;
        device.synchronize(&stream, LIMIT)?;
        Ok(Self { device, attention, stream, spec, slices, causal, wide, thin })
    }

    /// GFLOP/s of the row and of the peak.
    fn measure(&self, backward: bool, runs: usize, clock: Clock) -> Result<(f64, f64)> {
        let plan = self.attention.plan(&self.stream, &self.spec, &self.slices)?;
        let scratch = self.device.alloc(self.attention.scratch_bytes(&plan))?;
        let [io, row] = [(self.spec.dtype, self.spec.head_dim), (DType::F32, 1)]
            .map(|(dtype, dim)| Strided::dense(dtype, [1, self.spec.q_rows, HEADS, dim]));
        let read = |i: usize| View::new(&self.wide[i], io);
        let write = |i: usize| ViewMut::new(&self.wide[i], io);
        let inputs = || -> Result<_> { Ok([read(0)?, read(1)?, read(2)?]) };
        let forward = || -> Result<()> {
            let stage = Stage::All { out: write(4)?, lse: ViewMut::new(&self.thin[0], row)? };
            let args = Forward::new(&self.spec, inputs()?, stage, Extras::default(), None)?;
            self.attention.forward(&self.stream, &plan, &args)?;
            self.device.synchronize(&self.stream, LIMIT)
        };
        let gradients = || -> Result<()> {
            let into = |i| -> Result<_> { Ok(Gradient { into: write(i)?, store: Store::Write }) };
            let rows = [read(3)?, View::new(&self.thin[0], row)?, View::new(&self.thin[1], row)?];
            let d = [into(5)?, into(6)?, into(7)?];
            let args = Backward::new(&self.spec, inputs()?, rows, d, Extras::default(), Some(&scratch))?;
            self.attention.backward(&self.stream, &plan, &args)?;
            self.device.synchronize(&self.stream, LIMIT)
        };
        forward()?;
        let pairs = (self.spec.q_rows * self.spec.k_rows) as f64 * if self.causal { 0.5 } else { 1.0 };
        let flops = 4.0 * HEADS as f64 * self.spec.head_dim as f64 * pairs * if backward { 2.5 } else { 1.0 };
        let (mut best, mut top) = (0.0f64, 0.0f64);
        for _ in 0..runs {
            top = top.max(peak(clock));
            let start = clock.now();
            if backward {
                gradients()?;
            } else {
                forward()?;
            }
            best = best.max(flops / (clock.now() - start) / 1e9);
        }
        Ok((best, top))
    }
}

/// Seconds that passed, or that a thread of this process ran on average.
#[derive(Clone, Copy)]
struct Clock(bool);

impl Clock {
    fn now(self) -> f64 {
        if self.0 { ran() / rayon::current_num_threads() as f64 } else { passed() }
    }
}

fn passed() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Seconds that all threads of this process ran; NaN where the system doesn't tell.
fn ran() -> f64 {
    // A thread that has just finished its work is counted once it sleeps.
    std::thread::sleep(Duration::from_millis(2));
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return f64::NAN };
    let nanoseconds = threads.flatten().filter_map(|t| {
        let text = std::fs::read_to_string(t.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Multiply-adds of all threads together, in GFLOP/s: registers only.
fn peak(clock: Clock) -> f64 {
    const ROUNDS: usize = 2_000_000;
    let start = clock.now();
    let done: Vec<usize> = rayon::broadcast(|_| multiply_adds(ROUNDS));
    2.0 * done.iter().sum::<usize>() as f64 / (clock.now() - start) / 1e9
}
