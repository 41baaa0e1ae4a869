//! Lines over sequence length, or bars for a single one, as SVG. Colours are classes of the page; every series has a marker of its own too.

use std::fmt::Write as _;

/// One line: a name and points `(tokens, value)` by ascending tokens.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Tokens and value.
    pub points: Vec<(usize, f64)>,
}

/// The most series that colours and markers keep apart.
pub const MOST: usize = 6;

/// Size of a picture, and the margins of its plot: left, right, top, bottom.
const SIZE: [f64; 2] = [360.0, 230.0];
const MARGINS: [f64; 4] = [46.0, 16.0, 26.0, 34.0];

/// Height of a bar with its name.
const BAR: f64 = 42.0;

/// Lines of `series` (up to [`MOST`]) over a logarithmic axis of tokens. Values start at 0 and are said in `unit`.
pub fn lines(title: &str, unit: &str, series: &[Series]) -> String {
    let tokens = tokens(series);
    let top = ceiling(series.iter().flat_map(|s| &s.points).map(|p| p.1).fold(0.0, f64::max));
    let plot = Plot { first: tokens.first().copied().unwrap_or(1), last: tokens.last().copied().unwrap_or(1), top };
    let [width, height] = SIZE;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n<text class=\"unit\" x=\"4\" y=\"14\">{}</text>\n",
        escape(title),
        escape(unit)
    );
    grid(&mut svg, &plot, &tokens);
    for (i, one) in series.iter().take(MOST).enumerate() {
        line(&mut svg, &plot, i, one, unit);
    }
    svg.push_str("</svg>\n");
    svg
}

/// A bar for the first point of each of `series` (up to [`MOST`]), named above it. For a single length.
pub fn bars(title: &str, unit: &str, series: &[Series]) -> String {
    let all: Vec<(usize, &str, f64)> = (series.iter().take(MOST).enumerate())
        .filter_map(|(i, s)| Some((i, s.name.as_str(), s.points.first()?.1)))
        .collect();
    let most = all.iter().map(|bar| bar.2).fold(f64::MIN_POSITIVE, f64::max);
    let (width, height) = (SIZE[0], BAR * all.len() as f64);
    let mut svg = format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n", escape(title));
    for (n, (i, name, value)) in all.into_iter().enumerate() {
        let (y, long) = (BAR * n as f64, (value / most * (width - 110.0)).max(1.0));
        let _ = writeln!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text><rect class=\"s{i}\" x=\"0\" y=\"{:.1}\" width=\"{long:.1}\" height=\"14\" \
             rx=\"2\"/><text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{} {}</text>",
            y + 14.0,
            escape(name),
            y + 20.0,
            long + 6.0,
            y + 31.0,
            digits(value),
            escape(unit)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Three digits or so.
fn digits(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// The names of `series` beside their markers, as a list that wraps.
pub fn legend(series: &[Series]) -> String {
    let mut html = "<ul class=\"legend\">\n".to_owned();
    for (i, one) in series.iter().take(MOST).enumerate() {
        let mark = marker(i, 8.0, 8.0);
        let _ = writeln!(
            html,
            "<li><svg width=\"16\" height=\"16\" viewBox=\"0 0 16 16\" aria-hidden=\"true\" class=\"s{i}\">{mark}</svg>{}</li>",
            escape(&one.name)
        );
    }
    html.push_str("</ul>\n");
    html
}

/// Where values lie.
struct Plot {
    first: usize,
    last: usize,
    top: f64,
}

impl Plot {
    fn x(&self, tokens: usize) -> f64 {
        let [left, right, ..] = MARGINS;
        let span = (self.last as f64).log2() - (self.first as f64).log2();
        let at = if span > 0.0 { ((tokens as f64).log2() - (self.first as f64).log2()) / span } else { 0.5 };
        // A little room beside the first and the last point.
        left + 8.0 + at * (SIZE[0] - left - right - 16.0)
    }

    fn y(&self, value: f64) -> f64 {
        let [_, _, above, below] = MARGINS;
        above + (1.0 - value / self.top) * (SIZE[1] - above - below)
    }
}

fn grid(svg: &mut String, plot: &Plot, tokens: &[usize]) {
    let [left, right, _, below] = MARGINS;
    let (end, bottom) = (SIZE[0] - right, SIZE[1] - below);
    for value in ticks(plot.top) {
        let y = plot.y(value);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{left} {y:.1}H{end}\"/><text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" \
             y=\"{:.1}\">{}</text>",
            left - 6.0,
            y + 4.0,
            number(value, plot.top)
        );
    }
    let mut free = f64::NEG_INFINITY;
    for &n in tokens {
        let x = plot.x(n);
        let text = thousands(n);
        let half = 3.5 * text.len() as f64;
        // A label that would touch its neighbour is left out; its tick stays.
        let _ = write!(svg, "<path class=\"axis\" d=\"M{x:.1} {bottom}v4\"/>");
        if x - half > free {
            let _ = write!(
                svg,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{}\">{text}</text>",
                bottom + 16.0
            );
            free = x + half + 2.0;
        }
        svg.push('\n');
    }
    let _ = writeln!(
        svg,
        "<path class=\"axis\" d=\"M{left} {bottom}H{end}\"/><text class=\"tick\" text-anchor=\"end\" x=\"{end}\" \
         y=\"{}\">tokens</text>",
        SIZE[1] - 4.0
    );
}

fn line(svg: &mut String, plot: &Plot, i: usize, series: &Series, unit: &str) {
    let _ = write!(svg, "<g class=\"s{i}\">");
    let at: Vec<String> = series.points.iter().map(|&(n, v)| format!("{:.1} {:.1}", plot.x(n), plot.y(v))).collect();
    if at.len() > 1 {
        let _ = write!(svg, "<path class=\"line\" d=\"M{}\"/>", at.join("L"));
    }
    for &(n, v) in &series.points {
        let said = format!("{}: {n} tokens, {} {unit}", series.name, digits(v));
        let _ = write!(svg, "<g>{}<title>{}</title></g>", marker(i, plot.x(n), plot.y(v)), escape(&said));
    }
    svg.push_str("</g>\n");
}

/// The marker of series `i` around a point.
fn marker(i: usize, x: f64, y: f64) -> String {
    match i % MOST {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>"),
        1 => format!("<path d=\"M{:.1} {:.1}h7v7h-7z\"/>", x - 3.5, y - 3.5),
        2 => format!("<path d=\"M{x:.1} {:.1}l4.5 8h-9z\"/>", y - 5.0),
        3 => format!("<path d=\"M{x:.1} {:.1}l5 5l-5 5l-5 -5z\"/>", y - 5.0),
        4 => format!("<path d=\"M{x:.1} {:.1}l4.5 -8h-9z\"/>", y + 5.0),
        _ => format!("<circle class=\"hollow\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>"),
    }
}

/// All lengths of the series, ascending.
fn tokens(series: &[Series]) -> Vec<usize> {
    let mut all: Vec<usize> = series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The step between ticks: 1, 2 or 5 times a power of ten, for three to six ticks.
fn step(top: f64) -> f64 {
    let rough = (top / 5.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

/// The end of the axis: the first tick that is not below `most`.
fn ceiling(most: f64) -> f64 {
    if !most.is_finite() || most <= 0.0 {
        return 1.0;
    }
    let step = step(most);
    (most / step - 1e-9).ceil().max(1.0) * step
}

fn ticks(top: f64) -> Vec<f64> {
    let step = step(top);
    (0..=(top / step).round() as usize).map(|i| i as f64 * step).collect()
}

/// `value` with as many digits as an axis up to `top` needs.
fn number(value: f64, top: f64) -> String {
    match step(top) {
        s if s >= 1.0 => format!("{value:.0}"),
        s if s >= 0.1 => format!("{value:.1}"),
        s if s >= 0.01 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// `512`, `2k`, `128k`, `1M`; a number that is no whole multiple stays.
pub fn thousands(n: usize) -> String {
    const K: usize = 1 << 10;
    const M: usize = 1 << 20;
    match n {
        n if n >= M && n.is_multiple_of(M) => format!("{}M", n / M),
        n if n >= K && n.is_multiple_of(K) => format!("{}k", n / K),
        n => n.to_string(),
    }
}

/// Text for HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn axes_end_at_a_round_number_with_few_ticks() {
        for (most, top) in [(0.93, 1.0), (1.0, 1.0), (612.0, 800.0), (5.3, 6.0), (0.0, 1.0), (f64::NAN, 1.0)] {
            assert!((ceiling(most) - top).abs() < 1e-9, "{most}: {}", ceiling(most));
            assert!((2..=11).contains(&ticks(top).len()), "{top}: {:?}", ticks(top));
        }
        assert_eq!([thousands(512), thousands(2048), thousands(1 << 20), thousands(1500)], ["512", "2k", "1M", "1500"]);
    }

    proptest! {
        #[test]
        fn every_point_lies_in_the_plot(points in proptest::collection::vec((1usize..1 << 22, 0.0f64..1e15), 1..9)) {
            let mut points = points;
            points.sort_by_key(|p| p.0);
            let most = points.iter().map(|p| p.1).fold(0.0, f64::max);
            let plot = Plot { first: points[0].0, last: points[points.len() - 1].0, top: ceiling(most) };
            for (n, v) in points {
                let (x, y) = (plot.x(n), plot.y(v));
                prop_assert!((MARGINS[0]..=SIZE[0] - MARGINS[1]).contains(&x), "{x}");
                prop_assert!((MARGINS[2] - 0.01..=SIZE[1] - MARGINS[3] + 0.01).contains(&y), "{y}");
            }
        }
    }
}
