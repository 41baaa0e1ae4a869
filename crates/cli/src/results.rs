//! What a run gives back: gathered results, and figures of each rank.

use std::time::Duration;

use longspan::{DType, DeviceReport, Tensor, Traffic};
use longspan_conformance::host;
use safetensors::tensor::Dtype;

use crate::output::Entry;

/// Gathered results of a run.
#[derive(Clone, Debug)]
pub struct Results {
    /// `[batch, seq, heads, head_dim_v]`.
    pub out: Tensor,
    /// Natural-log sum, f32 `[batch, seq, heads, 1]`.
    pub lse: Tensor,
    /// With a backward.
    pub gradients: Option<Gradients>,
    /// Figures by rank.
    pub ranks: Vec<RankFigures>,
    /// What the ranks did when, where it was wanted.
    pub recorded: Option<Recorded>,
}

/// What the ranks did when.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Reports by rank.
    pub reports: Vec<DeviceReport>,
    /// Messages that each rank sent in the forward and in the backward.
    pub traffic: Vec<[Vec<Traffic>; 2]>,
}

/// Gathered gradients.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// As q.
    pub dq: Tensor,
    /// As k.
    pub dk: Tensor,
    /// As v.
    pub dv: Tensor,
    /// One per head, with sinks.
    pub dsinks: Option<Vec<f32>>,
}

/// What one rank did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankFigures {
    /// Query rows that it holds.
    pub rows: usize,
    /// Time in attention and sums.
    pub compute: Duration,
    /// Time in exchanges.
    pub exchange: Duration,
    /// Bytes that it sent to other ranks.
    pub sent: u64,
    /// Bytes that the route table says it sends.
    pub table: u64,
    /// Most bytes of workspace that it had allocated at once.
    pub peak: u64,
    /// Bytes of workspace that were predicted before the run.
    pub predicted: u64,
}

impl RankFigures {
    /// How many numbers there are.
    pub const NUMBERS: usize = 7;

    /// All of them, for another process; times in nanoseconds.
    pub fn numbers(&self) -> [u64; Self::NUMBERS] {
        let Self { rows, compute, exchange, sent, table, peak, predicted } = *self;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        [rows as u64, nanos(compute), nanos(exchange), sent, table, peak, predicted]
    }

    /// Those that [`RankFigures::numbers`] gave.
    pub fn of([rows, compute, exchange, sent, table, peak, predicted]: [u64; Self::NUMBERS]) -> Self {
        let [compute, exchange] = [compute, exchange].map(Duration::from_nanos);
        Self { rows: rows as usize, compute, exchange, sent, table, peak, predicted }
    }
}

/// The bytes of lse and dsinks as they stand in a file.
#[derive(Clone, Debug)]
pub struct Encoded {
    lse: Vec<u8>,
    dsinks: Option<Vec<u8>>,
}

impl Results {
    /// lse as `[batch, heads, seq]` and dsinks, encoded.
    pub fn encode(&self) -> Encoded {
        let [batch, seq, heads, _] = self.lse.extent();
        let values = self.lse.to_f32();
        let at = |b: usize, h: usize, s: usize| values[(b * seq + s) * heads + h];
        let rows = (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h)));
        let turned = rows.flat_map(|(b, h)| (0..seq).map(move |s| (b, h, s))).map(|(b, h, s)| at(b, h, s));
        let dsinks = self.gradients.as_ref().and_then(|g| g.dsinks.as_deref());
        Encoded {
            lse: host::encode(DType::F32, turned),
            dsinks: dsinks.map(|d| host::encode(DType::F32, d.iter().copied())),
        }
    }

    /// The tensors of the output file.
    pub fn entries<'a>(&'a self, encoded: &'a Encoded) -> Vec<Entry<'a>> {
        let [batch, seq, heads, _] = self.lse.extent();
        let mut entries = vec![
            entry("out", &self.out),
            Entry { name: "lse", dtype: Dtype::F32, shape: vec![batch, heads, seq], bytes: &encoded.lse },
        ];
        if let Some(g) = &self.gradients {
            entries.extend([entry("dq", &g.dq), entry("dk", &g.dk), entry("dv", &g.dv)]);
        }
        if let Some(bytes) = &encoded.dsinks {
            entries.push(Entry { name: "dsinks", dtype: Dtype::F32, shape: vec![heads], bytes });
        }
        entries
    }
}

fn entry<'a>(name: &'static str, tensor: &'a Tensor) -> Entry<'a> {
    let dtype = match tensor.dtype() {
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    };
    Entry { name, dtype, shape: tensor.extent().to_vec(), bytes: tensor.bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_back_from_their_numbers() {
        let figures = RankFigures::of([1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((figures.rows, figures.exchange, figures.predicted), (1, Duration::from_nanos(3), 7));
        assert_eq!(RankFigures::of(figures.numbers()), figures);
    }

    #[test]
    fn lse_is_turned_to_batch_heads_seq() {
        let lse = Tensor::from_f32(DType::F32, [1, 2, 3, 1], &[0.0, 1.0, 2.0, 10.0, 11.0, 12.0]).expect("six");
        let out = Tensor::from_f32(DType::F32, [1, 2, 3, 1], &[0.0; 6]).expect("six");
        let results = Results { out, lse, gradients: None, ranks: vec![], recorded: None };
        let encoded = results.encode();
        let entries = results.entries(&encoded);
        assert_eq!(entries[1].shape, [1, 3, 2]);
        assert_eq!(host::decode(DType::F32, entries[1].bytes), [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
    }
}
