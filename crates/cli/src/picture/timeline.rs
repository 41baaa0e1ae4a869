//! `longspan run --timeline`: what every rank did when, a panel for the forward and one for the backward.
//!
//! Each rank has two rows on a common time axis: above, what its compute stream did (empty where it was idle); below, what its
//! transfer stream did. A transfer with compute above it costs nothing; one with an empty row above it is what to look at.

use std::collections::BTreeMap;
use std::time::Duration;

use longspan::{SpanReport, Work};

use super::svg::{Anchor, Svg, WIDTH, fit, number, width};
use crate::record::{Record, Shares};
use crate::report;

/// Ranks of one picture; further ones are counted.
pub const RANKS: usize = 64;

/// Where the time axis begins and ends.
const PLOT: [f64; 2] = [76.0, 736.0];

/// Where the columns of percentages end.
const COLUMNS: [(f64, &str); 4] = [(794.0, "compute"), (848.0, "exposed"), (888.0, "idle"), (944.0, "hidden")];

/// Spans up to which each has words of its own over it.
const HINTS: usize = 1500;

/// The picture's file.
pub fn timeline(record: &Record) -> String {
    let mut svg = Svg::default();
    let mut y = head(&mut svg, record);
    for backward in record.passes() {
        y = panel(&mut svg, record, backward, y + 30.0);
    }
    y = foot(&mut svg, record, y + 24.0);
    svg.finish(y + 14.0, &format!("What every rank did when: {}", record.title))
}

fn head(svg: &mut Svg, record: &Record) -> f64 {
    svg.text("h", [16.0, 30.0], Anchor::Start, "What every rank did when");
    svg.text("m", [16.0, 50.0], Anchor::Start, &fit(&record.title, 12.0, WIDTH - 32.0));
    let mut x = 16.0;
    let words = [
        ("c0", "compute: attention and sums"),
        ("c1", "exchange between ranks, with waiting for them"),
        ("c2", "copies and sums within the rank"),
        ("lane", "idle"),
    ];
    for (class, what) in words {
        svg.rect(class, [x, 64.0, 12.0, 12.0], None);
        svg.text("", [x + 18.0, 74.5], Anchor::Start, what);
        x += 18.0 + width(what, 12.0) + 16.0;
    }
    84.0
}

fn panel(svg: &mut Svg, record: &Record, backward: bool, top: f64) -> f64 {
    let (start, end) = record.extent(backward);
    let shown = record.ranks.len().min(RANKS);
    let [compute, transfer, gap] = if shown > 16 { [12.0, 6.0, 4.0] } else { [18.0, 14.0, 10.0] };
    let each = compute + transfer + gap;
    let bottom = top + 12.0 + each * shown as f64;
    let name = if backward { "Backward" } else { "Forward" };
    svg.text("b", [16.0, top], Anchor::Start, &format!("{name}, {}", report::time(end - start)));
    for (x, title) in COLUMNS {
        svg.text("m s", [x, top], Anchor::End, title);
    }
    let scale = Scale { start, length: (end - start).max(Duration::from_nanos(1)) };
    for rank in 0..shown {
        let y = top + 12.0 + each * rank as f64;
        svg.text("", [PLOT[0] - 10.0, y + compute / 2.0 + 4.0], Anchor::End, &format!("rank {rank}"));
        svg.rect("lane", [PLOT[0], y, PLOT[1] - PLOT[0], compute], None);
        let middle = y + (compute + transfer) / 2.0 + 4.0;
        for ((x, _), percent) in COLUMNS.into_iter().zip(percents(record.shares(rank, backward))) {
            svg.text("s", [x, middle], Anchor::End, &percent);
        }
    }
    axis(svg, &scale, top + 8.0, bottom);
    for rank in 0..shown {
        bars(svg, record, rank, backward, &scale, [top + 12.0 + each * rank as f64, compute, transfer]);
    }
    bottom + 18.0
}

/// Maps a pass to the picture's width.
struct Scale {
    start: Duration,
    length: Duration,
}

impl Scale {
    fn at(&self, time: Duration) -> f64 {
        let part = time.saturating_sub(self.start).as_secs_f64() / self.length.as_secs_f64();
        PLOT[0] + part.min(1.0) * (PLOT[1] - PLOT[0])
    }
}

fn bars(svg: &mut Svg, record: &Record, rank: usize, backward: bool, scale: &Scale, [y, compute, transfer]: [f64; 3]) {
    let spans: Vec<&SpanReport> = record.ranks[rank].pass(backward).collect();
    let hints = record.ranks.iter().map(|r| r.spans.len()).sum::<usize>() <= HINTS;
    let mut paths: BTreeMap<&str, String> = BTreeMap::new();
    for span in spans {
        let (x, right) = (scale.at(span.start), scale.at(span.end));
        let (class, y, h) = match span.work {
            // Perhaps beside an exchange.
            Work::Collect => ("c2", y + compute + 0.5 + transfer / 2.0, (transfer - 1.0) / 2.0),
            Work::Compute => ("c0", y, compute),
            Work::Exchange => ("c1", y + compute + 1.0, transfer - 1.0),
        };
        if !hints {
            let [x, y, w, h] = [x, y, right - x, h].map(number);
            paths.entry(class).or_default().push_str(&format!("M{x} {y}h{w}v{h}h-{w}z"));
            continue;
        }
        let (name, long) = (record.name(span), report::time(span.end - span.start));
        let hint = match span.work {
            Work::Exchange => format!("{name}: {long}, {} sent", report::bytes(span.bytes_sent)),
            Work::Collect | Work::Compute => format!("{name}: {long}"),
        };
        // An edge would cover a bar that is hardly wider.
        let edged = if right - x > 3.0 { format!("{class} bar") } else { class.to_owned() };
        svg.rect(&edged, [x, y, right - x, h], Some(&hint));
        let label = label(&name);
        if h > 12.0 && width(&label, 11.0) + 6.0 < right - x {
            let ink = if class == "c1" { "ink" } else { "on" };
            svg.text(ink, [(x + right) / 2.0, y + h / 2.0 + 4.0], Anchor::Middle, &label);
        }
    }
    for (class, data) in paths {
        svg.path(class, &data);
    }
}

/// A span's name, short: attention goes without saying.
fn label(name: &str) -> String {
    let short = name.strip_prefix("attention forward, ").or(name.strip_prefix("attention backward, ")).unwrap_or(name);
    let short = if short.starts_with("attention ") { "attention" } else { short };
    short.replace(", step ", " ").replace(", head group ", " group ")
}

/// A rank's shares, by column.
fn percents(shares: Shares) -> [String; 4] {
    let wall = shares.wall.as_secs_f64().max(f64::MIN_POSITIVE);
    let part = |time: Duration| format!("{:.0} %", 100.0 * time.as_secs_f64() / wall);
    let hidden = shares.overlap().map_or("-".to_owned(), |x| format!("{:.0} %", 100.0 * x));
    [part(shares.compute), part(shares.exposed), part(shares.idle), hidden]
}

/// Ticks at round times, from 0 at the pass's start.
fn axis(svg: &mut Svg, scale: &Scale, top: f64, bottom: f64) {
    let length = scale.length.as_secs_f64();
    let (unit, name) = match length {
        s if s >= 1.0 => (1.0, "s"),
        s if s >= 1e-3 => (1e-3, "ms"),
        _ => (1e-6, "us"),
    };
    let step = round_step(length / unit / 6.0);
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let mut tick = 0;
    while f64::from(tick) * step * unit <= length {
        let value = f64::from(tick) * step;
        let x = scale.at(scale.start + Duration::from_secs_f64(value * unit));
        svg.line("grid", [x, top], [x, bottom]);
        let text = if tick == 0 { "0".to_owned() } else { format!("{value:.decimals$} {name}") };
        svg.text("m s", [x, bottom + 14.0], if tick == 0 { Anchor::Start } else { Anchor::Middle }, &text);
        tick += 1;
    }
}

/// 1, 2 or 5 times a power of ten, not less than `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|n| n * power);
    steps.into_iter().find(|step| *step >= least * (1.0 - 1e-9)).unwrap_or(steps[3])
}

fn foot(svg: &mut Svg, record: &Record, top: f64) -> f64 {
    let mut lines = Vec::new();
    if record.ranks.len() > RANKS {
        lines.push(format!("... and {} more ranks; a trace (--trace) has them all.", record.ranks.len() - RANKS));
    }
    for backward in record.passes() {
        let sum =
            (0..record.ranks.len()).map(|rank| record.shares(rank, backward)).fold(Shares::default(), Shares::sum);
        let [compute, exposed, idle, hidden] = percents(sum);
        let pass = if backward { "Backward" } else { "Forward" };
        lines.push(format!("{pass}, all ranks: compute {compute}, exposed {exposed}, idle {idle}; hidden {hidden}."));
    }
    lines.push(
        "Exposed: time in transfers with no compute beside them. Hidden: the share of transfers beside compute.".into(),
    );
    lines.push(match record.precision {
        Some(precision) => format!("Times of different ranks are comparable to {}.", report::short_time(precision)),
        None => "Times of different ranks are not comparable: they have no common clock.".into(),
    });
    for (i, line) in lines.iter().enumerate() {
        svg.text("m", [16.0, top + 18.0 * i as f64], Anchor::Start, &fit(line, 12.0, WIDTH - 32.0));
    }
    top + 18.0 * (lines.len() - 1) as f64
}

#[cfg(test)]
mod tests {
    use longspan::{Mesh, Placement};
    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::{record, records};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Valid XML; every rank has its name; every span has a bar, inside the axis, as long as it took.
        #[test]
        fn every_span_has_a_bar_inside_the_axis(record in records()) {
            let text = timeline(&record);
            let document = roxmltree::Document::parse(&text).expect("well-formed");
            let has = |class: &str| document.descendants().filter(|n| n.attribute("class").is_some_and(|c| c.starts_with(class))).collect::<Vec<_>>();
            // A pass without a span is no pass.
            let drawn = if record.passes().count() > 0 { record.ranks.len() } else { 0 };
            for rank in 0..drawn {
                let name = format!("rank {rank}");
                prop_assert!(document.descendants().any(|n| n.text() == Some(&name)), "{}", name);
            }
            let (start, end) = record.extent(false);
            for (class, work) in [("c0", Work::Compute), ("c1", Work::Exchange)] {
                // The first is the legend's.
                let bars = &has(class)[1..];
                let spans: Vec<&SpanReport> =
                    record.ranks.iter().flat_map(|r| &r.spans).filter(|s| s.work == work).collect();
                prop_assert_eq!(bars.len(), spans.len());
                for (bar, span) in bars.iter().zip(spans) {
                    let [x, w] = ["x", "width"].map(|a| bar.attribute(a).and_then(|v| v.parse::<f64>().ok()).expect("a number"));
                    prop_assert!(x >= PLOT[0] && w >= 0.0 && x + w <= PLOT[1] + 0.02, "{} {}", x, w);
                    let part = (span.end - span.start).as_secs_f64() / (end - start).max(Duration::from_nanos(1)).as_secs_f64();
                    prop_assert!((w - part * (PLOT[1] - PLOT[0])).abs() < 0.02);
                }
            }
        }
    }

    #[test]
    fn many_ranks_and_spans_are_drawn_small() {
        let mesh = Mesh::new(1, 100, Placement::UlyssesInner).expect("ok");
        let one: Vec<_> = (0..100).map(|i| (Work::Compute, i, 10 * i, 10 * i + 9)).collect();
        let text = timeline(&record(mesh, &vec![one; 100]));
        assert!(text.contains("... and 36 more ranks") && text.contains(">rank 63<"), "{}", text.len());
        assert!(!text.contains(">rank 64<"));
        assert!(text.len() < 200_000, "{}", text.len());
    }

    #[test]
    fn ticks_are_round() {
        for (least, step) in [(0.9, 1.0), (1.0, 1.0), (1.2, 2.0), (3.0, 5.0), (0.07, 0.1), (61.0, 100.0)] {
            assert!((round_step(least) - step).abs() < 1e-9, "{least}: {}", round_step(least));
        }
    }
}
