//! Layouts and routes as text for the terminal: who holds which tokens, and what each ring step computes. For pictures of
//! another kind, [`patches`] has the same as data.
//!
//! ```text
//! holders:  a line per rank        its tokens as ranges, and a bar: # the whole column is the rank's, - a part of it
//! steps:    a map of one ring rank its queries downward, all keys rightward, and in each cell the step that computes it
//!           a paragraph per step   whose block, which runs arrive how, which slices, how many pairs
//! balance:  pairs per ring rank, largest over mean
//! ```
//!
//! Plain ASCII. No line is longer than the width that was asked for (at least 60); long lists are cut and say so.

use std::fmt::{Display, Formatter};
use std::ops::Range;

use longspan_hal::{Error, Result, Slice};

use crate::layout::{Layout, Run, near_equal};
use crate::mask::Mask;
use crate::route::{Needed, Route, Way};

/// The widest bar, in columns.
const BAR: usize = 96;
/// Rows of a map.
const MAP_ROWS: usize = 16;
/// Ranks of one picture; further ones are counted.
const RANKS: usize = 128;
/// Steps of one picture; further ones are counted.
const STEPS: u32 = 32;
/// Runs or slices of one step; further ones are counted.
const ITEMS: usize = 8;

/// Who holds which tokens before the all-to-all: a line per rank. `width` is the longest line.
pub fn holders(layout: &Layout, width: usize) -> String {
    let mesh = *layout.mesh();
    let mut page = Page::new(width);
    let ranks: Vec<(u32, Vec<Run>)> = (0..mesh.size()).take(RANKS).map(|rank| (rank, layout.runs(rank))).collect();
    let names: Vec<String> = ranks.iter().map(|(_, runs)| name_runs(runs)).collect();
    let tokens = names.iter().map(String::len).max().unwrap_or(0).clamp(6, page.width - 46);
    let columns = BAR.min(page.width - tokens - 22).min(layout.seq());
    page.line(&format!("{} layout of {} tokens on {} ranks: {mesh}", layout.kind(), comma(layout.seq()), mesh.size()));
    page.line("");
    page.line(&format!("rank  ring  ulysses  {:tokens$} {}", "tokens", ruler(layout.seq(), columns)));
    for ((rank, runs), name) in ranks.iter().zip(names) {
        let at = mesh.coords(*rank);
        let bar: String = (0..columns).map(|c| mark(runs, near_equal(layout.seq(), columns, c))).collect();
        let name = clip(&name, tokens);
        page.line(&format!("{rank:4}  {:4}  {:7}  {name:tokens$} {bar}", at.ring, at.ulysses));
    }
    page.more(mesh.size() as usize, RANKS, "ranks");
    page.line("");
    if layout.seq() > columns {
        let each = layout.seq().div_ceil(columns.max(1));
        page.line(&format!("One column is up to {} tokens: # all of them are the rank's, - some are.", comma(each)));
    }
    if mesh.ulysses() > 1 {
        let n = mesh.ulysses();
        page.line(&format!("The {n} ranks of a ring rank exchange tokens for heads, then attend with all its tokens."));
    }
    page.text
}

/// What ring rank `ring_rank` computes at each step under `mask`: queries lie as `q` says, keys as `k` says. `width` is the
/// longest line.
///
/// # Errors
/// As [`Route::new`].
pub fn steps(mask: &Mask, q: &Layout, k: &Layout, ring_rank: u32, width: usize) -> Result<String> {
    let route = Route::new(mask, q, k, ring_rank)?;
    let block = |step| mask.slices(q, ring_rank, k, route.block(step), 1);
    let slices: Vec<Vec<Slice>> = (0..route.ring()).map(block).collect::<Result<_>>()?;
    let mut page = Page::new(width);
    let members: Vec<u32> = q.mesh().ulysses_group(ring_rank).collect();
    page.line(&format!(
        "ring rank {ring_rank} of {} ({}), {mask} mask, {} layout, {} queries",
        route.ring(),
        list("rank", &members),
        q.kind(),
        comma(q.ring_rows(ring_rank))
    ));
    page.line("");
    map(&mut page, q, k, &route, &slices);
    let total: u64 = slices.iter().flatten().map(Slice::pairs).sum();
    for (step, slices) in (0..route.ring().min(STEPS)).zip(&slices) {
        paragraph(&mut page, k, &route, step, slices, total);
    }
    page.line("");
    page.more(route.ring() as usize, STEPS as usize, "steps");
    page.line(&format!("{} (query, key) pairs in all steps, per head and batch row", comma(total)));
    Ok(page.text)
}

/// The ring rank's queries downward, all keys rightward; each cell names the step that computes it.
fn map(page: &mut Page, q: &Layout, k: &Layout, route: &Route, slices: &[Vec<Slice>]) {
    let runs = q.ring_runs(route.rank());
    let positions: Vec<(usize, usize)> = sampled_rows(q.ring_rows(route.rank()))
        .filter_map(|row| {
            let n = (0..runs.len()).find(|&n| q.run_rows(route.rank(), n).contains(&row))?;
            Some((row, runs[n].position(row - q.run_rows(route.rank(), n).start)))
        })
        .collect();
    let columns = BAR.min(page.width - 14).min(k.seq());
    page.line(&format!("{:>12}  {}", "query \\ key", ruler(k.seq(), columns)));
    for (row, position) in positions {
        let mut cells = vec!['.'; columns];
        for (step, slices) in (0u32..).zip(slices) {
            for slice in slices.iter().filter(|s| s.q.contains(&(row as u32))) {
                let seen = keys_seen(slice, row as u32);
                for (c, cell) in cells.iter_mut().enumerate() {
                    if mark(&[seen], near_equal(k.seq(), columns, c)) != '.' {
                        let name = char::from_digit(step % 36, 36).unwrap_or('?');
                        *cell = if *cell == '.' || *cell == name { name } else { '*' };
                    }
                }
            }
        }
        page.line(&format!("{:>12}  {}", comma(position), cells.into_iter().collect::<String>()));
    }
    page.line("");
    let digits = if route.ring() > 10 { ", counted 0-9, a-z and again" } else { "" };
    page.line(&format!("A cell names the step that computes it{digits} (* several, . none). Below, row i of"));
    page.line("a slice's queries sees row j of its keys within the bounds; both count from its first rows.");
}

/// Up to [`MAP_ROWS`] rows of a block, evenly spread.
fn sampled_rows(rows: usize) -> impl Iterator<Item = usize> {
    let parts = rows.clamp(1, MAP_ROWS);
    (0..parts).map(move |i| near_equal(rows, parts, i)).filter(|part| !part.is_empty()).map(|part| {
        let last = part.len() - 1;
        part.start + last / 2
    })
}

/// Global positions of the keys that query row `row` of a slice sees.
fn keys_seen(slice: &Slice, row: u32) -> Run {
    let keys = slice.keys_of(row);
    let start = slice.k_pos + slice.k_step * i64::from(keys.start - slice.k.start);
    Run { start: start as usize, len: keys.len(), step: slice.k_step as usize }
}

fn paragraph(page: &mut Page, k: &Layout, route: &Route, step: u32, slices: &[Slice], total: u64) {
    let (owner, needed) = (route.block(step), route.needed(step));
    let held = k.ring_runs(owner);
    if needed.is_empty() {
        page.line(&format!("step {step}: nothing of ring rank {owner} is needed: neither received nor computed"));
        return;
    }
    let pairs: u64 = slices.iter().map(Slice::pairs).sum();
    let whose = if step == 0 { "its own block".to_owned() } else { format!("the block of ring rank {owner}") };
    let share = if total == 0 { 0.0 } else { 100.0 * pairs as f64 / total as f64 };
    page.line("");
    page.line(&format!("step {step}: {whose}, {} pairs, {share:.1} % of this ring rank's", comma(pairs)));
    for run in needed.iter().take(ITEMS) {
        let (n, tokens) = (run.run, name_runs(&held[run.run..=run.run]));
        page.line(&format!("  keys {tokens} (run {n}) {}", way(route, step, run)));
    }
    page.more(needed.len(), ITEMS, "runs");
    if needed.len() < held.len() {
        page.line(&format!("  {} of its {} runs not needed", held.len() - needed.len(), held.len()));
    }
    for slice in slices.iter().take(ITEMS) {
        let queries = name(slice.q_pos, slice.q.len(), slice.q_step);
        let keys = name(slice.k_pos, slice.k.len(), slice.k_step);
        let (pairs, bounds) = (comma(slice.pairs()), bounds(slice));
        page.line(&format!("  attend: queries {queries} x keys {keys}, {pairs} pairs"));
        page.line(&format!("          rows {} x {}, {bounds}", span(&slice.q), span(&slice.k)));
    }
    page.more(slices.len(), ITEMS, "slices");
}

/// How a run travels, seen from this ring rank at `step`.
fn way(route: &Route, step: u32, run: &Needed) -> String {
    let ring = route.ring();
    let (next, before) = ((route.rank() + 1) % ring, (route.rank() + ring - 1) % ring);
    match (run.way, step) {
        _ if ring == 1 => "stay".to_owned(),
        (Way::Direct, 0) => {
            let asks = |step: &u32| route.asked(*step).iter().any(|asked| asked.run == run.run);
            match (1..ring).filter(asks).map(|step| (route.rank() + step) % ring).collect::<Vec<_>>() {
                to if to.is_empty() => "stay: no other ring rank needs them".to_owned(),
                to => format!("go straight to {}", list("ring rank", &to)),
            }
        }
        (Way::Direct, _) => "come straight from their owner".to_owned(),
        (Way::Hop, 0) => format!("hop round the ring, since every ring rank needs them: next to {next}"),
        (Way::Hop, _) if step + 1 == ring => format!("hop here from ring rank {before}, their last stop"),
        (Way::Hop, _) => format!("hop here from ring rank {before}, then to {next}"),
    }
}

/// The bounds of a slice in words: distances in tokens from the query, and in rows.
fn bounds(slice: &Slice) -> String {
    let side = |rows: i64| match slice.k_pos - slice.q_pos + slice.k_step * rows {
        0 => "the query itself".to_owned(),
        t if t < 0 => format!("{} before the query", comma(t.unsigned_abs())),
        t => format!("{} behind the query", comma(t.unsigned_abs())),
    };
    let (lo, hi) = (slice.lo, slice.hi);
    match (lo == Slice::LO_NONE, hi == Slice::HI_NONE) {
        (true, true) => "all".to_owned(),
        (true, false) => format!("j - i <= {hi}: keys up to {}", side(hi)),
        (false, true) => format!("{lo} <= j - i: keys from {}", side(lo)),
        (false, false) => format!("{lo} <= j - i <= {hi}: keys from {} up to {}", side(lo), side(hi)),
    }
}

/// The part of a mask that one ring rank computes at one step.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Patch {
    /// The ring rank, whose queries these are.
    pub ring: u32,
    /// The step.
    pub step: u32,
    /// The ring rank whose keys these are.
    pub owner: u32,
    /// In rows of the two blocks, for one batch row.
    pub slices: Vec<Slice>,
}

impl Patch {
    /// (query, key) pairs, per head and batch row.
    pub fn pairs(&self) -> u64 {
        self.slices.iter().map(Slice::pairs).sum()
    }
}

/// The whole mask, cut into what each ring rank computes at each step: step after step, in each the ring ranks in order, also
/// where nothing is computed. Every pair that the mask allows is in exactly one slice.
///
/// # Errors
/// As [`Mask::slices`]; [`longspan_hal::Error::Invalid`] if the layouts have unequal ring sizes.
pub fn patches(mask: &Mask, q: &Layout, k: &Layout) -> Result<Vec<Patch>> {
    let size = q.mesh().ring();
    if k.mesh().ring() != size {
        let why = format!("queries on {size} ring ranks, keys on {}", k.mesh().ring());
        return Err(Error::invalid("layout", why));
    }
    let mut patches = Vec::new();
    for step in 0..size {
        for ring in 0..size {
            let owner = (ring + (size - step)) % size;
            patches.push(Patch { ring, step, owner, slices: mask.slices(q, ring, k, owner, 1)? });
        }
    }
    Ok(patches)
}

/// How evenly the ring ranks share the work of a mask.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Balance {
    /// (query, key) pairs that each ring rank computes, per head and batch row.
    pub pairs: Vec<u64>,
}

impl Balance {
    /// Counts the pairs of all ring ranks; takes time with the square of their number.
    ///
    /// # Errors
    /// As [`Mask::slices`].
    pub fn new(mask: &Mask, q: &Layout, k: &Layout) -> Result<Self> {
        let of = |ring| -> Result<u64> {
            let mut pairs = 0;
            for owner in 0..k.mesh().ring() {
                pairs += mask.slices(q, ring, k, owner, 1)?.iter().map(Slice::pairs).sum::<u64>();
            }
            Ok(pairs)
        };
        Ok(Self { pairs: (0..q.mesh().ring()).map(of).collect::<Result<_>>()? })
    }

    /// Pairs of all ring ranks.
    pub fn total(&self) -> u64 {
        self.pairs.iter().sum()
    }

    /// The largest share over the mean: 1 is perfect, R means that one ring rank does everything. 1 where there is no work.
    pub fn max_over_mean(&self) -> f64 {
        let largest = self.pairs.iter().copied().max().unwrap_or(0);
        if largest == 0 { 1.0 } else { largest as f64 * self.pairs.len() as f64 / self.total() as f64 }
    }
}

impl Display for Balance {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let (least, most) = (self.pairs.iter().min(), self.pairs.iter().max());
        let [least, most] = [least, most].map(|n| comma(n.copied().unwrap_or(0)));
        let ratio = self.max_over_mean();
        write!(f, "balance: {least} to {most} pairs per ring rank, largest / mean {ratio:.3} (1 is perfect)")
    }
}

/// Lines of bounded width.
struct Page {
    text: String,
    width: usize,
}

impl Page {
    fn new(width: usize) -> Self {
        Self { text: String::new(), width: width.max(60) }
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(clip(line, self.width).trim_end());
        self.text.push('\n');
    }

    /// Says how many of `all` were left out.
    fn more(&mut self, all: usize, shown: usize, what: &str) {
        if all > shown {
            self.line(&format!("  ... and {} more {what}", comma(all - shown)));
        }
    }
}

/// The text, cut to `width` columns; all text here is ASCII.
fn clip(text: &str, width: usize) -> String {
    if text.len() <= width { text.to_owned() } else { format!("{}...", &text[..width - 3]) }
}

/// `#` if `column` lies in the runs, `-` if a part does, `.` otherwise.
fn mark(runs: &[Run], column: Range<usize>) -> char {
    let below = |run: &Run, x: usize| x.saturating_sub(run.start).div_ceil(run.step.max(1)).min(run.len);
    let held: usize = runs.iter().map(|run| below(run, column.end) - below(run, column.start)).sum();
    match held {
        0 => '.',
        n if n == column.len() => '#',
        _ => '-',
    }
}

/// First and last position over a bar of `columns`.
fn ruler(seq: usize, columns: usize) -> String {
    let last = comma(seq.saturating_sub(1));
    if columns < last.len() + 2 { "0".to_owned() } else { format!("0{last:>width$}", width = columns - 1) }
}

/// Runs as ranges of tokens: `0-15, 48-63`, or `1-61 step 4`. Long lists are cut.
pub fn name_runs(runs: &[Run]) -> String {
    let names: Vec<String> =
        runs.iter().take(ITEMS).map(|run| name(run.start as i64, run.len, run.step as i64)).collect();
    let more = if runs.len() > ITEMS { ", ..." } else { "" };
    if names.is_empty() { "none".to_owned() } else { names.join(", ") + more }
}

/// `what 3` or `whats 3, 4, 5`.
fn list(what: &str, numbers: &[u32]) -> String {
    let shown: Vec<String> = numbers.iter().take(ITEMS).map(u32::to_string).collect();
    let (plural, more) = (if numbers.len() == 1 { "" } else { "s" }, if numbers.len() > ITEMS { ", ..." } else { "" });
    format!("{what}{plural} {}{more}", shown.join(", "))
}

/// `first-last`, with the step if it is not 1.
fn name(first: i64, len: usize, step: i64) -> String {
    match (len, step) {
        (0, _) => "none".to_owned(),
        (1, _) => first.to_string(),
        (_, 1) => format!("{first}-{}", first + len as i64 - 1),
        _ => format!("{first}-{} step {step}", first + (len as i64 - 1) * step),
    }
}

fn span(rows: &Range<u32>) -> String {
    name(i64::from(rows.start), rows.len(), 1)
}

/// Digits in groups of three.
pub fn comma(n: impl Display) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
