//! The results as text, and figures as people read them.

use crate::bench::record::{Report, Row};
use crate::report::{Table, bytes, time};

/// Titles of the columns, in the text and in the page.
pub const COLUMNS: [&str; 13] = [
    "tokens",
    "U x R",
    "input",
    "pass",
    "time",
    "spread",
    "rate",
    "of peak",
    "exchange",
    "overlap",
    "memory",
    "predicted",
    "kernel",
];

/// Load of a host before the run from which on figures are doubtful.
const BUSY: f64 = 0.5;

/// The cells of a row, as [`COLUMNS`] has them.
pub fn cells(row: &Row) -> [String; 13] {
    let share = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{:.1} %", 100.0 * x));
    [
        row.seq.to_string(),
        if row.head_groups > 1 { format!("{}, {} groups", row.cut(), row.head_groups) } else { row.cut() },
        if row.packed { "packed" } else { "apart" }.to_owned(),
        row.pass.clone(),
        time(std::time::Duration::from_secs_f64(row.median_s)),
        spread(row),
        rate(row.flops_per_second),
        share(row.share_of_peak),
        row.exchange_gb_s
            .map_or("-".to_owned(), |x| if x < 10.0 { format!("{x:.2} GB/s") } else { format!("{x:.0} GB/s") }),
        share(row.overlap_efficiency),
        bytes(row.peak_bytes),
        if row.peak_bytes == row.predicted_bytes { "equal".to_owned() } else { bytes(row.predicted_bytes) },
        short(&row.kernels),
    ]
}

/// What stands above the rows: what was computed, on what.
pub fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let p = &report.problem;
    let mut facts = vec![
        ("backend", format!("{}, exchange {}", report.backend, report.exchange)),
        ("devices", devices(&report.devices)),
        ("host", report.machine.clone()),
        (
            "shape",
            format!(
                "batch {}, heads {}, kv heads {}, head dim {} / {}, {}",
                p.batch, p.heads, p.kv_heads, p.head_dim, p.head_dim_v, p.dtype
            ),
        ),
        ("cut", format!("{} mask, {} layout, {}", p.mask, p.layout, p.placement)),
    ];
    let mut options = p.options.clone();
    options.extend(p.head_groups.filter(|n| *n > 1).map(|n| format!("{n} head groups")));
    if !options.is_empty() {
        facts.push(("options", options.join(", ")));
    }
    facts.push(("peak", peak(report)));
    if let Some(load) = report.load.filter(|load| *load >= BUSY) {
        let what = "other work ran beside it: rates are lower bounds, small differences mean nothing";
        facts.push(("load", format!("{load:.1} before the run; {what}")));
    }
    facts.push(("run", format!("{}, {}, median of {}", report.date, report.program, report.repeat)));
    facts
}

fn peak(report: &Report) -> String {
    match (&report.peak, &report.peak_missing) {
        (Some(peak), _) => {
            let all: Vec<String> = peak.flops_per_second.iter().map(|x| rate(*x)).collect();
            format!("{} ({})", all.join(", "), peak.how)
        }
        (None, why) => format!("not measured: {}", why.as_deref().unwrap_or("unknown")),
    }
}

/// `2 x NAME` where all have one name.
fn devices(names: &[String]) -> String {
    match names {
        [first, rest @ ..] if !rest.is_empty() && rest.iter().all(|n| n == first) => {
            format!("{} x {first}", names.len())
        }
        _ => names.join(", "),
    }
}

/// The report as text.
pub fn text(report: &Report) -> String {
    let mut head = Table::new(&["", ""]);
    for (what, value) in facts(report) {
        head.row([what.to_owned(), value]);
    }
    let mut rows = Table::new(&COLUMNS);
    for row in &report.rows {
        rows.row(cells(row));
    }
    let mut text = format!("{}\n{}", head.body(), rows.render());
    for r in &report.refused {
        let input = if r.packed { ", packed" } else { "" };
        text.push_str(&format!("\n  not measured: {} tokens, {} x {}{input}: {}\n", r.seq, r.ulysses, r.ring, r.why));
    }
    text
}

/// How far the fastest and the slowest repetition are from the median.
fn spread(row: &Row) -> String {
    let from = |x: f64| match 100.0 * (x / row.median_s.max(f64::MIN_POSITIVE) - 1.0) {
        percent if percent.abs() < 10.0 => format!("{percent:+.1}"),
        percent => format!("{percent:+.0}"),
    };
    format!("{} {} %", from(row.fastest_s), from(row.slowest_s))
}

/// Operations per second with a unit: `52.1 GFLOP/s`, `612 TFLOP/s`.
pub fn rate(flops_per_second: f64) -> String {
    let (value, unit) = if flops_per_second >= 1e12 {
        (flops_per_second / 1e12, "TFLOP/s")
    } else {
        (flops_per_second / 1e9, "GFLOP/s")
    };
    match value {
        v if v < 10.0 => format!("{v:.2} {unit}"),
        v if v < 100.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

/// Kernel files without their options, each once.
fn short(kernels: &[String]) -> String {
    let mut names: Vec<&str> = kernels.iter().map(|k| k.split(' ').next().unwrap_or(k)).collect();
    names.dedup();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_three_digits() {
        let cases =
            [(5.2e7, "0.05 GFLOP/s"), (5.21e10, "52.1 GFLOP/s"), (6.123e14, "612 TFLOP/s"), (1.5e12, "1.50 TFLOP/s")];
        for (x, text) in cases {
            assert_eq!(rate(x), text);
        }
    }

    #[test]
    fn kernels_are_shortened_and_alike_devices_counted() {
        let names = ["sm80_f BF16 HEAD_DIM=64", "sm80_f BF16 HEAD_DIM=128", "other"].map(str::to_owned);
        assert_eq!(short(&names), "sm80_f, other");
        assert_eq!(devices(&["a".to_owned(), "a".to_owned()]), "2 x a");
        assert_eq!(devices(&["a".to_owned(), "b".to_owned()]), "a, b");
    }
}
