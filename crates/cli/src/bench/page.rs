//! The results as one page: no script, no network, light and dark, wide and narrow.

use std::fmt::Write as _;

use crate::bench::chart::{self, MOST, Series, escape, thousands};
use crate::bench::heat;
use crate::bench::record::{Report, Row};
use crate::bench::table::{COLUMNS, cells, facts};

const STYLE: &str = include_str!("page.css");

/// The passes, in the order of the report, with their headings.
const PASSES: [(&str, &str); 3] =
    [("forward", "Forward"), ("backward", "Backward"), ("step", "Step: forward and backward")];

/// The page.
pub fn html(report: &Report) -> String {
    let title = format!("Longspan bench: {}", report.backend);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <link rel=\"icon\" href=\"data:,\">\n<title>{0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>{0}</h1>\n",
        escape(&title)
    );
    page.push_str(&head(report));
    page.push_str(&throughput(report));
    page.push_str(&share(report));
    page.push_str(&cuts(report));
    page.push_str(&table(report));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn head(report: &Report) -> String {
    let mut html = "<dl class=\"facts\">\n".to_owned();
    for (what, value) in facts(report) {
        let _ = writeln!(html, "<div><dt>{what}</dt><dd>{}</dd></div>", escape(&value));
    }
    html.push_str("</dl>\n");
    html
}

fn throughput(report: &Report) -> String {
    let best = report.rows.iter().map(|row| row.flops_per_second).fold(0.0, f64::max);
    let (unit, scale) = if best >= 1e12 { ("TFLOP/s", 1e12) } else { ("GFLOP/s", 1e9) };
    charts(report, "Throughput", unit, |row| Some(row.flops_per_second / scale))
}

fn share(report: &Report) -> String {
    if let Some(why) = &report.peak_missing {
        return format!("<h2>Share of peak</h2>\n<p>Not known: {}</p>\n", escape(why));
    }
    charts(report, "Share of peak", "%", |row| row.share_of_peak.map(|x| 100.0 * x))
}

/// A picture for each pass.
fn charts(report: &Report, heading: &str, unit: &str, value: impl Fn(&Row) -> Option<f64>) -> String {
    let names = kept(report);
    let single = report.rows.iter().all(|row| row.seq == report.rows[0].seq);
    let draw = if single { chart::bars } else { chart::lines };
    let mut html = format!("<h2>{heading}</h2>\n<div class=\"charts\">\n");
    let mut legend = String::new();
    for (pass, title) in PASSES {
        let of = |name: &String| Series {
            name: name.clone(),
            points: points(
                report.rows.iter().filter(|row| row.pass == pass && series_of(report, row) == *name),
                &value,
            ),
        };
        let series: Vec<Series> = names.iter().map(of).collect();
        if series.iter().any(|s| !s.points.is_empty()) {
            let picture = draw(&format!("{heading}, {title}"), unit, &series);
            let _ = write!(html, "<figure><figcaption>{title}</figcaption>\n{picture}</figure>\n");
            legend = if single { String::new() } else { chart::legend(&series) };
        }
    }
    html.push_str("</div>\n");
    html.push_str(&legend);
    let all = series_names(report).len();
    if all > names.len() {
        let _ = writeln!(html, "<p class=\"note\">The {} fastest of {all}; all are in the table.</p>", names.len());
    }
    html
}

fn points<'a>(rows: impl Iterator<Item = &'a Row>, value: impl Fn(&Row) -> Option<f64>) -> Vec<(usize, f64)> {
    let mut points: Vec<(usize, f64)> = rows.filter_map(|row| Some((row.seq, value(row)?))).collect();
    points.sort_by_key(|p| p.0);
    points
}

/// What a row's line is called: its cut, and its packing where both were measured.
fn series_of(report: &Report, row: &Row) -> String {
    let both = report.rows.iter().any(|r| r.packed);
    let input = match (both, row.packed) {
        (false, _) => "",
        (true, false) => ", apart",
        (true, true) => ", packed",
    };
    format!("{} ulysses x {} ring{input}", row.ulysses, row.ring)
}

/// All lines, in the order of the rows.
fn series_names(report: &Report) -> Vec<String> {
    let mut names = Vec::new();
    for row in &report.rows {
        let name = series_of(report, row);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The lines that are drawn: all, or the fastest.
fn kept(report: &Report) -> Vec<String> {
    let mut names = series_names(report);
    if names.len() > MOST {
        let best = |name: &String| {
            let of = report.rows.iter().filter(|row| series_of(report, row) == *name);
            of.map(|row| row.flops_per_second).fold(0.0, f64::max)
        };
        let mut by_speed = names.clone();
        by_speed.sort_by(|a, b| best(b).total_cmp(&best(a)));
        by_speed.truncate(MOST);
        names.retain(|name| by_speed.contains(name));
    }
    names
}

/// The heat map of the longest length, of the last pass.
fn cuts(report: &Report) -> String {
    let Some(seq) = report.rows.iter().map(|row| row.seq).max() else { return String::new() };
    let mut html = String::new();
    for (pass, title) in PASSES {
        let rows: Vec<&Row> =
            report.rows.iter().filter(|row| row.seq == seq && row.pass == pass && !row.packed).collect();
        if let Some(table) = heat::table(&rows) {
            let _ = write!(html, "<figure><figcaption>{title}</figcaption>\n{table}</figure>\n");
        }
    }
    if html.is_empty() {
        return html;
    }
    let heading = format!("Ulysses x ring at {} tokens", thousands(seq));
    format!("<h2>{heading}</h2>\n<div class=\"charts\">\n{html}</div>\n")
}

fn table(report: &Report) -> String {
    let mut html = "<h2>All figures</h2>\n<table class=\"rows\" id=\"rows\">\n<thead><tr>".to_owned();
    for title in COLUMNS {
        let _ = write!(html, "<th scope=\"col\">{title}</th>");
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in &report.rows {
        html.push_str("<tr>");
        for (title, cell) in COLUMNS.iter().zip(cells(row)) {
            let _ = write!(html, "<td data-title=\"{title}\">{}</td>", escape(&cell));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody>\n</table>\n");
    for r in &report.refused {
        let input = if r.packed { ", packed" } else { "" };
        let what = format!("{} tokens, {} x {}{input}: {}", r.seq, r.ulysses, r.ring, r.why);
        let _ = writeln!(html, "<p class=\"note\">Not measured: {}</p>", escape(&what));
    }
    html.push_str(
        "<p class=\"note\">time: median of the slowest rank; spread: fastest and slowest repetition; rate: operations of allowed \
         pairs only, of all devices together; of peak: of what the devices themselves were measured to do; exchange: sent by a \
         rank while an exchange ran; overlap: time of the same work with its share of the heads on every device alone, without \
         exchange, over this time; memory: the most on a rank, tensors included.</p>\n",
    );
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::{PeakRecord, Refused, SCHEMA, Shape};

    fn row(seq: usize, ulysses: u32, ring: u32, pass: &str) -> Row {
        Row {
            seq,
            ulysses,
            ring,
            head_groups: 1,
            devices: 1,
            packed: false,
            pass: pass.to_owned(),
            median_s: 0.5,
            fastest_s: 0.4,
            slowest_s: 0.6,
            flops: 1e12,
            flops_per_second: 2e12 / f64::from(ulysses * ring),
            share_of_peak: Some(0.5),
            alone_s: Some(0.45),
            overlap_efficiency: Some(0.9),
            sent_bytes: 100,
            exchange_s: 0.1,
            exchange_gb_s: Some(1.0),
            peak_bytes: 1 << 20,
            predicted_bytes: 1 << 20,
            kernels: vec!["a<b> X=1".to_owned()],
        }
    }

    fn report(rows: Vec<Row>) -> Report {
        Report {
            schema: SCHEMA.to_owned(),
            program: "longspan 0".to_owned(),
            date: "2026-01-02".to_owned(),
            machine: "a host & <more>".to_owned(),
            load: Some(3.0),
            backend: "cpu".to_owned(),
            devices: vec!["a device".to_owned()],
            exchange: "default".to_owned(),
            problem: Shape {
                batch: 1,
                heads: 8,
                kv_heads: 8,
                head_dim: 64,
                head_dim_v: 64,
                dtype: "bf16".to_owned(),
                mask: "causal".to_owned(),
                layout: "zigzag".to_owned(),
                placement: "ulysses-inner".to_owned(),
                head_groups: None,
                options: vec![],
            },
            repeat: 5,
            peak: Some(PeakRecord { flops_per_second: vec![4e12], how: "x".to_owned() }),
            peak_missing: None,
            rows,
            refused: vec![],
        }
    }

    #[test]
    fn every_row_is_in_the_table_and_text_is_escaped() {
        let mut report = report((1..=4).flat_map(|u| [1024, 2048].map(|s| row(s, u, 1, "forward"))).collect());
        report.refused.push(Refused { seq: 1, ulysses: 1, ring: 1, packed: true, why: "a < b".to_owned() });
        let page = html(&report);
        let body = page.split("id=\"rows\"").nth(1).and_then(|t| t.split("</table>").next()).expect("the table");
        assert_eq!(body.matches("<tr>").count(), 1 + report.rows.len());
        assert!(
            page.contains("a host &amp; &lt;more&gt;")
                && page.contains("3.0 before the run")
                && page.contains("a &lt; b")
                && page.contains("a&lt;b&gt;")
        );
        for absent in ["<script", "http:", "https:", "url(", "@import"] {
            assert!(!page.contains(absent), "{absent}");
        }
        assert!(page.contains("class=\"heat\"") && page.contains("prefers-color-scheme"));
    }

    #[test]
    fn many_cuts_are_thinned_out_in_the_pictures_only() {
        let report = report((1..=9).map(|u| row(1024, u, 1, "step")).collect());
        let page = html(&report);
        assert!(page.contains("The 6 fastest of 9") && page.contains("<td data-title=\"U x R\">9 x 1</td>"));
        assert!(page.contains(">1 ulysses x 1 ring</text>") && !page.contains(">9 ulysses x 1 ring</text>"));
    }

    #[test]
    fn without_a_peak_the_page_says_why() {
        let mut report = report(vec![row(1024, 1, 1, "forward")]);
        (report.peak, report.peak_missing, report.rows[0].share_of_peak) = (None, Some("no library".into()), None);
        let page = html(&report);
        assert!(page.contains("Not known: no library") && page.contains("<td data-title=\"of peak\">-</td>"));
        assert!(!page.contains("class=\"heat\""));
    }
}
