//! `longspan layout --svg`: who holds which tokens, and the mask of every ring step coloured by ring rank.
//!
//! ```text
//! holders   a row per rank: its tokens on a common axis
//! steps     a square per step: queries downward, keys rightward; a part that is computed at this step has the colour of the
//!           ring rank that computes it, the rest of the mask is grey
//! ```
//!
//! Up to [`CELLS`] tokens are drawn pair by pair. Longer sequences are drawn as exact outlines; where runs have steps (stripe),
//! outlines exist only in the order in which ranks hold tokens, which the picture then says.

use std::fmt::Write;

use longspan::{Layout, Mask, Run};
use longspan_hal::Slice;
use longspan_seqpar::picture::{Balance, Patch, comma, name_runs, patches};

use super::svg::{Anchor, COLOURS, Svg, WIDTH, fit, number, width};
use crate::failure::{Failure, Result};

/// Ring ranks that can be drawn: steps grow with them, and what the steps compute with their square.
pub const RINGS: u32 = 64;
/// Slices that can be drawn.
const SLICES: usize = 20_000;
/// Tokens up to which every pair is drawn by itself.
pub const CELLS: usize = 64;
/// Ranks whose tokens are shown; further ones are counted.
const RANKS: u32 = 64;
/// Distance of tokens in the picture from which those of a stripe are drawn one by one.
const APART: f64 = 5.0;

/// The picture's file.
///
/// # Errors
/// [`Failure::Input`] if mask and layout do not fit each other, or the picture would be too large.
pub fn layout(layout: &Layout, mask: &Mask) -> Result<String> {
    let ring = layout.mesh().ring();
    if ring > RINGS {
        return Err(Failure::Input(format!(
            "--svg draws up to {RINGS} ring ranks, this is {ring}; the text shows any number"
        )));
    }
    let patches = patches(mask, layout, layout)?;
    let slices: usize = patches.iter().map(|patch| patch.slices.len()).sum();
    if slices > SLICES {
        return Err(Failure::Input(format!(
            "--svg draws up to {SLICES} parts of a mask, this has {slices}; take fewer documents or ring ranks, or the text"
        )));
    }
    let mut svg = Svg::default();
    let seq = comma(layout.seq());
    let title = format!("{} layout of {seq} tokens on {} ranks, {mask} mask", layout.kind(), layout.mesh().size());
    svg.text("h", [16.0, 30.0], Anchor::Start, &title);
    let documents = mask.documents().map_or(String::new(), |d| format!(", {} packed documents", d.len()));
    svg.text("m", [16.0, 50.0], Anchor::Start, &format!("{}{documents}", layout.mesh()));
    let y = holders(&mut svg, layout, 84.0);
    let y = steps(&mut svg, layout, mask, &patches, y + 40.0)?;
    Ok(svg.finish(y + 14.0, &title))
}

/// The colour of a ring rank.
fn colour(ring: u32) -> String {
    format!("c{}", ring as usize % COLOURS.len())
}

fn holders(svg: &mut Svg, layout: &Layout, top: f64) -> f64 {
    const PLOT: [f64; 2] = [150.0, 760.0];
    let (mesh, seq) = (*layout.mesh(), layout.seq());
    let shown = mesh.size().min(RANKS);
    let each = if shown > 16 { 13.0 } else { 20.0 };
    let scale = (PLOT[1] - PLOT[0]) / seq.max(1) as f64;
    svg.text("b", [16.0, top], Anchor::Start, "Who holds which tokens");
    let (mut y, mut parts) = (top + 12.0, 1);
    for rank in 0..shown {
        let (at, runs) = (mesh.coords(rank), layout.runs(rank));
        let base = y + each / 2.0 + 3.0;
        let part = if mesh.ulysses() > 1 { format!(", part {}", at.ulysses) } else { String::new() };
        svg.text("s", [16.0, base], Anchor::Start, &format!("rank {rank}: ring {}{part}", at.ring));
        svg.rect("lane", [PLOT[0], y, PLOT[1] - PLOT[0], each - 3.0], None);
        parts = parts.max(tokens(svg, &runs, &colour(at.ring), scale, [PLOT[0], y, each - 3.0]));
        let words = if runs.is_empty() { "no tokens".to_owned() } else { name_runs(&runs) };
        svg.text("s", [PLOT[1] + 10.0, base], Anchor::Start, &fit(&words, 11.0, WIDTH - PLOT[1] - 24.0));
        y += each;
    }
    let ends = [(PLOT[0], Anchor::Start, "token 0".to_owned()), (PLOT[1], Anchor::End, comma(seq.saturating_sub(1)))];
    for (x, anchor, text) in ends {
        svg.text("m s", [x, y + 12.0], anchor, &text);
    }
    let notes: Vec<String> = [
        (mesh.size() > shown).then(|| format!("... and {} more ranks", mesh.size() - shown)),
        (mesh.ulysses() > 1).then(|| {
            format!("the {} ranks of one colour exchange tokens for heads before they attend", mesh.ulysses())
        }),
        (parts > 1).then(|| format!("a pale bar is one of {parts} tokens")),
    ]
    .into_iter()
    .flatten()
    .collect();
    if notes.is_empty() {
        return y + 12.0;
    }
    svg.text("m s", [PLOT[0], y + 28.0], Anchor::Start, &notes.join("; "));
    y + 28.0
}

/// Draws a rank's tokens from `x`, `y` on in bars of a height. Tokens of a stripe that are too near each other become one pale
/// bar; returns of how many tokens it then holds one, else 1.
fn tokens(svg: &mut Svg, runs: &[Run], colour: &str, scale: f64, [x, y, height]: [f64; 3]) -> usize {
    let (mut data, mut parts) = (String::new(), 1);
    for run in runs {
        let whole = run.step == 1 || scale * (run.step as f64) < APART;
        parts = if whole { parts.max(run.step) } else { parts };
        let (pieces, len) = if whole { (1, (run.len - 1) * run.step + 1) } else { (run.len, 1) };
        for i in 0..pieces {
            let [x, y, w, h] = [x + scale * run.position(i) as f64, y, scale * len as f64, height].map(number);
            let _ = write!(data, "M{x} {y}h{w}v{h}h-{w}z");
        }
    }
    if !data.is_empty() {
        svg.path(&if parts > 1 { format!("{colour} part") } else { colour.to_owned() }, &data);
    }
    parts
}

/// In which order a picture's axes name tokens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// As ranks hold them: the block of ring rank 0, then that of 1, ...
    Blocks,
    /// By position in the sequence.
    Positions,
}

impl Order {
    /// Positions where they can be drawn.
    pub fn of(layout: &Layout) -> Self {
        let plain = (0..layout.mesh().ring()).all(|ring| layout.ring_runs(ring).iter().all(|run| run.step == 1));
        if layout.seq() <= CELLS || plain { Self::Positions } else { Self::Blocks }
    }
}

fn steps(svg: &mut Svg, layout: &Layout, mask: &Mask, patches: &[Patch], top: f64) -> Result<f64> {
    let (ring, order) = (layout.mesh().ring(), Order::of(layout));
    let columns = if ring > 2 { 4 } else { 2 };
    let (left, pitch) = (44.0, (WIDTH - 60.0) / f64::from(columns));
    let side = if columns == 4 { 196.0 } else { 320.0 };
    svg.text("b", [16.0, top], Anchor::Start, "What each step of the ring computes");
    let axes = match order {
        Order::Blocks => "queries downward, keys rightward, both in the order of ring ranks and their rows",
        Order::Positions => "queries downward, keys rightward, both by position",
    };
    svg.text("m", [16.0, top + 20.0], Anchor::Start, &format!("{axes}; grey is computed at other steps"));
    let mut y = top + 32.0;
    legend(svg, ring, &mut y);
    let square = Square { layout, order, unit: side / layout.seq().max(1) as f64, side };
    ground(svg, patches, &square);
    for step in 0..ring {
        let (column, row) = (step % columns, step / columns);
        let at = [left + pitch * f64::from(column), y + (side + 66.0) * f64::from(row) + 24.0];
        // Patches are step after step, the ring ranks of each in order.
        let first = (step * ring) as usize;
        panel(svg, &patches[first..first + ring as usize], step, &square, at);
    }
    y += (side + 66.0) * f64::from(ring.div_ceil(columns));
    let balance = Balance::new(mask, layout, layout)?;
    svg.text("", [16.0, y + 14.0], Anchor::Start, &format!("All steps, {balance}"));
    Ok(y + 14.0)
}

fn legend(svg: &mut Svg, ring: u32, y: &mut f64) {
    let mut x = 16.0;
    for rank in 0..ring {
        let text = if rank == 0 { format!("ring rank {rank}") } else { rank.to_string() };
        let room = 18.0 + width(&text, 12.0) + 14.0;
        if x + room > WIDTH - 16.0 {
            (x, *y) = (16.0, *y + 20.0);
        }
        svg.rect(&colour(rank), [x, *y, 12.0, 12.0], None);
        svg.text("", [x + 18.0, *y + 10.5], Anchor::Start, &text);
        x += room;
    }
    *y += 22.0;
}

/// Where the pairs of a sequence are drawn.
struct Square<'a> {
    layout: &'a Layout,
    order: Order,
    /// Of a token.
    unit: f64,
    side: f64,
}

impl Square<'_> {
    /// Draws patches, in units of a token.
    fn draw<'p>(&self, svg: &mut Svg, class: &str, patches: impl Iterator<Item = &'p Patch>) {
        let data: String = patches.flat_map(|patch| patch.slices.iter().map(|s| outline(s, patch, self))).collect();
        if !data.is_empty() {
            svg.path(class, &data);
        }
    }
}

/// What is under every step: the whole mask, and who holds which queries and keys.
fn ground(svg: &mut Svg, patches: &[Patch], square: &Square<'_>) {
    svg.define("mask");
    edges(svg, square);
    svg.rect("lane", [0.0, 0.0, square.side, square.side], None);
    svg.open([0.0, 0.0], square.unit);
    square.draw(svg, "other", patches.iter());
    svg.close();
    svg.close();
}

/// One step: `patches` are those of its ring ranks.
fn panel(svg: &mut Svg, patches: &[Patch], step: u32, square: &Square<'_>, at: [f64; 2]) {
    let ([x, y], side) = (at, square.side);
    let what = match step {
        0 => "own keys".to_owned(),
        1 => "keys of the ring rank before".to_owned(),
        n => format!("keys of {n} ring ranks before"),
    };
    svg.text("b", [x, y - 14.0], Anchor::Start, &format!("Step {step}"));
    svg.text("m s", [x + width(&format!("Step {step}"), 12.0) + 10.0, y - 14.0], Anchor::Start, &what);
    svg.again("mask", at);
    svg.open(at, square.unit);
    for patch in patches {
        square.draw(svg, &colour(patch.ring), std::iter::once(patch));
    }
    svg.close();
    svg.path("frame", &format!("M{} {}h{side}v{side}h-{side}z", number(x), number(y)));
    for (i, line) in work(patches).iter().enumerate() {
        svg.text("s", [x, y + side + 15.0 * (i + 1) as f64], Anchor::Start, line);
    }
}

/// How much the ring ranks compute at a step, and how evenly: two lines.
fn work(patches: &[Patch]) -> [String; 2] {
    let pairs: Vec<u64> = patches.iter().map(Patch::pairs).collect();
    let (least, most) = (pairs.iter().min().copied().unwrap_or(0), pairs.iter().max().copied().unwrap_or(0));
    if most == 0 {
        return ["nothing is computed or sent".into(), String::new()];
    }
    if least == most {
        return [format!("{} pairs on each ring rank", comma(most)), String::new()];
    }
    let busy = pairs.iter().filter(|&&n| n > 0).count();
    let mean = pairs.iter().sum::<u64>() as f64 / pairs.len() as f64;
    [
        format!("{} to {} pairs per ring rank,", comma(least), comma(most)),
        format!("{busy} of {} at work, largest / mean {:.2}", pairs.len(), most as f64 / mean),
    ]
}

/// Beside the square: who holds the queries; above it: who holds the keys.
fn edges(svg: &mut Svg, square: &Square<'_>) {
    let (layout, unit) = (square.layout, square.unit);
    for ring in 0..layout.mesh().ring() {
        let mut data = String::new();
        for (n, run) in layout.ring_runs(ring).iter().enumerate() {
            let (first, pieces, len, step) = match square.order {
                Order::Blocks => (block(layout, ring) + layout.run_rows(ring, n).start, 1, run.len, 1),
                Order::Positions if run.step == 1 => (run.start, 1, run.len, 1),
                Order::Positions => (run.start, run.len, 1, run.step),
            };
            for i in 0..pieces {
                let (at, len) = (number(unit * (first + i * step) as f64), number(unit * len as f64));
                let _ = write!(data, "M{at} -7h{len}v5h-{len}zM-7 {at}h5v{len}h-5z");
            }
        }
        if !data.is_empty() {
            svg.path(&colour(ring), &data);
        }
    }
}

/// Rows of all blocks before that of ring rank `ring`.
fn block(layout: &Layout, ring: u32) -> usize {
    (0..ring).map(|r| layout.ring_rows(r)).sum()
}

/// The pairs of a slice as closed paths, (key, query) in tokens: pair by pair where there are few tokens, as one outline
/// otherwise.
fn outline(slice: &Slice, patch: &Patch, square: &Square<'_>) -> String {
    let mut data = String::new();
    if square.layout.seq() <= CELLS {
        for row in slice.q.clone() {
            let keys = slice.keys_of(row);
            let query = slice.q_pos + slice.q_step * i64::from(row - slice.q.start);
            let first = slice.k_pos + slice.k_step * i64::from(keys.start - slice.k.start);
            let (pieces, len) = if slice.k_step == 1 { (1.min(keys.len()), keys.len()) } else { (keys.len(), 1) };
            for i in 0..pieces as i64 {
                let _ = write!(data, "M{} {query}h{len}v1h-{len}z", first + i * slice.k_step);
            }
        }
        return data;
    }
    let [query, key] = match square.order {
        Order::Blocks => [
            (block(square.layout, patch.ring) + slice.q.start as usize) as f64,
            (block(square.layout, patch.owner) + slice.k.start as usize) as f64,
        ],
        Order::Positions => [slice.q_pos as f64, slice.k_pos as f64],
    };
    for (i, [column, row]) in band(slice).into_iter().enumerate() {
        let _ = write!(data, "{}{} {}", if i == 0 { 'M' } else { 'L' }, number(key + column), number(query + row));
    }
    data + "z"
}

/// The outline of a slice, (column, row) from its first pair: a rectangle between two diagonals that run half a cell beside the
/// last pairs which they allow, so that a pair is selected exactly where its cell's middle lies inside.
fn band(slice: &Slice) -> Vec<[f64; 2]> {
    let (rows, columns) = (slice.q.len() as f64, slice.k.len() as f64);
    let mut corners = vec![[0.0, 0.0], [columns, 0.0], [columns, rows], [0.0, rows]];
    let bounds = [(slice.hi as f64 + 0.5, 1.0), (0.5 - slice.lo as f64, -1.0)];
    for (bound, sign) in bounds {
        // How far a corner is inside of `sign * (column - row) <= bound`.
        let inside = |[column, row]: [f64; 2]| bound - sign * (column - row);
        let mut kept = Vec::new();
        for (i, &to) in corners.iter().enumerate() {
            let from = corners[(i + corners.len() - 1) % corners.len()];
            let (a, b) = (inside(from), inside(to));
            if (a < 0.0) != (b < 0.0) {
                let part = a / (a - b);
                kept.push([from[0] + part * (to[0] - from[0]), from[1] + part * (to[1] - from[1])]);
            }
            if b >= 0.0 {
                kept.push(to);
            }
        }
        corners = kept;
    }
    corners
}

#[cfg(test)]
mod tests {
    use longspan::{Documents, Mesh, Placement};
    use proptest::prelude::*;

    use super::*;

    /// Closed outlines, each a list of (key, query) corners, from path data of `M`, `L`, `h`, `v` and `z`.
    fn outlines(data: &str) -> Vec<Vec<[f64; 2]>> {
        let mut list: Vec<Vec<[f64; 2]>> = Vec::new();
        for part in data.split('z').filter(|part| !part.is_empty()) {
            let (mut corners, mut at) = (Vec::new(), [0.0, 0.0]);
            let starts: Vec<usize> = part.match_indices(['M', 'L', 'h', 'v']).map(|(i, _)| i).collect();
            for (n, &i) in starts.iter().enumerate() {
                let words = &part[i + 1..starts.get(n + 1).copied().unwrap_or(part.len())];
                let numbers: Vec<f64> = words.split(' ').map(|w| w.parse().expect("a number")).collect();
                match &part[i..=i] {
                    "h" => at[0] += numbers[0],
                    "v" => at[1] += numbers[0],
                    _ => at = [numbers[0], numbers[1]],
                }
                corners.push(at);
            }
            list.push(corners);
        }
        list
    }

    /// Whether a point is inside an outline: how often a ray to the right crosses it.
    fn inside(corners: &[[f64; 2]], [x, y]: [f64; 2]) -> bool {
        let next = |i: usize| corners[(i + 1) % corners.len()];
        let crossings = corners.iter().enumerate().filter(|&(i, a)| {
            let b = next(i);
            (a[1] > y) != (b[1] > y) && x < a[0] + (y - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
        });
        crossings.count() % 2 == 1
    }

    fn problems(seq: std::ops::Range<usize>) -> impl Strategy<Value = (Layout, Mask)> {
        (seq, 1u32..6, 1u32..3, 0usize..3, 0usize..6).prop_map(|(seq, ring, ulysses, kind, mask)| {
            let mesh = Mesh::new(ulysses, ring, Placement::UlyssesInner).expect("small");
            let bounds = [0, seq as i32 / 3, seq as i32 / 2, seq as i32];
            let documents = || Documents::from_cu_seqlens(&bounds, seq).expect("ascending");
            let mask = match mask {
                0 => Mask::full(),
                1 => Mask::causal(),
                2 => Mask::window(Some(5), Some(2)),
                3 => Mask::causal().with_documents(documents()),
                4 => Mask::window(Some(seq / 4), Some(0)).with_documents(documents()),
                _ => Mask::prefix(seq / 3),
            };
            ([Layout::contiguous, Layout::zigzag, Layout::stripe][kind](seq, &mesh), mask)
        })
    }

    /// Token `i` of the axes of a picture.
    fn token(layout: &Layout, order: Order, i: usize) -> usize {
        if order == Order::Positions {
            return i;
        }
        let ring =
            (0..layout.mesh().ring()).rfind(|&r| block(layout, r) <= i && layout.ring_rows(r) > 0).expect("held");
        let row = i - block(layout, ring);
        let n = (0..).find(|&n| layout.run_rows(ring, n).contains(&row)).expect("held");
        layout.ring_runs(ring)[n].position(row - layout.run_rows(ring, n).start)
    }

    /// Reads the file back: at every step, the middle of a pair's cell has the colour of exactly the ring rank that computes it
    /// then, and of none where the mask forbids it.
    fn check(at: &Layout, mask: &Mask) -> Result<(), TestCaseError> {
        let text = layout(at, mask).expect("it can be drawn");
        let document = roxmltree::Document::parse(&text).expect("well-formed");
        let groups: Vec<_> = document.descendants().filter(|n| n.attribute("transform").is_some()).collect();
        let ring = at.mesh().ring();
        prop_assert_eq!(groups.len(), 1 + ring as usize, "the mask, and each step");
        for rank in 0..at.mesh().size() {
            let start = format!("rank {rank}: ");
            prop_assert!(document.descendants().any(|n| n.text().is_some_and(|t| t.starts_with(&start))), "{}", start);
        }
        let order = Order::of(at);
        for (step, group) in groups[1..].iter().enumerate() {
            let name = format!("Step {step}");
            prop_assert!(document.descendants().any(|n| n.text() == Some(&name)), "{}", name);
            let drawn: Vec<(&str, Vec<Vec<[f64; 2]>>)> = group
                .children()
                .filter_map(|path| Some((path.attribute("class")?, outlines(path.attribute("d")?))))
                .collect();
            for i in 0..at.seq() {
                let query = token(at, order, i);
                let owner = |t: usize| at.mesh().coords(at.locate(t).0).ring;
                for j in 0..at.seq() {
                    let key = token(at, order, j);
                    let middle = [j as f64 + 0.5, i as f64 + 0.5];
                    let mut colours =
                        drawn.iter().filter(|(_, list)| list.iter().any(|o| inside(o, middle))).map(|d| d.0);
                    let now = (owner(key) as usize + step) % ring as usize == owner(query) as usize;
                    let wanted = (now && mask.allows(query, key)).then(|| colour(owner(query)));
                    prop_assert_eq!(colours.next(), wanted.as_deref(), "step {} query {} key {}", step, query, key);
                    prop_assert_eq!(colours.next(), None);
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn cells_have_the_colour_of_who_computes_them((layout, mask) in problems(0..24)) {
            check(&layout, &mask)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn outlines_have_the_colour_of_who_computes_them((layout, mask) in problems(CELLS + 1..CELLS + 12)) {
            check(&layout, &mask)?;
        }
    }

    #[test]
    fn long_sequences_make_small_files() {
        let mesh = Mesh::new(2, 8, Placement::UlyssesInner).expect("small");
        for at in [Layout::zigzag(1 << 30, &mesh), Layout::stripe(1 << 20, &mesh)] {
            let text = layout(&at, &Mask::causal()).expect("it can be drawn");
            assert!(text.len() < 60_000, "{}", text.len());
        }
    }

    #[test]
    fn too_many_ranks_or_documents_are_refused() {
        let of = |ring| Layout::contiguous(4096, &Mesh::new(1, ring, Placement::UlyssesInner).expect("small"));
        assert!(layout(&of(64), &Mask::causal()).is_ok());
        let refused = layout(&of(65), &Mask::causal());
        assert!(matches!(&refused, Err(Failure::Input(why)) if why.contains("64 ring ranks")), "{refused:?}");
        let bounds: Vec<i32> = (0..=30_000).collect();
        let documents = Documents::from_cu_seqlens(&bounds, 30_000).expect("ascending");
        let one = Layout::contiguous(30_000, &Mesh::new(1, 1, Placement::UlyssesInner).expect("one"));
        assert!(layout(&one, &Mask::causal().with_documents(documents)).is_err());
    }
}
