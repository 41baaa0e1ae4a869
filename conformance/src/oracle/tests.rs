//! The oracle against finite differences of itself, and against things that can be said without it.

use super::*;
use crate::host::Random;

fn causal(_: usize, i: usize, j: usize) -> Option<(i64, i64)> {
    (j <= i).then_some((i as i64, j as i64))
}

fn problem(random: &mut Random, pair: Pair<'static>) -> Problem<'static> {
    let (heads, kv_heads) = (4, 2);
    let spec = Spec::new(DType::F32, 2, [5, 5], [heads, kv_heads], 3).with_head_dim_v(2);
    let q = random.tensor(DType::F32, [2, 5, heads, 3]);
    let k = random.tensor(DType::F32, [2, 5, kv_heads, 3]);
    let v = random.tensor(DType::F32, [2, 5, kv_heads, 2]);
    let mut p = Problem::new(&spec, [q, k, v], pair);
    p.softcap = Some(1.5);
    p.slopes = Some(vec![0.3, 0.2, 0.1, 0.05]);
    p.sinks = Some(vec![0.5, -0.5, 0.1, 1.0]);
    p.dropout = Some((0.3, 99));
    p
}

/// `sum(dout * out) + sum(dlse * lse)`, whose gradients the backward gives.
fn loss(p: &Problem, incoming: &Incoming) -> f64 {
    let a = exact(p, None);
    let out: f64 = a.out.iter().zip(&incoming.dout).map(|(x, d)| x * f64::from(*d)).sum();
    let dlse = incoming.dlse.iter().flatten();
    out + a.lse.iter().zip(dlse).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
}

fn slope(
    p: &Problem<'static>,
    incoming: &Incoming,
    at: impl for<'a> Fn(&'a mut Problem<'static>) -> &'a mut f32,
) -> f64 {
    let h = 1.0 / 1024.0;
    let (mut up, mut down) = (p.clone(), p.clone());
    let x = *at(&mut up);
    *at(&mut up) = x + h;
    *at(&mut down) = x - h;
    // The step that f32 really took.
    let step = f64::from(x + h) - f64::from(x - h);
    (loss(&up, incoming) - loss(&down, incoming)) / step
}

#[test]
fn gradients_agree_with_finite_differences() {
    let mut random = Random::new(3);
    let p = problem(&mut random, &causal);
    let dout = random.tensor(DType::F32, [2, 5, 4, 2]);
    let dlse = random.tensor(DType::F32, [2, 5, 4, 1]).remove_axis(ndarray::Axis(3));
    let incoming = Incoming { dout, dlse: Some(dlse) };
    let g = exact(&p, Some(&incoming)).gradients.expect("asked for");
    let close = |a: f64, b: f64| assert!((a - b).abs() < 3e-5 * (1.0 + b.abs()), "{a} is not {b}");
    for (i, d) in g.dq.indexed_iter() {
        close(*d, slope(&p, &incoming, |p| &mut p.q[i]));
    }
    for (i, d) in g.dk.indexed_iter() {
        close(*d, slope(&p, &incoming, |p| &mut p.k[i]));
    }
    for (i, d) in g.dv.indexed_iter() {
        close(*d, slope(&p, &incoming, |p| &mut p.v[i]));
    }
    for (i, d) in g.dsinks.expect("has sinks").indexed_iter() {
        close(*d, slope(&p, &incoming, |p| &mut p.sinks.as_mut().expect("has sinks")[i]));
    }
}

#[test]
fn one_key_gives_its_value_and_its_logit() {
    let mut random = Random::new(4);
    let mut p = problem(&mut random, &|_, i, j| (i == j).then_some((0, 0)));
    (p.softcap, p.slopes, p.sinks, p.dropout) = (None, None, None, None);
    let a = exact(&p, None);
    for ((b, i, h, d), x) in a.out.indexed_iter() {
        assert!((x - f64::from(p.v[[b, i, h / 2, d]])).abs() < 1e-12);
        let dot: f64 = (0..3).map(|d| f64::from(p.q[[b, i, h, d]]) * f64::from(p.k[[b, i, h / 2, d]])).sum();
        assert!((a.lse[[b, i, h]] - dot * f64::from(p.scale)).abs() < 1e-12);
    }
}

#[test]
fn a_row_without_keys_is_zero_and_never_nan() {
    let mut random = Random::new(5);
    let mut p = problem(&mut random, &|_, i, j| (i > 0).then_some((i as i64, j as i64)));
    let sinks = p.sinks.take();
    let incoming = Incoming { dout: random.tensor(DType::F32, [2, 5, 4, 2]), dlse: None };
    let a = exact(&p, Some(&incoming));
    assert_eq!(a.lse[[0, 0, 0]], f64::NEG_INFINITY);
    assert!(a.out.slice(s![.., 0, .., ..]).iter().all(|x| *x == 0.0));
    let g = a.gradients.expect("asked for");
    assert!(g.dq.iter().chain(&g.dk).chain(&g.dv).all(|x| x.is_finite()));
    assert!(g.dq.slice(s![.., 0, .., ..]).iter().all(|x| *x == 0.0));
    p.sinks = sinks;
    assert_eq!(exact(&p, None).lse[[1, 0, 1]], -0.5);
}

#[test]
fn stretches_do_not_show() {
    let mut random = Random::new(6);
    let rows = STRETCH + 37;
    let spec = Spec::new(DType::F32, 1, [rows, 40], [1, 1], 8);
    let tensors = [rows, 40, 40].map(|n| random.tensor(DType::F32, [1, n, 1, 8]));
    let whole = Problem::new(&spec, tensors.clone(), &|_, i, j| (i % 7 != j % 7).then_some((0, 0)));
    let incoming = Incoming { dout: random.tensor(DType::F32, [1, rows, 1, 8]), dlse: None };
    let a = exact(&whole, Some(&incoming));
    // The last rows alone.
    let mut tail = whole.clone();
    tail.q = whole.q.slice(s![.., STRETCH.., .., ..]).to_owned();
    tail.pair = &|_, i, j| ((i + STRETCH) % 7 != j % 7).then_some((0, 0));
    let part = Incoming { dout: incoming.dout.slice(s![.., STRETCH.., .., ..]).to_owned(), dlse: None };
    let t = exact(&tail, Some(&part));
    assert_eq!(a.out.slice(s![.., STRETCH.., .., ..]), t.out);
    let mut head = whole.clone();
    head.q = whole.q.slice(s![.., ..STRETCH, .., ..]).to_owned();
    let part = Incoming { dout: incoming.dout.slice(s![.., ..STRETCH, .., ..]).to_owned(), dlse: None };
    let h = exact(&head, Some(&part));
    let (a, h, t) = (a.gradients.expect("a"), h.gradients.expect("h"), t.gradients.expect("t"));
    assert!((&a.dk - &(h.dk + t.dk)).iter().all(|x| x.abs() < 1e-12));
}

#[test]
fn plain_is_near_and_less_precise_with_fewer_bits() {
    let mut random = Random::new(7);
    let p = problem(&mut random, &causal);
    let error = |dtype| {
        let (e, x) = (exact(&p, None), plain(&p, None, dtype));
        (&e.out - &x.out).iter().fold(0.0f64, |m, x| m.max(x.abs()))
    };
    let (f32, f16, bf16) = (error(DType::F32), error(DType::F16), error(DType::Bf16));
    assert!(f32 < 1e-6 && f32 < f16 && f16 < bf16 && bf16 < 0.05, "{f32} {f16} {bf16}");
}
