//! What a run did when, on all ranks and on one clock: the data of traces and timelines.

use std::time::Duration;

use longspan::{DeviceReport, Mesh, SpanReport, Step, Traffic, Work};

/// A run of all ranks.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was computed, on what: for people.
    pub title: String,
    /// The mesh.
    pub mesh: Mesh,
    /// How far times of different ranks may be off at most; `None` if nothing makes them comparable.
    pub precision: Option<Duration>,
    /// By rank.
    pub ranks: Vec<RankRecord>,
}

/// What one rank did.
#[derive(Clone, Debug)]
pub struct RankRecord {
    /// Its spans.
    pub spans: Vec<SpanReport>,
    /// The messages that it sent in the forward and in the backward.
    pub traffic: [Vec<Traffic>; 2],
}

/// Messages of one exchange from one rank to another.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// The sending rank.
    pub from: u32,
    /// The receiving rank.
    pub to: u32,
    /// Bytes.
    pub bytes: u64,
    /// The sender's side of the exchange.
    pub sent: &'a SpanReport,
    /// The receiver's side of it.
    pub received: &'a SpanReport,
}

/// How a rank spent the time of a pass. `compute`, `exposed` and `idle` add up to `wall`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// From the first start to the last end on any rank.
    pub wall: Duration,
    /// In attention and sums.
    pub compute: Duration,
    /// In exchanges and in collecting what came.
    pub transfer: Duration,
    /// The part of `transfer` with no compute beside it.
    pub exposed: Duration,
    /// In nothing that is recorded: waiting for an order between streams, or for the host.
    pub idle: Duration,
}

impl Shares {
    /// The part of the transfers that computation hides; `None` without transfers.
    pub fn overlap(&self) -> Option<f64> {
        let all = self.transfer.as_secs_f64();
        (all > 0.0).then(|| 1.0 - self.exposed.as_secs_f64() / all)
    }

    /// The sum over ranks.
    pub fn sum(self, other: Self) -> Self {
        Self {
            wall: self.wall + other.wall,
            compute: self.compute + other.compute,
            transfer: self.transfer + other.transfer,
            exposed: self.exposed + other.exposed,
            idle: self.idle + other.idle,
        }
    }
}

impl Record {
    /// The record of ranks whose reports and traffic are given in rank order.
    pub fn new(title: String, mesh: Mesh, mut reports: Vec<DeviceReport>, traffic: Vec<[Vec<Traffic>; 2]>) -> Self {
        let precision = longspan::align(&mut reports);
        let ranks = reports.into_iter().zip(traffic);
        let ranks = ranks.map(|(report, traffic)| RankRecord { spans: report.spans, traffic }).collect();
        Self { title, mesh, precision, ranks }
    }

    /// The passes that were run: forward, and perhaps backward.
    pub fn passes(&self) -> impl Iterator<Item = bool> + '_ {
        let ran = |backward: &bool| self.ranks.iter().any(|rank| rank.pass(*backward).next().is_some());
        [false, true].into_iter().filter(ran)
    }

    /// The first start and the last end of a pass on any rank.
    pub fn extent(&self, backward: bool) -> (Duration, Duration) {
        let spans = || self.ranks.iter().flat_map(|rank| rank.pass(backward));
        let start = spans().map(|s| s.start).min().unwrap_or_default();
        (start, spans().map(|s| s.end).max().unwrap_or(start))
    }

    /// How `rank` spent the time of a pass.
    pub fn shares(&self, rank: usize, backward: bool) -> Shares {
        let (start, end) = self.extent(backward);
        let of = |compute: bool| {
            let spans = self.ranks[rank].pass(backward).filter(|s| (s.work == Work::Compute) == compute);
            union(spans.map(|s| (s.start, s.end)).collect())
        };
        let (compute, transfer) = (of(true), of(false));
        let both = union(compute.iter().chain(&transfer).copied().collect());
        let [compute, transfer, busy] = [&compute, &transfer, &both].map(|list| total(list));
        let wall = end - start;
        Shares { wall, compute, transfer, exposed: busy - compute, idle: wall - busy }
    }

    /// Every message with the spans of both its ends, in the order of senders. A message is known by its exchange's pass,
    /// phase and index, which are the same on every rank.
    pub fn flows(&self) -> Vec<Flow<'_>> {
        let mut flows = Vec::new();
        for (from, rank) in (0u32..).zip(&self.ranks) {
            for (backward, list) in [false, true].into_iter().zip(&rank.traffic) {
                // One arrow for all tensors of an exchange.
                let mut sums: Vec<Traffic> = Vec::new();
                for message in list {
                    let key = |t: &Traffic| (t.phase, t.index, t.to);
                    match sums.iter_mut().rev().find(|sum| key(sum) == key(message)) {
                        Some(sum) => sum.bytes += message.bytes,
                        None => sums.push(*message),
                    }
                }
                let ends = sums.into_iter().filter_map(|t| {
                    let step = Step { phase: t.phase, index: t.index };
                    let sent = rank.exchange(backward, step)?;
                    let received = self.ranks.get(t.to as usize)?.exchange(backward, step)?;
                    Some(Flow { from, to: t.to, bytes: t.bytes, sent, received })
                });
                flows.extend(ends);
            }
        }
        flows
    }

    /// What a span did, for people: `hop, step 2` or `gather, head group 1`.
    pub fn name(&self, span: &SpanReport) -> String {
        let (ring, Step { phase, index }) = (self.mesh.ring(), span.step);
        let grouped = |what: String, group: u32| match self.groups() {
            1 => what,
            _ => format!("{what}, head group {group}"),
        };
        match phase {
            "attention backward" | "attention forward" | "hop" | "return" | "sum" if ring > 1 => {
                grouped(format!("{phase}, step {}", index % ring), index / ring)
            }
            "attention backward" | "attention forward" | "collect" | "gather" | "give back" | "keep" | "sum"
            | "take" => grouped(phase.to_owned(), index),
            "delta" if index > 0 => "delta of joint rows".to_owned(),
            _ => phase.to_owned(),
        }
    }

    /// Head groups of the run.
    fn groups(&self) -> u32 {
        let steps = self.ranks.iter().flat_map(|rank| &rank.spans).map(|s| s.step);
        let attention = steps.filter(|s| s.phase.starts_with("attention")).map(|s| s.index / self.mesh.ring());
        attention.max().map_or(1, |last| last + 1)
    }
}

impl RankRecord {
    /// The spans of a pass.
    pub fn pass(&self, backward: bool) -> impl Iterator<Item = &SpanReport> {
        self.spans.iter().filter(move |s| s.backward == backward)
    }

    fn exchange(&self, backward: bool, step: Step) -> Option<&SpanReport> {
        self.pass(backward).find(|s| s.work == Work::Exchange && s.step == step)
    }
}

/// The stretches of time that are in any of `list`, in order.
fn union(mut list: Vec<(Duration, Duration)>) -> Vec<(Duration, Duration)> {
    list.sort_unstable();
    let mut joined: Vec<(Duration, Duration)> = Vec::new();
    for (start, end) in list {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

fn total(list: &[(Duration, Duration)]) -> Duration {
    list.iter().map(|(start, end)| *end - *start).sum()
}

#[cfg(test)]
pub mod tests {
    use longspan::Placement;
    use proptest::prelude::*;

    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A record of as many ranks as `times` has lists of (what, step, start, end) in microseconds.
    pub fn record(mesh: Mesh, times: &[Vec<(Work, u32, u32, u32)>]) -> Record {
        let ranks = (0u32..).zip(times).map(|(rank, list)| {
            let spans = list.iter().map(|&(work, index, start, end)| SpanReport {
                work,
                step: Step { phase: if work == Work::Compute { "attention forward" } else { "hop" }, index },
                backward: false,
                start: US * start,
                end: US * end,
                bytes_sent: if work == Work::Exchange { 4096 } else { 0 },
            });
            let spans: Vec<SpanReport> = spans.collect();
            let to = (rank + 1) % times.len() as u32;
            let sent = spans.iter().filter(|s| s.work == Work::Exchange && to != rank);
            let sent =
                sent.flat_map(|s| [2048; 2].map(|bytes| Traffic { phase: "hop", index: s.step.index, to, bytes }));
            RankRecord { traffic: [sent.collect(), Vec::new()], spans }
        });
        Record { title: "a test".into(), mesh, precision: Some(US), ranks: ranks.collect() }
    }

    /// Random records of 1 to 6 ranks, all of which exchange equally often.
    pub fn records() -> impl Strategy<Value = Record> {
        let one = |exchanges: usize| {
            let times = prop::collection::vec((0u32..1000, 0u32..300), exchanges);
            let compute = prop::collection::vec((0u32..1000, 0u32..300), 0..5);
            (times, compute).prop_map(|(times, compute)| {
                let list = |work, times: Vec<(u32, u32)>| {
                    (0u32..).zip(times).map(move |(i, (start, len))| (work, i, start, start + len))
                };
                list(Work::Exchange, times).chain(list(Work::Compute, compute)).collect::<Vec<_>>()
            })
        };
        (1usize..7, 0usize..5)
            .prop_flat_map(move |(ranks, exchanges)| prop::collection::vec(one(exchanges), ranks))
            .prop_map(|times| {
                let mesh = Mesh::new(1, times.len() as u32, Placement::UlyssesInner).expect("not empty");
                record(mesh, &times)
            })
    }

    #[test]
    fn shares_of_a_rank() {
        let mesh = Mesh::new(1, 2, Placement::UlyssesInner).expect("ok");
        let (compute, exchange) = (Work::Compute, Work::Exchange);
        let times = [
            vec![(compute, 0, 0, 40), (exchange, 1, 10, 60), (compute, 1, 70, 90)],
            vec![(compute, 0, 0, 100), (exchange, 1, 10, 60)],
        ];
        let record = record(mesh, &times);
        let [a, b] = [0, 1].map(|rank| record.shares(rank, false));
        let us = |n: u32| US * n;
        let expected = Shares { wall: us(100), compute: us(60), transfer: us(50), exposed: us(20), idle: us(20) };
        assert_eq!((a, a.overlap()), (expected, Some(0.6)));
        assert_eq!((b.exposed, b.idle, b.overlap()), (us(0), us(0), Some(1.0)));
        assert_eq!(Shares::default().overlap(), None);
        assert_eq!(record.flows().len(), 2);
        assert_eq!((record.flows()[0].to, record.flows()[0].bytes), (1, 4096));
        assert_eq!(record.passes().collect::<Vec<_>>(), [false]);
        assert_eq!(record.name(&record.ranks[0].spans[1]), "hop, step 1");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Compute, exposed transfers and idle time add up; counted microsecond by microsecond they are the same.
        #[test]
        fn shares_are_those_of_a_count(record in records()) {
            for rank in 0..record.ranks.len() {
                let shares = record.shares(rank, false);
                prop_assert_eq!(shares.compute + shares.exposed + shares.idle, shares.wall);
                let (start, end) = record.extent(false);
                let at = |t: Duration, compute: bool| record.ranks[rank].pass(false)
                    .any(|s| (s.work == Work::Compute) == compute && s.start <= t && t < s.end);
                let times: Vec<Duration> = (0..2000u32).map(|t| US * t).filter(|t| start <= *t && *t < end).collect();
                let count = |f: &dyn Fn(Duration) -> bool| US * times.iter().filter(|t| f(**t)).count() as u32;
                prop_assert_eq!(count(&|t| at(t, true)), shares.compute);
                prop_assert_eq!(count(&|t| at(t, false)), shares.transfer);
                prop_assert_eq!(count(&|t| at(t, false) && !at(t, true)), shares.exposed);
            }
        }
    }
}
