//! Which rows of a ring rank's block come from where.
//!
//! A ring rank attends with a *block*: the tokens that the layout gives it, then its share of the joint tokens. Before the
//! all-to-all, Ulysses rank `u` holds the `u`-th near-equal part of both.

use std::ops::Range;

use longspan_hal::{Result, Slice};

use crate::heads::near_equal;
use crate::{Coords, Layout, Mask, Run};

/// Rows of a block that one rank brings, from one of its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    /// Rows of the block.
    pub block: Range<usize>,
    /// Rows of the source: of the rank's shard, or of the (replicated) joint tensor.
    pub source: Range<usize>,
}

/// The query rows or the key rows of the whole problem.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub layout: Layout,
    pub joint: usize,
}

impl Rows {
    fn ring(&self) -> usize {
        self.layout.mesh().ring() as usize
    }

    fn ulysses(&self) -> usize {
        self.layout.mesh().ulysses() as usize
    }

    /// Joint tokens of ring rank `r`.
    fn joint_of_ring(&self, r: u32) -> Range<usize> {
        near_equal(self.joint, self.ring(), r as usize)
    }

    /// Rows of the block of ring rank `r`.
    pub fn block(&self, r: u32) -> usize {
        self.layout.ring_rows(r) + self.joint_of_ring(r).len()
    }

    /// What rank `at` brings to its block: from its shard, and from the joint tensor.
    pub fn segments(&self, at: Coords) -> [Segment; 2] {
        let part = near_equal(self.layout.ring_rows(at.ring), self.ulysses(), at.ulysses as usize);
        let of_ring = self.joint_of_ring(at.ring);
        let joint = near_equal(of_ring.len(), self.ulysses(), at.ulysses as usize);
        let behind = self.layout.ring_rows(at.ring);
        [
            Segment { block: part.clone(), source: 0..part.len() },
            Segment {
                block: behind + joint.start..behind + joint.end,
                source: of_ring.start + joint.start..of_ring.start + joint.end,
            },
        ]
    }

    /// Runs of the block of ring rank `r`; joint tokens are the positions after the sequence.
    fn runs(&self, r: u32) -> Vec<Run> {
        let joint = self.joint_of_ring(r);
        let mut runs = self.layout.ring_runs(r).to_vec();
        if !joint.is_empty() {
            runs.push(Run { start: self.layout.seq() + joint.start, len: joint.len(), step: 1 });
        }
        runs
    }
}

/// The slices of the block of ring rank `q_ring` against the block of ring rank `k_ring`.
pub(crate) fn slices(mask: &Mask, q: &Rows, q_ring: u32, k: &Rows, k_ring: u32, batch: u32) -> Result<Vec<Slice>> {
    if q.joint == 0 && k.joint == 0 {
        return mask.slices(&q.layout, q_ring, &k.layout, k_ring, batch);
    }
    // Joint tokens come with full masks only: every run against every run.
    let with_rows = |runs: Vec<Run>| {
        runs.into_iter().scan(0u32, |at, run| {
            let rows = *at..*at + run.len as u32;
            *at = rows.end;
            Some((run, rows))
        })
    };
    let keys: Vec<_> = with_rows(k.runs(k_ring)).collect();
    let mut list = Vec::new();
    for b in 0..batch {
        for (q_run, q_rows) in with_rows(q.runs(q_ring)) {
            list.extend(keys.iter().map(|(k_run, k_rows)| Slice {
                q_pos: q_run.start as i64,
                k_pos: k_run.start as i64,
                q_step: q_run.step as i64,
                k_step: k_run.step as i64,
                ..Slice::full(b, q_rows.clone(), k_rows.clone())
            }));
        }
    }
    Ok(list)
}
