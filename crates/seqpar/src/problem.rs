//! The whole attention problem, before it is cut over ranks.

use longspan_hal::{DType, Error, Result, Spec};

/// Shapes and options of attention over the whole sequence. The sequence lengths come from the layouts.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// Element type of q, k, v, out and their gradients.
    pub dtype: DType,
    /// Batch rows.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a query and key head.
    pub head_dim: usize,
    /// Size of a value head.
    pub head_dim_v: usize,
    /// Factor on the dot product; `1 / sqrt(head_dim)` unless set.
    pub scale: f32,
    /// `c` of `c * tanh(x / c)`.
    pub softcap: Option<f32>,
    /// Whether ALiBi slopes are given with each call.
    pub alibi: bool,
    /// Whether sink logits are given with each call.
    pub sinks: bool,
    /// Dropout probability in `[0, 1)`.
    pub dropout: Option<f32>,
    /// Two runs agree bitwise.
    pub deterministic: bool,
    /// Joint tokens: appended to queries and keys, replicated on every rank.
    pub joint: usize,
    /// Head groups of the all-to-all: one group computes while the next travels, and memory falls with their number. Unless set,
    /// the plan chooses ([`crate::heads::head_groups`]).
    pub head_groups: Option<usize>,
    /// Whether a backward will run: sizes its memory.
    pub backward: bool,
}

impl Problem {
    /// A problem without options, forward only.
    pub fn new(dtype: DType, batch: usize, [heads, kv_heads]: [usize; 2], head_dim: usize) -> Self {
        Self {
            dtype,
            batch,
            heads,
            kv_heads,
            head_dim,
            head_dim_v: head_dim,
            scale: 1.0 / (head_dim.max(1) as f32).sqrt(),
            softcap: None,
            alibi: false,
            sinks: false,
            dropout: None,
            deterministic: false,
            joint: 0,
            head_groups: None,
            backward: false,
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

    /// Sets the number of joint tokens.
    #[must_use]
    pub fn with_joint(mut self, joint: usize) -> Self {
        self.joint = joint;
        self
    }

    /// Sets the number of head groups, or leaves it to the plan.
    #[must_use]
    pub fn with_head_groups(mut self, head_groups: impl Into<Option<usize>>) -> Self {
        self.head_groups = head_groups.into();
        self
    }

    /// Says whether a backward will run.
    #[must_use]
    pub fn with_backward(mut self, backward: bool) -> Self {
        self.backward = backward;
        self
    }

    /// The spec of this problem for `rows` query and key rows, with all heads.
    pub fn spec(&self, rows: [usize; 2]) -> Spec {
        Spec::new(self.dtype, self.batch, rows, [self.heads, self.kv_heads], self.head_dim)
            .with_head_dim_v(self.head_dim_v)
            .with_scale(self.scale)
            .with_softcap(self.softcap)
            .with_alibi(self.alibi)
            .with_sinks(self.sinks)
            .with_dropout(self.dropout)
            .with_deterministic(self.deterministic)
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::invalid("batch", "it must be at least 1"));
        }
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(
                "heads",
                format!("{} query heads are not a multiple of {} KV heads", self.heads, self.kv_heads),
            ));
        }
        if self.head_groups == Some(0) {
            return Err(Error::invalid("head_groups", "it must be at least 1"));
        }
        if let Some(groups) = self.head_groups.filter(|groups| *groups > self.heads) {
            let why = format!("{groups} groups of {} heads: at most as many groups as query heads", self.heads);
            return Err(Error::invalid("head_groups", why));
        }
        self.spec([0, 0]).check()
    }
}
