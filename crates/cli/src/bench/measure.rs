//! The measuring itself.

use std::time::Duration;

use longspan::{DeviceInfo, DeviceReport, Engine, Error, Extra, Pass, Peak, Plan, Problem, Traffic, Work, head_groups};

use crate::args::Bench;
use crate::bench::cases::Case;
use crate::bench::record::{PeakRecord, Refused, Report, Row, SCHEMA, Shape, name};
use crate::conformance::today;
use crate::failure::{Failure, Result};
use crate::record::Record;
use crate::{doctor, engine, job};

/// Seed of dropout: any will do.
const SEED: u64 = 1;

/// The devices, and what they can do.
pub struct Bencher<'a> {
    args: &'a Bench,
    /// A case, for what all have in common.
    first: &'a Case,
    devices: Vec<DeviceInfo>,
    /// The best of all measurements so far: what runs beside only takes away.
    peak: Result<Vec<Peak>, String>,
    /// Load of the host before the run.
    load: Option<f64>,
    limit: Duration,
}

/// What a rank saw of one pass.
struct Figures {
    times: Vec<Duration>,
    sent: u64,
    exchange: Duration,
    kernels: Vec<String>,
}

/// What a rank saw of a case.
struct Rank {
    passes: Vec<Figures>,
    /// Pairs of one head, of all batch rows, that this rank's ring rank computed.
    pairs: u64,
    peak: u64,
    predicted: u64,
    /// The last pass, where a trace is wanted.
    recorded: Option<(DeviceReport, [Vec<Traffic>; 2])>,
}

impl<'a> Bencher<'a> {
    /// Finds the devices that `cases` need.
    ///
    /// # Errors
    /// [`Failure::Input`] if the backend or a device cannot be had; [`Failure::Run`].
    pub fn new(args: &'a Bench, cases: &'a [Case]) -> Result<Self> {
        let first = cases.first().ok_or_else(|| Failure::Input("there is nothing to measure".into()))?;
        let limit = Duration::from_secs(args.limit);
        let ranks = cases.iter().map(|c| c.mesh().size() as usize).max().unwrap_or(1);
        let mut devices = longspan::devices(&args.backend)?;
        devices.truncate(ranks);
        Ok(Self { args, first, devices, peak: Ok(Vec::new()), load: load(), limit })
    }

    /// The report of `rows`, and of what was refused.
    pub fn report(self, mut rows: Vec<Row>, refused: Vec<Refused>) -> Report {
        let peaks: &[Peak] = self.peak.as_deref().unwrap_or_default();
        for row in &mut rows {
            let peak: f64 = peaks.iter().take(row.devices).map(|p| p.flops_per_second).sum();
            row.share_of_peak = (peak > 0.0).then(|| row.flops_per_second / peak);
        }
        let how = peaks.first().map(|p| p.how.clone());
        Report {
            schema: SCHEMA.to_owned(),
            program: format!("longspan {}", env!("CARGO_PKG_VERSION")),
            date: today(),
            machine: doctor::machine_line(),
            load: self.load,
            backend: self.args.backend.clone(),
            devices: self.devices.iter().map(|d| d.name.clone()).collect(),
            exchange: self.args.exchange.map_or("default", |e| e.name()).to_owned(),
            problem: shape(self.args, self.first),
            repeat: self.args.repeat,
            peak: how
                .map(|how| PeakRecord { flops_per_second: peaks.iter().map(|p| p.flops_per_second).collect(), how }),
            peak_missing: self.peak.as_ref().err().cloned(),
            rows,
            refused,
        }
    }

    /// Measures the devices' peaks once more, unless that cannot be done.
    fn measure_peak(&mut self) -> Result<()> {
        let Ok(best) = &mut self.peak else { return Ok(()) };
        let dtype = self.first.problem.dtype;
        match longspan::on_devices(&self.args.backend, self.devices.len(), self.limit, |engine| engine.peak(dtype)) {
            Ok(peaks) if best.is_empty() => *best = peaks,
            Ok(peaks) => {
                for (best, peak) in best.iter_mut().zip(peaks) {
                    best.flops_per_second = best.flops_per_second.max(peak.flops_per_second);
                }
            }
            Err(e @ (Error::Unavailable { .. } | Error::Unsupported { .. })) => self.peak = Err(e.to_string()),
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// A row for each pass of `case`, and, where a trace is wanted, what its ranks did in the last one.
    ///
    /// # Errors
    /// [`Failure::Input`] if the backend refuses the case; [`Failure::Run`].
    pub fn measure(&mut self, case: &Case) -> Result<(Vec<Row>, Option<Record>)> {
        self.measure_peak()?;
        // Half of it before and half after, since a device that works gets slower.
        let mut alone = self.alone(case, self.args.repeat.div_ceil(2))?;
        let body = |engine: &mut dyn Engine| rank(case, self.args.repeat, self.args.trace.is_some(), engine);
        let ranks = engine::done(longspan::on_ranks_within(&self.args.backend, case.mesh(), self.limit, body)?)?;
        let after = if self.args.repeat > 1 { self.alone(case, self.args.repeat / 2)? } else { Vec::new() };
        alone.iter_mut().zip(after).for_each(|(times, after)| times.extend(after));
        let alone: Vec<f64> = alone.iter().map(|times| median(times)).collect();
        let passes = passes(&case.problem).iter().enumerate();
        let rows: Vec<Row> = passes.map(|(i, &pass)| self.row(case, &ranks, i, pass, &alone)).collect();
        let record = self.args.trace.is_some().then(|| {
            let title = format!(
                "bench, {}; {}; backend {}",
                rows.last().map_or("", |r| &r.pass),
                case.mesh(),
                self.args.backend
            );
            let (reports, traffic) = ranks.into_iter().filter_map(|rank| rank.recorded).unzip();
            Record::new(title, *case.mesh(), reports, traffic)
        });
        Ok((rows, record))
    }

    /// Times of each pass with a share of the heads on every device alone, `repeat` of the slowest device each; nothing for a
    /// single rank, or without such a share.
    fn alone(&self, case: &Case, repeat: u32) -> Result<Vec<Vec<Duration>>> {
        let (ranks, devices) = (case.mesh().size() as usize, self.used(case));
        let share = if ranks > 1 && ranks.is_multiple_of(devices) { case.alone(devices) } else { None };
        let Some(share) = share else { return Ok(Vec::new()) };
        let body = |engine: &mut dyn Engine| rank(&share, repeat, false, engine);
        let all = longspan::on_devices(&self.args.backend, devices, self.limit, body)?;
        Ok((0..passes(&case.problem).len()).map(|i| slowest(&all, i)).collect())
    }

    /// Devices that the ranks of `case` are on.
    fn used(&self, case: &Case) -> usize {
        self.devices.len().min(case.mesh().size() as usize).max(1)
    }

    fn row(&self, case: &Case, ranks: &[Rank], i: usize, pass: Pass, alone: &[f64]) -> Row {
        let slowest = slowest(ranks, i);
        let seconds = |d: Option<&Duration>| d.map_or(0.0, Duration::as_secs_f64);
        let (median_s, devices) = (median(&slowest), self.used(case));
        let flops = flops(case, ranks.iter().map(|rank| rank.pairs).sum(), pass);
        let flops_per_second = flops / median_s.max(f64::MIN_POSITIVE);
        let sent_bytes = ranks.iter().map(|rank| rank.passes[i].sent).sum::<u64>();
        let exchange: f64 = ranks.iter().map(|rank| rank.passes[i].exchange.as_secs_f64()).sum();
        let fullest = ranks.iter().max_by_key(|rank| rank.peak);
        let alone_s = alone.get(i).copied();
        Row {
            seq: case.seq(),
            ulysses: case.mesh().ulysses(),
            ring: case.mesh().ring(),
            head_groups: head_groups(&case.problem, case.mesh(), [case.seq(), case.seq()], &case.mask),
            devices,
            packed: case.packed,
            pass: name(pass).to_owned(),
            median_s,
            fastest_s: seconds(slowest.iter().min()),
            slowest_s: seconds(slowest.iter().max()),
            flops,
            flops_per_second,
            share_of_peak: None, // once the peak is known
            alone_s,
            overlap_efficiency: alone_s.map(|alone| alone / median_s.max(f64::MIN_POSITIVE)),
            sent_bytes,
            exchange_s: exchange / ranks.len() as f64,
            exchange_gb_s: (sent_bytes > 0 && exchange > 0.0).then(|| sent_bytes as f64 / exchange / 1e9),
            peak_bytes: fullest.map_or(0, |rank| rank.peak),
            predicted_bytes: fullest.map_or(0, |rank| rank.predicted),
            kernels: ranks.first().map_or(Vec::new(), |rank| rank.passes[i].kernels.clone()),
        }
    }
}

/// Processes that were running or wanted to, on average over the last minute, where the system tells.
fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Times of pass `i`, of each repetition that of the slowest.
fn slowest(ranks: &[Rank], i: usize) -> Vec<Duration> {
    let repeat = ranks.first().map_or(0, |rank| rank.passes[i].times.len());
    (0..repeat).map(|n| ranks.iter().map(|rank| rank.passes[i].times[n]).max().unwrap_or_default()).collect()
}

/// What is measured of a problem, in order.
fn passes(problem: &Problem) -> &'static [Pass] {
    if problem.backward { &[Pass::Forward, Pass::Backward, Pass::Step] } else { &[Pass::Forward] }
}

/// What one rank does.
fn rank(case: &Case, repeat: u32, record: bool, engine: &mut dyn Engine) -> longspan::Result<Rank> {
    let workspace = engine.prepare(&case.problem, [&case.layout, &case.layout], &case.mask)?;
    engine.reside(case.packed, &extra(&case.problem))?;
    let mut figures = Vec::new();
    for &pass in passes(&case.problem) {
        let times = engine.repeat(pass, repeat)?;
        if record {
            engine.meet()?;
        }
        engine.trace(pass)?;
        let (exchange, sent) = engine.report()?.total(Work::Exchange);
        let mut kernels = if pass == Pass::Backward { Vec::new() } else { engine.kernels(false) };
        if pass != Pass::Forward {
            kernels.extend(engine.kernels(true));
        }
        kernels.dedup();
        figures.push(Figures { times, sent, exchange, kernels });
    }
    let report = engine.report()?;
    let traffic = |backward| engine.plan().map_or(Ok(Vec::new()), |plan| plan.traffic(backward));
    let [pairs, peak, predicted] =
        [engine.plan().map_or(0, Plan::pairs), report.memory.peak, report.tensor_bytes + workspace.total() as u64];
    let recorded = if record {
        Some((report, [traffic(false)?, if case.problem.backward { traffic(true)? } else { Vec::new() }]))
    } else {
        None
    };
    Ok(Rank { passes: figures, pairs, peak, predicted, recorded })
}

/// Inputs of the problem's options.
fn extra(problem: &Problem) -> Extra {
    Extra {
        alibi_slopes: problem.alibi.then(|| job::default_slopes(problem.heads)),
        sinks: problem.sinks.then(|| vec![0.0; problem.heads]),
        seed: problem.dropout.map(|_| SEED),
        joint: None,
    }
}

/// Floating-point operations of `pass`: `2 * head_dim` for a pair's dot product, `2 * head_dim_v` for its share of the output;
/// two and a half times that backward, where a pair has five products instead of two. `rank_pairs` is the sum over all ranks,
/// of which the Ulysses ranks of a block each counted the block.
fn flops(case: &Case, rank_pairs: u64, pass: Pass) -> f64 {
    let pairs = rank_pairs as f64 / f64::from(case.mesh().ulysses());
    let problem = &case.problem;
    let forward = 2.0 * (problem.head_dim + problem.head_dim_v) as f64 * problem.heads as f64 * pairs;
    forward
        * match pass {
            Pass::Backward => 2.5,
            Pass::Forward => 1.0,
            Pass::Step => 3.5,
        }
}

/// Seconds: the middle one, or the mean of the two in the middle.
fn median(times: &[Duration]) -> f64 {
    let mut sorted: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

fn shape(args: &Bench, case: &Case) -> Shape {
    let problem = &case.problem;
    let mut options = Vec::new();
    options.extend(args.options.scale.map(|x| format!("scale {x}")));
    options.extend(problem.softcap.map(|c| format!("softcap {c}")));
    options.extend(problem.dropout.map(|p| format!("dropout {p}")));
    for (on, name) in [(problem.alibi, "alibi"), (problem.sinks, "sinks"), (problem.deterministic, "deterministic")] {
        options.extend(on.then(|| name.to_owned()));
    }
    Shape {
        batch: problem.batch,
        heads: problem.heads,
        kv_heads: problem.kv_heads,
        head_dim: problem.head_dim,
        head_dim_v: problem.head_dim_v,
        dtype: problem.dtype.to_string(),
        mask: args.cut.mask.to_string(),
        layout: args.cut.layout.name().to_owned(),
        placement: args.cut.placement.to_string(),
        head_groups: problem.head_groups,
        options,
    }
}

#[cfg(test)]
mod tests {
    use longspan::{DType, Layout, Mesh, Placement};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn medians() {
        let of = |ms: &[u64]| median(&ms.iter().map(|&n| Duration::from_millis(n)).collect::<Vec<_>>());
        assert_eq!([of(&[]), of(&[3]), of(&[9, 1, 2]), of(&[4, 1, 2, 100])], [0.0, 0.003, 0.002, 0.003]);
    }

    const MASKS: [&str; 5] = ["full", "causal", "window:3", "window:2,4", "prefix:3"];

    proptest! {
        #[test]
        fn flops_count_the_allowed_pairs_once(
            seq in 1usize..40, ulysses in 1u32..4, ring in 1u32..5, batch in 1usize..3, kind in 0..3,
            mask in proptest::sample::select(&MASKS[..]),
        ) {
            let mesh = Mesh::new(ulysses, ring, Placement::default()).expect("a mesh");
            let layout = match kind {
                0 => Layout::contiguous(seq, &mesh),
                1 => Layout::zigzag(seq, &mesh),
                _ => Layout::stripe(seq, &mesh),
            };
            let problem = Problem::new(DType::F32, batch, [4, 2], 8).with_head_dim_v(16);
            let case = Case { problem, layout, mask: mask.parse().expect("a mask"), packed: false };
            let pairs = (0..mesh.size())
                .map(|r| Plan::new(&case.problem, &case.layout, &case.layout, &case.mask, r).expect("fits").pairs())
                .sum();
            let allowed = (0..seq).flat_map(|q| (0..seq).map(move |k| (q, k))).filter(|&(q, k)| case.mask.allows(q, k));
            let forward = (allowed.count() * batch * 4 * (2 * 8 + 2 * 16)) as f64;
            prop_assert_eq!(flops(&case, pairs, Pass::Forward), forward);
            prop_assert_eq!(flops(&case, pairs, Pass::Backward), 2.5 * forward);
            prop_assert_eq!(flops(&case, pairs, Pass::Step), 3.5 * forward);
        }
    }
}
