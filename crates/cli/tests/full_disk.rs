//! A disk that is full: an error, exit code 1, what was there is still there, and nothing is half-written.
#![cfg(unix)]

#[allow(dead_code)] // other tests use the rest
mod common;

use std::fs::{self, OpenOptions};
use std::process::{Child, Command, Stdio};

use common::{Said, longspan, said, text};

const RUN: [&str; 5] = ["run", "--synthetic", "1,64,2,2,16", "--ring", "2"];
const BENCH: &[&str] = &["bench", "--seq", "64", "--heads", "2", "--head-dim", "16", "--repeat", "1", "--ring", "2"];
const CONFORMANCE: [&str; 3] = ["conformance", "--filter", "device/"];

/// `longspan ARGS` where a file may have half a kilobyte and no more: writing fails in the middle, as on a full disk.
fn where_little_fits(args: &[&str]) -> Said {
    let limited = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
    said(Command::new("sh").args(["-c", limited, "sh", env!("CARGO_BIN_EXE_longspan")]).args(args))
}

#[track_caller]
fn fails_and_leaves_what_was(command: &[&str], option: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    for before in [None, Some("what was there")] {
        before.iter().for_each(|text| fs::write(&path, text).expect("writable"));
        let said = where_little_fits(&[command, &[option, text(&path)]].concat());
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("file was not written: "), "{}", said.stderr);
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
        assert_eq!(
            fs::read_dir(folder.path()).expect("readable").count(),
            before.iter().count(),
            "nothing else is left"
        );
    }
    // It is the disk: with room, the same is written.
    let said = longspan(&[command, &[option, text(&path)]].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(fs::metadata(&path).expect("written").len() > 1024);
}

#[test]
fn results_of_a_run() {
    for option in ["--output", "--trace", "--timeline"] {
        fails_and_leaves_what_was(&RUN, option);
    }
}

#[test]
fn reports_of_a_benchmark() {
    for option in ["--json", "--html", "--trace"] {
        fails_and_leaves_what_was(BENCH, option);
    }
}

#[test]
fn reports_of_conformance_and_pictures_of_layouts() {
    fails_and_leaves_what_was(&CONFORMANCE, "--json");
    fails_and_leaves_what_was(&["layout", "--seq", "64"], "--svg");
}

#[cfg(target_os = "linux")]
#[test]
fn standard_output_and_error() {
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("a device of Linux");
    let program = || Command::new(env!("CARGO_BIN_EXE_longspan"));
    let output = program().args(RUN).stdout(full()).stderr(Stdio::piped()).spawn().and_then(Child::wait_with_output);
    let output = output.expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("stdout: No space left on device"), "{output:?}");
    let refused = program().args(["run", "--input", "/no/such"]).stderr(full()).status().expect("it starts");
    assert_eq!(refused.code(), Some(2), "nobody is told, and nothing panics");
}
