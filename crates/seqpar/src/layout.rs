//! Who holds which token: a bijection `token <-> (rank, slot)`, made of runs.
//!
//! A [`Run`] is an arithmetic progression of global positions, `start + step * i`. Each *ring rank* holds a list of runs, and
//! the lists of all ring ranks name every token of the sequence once:
//!
//! ```text
//! contiguous   the sequence in R chunks;   ring rank r holds chunk r
//! zigzag       the sequence in 2R chunks;  ring rank r holds chunks r and 2R - 1 - r   (equal causal work)
//! stripe       ring rank r holds r, r + R, r + 2R, ...
//! ```
//!
//! Chunks are near equal: `len = q * parts + rem` gives the first `rem` parts one more. A ring rank's list is cut once more,
//! in order, into U near-equal parts: Ulysses rank u holds part u before the all-to-all and all U parts, that is the ring
//! rank's block, after it. So with `rows` counted along a ring rank's list:
//!
//! ```text
//! token(rank, slot):  row = part(rank).start + slot;  find the run of the row;  start + step * (row - first row of the run)
//! locate(token):      find the run with  start <= token < start + step * len  and  token = start mod step;  row, part, slot
//! ```
//!
//! Any length works, also one that is shorter than the number of ranks: some ranks are then empty.

use std::ops::Range;

use longspan_hal::{Error, Result};

use crate::mask::Documents;
use crate::mesh::{Coords, Mesh};

/// Tokens `start, start + step, ...`, `len` of them.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Run {
    /// Global position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Distance of neighbours in global positions.
    pub step: usize,
}

impl Run {
    /// Global position of token `i` of the run.
    pub const fn position(&self, i: usize) -> usize {
        self.start + self.step * i
    }

    /// Global positions of all tokens.
    pub fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let run = *self;
        (0..run.len).map(move |i| run.position(i))
    }

    /// Tokens `rows` of the run.
    pub(crate) const fn cut(&self, rows: &Range<usize>) -> Self {
        Self { start: self.position(rows.start), len: rows.end - rows.start, step: self.step }
    }
}

/// Part `i` of `parts` near-equal parts of `len` things: in order, the remainder goes to the first parts.
///
/// Sequences, blocks and heads are all cut by this rule. `parts` must not be 0, and `i` is below it.
pub const fn near_equal(len: usize, parts: usize, i: usize) -> Range<usize> {
    let (each, more) = (len / parts, len % parts);
    let start = each * i + if i < more { i } else { more };
    start..start + each + (i < more) as usize
}

/// A bijection between the tokens of a sequence and the slots of the ranks of a [`Mesh`].
///
/// Ranks that are not in the mesh hold nothing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    seq: usize,
    mesh: Mesh,
    kind: &'static str,
    /// Runs of all ring ranks, one list behind the other; none is empty.
    runs: Vec<Run>,
    /// Per run: its first row in the block of its ring rank.
    row: Vec<usize>,
    /// Per ring rank: its first run; one more entry at the end.
    first: Vec<usize>,
    /// Per ring rank: rows of its block.
    rows: Vec<usize>,
    /// Runs ordered so that the run of a token is found by bisection.
    index: Vec<Entry>,
    /// The distinct steps of `index`.
    steps: Vec<usize>,
}

impl Layout {
    /// Ring rank r holds chunk r of R.
    pub fn contiguous(seq: usize, mesh: &Mesh) -> Self {
        let parts = mesh.ring() as usize;
        Self::collect(seq, mesh, "contiguous", (0..parts).map(|r| [chunk(seq, parts, r)]))
    }

    /// Ring rank r holds chunks r and 2R - 1 - r of 2R: under a causal mask all ring ranks compute equally many pairs.
    pub fn zigzag(seq: usize, mesh: &Mesh) -> Self {
        let (parts, last) = (2 * mesh.ring() as usize, 2 * mesh.ring() as usize - 1);
        let pair = |r| [chunk(seq, parts, r), chunk(seq, parts, last - r)];
        Self::collect(seq, mesh, "zigzag", (0..parts / 2).map(pair))
    }

    /// Ring rank r holds tokens r, r + R, r + 2R, ...
    pub fn stripe(seq: usize, mesh: &Mesh) -> Self {
        let step = mesh.ring() as usize;
        let stripe = |r| [Run { start: r, len: near_equal(seq, step, r).len(), step }];
        Self::collect(seq, mesh, "stripe", (0..step).map(stripe))
    }

    /// Ring rank r holds the runs `lists[r]`, in order. Empty runs are left out, and the step of a run of one token is 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one list per ring rank, a run leaves the sequence, or a token (which is named) is
    /// missing or held twice.
    pub fn from_runs(seq: usize, mesh: &Mesh, lists: Vec<Vec<Run>>) -> Result<Self> {
        if lists.len() != mesh.ring() as usize {
            let why = format!("{} lists of runs for {} ring ranks", lists.len(), mesh.ring());
            return Err(Error::invalid("layout", why));
        }
        check_bijection(seq, &lists)?;
        Ok(Self::collect(seq, mesh, "custom", lists))
    }

    /// Lists that are a bijection, one per ring rank.
    fn collect<L>(seq: usize, mesh: &Mesh, kind: &'static str, lists: impl IntoIterator<Item = L>) -> Self
    where
        L: IntoIterator<Item = Run>,
    {
        let (mut runs, mut row, mut first, mut rows) = (Vec::new(), Vec::new(), vec![0], Vec::new());
        for list in lists {
            let mut held = 0;
            for mut run in list.into_iter().filter(|run| run.len > 0) {
                run.step = if run.len == 1 { 1 } else { run.step };
                row.push(held);
                held += run.len;
                runs.push(run);
            }
            rows.push(held);
            first.push(runs.len());
        }
        let index = index(&runs, &first);
        let mut steps: Vec<usize> = index.iter().map(|entry| entry.step).collect();
        steps.dedup();
        Self { seq, mesh: *mesh, kind, runs, row, first, rows, index, steps }
    }

    /// Number of tokens.
    pub const fn seq(&self) -> usize {
        self.seq
    }

    /// The mesh whose ranks hold the tokens.
    pub const fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// `contiguous`, `zigzag`, `stripe` or `custom`.
    pub const fn kind(&self) -> &'static str {
        self.kind
    }

    /// Runs of ring rank `ring`, in the order in which its block holds them. None is empty.
    pub fn ring_runs(&self, ring: u32) -> &[Run] {
        self.runs.get(self.runs_of(ring)).unwrap_or_default()
    }

    /// Rows of run `run` of ring rank `ring` in its block; empty if there is no such run.
    pub fn run_rows(&self, ring: u32, run: usize) -> Range<usize> {
        let at = self.runs_of(ring);
        match self.ring_runs(ring).get(run) {
            Some(r) => self.row[at.start + run]..self.row[at.start + run] + r.len,
            None => 0..0,
        }
    }

    /// Rows of the block that ring rank `ring` attends with: those of all its Ulysses ranks.
    pub fn ring_rows(&self, ring: u32) -> usize {
        self.rows.get(ring as usize).copied().unwrap_or(0)
    }

    /// Rows of the largest block.
    pub fn max_ring_rows(&self) -> usize {
        self.rows.iter().copied().max().unwrap_or(0)
    }

    /// Rows of its ring rank's block that `rank` holds before the all-to-all.
    pub fn part(&self, rank: u32) -> Range<usize> {
        self.part_at(self.mesh.coords(rank))
    }

    /// [`Layout::part`] of the rank at `at`.
    pub fn part_at(&self, at: Coords) -> Range<usize> {
        near_equal(self.ring_rows(at.ring), self.mesh.ulysses() as usize, at.ulysses as usize)
    }

    /// Runs that `rank` holds, in the order of its slots. None is empty.
    pub fn runs(&self, rank: u32) -> Vec<Run> {
        let ring = self.mesh.coords(rank).ring;
        let rows = self.part(rank);
        let at = self.runs_of(ring);
        // The last run that starts at or before the first row.
        let skip = self.row[at.clone()].partition_point(|&row| row <= rows.start).saturating_sub(1);
        let held = at.start + skip..at.end;
        let cuts = held.map(|n| {
            let (run, row) = (self.runs[n], self.row[n]);
            let within = |x: usize| x.clamp(row, row + run.len) - row;
            run.cut(&(within(rows.start)..within(rows.end)))
        });
        cuts.take_while(|run| run.len > 0).collect()
    }

    /// Number of tokens that `rank` holds.
    pub fn rows(&self, rank: u32) -> usize {
        self.part(rank).len()
    }

    /// Global positions of the tokens of `rank`, by slot: position ids for RoPE.
    pub fn positions(&self, rank: u32) -> Vec<usize> {
        self.runs(rank).iter().flat_map(Run::positions).collect()
    }

    /// Positions of the tokens of `rank` within their documents, by slot: position ids that restart with each document.
    /// `documents` covers the sequence.
    pub fn document_positions(&self, rank: u32, documents: &Documents) -> Vec<usize> {
        let within = |token| token - documents.range(documents.of(token)).start;
        self.runs(rank).iter().flat_map(Run::positions).map(within).collect()
    }

    /// The rank and the slot that hold `token`. A token behind the sequence's end has rank `mesh().size()`, which is none.
    pub fn locate(&self, token: usize) -> (u32, usize) {
        let found = self.steps.iter().find_map(|&step| {
            let key = (step, token % step, token);
            let entry = self.index.get(self.index.partition_point(|e| e.key() <= key).checked_sub(1)?)?;
            if (entry.step, entry.residue) != (step, key.1) {
                return None;
            }
            let i = (token - entry.start) / step;
            (i < self.runs[entry.run].len).then(|| self.seat(entry.ring, self.row[entry.run] + i))
        });
        found.unwrap_or((self.mesh.size(), 0))
    }

    /// The rank and the slot of row `row` of the block of ring rank `ring`.
    fn seat(&self, ring: u32, row: usize) -> (u32, usize) {
        let parts = self.mesh.ulysses() as usize;
        let (each, more) = (self.ring_rows(ring) / parts, self.ring_rows(ring) % parts);
        let larger = more * (each + 1);
        let ulysses = if row < larger { row / (each + 1) } else { more + (row - larger) / each };
        let at = Coords { ring, ulysses: ulysses as u32 };
        (self.mesh.rank(at), row - self.part_at(at).start)
    }

    /// The token in slot `slot` of `rank`, if there is such a slot.
    pub fn token(&self, rank: u32, slot: usize) -> Option<usize> {
        if rank >= self.mesh.size() || slot >= self.rows(rank) {
            return None;
        }
        let (row, at) = (self.part(rank).start + slot, self.runs_of(self.mesh.coords(rank).ring));
        let n = at.start + self.row[at].partition_point(|&first| first <= row) - 1;
        Some(self.runs[n].position(row - self.row[n]))
    }

    /// The part of a global tensor that `rank` holds: from dense `[batch, seq, row]` to dense `[batch, rows(rank), row]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such rank or the tensor's length is wrong.
    pub fn shard<T: Copy>(&self, rank: u32, global: &[T], batch: usize, row: usize) -> Result<Vec<T>> {
        self.check_rank(rank)?;
        check_len("global tensor", global.len(), [batch, self.seq, row])?;
        let runs = self.runs(rank);
        let mut shard = Vec::with_capacity(batch * self.rows(rank) * row);
        for b in 0..batch {
            for run in &runs {
                let tokens = |first: usize, n: usize| &global[(b * self.seq + first) * row..][..n * row];
                if run.step == 1 {
                    shard.extend_from_slice(tokens(run.start, run.len));
                } else {
                    run.positions().for_each(|token| shard.extend_from_slice(tokens(token, 1)));
                }
            }
        }
        Ok(shard)
    }

    /// The global tensor, dense `[batch, seq, row]`, from the shards of all ranks, each dense `[batch, rows(rank), row]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one shard per rank or the length of one is wrong.
    pub fn unshard<T: Copy + Default>(&self, shards: &[Vec<T>], batch: usize, row: usize) -> Result<Vec<T>> {
        if shards.len() != self.mesh.size() as usize {
            let why = format!("{} shards for {} ranks", shards.len(), self.mesh.size());
            return Err(Error::invalid("shards", why));
        }
        for (rank, shard) in (0..).zip(shards) {
            check_len("shard", shard.len(), [batch, self.rows(rank), row])?;
        }
        let mut global = vec![T::default(); batch * self.seq * row];
        for (rank, shard) in (0..).zip(shards) {
            let (runs, mut rest) = (self.runs(rank), shard.as_slice());
            for b in 0..batch {
                for run in &runs {
                    let (count, each) = if run.step == 1 { (1, run.len) } else { (run.len, 1) };
                    for i in 0..count {
                        let (tokens, behind) = rest.split_at(each * row);
                        let at = (b * self.seq + run.position(i)) * row;
                        global[at..at + each * row].copy_from_slice(tokens);
                        rest = behind;
                    }
                }
            }
        }
        Ok(global)
    }

    fn check_rank(&self, rank: u32) -> Result<()> {
        if rank >= self.mesh.size() {
            return Err(Error::invalid("rank", format!("{rank} of {}", self.mesh.size())));
        }
        Ok(())
    }

    /// Indices into `runs` of the runs of ring rank `ring`.
    fn runs_of(&self, ring: u32) -> Range<usize> {
        match self.first.get(ring as usize..).unwrap_or_default() {
            [first, next, ..] => *first..*next,
            _ => self.runs.len()..self.runs.len(),
        }
    }
}

/// One run in the order of [`Layout::locate`]'s search.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Entry {
    step: usize,
    residue: usize,
    start: usize,
    run: usize,
    ring: u32,
}

impl Entry {
    const fn key(&self) -> (usize, usize, usize) {
        (self.step, self.residue, self.start)
    }
}

fn index(runs: &[Run], first: &[usize]) -> Vec<Entry> {
    let rings =
        (0u32..).zip(first.windows(2)).flat_map(|(ring, bounds)| (bounds[0]..bounds[1]).map(move |n| (ring, n)));
    let entry = |(ring, run): (u32, usize)| {
        let Run { start, step, .. } = runs[run];
        Entry { step, residue: start % step, start, run, ring }
    };
    let mut index: Vec<Entry> = rings.map(entry).collect();
    index.sort_unstable_by_key(Entry::key);
    index
}

const fn chunk(seq: usize, parts: usize, i: usize) -> Run {
    let tokens = near_equal(seq, parts, i);
    Run { start: tokens.start, len: tokens.end - tokens.start, step: 1 }
}

fn check_bijection(seq: usize, lists: &[Vec<Run>]) -> Result<()> {
    let invalid = |why: String| Err(Error::invalid("layout", why));
    let mut held: Vec<u64> = Vec::new();
    if held.try_reserve_exact(seq.div_ceil(64)).is_err() {
        return invalid(format!("{seq} tokens are too many to check"));
    }
    held.resize(seq.div_ceil(64), 0);
    for (ring, list) in lists.iter().enumerate() {
        for run in list.iter().filter(|run| run.len > 0) {
            let last = run.step.checked_mul(run.len - 1).and_then(|x| x.checked_add(run.start));
            if last.is_none_or(|last| last >= seq) {
                return invalid(format!("{run:?} of ring rank {ring} leaves the {seq} tokens"));
            }
            for token in run.positions() {
                let (word, bit) = (token / 64, 1u64 << (token % 64));
                if held[word] & bit != 0 {
                    return invalid(format!("token {token} is held twice, the second time by ring rank {ring}"));
                }
                held[word] |= bit;
            }
        }
    }
    match (0..seq).find(|token| held[token / 64] & (1 << (token % 64)) == 0) {
        Some(token) => invalid(format!("token {token} is held by no rank")),
        None => Ok(()),
    }
}

fn check_len(what: &'static str, have: usize, extent: [usize; 3]) -> Result<()> {
    let want = extent.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if want != Some(have) {
        return Err(Error::invalid(what, format!("{have} elements for [batch, tokens, row] of {extent:?}")));
    }
    Ok(())
}
