//! The same ring attention on four ranks, as threads or as processes: time, CPU time, and how much of the exchange is hidden.
//!
//! `ring threads [S]` and `mpirun -n 4 ring processes [S]`; S tokens (8192 unless said), causal zigzag, forward and backward.
//!
//! *Hidden* is the share of the ranks' time in exchanges during which the rank also computed.

use std::time::{Duration, Instant};

use longspan::{
    Board, DType, Engine, Extra, Layout, Mask, Mesh, Placement, Problem, Processes, Result, SpanReport, Tensor, Work,
};

const LIMIT: Duration = Duration::from_secs(600);
const RANKS: u32 = 4;
const HEADS: usize = 4;
const DIM: usize = 64;
const ROUNDS: usize = 3;

/// What one rank measured: wall and CPU time of the best round, and time in exchanges, in all and beside compute.
type Figures = [f64; 4];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let how = args.next().unwrap_or_default();
    let seq = args.next().and_then(|s| s.parse().ok()).unwrap_or(8192);
    let mesh = Mesh::new(1, RANKS, Placement::UlyssesInner)?;
    let body = |engine: &mut dyn Engine| measure(engine, seq, &mesh);
    if how == "threads" {
        // CPU time is that of the process, so of all ranks.
        let ranks = longspan::on_ranks("cpu", &mesh, body)?;
        let cpu = ranks.iter().map(|r| r[1]).fold(0.0, f64::max);
        report("threads", seq, &ranks, cpu);
        return Ok(());
    }
    let Some(processes) = Processes::join("mpi", Board::open)? else { return Ok(()) };
    let own = processes.on_rank("mpi", &mesh, LIMIT, body)?;
    let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
    let all = processes.gather("figures", bytes)?;
    if processes.rank() == 0 {
        let ranks: Vec<Figures> = all.iter().map(|b| numbers(b)).collect();
        let cpu = ranks.iter().map(|r| r[1]).sum();
        report("processes", seq, &ranks, cpu);
    }
    processes.leave();
    Ok(())
}

fn numbers(bytes: &[u8]) -> Figures {
    let mut figures = [0.0; 4];
    for (x, chunk) in figures.iter_mut().zip(bytes.chunks_exact(8)) {
        *x = f64::from_le_bytes(std::array::from_fn(|i| chunk[i]));
    }
    figures
}

fn report(how: &str, seq: usize, ranks: &[Figures], cpu: f64) {
    let wall = ranks.iter().map(|r| r[0]).fold(0.0, f64::max);
    let [exchange, hidden] = [2, 3].map(|i| ranks.iter().map(|r| r[i]).sum::<f64>());
    println!(
        "{how:>9}: S {seq}, {RANKS} ranks: wall {wall:.3} s, CPU {cpu:.3} s, exchange {exchange:.3} s in all ranks, {:.0} % hidden",
        100.0 * hidden / exchange.max(1e-9)
    );
}

fn measure(engine: &mut dyn Engine, seq: usize, mesh: &Mesh) -> Result<Figures> {
    let layout = Layout::zigzag(seq, mesh);
    let rows = layout.rows(engine.rank());
    let problem = Problem::new(DType::F32, 1, [HEADS, HEADS], DIM).with_backward(true);
    engine.prepare(&problem, [&layout, &layout], &Mask::causal())?;
    let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| Tensor::normal(DType::F32, [1, rows, HEADS, DIM], seed));
    let mut best = [f64::MAX; 4];
    for _ in 0..ROUNDS {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        engine.forward([&q, &k, &v], &Extra::default())?;
        engine.backward(&dout, None)?;
        let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        let [exchange, hidden] = overlap(&engine.report()?.spans);
        if cpu < best[1] {
            best = [wall, cpu, exchange, hidden];
        }
    }
    Ok(best)
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc(5), of 100 ticks a second.
    (ticks(11) + ticks(12)) / 100.0
}

/// Seconds in exchanges, and of these beside compute.
fn overlap(spans: &[SpanReport]) -> [f64; 2] {
    let of = |work| spans.iter().filter(move |s| s.work == work);
    let (mut all, mut hidden) = (Duration::ZERO, Duration::ZERO);
    for x in of(Work::Exchange) {
        all += x.end.saturating_sub(x.start);
        for c in of(Work::Compute) {
            hidden += x.end.min(c.end).saturating_sub(x.start.max(c.start));
        }
    }
    [all.as_secs_f64(), hidden.as_secs_f64()]
}
