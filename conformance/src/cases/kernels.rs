//! Attention on one rank: what is not an error against the oracle (bits, order, plans, refusals).

use longspan_hal::{
    Accumulate, Attention, Backend, DType, Device, Error, Extras, Forward, Seed, Slice, Spec, Stage, Strided, ViewMut,
};
use ndarray::Array4;

use super::problem::{self, Config, Gradients, Grid, Loaded, Outputs, Values, plan};
use super::{Case, slices};
use crate::host::{self, random_strided};
use crate::oracle::philox;
use crate::rank::{Failure, Rank, Tensor, check};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    let mut cases = vec![
        Case::new("attention/dropout-mask-is-exact", 1, dropout_mask),
        Case::new("attention/empty-shapes", 1, empty_shapes),
        Case::new("attention/non-finite-values", 1, non_finite),
        Case::new("attention/partial-order-does-not-matter-f32", 1, any_order),
        Case::new("attention/plan-is-used-again", 1, plan_again),
        Case::new("attention/seed-in-device-memory", 1, seed_on_device),
        Case::new("attention/supports-and-plan-agree", 1, supports_and_plan_agree),
    ];
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        cases.push(Case::new(format!("attention/accumulate-sums-in-order-{dtype}"), 1, move |r| accumulate(r, dtype)));
        cases.push(Case::new(format!("attention/deterministic-twice-{dtype}"), 1, move |r| deterministic(r, dtype)));
    }
    cases
}

/// `into` is the f32 sum in list order, rounded once: known to the bit.
fn accumulate<B: Backend>(rank: &mut Rank<B>, dtype: DType) -> Result<(), Failure> {
    let mut random = rank.random();
    for count in [1, 2, 3, 7] {
        let extent = [random.between(1, 3), random.between(0, 30), random.between(1, 4), random.between(1, 40)];
        let values: Vec<Array4<f32>> = (0..count).map(|_| random.tensor(DType::F32, extent)).collect();
        let mut terms = Vec::new();
        for value in &values {
            terms.push(rank.put(random_strided(&mut random, DType::F32, 3, extent)?, value)?);
        }
        let into = rank.blank(random_strided(&mut random, dtype, 5, extent)?)?;
        let sum = values.iter().skip(1).fold(values[0].clone(), |sum, term| sum + term);
        let wanted = host::encode(dtype, sum.iter().copied());
        let views = terms.iter().map(Tensor::view).collect::<Result<Vec<_>, _>>()?;
        rank.attention.accumulate(&rank.stream, &Accumulate::new(into.view_mut()?, &views)?)?;
        check(rank.read_bytes(&into)? == wanted, || format!("{count} terms: not the sum in list order, rounded once"))?;
        rank.check_around("sum", &into)?;
        // In place: the sum is one of its terms.
        if dtype == DType::F32 {
            let last = &terms[count - 1];
            rank.attention.accumulate(&rank.stream, &Accumulate::new(last.view_mut()?, &views)?)?;
            check(rank.read_bytes(last)? == wanted, || format!("{count} terms: the sum in place differs"))?;
        }
    }
    Ok(())
}

/// Equal logits and one-hot values make the output the dropout mask itself.
fn dropout_mask<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (rows, keys, p) = (60, 128, 0.4);
    let mut spec = Spec::new(DType::F32, 2, [rows, keys], [1, 1], 8).with_head_cut(3, 2, 8, 2).with_dropout(Some(p));
    (spec.batch_first, spec.head_dim_v) = (5, keys);
    let slice = |b| Slice { q_pos: 1001, k_pos: 77, q_step: 3, k_step: 5, ..Slice::full(b, 0..60, 0..128) };
    let config = Config::new(spec, vec![slice(0), slice(1)]);
    if let Err(error) = rank.attention.supports(&config.spec) {
        return Err(problem::refusal(rank, &config, error)?);
    }
    let spec = &config.spec;
    let mut random = rank.random();
    let (grid, mut values) = (Grid::new(spec, &config.slices), Values::random(&config, &mut random));
    values.qkv[1].fill(0.0);
    values.qkv[2] = Array4::from_shape_fn((2, keys, spec.kv_heads, keys), |(_, j, _, d)| f32::from(j == d));
    let loaded = Loaded::new(rank, &config, &grid, &values, &mut random)?;
    let outputs = Outputs::new(rank, &config, &mut random)?;
    problem::forward(rank, spec, &[plan(rank, spec, &config.slices)?], &loaded, &outputs)?;
    let out = rank.read(&outputs.out)?;
    for ((b, i, h, j), x) in out.indexed_iter() {
        let (q_pos, k_pos) = (1001 + 3 * i as i64, 77 + 5 * j as i64);
        let keep = philox::keeps(p, values.seed, 5 + b, 3 + h, q_pos, k_pos);
        check((*x != 0.0) == keep, || {
            format!("batch {b} row {i} head {h} key {j}: kept {}, wanted {keep}", *x != 0.0)
        })?;
    }
    Ok(())
}

fn seed_on_device<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let spec = Spec::new(DType::F32, 1, [40, 40], [2, 2], 16).with_dropout(Some(0.3));
    let config = Config::new(spec.clone(), slices::causal(&spec));
    if let Err(error) = rank.attention.supports(&config.spec) {
        return Err(problem::refusal(rank, &config, error)?);
    }
    let mut random = rank.random();
    let (grid, values) = (Grid::new(&spec, &config.slices), Values::random(&config, &mut random));
    let loaded = Loaded::new(rank, &config, &grid, &values, &mut random)?;
    let planned = plan(rank, &spec, &config.slices)?;
    let [host, device] = [Outputs::new(rank, &config, &mut random)?, Outputs::new(rank, &config, &mut random)?];
    problem::forward(rank, &spec, std::slice::from_ref(&planned), &loaded, &host)?;
    let seed = rank.device.alloc(8)?;
    let at = ViewMut::new(&seed, Strided::dense(DType::F32, [1, 1, 1, 2]))?;
    rank.device.upload(&rank.stream, &values.seed.to_le_bytes(), at)?;
    let [q, k, v] = [loaded.qkv[0].view()?, loaded.qkv[1].view()?, loaded.qkv[2].view()?];
    let stage = Stage::All { out: device.out.view_mut()?, lse: device.lse.view_mut()? };
    let extras = Extras { seed: Some(Seed::Device(&seed)), ..Extras::default() };
    let args = Forward::new(&spec, [q, k, v], stage, extras, planned.1.as_ref())?;
    rank.attention.forward(&rank.stream, &planned.0, &args)?;
    check(rank.read_bytes(&host.out)? == rank.read_bytes(&device.out)?, || {
        "a seed in device memory drops others".into()
    })
}

/// Forward and backward twice: the same bits.
fn deterministic<B: Backend>(rank: &mut Rank<B>, dtype: DType) -> Result<(), Failure> {
    let spec = Spec::new(dtype, 2, [150, 150], [4, 2], 64).with_deterministic(true).with_sinks(true);
    let config = Config::new(spec.clone(), slices::causal(&spec));
    if let Err(error) = rank.attention.supports(&config.spec) {
        return Err(problem::refusal(rank, &config, error)?);
    }
    let mut bytes = Vec::new();
    for _ in 0..3 {
        let mut random = rank.random();
        let (grid, values) = (Grid::new(&spec, &config.slices), Values::random(&config, &mut random));
        let loaded = Loaded::new(rank, &config, &grid, &values, &mut random)?;
        let outputs = Outputs::new(rank, &config, &mut random)?;
        let plans = [plan(rank, &spec, &config.slices)?];
        problem::forward(rank, &spec, &plans, &loaded, &outputs)?;
        let backed = problem::backward(rank, &config, &plans, &loaded, &outputs, &mut random)?;
        let tensors = [&outputs.out, &outputs.lse, &backed.delta, &backed.dsinks].into_iter().chain(&backed.gradients);
        bytes.push(tensors.map(|t| rank.read_bytes(t)).collect::<Result<Vec<_>, _>>()?);
    }
    check(bytes.windows(2).all(|w| w[0] == w[1]), || "two deterministic runs differ".into())
}

/// One plan, several inputs: nothing of a run stays in the plan.
fn plan_again<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let spec = Spec::new(DType::F32, 1, [90, 90], [2, 1], 32);
    let config = Config::new(spec.clone(), slices::window(&spec, 20, 3));
    let mut random = rank.random();
    let planned = [plan(rank, &spec, &config.slices)?];
    let grid = Grid::new(&spec, &config.slices);
    let mut kept = Vec::new();
    for _ in 0..3 {
        let values = Values::random(&config, &mut random);
        let loaded = Loaded::new(rank, &config, &grid, &values, &mut random)?;
        let (often, once) = (Outputs::new(rank, &config, &mut random)?, Outputs::new(rank, &config, &mut random)?);
        problem::forward(rank, &spec, &planned, &loaded, &often)?;
        problem::forward(rank, &spec, &[plan(rank, &spec, &config.slices)?], &loaded, &once)?;
        kept.push((often, once));
    }
    for (often, once) in &kept {
        let same = rank.read_bytes(&often.out)? == rank.read_bytes(&once.out)?;
        check(same, || "a plan that ran before gives other results".into())?;
    }
    Ok(())
}

/// Pieces in any order agree within 4 ulp of the largest value, also with rows that most pieces know nothing of.
fn any_order<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let spec = Spec::new(DType::F32, 1, [64, 96], [2, 2], 16).with_partial(true).with_sinks(true);
    let slices = vec![Slice { hi: 4, ..Slice::full(0, 0..40, 0..96) }, Slice::full(0, 40..60, 30..31)];
    let mut config = Config { pieces: 4, gradients: Gradients::Narrow, ..Config::new(spec, slices) };
    config.settle();
    let spec = &config.spec;
    if let Err(error) = rank.attention.supports(spec) {
        return Err(problem::refusal(rank, &config, error)?);
    }
    let mut random = rank.random();
    let (grid, mut values) = (Grid::new(spec, &config.slices), Values::random(&config, &mut random));
    // Positive values: sums do not cancel, so that ulps mean something.
    values.qkv[2].mapv_inplace(|x| 0.5 + x.abs());
    let loaded = Loaded::new(rank, &config, &grid, &values, &mut random)?;
    let mut pieces = slices::pieces(&config.slices, 4, &mut random);
    let mut first: Option<[Array4<f32>; 2]> = None;
    for _ in 0..8 {
        random.shuffle(&mut pieces);
        let outputs = Outputs::new(rank, &config, &mut random)?;
        let plans = pieces.iter().map(|p| plan(rank, spec, p)).collect::<Result<Vec<_>, _>>()?;
        problem::forward(rank, spec, &plans, &loaded, &outputs)?;
        let got = [rank.read(&outputs.out)?, rank.read(&outputs.lse)?];
        for (a, b) in got.iter().flatten().zip(first.get_or_insert_with(|| got.clone()).iter().flatten()) {
            check(ulps(*a, *b) <= 4, || format!("{a} and {b} in another order: {} ulp", ulps(*a, *b)))?;
        }
    }
    Ok(())
}

/// Distance in units of the last place; equal values, infinities included, have none. Numbers near 0 count as 1.
fn ulps(a: f32, b: f32) -> u64 {
    if a == b {
        return 0;
    }
    if !a.is_finite() || !b.is_finite() {
        return u64::MAX;
    }
    let unit = f64::from(a.abs().max(b.abs()).max(1.0)) * f64::from(f32::EPSILON);
    ((f64::from(a) - f64::from(b)).abs() / unit).ceil() as u64
}

/// A NaN in a selected value row makes that column NaN for the queries that see it, and for nobody else.
fn non_finite<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let spec = Spec::new(DType::F32, 1, [80, 80], [1, 1], 16);
    let config = Config::new(spec.clone(), slices::causal(&spec));
    let mut random = rank.random();
    let (grid, mut values) = (Grid::new(&spec, &config.slices), Values::random(&config, &mut random));
    let outputs = [Outputs::new(rank, &config, &mut random)?, Outputs::new(rank, &config, &mut random)?];
    let plans = [plan(rank, &spec, &config.slices)?];
    let clean = Loaded::new(rank, &config, &grid, &values, &mut random)?;
    problem::forward(rank, &spec, &plans, &clean, &outputs[0])?;
    values.qkv[2][[0, 50, 0, 3]] = f32::NAN;
    values.qkv[2][[0, 60, 0, 4]] = f32::INFINITY;
    let dirty = Loaded::new(rank, &config, &grid, &values, &mut random)?;
    problem::forward(rank, &spec, &plans, &dirty, &outputs[1])?;
    let (clean, dirty) = (rank.read(&outputs[0].out)?, rank.read(&outputs[1].out)?);
    for ((_, i, _, d), x) in dirty.indexed_iter() {
        let wanted = clean[[0, i, 0, d]];
        let ok = match (i, d) {
            (50.., 3) => x.is_nan(),
            (60.., 4) => *x == f32::INFINITY,
            // Another way through the kernel may round differently.
            _ => (x - wanted).abs() <= 1e-5,
        };
        check(ok, || format!("row {i} column {d} is {x}, without them {wanted}"))?;
    }
    Ok(())
}

/// No rows, no keys, no heads: everything that there is is still written.
fn empty_shapes<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    for dtype in [DType::F32, DType::Bf16] {
        for (rows, heads) in [([0, 5], 2), ([5, 0], 2), ([0, 0], 2), ([5, 5], 0)] {
            let mut spec = Spec::new(dtype, 1, rows, [heads, heads], 8);
            (spec.heads_total, spec.group) = (2, 1);
            super::problem::run(rank, &Config::new(spec, Vec::new()))?;
        }
    }
    Ok(())
}

/// Whatever is asked: `supports` and `plan` give the same answer, and a refusal is `Unsupported` with its texts.
fn supports_and_plan_agree<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let mut specs = Vec::new();
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for d in [1, 7, 128, 256, 257, 512, 100_000] {
            let spec = Spec::new(dtype, 1, [4, 4], [2, 1], d);
            specs.extend([
                spec.clone(),
                spec.clone().with_partial(true),
                spec.clone().with_accumulate(true),
                spec.clone().with_deterministic(true).with_dropout(Some(0.5)),
                spec.with_head_dim_v(d / 2 + 1).with_softcap(Some(1.0)).with_alibi(true).with_sinks(true),
            ]);
        }
    }
    for spec in specs {
        let config = Config::new(spec.clone(), slices::full(&spec));
        match rank.attention.supports(&spec) {
            Ok(()) => drop(plan(rank, &spec, &config.slices)?),
            Err(error) => drop(problem::refusal(rank, &config, error)?),
        }
    }
    let bad = Spec::new(DType::F32, 1, [4, 4], [2, 1], 8).with_softcap(Some(-1.0));
    match rank.attention.supports(&bad) {
        Err(Error::Invalid { .. }) => Ok(()),
        other => Err(Failure::wrong(format!("a softcap of -1 must be Invalid, it is {other:?}"))),
    }
}
