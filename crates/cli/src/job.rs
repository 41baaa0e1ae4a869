//! A run, made from the command line: every check that needs no device is done here, before anything starts.

use longspan::{DType, Documents, Error, Layout, Mask, Mesh, Problem, Tensor, head_groups};

use crate::args::{Cut, LayoutKind, MOST_RANKS, Options, Run};
use crate::failure::{Failure, Result};
use crate::file::{self, Input};
use crate::synthetic::{self, Shape, Stream};

/// Tensors, cut and options of a run; they fit each other.
#[derive(Clone, Debug)]
pub struct Job {
    /// Queries, `[batch, seq, heads, head_dim]`.
    pub q: Tensor,
    /// Keys, `[batch, k_seq, kv_heads, head_dim]`.
    pub k: Tensor,
    /// Values, `[batch, k_seq, kv_heads, head_dim_v]`.
    pub v: Tensor,
    /// Gradient of the output, `[batch, seq, heads, head_dim_v]`, where gradients are wanted.
    pub dout: Option<Tensor>,
    /// Sink logits, one per head.
    pub sinks: Option<Vec<f32>>,
    /// ALiBi slopes, one per head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Which rank holds which query.
    pub q_layout: Layout,
    /// Which rank holds which key.
    pub k_layout: Layout,
    /// Factor on the dot product.
    pub scale: f32,
    /// `c` of `c * tanh(x / c)`.
    pub softcap: Option<f32>,
    /// Dropout probability.
    pub dropout: Option<f32>,
    /// Seed of dropout.
    pub seed: u64,
    /// Whether results are to be bitwise reproducible.
    pub deterministic: bool,
    /// Head groups of the all-to-all, where they are not left to the plan.
    pub head_groups: Option<usize>,
}

impl Job {
    /// Reads or draws the tensors and checks everything against everything.
    ///
    /// # Errors
    /// [`Failure::Input`] saying what does not fit; [`Failure::Run`] if there is no memory for the tensors.
    pub fn new(args: &Run) -> Result<Self> {
        let mesh = Mesh::new(args.cut.ulysses, args.cut.ring, args.cut.placement)?;
        at_most(MOST_RANKS, &mesh)?;
        let input = match (&args.source.input, &args.source.synthetic) {
            (Some(path), _) => cast(file::read(path)?, args.dtype.map(DType::from))?,
            (None, Some(shape)) => draw(shape, args.dtype.map_or(DType::F32, DType::from), args.seed)?,
            (None, None) => return Err(Failure::Input("--input or --synthetic is needed".into())),
        };
        let [seq, k_seq, heads] = [input.q.extent()[1], input.k.extent()[1], input.q.extent()[2]];
        let mask = mask(&args.cut, input.cu_seqlens.as_deref(), seq)?;
        mask.check(seq, k_seq)?;
        let Options { scale, softcap, alibi, sinks, dropout, deterministic, head_groups } = args.options;
        let job = Self {
            dout: if args.backward { Some(dout(&input, args.seed)?) } else { None },
            sinks: match input.sinks {
                None if sinks => Some(synthetic::sinks(heads, args.seed)?),
                given => given,
            },
            alibi_slopes: input.alibi_slopes.or_else(|| alibi.then(|| default_slopes(heads))),
            q_layout: layout(args.cut.layout, seq, &mesh),
            k_layout: layout(args.cut.layout, k_seq, &mesh),
            scale: scale.unwrap_or_else(|| 1.0 / (input.q.extent()[3] as f32).sqrt()),
            q: input.q,
            k: input.k,
            v: input.v,
            mask,
            softcap,
            dropout,
            seed: args.seed,
            deterministic,
            head_groups: head_groups.map(|n| n as usize),
        };
        job.problem().check()?;
        Ok(job)
    }

    /// Shapes and options.
    pub fn problem(&self) -> Problem {
        let [batch, _, heads, head_dim] = self.q.extent();
        Problem::new(self.dtype(), batch, [heads, self.kv_heads()], head_dim)
            .with_head_dim_v(self.v.extent()[3])
            .with_scale(self.scale)
            .with_softcap(self.softcap)
            .with_alibi(self.alibi_slopes.is_some())
            .with_sinks(self.sinks.is_some())
            .with_dropout(self.dropout)
            .with_deterministic(self.deterministic)
            .with_head_groups(self.head_groups)
            .with_backward(self.dout.is_some())
    }

    /// Element type of q, k, v, out and their gradients.
    pub fn dtype(&self) -> DType {
        self.q.dtype()
    }

    /// Batch rows.
    pub fn batch(&self) -> usize {
        self.q.extent()[0]
    }

    /// Query tokens.
    pub fn seq(&self) -> usize {
        self.q.extent()[1]
    }

    /// Query heads.
    pub fn heads(&self) -> usize {
        self.q.extent()[2]
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.k.extent()[2]
    }

    /// Head groups of the all-to-all, given or chosen.
    pub fn head_groups(&self) -> usize {
        head_groups(&self.problem(), self.q_layout.mesh(), [self.seq(), self.k_layout.seq()], &self.mask)
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads() / self.kv_heads()
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        self.q_layout.mesh()
    }
}

/// Checks that `mesh` has at most `most` ranks.
///
/// # Errors
/// [`Error::Invalid`] if it has more.
pub fn at_most(most: u32, mesh: &Mesh) -> Result<(), Error> {
    match mesh.size() {
        size if size > most => Err(Error::invalid("mesh", format!("{size} ranks; {most} is the most here"))),
        _ => Ok(()),
    }
}

/// Tokens, unless they or documents are given.
const SEQ: usize = 64;

/// Tokens to lay out: as many as were given, or as documents have, or a few.
pub fn tokens(seq: Option<usize>, documents: Option<&[i32]>) -> usize {
    let end = documents.and_then(|cu| usize::try_from(*cu.last()?).ok());
    seq.or(end).unwrap_or(SEQ)
}

/// The layout of `kind`.
pub fn layout(kind: LayoutKind, seq: usize, mesh: &Mesh) -> Layout {
    match kind {
        LayoutKind::Contiguous => Layout::contiguous(seq, mesh),
        LayoutKind::Stripe => Layout::stripe(seq, mesh),
        LayoutKind::Zigzag => Layout::zigzag(seq, mesh),
    }
}

/// The mask, with packed documents where there are any.
///
/// # Errors
/// [`Error::Invalid`] if the documents do not cover the sequence.
pub fn mask(cut: &Cut, cu_seqlens: Option<&[i32]>, seq: usize) -> Result<Mask, Error> {
    let mask = cut.mask.clone();
    match cu_seqlens {
        Some(cu) => Ok(mask.with_documents(Documents::from_cu_seqlens(cu, seq)?)),
        None => Ok(mask),
    }
}

fn cast(input: Input, dtype: Option<DType>) -> Result<Input> {
    let Some(dtype) = dtype else { return Ok(input) };
    let one = |tensor: Tensor| match tensor.dtype() == dtype {
        true => Ok(tensor),
        false => Tensor::from_f32(dtype, tensor.extent(), &tensor.to_f32()),
    };
    Ok(Input { q: one(input.q)?, k: one(input.k)?, v: one(input.v)?, dout: input.dout.map(one).transpose()?, ..input })
}

fn draw(shape: &Shape, dtype: DType, seed: u64) -> Result<Input> {
    let &Shape { batch, seq, heads, kv_heads, head_dim, head_dim_v } = shape;
    let one = |dims: [usize; 4], stream| synthetic::tensor(dtype, dims, seed, stream);
    Ok(Input {
        q: one([batch, seq, heads, head_dim], Stream::Q)?,
        k: one([batch, seq, kv_heads, head_dim], Stream::K)?,
        v: one([batch, seq, kv_heads, head_dim_v], Stream::V)?,
        dout: None,
        sinks: None,
        alibi_slopes: None,
        cu_seqlens: None,
    })
}

fn dout(input: &Input, seed: u64) -> Result<Tensor> {
    let [batch, seq, heads, _] = input.q.extent();
    match &input.dout {
        Some(dout) => Ok(dout.clone()),
        None => synthetic::tensor(input.q.dtype(), [batch, seq, heads, input.v.extent()[3]], seed, Stream::Dout),
    }
}

/// `2^(-8 (h + 1) / heads)` (Press, Smith, Lewis, "Train short, test long", section 3, for powers of two; the same series
/// for other numbers of heads).
pub(crate) fn default_slopes(heads: usize) -> Vec<f32> {
    (1..=heads).map(|h| (-8.0 * h as f32 / heads as f32).exp2()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_the_published_ones_for_eight_heads() {
        assert_eq!(default_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
    }
}
