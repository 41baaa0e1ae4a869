//! Fused attention, forward and backward, with what is awkward about the real one.
//!
//! Masked logits are `-FLT_MAX`, so a row without any key comes out as the average of all values; probabilities and outputs
//! are rounded to the I/O type; maximum and sum are f32 `[B, N, S, 8]`, eight copies. The backward takes them back with the
//! output, and computes `delta = rowsum(dy * out)` from it:
//!
//! ```text
//! P = exp(S - max) / sum;  dS = P (dy v^T - delta);  dq = scale dS k;  dk = scale dS^T q;  dv = P^T dy
//! ```

use std::ffi::{CStr, c_char, c_void};

use crate::operator::{Operator, operator, require};
use crate::tensor::{Ready, Tensor, dtype};

type Handle = *const c_void;

/// Sparse modes with a compressed mask: causal to the upper left, to the lower right, band.
const COMPRESSED: [i64; 3] = [2, 3, 4];
const COMPRESSED_SIZE: usize = 2048;

/// What is computed.
#[derive(Clone, Copy)]
struct Call {
    scale: f32,
    before: i64,
    after: i64,
    sparse: i64,
    heads_first: bool,
}

impl Call {
    /// Arguments as the client gave them.
    fn new(layout: *mut c_char, [scale, keep]: [f64; 2], [before, after, sparse]: [i64; 3]) -> Result<Self, i32> {
        require(keep == 1.0, "fused attention with dropout is not emulated")?;
        require(!layout.is_null(), "fused attention without a layout")?;
        require(sparse == 0 || COMPRESSED.contains(&sparse), "a sparse mode that is not emulated")?;
        // SAFETY: the client gives a NUL-terminated string.
        let heads_first = match unsafe { CStr::from_ptr(layout) }.to_bytes() {
            b"BNSD" => true,
            b"BSND" => false,
            _ => return Err(require(false, "fused attention of a layout that is not emulated").err().unwrap_or(1)),
        };
        Ok(Self { scale: scale as f32, before, after, sparse, heads_first })
    }

    /// `[batch, heads, rows, dim]`.
    fn axes(&self, d: &[usize]) -> [usize; 4] {
        if self.heads_first { [d[0], d[1], d[2], d[3]] } else { [d[0], d[2], d[1], d[3]] }
    }

    /// Offset of a row of a tensor of `[batch, heads, rows, dim]`.
    fn row(&self, [_, heads, rows, dim]: [usize; 4], b: usize, head: usize, row: usize) -> usize {
        if self.heads_first { ((b * heads + head) * rows + row) * dim } else { ((b * rows + row) * heads + head) * dim }
    }

    /// Checks q, k and v against each other; `[batch, heads, rows, keys, kv heads]`.
    fn shapes(&self, [q, k, v]: [&Tensor; 3], heads: i64) -> Result<[usize; 5], i32> {
        let ([b, n, s, d], [bk, nk, sk, dk], [bv, nv, sv, dv]) =
            (self.axes(&q.dims), self.axes(&k.dims), self.axes(&v.dims));
        let same = b == bk && b == bv && nk == nv && sk == sv && d == dk && k.dtype == q.dtype && v.dtype == q.dtype;
        let fits = same && dv <= d && n == heads as usize && n % nk.max(1) == 0;
        require(fits && d <= 768, "fused attention of shapes or types that do not fit each other")?;
        Ok([b, n, s, sk, nk])
    }

    /// Takes the mask, if there is one.
    fn mask(&self, op: &mut Operator, mask: Handle, [s, sk]: [usize; 2]) -> Result<bool, i32> {
        if mask.is_null() {
            require(self.sparse == 0, "a sparse mode without its compressed mask")?;
            return Ok(false);
        }
        let mask = op.tensor(mask)?;
        let wanted = if COMPRESSED.contains(&self.sparse) { [COMPRESSED_SIZE; 2] } else { [s, sk] };
        let fits = mask.dims == wanted && matches!(mask.dtype, dtype::BOOL | dtype::U8);
        require(fits, "an attention mask of another shape or type")?;
        Ok(true)
    }

    /// Which keys a row does not see: bands count from the lower right corner, or ask the mask.
    fn masked(&self, mask: Option<Vec<f32>>, [s, sk]: [usize; 2]) -> Result<impl Fn(usize, usize) -> bool, i32> {
        let call = *self;
        if call.sparse != 0 {
            let triangle =
                |m: &Vec<f32>| (0..m.len()).all(|i| (m[i] != 0.0) == (i % COMPRESSED_SIZE > i / COMPRESSED_SIZE));
            require(mask.as_ref().is_some_and(triangle), "the compressed mask is not the upper triangle")?;
        }
        Ok(move |i: usize, j: usize| {
            let below = j as i64 - i as i64;
            let right = below - (sk as i64 - s as i64);
            match call.sparse {
                0 => mask.as_ref().is_some_and(|m| m[i * sk + j] != 0.0),
                2 => below > 0,
                3 => right > 0,
                _ => right > call.after || right < -call.before,
            }
        })
    }
}

/// Whether every tensor has four axes without gaps.
fn dense(tensors: &[&Tensor]) -> Result<(), i32> {
    let ok = tensors.iter().all(|t| t.dims.len() == 4 && t.is_dense());
    require(ok, "fused attention of tensors without 4 axes, or not dense")
}

/// Whether both are statistics of `[b, n, s]` rows.
fn statistics(tensors: [&Tensor; 2], [b, n, s]: [usize; 3]) -> Result<(), i32> {
    let ok = tensors.iter().all(|t| t.dims == [b, n, s, 8] && t.dtype == dtype::F32);
    require(ok, "statistics are not f32 [B, N, S, 8]")
}

operator!(aclnnFlashAttentionScoreGetWorkspaceSize, aclnnFlashAttentionScore, (
    query: Handle, key: Handle, value: Handle, shift: Handle, drop: Handle, padding: Handle, mask: Handle, prefix: Handle,
    scale: f64, keep: f64, before: i64, after: i64, heads: i64, layout: *mut c_char, inner: i64, sparse: i64,
    max: Handle, sum: Handle, softmax: Handle, out: Handle,
) |query, key, value, shift: Handle, drop: Handle, padding: Handle, mask: Handle, prefix: Handle, scale: f64, keep: f64, before, after, heads: i64, layout: *mut c_char, _inner: i64, sparse: i64, max, sum, softmax: Handle, out| {
    let mut op = Operator::new();
    let (q, k, v) = (op.tensor(query)?, op.tensor(key)?, op.tensor(value)?);
    let (max, sum, out) = (op.tensor(max)?, op.tensor(sum)?, op.tensor(out)?);
    let nothing = [shift, drop, padding, prefix, softmax].iter().all(|h| h.is_null());
    require(nothing, "fused attention with shifts, dropout, padding, prefixes or softmax output is not emulated")?;
    let call = Call::new(layout, [scale, keep], [before, after, sparse])?;
    dense(&[&q, &k, &v, &max, &sum, &out])?;
    let [b, n, s, sk, _] = call.shapes([&q, &k, &v], heads)?;
    statistics([&max, &sum], [b, n, s])?;
    require(call.axes(&out.dims) == [b, n, s, v.dims[3]] && out.dtype == q.dtype, "the output's shape or type is wrong")?;
    call.mask(&mut op, mask, [s, sk])?;
    op.run(move |t| forward(t, call))
});

fn forward(t: &[Ready], call: Call) -> Result<(), i32> {
    let shapes = [0, 1, 2].map(|i| call.axes(&t[i].dims));
    let [[b, n, s, d], [_, nk, sk, _], [.., dv]] = shapes;
    let (q, k, v) = (t[0].dense(), t[1].dense(), t[2].dense());
    let masked = call.masked(t.get(6).map(Ready::dense), [s, sk])?;
    let mut out = vec![0.0f32; b * n * s * dv];
    let (mut max, mut sum) = (vec![0.0f32; b * n * s * 8], vec![0.0f32; b * n * s * 8]);
    for (bi, h, i) in (0..b * n * s).map(|x| (x / (n * s), x / s % n, x % s)) {
        let hk = h / (n / nk);
        let x = &q[call.row(shapes[0], bi, h, i)..][..d];
        let key = |j: usize| &k[call.row(shapes[1], bi, hk, j)..][..d];
        let logit = |j: usize| if masked(i, j) { -f32::MAX } else { call.scale * dot(x, key(j)) };
        let logits: Vec<f32> = (0..sk).map(logit).collect();
        let top = logits.iter().copied().fold(-f32::MAX, f32::max);
        let p: Vec<f32> = logits.iter().map(|x| (x - top).exp()).collect();
        let total: f32 = p.iter().sum();
        let to = &mut out[call.row([b, n, s, dv], bi, h, i)..][..dv];
        for (j, p) in p.iter().enumerate() {
            add(to, round(t[0].dtype, *p), &v[call.row(shapes[2], bi, hk, j)..]);
        }
        to.iter_mut().for_each(|o| *o /= total);
        let at = ((bi * n + h) * s + i) * 8;
        max[at..at + 8].fill(top);
        sum[at..at + 8].fill(total);
    }
    t[3].store_dense(&max);
    t[4].store_dense(&sum);
    t[5].store_dense(&out);
    Ok(())
}

operator!(aclnnFlashAttentionScoreGradGetWorkspaceSize, aclnnFlashAttentionScoreGrad, (
    query: Handle, key: Handle, value: Handle, dy: Handle, shift: Handle, drop: Handle, padding: Handle, mask: Handle,
    max: Handle, sum: Handle, softmax: Handle, attention: Handle, prefix: Handle, scale: f64, keep: f64, before: i64,
    after: i64, heads: i64, layout: *mut c_char, inner: i64, sparse: i64, dq: Handle, dk: Handle, dv: Handle, dpse: Handle,
) |query, key, value, dy, shift: Handle, drop: Handle, padding: Handle, mask: Handle, max, sum, softmax: Handle, attention, prefix: Handle, scale: f64, keep: f64, before, after, heads: i64, layout: *mut c_char, _inner: i64, sparse: i64, dq, dk, dv, dpse: Handle| {
    let mut op = Operator::new();
    let (q, k, v, dy) = (op.tensor(query)?, op.tensor(key)?, op.tensor(value)?, op.tensor(dy)?);
    let (max, sum, out) = (op.tensor(max)?, op.tensor(sum)?, op.tensor(attention)?);
    let (dq, dk, dv) = (op.tensor(dq)?, op.tensor(dk)?, op.tensor(dv)?);
    let nothing = [shift, drop, padding, prefix, softmax, dpse].iter().all(|h| h.is_null());
    require(nothing, "fused attention with shifts, dropout, padding, prefixes or softmax input is not emulated")?;
    let call = Call::new(layout, [scale, keep], [before, after, sparse])?;
    dense(&[&q, &k, &v, &dy, &max, &sum, &out, &dq, &dk, &dv])?;
    let [b, n, s, sk, _] = call.shapes([&q, &k, &v], heads)?;
    statistics([&max, &sum], [b, n, s])?;
    let wide = [&dy, &out].iter().all(|t| call.axes(&t.dims) == [b, n, s, v.dims[3]] && t.dtype == q.dtype);
    require(wide, "the output's or its gradient's shape or type is wrong")?;
    let alike = [(&dq, &q), (&dk, &k), (&dv, &v)].iter().all(|(g, t)| g.dims == t.dims && g.dtype == t.dtype);
    require(alike, "a gradient's shape or type is not that of its tensor")?;
    call.mask(&mut op, mask, [s, sk])?;
    op.run(move |t| backward(t, call))
});

fn backward(t: &[Ready], call: Call) -> Result<(), i32> {
    let shapes = [0, 1, 2, 3].map(|i| call.axes(&t[i].dims));
    let [[b, n, s, d], [_, nk, sk, _], [.., dv], _] = shapes;
    let [q, k, v, dy, max, sum, out] = [0, 1, 2, 3, 4, 5, 6].map(|i| t[i].dense());
    let masked = call.masked(t.get(10).map(Ready::dense), [s, sk])?;
    let (mut dq, mut dk, mut dv_sum) = (vec![0.0f32; q.len()], vec![0.0f32; k.len()], vec![0.0f32; v.len()]);
    for (bi, h, i) in (0..b * n * s).map(|x| (x / (n * s), x / s % n, x % s)) {
        let (hk, row, wide) = (h / (n / nk), call.row(shapes[0], bi, h, i), call.row(shapes[3], bi, h, i));
        let (x, dout) = (&q[row..][..d], &dy[wide..][..dv]);
        let (delta, at) = (dot(dout, &out[wide..][..dv]), ((bi * n + h) * s + i) * 8);
        for j in 0..sk {
            let (key, value) = (call.row(shapes[1], bi, hk, j), call.row(shapes[2], bi, hk, j));
            let logit = if masked(i, j) { -f32::MAX } else { call.scale * dot(x, &k[key..][..d]) };
            // Each of the eight copies is read by some lane.
            let p = (logit - max[at + j % 8]).exp() / sum[at + j % 8];
            let ds = round(t[0].dtype, p * (dot(dout, &v[value..][..dv]) - delta));
            add(&mut dq[row..][..d], call.scale * ds, &k[key..]);
            add(&mut dk[key..][..d], call.scale * ds, x);
            add(&mut dv_sum[value..][..dv], round(t[0].dtype, p), dout);
        }
    }
    t[7].store_dense(&dq);
    t[8].store_dense(&dk);
    t[9].store_dense(&dv_sum);
    Ok(())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor * from`.
fn add(to: &mut [f32], factor: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(o, x)| *o += factor * x);
}

fn round(kind: i32, x: f32) -> f32 {
    match kind {
        dtype::F16 => half::f16::from_f32(x).to_f32(),
        dtype::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}
