//! Progress on stderr; nothing where stderr is not a terminal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

static SILENT: AtomicBool = AtomicBool::new(false);

/// Nothing is shown from now on: another process of the job does.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

fn target() -> ProgressDrawTarget {
    if SILENT.load(Ordering::Relaxed) { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() }
}

/// A bar for work of known length.
pub fn bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), target()).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar
}

/// A spinner for work of unknown length.
pub fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.set_draw_target(target());
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}
