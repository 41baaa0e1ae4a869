//! Tables for stdout, and numbers as people read them.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::failure::{Failure, Result};

/// A table: columns as wide as their widest cell, numbers to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles.
    pub fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// Adds a row. Missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines of the table, indented by two spaces.
    pub fn render(&self) -> String {
        let columns = self.head.len();
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let cell = |line: &Vec<String>, c: usize| line.get(c).cloned().unwrap_or_default();
        let width = |c: usize| lines().map(|line| cell(line, c).chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let right: Vec<bool> = (0..columns).map(|c| self.is_numeric(c)).collect();
        let mut text = String::new();
        for line in lines() {
            let cells: Vec<String> = (0..columns)
                .map(|c| {
                    let (cell, width) = (cell(line, c), widths[c]);
                    if right[c] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
                })
                .collect();
            text.push_str("  ");
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// The lines of the table without the titles.
    pub fn body(&self) -> String {
        self.render().split_once('\n').map(|(_, body)| body.to_owned()).unwrap_or_default()
    }

    /// Whether every cell of the column starts like a number (or is a dash).
    fn is_numeric(&self, column: usize) -> bool {
        let numeric = |cell: &String| cell == "-" || cell.starts_with(|c: char| c.is_ascii_digit());
        !self.rows.is_empty() && self.rows.iter().filter_map(|row| row.get(column)).all(numeric)
    }
}

static SILENT: AtomicBool = AtomicBool::new(false);

/// Nothing is said from now on: another process of the job does.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Writes to stdout. A reader that went away (`| head`) is no failure.
///
/// # Errors
/// [`Failure::Run`] if stdout can't be written.
pub fn say(text: &str) -> Result<()> {
    if SILENT.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Run(format!("stdout: {e}"))),
        _ => Ok(()),
    }
}

/// Writes a line to stderr, if that can be written: there is nobody else to tell.
pub fn complain(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Bytes with a binary unit and three digits or so: `512 B`, `1.50 KiB`, `12.3 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ if value < 10.0 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// A duration in milliseconds or seconds.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 { format!("{:.2} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

/// A duration that may be far below a millisecond.
pub fn short_time(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    if micros < 1000.0 { format!("{micros:.1} us") } else { time(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_go_right() {
        let mut table = Table::new(&["rank", "what", "time"]);
        table.row(["0".into(), "ring".into(), "9.00 ms".into()]);
        table.row(["10".into(), "a".into(), "-".into()]);
        let lines = "  rank  what     time\n     0  ring  9.00 ms\n    10  a           -\n";
        assert_eq!(table.render(), lines);
    }

    #[test]
    fn units() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (10 << 20, "10.0 MiB"), (500 << 30, "500 GiB")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(time(Duration::from_micros(1500)), "1.50 ms");
        assert_eq!(time(Duration::from_secs(90)), "90.00 s");
        assert_eq!(short_time(Duration::from_nanos(1500)), "1.5 us");
        assert_eq!(short_time(Duration::from_micros(1500)), "1.50 ms");
    }
}
