//! Attention on one rank: every option, dtype, head size, memory layout and stage against the oracle.

use longspan_hal::{Backend, DType, Slice, Spec};

use super::problem::{Config, Gradients, Memory, run};
use super::{Case, kernels, slices};
use crate::host::Random;

const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// The cases of this file. `seed` chooses the configurations of the sweep.
pub fn cases<B: Backend>(seed: u64) -> Vec<Case<B>> {
    let mut cases = kernels::cases();
    for dtype in DTYPES {
        cases.extend(masks(dtype).into_iter().map(|(name, c)| case(&name, c)));
        cases.extend(options(dtype).into_iter().map(|(name, c)| case(&name, c)));
        cases.extend(stages(dtype).into_iter().map(|(name, c)| case(&name, c)));
        cases.extend(head_dims(dtype).into_iter().map(|(name, c)| case(&name, c)));
        cases.extend(heads(dtype).into_iter().map(|(name, c)| case(&name, c)));
        cases.extend(outliers(dtype).into_iter().map(|(name, c)| case(&name, c)));
    }
    let mut random = Random::new(seed);
    for i in 0..400 {
        let config = any(&mut random);
        let case = case(&format!("sweep-{i:03}"), config);
        cases.push(if i < 60 { case } else { case.full() });
    }
    cases
}

/// `attention/NAME-WORDS`.
fn case<B: Backend>(name: &str, mut config: Config) -> Case<B> {
    config.settle();
    let (full, describe) = (format!("attention/{name}-{}", config.words()), config.describe());
    Case::new(full, 1, move |rank| run(rank, &config)).with_config(describe)
}

/// Batch 2, 70 rows, 4:2 heads of 32.
fn base(dtype: DType) -> Spec {
    Spec::new(dtype, 2, [70, 70], [4, 2], 32)
}

type Named = (String, Config);

fn masks(dtype: DType) -> Vec<Named> {
    let spec = base(dtype);
    let long = Spec::new(dtype, 1, [300, 300], [2, 1], 64);
    let cross = Spec::new(dtype, 2, [33, 90], [2, 2], 16);
    let none = Vec::new();
    let documents = |borders: [u32; 5]| {
        let pairs = borders.windows(2).map(|w| Slice { hi: 0, ..Slice::full(0, w[0]..w[1], w[0]..w[1]) });
        pairs.collect::<Vec<_>>()
    };
    // The last rows see nothing; so does the whole second batch row.
    let holes = vec![Slice::full(0, 3..40, 5..9), Slice::full(0, 3..40, 20..33), Slice::full(0, 40..50, 0..1)];
    [
        ("causal", spec.clone(), slices::causal(&spec)),
        ("causal-long", long.clone(), slices::causal(&long)),
        ("cross", cross.clone(), slices::full(&cross)),
        ("documents", long.clone(), documents([0, 1, 64, 200, 300])),
        ("full", spec.clone(), slices::full(&spec)),
        ("holes", spec.clone(), holes),
        ("nothing", spec.clone(), none),
        ("window", spec.clone(), slices::window(&spec, 9, 0)),
        ("window-both", spec.clone(), slices::window(&spec, 5, 7)),
        ("window-long", long.clone(), slices::window(&long, 40, 0)),
    ]
    .map(|(name, spec, slices)| (name.to_owned(), Config::new(spec, slices)))
    .into()
}

fn options(dtype: DType) -> Vec<Named> {
    let causal = |spec: Spec| {
        let slices = slices::causal(&spec);
        Config::new(spec, slices)
    };
    let all = base(dtype).with_softcap(Some(8.0)).with_alibi(true).with_sinks(true).with_dropout(Some(0.2));
    let mut list = vec![
        ("option", causal(base(dtype).with_alibi(true))),
        ("option", causal(base(dtype).with_deterministic(true))),
        ("option", causal(base(dtype).with_dropout(Some(0.35)))),
        ("option", causal(base(dtype).with_sinks(true))),
        ("option", causal(base(dtype).with_softcap(Some(2.0)))),
        ("option", Config { dlse: true, ..causal(base(dtype)) }),
        ("option-big-logits", causal(base(dtype).with_scale(3.0))),
        ("option-high-dropout", causal(base(dtype).with_dropout(Some(0.9)))),
        ("option-no-dropout", causal(base(dtype).with_dropout(Some(0.0)))),
        ("option-scale-0", causal(base(dtype).with_scale(0.0))),
        ("option-scale-negative", causal(base(dtype).with_scale(-0.3))),
        ("options", Config { dlse: true, ..causal(all) }),
    ];
    let holes = vec![Slice::full(1, 30..70, 5..9)];
    list.push(("option-holes", Config { dlse: true, ..Config::new(base(dtype).with_sinks(true), holes) }));
    list.into_iter().map(|(name, config)| (name.to_owned(), config)).collect()
}

fn stages(dtype: DType) -> Vec<Named> {
    let mut list = Vec::new();
    for (gradients, pieces) in [(Gradients::Narrow, 2), (Gradients::Wide, 1), (Gradients::Wide, 4), (Gradients::Add, 3)]
    {
        let spec = base(dtype).with_sinks(true).with_dropout(Some(0.1)).with_alibi(true);
        let slices = slices::causal(&spec);
        let config = Config { pieces, gradients, dlse: true, ..Config::new(spec, slices) };
        list.push((format!("stages-{pieces}"), config));
        // Most pieces see only some rows; some rows see nothing at all.
        let spec = base(dtype);
        let slices = vec![Slice { hi: 0, ..Slice::full(0, 10..60, 12..70) }, Slice::full(1, 0..1, 69..70)];
        list.push((format!("stages-holes-{pieces}"), Config { pieces, gradients, ..Config::new(spec, slices) }));
    }
    list
}

fn head_dims(dtype: DType) -> Vec<Named> {
    let sizes = [(1, 1), (3, 3), (8, 8), (33, 33), (64, 64), (80, 80), (96, 96), (127, 127), (128, 128), (256, 256)];
    let unequal = [(192, 128), (64, 128), (5, 2), (128, 256)];
    sizes
        .into_iter()
        .chain(unequal)
        .map(|(d, v)| {
            let spec = Spec::new(dtype, 1, [50, 50], [2, 1], d).with_head_dim_v(v);
            let slices = slices::causal(&spec);
            (format!("head-dim-{d}-{v}"), Config::new(spec, slices))
        })
        .collect()
}

/// Groups, and cuts of a whole problem's heads; 32:8 heads over 3 ranks gives rank 1 groups of 1, 4, 4 and 2.
fn heads(dtype: DType) -> Vec<Named> {
    let cut = |first, count, total, group| {
        let spec = Spec::new(dtype, 2, [40, 40], [1, 1], 16).with_head_cut(first, count, total, group);
        spec.with_alibi(true).with_sinks(true).with_dropout(Some(0.25))
    };
    let mut list: Vec<Named> = [
        ("heads-cut-irregular", cut(11, 11, 32, 4)),
        ("heads-cut-of-one", cut(5, 1, 8, 8)),
        ("heads-gqa", cut(0, 8, 8, 4)),
        ("heads-mha", cut(0, 3, 3, 1)),
        ("heads-mqa", cut(0, 6, 6, 6)),
    ]
    .map(|(name, mut spec)| {
        spec.batch_first = 7;
        let slices = slices::causal(&spec);
        (name.to_owned(), Config::new(spec, slices))
    })
    .into();
    // More local KV heads than the local query heads use.
    let mut spec = Spec::new(dtype, 1, [20, 20], [2, 3], 16);
    (spec.heads_total, spec.group, spec.head_first, spec.kv_first) = (12, 2, 4, 1);
    let slices = slices::full(&spec);
    list.push(("heads-spare-kv".into(), Config::new(spec, slices)));
    list
}

/// A few numbers far from the others, as in trained models.
fn outliers(dtype: DType) -> Vec<Named> {
    let of = |d: usize| {
        let spec = Spec::new(dtype, 1, [300, 300], [4, 2], d);
        let slices = slices::causal(&spec);
        (format!("outliers-{d}"), Config { outliers: true, ..Config::new(spec, slices) })
    };
    vec![of(64), of(128)]
}

/// Any configuration.
fn any(random: &mut Random) -> Config {
    let dtype = *random.pick(&DTYPES);
    let d = *random.pick(&[4, 16, 17, 32, 48, 64, 72, 128]);
    let rows = [random.between(1, 150), random.between(1, 150)];
    let rows = if random.one_in(3) { [rows[0]; 2] } else { rows };
    let mut spec = Spec::new(dtype, random.between(1, 3), rows, [1, 1], d);
    if random.one_in(4) {
        spec.head_dim_v = *random.pick(&[1, 8, 40, 64]);
    }
    let group = random.between(1, 4);
    let total = group * random.between(1, 3);
    let first = random.below(total);
    spec = spec.with_head_cut(first, random.between(1, total - first), total, group);
    spec.batch_first = random.below(5);
    spec = spec
        .with_softcap(random.one_in(3).then_some(4.0))
        .with_alibi(random.one_in(3))
        .with_sinks(random.one_in(3))
        .with_dropout(random.one_in(3).then_some(0.15))
        .with_deterministic(random.one_in(3));
    let slices = slices::any(&spec, random);
    Config {
        memory: *random.pick(&[Memory::Bhsd, Memory::Bshd, Memory::Packed, Memory::Random]),
        pieces: if random.one_in(2) { 1 } else { random.between(2, 5) },
        gradients: *random.pick(&[Gradients::Add, Gradients::Narrow, Gradients::Wide]),
        dlse: random.one_in(3),
        ..Config::new(spec, slices)
    }
}
