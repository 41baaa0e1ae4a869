//! Losing a peer, deadlines, and ranks that do not do the same: every wait ends with an error that names the culprit.

use std::time::Instant;

use longspan_hal::{Collective, DType, Device, Error, P2p, Step};

use super::*;
use crate::CpuExchange;

const STEP: Step = Step { phase: "ring forward", index: 3 };

/// Longer than a loss takes to be told, shorter than [`LONG`].
const SOON: Duration = Duration::from_secs(5);

/// An exchange with everyone else, and a window for it.
fn all_to_all(rank: &Rank) -> Result<(CpuExchange, Buffer)> {
    let (me, size) = (rank.group.rank(), rank.group.size());
    let window = rank.group.window(size as usize * 16)?;
    let mut ops = Vec::new();
    for peer in (0..size).filter(|&p| p != me) {
        ops.push(P2p::Send { to: peer, dtype: DType::F32, extent: [1, 1, 1, 4] });
        let into = write(&window, dense([1, 1, 1, 4]).shifted(4 * peer as usize)?);
        ops.push(P2p::Recv { from: peer, into });
    }
    Ok((rank.group.prepare(&ops)?, window))
}

fn run(rank: &Rank, exchange: &CpuExchange) -> Result<()> {
    let memory = rank.upload(&[rank.group.rank() as f32; 4]);
    let sends = vec![read(&memory, dense([1, 1, 1, 4])); rank.group.size() as usize - 1];
    rank.group.exchange(&rank.stream, exchange, &sends)?;
    rank.device.synchronize(&rank.stream, LONG)
}

/// Every rank but `lost` saw the loss of `lost` at [`STEP`], soon; `wanted` is the limit that passed, if it lives.
fn assert_lost(
    results: &[Option<(Result<()>, Duration)>],
    lost: u32,
    limit: Duration,
    wanted: Option<Duration>,
    what: &str,
) {
    for (rank, result) in (0u32..).zip(results).filter(|(rank, _)| *rank != lost) {
        match result {
            Some((Err(Error::PeerLost { rank: named, step, late, .. }), took)) => {
                assert_eq!((*named, *step, *late), (lost, STEP, wanted), "{what}");
                assert!(*took < limit, "{what}: rank {rank} waited {took:?}");
            }
            other => panic!("{what}: rank {rank} got {other:?}"),
        }
    }
}

/// Ranks run exchanges; rank 2 does `fate` in the second one.
fn lose(options: Options, limit: Duration, fate: impl Fn(Rank) + Sync) -> Vec<Option<(Result<()>, Duration)>> {
    ranks(4, options, limit, |rank| {
        let (exchange, _window) = all_to_all(&rank).expect("all are there");
        let begun = Instant::now();
        let first = run(&rank, &exchange);
        if rank.group.rank() == 2 {
            rank.group.progress(STEP);
            fate(rank);
            return (Ok(()), begun.elapsed());
        }
        // An abort may overtake the end of the first one.
        let result = first.and_then(|()| run(&rank, &exchange));
        (result, begun.elapsed())
    })
}

#[test]
fn a_rank_that_goes_is_named_with_its_step() {
    for options in ALL {
        assert_lost(&lose(options, LONG, drop), 2, SOON, None, "dropped");
        assert_lost(&lose(options, LONG, |rank| rank.group.abort()), 2, SOON, None, "aborted");
        let panicked = lose(options, LONG, |_rank| panic!("a planned panic"));
        assert!(panicked[2].is_none());
        assert_lost(&panicked, 2, SOON, None, "panicked");
    }
}

#[test]
fn a_rank_whose_stream_failed_is_lost() {
    let results = lose(CHECKED, LONG, |rank| {
        rank.stream.submit("doomed", Vec::new(), || Err(Error::invalid("doomed", "as planned"))).expect("queued");
        rank.group.barrier(&rank.stream).expect("queued, and skipped");
        assert_eq!(rank.device.synchronize(&rank.stream, LONG), Err(Error::invalid("doomed", "as planned")));
        // It stays a member meanwhile.
        std::thread::sleep(Duration::from_secs(3));
    });
    assert_lost(&results, 2, Duration::from_millis(2500), None, "failed stream");
}

#[test]
fn a_stuck_rank_is_named_within_the_limit() {
    let limit = Duration::from_millis(500);
    for options in [PLAIN, ALL[3]] {
        let results = lose(options, limit, |_rank| std::thread::sleep(Duration::from_secs(2)));
        assert_lost(&results, 2, Duration::from_millis(1900), Some(limit), "stuck");
    }
}

#[test]
fn waits_of_common_calls_end_too() {
    for call in 0..3 {
        let results = ranks(3, CHECKED, LONG, |rank| {
            let begun = Instant::now();
            if rank.group.rank() == 1 {
                rank.group.progress(STEP);
                drop(rank);
                return (Ok(()), begun.elapsed());
            }
            let result = match call {
                0 => rank.group.window(64).map(|_| ()),
                1 => rank.group.prepare(&[]).map(|_| ()),
                _ => rank.group.subgroup(&[0, 1]).map(|_| ()),
            };
            (result, begun.elapsed())
        });
        assert_lost(&results, 1, SOON, None, "common call");
    }
}

#[test]
fn leaving_after_everything_is_done_harms_nobody() {
    for options in ALL {
        let results = ranks(4, options, LONG, |rank| -> Result<()> {
            let (exchange, _window) = all_to_all(&rank)?;
            run(&rank, &exchange)?;
            // Each rank leaves at another time; the work of the rest among themselves goes on.
            std::thread::sleep(Duration::from_millis(5 * u64::from(rank.group.rank())));
            rank.device.synchronize(&rank.stream, LONG)
        });
        assert!(results.iter().all(|r| *r == Some(Ok(()))), "{results:?}");
    }
}

#[test]
fn ranks_that_go_on_without_the_one_that_left_are_fine() {
    let results = all(3, CHECKED, |rank| -> Result<()> {
        let me = rank.group.rank();
        let window = rank.group.window(16)?;
        let part = dense([1, 1, 1, 4]);
        let ops = match me {
            0 => vec![P2p::Send { to: 1, dtype: DType::F32, extent: part.extent() }],
            1 => vec![P2p::Recv { from: 0, into: write(&window, part) }],
            _ => vec![],
        };
        let exchange = rank.group.prepare(&ops)?;
        if me == 2 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
        let memory = rank.upload(&[1.0; 4]);
        let sends = if me == 0 { vec![read(&memory, part)] } else { vec![] };
        rank.group.exchange(&rank.stream, &exchange, &sends)?;
        rank.device.synchronize(&rank.stream, LONG)
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn queued_work_runs_after_the_collective_is_dropped() {
    let results = all(2, CHECKED, |rank| -> Result<()> {
        let (exchange, window) = all_to_all(&rank)?;
        let memory = rank.upload(&[7.0; 4]);
        rank.group.exchange(&rank.stream, &exchange, &[read(&memory, dense([1, 1, 1, 4]))])?;
        let peer = 1 - rank.group.rank() as usize;
        let Rank { device, group, stream } = rank;
        drop((group, exchange, memory));
        assert_eq!(download(&device, &stream, &window, dense([1, 1, 1, 4]).shifted(4 * peer)?)?, [7.0; 4]);
        Ok(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn another_order_of_exchanges_is_found_at_once_on_both_ranks() {
    for options in ALL {
        let results = all(2, options, |rank| {
            let (a, _wa) = all_to_all(&rank).expect("all are there");
            let (b, _wb) = all_to_all(&rank).expect("all are there");
            let begun = Instant::now();
            let result = run(&rank, if rank.group.rank() == 0 { &a } else { &b });
            (result, begun.elapsed())
        });
        for (result, took) in results {
            match result {
                Err(Error::Invalid { why, .. }) => {
                    for part in ["rank 0 runs exchange 1 round 0", "rank 1 runs exchange 3 round 0"] {
                        assert!(why.contains(part), "{why}");
                    }
                }
                other => panic!("{other:?}"),
            }
            assert!(took < SOON);
        }
    }
}

#[test]
fn a_barrier_against_an_exchange_is_found() {
    let results = all(2, CHECKED, |rank| {
        let (exchange, _window) = all_to_all(&rank).expect("all are there");
        if rank.group.rank() == 0 {
            return run(&rank, &exchange);
        }
        rank.group.barrier(&rank.stream)?;
        rank.device.synchronize(&rank.stream, LONG)
    });
    for result in results {
        let Err(Error::Invalid { why, .. }) = &result else { panic!("{result:?}") };
        assert!(why.contains("barrier 0") && why.contains("exchange 1 round 0"), "{why}");
    }
}

#[test]
fn another_order_of_common_calls_is_found_on_all_ranks() {
    let results = all(3, CHECKED, |rank| match rank.group.rank() {
        0 => rank.group.window(64).map(|_| ()),
        _ => rank.group.prepare(&[]).map(|_| ()),
    });
    for result in results {
        let Err(Error::Invalid { why, .. }) = &result else { panic!("{result:?}") };
        assert!(why.contains("`window`") && why.contains("`prepare`"), "{why}");
    }
}

#[test]
fn joining_is_bounded_and_checked() {
    let short = Duration::from_millis(60);
    let id = CpuCollective::group_id();
    let alone = join(&id, 0, 3, PLAIN, short).map(|_| ());
    assert!(matches!(alone, Err(Error::Timeout { call: "join (1 rank came)", .. })), "{alone:?}");
    assert!(matches!(join(&id, 3, 3, PLAIN, short), Err(Error::Invalid { .. })));
    assert!(matches!(join(&id, 0, 0, PLAIN, short), Err(Error::Invalid { .. })));

    let first = join(&id, 0, 1, PLAIN, short).expect("a place that timed out is free, and the group with it");
    assert!(matches!(join(&id, 0, 1, PLAIN, short), Err(Error::Invalid { .. })), "taken");
    assert!(matches!(join(&id, 0, 2, PLAIN, short), Err(Error::Invalid { .. })), "another size");
    assert!(matches!(join(&id, 0, 1, ALL[2], short), Err(Error::Invalid { .. })), "another personality");
    drop(first);
}

#[test]
fn exchanges_belong_to_their_group_and_a_lost_group_refuses_at_once() {
    all(1, PLAIN, |rank| {
        let (exchange, _window) = all_to_all(&rank).expect("alone");
        let other = join(&CpuCollective::group_id(), 0, 1, PLAIN, LONG).expect("alone");
        let refused = other.group.exchange(&other.stream, &exchange, &[]);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
        rank.group.progress(STEP);
        rank.group.abort();
        let lost = |call| Error::PeerLost { rank: 0, call, step: STEP, late: None };
        assert_eq!(rank.group.exchange(&rank.stream, &exchange, &[]), Err(lost("exchange")));
        assert_eq!(rank.group.barrier(&rank.stream), Err(lost("barrier")));
        assert_eq!(rank.group.window(4).map(|_| ()), Err(lost("window")));
    });
}
