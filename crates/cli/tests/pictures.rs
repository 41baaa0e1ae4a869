//! Traces, timelines and pictures of layouts, as the program writes them.

#[allow(dead_code)] // other tests use the rest of it
mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Folder, bytes_of, good, longspan, text};
use serde_json::Value;

/// A run that exchanges in every way, recorded: its trace and its timeline.
fn recorded(more: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let (trace, timeline) = (folder.path().join("run.json"), folder.path().join("run.svg"));
    let args =
        ["run", "--synthetic", "1,96,4,2,16", "--backward", "--trace", text(&trace), "--timeline", text(&timeline)];
    let said = longspan(&[&args[..], more].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 2, "no temporary file is left");
    let trace = serde_json::from_slice(&std::fs::read(&trace).expect("written")).expect("JSON");
    (trace, std::fs::read_to_string(&timeline).expect("written"))
}

fn events<'a>(trace: &'a Value, phase: &str) -> Vec<&'a Value> {
    trace["traceEvents"].as_array().expect("a list").iter().filter(|e| e["ph"] == phase).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

#[test]
fn a_trace_has_every_rank_and_step_and_its_messages_come_after_they_left() {
    let (trace, _) = recorded(&["--ulysses", "2", "--ring", "3", "--mask", "causal", "--layout", "zigzag"]);
    let slices = events(&trace, "X");
    for rank in 0..6 {
        for (pass, name) in [("forward", "attention forward"), ("backward", "attention backward")] {
            for step in 0..3 {
                let wanted = format!("{name}, step {step}");
                let found =
                    slices.iter().filter(|s| s["pid"] == rank && s["cat"] == pass && s["name"] == wanted.as_str());
                // A backward attends with the own block in two halves.
                let calls = if pass == "backward" && step == 0 { 2 } else { 1 };
                assert_eq!(found.count(), calls, "rank {rank}: {wanted}");
            }
        }
    }
    let words: BTreeSet<&str> = slices.iter().filter_map(|s| s["args"]["phase"].as_str()).collect();
    for phase in ["gather", "hop", "return", "give back", "collect", "delta", "sum"] {
        assert!(words.contains(phase), "{phase} in {words:?}");
    }
    // A message arrives after it left, within the precision of the clock.
    let precision = number(&trace["otherData"]["clock_precision_us"]);
    let starts: BTreeMap<u64, &Value> =
        events(&trace, "s").into_iter().map(|e| (e["id"].as_u64().expect("id"), e)).collect();
    let finishes = events(&trace, "f");
    assert!(!finishes.is_empty() && finishes.len() == starts.len());
    for finish in finishes {
        let start = starts[&finish["id"].as_u64().expect("id")];
        assert!(number(&finish["ts"]) + precision >= number(&start["ts"]), "{start} {finish}");
        assert_ne!(start["pid"], finish["pid"]);
    }
    // Perfetto drops a slice that overlaps the one before by a nanosecond, and joins arrows by id, name and category.
    for rank in 0..6 {
        for stream in 1..4 {
            let of = slices.iter().filter(|s| s["pid"] == rank && s["tid"] == stream);
            let mut times: Vec<(u64, u64)> =
                of.map(|s| (nanos(&s["ts"]), nanos(&s["ts"]) + nanos(&s["dur"]))).collect();
            times.sort_unstable();
            assert!(times.windows(2).all(|w| w[0].1 <= w[1].0), "rank {rank} stream {stream}: {times:?}");
        }
    }
    for finish in events(&trace, "f") {
        let start = starts[&finish["id"].as_u64().expect("id")];
        assert_eq!(
            (&start["name"], &start["cat"], &finish["bp"]),
            (&finish["name"], &finish["cat"], &Value::from("e"))
        );
    }
}

/// Whole nanoseconds, which is what the format's microseconds with three decimals become.
fn nanos(value: &Value) -> u64 {
    let exact = number(value) * 1e3;
    assert!((exact - exact.round()).abs() < 1e-3, "{value} has more than three decimals");
    exact.round() as u64
}

#[test]
fn bytes_in_a_trace_are_those_of_the_table() {
    let args = ["--ring", "4", "--mask", "window:20", "--layout", "contiguous"];
    let (trace, _) = recorded(&args);
    let sum = |key: &str| -> u64 {
        let all = events(&trace, "X").into_iter().filter_map(|s| s["args"][key].as_object());
        all.flat_map(|peers| peers.values()).filter_map(Value::as_u64).sum()
    };
    let sent: u64 = events(&trace, "X").into_iter().filter_map(|s| s["args"]["bytes_sent"].as_u64()).sum();
    assert!(sent > 0);
    assert_eq!((sum("to"), sum("from")), (sent, sent));
}

#[test]
fn head_groups_options_and_one_rank_have_names_too() {
    let (trace, timeline) = recorded(&["--ulysses", "2", "--head-groups", "2", "--sinks"]);
    let names: BTreeSet<&str> = events(&trace, "X").into_iter().filter_map(|s| s["name"].as_str()).collect();
    for name in ["gather, head group 1", "attention forward, head group 1", "share dsinks"] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    assert!(timeline.contains(">rank 1<") && timeline.contains("Backward"));
    let (alone, _) = recorded(&[]);
    assert!(events(&alone, "s").is_empty() && !events(&alone, "X").is_empty());
}

#[test]
fn a_timeline_shows_every_rank_and_says_how_well_clocks_agree() {
    let (_, timeline) = recorded(&["--ulysses", "2", "--ring", "2"]);
    let document = roxmltree::Document::parse(&timeline).expect("well-formed");
    let said: Vec<&str> = document.descendants().filter(roxmltree::Node::is_text).filter_map(|n| n.text()).collect();
    for rank in 0..4 {
        assert_eq!(said.iter().filter(|t| **t == format!("rank {rank}")).count(), 2, "forward and backward");
    }
    for words in ["Forward", "Backward", "Times of different ranks are comparable to"] {
        assert!(said.iter().any(|t| t.starts_with(words)), "{words}: {said:?}");
    }
    for name in ["attention forward, step 1: ", "hop, step 1: ", "give back: "] {
        assert!(said.iter().filter(|t| t.starts_with(name)).count() >= 4, "{name}: {said:?}");
    }
}

#[test]
fn a_layout_is_drawn_with_every_rank_and_step() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("layout.svg");
    let args = ["layout", "--seq", "60", "--ulysses", "2", "--ring", "3", "--layout", "zigzag", "--mask", "causal"];
    let said = longspan(&[&args[..], &["--cu-seqlens", "0,25,60", "--svg", text(&path)]].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    let file = std::fs::read_to_string(&path).expect("written");
    let document = roxmltree::Document::parse(&file).expect("well-formed");
    let said: Vec<&str> = document.descendants().filter(roxmltree::Node::is_text).filter_map(|n| n.text()).collect();
    for words in ["rank 5: ring 2, part 1", "Step 0", "Step 2", "2 ulysses x 3 ring, ulysses-inner, 2 packed documents"]
    {
        assert!(said.contains(&words), "{words}: {said:?}");
    }
}

#[test]
fn pictures_that_cannot_be_written_are_refused_before_the_run() {
    let folder = Folder::new(&bytes_of(&good()));
    let refused = |args: &[&str], words: &str| {
        let said = longspan(&[&["run", "--input", text(&folder.input)][..], args].concat());
        assert!(said.code == Some(2) && said.stderr.contains(words), "{said:?}");
        assert!(!said.stdout.contains("compute"), "nothing may run: {}", said.stdout);
        assert_eq!(folder.files(), ["in.safetensors"], "nothing may be written");
    };
    let out = text(&folder.output);
    refused(&["--trace", "/no/such/folder/run.json"], "cannot be written");
    refused(&["--timeline", "/dev/null"], "not a regular file");
    refused(&["--trace", text(&folder.input)], "is the input file");
    refused(&["--trace", out, "--timeline", out], "is named twice");
    refused(&["--output", out, "--trace", out], "is named twice");
    for (args, words) in [
        (["layout", "--svg", "/no/such/folder/a.svg"], "cannot be written"),
        (["layout", "--svg", "/"], "output /"),
        (["layout", "--svg", "/dev/full"], "not a regular file"),
    ] {
        let said = longspan(&args);
        assert!(said.code == Some(2) && said.stderr.contains(words), "{said:?}");
    }
    let both = longspan(&["layout", "--ring-rank", "0", "--svg", out]);
    assert_eq!(both.code, Some(2), "{both:?}");
}

#[test]
fn a_run_that_fails_leaves_the_pictures_that_were_there() {
    let folder = Folder::new(&bytes_of(&good()));
    std::fs::write(&folder.output, "old").expect("writable");
    let args =
        ["run", "--input", text(&folder.input), "--ring", "2", "--backward", "--fault", "stop:1", "--limit", "20"];
    let said = longspan(&[&args[..], &["--trace", text(&folder.output)]].concat());
    assert_eq!(said.code, Some(1), "{said:?}");
    assert_eq!(std::fs::read(&folder.output).expect("there"), b"old");
    assert_eq!(folder.files(), ["in.safetensors", "out.safetensors"]);
}
