//! Planted faults: each is a mistake that somebody made once, and the suite must catch it where it is expected to.

mod faulty;

use std::time::{Duration, Instant};

use faulty::{Fault, Faulty, Planted};
use longspan_conformance::cases::exchange::{Message, prepare};
use longspan_conformance::cases::parallel::{self, Setup};
use longspan_conformance::{Case, Options, Outcome, Report, run, run_cases};
use longspan_hal::{Collective as _, DType};
use longspan_seqpar::{Layout, Mask, Mesh, Placement, Problem};

fn options(filter: &str) -> Options {
    Options { filter: Some(filter.into()), limit: Duration::from_secs(5), ..Options::default() }
}

fn report(fault: Fault, filter: &str) -> Report {
    let _planted = Planted::new(fault);
    let report = run::<Faulty>(&options(filter), &mut |_, _, _| {}).expect("the options are right");
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    report
}

/// Without the fault all cases of `filter` pass; with it, one fails whose message has `sign` in it.
fn caught(fault: Fault, filter: &str, sign: &str) {
    let clean = report(Fault::None, filter);
    assert!(clean.is_ok(), "without a fault:\n{}", clean.summary());
    let failed = report(fault, filter);
    println!("{fault:?} with {filter}:\n{}", failed.summary());
    assert!(
        failed.cases.iter().any(|c| c.outcome == Outcome::Fail && c.message.contains(sign)),
        "{fault:?} was not caught by {filter} as `{sign}`:\n{}",
        failed.summary()
    );
}

/// As [`caught`], for a case of the test's own.
fn caught_in(fault: Fault, setup: &Setup, sign: &str) {
    let case = || {
        let setup = setup.clone();
        vec![Case::<Faulty>::new("planted", setup.mesh().size(), move |rank| parallel::run(rank, &setup))]
    };
    let go = |fault| {
        let _planted = Planted::new(fault);
        run_cases(&options("planted"), case(), &mut |_, _, _| {}).expect("the options are right")
    };
    let clean = go(Fault::None);
    assert!(clean.is_ok(), "without a fault:\n{}", clean.summary());
    let failed = go(fault);
    println!("{fault:?}:\n{}", failed.summary());
    assert!(failed.cases[0].message.contains(sign), "{fault:?} was not caught:\n{}", failed.summary());
}

fn mesh(u: u32, r: u32) -> Mesh {
    Mesh::new(u, r, Placement::UlyssesInner).expect("a mesh")
}

#[test]
fn a_removed_wait_is_a_race() {
    caught(Fault::RemovedWaits(1), "stream/events-order", "race");
    caught(Fault::RemovedWaits(5), "seqpar/layers-in-a-row-f32", "race");
}

#[test]
fn an_off_by_one_band_is_an_error() {
    caught(Fault::BandOffByOne, "attention/causal-f32", "out");
    let problem = Problem::new(DType::F32, 1, [4, 2], 16);
    caught_in(Fault::BandOffByOne, &Setup::new(problem, Layout::stripe(40, &mesh(2, 2)), Mask::causal()), "out");
}

#[test]
fn a_dropped_gradient_hop_is_an_error() {
    let problem = Problem::new(DType::F32, 1, [4, 2], 16);
    caught_in(Fault::DroppedReturn, &Setup::new(problem, Layout::zigzag(48, &mesh(1, 3)), Mask::causal()), "dk");
}

#[test]
fn a_merge_that_ignores_empty_rows_is_an_error() {
    caught(Fault::EmptyRowsIgnored, "attention/stages-holes-4-f32", "out");
}

#[test]
fn local_heads_are_an_error() {
    let problem = || Problem::new(DType::F32, 1, [4, 4], 16);
    let setup = |problem| Setup::new(problem, Layout::zigzag(40, &mesh(2, 2)), Mask::causal());
    caught_in(Fault::LocalHeads, &setup(problem().with_alibi(true)), "out");
    caught_in(Fault::LocalHeads, &setup(problem().with_dropout(Some(0.3))), "out");
    caught_in(Fault::LocalHeads, &setup(problem().with_sinks(true)), "out");
    caught(Fault::LocalHeads, "seqpar/dropout-mask-is-exact-u2r2", "kept");
}

#[test]
fn an_unshifted_window_is_an_error() {
    let problem = Problem::new(DType::F32, 1, [2, 2], 16);
    let setup = Setup::new(problem, Layout::contiguous(64, &mesh(1, 4)), Mask::window(Some(20), Some(0)));
    caught_in(Fault::UnshiftedWindow, &setup, "out");
}

#[test]
fn unwritten_rows_are_an_error() {
    caught(Fault::UnwrittenRows, "attention/holes-f32", "out");
    caught(Fault::UnwrittenRows, "attention/stages-holes-2-f32", "out");
}

#[test]
fn dsinks_of_one_rank_only_are_an_error() {
    let problem = Problem::new(DType::F32, 1, [2, 2], 16).with_sinks(true);
    let setup = Setup::new(problem, Layout::zigzag(40, &mesh(1, 2)), Mask::causal());
    // Ranks get different sums: either is a sign.
    caught_in(Fault::OwnSinksOnly, &setup, "replicas");
}

#[test]
fn replicated_gradients_summed_twice_are_an_error() {
    let problem = Problem::new(DType::F32, 1, [4, 1], 16);
    caught_in(Fault::SummedTwice, &Setup::new(problem, Layout::zigzag(40, &mesh(4, 1)), Mask::causal()), "dk");
}

#[test]
fn joint_keys_counted_for_every_ring_rank_are_an_error() {
    let problem = Problem::new(DType::F32, 1, [2, 2], 16).with_joint(6);
    caught_in(Fault::JointTwice(40), &Setup::new(problem, Layout::zigzag(40, &mesh(1, 2)), Mask::full()), "out");
}

/// Ranks that run two exchanges in different orders are told, on every rank, long before anything could hang.
#[test]
fn a_mismatched_exchange_order_is_an_error() {
    let _planted = Planted::new(Fault::None);
    let swapped = |swap: bool| {
        Case::<Faulty>::new("planted", 2, move |rank| {
            let table = |extent| [(0, 1), (1, 0)].map(|(from, to)| Message { from, to, dtype: DType::F32, extent });
            let first = prepare(rank, &rank.collective, &table([1, 1, 1, 8]))?;
            let second = prepare(rank, &rank.collective, &table([1, 2, 2, 2]))?;
            let (a, b) = if swap && rank.collective.rank() == 1 { (&second, &first) } else { (&first, &second) };
            let rounds = [a.queue(rank, &rank.collective, 0)?, b.queue(rank, &rank.collective, 0)?];
            a.check(rank, &rounds[0])?;
            b.check(rank, &rounds[1])
        })
    };
    let go =
        |swap| run_cases(&options("planted"), vec![swapped(swap)], &mut |_, _, _| {}).expect("the options are right");
    assert!(go(false).is_ok(), "{}", go(false).summary());
    let start = Instant::now();
    let failed = go(true);
    println!("{}", failed.summary());
    assert_eq!(failed.counts.failed, 1, "{}", failed.summary());
    assert!(!failed.cases[0].message.contains("hung"), "{}", failed.summary());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

/// A rank that never comes back is named by the watchdog, with its step.
#[test]
fn a_hung_rank_is_named_with_its_step() {
    let _planted = Planted::new(Fault::None);
    let case = Case::<Faulty>::new("planted", 2, |rank| {
        rank.step("sleeping", 3);
        if rank.index() == 1 {
            std::thread::sleep(Duration::from_secs(4));
        }
        Ok(())
    });
    let options = Options { limit: Duration::from_millis(250), ..options("planted") };
    let report = run_cases(&options, vec![case], &mut |_, _, _| {}).expect("the options are right");
    let message = &report.cases[0].message;
    assert!(message.contains("rank 1: hung") && message.contains("(at: sleeping 3)"), "{message}");
    assert!(!message.contains("rank 0"), "{message}");
    assert_eq!(report.exit_code(), 1);
}
