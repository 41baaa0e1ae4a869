//! Partial attention over slices, forward and backward.
//!
//! # Partials
//!
//! A partial result of a query row is the triple `(acc, m, l)` in f32: `m` is the largest logit so far (natural units), or one
//! near it that a kernel keeps so as not to rescale for every new maximum, `l = sum exp(x - m)`, `acc = sum keep / (1 - p) *
//! exp(x - m) * v`. Kernels continue in place from a partial that they made, so a ring step needs no merge pass, and precision
//! does not fall with the number of steps. A row that saw nothing is `(0, -inf, 0)`.
//!
//! [`Stage::Start`] initialises *every* row of the call and then computes, [`Stage::Continue`] updates the rows that its
//! slices select, [`Stage::Finish`] computes, adds the sinks, and writes `out = acc / l` and `lse = m + ln l` for *every* row.
//!
//! # Backward
//!
//! With the *global* lse and `delta = rowsum(dout * out) - dlse` of each row (Dao, "FlashAttention-2", section 2.3.2; the dlse
//! term from `d lse / d x = p`):
//!
//! ```text
//! p  = exp(x - lse)                            dp = keep / (1 - p_drop) * dot(dout, v)
//! ds = p * (dp - delta) * (1 - (x0 / softcap)^2)      the last factor with softcap, x0 the capped logit before ALiBi
//! dq = scale * ds k     dk = scale * ds^T q     dv = (keep / (1 - p_drop) * p)^T dout
//! dsink[h] = -sum over rows exp(sink[h] - lse) * delta
//! ```

use std::fmt::Debug;

use crate::{DType, Device, Error, Extent, Result, Slices, Spec, View, ViewMut};

/// Attention kernels of one device. See the ordering contract in `device.rs`.
pub trait Attention<D: Device>: Debug + Send + Sync + 'static {
    /// Work checked, tiled and on its way to the device. One plan serves all layers, forward and backward.
    type Plan: Debug + Send + Sync + 'static;

    /// Whether this backend computes `spec`, forward and backward. Alone decides.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the option and what would be supported; [`Error::Invalid`].
    fn supports(&self, spec: &Spec) -> Result<()>;

    /// Plans `slices` of `spec`. May allocate, never synchronises; at most 1 ms per 1,000 slices.
    ///
    /// # Errors
    /// As [`Attention::supports`]; [`Error::OutOfMemory`].
    fn plan(&self, on: &D::Stream, spec: &Spec, slices: &Slices) -> Result<Self::Plan>;

    /// Device bytes that a call with `plan` needs as scratch (the larger of forward and backward); a multiple of 256.
    fn scratch_bytes(&self, plan: &Self::Plan) -> usize;

    /// Device bytes that `plan` itself holds: its work lists.
    fn plan_bytes(&self, _plan: &Self::Plan) -> usize {
        0
    }

    /// Device bytes that the backend holds beside plans and scratch: constants of the kernels, and workspaces of `streams`
    /// streams.
    fn held_bytes(&self, _streams: usize) -> usize {
        0
    }

    /// Names of the kernels that a forward (or backward) with `plan` runs, for reports; none where they have no names.
    fn kernels(&self, _plan: &Self::Plan, _backward: bool) -> Vec<String> {
        Vec::new()
    }

    /// Queues one stage of the forward.
    ///
    /// # Errors
    /// [`Error::Driver`].
    fn forward(&self, on: &D::Stream, plan: &Self::Plan, args: &Forward<'_, D>) -> Result<()>;

    /// Queues `delta = rowsum(dout * out) - dlse` and, with sinks, `dsinks` of these rows.
    ///
    /// # Errors
    /// [`Error::Driver`].
    fn backward_prepare(&self, on: &D::Stream, spec: &Spec, args: &Prepare<'_, D>) -> Result<()>;

    /// Queues the gradients of the slices of `plan`. A gradient that is written is written in every row, with 0 where no
    /// slice contributes. With [`Spec::sums_dq`] dq is left as sums, in whatever order and scale suit the kernels: the first
    /// call writes them, others add to them, and [`Attention::finish_dq`] makes dq of them.
    ///
    /// # Errors
    /// [`Error::Driver`].
    fn backward(&self, on: &D::Stream, plan: &Self::Plan, args: &Backward<'_, D>) -> Result<()>;

    /// Queues `into` = dq of the sums that [`Attention::backward`] left for `spec` (of any number of keys), which has
    /// [`Spec::sums_dq`], rounded once to the I/O dtype; `into` and `sums` have the extent of the queries and don't overlap.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor; [`Error::Driver`].
    fn finish_dq(&self, on: &D::Stream, _spec: &Spec, into: ViewMut<'_, D>, sums: View<'_, D>) -> Result<()> {
        self.accumulate(on, &Accumulate::new(into, &[sums])?)
    }

    /// Queues `into = round(((t0 + t1) + t2) + ...)`: f32 sums in list order, rounded once to the dtype of `into`.
    ///
    /// # Errors
    /// [`Error::Driver`].
    fn accumulate(&self, on: &D::Stream, args: &Accumulate<'_, D>) -> Result<()>;
}

/// Partial results of every query row: views in f32.
#[derive(Debug)]
pub struct Partial<'a, D: Device> {
    /// Unnormalised output, `[batch, q_rows, heads, head_dim_v]`.
    pub acc: ViewMut<'a, D>,
    /// Row maximum in natural units, or near it, `[batch, q_rows, heads, 1]`.
    pub m: ViewMut<'a, D>,
    /// Row sum, `[batch, q_rows, heads, 1]`.
    pub l: ViewMut<'a, D>,
}

/// Which part of a forward a call is.
#[derive(Debug)]
pub enum Stage<'a, D: Device> {
    /// Start and finish in one call.
    All {
        /// Output in the I/O dtype, `[batch, q_rows, heads, head_dim_v]`.
        out: ViewMut<'a, D>,
        /// Natural-log sum in f32, `[batch, q_rows, heads, 1]`.
        lse: ViewMut<'a, D>,
    },
    /// Update partials in place.
    Continue(
        /// Read and written.
        Partial<'a, D>,
    ),
    /// Update from the partials, add the sinks, write the results. The partials' content is undefined afterwards.
    Finish {
        /// Read; scratch afterwards.
        partial: Partial<'a, D>,
        /// Output in the I/O dtype, `[batch, q_rows, heads, head_dim_v]`.
        out: ViewMut<'a, D>,
        /// Natural-log sum in f32, `[batch, q_rows, heads, 1]`.
        lse: ViewMut<'a, D>,
    },
    /// Initialise every row of the partials, then update.
    Start(
        /// Written.
        Partial<'a, D>,
    ),
}

/// Where the 64-bit dropout seed is.
#[derive(Debug)]
pub enum Seed<'a, D: Device> {
    /// In device memory (8 bytes, little endian, at the start of the buffer), read when the call runs: what a captured graph
    /// needs.
    Device(&'a D::Buffer),
    /// Known now.
    Host(u64),
}

impl<D: Device> Clone for Seed<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Seed<'_, D> {}

/// Inputs that options bring: each is present exactly where the spec has the option.
#[derive(Debug)]
pub struct Extras<'a, D: Device> {
    /// ALiBi slopes, f32 `[1, 1, heads_total, 1]`.
    pub alibi_slopes: Option<View<'a, D>>,
    /// Sink logits, f32 `[1, 1, heads_total, 1]`.
    pub sinks: Option<View<'a, D>>,
    /// Dropout seed.
    pub seed: Option<Seed<'a, D>>,
}

impl<D: Device> Clone for Extras<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Extras<'_, D> {}

impl<D: Device> Default for Extras<'_, D> {
    fn default() -> Self {
        Self { alibi_slopes: None, sinks: None, seed: None }
    }
}

impl<D: Device> Extras<'_, D> {
    /// Checks that each is given exactly where `spec` has the option, and its shape.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the input.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        let heads = [1, 1, spec.heads_total, 1];
        let given = [
            ("alibi_slopes", spec.alibi, self.alibi_slopes.is_some()),
            ("sinks", spec.sinks, self.sinks.is_some()),
            ("dropout seed", spec.dropout.is_some(), self.seed.is_some()),
        ];
        for (what, wanted, have) in given {
            if wanted != have {
                let why =
                    if wanted { "the spec has the option, its input is missing" } else { "given without the option" };
                return Err(Error::invalid(what, why));
            }
        }
        if let Some(v) = &self.alibi_slopes {
            expect("alibi_slopes", v.dtype(), v.extent(), DType::F32, heads)?;
        }
        if let Some(v) = &self.sinks {
            expect("sinks", v.dtype(), v.extent(), DType::F32, heads)?;
        }
        match &self.seed {
            Some(Seed::Device(buffer)) if D::bytes(buffer) < 8 => {
                Err(Error::invalid("dropout seed", format!("it has 8 bytes, its buffer {}", D::bytes(buffer))))
            }
            _ => Ok(()),
        }
    }
}

/// Checked arguments of [`Attention::forward`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Forward<'a, D: Device> {
    /// Queries, `[batch, q_rows, heads, head_dim]`.
    pub q: View<'a, D>,
    /// Keys, `[batch, k_rows, kv_heads, head_dim]`.
    pub k: View<'a, D>,
    /// Values, `[batch, k_rows, kv_heads, head_dim_v]`.
    pub v: View<'a, D>,
    /// Which part of the forward, and where results go.
    pub stage: Stage<'a, D>,
    /// Inputs of options.
    pub extras: Extras<'a, D>,
    /// At least [`Attention::scratch_bytes`] of scratch.
    pub scratch: Option<&'a D::Buffer>,
}

impl<'a, D: Device> Forward<'a, D> {
    /// Checks the arguments against `spec`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor whose dtype or extent is wrong, or that overlaps what is written.
    pub fn new(
        spec: &Spec,
        [q, k, v]: [View<'a, D>; 3],
        stage: Stage<'a, D>,
        extras: Extras<'a, D>,
        scratch: Option<&'a D::Buffer>,
    ) -> Result<Self> {
        inputs(spec, [q, k, v])?;
        extras.check(spec)?;
        let [batch, rows, heads] = [spec.batch, spec.q_rows, spec.heads];
        let (wide, thin) = ([batch, rows, heads, spec.head_dim_v], [batch, rows, heads, 1]);
        let (partial, results) = match &stage {
            Stage::All { out, lse } => (None, Some((out, lse))),
            Stage::Continue(p) | Stage::Start(p) => (Some(p), None),
            Stage::Finish { partial, out, lse } => (Some(partial), Some((out, lse))),
        };
        if partial.is_some() && !spec.partial {
            return Err(Error::invalid("stage", "a partial stage needs a spec with `partial`"));
        }
        let mut written: Vec<(&'static str, ViewMut<'a, D>)> = Vec::with_capacity(5);
        if let Some(p) = partial {
            expect("acc", p.acc.dtype(), p.acc.extent(), DType::F32, wide)?;
            expect("m", p.m.dtype(), p.m.extent(), DType::F32, thin)?;
            expect("l", p.l.dtype(), p.l.extent(), DType::F32, thin)?;
            written.extend([("acc", p.acc), ("m", p.m), ("l", p.l)]);
        }
        if let Some((out, lse)) = results {
            expect("out", out.dtype(), out.extent(), spec.dtype, wide)?;
            expect("lse", lse.dtype(), lse.extent(), DType::F32, thin)?;
            written.extend([("out", *out), ("lse", *lse)]);
        }
        apart(&[("q", q), ("k", k), ("v", v)], &written)?;
        Ok(Self { q, k, v, stage, extras, scratch })
    }
}

/// Checked arguments of [`Attention::backward_prepare`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Prepare<'a, D: Device> {
    /// Output of the forward, `[batch, q_rows, heads, head_dim_v]`.
    pub out: View<'a, D>,
    /// Gradient of `out`, the same shape.
    pub dout: View<'a, D>,
    /// Log-sum of the forward, f32 `[batch, q_rows, heads, 1]`; read with sinks only.
    pub lse: View<'a, D>,
    /// Gradient of `lse`, f32 `[batch, q_rows, heads, 1]`; absent means 0.
    pub dlse: Option<View<'a, D>>,
    /// Result, f32 `[batch, q_rows, heads, 1]`.
    pub delta: ViewMut<'a, D>,
    /// With sinks: the logits (all heads of the problem), and the gradient of the local heads over these rows, written, f32
    /// `[1, 1, heads, 1]`.
    pub sinks: Option<(View<'a, D>, ViewMut<'a, D>)>,
}

impl<'a, D: Device> Prepare<'a, D> {
    /// Checks the arguments against `spec`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor.
    pub fn new(
        spec: &Spec,
        [out, dout]: [View<'a, D>; 2],
        lse: View<'a, D>,
        dlse: Option<View<'a, D>>,
        delta: ViewMut<'a, D>,
        sinks: Option<(View<'a, D>, ViewMut<'a, D>)>,
    ) -> Result<Self> {
        let [batch, rows, heads] = [spec.batch, spec.q_rows, spec.heads];
        let (wide, thin) = ([batch, rows, heads, spec.head_dim_v], [batch, rows, heads, 1]);
        expect("out", out.dtype(), out.extent(), spec.dtype, wide)?;
        expect("dout", dout.dtype(), dout.extent(), spec.dtype, wide)?;
        expect("lse", lse.dtype(), lse.extent(), DType::F32, thin)?;
        expect("delta", delta.dtype(), delta.extent(), DType::F32, thin)?;
        let mut read = vec![("out", out), ("dout", dout), ("lse", lse)];
        let mut written = vec![("delta", delta)];
        if let Some(dlse) = dlse {
            expect("dlse", dlse.dtype(), dlse.extent(), DType::F32, thin)?;
            read.push(("dlse", dlse));
        }
        if sinks.is_some() != spec.sinks {
            return Err(Error::invalid("sinks", "given exactly where the spec has them"));
        }
        if let Some((logits, dsinks)) = sinks {
            expect("sinks", logits.dtype(), logits.extent(), DType::F32, [1, 1, spec.heads_total, 1])?;
            expect("dsinks", dsinks.dtype(), dsinks.extent(), DType::F32, [1, 1, heads, 1])?;
            read.push(("sinks", logits));
            written.push(("dsinks", dsinks));
        }
        apart(&read, &written)?;
        Ok(Self { out, dout, lse, dlse, delta, sinks })
    }
}

/// How a gradient is stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Store {
    /// Added to what is there; f32 only.
    Add,
    /// Written, every row; f32, or the I/O dtype (rounded once).
    Write,
}

/// Where a gradient goes.
#[derive(Debug)]
pub struct Gradient<'a, D: Device> {
    /// The memory.
    pub into: ViewMut<'a, D>,
    /// Written or added.
    pub store: Store,
}

impl<D: Device> Clone for Gradient<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Gradient<'_, D> {}

/// Checked arguments of [`Attention::backward`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Backward<'a, D: Device> {
    /// Queries, `[batch, q_rows, heads, head_dim]`.
    pub q: View<'a, D>,
    /// Keys, `[batch, k_rows, kv_heads, head_dim]`.
    pub k: View<'a, D>,
    /// Values, `[batch, k_rows, kv_heads, head_dim_v]`.
    pub v: View<'a, D>,
    /// Gradient of the output, `[batch, q_rows, heads, head_dim_v]`.
    pub dout: View<'a, D>,
    /// Global log-sum, f32 `[batch, q_rows, heads, 1]`.
    pub lse: View<'a, D>,
    /// From [`Attention::backward_prepare`], f32 `[batch, q_rows, heads, 1]`.
    pub delta: View<'a, D>,
    /// Gradient of the queries, or, with [`Spec::sums_dq`], its sums.
    pub dq: Gradient<'a, D>,
    /// Gradient of the keys.
    pub dk: Gradient<'a, D>,
    /// Gradient of the values.
    pub dv: Gradient<'a, D>,
    /// Inputs of options.
    pub extras: Extras<'a, D>,
    /// At least [`Attention::scratch_bytes`] of scratch.
    pub scratch: Option<&'a D::Buffer>,
}

impl<'a, D: Device> Backward<'a, D> {
    /// Checks the arguments against `spec`. `rows` is `[dout, lse, delta]`, `gradients` is `[dq, dk, dv]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor.
    pub fn new(
        spec: &Spec,
        [q, k, v]: [View<'a, D>; 3],
        [dout, lse, delta]: [View<'a, D>; 3],
        [dq, dk, dv]: [Gradient<'a, D>; 3],
        extras: Extras<'a, D>,
        scratch: Option<&'a D::Buffer>,
    ) -> Result<Self> {
        inputs(spec, [q, k, v])?;
        extras.check(spec)?;
        let thin = [spec.batch, spec.q_rows, spec.heads, 1];
        let wide = [spec.batch, spec.q_rows, spec.heads, spec.head_dim_v];
        expect("dout", dout.dtype(), dout.extent(), spec.dtype, wide)?;
        expect("lse", lse.dtype(), lse.extent(), DType::F32, thin)?;
        expect("delta", delta.dtype(), delta.extent(), DType::F32, thin)?;
        for (what, g, extent) in [("dq", dq, q.extent()), ("dk", dk, k.extent()), ("dv", dv, v.extent())] {
            let dtype = g.into.dtype();
            let narrow = dtype == spec.dtype && dtype != DType::F32;
            if narrow && (g.store == Store::Add || spec.accumulate) {
                return Err(Error::invalid(what, "gradients that accumulate are f32"));
            }
            expect(what, dtype, g.into.extent(), if narrow { spec.dtype } else { DType::F32 }, extent)?;
            if (dtype != spec.dtype || g.store == Store::Add) && !spec.accumulate {
                return Err(Error::invalid(
                    what,
                    "adding, or f32 gradients of narrower inputs, need a spec with `accumulate`",
                ));
            }
        }
        apart(
            &[("q", q), ("k", k), ("v", v), ("dout", dout), ("lse", lse), ("delta", delta)],
            &[("dq", dq.into), ("dk", dk.into), ("dv", dv.into)],
        )?;
        Ok(Self { q, k, v, dout, lse, delta, dq, dk, dv, extras, scratch })
    }
}

/// Checked arguments of [`Attention::accumulate`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Accumulate<'a, D: Device> {
    /// Where the rounded sum goes: any dtype.
    pub into: ViewMut<'a, D>,
    /// f32 terms of the same extent, in the order of addition. `into` may be exactly one of them.
    pub terms: &'a [View<'a, D>],
}

impl<'a, D: Device> Accumulate<'a, D> {
    /// Checks the arguments.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no term, a term is not f32 of the extent of `into`, or one overlaps `into` without
    /// being it.
    pub fn new(into: ViewMut<'a, D>, terms: &'a [View<'a, D>]) -> Result<Self> {
        if terms.is_empty() {
            return Err(Error::invalid("terms", "at least one is needed"));
        }
        for t in terms {
            expect("term", t.dtype(), t.extent(), DType::F32, into.extent())?;
            if t.at() != into.at() && into.aliases(t.buffer(), t.at()) {
                return Err(Error::invalid("terms", "one overlaps the sum without being it"));
            }
        }
        Ok(Self { into, terms })
    }
}

fn inputs<D: Device>(spec: &Spec, [q, k, v]: [View<'_, D>; 3]) -> Result<()> {
    spec.check()?;
    let b = spec.batch;
    expect("q", q.dtype(), q.extent(), spec.dtype, [b, spec.q_rows, spec.heads, spec.head_dim])?;
    expect("k", k.dtype(), k.extent(), spec.dtype, [b, spec.k_rows, spec.kv_heads, spec.head_dim])?;
    expect("v", v.dtype(), v.extent(), spec.dtype, [b, spec.k_rows, spec.kv_heads, spec.head_dim_v])
}

fn expect(what: &'static str, dtype: DType, extent: Extent, wanted: DType, shape: Extent) -> Result<()> {
    if dtype == wanted && extent == shape {
        return Ok(());
    }
    Err(Error::invalid(what, format!("it is {dtype} {extent:?}, wanted is {wanted} {shape:?}")))
}

/// Checks that what is written overlaps neither what is read nor each other.
///
/// # Errors
/// [`Error::Invalid`] naming both.
pub fn apart<D: Device>(
    read: &[(&'static str, View<'_, D>)],
    written: &[(&'static str, ViewMut<'_, D>)],
) -> Result<()> {
    for (i, (what, w)) in written.iter().enumerate() {
        let with = read
            .iter()
            .find(|(_, r)| w.aliases(r.buffer(), r.at()))
            .map(|(name, _)| *name)
            .or_else(|| written[..i].iter().find(|(_, o)| w.aliases(o.buffer(), o.at())).map(|(name, _)| *name));
        if let Some(other) = with {
            return Err(Error::invalid(what, format!("it overlaps {other}")));
        }
    }
    Ok(())
}
