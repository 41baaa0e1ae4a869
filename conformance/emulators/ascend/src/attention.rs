//! The fused forward: `softmax(scale q k^T, masked) v`, with what is awkward about the real one.
//!
//! Masked logits are `-FLT_MAX`, so a row without any key comes out as the average of all values; probabilities and outputs
//! are rounded to the I/O type; maximum and sum are f32 `[B, N, S, 8]`, eight copies.

use std::ffi::{CStr, c_char, c_void};

use crate::operator::{Operator, operator, require};
use crate::tensor::{Ready, dtype};

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

operator!(aclnnFlashAttentionScoreGetWorkspaceSize, aclnnFlashAttentionScore, (
    query: Handle, key: Handle, value: Handle, shift: Handle, drop: Handle, padding: Handle, mask: Handle, prefix: Handle,
    scale: f64, keep: f64, before: i64, after: i64, heads: i64, layout: *mut c_char, inner: i64, sparse: i64,
    max: Handle, sum: Handle, softmax: Handle, out: Handle,
) |query, key, value, shift: Handle, drop: Handle, padding: Handle, mask: Handle, prefix: Handle, scale: f64, keep: f64, before, after, heads: i64, layout: *mut c_char, _inner: i64, sparse: i64, max, sum, softmax: Handle, out| {
    let mut op = Operator::new();
    let (q, k, v) = (op.tensor(query)?, op.tensor(key)?, op.tensor(value)?);
    let (max, sum, out) = (op.tensor(max)?, op.tensor(sum)?, op.tensor(out)?);
    let nothing = [shift, drop, padding, prefix, softmax].iter().all(|h| h.is_null());
    require(nothing && keep == 1.0, "fused attention with shifts, dropout, padding, prefixes or softmax output is not emulated")?;
    require(!layout.is_null(), "fused attention without a layout")?;
    // SAFETY: the client gives a NUL-terminated string.
    let heads_first = match unsafe { CStr::from_ptr(layout) }.to_bytes() {
        b"BNSD" => true,
        b"BSND" => false,
        _ => return require(false, "fused attention of a layout that is not emulated").map(|()| op),
    };
    let axes = |d: &[usize]| if heads_first { [d[0], d[1], d[2], d[3]] } else { [d[0], d[2], d[1], d[3]] };
    require([&q, &k, &v, &max, &sum, &out].iter().all(|t| t.dims.len() == 4 && t.is_dense()), "fused attention of tensors without 4 axes, or not dense")?;
    let ([b, n, s, d], [bk, nk, sk, dk], [bv, nv, sv, dv]) = (axes(&q.dims), axes(&k.dims), axes(&v.dims));
    let fits = b == bk && b == bv && nk == nv && sk == sv && d == dk && dv <= d && n == heads as usize && n % nk.max(1) == 0;
    require(fits && d <= 768, "fused attention of shapes that do not fit each other")?;
    require(max.dims == [b, n, s, 8] && sum.dims == max.dims && max.dtype == dtype::F32 && sum.dtype == dtype::F32, "statistics are not f32 [B, N, S, 8]")?;
    require(axes(&out.dims) == [b, n, s, dv] && out.dtype == q.dtype && k.dtype == q.dtype && v.dtype == q.dtype, "the output's shape or type is wrong")?;
    let has_mask = !mask.is_null();
    if has_mask {
        let mask = op.tensor(mask)?;
        let wanted = if COMPRESSED.contains(&sparse) { [COMPRESSED_SIZE; 2] } else { [s, sk] };
        require(mask.dims == wanted && matches!(mask.dtype, dtype::BOOL | dtype::U8), "an attention mask of another shape or type")?;
    }
    require(has_mask || sparse == 0, "a sparse mode without its compressed mask")?;
    require(sparse == 0 || COMPRESSED.contains(&sparse), "a sparse mode that is not emulated")?;
    let call = Call { scale: scale as f32, before, after, sparse, heads_first };
    op.run(move |t| forward(t, call))
});

fn forward(t: &[Ready], call: Call) -> Result<(), i32> {
    let axes = |d: &[usize]| if call.heads_first { [d[0], d[1], d[2], d[3]] } else { [d[0], d[2], d[1], d[3]] };
    let ([b, n, s, d], [_, nk, sk, _], dv) = (axes(&t[0].dims), axes(&t[1].dims), t[2].dims[3]);
    let (q, k, v) = (t[0].dense(), t[1].dense(), t[2].dense());
    let mask = t.get(6).map(Ready::dense);
    if call.sparse != 0 {
        let triangle =
            |m: &Vec<f32>| (0..m.len()).all(|i| (m[i] != 0.0) == (i % COMPRESSED_SIZE > i / COMPRESSED_SIZE));
        require(mask.as_ref().is_some_and(triangle), "the compressed mask is not the upper triangle")?;
    }
    let masked = |i: usize, j: usize| {
        let below = j as i64 - i as i64;
        let right = below - (sk as i64 - s as i64);
        match call.sparse {
            0 => mask.as_ref().is_some_and(|m| m[i * sk + j] != 0.0),
            2 => below > 0,
            3 => right > 0,
            _ => right > call.after || right < -call.before,
        }
    };
    let row = |h: usize, i: usize, heads: usize, rows: usize, b: usize, d: usize| {
        if call.heads_first { ((b * heads + h) * rows + i) * d } else { ((b * rows + i) * heads + h) * d }
    };
    let mut out = vec![0.0f32; b * n * s * dv];
    let (mut max, mut sum) = (vec![0.0f32; b * n * s * 8], vec![0.0f32; b * n * s * 8]);
    for bi in 0..b {
        for h in 0..n {
            let hk = h / (n / nk);
            for i in 0..s {
                let x = &q[row(h, i, n, s, bi, d)..][..d];
                let logit = |j: usize| {
                    let y = &k[row(hk, j, nk, sk, bi, d)..][..d];
                    if masked(i, j) { -f32::MAX } else { call.scale * x.iter().zip(y).map(|(a, b)| a * b).sum::<f32>() }
                };
                let logits: Vec<f32> = (0..sk).map(logit).collect();
                let top = logits.iter().copied().fold(-f32::MAX, f32::max);
                let p: Vec<f32> = logits.iter().map(|x| (x - top).exp()).collect();
                let total: f32 = p.iter().sum();
                let to = &mut out[row(h, i, n, s, bi, dv)..][..dv];
                for (j, p) in p.iter().enumerate() {
                    let p = round(t[0].dtype, *p);
                    to.iter_mut().zip(&v[row(hk, j, nk, sk, bi, dv)..][..dv]).for_each(|(o, v)| *o += p * v);
                }
                to.iter_mut().for_each(|o| *o /= total);
                let at = ((bi * n + h) * s + i) * 8;
                max[at..at + 8].fill(top);
                sum[at..at + 8].fill(total);
            }
        }
    }
    t[3].store_dense(&max);
    t[4].store_dense(&sum);
    t[5].store_dense(&out);
    Ok(())
}

fn round(kind: i32, x: f32) -> f32 {
    match kind {
        dtype::F16 => half::f16::from_f32(x).to_f32(),
        dtype::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}
