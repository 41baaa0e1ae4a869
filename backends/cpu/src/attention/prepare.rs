//! What the backward needs of each row before it starts, and sums of gradients.
//!
//! ```text
//! delta   = rowsum(dout * out) - dlse                                 (Dao, "FlashAttention-2", section 2.3.2)
//! dsink_h = -sum over batch rows and rows of exp(sink_h - lse) delta  summed per block of rows, then blocks in order
//! into    = round(((t0 + t1) + t2) + ...)
//! ```

use std::sync::atomic::{AtomicU32, Ordering};

use super::BLOCK;
use super::pack::{Tensor, each};
use super::simd::Kernels;

/// One call of `backward_prepare` on memory.
#[derive(Debug)]
pub(super) struct Prepare {
    pub kernels: &'static Kernels,
    /// Global index of local head 0.
    pub head_first: usize,
    pub out: Tensor,
    pub dout: Tensor,
    pub lse: Tensor,
    pub dlse: Option<Tensor>,
    pub delta: Tensor,
    /// Logits, and their gradient.
    pub sinks: Option<[Tensor; 2]>,
}

impl Prepare {
    /// Computes the call.
    pub fn run(&self) {
        let [batch, rows, heads, dim] = self.out.extent();
        let blocks = batch * rows.div_ceil(BLOCK);
        // dsinks of each block, as bits: every place is written by one task.
        let sums: Vec<AtomicU32> = (0..blocks * heads).map(|_| AtomicU32::new(0)).collect();
        each(blocks, |i, scratch| {
            let [x, y] = scratch.parts([dim, dim]);
            let (b, from) = (i % batch, i / batch * BLOCK);
            for h in 0..heads {
                let part = (from..(from + BLOCK).min(rows)).fold(0.0, |sum, row| sum + self.row([b, row, h], x, y));
                sums[i * heads + h].store(part.to_bits(), Ordering::Relaxed);
            }
        });
        if let Some([_, dsinks]) = self.sinks {
            for h in 0..heads {
                let parts = (0..blocks).map(|i| f64::from(f32::from_bits(sums[i * heads + h].load(Ordering::Relaxed))));
                dsinks.set([0, 0, h], parts.sum::<f64>() as f32);
            }
        }
    }

    /// Stores delta of a row; its part of dsink.
    fn row(&self, at: [usize; 3], x: &mut [f32], y: &mut [f32]) -> f32 {
        let dim = self.out.extent()[3];
        self.out.load(self.kernels, at, x);
        self.dout.load(self.kernels, at, y);
        let delta = self.kernels.dot(&x[..dim], &y[..dim]) - self.dlse.map_or(0.0, |t| t.get(at));
        self.delta.set(at, delta);
        let Some([logits, _]) = self.sinks else { return 0.0 };
        let (sink, lse) = (logits.get([0, 0, self.head_first + at[2]]), self.lse.get(at));
        // A row that saw nothing, with a sink of -inf, has lse = -inf and contributes nothing.
        if lse == f32::NEG_INFINITY { 0.0 } else { -(sink - lse).exp() * delta }
    }
}

/// Sums `terms` into `into`, which may be one of them.
pub(super) fn accumulate(kernels: &'static Kernels, into: Tensor, terms: &[Tensor]) {
    let [batch, rows, heads, dim] = into.extent();
    each(batch * rows.div_ceil(BLOCK), |i, scratch| {
        let [sum, term] = scratch.parts([dim, dim]);
        let (b, from) = (i % batch, i / batch * BLOCK);
        for row in from..(from + BLOCK).min(rows) {
            for h in 0..heads {
                for (n, t) in terms.iter().enumerate() {
                    if n == 0 {
                        t.load(kernels, [b, row, h], sum);
                    } else {
                        t.load(kernels, [b, row, h], term);
                        kernels.add(&mut sum[..dim], &term[..dim]);
                    }
                }
                into.store([b, row, h], sum);
            }
        }
    });
}
