//! What one attention call computes: shapes, the cut out of the whole problem, and options.

use crate::{DType, Error, Result};

/// Shapes and options of one local attention call.
///
/// For query row `i`, key row `j` and head `h` (global index), with positions from the [`crate::Slice`]:
///
/// ```text
/// x    = scale * dot(q[i], k[j])
/// x    = softcap * tanh(x / softcap)                    with softcap
/// x    = x - slope[h] * |qpos(i) - kpos(j)|             with ALiBi
/// lse  = ln( sum_j exp(x) + exp(sink[h]) )              the sink term with sinks
/// out  = sum_j keep(i, j) / (1 - p) * exp(x - lse) * v[j]    keep with dropout, otherwise out = sum_j exp(x - lse) * v[j]
/// ```
///
/// A row that no slice selects has `out = 0` and `lse = -inf` (`lse = sink[h]` with sinks).
///
/// Dropout draws Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key words
/// `[seed low, seed high]` and counter words `[batch, head, qpos, kpos / 4]`, all global; the pair is dropped where word
/// `kpos % 4` is less than `floor(p * 2^32)`.
///
/// The *cut* says which part of the whole problem the local tensors are. Local query head `h` is global head
/// `head_first + h` and attends to the local KV head [`Spec::kv_head`]`(h)`. After an uneven cut local groups are irregular:
/// 32 query and 8 KV heads over 3 ranks give rank 1 local groups of 1, 4, 4 and 2 query heads.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Spec {
    /// Element type of q, k, v, out and dout.
    pub dtype: DType,
    /// Local batch rows.
    pub batch: usize,
    /// Local query rows.
    pub q_rows: usize,
    /// Local key rows.
    pub k_rows: usize,
    /// Local query heads.
    pub heads: usize,
    /// Local KV heads.
    pub kv_heads: usize,
    /// Size of a query and key head.
    pub head_dim: usize,
    /// Size of a value head.
    pub head_dim_v: usize,
    /// Global index of local batch row 0.
    pub batch_first: usize,
    /// Global index of local query head 0.
    pub head_first: usize,
    /// Query heads of the whole problem.
    pub heads_total: usize,
    /// Global index of local KV head 0.
    pub kv_first: usize,
    /// Query heads per KV head in the whole problem.
    pub group: usize,
    /// Factor on the dot product; `1 / sqrt(head_dim)` unless set.
    pub scale: f32,
    /// `c` of `c * tanh(x / c)`.
    pub softcap: Option<f32>,
    /// Whether ALiBi slopes (f32, one per global head) are given with each call.
    pub alibi: bool,
    /// Whether attention sinks (f32 logits, one per global head) are given with each call.
    pub sinks: bool,
    /// Dropout probability in `[0, 1)`.
    pub dropout: Option<f32>,
    /// Two runs on the same machine, mesh, options and library versions agree bitwise.
    pub deterministic: bool,
    /// The forward is cut into several calls (Start, Continue, Finish).
    pub partial: bool,
    /// The backward adds to gradients, or wants them in f32 though `dtype` is narrower. dq: see [`Spec::sums_dq`].
    pub accumulate: bool,
}

impl Spec {
    /// A whole problem: full heads, `head_dim_v = head_dim`, no options.
    pub fn new(
        dtype: DType,
        batch: usize,
        [q_rows, k_rows]: [usize; 2],
        [heads, kv_heads]: [usize; 2],
        head_dim: usize,
    ) -> Self {
        Self {
            dtype,
            batch,
            q_rows,
            k_rows,
            heads,
            kv_heads,
            head_dim,
            head_dim_v: head_dim,
            batch_first: 0,
            head_first: 0,
            heads_total: heads,
            kv_first: 0,
            group: heads.checked_div(kv_heads).unwrap_or(1).max(1),
            scale: 1.0 / (head_dim.max(1) as f32).sqrt(),
            softcap: None,
            alibi: false,
            sinks: false,
            dropout: None,
            deterministic: false,
            partial: false,
            accumulate: false,
        }
    }

    /// Sets the size of a value head.
    #[must_use]
    pub fn with_head_dim_v(mut self, head_dim_v: usize) -> Self {
        self.head_dim_v = head_dim_v;
        self
    }

    /// Sets the factor on the dot product.
    #[must_use]
    pub fn with_scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
    }

    /// Sets or clears the softcap.
    #[must_use]
    pub fn with_softcap(mut self, softcap: Option<f32>) -> Self {
        self.softcap = softcap;
        self
    }

    /// Turns ALiBi on or off.
    #[must_use]
    pub fn with_alibi(mut self, alibi: bool) -> Self {
        self.alibi = alibi;
        self
    }

    /// Turns attention sinks on or off.
    #[must_use]
    pub fn with_sinks(mut self, sinks: bool) -> Self {
        self.sinks = sinks;
        self
    }

    /// Sets or clears dropout.
    #[must_use]
    pub fn with_dropout(mut self, p: Option<f32>) -> Self {
        self.dropout = p;
        self
    }

    /// Turns the deterministic mode on or off.
    #[must_use]
    pub fn with_deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Says that the forward is cut into several calls.
    #[must_use]
    pub fn with_partial(mut self, partial: bool) -> Self {
        self.partial = partial;
        self
    }

    /// Says that the backward adds to gradients or keeps them in f32.
    #[must_use]
    pub fn with_accumulate(mut self, accumulate: bool) -> Self {
        self.accumulate = accumulate;
        self
    }

    /// Whether the backward leaves f32 sums instead of dq: see [`crate::Attention::finish_dq`].
    pub fn sums_dq(&self) -> bool {
        self.accumulate && self.dtype != DType::F32
    }

    /// Sets the cut: `heads` local query heads from global head `head_first` of `heads_total`, with `group` query heads a
    /// KV head. The local KV heads become those that these query heads use.
    #[must_use]
    pub fn with_head_cut(mut self, head_first: usize, heads: usize, heads_total: usize, group: usize) -> Self {
        let group = group.max(1);
        self.head_first = head_first;
        self.heads = heads;
        self.heads_total = heads_total;
        self.group = group;
        self.kv_first = head_first / group;
        self.kv_heads = if heads == 0 { 0 } else { (head_first + heads - 1) / group + 1 - self.kv_first };
        self
    }

    /// Local KV head of local query head `head`.
    pub fn kv_head(&self, head: usize) -> usize {
        (self.head_first + head) / self.group - self.kv_first
    }

    /// Largest value below which a Philox word drops its pair: `floor(p * 2^32)`.
    pub fn dropout_threshold(&self) -> u32 {
        self.dropout.map_or(0, |p| (f64::from(p) * 4_294_967_296.0) as u32)
    }

    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        if self.head_dim == 0 || self.head_dim_v == 0 {
            return Err(Error::invalid("head_dim", "it must be at least 1"));
        }
        if self.group == 0 || self.head_first + self.heads > self.heads_total {
            return Err(Error::invalid(
                "heads",
                format!("heads {}..{} of {}", self.head_first, self.head_first + self.heads, self.heads_total),
            ));
        }
        if self.heads > 0 {
            let last = (self.head_first + self.heads - 1) / self.group;
            if self.head_first / self.group < self.kv_first || last >= self.kv_first + self.kv_heads {
                return Err(Error::invalid(
                    "kv_heads",
                    format!(
                        "query heads {}..{} in groups of {} need KV heads {}..={last}, local are {}..{}",
                        self.head_first,
                        self.head_first + self.heads,
                        self.group,
                        self.head_first / self.group,
                        self.kv_first,
                        self.kv_first + self.kv_heads
                    ),
                ));
            }
        }
        if !self.scale.is_finite() {
            return Err(Error::invalid("scale", format!("{} is not finite", self.scale)));
        }
        if let Some(c) = self.softcap
            && !(c.is_finite() && c > 0.0)
        {
            return Err(Error::invalid("softcap", format!("{c} is not a finite number above 0")));
        }
        if let Some(p) = self.dropout
            && !(0.0..1.0).contains(&p)
        {
            return Err(Error::invalid("dropout", format!("{p} is not in [0, 1)")));
        }
        Ok(())
    }
}
