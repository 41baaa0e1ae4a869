//! Just enough SVG: rectangles, paths and text in classes, under one style sheet.

use std::fmt::Write;

/// Width of every picture, in user units.
pub const WIDTH: f64 = 960.0;

/// Colours that have a class `c0`, `c1`, ... each: in the light, and in the dark.
pub const COLOURS: [(&str, &str); 8] = [
    ("#0072b2", "#3f9fe0"),
    ("#e69f00", "#e69f00"),
    ("#009e73", "#14b88a"),
    ("#cc79a7", "#d88bb6"),
    ("#56b4e9", "#9bd6f7"),
    ("#d55e00", "#e8701a"),
    ("#b8aa00", "#f0e442"),
    ("#8a8a8a", "#a8a8a8"),
];

/// Average width of a letter of size 1; a little more than it is in common fonts, so that texts do not touch.
const LETTER: f64 = 0.56;

/// Which end of a text its position names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Anchor {
    /// Its right end.
    End,
    /// Its middle.
    Middle,
    /// Its left end.
    Start,
}

/// A picture that grows downward.
#[derive(Clone, Debug, Default)]
pub struct Svg {
    body: String,
    /// How what is open ends.
    ends: Vec<&'static str>,
}

impl Svg {
    /// The whole file. `title` is what a screen reader says.
    pub fn finish(self, height: f64, title: &str) -> String {
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {h}\" width=\"{WIDTH}\" height=\"{h}\" \
             role=\"img\">\n<title>{}</title>\n<style>\n{}</style>\n",
            escape(title),
            style(),
            h = number(height.ceil()),
        );
        text.push_str("<rect class=\"bg\" width=\"100%\" height=\"100%\"/>\n");
        text.push_str(&self.body);
        text.push_str("</svg>\n");
        text
    }

    /// A rectangle. With `hint`, the words that appear over it.
    pub fn rect(&mut self, class: &str, [x, y, w, h]: [f64; 4], hint: Option<&str>) {
        let at = format!("x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"", number(x), number(y), number(w), number(h));
        let _ = match hint {
            Some(hint) => writeln!(self.body, "<rect class=\"{class}\" {at}><title>{}</title></rect>", escape(hint)),
            None => writeln!(self.body, "<rect class=\"{class}\" {at}/>"),
        };
    }

    /// A path.
    pub fn path(&mut self, class: &str, data: &str) {
        let _ = writeln!(self.body, "<path class=\"{class}\" d=\"{data}\"/>");
    }

    /// What follows, up to [`Svg::close`], is drawn in units of `scale` from `at`.
    pub fn open(&mut self, [x, y]: [f64; 2], scale: f64) {
        let _ = writeln!(self.body, "<g transform=\"translate({} {}) scale({scale:.6})\">", number(x), number(y));
        self.ends.push("</g>\n");
    }

    /// What follows, up to [`Svg::close`], is drawn only where [`Svg::again`] says.
    pub fn define(&mut self, name: &str) {
        let _ = writeln!(self.body, "<defs><g id=\"{name}\">");
        self.ends.push("</g></defs>\n");
    }

    /// Ends what [`Svg::open`] or [`Svg::define`] began.
    pub fn close(&mut self) {
        self.body.push_str(self.ends.pop().unwrap_or_default());
    }

    /// Draws what was defined as `name`, at `at`.
    pub fn again(&mut self, name: &str, [x, y]: [f64; 2]) {
        let _ = writeln!(self.body, "<use href=\"#{name}\" x=\"{}\" y=\"{}\"/>", number(x), number(y));
    }

    /// A straight line.
    pub fn line(&mut self, class: &str, from: [f64; 2], to: [f64; 2]) {
        let [x, y, u, v] = [from[0], from[1], to[0], to[1]].map(number);
        self.path(class, &format!("M{x} {y}L{u} {v}"));
    }

    /// A line of text whose base line is at `y`.
    pub fn text(&mut self, class: &str, [x, y]: [f64; 2], anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::End => " text-anchor=\"end\"",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::Start => "",
        };
        let (x, y, text) = (number(x), number(y), escape(text));
        let _ = writeln!(self.body, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\"{anchor}>{text}</text>");
    }
}

/// The width that a text of font size `size` takes at most, near enough.
pub fn width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * LETTER
}

/// The text, cut so that it fits `room` at font size `size`.
pub fn fit(text: &str, size: f64, room: f64) -> String {
    if width(text, size) <= room {
        return text.to_owned();
    }
    let letters = (room / (size * LETTER)).floor() as usize;
    text.chars().take(letters.saturating_sub(3)).chain("...".chars()).collect()
}

/// A coordinate with two decimals at most.
pub fn number(x: f64) -> String {
    let text = format!("{x:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // What XML 1.0 does not allow at all.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

/// Literal colours rather than custom properties, which viewers that are no browsers do not know.
fn style() -> String {
    let colours = |dark: bool| -> String {
        let one = |(i, c): (usize, &(&str, &str))| format!(".c{i}{{fill:{}}}", if dark { c.1 } else { c.0 });
        COLOURS.iter().enumerate().map(one).collect()
    };
    format!(
        "text{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:12px;fill:#1f2328}}\n\
         .bg{{fill:#fff}}.h{{font-size:16px;font-weight:600}}.b{{font-weight:600}}.s{{font-size:11px}}\n\
         .m,.m.s{{fill:#59636e}}.on{{font-size:11px;fill:#fff}}.ink{{font-size:11px;fill:#1f2328}}\n\
         .lane{{fill:#eef1f4}}.other{{fill:#d9dee3}}.grid{{stroke:#c9d1d9;fill:none}}.frame{{stroke:#8c959f;fill:none}}\n\
         .bar{{stroke:#fff;stroke-width:.7}}.part{{fill-opacity:.6}}\n{}\n\
         @media (prefers-color-scheme:dark){{text{{fill:#e6edf3}}.bg{{fill:#0d1117}}.m,.m.s{{fill:#9da7b1}}\n\
         .on,.ink{{fill:#0d1117}}.lane{{fill:#1c2128}}.other{{fill:#30363d}}.grid{{stroke:#30363d}}.frame{{stroke:#6e7681}}\n\
         .bar{{stroke:#0d1117}}\n{}}}\n",
        colours(false),
        colours(true)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_numbers_are_short() {
        let mut svg = Svg::default();
        svg.text("s", [1.0, 2.005], Anchor::End, "a < b & \"c\"\u{1}\u{ffff}");
        svg.rect("c0", [0.0, -0.001, 1.0 / 3.0, 10.0], Some("<hint>"));
        let text = svg.finish(10.2, "x > y");
        let document = roxmltree::Document::parse(&text).expect("well-formed");
        let said: Vec<&str> = document.descendants().filter_map(|n| n.text()).collect();
        assert!(said.contains(&"a < b & \"c\"??") && said.contains(&"x > y") && said.contains(&"<hint>"), "{said:?}");
        assert!(text.contains("y=\"0\" width=\"0.33\" height=\"10\""), "{text}");
        assert!(text.contains("viewBox=\"0 0 960 11\""), "{text}");
    }

    #[test]
    fn a_long_text_is_cut_to_its_room() {
        assert_eq!(fit("abc", 10.0, 100.0), "abc");
        let cut = fit(&"a".repeat(100), 10.0, 100.0);
        assert!(cut.ends_with("...") && width(&cut, 10.0) <= 100.0, "{cut}");
    }
}
