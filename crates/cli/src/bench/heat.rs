//! The heat map: throughput of every Ulysses x ring cut, as a table whose cells are coloured.

use std::fmt::Write as _;

use crate::bench::record::Row;
use crate::bench::table::rate;

/// Shades of the page, from the lowest to the highest.
const SHADES: usize = 6;

/// A table of `rows`, all of one length, pass and packing; nothing for fewer than two cuts.
pub fn table(rows: &[&Row]) -> Option<String> {
    let [ulysses, ring] = [sizes(rows, |row| row.ulysses), sizes(rows, |row| row.ring)];
    if ulysses.len() * ring.len() < 2 {
        return None;
    }
    let best = rows.iter().map(|row| row.flops_per_second).fold(0.0, f64::max);
    let worst = rows.iter().map(|row| row.flops_per_second).fold(f64::INFINITY, f64::min);
    let mut html = "<table class=\"heat\">\n<thead><tr><th scope=\"col\">U \\ R</th>".to_owned();
    for r in &ring {
        let _ = write!(html, "<th scope=\"col\">{r}</th>");
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for &u in &ulysses {
        let _ = write!(html, "<tr><th scope=\"row\">{u}</th>");
        for &r in &ring {
            match rows.iter().find(|row| (row.ulysses, row.ring) == (u, r)) {
                Some(row) => {
                    let (x, share) = (row.flops_per_second, 100.0 * row.flops_per_second / best.max(f64::MIN_POSITIVE));
                    let text = rate(x);
                    let (value, unit) = text.split_once(' ').unwrap_or((&text, ""));
                    let shade = shade(x, worst, best);
                    let _ = write!(
                        html,
                        "<td class=\"h{shade}\"><b>{value}</b> <small>{unit}<br>{share:.0} % of best</small></td>"
                    );
                }
                None => html.push_str("<td>-</td>"),
            }
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody>\n</table>\n");
    Some(html)
}

/// The shade of `x` between the worst and the best. Cuts that are all alike, within a twentieth, are all shaded as the best.
fn shade(x: f64, worst: f64, best: f64) -> usize {
    let span = best - worst;
    if span <= best / 20.0 {
        return SHADES - 1;
    }
    (((x - worst) / span * SHADES as f64) as usize).min(SHADES - 1)
}

fn sizes(rows: &[&Row], of: impl Fn(&Row) -> u32) -> Vec<u32> {
    let mut all: Vec<u32> = rows.iter().map(|row| of(row)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shades_span_the_cuts_and_do_not_exaggerate() {
        assert_eq!([shade(1.0, 1.0, 2.0), shade(1.5, 1.0, 2.0), shade(2.0, 1.0, 2.0)], [0, 3, 5]);
        assert_eq!([shade(0.96, 0.96, 1.0), shade(1.0, 0.96, 1.0)], [5, 5]);
    }
}
