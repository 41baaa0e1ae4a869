//! The kernels on plain memory, against the oracle.

mod backward;
mod device;
mod exact;
mod forward;
mod memory;
mod oracle;

use std::sync::Arc;

use longspan_hal::{DType, Slice, Slices, Spec, Store, Strided};
use proptest::prelude::*;

use self::memory::{Memory, strided};
use self::oracle::{Arithmetic, Inputs, Results};
use super::backward::Backward;
use super::forward::{Forward, Options};
use super::philox::Dropout;
use super::plan::Plan;
use super::prepare::Prepare;
use super::simd::Kernels;

fn noise(seed: u64, n: usize, dtype: DType) -> Vec<f64> {
    let normal = |i: u64| {
        let w = oracle::philox([i as u32, (i >> 32) as u32, 7, 9], [seed as u32, (seed >> 32) as u32]);
        let u = |w: u32| (f64::from(w) + 0.5) / 4_294_967_296.0;
        (-2.0 * u(w[0]).ln()).sqrt() * (std::f64::consts::TAU * u(w[1])).cos()
    };
    (0..n as u64).map(|i| oracle::round(dtype, normal(i))).collect()
}

/// Inputs of seeded noise.
fn inputs(spec: &Spec, slices: Vec<Slice>, seed: u64) -> Inputs {
    let rows = spec.batch * spec.q_rows * spec.heads;
    let keys = spec.batch * spec.k_rows * spec.kv_heads;
    let make = |what: u64, n: usize| noise(seed.wrapping_mul(31).wrapping_add(what), n, spec.dtype);
    let f32s = |what: u64| -> Vec<f32> {
        noise(seed ^ what, spec.heads_total, DType::F32).iter().map(|x| *x as f32).collect()
    };
    Inputs {
        spec: spec.clone(),
        slices,
        q: make(1, rows * spec.head_dim),
        k: make(2, keys * spec.head_dim),
        v: make(3, keys * spec.head_dim_v),
        dout: make(4, rows * spec.head_dim_v),
        dlse: noise(seed ^ 5, rows, DType::F32),
        slopes: f32s(6).iter().map(|x| x.abs() * 0.1).collect(),
        sinks: f32s(7),
        seed,
    }
}

/// Band lists: a few query stretches, each with a few key ranges, with positions near those of the queries.
fn slices(batch: usize, q_rows: usize, k_rows: usize) -> impl Strategy<Value = Vec<Slice>> {
    // Long ones have several tiles of keys.
    let length = prop_oneof![3 => 0u32..150, 1 => 350u32..800];
    let keys = prop::collection::vec((0u32..40, length, band(), 0i64..100, 1i64..6), 1..4);
    let stretch = (0..batch as u32, 0i64..5000, keys);
    let q_cuts = prop::collection::vec(0..=q_rows as u32, 2..5);
    (prop::collection::vec(stretch, 5), q_cuts).prop_map(move |(stretches, mut cuts)| {
        cuts.sort_unstable();
        let mut list = Vec::new();
        for (q, (b, q_pos, keys)) in cuts.windows(2).zip(stretches) {
            let mut from = 0u32;
            for (skip, len, (lo, hi), back, step) in keys {
                let start = (from + skip).min(k_rows as u32);
                let end = (start + len).min(k_rows as u32);
                from = end;
                let k_pos = (q_pos - back).max(0);
                let full = Slice::full(b, q[0]..q[1], start..end);
                list.push(Slice { lo, hi, q_pos, k_pos, q_step: step, k_step: step, ..full });
            }
        }
        list
    })
}

fn band() -> impl Strategy<Value = (i64, i64)> {
    prop_oneof![
        Just((Slice::LO_NONE, Slice::HI_NONE)),
        (-60i64..60).prop_map(|hi| (Slice::LO_NONE, hi)),
        (-60i64..60, 0i64..50).prop_map(|(lo, n)| (lo, lo + n)),
    ]
}

/// Random specs: every dtype, option, cut and size.
fn spec() -> impl Strategy<Value = Spec> {
    let dims =
        prop_oneof![Just((64, 64)), (1usize..80, 1usize..80), Just((192, 128)), (1usize..=256).prop_map(|d| (d, d))];
    let keys = prop_oneof![3 => 1usize..300, 1 => 400usize..900];
    let shape = (1usize..3, 1usize..150, keys, dims, 0usize..3);
    let heads = (0usize..5, 1usize..6, 1usize..5, 0usize..3);
    let options = (
        prop::option::of(2.0f32..30.0),
        any::<bool>(),
        any::<bool>(),
        prop::option::of(0.0f32..0.8),
        prop::option::of(-0.5f32..0.5),
    );
    (shape, heads, options).prop_map(
        |((b, q, k, (d, dv), dtype), (first, heads, group, batch_first), (cap, alibi, sinks, drop, scale))| {
            let dtype = [DType::Bf16, DType::F16, DType::F32][dtype];
            let total = (first + heads).next_multiple_of(group);
            let mut spec = Spec::new(dtype, b, [q, k], [heads, 1], d)
                .with_head_dim_v(dv)
                .with_head_cut(first, heads, total, group)
                .with_softcap(cap)
                .with_alibi(alibi)
                .with_sinks(sinks)
                .with_dropout(drop);
            spec.batch_first = batch_first;
            if let Some(scale) = scale {
                spec.scale = scale;
            }
            spec
        },
    )
}

/// A problem: spec, slices and a seed.
fn problem() -> impl Strategy<Value = (Inputs, usize)> {
    (spec(), any::<u32>(), 0usize..3)
        .prop_flat_map(|(spec, seed, layout)| {
            (slices(spec.batch, spec.q_rows, spec.k_rows), Just(spec), Just(seed), Just(layout))
        })
        .prop_map(|(slices, spec, seed, layout)| {
            let checked = Slices::new(&spec, slices).expect("disjoint by construction");
            (inputs(&spec, checked.as_slice().to_vec(), u64::from(seed)), layout)
        })
}

fn plan(x: &Inputs) -> Arc<Plan> {
    plan_for(x, rayon::current_num_threads())
}

fn plan_for(x: &Inputs, threads: usize) -> Arc<Plan> {
    Arc::new(Plan::new(&x.spec, &Slices::new(&x.spec, x.slices.clone()).expect("valid"), threads))
}

/// Tensors of a problem in memory.
struct Loaded {
    q: Memory,
    k: Memory,
    v: Memory,
    dout: Memory,
    dlse: Memory,
    slopes: Memory,
    sinks: Memory,
    dropout: Option<Dropout>,
    spec: Spec,
    layout: usize,
}

fn load(x: &Inputs, layout: usize) -> Loaded {
    let s = &x.spec;
    let wide = |rows, heads, dim| [s.batch, rows, heads, dim];
    let f64s = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    Loaded {
        q: Memory::with(s.dtype, wide(s.q_rows, s.heads, s.head_dim), layout, &x.q),
        k: Memory::with(s.dtype, wide(s.k_rows, s.kv_heads, s.head_dim), layout + 1, &x.k),
        v: Memory::with(s.dtype, wide(s.k_rows, s.kv_heads, s.head_dim_v), layout + 2, &x.v),
        dout: Memory::with(s.dtype, wide(s.q_rows, s.heads, s.head_dim_v), layout + 1, &x.dout),
        dlse: Memory::with(DType::F32, wide(s.q_rows, s.heads, 1), layout, &x.dlse),
        slopes: Memory::with(DType::F32, [1, 1, s.heads_total, 1], 0, &f64s(&x.slopes)),
        sinks: Memory::with(DType::F32, [1, 1, s.heads_total, 1], 0, &f64s(&x.sinks)),
        dropout: s.dropout.map(|p| Dropout::new(x.seed, s.dropout_threshold(), p)),
        spec: s.clone(),
        layout,
    }
}

impl Loaded {
    fn options(&mut self) -> Options {
        Options {
            alibi_slopes: self.spec.alibi.then(|| self.slopes.tensor()),
            sinks: self.spec.sinks.then(|| self.sinks.tensor()),
            dropout: self.dropout,
        }
    }

    fn thin(&self) -> Memory {
        Memory::new(strided(DType::F32, [self.spec.batch, self.spec.q_rows, self.spec.heads, 1], self.layout + 1))
    }

    fn wide(&self, dtype: DType) -> Memory {
        let s = &self.spec;
        Memory::new(strided(dtype, [s.batch, s.q_rows, s.heads, s.head_dim_v], self.layout + 2))
    }

    /// One forward call per entry of `steps`; out and lse.
    fn forward(&mut self, kernels: &'static Kernels, steps: &[Arc<Plan>]) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut lse) = (self.wide(self.spec.dtype), self.thin());
        let mut partial = [self.wide(DType::F32), self.thin(), self.thin()];
        for (i, plan) in steps.iter().enumerate() {
            let last = i + 1 == steps.len();
            let call = Forward {
                plan: plan.clone(),
                kernels,
                q: self.q.tensor(),
                k: self.k.tensor(),
                v: self.v.tensor(),
                options: self.options(),
                partial: (steps.len() > 1).then(|| partial.each_mut().map(Memory::tensor)),
                start: i == 0,
                results: last.then(|| [out.tensor(), lse.tensor()]),
            };
            call.run();
        }
        (out.values(), lse.values())
    }

    /// delta and dsinks.
    fn prepare(&mut self, kernels: &'static Kernels, out: &[f64], lse: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let s = self.spec.clone();
        let mut out = Memory::with(s.dtype, self.wide(s.dtype).at.extent(), 0, out);
        let mut lse = Memory::with(DType::F32, self.thin().at.extent(), 1, lse);
        let mut delta = self.thin();
        let mut dsinks = Memory::new(Strided::dense(DType::F32, [1, 1, s.heads, 1]));
        let call = Prepare {
            kernels,
            head_first: s.head_first,
            out: out.tensor(),
            dout: self.dout.tensor(),
            lse: lse.tensor(),
            dlse: Some(self.dlse.tensor()),
            delta: delta.tensor(),
            sinks: s.sinks.then(|| [self.sinks.tensor(), dsinks.tensor()]),
        };
        call.run();
        (delta.values(), if s.sinks { dsinks.values() } else { vec![0.0; s.heads] })
    }

    /// dq, dk, dv, stored in `dtype`, added to `before` if given.
    fn backward(
        &mut self,
        kernels: &'static Kernels,
        plan: &Arc<Plan>,
        [lse, delta]: [&[f64]; 2],
        dtype: DType,
        before: Option<f64>,
    ) -> [Vec<f64>; 3] {
        let mut rows = [lse, delta].map(|x| Memory::with(DType::F32, self.thin().at.extent(), self.layout, x));
        let extents = [self.q.at.extent(), self.k.at.extent(), self.v.at.extent()];
        let mut gradients = extents.map(|e| match before {
            Some(x) => Memory::with(dtype, e, self.layout + 1, &vec![x; e.iter().product()]),
            None => Memory::new(strided(dtype, e, self.layout + 1)),
        });
        let mut sum = Memory::new(Strided::dense(DType::F32, extents[0]));
        let store = if before.is_some() { Store::Add } else { Store::Write };
        let [lse, delta] = rows.each_mut().map(Memory::tensor);
        let [dq, dk, dv] = gradients.each_mut().map(|g| (g.tensor(), store));
        let call = Backward {
            plan: plan.clone(),
            kernels,
            q: self.q.tensor(),
            k: self.k.tensor(),
            v: self.v.tensor(),
            dout: self.dout.tensor(),
            lse,
            delta,
            options: self.options(),
            dq,
            dk,
            dv,
            dq_sum: (dtype != DType::F32).then(|| sum.tensor()),
        };
        call.run();
        gradients.map(|mut g| g.values())
    }
}

/// The error rule: at most twice (softcap: three times) the plain computation's largest error, plus 1e-5.
fn meets_the_rule(what: &str, x: &Inputs, got: &[f64], want: &[f64], plain: &[f64]) -> Result<(), TestCaseError> {
    let worst = |a: &[f64]| a.iter().zip(want).fold(0.0f64, |m, (a, b)| if a == b { m } else { m.max((a - b).abs()) });
    let size = want.iter().filter(|w| w.is_finite()).fold(0.0f64, |m, w| m.max(w.abs()));
    let factor = if x.spec.softcap.is_some() { 3.0 } else { 2.0 };
    let (error, bound) = (worst(got), factor * worst(plain) + 1e-5);
    prop_assert!(!got.iter().any(|g| g.is_nan()), "{what} has NaN");
    prop_assert!(error <= bound, "{what}: error {error:.3e}, bound {bound:.3e}, largest value {size:.3e}");
    Ok(())
}

fn exact(x: &Inputs) -> (Results, Results) {
    (oracle::attention(x, Arithmetic(None)), oracle::attention(x, Arithmetic(Some(x.spec.dtype))))
}
