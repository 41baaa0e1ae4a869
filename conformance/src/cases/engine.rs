//! The facade: engines over host tensors on ranks that it starts itself, by the backend's name.

use std::time::Duration;

use longspan::{Engine, Extra, Tensor, in_group, on_ranks, on_ranks_within};
use longspan_hal::{Backend, DType, Error, GroupId};
use longspan_seqpar::{Layout, Mask, Mesh, Placement, Problem};
use ndarray::{Array4, ArrayView4, Axis};

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
            cases.push(Case::new(case, ranks(u * r), move |rank| {
                let problem = Problem::new(dtype, 1, [4, 4], 16).with_sinks(true).with_alibi(true);
                let layout = Layout::zigzag(53, &Mesh::new(u, r, Placement::UlyssesInner)?);
                run(rank, &name, Setup { dlse: true, ..Setup::new(problem, layout, Mask::causal()) })
            }));
        }
    }
    for dtype in [DType::Bf16, DType::F32] {
        let name = of();
        cases.push(Case::new(format!("engine/joint-u2r2-{dtype}-partial"), ranks(4), move |rank| {
            let problem = Problem::new(dtype, 1, [4, 2], 16).with_sinks(true).with_joint(7);
            let layout = Layout::zigzag(53, &Mesh::new(2, 2, Placement::UlyssesInner)?);
            run(rank, &name, Setup { dlse: true, ..Setup::new(problem, layout, Mask::full()) })
        }));
    }
    cases
}

fn host(dtype: DType, x: ArrayView4<'_, f32>) -> Result<Tensor, Error> {
    let (b, s, h, d) = x.dim();
    Tensor::from_f32(dtype, [b, s, h, d], &x.iter().copied().collect::<Vec<_>>())
}

/// The rows of the sequence, and the joint rows after them.
fn halves(dtype: DType, x: &Array4<f32>, seq: usize) -> Result<[Tensor; 2], Error> {
    let (sequence, joint) = x.view().split_at(Axis(1), seq);
    Ok([host(dtype, sequence)?, host(dtype, joint)?])
}

/// Forward and backward through engines, judged against the oracle; the report's bytes equal the plan's table.
fn run<B: Backend>(rank: &mut Rank<B>, name: &str, setup: Setup) -> Result<(), Failure> {
    let (problem, layout) = (&setup.problem, &setup.q);
    let whole = Whole::random(&setup, &mut rank.random());
    let of = |x: &Array4<f32>| halves(problem.dtype, x, layout.seq());
    let [[q, jq], [k, jk], [v, jv]] = [of(&whole.qkv[0])?, of(&whole.qkv[1])?, of(&whole.qkv[2])?];
    let [dout, jdout] = of(&whole.incoming.dout)?;
    let Some(dlse) = &whole.incoming.dlse else { return Err(Failure::wrong("dlse was asked for")) };
    let [dlse, jdlse] = halves(DType::F32, &dlse.clone().insert_axis(Axis(3)), layout.seq())?;
    let joint = problem.joint > 0;
    let results = everywhere(rank, name, setup.mesh(), |engine| {
        let mine = |x: &Tensor| x.shard(layout, engine.rank());
        let (shards, dout, dlse) = ([mine(&q)?, mine(&k)?, mine(&v)?], mine(&dout)?, mine(&dlse)?);
        engine.prepare(problem, [layout, layout], &setup.mask)?;
        let extra = Extra {
            alibi_slopes: problem.alibi.then(|| whole.slopes.clone()),
            sinks: Some(whole.sinks.clone()),
            joint: joint.then(|| [jq.clone(), jk.clone(), jv.clone()]),
            ..Extra::default()
        };
        let forward = engine.forward([&shards[0], &shards[1], &shards[2]], &extra)?;
        let back = engine.backward_joint(&dout, Some(&dlse), joint.then_some((&jdout, Some(&jdlse))))?;
        bytes_match(engine)?;
        let mut tensors = vec![forward.out, forward.lse, back.dq, back.dk, back.dv];
        tensors.extend(forward.joint.into_iter().flatten().chain(back.joint.into_iter().flatten()));
        Ok((tensors, back.dsinks))
    })?;
    let joined = |i: usize| -> Result<Vec<f32>, Failure> {
        let shards: Vec<Tensor> = results.iter().map(|(tensors, _)| tensors[i].clone()).collect();
        let mut all = Tensor::unshard(layout, &shards)?.to_f32();
        if joint {
            let replicas: Vec<&Tensor> = results.iter().filter_map(|(tensors, _)| tensors.get(5 + i)).collect();
            check(replicas.len() == results.len() && replicas.windows(2).all(|w| w[0] == w[1]), || {
                format!("joint rows of tensor {i} are missing, or not the same on every rank")
            })?;
            all.extend(replicas[0].to_f32());
        }
        Ok(all)
    };
    let got = [joined(0)?, joined(1)?, joined(2)?, joined(3)?, joined(4)?];
    judge_all(&setup, &whole, got, results[0].1.as_deref())
}

/// What a rank gave back: the shards of five tensors, with joint tokens their joint rows, and the sinks' gradient.
type Shards = (Vec<Tensor>, Option<Vec<f32>>);

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
    Ok(shards.into_iter().map(|list| (list, dsinks.clone())).collect())
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
    let spec = setup.problem.spec([seq + setup.problem.joint; 2]);
    let pair = |_: usize, i: usize, j: usize| {
        (i >= seq || j >= seq || setup.mask.allows(i, j)).then_some((i as i64, j as i64))
    };
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

/// A forward before a prepare, a backward before a forward, tensors of another shape: Invalid, and the engine works on, a forward's
/// backward too.
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
        let short_dout = engine.backward(&short, None).map(drop);
        let unasked_joint = engine.backward_joint(&x, None, Some((&x, None))).map(drop);
        engine.backward(&x, None)?;
        Ok([early, unready, misfit, unasked, short_dout, unasked_joint])
    })?;
    let names = [
        "a forward before its prepare",
        "a backward before its forward",
        "a short shard",
        "sinks nobody asked for",
        "a short dout",
        "a joint dout nobody asked for",
    ];
    ranks.into_iter().flatten().zip(names).try_for_each(|(result, what)| check_invalid(what, result))
}

/// A rank that panics, and one that gives up: the others are told which it was, soon.
fn lost_ranks<B: Backend>(rank: &Rank<B>, name: &str) -> Result<(), Failure> {
    let mesh = Mesh::new(3, 1, Placement::UlyssesInner)?;
    let layout = Layout::contiguous(12, &mesh);
    let problem = Problem::new(DType::F32, 1, [3, 3], 8);
    // The first time nobody is lost: it may take long, since kernels are compiled.
    for lost in [None, Some(false), Some(true)] {
        let start = std::time::Instant::now();
        let body = |engine: &mut dyn Engine| {
            engine.prepare(&problem, [&layout, &layout], &Mask::full())?;
            let x = Tensor::normal(DType::F32, [1, layout.rows(engine.rank()), 3, 8], 1);
            match lost.filter(|_| engine.rank() == 1) {
                Some(true) => std::panic::resume_unwind(Box::new("told to stop")),
                Some(false) => Err(Error::invalid("rank 1", "told to stop")),
                None => (0..3).try_for_each(|_| engine.forward([&x, &x, &x], &Extra::default()).map(drop)),
            }
        };
        let results: Vec<(usize, Result<(), Error>)> = if rank.processes {
            vec![(rank.index() as usize, own(rank, body)?)]
        } else {
            let limit = if lost.is_none() { Duration::from_secs(600) } else { Duration::from_secs(10) };
            on_ranks_within(name, &mesh, limit, body)?.into_iter().enumerate().collect()
        };
        let Some(panics) = lost else {
            results.into_iter().try_for_each(|(_, result)| result)?;
            continue;
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
