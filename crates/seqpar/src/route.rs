//! Routes follow masks: which run travels when, from whom to whom.
//!
//! The unit of transfer is a run of a ring rank's K/V block. With `n(r, o, i)` true where some query of ring rank `r` sees
//! some key of run `i` of ring rank `o` (decided by interval arithmetic, see `mask.rs`):
//!
//! ```text
//! way(o, i) = Hop      if n(r, o, i) for every r:   it hops round the ring, r -> r + 1, one hop a step
//!             Direct   otherwise:                   the owner sends it to each r that needs it
//!
//! forward, ring rank r, block(t) = r - t mod R:
//!     for t in 0..R:
//!         if t > 0:  receive the Hop runs of block(t) from r - 1, its Direct runs from block(t) itself
//!                    send the Hop runs of block(t - 1) to r + 1, and asked(t), own Direct runs, to r + t
//!         attend with needed(t)
//! backward, in addition, after attending at step t > 0:
//!     send the sums of the gradients of the Hop runs of block(t) to r + 1     (home after step R - 1)
//!     send the gradients of the Direct runs of block(t) to block(t), which receives asked(t)'s from r + t
//! ```
//!
//! The owner's own gradients stay at home.
//!
//! Every rank derives its view from the same layouts and mask, so what one sends is what another expects. What no one needs
//! does not travel, and there are no empty runs.

use std::ops::Range;

use longspan_hal::{Error, Result};

use crate::layout::{Layout, Run};
use crate::mask::{Mask, Shape, width};

/// How a run gets from its owner to those who need it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Way {
    /// From the owner to each ring rank that needs it; gradients go straight home.
    Direct,
    /// Round the ring, since every ring rank needs it; sums of gradients travel behind it.
    Hop,
}

/// A run that a ring rank attends with.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Needed {
    /// Index of the run in its owner's list, [`Layout::ring_runs`].
    pub run: usize,
    /// Its rows in the owner's block.
    pub rows: Range<usize>,
    /// How it travels.
    pub way: Way,
}

/// One message between ring ranks: `(step, from, to, rows)`.
pub type Transfer = (u32, u32, u32, usize);

/// What one ring rank computes with, receives and sends at each step.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    rank: u32,
    ring: u32,
    needed: Steps,
    asked: Steps,
}

impl Route {
    /// The route of ring rank `ring_rank`: its queries lie as `q` says, keys and values as `k` says.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the layouts have unequal ring sizes, there is no such ring rank, or as [`Mask::slices`]; the
    /// same error on every ring rank.
    pub fn new(mask: &Mask, q: &Layout, k: &Layout, ring_rank: u32) -> Result<Self> {
        let ring = q.mesh().ring();
        if k.mesh().ring() != ring {
            let why = format!("queries on {ring} ring ranks, keys on {}", k.mesh().ring());
            return Err(Error::invalid("layout", why));
        }
        if ring_rank >= ring {
            return Err(Error::invalid("ring rank", format!("{ring_rank} of {ring}")));
        }
        mask.check(q.seq(), k.seq())?;
        let needs = Needs::new(mask, q, k);
        needs.check_steps()?;
        let own = needs.block(ring_rank, |_| Ok(true))?;
        let direct: Vec<Needed> = own.iter().filter(|run| run.way == Way::Direct).cloned().collect();
        let (mut needed, mut asked) = (Steps::default(), Steps::default());
        needed.push(own);
        asked.push(Vec::new());
        for step in 1..ring {
            needed.push(needs.block(before(ring_rank, step, ring), |run| needs.one(ring_rank, run))?);
            let to = after(ring_rank, step, ring);
            let mut theirs = Vec::new();
            for run in &direct {
                if needs.one(to, &k.ring_runs(ring_rank)[run.run])? {
                    theirs.push(run.clone());
                }
            }
            asked.push(theirs);
        }
        Ok(Self { rank: ring_rank, ring, needed, asked })
    }

    /// This ring rank.
    pub const fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ring ranks, and of steps.
    pub const fn ring(&self) -> u32 {
        self.ring
    }

    /// The owner of the block that this ring rank attends with at `step` (below [`Route::ring`]).
    pub const fn block(&self, step: u32) -> u32 {
        before(self.rank, step, self.ring)
    }

    /// Runs of the block of `step` that this ring rank attends with, in the owner's order. At step 0 these are all its own
    /// runs, also those that only others need.
    pub fn needed(&self, step: u32) -> &[Needed] {
        self.needed.of(step)
    }

    /// Direct runs of this ring rank's own block that ring rank `rank + step` needs: sent to it at `step`, and their gradients
    /// come back from it after `step`. None at step 0.
    pub fn asked(&self, step: u32) -> &[Needed] {
        self.asked.of(step)
    }

    /// The [`Way::Hop`] runs of [`Route::needed`].
    pub fn hops(&self, step: u32) -> impl Iterator<Item = &Needed> {
        self.needed(step).iter().filter(|run| run.way == Way::Hop)
    }

    /// The [`Way::Direct`] runs of [`Route::needed`].
    pub fn direct(&self, step: u32) -> impl Iterator<Item = &Needed> {
        self.needed(step).iter().filter(|run| run.way == Way::Direct)
    }

    /// What this ring rank sends in a forward (K/V rows), by step; one entry per receiver and step, none without rows.
    pub fn transfers(&self) -> impl Iterator<Item = Transfer> + '_ {
        (1..self.ring).flat_map(|step| {
            let hops = (self.next(), rows(self.hops(step - 1)));
            let asked = (after(self.rank, step, self.ring), rows(self.asked(step).iter()));
            self.messages(step, hops, asked)
        })
    }

    /// What this ring rank sends home in a backward (dK/dV rows), after each step but the first; one entry per receiver and
    /// step, none without rows.
    pub fn returns(&self) -> impl Iterator<Item = Transfer> + '_ {
        (1..self.ring).flat_map(|step| {
            let (hops, direct) = (rows(self.hops(step)), rows(self.direct(step)));
            self.messages(step, (self.next(), hops), (self.block(step), direct))
        })
    }

    /// Two messages, as one if they have the same receiver.
    fn messages(&self, step: u32, a: (u32, usize), b: (u32, usize)) -> impl Iterator<Item = Transfer> + use<> {
        let (a, b) = if a.0 == b.0 { ((a.0, a.1 + b.1), (b.0, 0)) } else { (a, b) };
        let from = self.rank;
        [a, b].into_iter().filter(|&(_, rows)| rows > 0).map(move |(to, rows)| (step, from, to, rows))
    }

    const fn next(&self) -> u32 {
        after(self.rank, 1, self.ring)
    }
}

fn rows<'a>(runs: impl Iterator<Item = &'a Needed>) -> usize {
    runs.map(|run| run.rows.len()).sum()
}

/// `rank + step` round a ring; `step` is below `ring`.
const fn after(rank: u32, step: u32, ring: u32) -> u32 {
    ((rank as u64 + step as u64) % ring as u64) as u32
}

/// `rank - step` round a ring; `step` is below `ring`.
const fn before(rank: u32, step: u32, ring: u32) -> u32 {
    after(rank, ring - step, ring)
}

/// A list of runs per step, one behind the other.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Steps {
    runs: Vec<Needed>,
    ends: Vec<usize>,
}

impl Steps {
    fn push(&mut self, runs: Vec<Needed>) {
        self.runs.extend(runs);
        self.ends.push(self.runs.len());
    }

    fn of(&self, step: u32) -> &[Needed] {
        let step = step as usize;
        let Some(&end) = self.ends.get(step) else {
            return &[];
        };
        let start = if step == 0 { 0 } else { self.ends[step - 1] };
        &self.runs[start..end]
    }
}

/// Answers who needs a run.
struct Needs<'a> {
    mask: &'a Mask,
    q: &'a Layout,
    k: &'a Layout,
    /// Whether every ring rank has a query.
    all_have_queries: bool,
    /// The least of the ring ranks' last queries.
    least_last: i64,
    /// The greatest of the ring ranks' first queries.
    greatest_first: i64,
    /// Every ring rank has a query among any `spread` neighbouring positions (if all have queries).
    spread: i64,
}

impl<'a> Needs<'a> {
    fn new(mask: &'a Mask, q: &'a Layout, k: &'a Layout) -> Self {
        let rings = || (0..q.mesh().ring()).map(|ring| q.ring_runs(ring));
        let last = |runs: &[Run]| runs.iter().map(|run| run.position(run.len - 1) as i64).max();
        let first = |runs: &[Run]| runs.iter().map(|run| run.start as i64).min();
        // The run that comes nearest to everything: its longest way to the start, between neighbours, and to the end.
        let gap = |run: &Run| run.step.max(run.start + 1).max(q.seq() - run.position(run.len - 1)) as i64;
        let spread = |runs: &[Run]| runs.iter().map(gap).min();
        Self {
            mask,
            q,
            k,
            all_have_queries: rings().all(|runs| !runs.is_empty()),
            least_last: rings().filter_map(last).min().unwrap_or(0),
            greatest_first: rings().filter_map(first).max().unwrap_or(0),
            spread: rings().filter_map(spread).max().unwrap_or(0),
        }
    }

    /// The runs of `owner`'s block that are `wanted`, with their ways.
    fn block(&self, owner: u32, wanted: impl Fn(&Run) -> Result<bool>) -> Result<Vec<Needed>> {
        let mut block = Vec::new();
        for (n, run) in self.k.ring_runs(owner).iter().enumerate() {
            if wanted(run)? {
                let way = if self.all(owner, run)? { Way::Hop } else { Way::Direct };
                block.push(Needed { run: n, rows: self.k.run_rows(owner, n), way });
            }
        }
        Ok(block)
    }

    /// Whether ring rank `ring` needs `run`.
    fn one(&self, ring: u32, run: &Run) -> Result<bool> {
        for queries in self.q.ring_runs(ring) {
            if self.mask.selects(queries, run)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether every ring rank needs `run`.
    ///
    /// The queries that see a key of the run lie between two positions. Ring ranks that have none there show up in two
    /// comparisons, and often it is as plain that all have one. Otherwise all are asked; most likely not to need the
    /// run are the ends of the ring and, under a window, the owner's neighbours.
    fn all(&self, owner: u32, run: &Run) -> Result<bool> {
        let documents = self.mask.documents();
        let of = |token| documents.map_or(0, |documents| documents.of(token));
        let seen = |i| self.seen(run, documents.map_or(0..self.q.seq(), |documents| documents.range(i)));
        let (head, tail) = (of(run.start), of(run.position(run.len - 1)));
        if !self.all_have_queries || self.least_last < seen(head).from || self.greatest_first > seen(tail).to {
            return Ok(false);
        }
        if (head..=tail).take(8).any(|i| self.reaches_all(&seen(i))) {
            return Ok(true);
        }
        let ring = self.q.mesh().ring();
        let around = (0..=ring / 2).map(|step| [before(owner, step, ring), after(owner, step, ring)]);
        for rank in [[0, ring - 1]].into_iter().chain(around).flatten() {
            if !self.one(rank, run)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether it is plain that every ring rank has one of these queries (it may say no although they have).
    fn reaches_all(&self, seen: &Seen) -> bool {
        let to_the_start = seen.from <= 0 && self.greatest_first <= seen.to;
        let to_the_end = seen.to >= self.q.seq() as i64 - 1 && self.least_last >= seen.from;
        seen.dense && (to_the_start || to_the_end || seen.to - seen.from + 1 >= self.spread)
    }

    /// Where the queries lie that see a key that `run` has in `document`.
    fn seen(&self, run: &Run, document: Range<usize>) -> Seen {
        let below = |token: usize| token.saturating_sub(run.start).div_ceil(run.step).min(run.len);
        let keys = below(document.start)..below(document.end);
        let (from, to) = (document.start as i64, document.end as i64 - 1);
        if keys.is_empty() {
            return Seen { from, to, dense: false };
        }
        let (first, last) = (run.position(keys.start) as i64, run.position(keys.end - 1) as i64);
        let (left, right) = match self.mask.shape() {
            Shape::Full => (None, None),
            Shape::Prefix(keys) if first < from.saturating_add(width(keys)) => (None, None),
            Shape::Causal | Shape::Prefix(_) => (None, Some(0)),
            Shape::Window { left, right } => (left.map(width), right.map(width)),
        };
        let dense = match (left, right) {
            (Some(left), Some(right)) => run.step as i64 <= left + right + 1,
            _ => true,
        };
        let (from, to) = (right.map_or(from, |r| from.max(first - r)), left.map_or(to, |l| to.min(last + l)));
        Seen { from, to, dense }
    }

    /// Asks about every pair of blocks where unequal steps could be refused, so that either all ring ranks refuse or none.
    fn check_steps(&self) -> Result<()> {
        let rings = 0..self.q.mesh().ring();
        let long = |layout: &'a Layout| rings.clone().flat_map(|ring| layout.ring_runs(ring)).filter(|run| run.len > 1);
        let mut steps = long(self.q).chain(long(self.k)).map(|run| run.step);
        let one = steps.next();
        if self.mask.shape() == Shape::Full || steps.all(|step| Some(step) == one) {
            return Ok(());
        }
        for q in rings.clone() {
            for k in rings.clone() {
                self.mask.slices(self.q, q, self.k, k, 1)?;
            }
        }
        Ok(())
    }
}

/// The queries that see a key of one run.
struct Seen {
    /// None lies before.
    from: i64,
    /// None lies behind.
    to: i64,
    /// Whether every query from `from` to `to` does.
    dense: bool,
}
