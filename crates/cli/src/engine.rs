//! Runs a job on the ranks of its mesh, and gathers results and figures.

use std::time::Duration;

use longspan::{DeviceReport, Engine, Error, Extra, Forwarded, Gradients as Shards, Layout, Tensor, Traffic, Work};
use longspan_peers::{Fields, Reader};

use crate::failure::{Failure, Result};
use crate::fault::Fault;
use crate::job::Job;
use crate::parcel::{Told, pack, unpack};
use crate::processes;
use crate::results::{Gradients, RankFigures, Recorded, Results};

/// Runs `job` on the backend that `selector` names, a thread a rank; `limit` bounds every wait for another rank. With
/// `recorded`, times of the ranks will be comparable, and the results have them.
///
/// # Errors
/// [`Failure::Input`] if the backend refuses the job, before anything runs; [`Failure::Run`] with what every rank says, the
/// cause first.
pub fn run(job: &Job, selector: &str, limit: Duration, fault: Option<Fault>, recorded: bool) -> Result<Results> {
    let ranks = longspan::on_ranks_within(selector, job.mesh(), limit, |engine| rank(job, engine, fault, recorded))?;
    gather(job, done(ranks)?, recorded)
}

/// Collective: runs this process's rank of `job`; the results of all, on process 0.
///
/// # Errors
/// As [`run`], the same on every process; a process that lost the others keeps its own.
pub fn run_part(
    job: &Job,
    processes: &processes::Job,
    selector: &str,
    limit: Duration,
    fault: Option<Fault>,
    recorded: bool,
) -> Result<Option<Results>> {
    let own = processes.processes.on_rank(selector, job.mesh(), limit, |engine| rank(job, engine, fault, recorded));
    let own = processes.together("run", own.map_err(Failure::from))?;
    let all = processes.gather("results", own.to_bytes())?;
    if !processes.leads() {
        return Ok(None);
    }
    let all = all.iter().map(|bytes| Rank::from_bytes(bytes)).collect::<longspan::Result<Vec<_>>>()?;
    gather(job, all, recorded).map(Some)
}

/// What one rank gives back.
#[derive(Debug)]
struct Rank {
    forward: Forwarded,
    gradients: Option<Shards>,
    figures: RankFigures,
    /// What it did when, and what it sent, where that is wanted.
    recorded: Option<Told>,
}

impl Rank {
    /// For process 0.
    fn to_bytes(&self) -> Vec<u8> {
        let Self { forward, gradients, figures, recorded } = self;
        let mut said = figures.numbers().into_iter().fold(Fields::default(), Fields::number);
        said = said.number(u64::from(recorded.is_some()));
        said = recorded.iter().fold(said, pack);
        for tensor in [&forward.out, &forward.lse] {
            said = said.bytes(&tensor.to_bytes());
        }
        let Some(Shards { dq, dk, dv, dsinks, .. }) = gradients else { return said.number(0).0 };
        said = [dq, dk, dv].into_iter().fold(said.number(1), |f, tensor| f.bytes(&tensor.to_bytes()));
        let sinks = dsinks.as_ref().map_or(&[][..], Vec::as_slice);
        let said = said.number(u64::from(dsinks.is_some())).number(sinks.len() as u64);
        sinks.iter().fold(said, |f, x| f.number(u64::from(x.to_bits()))).0
    }

    fn from_bytes(bytes: &[u8]) -> longspan::Result<Self> {
        let mut fields = Reader(bytes);
        let unreadable = |_| Error::invalid("results", "those of another process can't be read");
        let mut numbers = [0; RankFigures::NUMBERS];
        for number in &mut numbers {
            *number = fields.number().map_err(unreadable)?;
        }
        let recorded = match fields.number().map_err(unreadable)? {
            1 => Some(unpack(&mut fields).map_err(unreadable)?),
            _ => None,
        };
        let tensor = |fields: &mut Reader<'_>| Tensor::from_bytes(fields.bytes().map_err(unreadable)?);
        let forward = Forwarded { out: tensor(&mut fields)?, lse: tensor(&mut fields)?, joint: None };
        let gradients = if fields.number().map_err(unreadable)? == 1 {
            let [dq, dk, dv] = [tensor(&mut fields)?, tensor(&mut fields)?, tensor(&mut fields)?];
            let (some, count) = (fields.number().map_err(unreadable)? == 1, fields.number().map_err(unreadable)?);
            let sinks = (0..count).map(|_| Ok(f32::from_bits(fields.number().map_err(unreadable)? as u32)));
            let sinks = sinks.collect::<longspan::Result<Vec<_>>>()?;
            Some(Shards { dq, dk, dv, joint: None, dsinks: some.then_some(sinks) })
        } else {
            None
        };
        Ok(Self { forward, gradients, figures: RankFigures::of(numbers), recorded })
    }
}

fn rank(job: &Job, engine: &mut dyn Engine, fault: Option<Fault>, recorded: bool) -> longspan::Result<Rank> {
    let (q_layout, k_layout, rank) = (&job.q_layout, &job.k_layout, engine.rank());
    let workspace = engine.prepare(&job.problem(), [q_layout, k_layout], &job.mask)?;
    let extra = Extra {
        alibi_slopes: job.alibi_slopes.clone(),
        sinks: job.sinks.clone(),
        seed: job.dropout.map(|_| job.seed),
        joint: None,
    };
    let [q, k, v] = [job.q.shard(q_layout, rank)?, job.k.shard(k_layout, rank)?, job.v.shard(k_layout, rank)?];
    if recorded {
        engine.meet()?;
    }
    let mut forward = engine.forward([&q, &k, &v], &extra)?;
    if let Some(fault) = fault {
        fault.strike(engine, &mut forward)?;
    }
    let gradients = match &job.dout {
        Some(dout) => Some(engine.backward(&dout.shard(q_layout, rank)?, None)?),
        None => None,
    };
    let report = engine.report()?;
    let plan = engine.plan().ok_or_else(|| Error::Invalid { what: "engine", why: "it has no plan".into() })?;
    let backward = if job.dout.is_some() { plan.traffic(true)? } else { Vec::new() };
    let traffic = [plan.traffic(false)?, backward];
    let figures = figures(q_layout.rows(rank), &report, &traffic, workspace.total() as u64);
    Ok(Rank { forward, gradients, figures, recorded: recorded.then_some((report, traffic)) })
}

fn figures(rows: usize, report: &DeviceReport, traffic: &[Vec<Traffic>; 2], predicted: u64) -> RankFigures {
    let [(compute, _), (exchange, sent)] = [report.total(Work::Compute), report.total(Work::Exchange)];
    let table = traffic.iter().flatten().map(|message| message.bytes).sum();
    let peak = report.memory.peak.saturating_sub(report.tensor_bytes);
    RankFigures { rows, compute, exchange, sent, table, peak, predicted }
}

/// The ranks' results, or one failure for all: the error of a rank that failed by itself comes before those of ranks that
/// lost it.
pub(crate) fn done<T>(ranks: Vec<longspan::Result<T>>) -> Result<Vec<T>> {
    let errors: Vec<(usize, &Error)> =
        ranks.iter().enumerate().filter_map(|(rank, result)| result.as_ref().err().map(|e| (rank, e))).collect();
    let own = |e: &Error| !matches!(e, Error::PeerLost { .. });
    let Some(&(_, cause)) = errors.iter().find(|(_, e)| own(e)).or(errors.first()) else {
        return ranks.into_iter().collect::<longspan::Result<Vec<_>>>().map_err(Failure::from);
    };
    match Failure::from(cause.clone()) {
        // The same refusal on every rank is said once.
        Failure::Input(why) => Err(Failure::Input(why)),
        _ => {
            let lines: Vec<String> = errors.iter().map(|(rank, e)| format!("rank {rank}: {e}")).collect();
            Err(Failure::Run(format!("the run failed\n  {}", lines.join("\n  "))))
        }
    }
}

fn gather(job: &Job, ranks: Vec<Rank>, recorded: bool) -> Result<Results> {
    let whole = |layout: &Layout, shard: &dyn Fn(&Rank) -> Option<Tensor>| {
        let shards: Vec<Tensor> = ranks.iter().filter_map(shard).collect();
        Tensor::unshard(layout, &shards)
    };
    let gradient = |pick: fn(&Shards) -> &Tensor| move |rank: &Rank| rank.gradients.as_ref().map(|g| pick(g).clone());
    let gradients = match &ranks[0].gradients {
        Some(first) => Some(Gradients {
            dq: whole(&job.q_layout, &gradient(|g| &g.dq))?,
            dk: whole(&job.k_layout, &gradient(|g| &g.dk))?,
            dv: whole(&job.k_layout, &gradient(|g| &g.dv))?,
            dsinks: first.dsinks.clone(),
        }),
        None => None,
    };
    Ok(Results {
        out: whole(&job.q_layout, &|rank| Some(rank.forward.out.clone()))?,
        lse: whole(&job.q_layout, &|rank| Some(rank.forward.lse.clone()))?,
        gradients,
        ranks: ranks.iter().map(|rank| rank.figures).collect(),
        recorded: recorded.then(|| {
            let (reports, traffic) = ranks.into_iter().filter_map(|rank| rank.recorded).unzip();
            Recorded { reports, traffic }
        }),
    })
}
