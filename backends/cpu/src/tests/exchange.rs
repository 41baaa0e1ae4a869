//! Windows, exchanges, barriers, subgroups, under every personality.

use longspan_hal::{Collective, DType, Device, Error, Extent, P2p, Strided};
use proptest::prelude::*;

use super::*;

/// A message of a random exchange.
#[derive(Clone, Debug)]
struct Message {
    from: u32,
    to: u32,
    extent: Extent,
    /// Strides of both sides.
    send: Layout,
    recv: Layout,
}

/// Gaps and the order of the outer axes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    gaps: [usize; 3],
    order: [usize; 3],
}

impl Layout {
    fn at(&self, extent: Extent, offset: usize) -> Strided {
        let mut strides = [0, 0, 0, 1];
        let mut span = extent[3].max(1);
        for (axis, gap) in self.order.into_iter().zip(self.gaps) {
            strides[axis] = span + gap;
            span += extent[axis].saturating_sub(1) * strides[axis];
        }
        Strided::new(DType::F32, offset, extent, strides).expect("nested by construction")
    }
}

fn layout() -> impl Strategy<Value = Layout> {
    ([0usize..3, 0..3, 0..3], Just([0usize, 1, 2]).prop_shuffle()).prop_map(|(gaps, order)| Layout { gaps, order })
}

/// Random exchanges: every pair, itself included, has 0 to 2 messages, some of them empty.
fn exchange() -> impl Strategy<Value = (u32, Vec<Message>)> {
    (1u32..=8).prop_flat_map(|size| {
        let message = (0..size, 0..size, [0usize..4, 1..4, 1..4, 1..6], layout(), layout())
            .prop_map(|(from, to, extent, send, recv)| Message { from, to, extent, send, recv });
        (Just(size), prop::collection::vec(message, 0..3 * size as usize))
    })
}

/// The value of element `at` of message `index` in `round`.
fn value(index: usize, round: usize, at: [usize; 4]) -> f32 {
    let [b, s, h, d] = at;
    (index * 1000 + round * 100_000 + ((b * 4 + s) * 4 + h) * 6 + d) as f32
}

fn elements(extent: Extent) -> impl Iterator<Item = [usize; 4]> {
    let [b, s, h, d] = extent;
    (0..b * s * h * d).map(move |i| [i / (s * h * d), i / (h * d) % s, i / d % h, i % d])
}

/// Places views one after the other; returns them with the elements that they take.
fn place(messages: &[(usize, &Message)], side: impl Fn(&Message) -> Layout) -> (Vec<Strided>, usize) {
    let mut end = 3;
    let mut views = Vec::new();
    for (_, m) in messages {
        let at = side(m).at(m.extent, end);
        end = at.byte_range().end / 4 + 1;
        views.push(at);
    }
    (views, end)
}

/// One rank of a random exchange: sends from plain memory and from a window in turn, runs two rounds without a host wait
/// between them, checks each element that arrived and that nothing else was written.
fn run_exchange(rank: &Rank, messages: &[Message], from_window: bool) -> Result<()> {
    let me = rank.group.rank();
    let own =
        |pick: fn(&Message) -> u32| messages.iter().enumerate().filter(|(_, m)| pick(m) == me).collect::<Vec<_>>();
    let (sends, recvs) = (own(|m| m.from), own(|m| m.to));
    let (send_at, send_len) = place(&sends, |m| m.send);
    let (recv_at, recv_len) = place(&recvs, |m| m.recv);
    let window = rank.group.window(recv_len * 4)?;
    let send_window = rank.group.window(send_len * 4)?;
    let mut ops: Vec<P2p<'_, CpuDevice>> =
        sends.iter().map(|(_, m)| P2p::Send { to: m.to, dtype: DType::F32, extent: m.extent }).collect();
    for ((_, m), at) in recvs.iter().zip(&recv_at) {
        ops.push(P2p::Recv { from: m.from, into: write(&window, *at) });
    }
    let exchange = rank.group.prepare(&ops)?;
    rank.device.fill(&rank.stream, -1.0, write(&window, dense([1, 1, 1, recv_len])))?;
    let mut kept = Vec::new();
    for round in 0..2 {
        let mut values = vec![-2.0; send_len];
        for ((i, m), at) in sends.iter().zip(&send_at) {
            elements(m.extent).for_each(|e| values[at.offset_of(e)] = value(*i, round, e));
        }
        let mut memory = rank.upload(&values);
        if from_window {
            let all = dense([1, 1, 1, send_len]);
            rank.device.copy(&rank.stream, read(&memory, all), write(&send_window, all))?;
            memory = send_window.clone();
        }
        let views: Vec<_> = send_at.iter().map(|at| read(&memory, *at)).collect();
        rank.group.exchange(&rank.stream, &exchange, &views)?;
        let copy = rank.device.alloc(recv_len * 4)?;
        let all = dense([1, 1, 1, recv_len]);
        rank.device.copy(&rank.stream, read(&window, all), write(&copy, all))?;
        // What was sent may be overwritten now.
        rank.device.fill(&rank.stream, -3.0, write(&memory, dense([1, 1, 1, send_len])))?;
        kept.push(copy);
    }
    for (round, copy) in kept.iter().enumerate() {
        let mut wanted = vec![-1.0; recv_len];
        for ((i, m), at) in recvs.iter().zip(&recv_at) {
            elements(m.extent).for_each(|e| wanted[at.offset_of(e)] = value(*i, round, e));
        }
        assert_eq!(rank.download(copy, dense([1, 1, 1, recv_len]))?, wanted, "rank {me} round {round}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn random_exchanges_move_each_element_and_no_other(
        (size, messages) in exchange(),
        options in prop::sample::select(&ALL[..]),
        from_window in any::<bool>(),
    ) {
        let results = all(size, options, |rank| run_exchange(&rank, &messages, from_window));
        prop_assert!(results.iter().all(Result::is_ok), "{:?}", results);
    }
}

/// A ring of `steps` hops through two halves of a window, each hop a round of one of two exchanges.
fn ring(rank: &Rank, steps: usize, n: usize) -> Result<Vec<f32>> {
    let (me, size) = (rank.group.rank(), rank.group.size());
    let (next, previous) = ((me + 1) % size, (me + size - 1) % size);
    let part = dense([1, 1, 1, n]);
    let halves = [part, part.shifted(n)?];
    let window = rank.group.window(2 * n * 4)?;
    let mut hops = Vec::new();
    for at in halves {
        let send = P2p::Send { to: next, dtype: DType::F32, extent: part.extent() };
        hops.push(rank.group.prepare(&[send, P2p::Recv { from: previous, into: write(&window, at) }])?);
    }
    let begin: Vec<f32> = (0..n).map(|i| (me as usize * n + i) as f32).collect();
    let own = rank.upload(&begin);
    for step in 0..steps {
        let source = if step == 0 { read(&own, part) } else { read(&window, halves[(step + 1) % 2]) };
        rank.group.exchange(&rank.stream, &hops[step % 2], &[source])?;
    }
    rank.download(&window, halves[(steps + 1) % 2])
}

#[test]
fn a_ring_brings_each_part_round_in_flight() {
    for options in ALL {
        let results = all(5, options, |rank| ring(&rank, 12, 33));
        for (rank, result) in results.into_iter().enumerate() {
            let origin = (rank + 5 - 12 % 5) % 5;
            let wanted: Vec<f32> = (0..33).map(|i| (origin * 33 + i) as f32).collect();
            assert_eq!(result, Ok(wanted), "{options:?}");
        }
    }
}

#[test]
fn many_to_one_and_one_to_many() {
    for options in ALL {
        let results = all(8, options, |rank| -> Result<Vec<f32>> {
            let me = rank.group.rank();
            let row = dense([1, 1, 1, 8]);
            let window = rank.group.window(if me == 0 { 8 * 8 * 4 } else { 8 * 4 })?;
            let (mut home, mut away) = (Vec::new(), Vec::new());
            let send = |to| P2p::Send { to, dtype: DType::F32, extent: row.extent() };
            if me == 0 {
                for r in 1..8u32 {
                    home.push(P2p::Recv { from: r, into: write(&window, row.shifted(8 * r as usize)?) });
                    away.push(send(r));
                }
            } else {
                home.push(send(0));
                away.push(P2p::Recv { from: 0, into: write(&window, row) });
            }
            let (home, away) = (rank.group.prepare(&home)?, rank.group.prepare(&away)?);
            let memory = rank.upload(&[me as f32; 8]);
            let from = read(&memory, row);
            rank.group.exchange(&rank.stream, &home, if me == 0 { &[] } else { std::slice::from_ref(&from) })?;
            let back: Vec<_> =
                (1..8).filter(|_| me == 0).map(|r| read(&window, row.shifted(8 * r).expect("small"))).collect();
            rank.group.exchange(&rank.stream, &away, &back)?;
            if me == 0 { rank.download(&memory, row) } else { rank.download(&window, row) }
        });
        for (rank, result) in results.into_iter().enumerate() {
            assert_eq!(result, Ok(vec![rank as f32; 8]), "{options:?}");
        }
    }
}

#[test]
fn staging_is_counted_where_the_personality_has_it() {
    for options in ALL {
        let results = all(2, options, |rank| -> Result<(usize, u64)> {
            let before = rank.device.memory()?.used;
            let peer = 1 - rank.group.rank();
            let wide = dense([1, 4, 2, 8]);
            let half = wide.narrow(2, 0..1)?;
            let window = rank.group.window(wide.bytes())?;
            let ops = [
                P2p::Send { to: peer, dtype: DType::F32, extent: half.extent() },
                P2p::Recv { from: peer, into: write(&window, half) },
            ];
            let exchange = rank.group.prepare(&ops)?;
            let staging = rank.group.staging_bytes(&exchange);
            Ok((staging, rank.device.memory()?.used - before - wide.bytes() as u64))
        });
        let wanted = match options.personality {
            Personality::NcclLike => 256,
            Personality::Push => 128,
            _ => 0,
        };
        for result in results {
            let (staging, used) = result.expect("prepared");
            assert_eq!(staging as u64, used);
            assert!(staging >= wanted && (wanted > 0 || staging == 0), "{options:?}: {staging}");
        }
    }
}

#[test]
fn a_wait_left_out_round_an_exchange_is_a_race() {
    for before in [true, false] {
        let results = all(2, CHECKED, |rank| -> Result<()> {
            let peer = 1 - rank.group.rank();
            let part = dense([1, 1, 1, 16]);
            let window = rank.group.window(part.bytes())?;
            let ops = [
                P2p::Send { to: peer, dtype: DType::F32, extent: part.extent() },
                P2p::Recv { from: peer, into: write(&window, part) },
            ];
            let exchange = rank.group.prepare(&ops)?;
            let compute = stream(&rank.device);
            let memory = rank.device.alloc(part.bytes())?;
            rank.device.fill(&compute, 1.0, write(&memory, part))?;
            if !before {
                rank.device.wait(&rank.stream, &rank.device.record(&compute)?)?;
            }
            rank.group.exchange(&rank.stream, &exchange, &[read(&memory, part)])?;
            if before {
                rank.device.wait(&compute, &rank.device.record(&rank.stream)?)?;
            }
            let result = download(&rank.device, &compute, &window, part).map(|_| ());
            result.and(rank.device.synchronize(&rank.stream, LONG))
        });
        // A rank whose exchange was refused is lost to its peer, so one of them may see that instead.
        assert!(results.iter().any(|r| matches!(r, Err(Error::Race { .. }))), "{results:?}");
        assert!(results.iter().all(Result::is_err) || !before, "{results:?}");
    }
}

#[test]
fn what_does_not_match_is_invalid_on_every_rank_and_the_group_goes_on() {
    type Make = fn(u32, &Buffer) -> Vec<P2p<'_, CpuDevice>>;
    fn send<'a>(to: u32, dtype: DType, n: usize) -> P2p<'a, CpuDevice> {
        P2p::Send { to, dtype, extent: [1, 1, 1, n] }
    }
    fn recv(from: u32, buffer: &Buffer, n: usize) -> P2p<'_, CpuDevice> {
        P2p::Recv { from, into: write(buffer, dense([1, 1, 1, n])) }
    }
    let cases: [(&str, Make); 6] = [
        ("receives 0", |me, _| if me == 0 { vec![send(1, DType::F32, 4)] } else { vec![] }),
        ("sends 0", |me, w| if me == 0 { vec![recv(2, w, 4)] } else { vec![] }),
        ("f16", |me, w| match me {
            0 => vec![send(1, DType::F16, 4)],
            1 => vec![recv(0, w, 4)],
            _ => vec![],
        }),
        ("[1, 1, 1, 5]", |me, w| match me {
            0 => vec![send(1, DType::F32, 5)],
            1 => vec![recv(0, w, 4)],
            _ => vec![],
        }),
        ("rank 9", |me, _| if me == 2 { vec![send(9, DType::F32, 4)] } else { vec![] }),
        ("overlap", |me, w| if me == 2 { vec![recv(2, w, 4), recv(2, w, 2)] } else { vec![] }),
    ];
    let results = all(3, CHECKED, |rank| {
        let window = rank.group.window(64).expect("little");
        let mut errors = Vec::new();
        for (_, make) in cases {
            errors.push(rank.group.prepare(&make(rank.group.rank(), &window)).map(|_| ()));
        }
        let memory = rank.device.alloc(64).expect("little");
        let outside = if rank.group.rank() == 1 { vec![recv(1, &memory, 4), send(1, DType::F32, 4)] } else { vec![] };
        errors.push(rank.group.prepare(&outside).map(|_| ()));
        (errors, ring(&rank, 3, 4))
    });
    let wanted = cases.iter().map(|c| c.0).chain(["window"]);
    for (i, text) in wanted.enumerate() {
        for (errors, ring) in &results {
            match &errors[i] {
                Err(Error::Invalid { why, .. }) => assert!(why.contains(text), "{text}: {why}"),
                other => panic!("{text}: {other:?}"),
            }
            assert!(ring.is_ok(), "{ring:?}");
        }
    }
}

#[test]
fn sends_are_checked_when_they_are_given() {
    all(1, CHECKED, |rank| {
        let part = dense([1, 1, 1, 8]);
        let window = rank.group.window(64).expect("little");
        let send = P2p::Send { to: 0, dtype: DType::F32, extent: part.extent() };
        let exchange =
            rank.group.prepare(&[send, P2p::Recv { from: 0, into: write(&window, part) }]).expect("matches itself");
        let memory = rank.upload(&[3.0; 8]);
        let bad = [
            rank.group.exchange(&rank.stream, &exchange, &[]),
            rank.group.exchange(&rank.stream, &exchange, &[read(&memory, dense([1, 1, 1, 7]))]),
            rank.group.exchange(&rank.stream, &exchange, &[read(&window, part)]),
        ];
        assert!(bad.iter().all(|r| matches!(r, Err(Error::Invalid { .. }))), "{bad:?}");
        rank.group.exchange(&rank.stream, &exchange, &[read(&memory, part)]).expect("right");
        assert_eq!(rank.download(&window, part), Ok(vec![3.0; 8]));
    });
}

#[test]
fn barriers_order_ranks() {
    for options in ALL {
        let seen = std::sync::atomic::AtomicU32::new(0);
        let results = all(6, options, |rank| {
            for round in 0..5 {
                seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                rank.group.barrier(&rank.stream)?;
                rank.device.synchronize(&rank.stream, LONG)?;
                assert!(seen.load(std::sync::atomic::Ordering::SeqCst) >= 6 * (round + 1));
            }
            Ok(())
        });
        assert!(results.iter().all(|r: &Result<()>| r.is_ok()), "{results:?}");
    }
}

#[test]
fn a_barrier_orders_memory_between_ranks_in_checked_mode() {
    for ordered in [true, false] {
        let shared = device(CHECKED).alloc(64).expect("little");
        let part = dense([1, 1, 1, 16]);
        // Orders the host threads, of which checked mode knows nothing.
        let host = std::sync::Barrier::new(2);
        let results = all(2, CHECKED, |rank| -> Result<()> {
            let early = rank.group.rank() == 0;
            if early {
                rank.device.fill(&rank.stream, 1.0, write(&shared, part))?;
                watch(&rank.device, &rank.stream);
            }
            host.wait();
            if ordered {
                rank.group.barrier(&rank.stream)?;
            }
            if !early {
                rank.device.fill(&rank.stream, 2.0, write(&shared, part))?;
            }
            watch(&rank.device, &rank.stream);
            host.wait();
            rank.device.synchronize(&rank.stream, LONG)
        });
        assert_eq!(results.iter().all(Result::is_ok), ordered, "{results:?}");
    }
}

#[test]
fn subgroups_have_their_own_ranks() {
    let results = all(5, CHECKED, |rank| {
        let odd = rank.group.subgroup(&[1, 3]).expect("fine");
        let even = rank.group.subgroup(&[0, 2, 4]).expect("fine");
        for bad in [&[][..], &[2, 1], &[1, 1], &[5]] {
            assert!(matches!(rank.group.subgroup(bad), Err(Error::Invalid { .. })));
        }
        let differing = rank.group.subgroup(&[rank.group.rank()]);
        assert!(matches!(differing, Err(Error::Invalid { .. })));
        assert!(odd.is_some() != even.is_some());
        let group = odd.or(even).expect("one of them");
        let place = (group.rank(), group.size());
        let part = Rank { device: rank.device.clone(), group, stream: stream(&rank.device) };
        (place, ring(&part, 1, 2).map(|v| v[0]))
    });
    let wanted = [((0, 3), 4.0), ((0, 2), 2.0), ((1, 3), 0.0), ((1, 2), 0.0), ((2, 3), 2.0)];
    for (got, (place, value)) in results.into_iter().zip(wanted) {
        assert_eq!(got, (place, Ok(value)));
    }
}
