//! Sequence-parallel runs against each other: dropout masks, repeated runs, several meshes, precision over ranks, refusals.

use longspan_hal::{Attention, Backend, DType, Device, Error, Extras, ViewMut};
use longspan_seqpar::{Gradients, Inputs, Layout, Mask, Mesh, Outputs, Placement, Plan, Problem, Usp};
use ndarray::{Array4, s};

use super::parallel::{Loaded, Setup, Whole, prepare};
use super::problem::{self, Config};
use super::{Case, slices};
use crate::bound::errors;
use crate::host::{self, Random};
use crate::oracle::{self, philox};
use crate::rank::{Failure, Rank, check, check_invalid};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    let mut cases = Vec::new();
    for (u, r) in [(1, 1), (1, 4), (4, 1), (2, 2), (1, 8), (8, 1), (2, 4), (3, 2)] {
        let name = format!("seqpar/dropout-mask-is-exact-u{u}r{r}-f32");
        cases.push(Case::new(name, u * r, move |rank| dropout_mask(rank, u, r)));
    }
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        cases.extend([
            Case::new(format!("seqpar/layers-in-a-row-{dtype}-partial"), 4, move |r| layers(r, dtype)),
            Case::new(format!("seqpar/runs-twice-bitwise-{dtype}-partial"), 4, move |r| twice(r, dtype)),
            Case::new(format!("seqpar/precision-over-ranks-{dtype}-partial"), 8, move |r| precision(r, dtype, 768, 3)),
            Case::new(format!("seqpar/precision-over-ranks-8192-{dtype}-partial"), 8, move |r| {
                precision(r, dtype, 8192, 8)
            })
            .full(),
        ]);
    }
    cases.extend([
        Case::new("seqpar/arguments-are-checked", 2, arguments),
        Case::new("seqpar/missing-inputs-are-refused-everywhere-f32-alibi-dropout", 4, missing_inputs),
        Case::new("seqpar/overlaps-are-refused-f32-partial", 4, overlaps),
        Case::new("seqpar/two-meshes-in-one-process-f32", 4, two_meshes),
    ]);
    cases
}

fn mesh(u: u32, r: u32) -> Result<Mesh, Error> {
    Mesh::new(u, r, Placement::UlyssesInner)
}

/// Equal logits and one-hot values make the output the dropout mask itself: the same bits for every mesh.
fn dropout_mask<B: Backend>(rank: &mut Rank<B>, u: u32, r: u32) -> Result<(), Failure> {
    const SEQ: usize = 96;
    let p = 0.45;
    let problem = Problem::new(DType::F32, 2, [4, 2], 8).with_head_dim_v(SEQ).with_dropout(Some(p));
    let setup = Setup::new(problem, Layout::zigzag(SEQ, &mesh(u, r)?), Mask::full());
    let mut whole = Whole::random(&setup, &mut rank.random());
    whole.qkv[1].fill(0.0);
    whole.qkv[2] = Array4::from_shape_fn((2, SEQ, 2, SEQ), |(_, j, _, d)| f32::from(j == d));
    let loaded = Loaded::new(rank, &setup, &whole)?;
    let usp = prepare(rank, &setup, &loaded)?;
    loaded.forward(rank, &usp, None)?;
    let positions = setup.q.positions(rank.index());
    for ((b, i, h, j), x) in rank.read(&loaded.shard.out)?.indexed_iter() {
        let keep = philox::keeps(p, whole.seed, b, h, positions[i] as i64, j as i64);
        check((*x != 0.0) == keep, || {
            format!("batch {b} query {} head {h} key {j}: kept {}, wanted {keep}", positions[i], *x != 0.0)
        })?;
    }
    Ok(())
}

fn small(dtype: DType) -> Result<Setup, Error> {
    let problem = Problem::new(dtype, 1, [6, 3], 16).with_sinks(true).with_deterministic(true).with_head_groups(2);
    Ok(Setup::new(problem, Layout::zigzag(61, &mesh(2, 2)?), Mask::causal()))
}

/// The same inputs twice through the same workspace, and once through a new one: the same bits.
fn twice<B: Backend>(rank: &mut Rank<B>, dtype: DType) -> Result<(), Failure> {
    let setup = small(dtype)?;
    let whole = Whole::random(&setup, &mut rank.random());
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for _ in 0..2 {
        let loaded = Loaded::new(rank, &setup, &whole)?;
        let usp = prepare(rank, &setup, &loaded)?;
        for _ in 0..2 {
            loaded.forward(rank, &usp, None)?;
            loaded.backward(rank, &usp, None)?;
            kept.push(loaded.results(rank)?);
        }
        rank.share(Vec::new())?;
    }
    check(kept.windows(2).all(|w| w[0] == w[1]), || "two deterministic runs differ".into())
}

/// Several layers queued without a wait between, then their backwards in reverse: as a model runs them.
fn layers<B: Backend>(rank: &mut Rank<B>, dtype: DType) -> Result<(), Failure> {
    const LAYERS: usize = 5;
    let setup = small(dtype)?;
    let mut random = rank.random();
    let loaded = (0..LAYERS)
        .map(|_| Loaded::new(rank, &setup, &Whole::random(&setup, &mut random)))
        .collect::<Result<Vec<_>, _>>()?;
    let usp = prepare(rank, &setup, &loaded[0])?;
    // One after the other, each waited for: what the others must agree with.
    let mut wanted = Vec::new();
    for layer in &loaded {
        layer.forward(rank, &usp, None)?;
        layer.backward(rank, &usp, None)?;
        wanted.push(layer.results(rank)?);
    }
    for (i, layer) in loaded.iter().enumerate() {
        rank.step("layer forward", i as u32);
        layer.forward(rank, &usp, None)?;
    }
    for (i, layer) in loaded.iter().enumerate().rev() {
        rank.step("layer backward", i as u32);
        layer.backward(rank, &usp, None)?;
    }
    for (i, (layer, wanted)) in loaded.iter().zip(&wanted).enumerate() {
        check(layer.results(rank)? == *wanted, || format!("layer {i} differs when others are queued behind it"))?;
    }
    Ok(())
}

/// Meshes of unequal shape and head counts, in turn on one group.
fn two_meshes<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let first = Problem::new(DType::F32, 1, [4, 2], 16);
    let second = Problem::new(DType::F32, 2, [7, 7], 8).with_alibi(true);
    let setups = [
        Setup::new(first, Layout::zigzag(50, &Mesh::new(2, 2, Placement::RingInner)?), Mask::causal()),
        Setup::new(second, Layout::stripe(33, &mesh(4, 1)?), Mask::full()),
    ];
    let mut random = rank.random();
    let mut ready = Vec::new();
    for setup in &setups {
        let loaded = Loaded::new(rank, setup, &Whole::random(setup, &mut random))?;
        let usp = prepare(rank, setup, &loaded)?;
        ready.push((loaded, usp));
    }
    let alone = ready
        .iter()
        .map(|(loaded, usp)| {
            loaded.forward(rank, usp, None)?;
            loaded.backward(rank, usp, None)?;
            loaded.results(rank)
        })
        .collect::<Result<Vec<_>, _>>()?;
    for _ in 0..3 {
        for (loaded, usp) in &ready {
            loaded.forward(rank, usp, None)?;
        }
        for (loaded, usp) in &ready {
            loaded.backward(rank, usp, None)?;
        }
    }
    for ((loaded, _), alone) in ready.iter().zip(&alone) {
        check(loaded.results(rank)? == *alone, || "two meshes in turn disturb each other".into())?;
    }
    // And each is right by itself.
    setups.iter().try_for_each(|setup| super::parallel::run(rank, setup))
}

/// The RMS error of `out` over 8 ring ranks is at most 1.25 times that of one rank (mean of `seeds`).
fn precision<B: Backend>(rank: &mut Rank<B>, dtype: DType, seq: usize, seeds: u64) -> Result<(), Failure> {
    let problem = Problem::new(dtype, 1, [1, 1], 64);
    let setup = Setup::new(problem, Layout::zigzag(seq, &mesh(1, 8)?), Mask::causal());
    let mut sums = [0.0; 2];
    for seed in 0..seeds {
        rank.step("seed", seed as u32);
        let whole = Whole::random(&setup, &mut Random::new(rank.random().bits() ^ seed));
        let loaded = Loaded::new(rank, &setup, &whole)?;
        let usp = prepare(rank, &setup, &loaded)?;
        loaded.forward(rank, &usp, None)?;
        let out = rank.read(&loaded.shard.out)?;
        let Some(all) = rank.gather(out.iter().flat_map(|x| x.to_le_bytes()).collect())? else { continue };
        let shards: Vec<Vec<f32>> = all.iter().map(|bytes| host::decode(DType::F32, bytes)).collect();
        let parallel = setup.q.unshard(&shards, 1, 64)?;
        let pair = |_: usize, i: usize, j: usize| (j <= i).then_some((i as i64, j as i64));
        let spec = setup.problem.spec([seq, seq]);
        let exact = oracle::exact(&oracle::Problem::new(&spec, whole.qkv.clone(), &pair), None);
        let single = one_rank(rank, &whole, dtype, seq)?;
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from);
        sums[0] += errors("out over 8 ranks", wide(parallel), &exact.out)?.rms;
        sums[1] += errors("out on one rank", wide(single), &exact.out)?.rms;
    }
    rank.share(Vec::new())?;
    if rank.index() == 0 {
        rank.figure("rms over 8 ranks / on one", sums[0] / sums[1]);
        check(sums[0] <= 1.25 * sums[1], || {
            format!("the RMS error over 8 ranks is {:.3}x that of one rank", sums[0] / sums[1])
        })?;
    }
    Ok(())
}

/// `out` of the same problem in one call on this rank.
fn one_rank<B: Backend>(rank: &Rank<B>, whole: &Whole, dtype: DType, seq: usize) -> Result<Vec<f32>, Failure> {
    let spec = longspan_hal::Spec::new(dtype, 1, [seq, seq], [1, 1], 64);
    let config = Config::new(spec.clone(), slices::causal(&spec));
    rank.attention.supports(&spec)?;
    let mut random = rank.random();
    let mut values = problem::Values::random(&config, &mut random);
    values.qkv = whole.qkv.clone();
    let grid = problem::Grid::new(&spec, &config.slices);
    let loaded = problem::Loaded::new(rank, &config, &grid, &values, &mut random)?;
    let outputs = problem::Outputs::new(rank, &config, &mut random)?;
    problem::forward(rank, &spec, &[problem::plan(rank, &spec, &config.slices)?], &loaded, &outputs)?;
    Ok(rank.read(&outputs.out)?.slice(s![0, .., 0, ..]).iter().copied().collect())
}

/// What can't be is Invalid before anything runs, on every rank.
fn arguments<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (mesh, me) = (mesh(2, 1)?, rank.index());
    let problem = Problem::new(DType::F32, 1, [4, 2], 16).with_backward(true);
    let layout = Layout::contiguous(20, &mesh);
    let other = Layout::contiguous(21, &mesh);
    let plan = |problem: &Problem, k: &Layout, mask: Mask| Plan::new(problem, &layout, k, &mask, me);
    check_invalid("causal cross attention", plan(&problem, &other, Mask::causal()))?;
    check_invalid("uneven groups", plan(&Problem::new(DType::F32, 1, [4, 3], 16), &layout, Mask::full()))?;
    check_invalid("joint tokens with a mask", plan(&problem.clone().with_joint(3), &layout, Mask::causal()))?;
    check_invalid("dropout of 1", plan(&problem.clone().with_dropout(Some(1.0)), &layout, Mask::full()))?;
    check_invalid("more groups than heads", plan(&problem.clone().with_head_groups(5), &layout, Mask::full()))?;
    check_invalid("a rank too many", Plan::new(&problem, &layout, &layout, &Mask::full(), 2))?;
    let big = Layout::contiguous(20, &Mesh::new(3, 1, Placement::UlyssesInner)?);
    let plan = Plan::new(&problem, &big, &big, &Mask::full(), me)?;
    check_invalid(
        "a plan for another group",
        Usp::<B>::prepare(&rank.member, &rank.stream, plan, |bytes| rank.device.alloc(bytes)),
    )?;
    // Prepared without backward, asked for it.
    let forward_only =
        Setup { problem: problem.with_backward(false), ..Setup::new(small(DType::F32)?.problem, layout, Mask::full()) };
    let loaded = Loaded::new(rank, &forward_only, &Whole::random(&forward_only, &mut rank.random()))?;
    let usp = prepare(rank, &forward_only, &loaded)?;
    loaded.forward(rank, &usp, None)?;
    check_invalid("a backward that was not prepared", loaded.backward(rank, &usp, None))
}

/// Inputs of options that are missing: every rank is told, also one without heads, and all work on.
fn missing_inputs<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let problem = Problem::new(DType::F32, 1, [2, 2], 16).with_alibi(true).with_dropout(Some(0.2));
    let setup = Setup::new(problem, Layout::contiguous(21, &mesh(4, 1)?), Mask::causal());
    let loaded = Loaded::new(rank, &setup, &Whole::random(&setup, &mut rank.random()))?;
    let usp = prepare(rank, &setup, &loaded)?;
    let given = || loaded.inputs(&setup.problem);
    let all = given()?.extras;
    for (what, extras) in [
        ("no slopes", Extras { alibi_slopes: None, ..all }),
        ("no seed", Extras { seed: None, ..all }),
        ("sinks nobody asked for", Extras { sinks: all.alibi_slopes, ..all }),
    ] {
        let inputs = Inputs { extras, ..given()? };
        let outputs = loaded.forward_into()?;
        check_invalid(what, usp.forward(&rank.member, &rank.stream, &inputs, &outputs, None))?;
        let (rows, gradients) = (loaded.shard.rows()?, loaded.backward_into(&setup.problem)?);
        check_invalid(what, usp.backward(&rank.member, &rank.stream, &inputs, &rows, None, &gradients, None))?;
    }
    for tensor in loaded.outputs() {
        rank.check_untouched("a refused call", tensor)?;
    }
    loaded.forward(rank, &usp, None)?;
    loaded.backward(rank, &usp, None)?;
    Ok(rank.synchronize()?)
}

/// Tensors of the caller that overlap, of a problem that is cut, so that kernels do not see them.
fn overlaps<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let setup = small(DType::F32)?;
    let loaded = Loaded::new(rank, &setup, &Whole::random(&setup, &mut rank.random()))?;
    let usp = prepare(rank, &setup, &loaded)?;
    let (inputs, rows) = (loaded.inputs(&setup.problem)?, loaded.shard.rows()?);
    let out = ViewMut::new(inputs.q.buffer(), *inputs.q.at())?;
    let outputs = Outputs { out, ..loaded.forward_into()? };
    check_invalid("an out that is q", usp.forward(&rank.member, &rank.stream, &inputs, &outputs, None))?;
    let into = || loaded.backward_into(&setup.problem);
    for (what, gradients) in [
        ("a dv that is dk", Gradients { dv: into()?.dk, ..into()? }),
        ("a dq that is dout", Gradients { dq: ViewMut::new(rows.dout.buffer(), *rows.dout.at())?, ..into()? }),
    ] {
        check_invalid(what, usp.backward(&rank.member, &rank.stream, &inputs, &rows, None, &gradients, None))?;
    }
    for tensor in loaded.outputs() {
        rank.check_untouched("a refused call", tensor)?;
    }
    Ok(())
}
