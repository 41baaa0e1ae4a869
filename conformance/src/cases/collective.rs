//! Collectives: prepared exchanges of every shape, refusals that all ranks agree on, and lost peers.

use std::time::{Duration, Instant};

use longspan_hal::{Backend, Collective, DType, Device, Error, Extent, GroupId, P2p, Priority, Step, Strided};

use super::Case;
use super::exchange::{Message, prepare, run, run_in};
use crate::host::Random;
use crate::rank::{Failure, Rank, check, check_invalid};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    let mut cases = Vec::new();
    let shapes: [(&str, Shape); 6] = [
        ("all-to-all", all_to_all),
        ("empty", empty),
        ("many-to-one", many_to_one),
        ("ring", ring),
        ("routes", routes),
        ("self", to_self),
    ];
    for (name, shape) in shapes {
        for ranks in 1..=8 {
            let body = move |rank: &mut Rank<B>, rounds| {
                let messages = shape(&mut rank.random(), rank.size());
                run(rank, &messages, rounds)
            };
            let case = Case::new(format!("collective/{name}-{ranks}"), ranks, move |r| body(r, 3));
            cases.push(if [1, 2, 3, 4, 8].contains(&ranks) { case } else { case.full() });
            cases.push(Case::new(format!("collective/{name}-long-{ranks}"), ranks, move |r| body(r, 100)).full());
        }
    }
    for (name, fault) in FAULTS {
        cases.push(Case::new(format!("collective/refuses-{name}"), 3, move |r| refuses(r, fault)));
    }
    cases.extend([
        Case::new("collective/barriers", 4, barriers),
        Case::new("collective/drops-behind-its-rounds", 2, drops_behind_its_rounds),
        Case::new("collective/exchanges-interleave", 4, exchanges_interleave),
        Case::new("collective/many-rounds", 4, |r| run(r, &all_to_all(&mut r.random(), 4), 40)),
        Case::new("collective/refuses-more-than-memory", 2, refuses_more_than_memory),
        Case::new("collective/refuses-other-views", 2, refuses_other_views),
        Case::new("collective/subgroups", 4, subgroups),
        Case::new("collective/window-sizes-differ", 3, window_sizes_differ),
        Case::new("collective/peer-aborts", 4, peer_aborts).spends_team(),
        Case::new("collective/peer-drops", 3, peer_drops).spends_team(),
        Case::new("collective/peer-stays-away", 3, peer_stays_away).spends_team(),
        Case::new("collective/join-alone-times-out", 2, join_alone),
    ]);
    cases
}

/// Messages among so many ranks.
type Shape = fn(&mut Random, u32) -> Vec<Message>;

fn extent(random: &mut Random) -> Extent {
    [random.between(1, 3), random.between(1, 12), random.between(1, 4), random.between(1, 33)]
}

fn dtype(random: &mut Random) -> DType {
    *random.pick(&[DType::Bf16, DType::F16, DType::F32])
}

fn message(random: &mut Random, from: u32, to: u32) -> Message {
    Message { from, to, dtype: dtype(random), extent: extent(random) }
}

fn all_to_all(random: &mut Random, n: u32) -> Vec<Message> {
    (0..n * n).map(|i| message(random, i / n, i % n)).collect()
}

fn many_to_one(random: &mut Random, n: u32) -> Vec<Message> {
    let to = random.below(n as usize) as u32;
    (0..2 * n).map(|i| message(random, i % n, to)).collect()
}

fn ring(random: &mut Random, n: u32) -> Vec<Message> {
    let messages = (0..n).flat_map(|r| [(r, (r + 1) % n); 2]);
    messages.map(|(from, to)| message(random, from, to)).collect()
}

/// Owner to needer: any pairs, some several times, some never; some ranks may have nothing to do.
fn routes(random: &mut Random, n: u32) -> Vec<Message> {
    let any = |random: &mut Random| random.below(n as usize) as u32;
    (0..random.between(1, 3 * n as usize))
        .map(|_| {
            let (from, to) = (any(random), any(random));
            message(random, from, to)
        })
        .collect()
}

fn to_self(random: &mut Random, n: u32) -> Vec<Message> {
    (0..n).flat_map(|r| [(r, r); 2]).map(|(from, to)| message(random, from, to)).collect()
}

/// Empty messages among others, and with one rank no message at all.
fn empty(random: &mut Random, n: u32) -> Vec<Message> {
    let mut messages = all_to_all(random, n);
    messages.retain(|m| n == 1 || (m.from != n - 1 && m.to != n - 1));
    for m in messages.iter_mut().step_by(2) {
        m.extent[random.below(4)] = 0;
    }
    messages
}

/// Several exchanges, prepared first and then run in turn without a wait between.
fn exchanges_interleave<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let mut random = rank.random();
    let shapes: [Shape; 4] = [all_to_all, ring, many_to_one, routes];
    let tables = shapes.map(|shape| shape(&mut random, rank.size()));
    let prepared = tables.iter().map(|t| prepare(rank, &rank.collective, t)).collect::<Result<Vec<_>, _>>()?;
    let mut kept = Vec::new();
    for round in 0..12 {
        for exchange in &prepared {
            rank.step("exchange", round);
            kept.push(exchange.queue(rank, &rank.collective, round)?);
        }
    }
    rank.step("check", 0);
    for (i, round) in kept.iter().enumerate() {
        prepared[i % prepared.len()].check(rank, round)?;
    }
    Ok(())
}

/// What is wrong with a list of messages.
type Fault = fn(u32, &mut Vec<P2pPlan>);

/// A message before it becomes a [`P2p`]: receives name an offset in the window, or memory outside of it.
struct P2pPlan {
    recv: bool,
    peer: u32,
    dtype: DType,
    extent: Extent,
    outside: bool,
}

const FAULTS: [(&str, Fault); 7] = [
    ("a-dtype-that-differs", |rank, ops| {
        if rank == 1 {
            ops[0].dtype = DType::F16;
            // The same number of bytes.
            ops[0].extent[3] *= 2;
        }
    }),
    ("a-missing-receive", |rank, ops| {
        if rank == 1 {
            ops.retain(|o| !o.recv);
        }
    }),
    ("a-missing-send", |rank, ops| {
        if rank == 1 {
            ops.retain(|o| o.recv);
        }
    }),
    ("a-peer-out-of-range", |rank, ops| {
        if rank == 2 {
            ops[0].peer = 3;
        }
    }),
    ("a-receive-outside-windows", |rank, ops| {
        if rank == 0 {
            ops.iter_mut().for_each(|o| o.outside = true);
        }
    }),
    ("an-extent-that-differs", |rank, ops| {
        if rank == 1 {
            ops[0].extent.swap(1, 3);
        }
    }),
    ("bytes-that-differ", |rank, ops| {
        if rank == 2 {
            ops[1].extent[3] += 1;
        }
    }),
];

/// A ring whose lists have a fault on one rank: every rank is told, and the group works on.
fn refuses<B: Backend>(rank: &mut Rank<B>, fault: Fault) -> Result<(), Failure> {
    let (n, me) = (rank.size(), rank.index());
    let window = rank.collective.window(4096)?;
    let outside = rank.device.alloc(4096)?;
    rank.poison(&window)?;
    let plan = |recv, peer| P2pPlan { recv, peer, dtype: DType::F32, extent: [1, 2, 3, 4], outside: false };
    let mut plans = vec![plan(false, (me + 1) % n), plan(true, (me + n - 1) % n)];
    fault(me, &mut plans);
    let op = |p: &P2pPlan| -> Result<P2p<'_, B::Device>, Error> {
        let memory = if p.outside { &outside } else { &window };
        Ok(if p.recv {
            let into = longspan_hal::ViewMut::new(memory, Strided::dense(p.dtype, p.extent))?;
            P2p::Recv { from: p.peer, into }
        } else {
            P2p::Send { to: p.peer, dtype: p.dtype, extent: p.extent }
        })
    };
    let ops = plans.iter().map(op).collect::<Result<Vec<_>, _>>()?;
    check_invalid("a faulty exchange", rank.collective.prepare(&ops))?;
    check(rank.read_all(&window)?.iter().all(|b| *b == 0xFF), || "a refused exchange wrote".into())?;
    run(rank, &ring(&mut rank.random(), n), 2)
}

/// A message that no device has memory for is refused everywhere, and exchanges that were prepared before work on.
fn refuses_more_than_memory<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let prepared = prepare(rank, &rank.collective, &all_to_all(&mut rank.random(), rank.size()))?;
    let before = prepared.queue(rank, &rank.collective, 0)?;
    let huge = P2p::Send { to: 1, dtype: DType::F32, extent: [1 << 10, 1 << 20, 1 << 10, 1 << 10] };
    let ops = if rank.index() == 0 { vec![huge] } else { Vec::new() };
    check(rank.collective.prepare(&ops).is_err(), || "a message of 2^52 bytes was prepared".into())?;
    let after = prepared.queue(rank, &rank.collective, 1)?;
    prepared.check(rank, &before)?;
    prepared.check(rank, &after)
}

/// A round with other views than prepared is refused on the spot, and the right round then works.
fn refuses_other_views<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let messages: Vec<Message> =
        (0..2).map(|from| Message { from, to: 1 - from, dtype: DType::F32, extent: [1, 2, 3, 4] }).collect();
    let prepared = prepare(rank, &rank.collective, &messages)?;
    let longer = rank.blank(Strided::dense(DType::F32, [1, 2, 3, 5]))?;
    let other = rank.blank(Strided::dense(DType::F16, [1, 2, 3, 4]))?;
    let right = rank.blank(Strided::dense(DType::F32, [1, 2, 3, 4]))?;
    for views in [vec![], vec![longer.view()?], vec![other.view()?], vec![right.view()?, right.view()?]] {
        check_invalid("a round with other views", rank.collective.exchange(&rank.stream, &prepared.exchange, &views))?;
    }
    let round = prepared.queue(rank, &rank.collective, 0)?;
    prepared.check(rank, &round)
}

fn window_sizes_differ<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    for factor in [0, 1, 1000] {
        let bytes = rank.index() as usize * factor;
        let window = rank.collective.window(bytes)?;
        check(B::Device::bytes(&window) == bytes, || {
            format!("{bytes} bytes asked for, the window has {}", B::Device::bytes(&window))
        })?;
    }
    run(rank, &ring(&mut rank.random(), rank.size()), 2)
}

fn barriers<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let messages = ring(&mut rank.random(), rank.size());
    for i in 0..10 {
        rank.step("barrier", i);
        rank.collective.barrier(&rank.stream)?;
    }
    run(rank, &messages, 2)?;
    rank.collective.barrier(&rank.stream)?;
    Ok(rank.synchronize()?)
}

/// Even and odd ranks talk among themselves, then all talk again.
fn subgroups<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let me = rank.index();
    for (members, in_it) in [([0, 2], me.is_multiple_of(2)), ([1, 3], !me.is_multiple_of(2))] {
        let group = rank.collective.subgroup(&members)?;
        check(group.is_some() == in_it, || format!("rank {me} in {members:?}: got a group: {}", group.is_some()))?;
        let Some(group) = group else { continue };
        let wanted = (members.iter().position(|m| *m == me).map(|p| p as u32), 2);
        check((Some(group.rank()), group.size()) == wanted, || {
            format!("rank {me} is {} of {} in {members:?}", group.rank(), group.size())
        })?;
        run_in(rank, &group, &all_to_all(&mut Random::new(5), 2), 3)?;
    }
    check_invalid("members that descend", rank.collective.subgroup(&[2, 1]))?;
    check_invalid("members out of range", rank.collective.subgroup(&[1, 4]))?;
    run(rank, &ring(&mut rank.random(), rank.size()), 2)
}

/// A group of its own, with a short limit.
fn short_group<B: Backend>(rank: &Rank<B>, limit: Duration) -> Result<B::Collective, Failure> {
    let id = if rank.index() == 0 { B::group_id()?.0 } else { Vec::new() };
    let id = GroupId(rank.share(id)?[0].clone());
    Ok(B::join(&rank.device, &id, rank.index(), rank.size(), limit)?)
}

const SHORT: Duration = Duration::from_millis(1500);

/// A round that needs every rank must end with an error that `accepts`, and not much later than the group's limit.
fn must_fail<B: Backend>(
    rank: &Rank<B>,
    group: &B::Collective,
    after: impl FnOnce() -> Result<(), Failure>,
    accepts: impl Fn(&Error) -> bool,
) -> Result<(), Failure> {
    let (n, me) = (group.size(), group.rank());
    let window = group.window(64)?;
    let at = Strided::dense(DType::F32, [1, 1, 1, 4]);
    let into = longspan_hal::ViewMut::new(&window, at)?;
    let ops = [
        P2p::Send { to: (me + 1) % n, dtype: DType::F32, extent: at.extent() },
        P2p::Recv { from: (me + n - 1) % n, into },
    ];
    let exchange = group.prepare(&ops)?;
    let (send, stream) = (rank.put(at, &ndarray::Array4::zeros((1, 1, 1, 4)))?, rank.device.stream(Priority::Normal)?);
    rank.device.wait(&stream, &rank.device.record(&rank.stream)?)?;
    rank.share(Vec::new())?;
    after()?;
    let start = Instant::now();
    // Two rounds: the first may have been served before the peer was lost.
    let rounds = (0..2).try_for_each(|_| group.exchange(&stream, &exchange, &[send.view()?]));
    let result = rounds.and_then(|()| rank.device.synchronize(&stream, rank.limit));
    let late = SHORT * 4;
    check(start.elapsed() < late, || format!("the loss was noticed after {:?}", start.elapsed()))?;
    match result {
        Err(error) if accepts(&error) => Ok(()),
        Err(error) => Err(Failure::wrong(format!("a peer was lost; the error is: {error}"))),
        Ok(()) => Err(Failure::wrong("a peer was lost and nobody noticed")),
    }
}

/// A handle that goes away leaves alone what all ranks have queued.
fn drops_behind_its_rounds<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let group = short_group(rank, rank.limit)?;
    let prepared = prepare(rank, &group, &all_to_all(&mut Random::new(9), rank.size()))?;
    let rounds = (0..8).map(|round| prepared.queue(rank, &group, round)).collect::<Result<Vec<_>, _>>()?;
    rank.share(Vec::new())?;
    drop(group);
    rounds.iter().try_for_each(|round| prepared.check(rank, round))
}

const LOST: Step = Step { phase: "conformance", index: 7 };

fn names_rank_1(error: &Error) -> bool {
    matches!(error, Error::PeerLost { rank: 1, step, .. } if *step == LOST)
}

/// Rank 1 gives up in the middle; every rank is told that, and at which step it was.
fn peer_aborts<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let group = short_group(rank, SHORT)?;
    let me = rank.index();
    if me == 1 {
        group.progress(LOST);
    }
    let give_up = || {
        if me == 1 {
            group.abort();
        }
        Ok(())
    };
    must_fail(rank, &group, give_up, |e| names_rank_1(e) || (me == 1 && matches!(e, Error::PeerLost { .. })))?;
    rank.share(Vec::new()).map(drop)
}

/// Rank 1's handle goes away, as when its thread dies.
fn peer_drops<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let group = short_group(rank, SHORT)?;
    if rank.index() == 1 {
        group.progress(LOST);
        let _window = group.window(64)?;
        let at = Strided::dense(DType::F32, [1, 1, 1, 4]);
        let into = longspan_hal::ViewMut::new(&_window, at)?;
        let ops = [P2p::Send { to: 2, dtype: DType::F32, extent: at.extent() }, P2p::Recv { from: 0, into }];
        let exchange = group.prepare(&ops)?;
        rank.share(Vec::new())?;
        drop((exchange, group));
    } else {
        must_fail(rank, &group, || Ok(()), names_rank_1)?;
    }
    rank.share(Vec::new()).map(drop)
}

/// Rank 1 lives but never comes to the round.
fn peer_stays_away<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let group = short_group(rank, SHORT)?;
    if rank.index() == 1 {
        let window = group.window(64)?;
        let at = Strided::dense(DType::F32, [1, 1, 1, 4]);
        let into = longspan_hal::ViewMut::new(&window, at)?;
        let ops = [P2p::Send { to: 2, dtype: DType::F32, extent: at.extent() }, P2p::Recv { from: 0, into }];
        let _exchange = group.prepare(&ops)?;
        rank.share(Vec::new())?;
        rank.share(Vec::new()).map(drop)
    } else {
        must_fail(rank, &group, || Ok(()), |e| matches!(e, Error::PeerLost { .. } | Error::Timeout { .. }))?;
        rank.share(Vec::new()).map(drop)
    }
}

/// A group of two to which one comes.
fn join_alone<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    if rank.index() == 0 {
        let (id, limit, start) = (B::group_id()?, Duration::from_millis(300), Instant::now());
        match B::join(&rank.device, &id, 0, 2, limit) {
            Err(Error::Timeout { .. }) => {}
            Err(other) => return Err(Failure::wrong(format!("wanted is a Timeout, it is: {other}"))),
            Ok(_) => return Err(Failure::wrong("a group of two was joined by one")),
        }
        check(start.elapsed() < limit + rank.limit / 2, || format!("it took {:?}", start.elapsed()))?;
        check_invalid("a rank out of range", B::join(&rank.device, &B::group_id()?, 2, 2, limit))?;
    }
    rank.share(Vec::new())?;
    run(rank, &ring(&mut rank.random(), 2), 1)
}
