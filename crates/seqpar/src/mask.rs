//! Masks, and how they become slices: every mask is bands.
//!
//! Query `q` sees key `k`, both global positions, where with `L` and `W` the widths to the left and to the right
//!
//! ```text
//! full       always                        window     q - k <= L  and  k - q <= W
//! causal     k <= q                        prefix     k < start of the document + P  or  k <= q
//! ```
//!
//! and where, with packed documents, both lie in the same document. For a query run `q = a + s i` and a key run `k = b + s j`
//! of the same step the bounds become bounds of `j - i`:
//!
//! ```text
//! q - k <= L   is   j - i >= ceil((a - b - L) / s)
//! k - q <= W   is   j - i <= floor((a - b + W) / s)      (causal: W = 0)
//! ```
//!
//! ```text
//! for each query run, for each key run:
//!     for each document that both may touch:            (without documents: one, the whole sequence)
//!         q = the query run's rows in the document      (a run stays a run)
//!         k = the key run's rows in the document
//!         for (part of k, L, W) in split(k):            (prefix: keys below it without bounds, the others causal)
//!             unless no pair is selected: emit Slice { q, part, lo, hi }
//! ```
//!
//! Query ranges are thus cut by documents only, so they are equal or disjoint; the key ranges of one are disjoint, and
//! no pair occurs twice.

use std::fmt::{Display, Formatter};
use std::ops::{ControlFlow, Range};
use std::str::FromStr;
use std::sync::Arc;

use longspan_hal::{Error, Result, Slice};

use crate::layout::{Layout, Run};

/// Which keys a query sees.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Mask {
    shape: Shape,
    documents: Option<Arc<Documents>>,
}

/// A [`Mask`] without its documents.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Shape {
    /// Keys up to the query's own position.
    Causal,
    /// Every key.
    Full,
    /// The first keys of the document for all of its queries, the others causally.
    Prefix(
        /// Number of these keys.
        usize,
    ),
    /// Keys around the query's own position; `None` bounds nothing.
    Window {
        /// Keys before the own position.
        left: Option<usize>,
        /// Keys behind the own position.
        right: Option<usize>,
    },
}

impl Mask {
    /// Every query sees the keys up to its own position.
    pub const fn causal() -> Self {
        Self { shape: Shape::Causal, documents: None }
    }

    /// Every query sees every key.
    pub const fn full() -> Self {
        Self { shape: Shape::Full, documents: None }
    }

    /// The first `keys` keys (of each document) are seen by all queries, the others causally: prefix-LM.
    pub const fn prefix(keys: usize) -> Self {
        Self { shape: Shape::Prefix(keys), documents: None }
    }

    /// Every query sees itself, `left` keys before and `right` keys behind it; `None` bounds nothing.
    pub const fn window(left: Option<usize>, right: Option<usize>) -> Self {
        Self { shape: Shape::Window { left, right }, documents: None }
    }

    /// The same within packed documents: no query sees a key of another one.
    #[must_use]
    pub fn with_documents(mut self, documents: Documents) -> Self {
        self.documents = Some(Arc::new(documents));
        self
    }

    /// The mask without its documents.
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// The packed documents, if any.
    pub fn documents(&self) -> Option<&Documents> {
        self.documents.as_deref()
    }

    /// Whether the mask is defined for `q_seq` queries and `k_seq` keys: cross attention, of unequal lengths, is full only.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the lengths differ under any other mask or under documents, the documents do not cover the
    /// sequence, or it is longer than a slice can say.
    pub fn check(&self, q_seq: usize, k_seq: usize) -> Result<()> {
        if q_seq.max(k_seq) as u64 > Slice::HI_NONE as u64 {
            return Err(Error::invalid("seq", format!("{} tokens are more than 2^40", q_seq.max(k_seq))));
        }
        if q_seq != k_seq && (self.shape != Shape::Full || self.documents.is_some()) {
            let name = if self.documents.is_some() { "packed documents".to_owned() } else { format!("mask {self}") };
            let why = format!("{name} with {q_seq} queries and {k_seq} keys: unequal lengths need the full mask");
            return Err(Error::invalid("mask", why));
        }
        match self.documents() {
            Some(documents) if documents.seq() != q_seq => {
                let why = format!("documents of {} tokens for a sequence of {q_seq}", documents.seq());
                Err(Error::invalid("documents", why))
            }
            _ => Ok(()),
        }
    }

    /// Whether query `q` sees key `k` (global positions): the plain definition.
    pub fn allows(&self, q: usize, k: usize) -> bool {
        let start = match self.documents() {
            Some(documents) if documents.of(q) != documents.of(k) => return false,
            Some(documents) => documents.range(documents.of(q)).start,
            None => 0,
        };
        match self.shape {
            Shape::Causal => k <= q,
            Shape::Full => true,
            Shape::Prefix(keys) => k - start < keys || k <= q,
            Shape::Window { left, right } => {
                left.is_none_or(|left| q.saturating_sub(k) <= left)
                    && right.is_none_or(|right| k.saturating_sub(q) <= right)
            }
        }
    }

    /// What ring rank `q_ring` of layout `q` computes with the block of ring rank `k_ring` of layout `k`: slices of local
    /// rows of the two blocks, the same for each of `batch` batch rows.
    ///
    /// Slices that select nothing are left out, bounds that exclude nothing are [`Slice::LO_NONE`] and [`Slice::HI_NONE`].
    /// Query ranges are equal or disjoint, and key ranges of equal query ranges are disjoint.
    ///
    /// # Errors
    /// As [`Mask::check`]; [`Error::Invalid`] if there is no such ring rank, if a block has more rows than a slice can say,
    /// or if two runs of unequal steps meet at a bound that neither all nor none of their pairs keep.
    pub fn slices(&self, q: &Layout, q_ring: u32, k: &Layout, k_ring: u32, batch: u32) -> Result<Vec<Slice>> {
        self.check(q.seq(), k.seq())?;
        check_block("query ring rank", q, q_ring)?;
        check_block("key ring rank", k, k_ring)?;
        let mut slices = Vec::new();
        for (m, q_run) in q.ring_runs(q_ring).iter().enumerate() {
            let queries = Cut::new(q_run, q.run_rows(q_ring, m).start);
            for (n, k_run) in k.ring_runs(k_ring).iter().enumerate() {
                let keys = Cut::new(k_run, k.run_rows(k_ring, n).start);
                self.bands(&queries, &keys, &mut |slice| {
                    slices.push(slice);
                    ControlFlow::Continue(())
                })?;
            }
        }
        let one = slices.len();
        for b in 1..batch {
            slices.extend_from_within(..one);
            slices[b as usize * one..].iter_mut().for_each(|slice| slice.batch = b);
        }
        slices.truncate(one * batch as usize);
        Ok(slices)
    }

    /// Whether a query of run `q` sees a key of run `k`. Costs no table, and without documents constant time.
    ///
    /// # Errors
    /// As [`Mask::slices`] for unequal steps.
    pub(crate) fn selects(&self, q: &Run, k: &Run) -> Result<bool> {
        let mut found = false;
        self.bands(&Cut::new(q, 0), &Cut::new(k, 0), &mut |_| {
            found = true;
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// Emits the slices of a query run and a key run until told to stop.
    fn bands(&self, q: &Cut, k: &Cut, emit: &mut impl FnMut(Slice) -> ControlFlow<()>) -> Result<()> {
        let Some(documents) = self.documents() else {
            return self.bands_within(q, k, 0, emit).map(|_| ());
        };
        let from = documents.of(q.pos.max(k.pos) as usize);
        let last = q.last().min(k.last());
        for (start, end) in documents.bounds(from) {
            if start > last {
                break;
            }
            let (q, k) = (q.between(start, end), k.between(start, end));
            if q.len > 0 && k.len > 0 && self.bands_within(&q, &k, start, emit)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The same for parts of runs within one document, which starts at `start`.
    fn bands_within(
        &self,
        q: &Cut,
        k: &Cut,
        start: i64,
        emit: &mut impl FnMut(Slice) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        for (k, reach) in self.split(k, start) {
            if let Some(slice) = band(q, &k, reach)?
                && emit(slice).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The key run's parts that have bounds of their own.
    fn split(&self, k: &Cut, start: i64) -> impl Iterator<Item = (Cut, Reach)> + use<> {
        let free = Reach { left: None, right: None };
        let causal = Reach { left: None, right: Some(0) };
        let (below, above) = match self.shape {
            Shape::Causal => (None, (*k, causal)),
            Shape::Full => (None, (*k, free)),
            Shape::Prefix(keys) => {
                let border = start.saturating_add(width(keys));
                (Some((k.between(0, border), free)), (k.between(border, i64::MAX), causal))
            }
            Shape::Window { left, right } => (None, (*k, Reach { left: left.map(width), right: right.map(width) })),
        };
        below.into_iter().chain([above]).filter(|(k, _)| k.len > 0)
    }
}

fn check_block(what: &'static str, layout: &Layout, ring: u32) -> Result<()> {
    if ring >= layout.mesh().ring() {
        return Err(Error::invalid(what, format!("{ring} of {}", layout.mesh().ring())));
    }
    if u32::try_from(layout.ring_rows(ring)).is_err() {
        return Err(Error::invalid(what, format!("{} rows in one block do not fit 32 bits", layout.ring_rows(ring))));
    }
    Ok(())
}

/// The slice of two parts of runs under `reach`, if it selects a pair.
fn band(q: &Cut, k: &Cut, reach: Reach) -> Result<Option<Slice>> {
    // Runs of one token have whichever step is convenient.
    let q_step = if q.len == 1 { k.step } else { q.step };
    let k_step = if k.len == 1 { q_step } else { k.step };
    let (mut lo, mut hi) = (Slice::LO_NONE, Slice::HI_NONE);
    if q_step == k_step {
        let ahead = q.pos - k.pos;
        if let Some(left) = reach.left {
            lo = lo.max(div_ceil(ahead - left, q_step));
        }
        if let Some(right) = reach.right {
            hi = hi.min((ahead + right).div_euclid(q_step));
        }
    } else if reach.none(q, k) {
        return Ok(None);
    } else if !reach.all(q, k) {
        let why = format!(
            "query tokens {}..={} of step {} meet key tokens {}..={} of step {} at the mask's bound, and a band needs equal steps",
            q.pos,
            q.last(),
            q.step,
            k.pos,
            k.last(),
            k.step
        );
        return Err(Error::invalid("layout", why));
    }
    if lo > hi || lo >= k.len || hi <= -q.len {
        return Ok(None);
    }
    lo = if lo <= 1 - q.len { Slice::LO_NONE } else { lo };
    hi = if hi >= k.len - 1 { Slice::HI_NONE } else { hi };
    let (q_pos, k_pos) = (q.pos, k.pos);
    Ok(Some(Slice { batch: 0, q: q.rows(), k: k.rows(), lo, hi, q_pos, k_pos, q_step, k_step }))
}

/// How far keys may lie before (left) and behind (right) a query.
#[derive(Clone, Copy, Debug)]
struct Reach {
    left: Option<i64>,
    right: Option<i64>,
}

impl Reach {
    /// Whether every pair is within reach, by the extreme pairs.
    fn all(&self, q: &Cut, k: &Cut) -> bool {
        self.left.is_none_or(|left| q.last() - k.pos <= left)
            && self.right.is_none_or(|right| k.last() - q.pos <= right)
    }

    /// Whether no pair is within reach, by the extreme pairs (it may say no although none is).
    fn none(&self, q: &Cut, k: &Cut) -> bool {
        self.left.is_some_and(|left| q.pos - k.last() > left)
            || self.right.is_some_and(|right| k.pos - q.last() > right)
    }
}

/// A part of a run: `len` rows of a block from `row` on, at positions `pos + step * i`.
#[derive(Clone, Copy, Debug)]
struct Cut {
    row: i64,
    len: i64,
    pos: i64,
    step: i64,
}

impl Cut {
    /// A whole run, whose first token is in row `row`.
    const fn new(run: &Run, row: usize) -> Self {
        Self { row: row as i64, len: run.len as i64, pos: run.start as i64, step: run.step as i64 }
    }

    const fn last(&self) -> i64 {
        self.pos + self.step * (self.len - 1)
    }

    /// The part with positions in `start..end`; its length may be 0.
    fn between(&self, start: i64, end: i64) -> Self {
        let count_below = |x: i64| div_ceil(x.saturating_sub(self.pos), self.step).clamp(0, self.len);
        let (from, to) = (count_below(start), count_below(end));
        Self { row: self.row + from, len: (to - from).max(0), pos: self.pos + self.step * from, step: self.step }
    }

    /// Fits: blocks with more rows are refused before.
    const fn rows(&self) -> Range<u32> {
        self.row as u32..(self.row + self.len) as u32
    }
}

/// `ceil(a / b)` for positive `b`.
const fn div_ceil(a: i64, b: i64) -> i64 {
    a.div_euclid(b) + (a.rem_euclid(b) != 0) as i64
}

/// A number of tokens that bounds nothing from 2^41 on: no sequence is that long.
pub(crate) fn width(tokens: usize) -> i64 {
    (tokens as u64).min(1 << 41) as i64
}

impl Display for Mask {
    /// The command line's words, without the documents.
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let side = |side: Option<usize>| side.map_or("all".to_owned(), |n| n.to_string());
        match self.shape {
            Shape::Causal => f.write_str("causal"),
            Shape::Full => f.write_str("full"),
            Shape::Prefix(keys) => write!(f, "prefix:{keys}"),
            Shape::Window { left, right: Some(0) } => write!(f, "window:{}", side(left)),
            Shape::Window { left, right } => write!(f, "window:{},{}", side(left), side(right)),
        }
    }
}

impl FromStr for Mask {
    type Err = Error;

    /// Parses `causal`, `full`, `prefix:P`, `window:L` (which means `window:L,0`) or `window:L,R`; `all` for L or R bounds
    /// nothing.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = || {
            let why = format!(
                "`{text}`: it is causal, full, window:L[,R] or prefix:P, with whole numbers from 0, L and R also `all`"
            );
            Error::invalid("mask", why)
        };
        let number = |digits: &str| match digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse::<usize>().map_err(|_| invalid()),
            false => Err(invalid()),
        };
        let side = |word: &str| if word == "all" { Ok(None) } else { number(word).map(Some) };
        match text.split_once(':') {
            None if text == "causal" => Ok(Self::causal()),
            None if text == "full" => Ok(Self::full()),
            Some(("prefix", keys)) => Ok(Self::prefix(number(keys)?)),
            Some(("window", sides)) => {
                let (left, right) = sides.split_once(',').unwrap_or((sides, "0"));
                Ok(Self::window(side(left)?, side(right)?))
            }
            _ => Err(invalid()),
        }
    }
}

/// Documents packed one behind the other into a sequence.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Documents {
    /// Starts of all documents, and the end of the last; never descending, from 0.
    starts: Vec<usize>,
}

impl Documents {
    /// Documents from cumulative lengths: document i holds tokens `cu_seqlens[i]..cu_seqlens[i + 1]` of a sequence of `seq`.
    /// Repeated entries are empty documents.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the list does not start at 0, decreases, or does not end at `seq`.
    pub fn from_cu_seqlens(cu_seqlens: &[i32], seq: usize) -> Result<Self> {
        let invalid = |why: String| Err(Error::invalid("cu_seqlens", why));
        match cu_seqlens {
            [] => return invalid("it is empty; it must start with 0 and end with the sequence length".to_owned()),
            [first, ..] if *first != 0 => return invalid(format!("it starts with {first}, it must start with 0")),
            [.., last] if i64::from(*last) != seq as i64 => {
                return invalid(format!("it ends with {last}, the sequence has {seq} tokens"));
            }
            _ => {}
        }
        if let Some(i) = cu_seqlens.windows(2).position(|pair| pair[1] < pair[0]) {
            return invalid(format!("entry {} is {}, less than {} before it", i + 1, cu_seqlens[i + 1], cu_seqlens[i]));
        }
        Ok(Self { starts: cu_seqlens.iter().map(|&start| start as usize).collect() })
    }

    /// Number of documents, with the empty ones.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of tokens of all documents.
    pub fn seq(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Tokens of document `i`; an empty range at the sequence's end if there is no such document.
    pub fn range(&self, i: usize) -> Range<usize> {
        match self.starts.get(i..).unwrap_or_default() {
            [start, end, ..] => *start..*end,
            _ => self.seq()..self.seq(),
        }
    }

    /// The document that holds `token`; [`Documents::len`] for tokens behind the end.
    pub fn of(&self, token: usize) -> usize {
        self.starts.partition_point(|&start| start <= token) - 1
    }

    /// Starts and ends of the documents from `first` on.
    fn bounds(&self, first: usize) -> impl Iterator<Item = (i64, i64)> + '_ {
        let starts = self.starts.get(first..).unwrap_or_default();
        starts.windows(2).map(|pair| (pair[0] as i64, pair[1] as i64))
    }
}
