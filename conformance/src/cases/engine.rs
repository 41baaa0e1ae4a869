//! The facade: engines over host tensors on ranks that it starts itself, by the backend's name.

use std::time::Duration;

use longspan::{Engine, Extra, Tensor, in_group, on_ranks, on_ranks_within};
use longspan_hal::{Backend, DType, Error, GroupId};
use longspan_seqpar::{Layout, Mask, Mesh, Placement, Problem};
use ndarray::Axis;

use super::Case;
use super::parallel::{Setup, Whole};
use super::problem::extent_of;
use crate::bound::{Judge, judge_sinks};
use crate::host::Random;
use crate::oracle::{Answers, What};
use crate::rank::{Failure, Rank, array, check, check_invalid};

/// The cases of this file for the backend that the facade knows as `name`. The facade starts their ranks, or, with `processes`,
/// makes those that a launcher started into a group of its own.
pub fn cases<B: Backend>(name: &str, processes: bool) -> Vec<Case<B>> {
    let ranks = |n| if processes { n } else { 1 };
    let of = || name.to_owned();
    let (first, second, third) = (of(), of(), of());
    let mut cases = vec![
        Case::new("engine/calls-out-of-order-f32", 1, move |_| out_of_order(&first)),
        Case::new("engine/lost-ranks-are-named", ranks(3), move |rank| lost_ranks(rank, &second)),
        Case::new("engine/memory-is-predicted-f32", 1, move |_| memory_is_predicted(&third)),
        Case::new("engine/unknown-backends-are-refused", 1, |_| unknown_backend()),
    ];
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for (u, r, words) in [(1, 1, ""), (4, 1, ""), (2, 2, "-partial"), (1, 3, "-partial")] {
            let case = format!("engine/run-u{u}r{r}-{dtype}{words}");
            let name = of();
            cases.push(Case::new(case, ranks(u * r), move |rank| run(rank, &name, dtype, u, r)));
        }
    }
    cases
}

fn host(dtype: DType, x: &ndarray::Array4<f32>) -> Result<Tensor, Error> {
    Tensor::from_f32(dtype, extent_of(x), &x.iter().copied().collect::<Vec<_>>())
}

/// Forward and backward through engines, judged against the oracle; the report's bytes equal the plan's table.
fn run<B: Backend>(rank: &mut Rank<B>, name: &str, dtype: DType, u: u32, r: u32) -> Result<(), Failure> {
    let mesh = Mesh::new(u, r, Placement::UlyssesInner)?;
    let problem = Problem::new(dtype, 1, [4, 4], 16).with_sinks(true).with_alibi(true);
    let setup = Setup { dlse: true, ..Setup::new(problem, Layout::zigzag(53, &mesh), Mask::causal()) };
    let whole = Whole::random(&setup, &mut rank.random());
    let [q, k, v] = [host(dtype, &whole.qkv[0])?, host(dtype, &whole.qkv[1])?, host(dtype, &whole.qkv[2])?];
    let dout = host(dtype, &whole.incoming.dout)?;
    let Some(dlse) = &whole.incoming.dlse else { return Err(Failure::wrong("dlse was asked for")) };
    let dlse = host(DType::F32, &dlse.clone().insert_axis(Axis(3)))?;
    let layout = &setup.q;
    let results = everywhere(rank, name, &mesh, |engine| {
        let mine = |x: &Tensor| x.shard(layout, engine.rank());
        let (shards, dout, dlse) = ([mine(&q)?, mine(&k)?, mine(&v)?], mine(&dout)?, mine(&dlse)?);
        engine.prepare(&setup.problem, [layout, layout], &setup.mask)?;
        let extra =
            Extra { alibi_slopes: Some(whole.slopes.clone()), sinks: Some(whole.sinks.clone()), ..Extra::default() };
        let forward = engine.forward([&shards[0], &shards[1], &shards[2]], &extra)?;
        let back = engine.backward(&dout, Some(&dlse))?;
        bytes_match(engine)?;
        Ok(([forward.out, forward.lse, back.dq, back.dk, back.dv], back.dsinks))
    })?;
    let joined = |i: usize| -> Result<Vec<f32>, Error> {
        let shards: Vec<Tensor> = results.iter().map(|(tensors, _)| tensors[i].clone()).collect();
        Ok(Tensor::unshard(layout, &shards)?.to_f32())
    };
    let got = [joined(0)?, joined(1)?, joined(2)?, joined(3)?, joined(4)?];
    judge_all(&setup, &whole, got, results[0].1.as_deref())
}

/// What the ranks gave back, in rank order: the shards of five tensors, and the sinks' gradient.
type Shards = ([Tensor; 5], Option<Vec<f32>>);

/// Runs `body` on every rank of `mesh`; what all gave back, on every process.
fn everywhere<B: Backend>(
    rank: &Rank<B>,
    name: &str,
    mesh: &Mesh,
    body: impl Fn(&mut dyn Engine) -> Result<Shards, Error> + Sync,
) -> Result<Vec<Shards>, Failure> {
    let refused = |error| match error {
        Error::Unsupported { .. } => Failure::Refused(error.to_string()),
        other => other.into(),
    };
    if !rank.processes {
        return on_ranks(name, mesh, body).map_err(refused);
    }
    let (tensors, dsinks) = own(rank, body)?.map_err(refused)?;
    let mut shards: Vec<Vec<Tensor>> = (0..mesh.size()).map(|_| Vec::new()).collect();
    for tensor in &tensors {
        for (list, bytes) in shards.iter_mut().zip(rank.share(tensor.to_bytes())?.iter()) {
            list.push(Tensor::from_bytes(bytes)?);
        }
    }
    let missing = |_| Failure::wrong("a rank shared another number of tensors");
    shards.into_iter().map(|list| Ok((list.try_into().map_err(missing)?, dsinks.clone()))).collect()
}

/// Runs `body` on this process's rank of a group of all.
fn own<B: Backend, T>(
    rank: &Rank<B>,
    body: impl FnOnce(&mut dyn Engine) -> Result<T, Error>,
) -> Result<Result<T, Error>, Failure> {
    let id = if rank.index() == 0 { B::group_id()?.0 } else { Vec::new() };
    let id = GroupId(rank.share(id)?[0].clone());
    let result = in_group::<B, T>(&rank.info, &id, [rank.index(), rank.size()], Duration::from_secs(10), body);
    rank.share(Vec::new())?;
    Ok(result)
}

fn bytes_match(engine: &dyn Engine) -> Result<(), Error> {
    let sent = engine.report()?.total(longspan_seqpar::Work::Exchange).1;
    let Some(plan) = engine.plan() else { return Err(Error::invalid("plan", "it was prepared")) };
    let table = plan.traffic(false)?.iter().chain(&plan.traffic(true)?).map(|t| t.bytes).sum::<u64>();
    if sent == table {
        return Ok(());
    }
    Err(Error::invalid("bytes sent", format!("{sent}, the table says {table}")))
}

fn judge_all(setup: &Setup, whole: &Whole, got: [Vec<f32>; 5], dsinks: Option<&[f32]>) -> Result<(), Failure> {
    let seq = setup.q.seq();
    let spec = setup.problem.spec([seq, seq]);
    let pair = |_: usize, i: usize, j: usize| setup.mask.allows(i, j).then_some((i as i64, j as i64));
    let answers =
        |whole: &Whole| Answers::new(&whole.problem(setup, &spec, &pair), &whole.incoming, setup.problem.dtype);
    let again = |draw: u64| answers(&Whole::random(setup, &mut Random::new(draw)));
    let mut judge = Judge::new(&spec, answers(whole), &again)?;
    let [out, lse, dq, dk, dv] = got;
    let Some(dsinks) = dsinks else { return Err(Failure::wrong("dsinks are missing")) };
    let rows = array(extent_of(&whole.incoming.dout), out.clone())?;
    judge_sinks(dsinks, &whole.sinks, &rows, &judge.answers().exact.lse, &whole.incoming)?;
    for (what, got) in [(What::Out, out), (What::Lse, lse), (What::Dq, dq), (What::Dk, dk), (What::Dv, dv)] {
        judge.judge(what, got.into_iter().map(f64::from))?;
    }
    Ok(())
}

/// A forward before a prepare, a backward before a forward, shards of another shape: Invalid, and the engine works on.
fn out_of_order(name: &str) -> Result<(), Failure> {
    let mesh = Mesh::new(1, 1, Placement::UlyssesInner)?;
    let layout = Layout::contiguous(12, &mesh);
    let x = Tensor::normal(DType::F32, [1, 12, 2, 8], 1);
    let short = Tensor::normal(DType::F32, [1, 11, 2, 8], 1);
    let problem = Problem::new(DType::F32, 1, [2, 2], 8).with_backward(true);
    let ranks = on_ranks(name, &mesh, |engine| {
        let early = engine.forward([&x, &x, &x], &Extra::default()).map(drop);
        engine.prepare(&problem, [&layout, &layout], &Mask::full())?;
        let unready = engine.backward(&x, None).map(drop);
        let misfit = engine.forward([&short, &x, &x], &Extra::default()).map(drop);
        let spare = Extra { sinks: Some(vec![0.0; 2]), ..Extra::default() };
        let unasked = engine.forward([&x, &x, &x], &spare).map(drop);
        engine.forward([&x, &x, &x], &Extra::default())?;
        engine.backward(&x, None)?;
        Ok([early, unready, misfit, unasked])
    })?;
    let names =
        ["a forward before its prepare", "a backward before its forward", "a short shard", "sinks nobody asked for"];
    ranks.into_iter().flatten().zip(names).try_for_each(|(result, what)| check_invalid(what, result))
}

/// A rank that panics, and one that gives up: the others are told which it was, soon.
fn lost_ranks<B: Backend>(rank: &Rank<B>, name: &str) -> Result<(), Failure> {
    let mesh = Mesh::new(3, 1, Placement::UlyssesInner)?;
    let layout = Layout::contiguous(12, &mesh);
    let problem = Problem::new(DType::F32, 1, [3, 3], 8);
    for panics in [false, true] {
        let start = std::time::Instant::now();
        let body = |engine: &mut dyn Engine| {
            engine.prepare(&problem, [&layout, &layout], &Mask::full())?;
            if engine.rank() == 1 {
                if panics {
                    std::panic::resume_unwind(Box::new("told to stop"));
                }
                return Err(Error::invalid("rank 1", "told to stop"));
            }
            let x = Tensor::normal(DType::F32, [1, layout.rows(engine.rank()), 3, 8], 1);
            (0..3).try_for_each(|_| engine.forward([&x, &x, &x], &Extra::default()).map(drop))
        };
        let results: Vec<(usize, Result<(), Error>)> = if rank.processes {
            vec![(rank.index() as usize, own(rank, body)?)]
        } else {
            on_ranks_within(name, &mesh, Duration::from_secs(10), body)?.into_iter().enumerate().collect()
        };
        for (r, result) in results.iter().filter(|(r, _)| *r != 1) {
            let told = matches!(result, Err(Error::PeerLost { rank: 1, .. }));
            check(told, || format!("rank 1 was lost (panic: {panics}); rank {r} got {result:?}"))?;
        }
        check(start.elapsed() < Duration::from_secs(10), || format!("it took {:?}", start.elapsed()))?;
    }
    Ok(())
}

/// 64 TiB of tensors: the error says what is wanted and what there is, nothing was taken, and the engine works on.
fn memory_is_predicted(name: &str) -> Result<(), Failure> {
    let mesh = Mesh::new(1, 1, Placement::UlyssesInner)?;
    let (long, short) = (Layout::contiguous(1 << 18, &mesh), Layout::contiguous(12, &mesh));
    let (huge, small) = (Problem::new(DType::F32, 1, [1 << 16; 2], 256), Problem::new(DType::F32, 1, [2, 2], 8));
    let x = Tensor::normal(DType::F32, [1, 12, 2, 8], 1);
    let ranks = on_ranks(name, &mesh, |engine| {
        let before = engine.report()?.memory.used;
        let refused = engine.prepare(&huge, [&long, &long], &Mask::causal()).map(drop);
        let taken = engine.report()?.memory.used - before;
        engine.prepare(&small, [&short, &short], &Mask::causal())?;
        engine.forward([&x, &x, &x], &Extra::default())?;
        Ok((refused, taken))
    })?;
    let tensors = 64 << 40;
    for (refused, taken) in ranks {
        let told = matches!(refused, Err(Error::OutOfMemory { wanted, free }) if wanted >= tensors && free > 0 && free < wanted);
        check(told && taken == 0, || format!("{refused:?}, and {taken} bytes taken"))?;
    }
    Ok(())
}

fn unknown_backend() -> Result<(), Failure> {
    let mesh = Mesh::new(1, 1, Placement::UlyssesInner)?;
    match on_ranks("abacus", &mesh, |_| Ok(())) {
        Err(error @ Error::Invalid { .. }) => {
            let text = error.to_string();
            let listed = longspan::backends().iter().all(|b| text.contains(b));
            check(listed, || format!("the error does not list the backends: {text}"))
        }
        other => Err(Failure::wrong(format!("an unknown backend gave {other:?}"))),
    }
}
