//! Attention pair by pair, as the formulas of the spec say: in f64 (the oracle), or with every intermediate rounded (the plain
//! computation that the error rule compares with).

use longspan_hal::{DType, Slice, Spec};

/// Rounds to a dtype, as kernels do: from f32.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::F16 => half::f16::from_f32(x as f32).to_f64(),
        _ => half::bf16::from_f32(x as f32).to_f64(),
    }
}

/// Arithmetic: f64, or accumulation in f32 with intermediates in a dtype.
#[derive(Clone, Copy)]
pub struct Arithmetic(pub Option<DType>);

impl Arithmetic {
    fn store(self, x: f64) -> f64 {
        self.0.map_or(x, |d| round(d, x))
    }
    fn sum(self, terms: impl Iterator<Item = f64>) -> f64 {
        terms.fold(0.0, |a, t| if self.0.is_some() { f64::from((a + t) as f32) } else { a + t })
    }
}

/// Dense inputs, `[batch, rows, heads, dim]`, already rounded to the dtype.
#[derive(Clone)]
pub struct Inputs {
    pub spec: Spec,
    pub slices: Vec<Slice>,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub dout: Vec<f64>,
    pub dlse: Vec<f64>,
    pub slopes: Vec<f32>,
    pub sinks: Vec<f32>,
    pub seed: u64,
}

/// Only what tells cases apart: the numbers follow from the seed.
impl std::fmt::Debug for Inputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, seed {}, slices {:#?}", self.spec, self.seed, self.slices)
    }
}

#[derive(Clone, Debug, Default)]
pub struct Results {
    pub out: Vec<f64>,
    /// `[batch, rows, heads]`, as `delta`.
    pub lse: Vec<f64>,
    pub delta: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    /// Local heads.
    pub dsinks: Vec<f64>,
}

/// Philox4x32-10, one counter, as plainly as can be.
pub fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xd251_1f53_u64 * u64::from(c[0]);
        let b = 0xcd9e_8d57_u64 * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    c
}

/// A selected pair: key row, distance of positions, dropout factor.
struct Pair {
    key: usize,
    apart: f64,
    keep: f64,
}

fn pairs(x: &Inputs, b: usize, row: usize, head: usize) -> Vec<Pair> {
    let spec = &x.spec;
    let mine = x.slices.iter().filter(|s| s.batch as usize == b && s.q.contains(&(row as u32)));
    mine.flat_map(|s| s.keys_of(row as u32).map(move |key| (s, key as usize)))
        .map(|(s, key)| {
            let qpos = s.q_pos + s.q_step * (row as i64 - i64::from(s.q.start));
            let kpos = s.k_pos + s.k_step * (key as i64 - i64::from(s.k.start));
            let keep = spec.dropout.map_or(1.0, |p| {
                let c =
                    [(spec.batch_first + b) as u32, (spec.head_first + head) as u32, qpos as u32, (kpos / 4) as u32];
                let word = philox(c, [x.seed as u32, (x.seed >> 32) as u32])[(kpos % 4) as usize];
                if word < spec.dropout_threshold() { 0.0 } else { 1.0 / (1.0 - f64::from(p)) }
            });
            Pair { key, apart: (qpos - kpos).abs() as f64, keep }
        })
        .collect()
}

/// Forward and backward.
pub fn attention(x: &Inputs, a: Arithmetic) -> Results {
    let s = &x.spec;
    let (rows, wide) = (s.batch * s.q_rows * s.heads, s.batch * s.k_rows * s.kv_heads);
    let mut r = Results {
        out: vec![0.0; rows * s.head_dim_v],
        lse: vec![0.0; rows],
        delta: vec![0.0; rows],
        dq: vec![0.0; rows * s.head_dim],
        dk: vec![0.0; wide * s.head_dim],
        dv: vec![0.0; wide * s.head_dim_v],
        dsinks: vec![0.0; s.heads],
    };
    for b in 0..s.batch {
        for h in 0..s.heads {
            for i in 0..s.q_rows {
                one_row(x, a, [b, i, h], &mut r);
            }
        }
    }
    for g in [&mut r.out, &mut r.dq, &mut r.dk, &mut r.dv] {
        g.iter_mut().for_each(|y| *y = a.store(*y));
    }
    r
}

fn one_row(x: &Inputs, a: Arithmetic, [b, i, h]: [usize; 3], r: &mut Results) {
    let s = &x.spec;
    let (d, dv) = (s.head_dim, s.head_dim_v);
    let at = (b * s.q_rows + i) * s.heads + h;
    let key_at = |key: usize| (b * s.k_rows + key) * s.kv_heads + s.kv_head(h);
    let row = |m: &[f64], at: usize, n: usize| m[at * n..][..n].to_vec();
    let pairs = pairs(x, b, i, h);
    let (q, dout) = (row(&x.q, at, d), row(&x.dout, at, dv));
    // Logits: capped, and with ALiBi.
    let capped: Vec<f64> = pairs
        .iter()
        .map(|p| {
            let k = row(&x.k, key_at(p.key), d);
            let y = a.store(f64::from(s.scale) * a.sum(q.iter().zip(&k).map(|(q, k)| q * k)));
            s.softcap.map_or(y, |c| a.store(f64::from(c) * (y / f64::from(c)).tanh()))
        })
        .collect();
    let slope = if s.alibi { f64::from(x.slopes[s.head_first + h]) } else { 0.0 };
    let logits: Vec<f64> = capped.iter().zip(&pairs).map(|(y, p)| a.store(y - slope * p.apart)).collect();
    let sink = s.sinks.then(|| f64::from(x.sinks[s.head_first + h]));
    let top = logits.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        r.lse[at] = f64::NEG_INFINITY;
        r.delta[at] = -x.dlse[at];
        return;
    }
    let sum = a.sum(logits.iter().copied().chain(sink).map(|y| (y - top).exp()));
    let lse = top + sum.ln();
    let p: Vec<f64> = logits.iter().map(|y| a.store((y - lse).exp())).collect();
    for e in 0..dv {
        r.out[at * dv + e] =
            a.sum(pairs.iter().zip(&p).map(|(pair, p)| pair.keep * p * x.v[key_at(pair.key) * dv + e]));
    }
    let out = row(&r.out, at, dv);
    let delta = a.sum(out.iter().zip(&dout).map(|(o, g)| a.store(*o) * g)) - x.dlse[at];
    (r.lse[at], r.delta[at]) = (lse, delta);
    r.dsinks[h] -= sink.map_or(0.0, |y| (y - lse).exp() * delta);
    for (j, pair) in pairs.iter().enumerate() {
        let (kk, kv) = (key_at(pair.key) * d, key_at(pair.key) * dv);
        let dp = pair.keep * a.store(a.sum((0..dv).map(|e| dout[e] * x.v[kv + e])));
        let bend = s.softcap.map_or(1.0, |c| 1.0 - (capped[j] / f64::from(c)).powi(2));
        let ds = a.store(p[j] * (dp - delta) * bend) * f64::from(s.scale);
        let add = |to: &mut f64, y: f64| *to = a.sum([*to, y].into_iter());
        for (e, qe) in q.iter().enumerate() {
            add(&mut r.dq[at * d + e], ds * x.k[kk + e]);
            add(&mut r.dk[kk + e], ds * qe);
        }
        for (e, g) in dout.iter().enumerate() {
            add(&mut r.dv[kv + e], pair.keep * p[j] * g);
        }
    }
}
