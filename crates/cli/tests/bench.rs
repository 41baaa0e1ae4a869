//! `longspan bench` on the CPU: what its JSON and page hold, and what it refuses.

#[allow(dead_code)] // other tests use the rest
mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{Said, longspan, said, text};
use serde_json::Value;

/// A folder for results, and the names in it.
struct Results {
    folder: tempfile::TempDir,
    json: PathBuf,
    html: PathBuf,
}

impl Results {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (json, html) = (folder.path().join("r.json"), folder.path().join("r.html"));
        Self { folder, json, html }
    }

    fn bench(&self, words: &str) -> Said {
        let mut args = vec!["bench", "--json", text(&self.json), "--html", text(&self.html)];
        args.extend(words.split_whitespace());
        longspan(&args)
    }

    /// The JSON of a run that has to succeed.
    #[track_caller]
    fn measured(&self, words: &str) -> Value {
        let said = self.bench(words);
        assert_eq!(said.code, Some(0), "{said:?}");
        serde_json::from_slice(&std::fs::read(&self.json).expect("written")).expect("JSON")
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(self.folder.path()).expect("readable").next().is_none()
    }
}

const TINY: &str = "--heads 4 --kv-heads 2 --head-dim 16 --repeat 2 --limit 120";

fn rows(report: &Value) -> &Vec<Value> {
    report["rows"].as_array().expect("a list")
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"))
}

#[test]
fn every_row_is_there_and_its_figures_fit_each_other() {
    let results = Results::new();
    let report =
        results.measured(&format!("--seq 64,96 --ulysses 2 --ring 2 --mask causal --backward --packed {TINY}"));
    assert_eq!(report["schema"], "longspan-bench/1");
    assert_eq!(rows(&report).len(), 2 * 2 * 3, "lengths x packings x passes");
    let peak = report["peak"]["flops_per_second"][0].as_f64().expect("a CPU has a peak");
    for row in rows(&report) {
        let seq = number(row, "seq");
        let factor = match row["pass"].as_str().expect("a word") {
            "forward" => 1.0,
            "backward" => 2.5,
            _ => 3.5,
        };
        assert_eq!(number(row, "flops"), factor * 4.0 * 4.0 * 16.0 * seq * (seq + 1.0) / 2.0, "{row}");
        let (median, rate) = (number(row, "median_s"), number(row, "flops_per_second"));
        assert!(number(row, "fastest_s") <= median && median <= number(row, "slowest_s"), "{row}");
        assert!(median > 0.0 && (rate * median / number(row, "flops") - 1.0).abs() < 1e-9, "{row}");
        assert!((number(row, "share_of_peak") - rate / peak).abs() < 1e-9, "{row}");
        assert!((number(row, "overlap_efficiency") - number(row, "alone_s") / median).abs() < 1e-9, "{row}");
        assert_eq!(row["peak_bytes"], row["predicted_bytes"], "memory is exactly what was predicted: {row}");
        assert!(number(row, "sent_bytes") > 0.0 && number(row, "exchange_gb_s") > 0.0, "{row}");
        assert!(!row["kernels"].as_array().expect("a list").is_empty(), "{row}");
    }
}

#[test]
fn a_single_rank_has_no_exchange_and_nothing_to_compare_with() {
    let report = Results::new().measured(&format!("--seq 64 {TINY}"));
    let [row] = &rows(&report)[..] else { panic!("one row: {report}") };
    assert_eq!((&row["alone_s"], &row["overlap_efficiency"]), (&Value::Null, &Value::Null));
    assert_eq!((row["sent_bytes"].as_u64(), &row["exchange_gb_s"]), (Some(0), &Value::Null));
}

#[test]
fn a_sweep_over_cuts_has_a_heat_map_and_options_are_named() {
    let results = Results::new();
    let report = results.measured(&format!(
        "--seq 64 --sweep U,R --ulysses 2 --ring 2 --softcap 30 --alibi --sinks --dropout 0.1 --backward {TINY}"
    ));
    assert_eq!(rows(&report).len(), 4 * 3);
    assert_eq!(report["problem"]["options"], serde_json::json!(["softcap 30", "dropout 0.1", "alibi", "sinks"]));
    let page = std::fs::read_to_string(&results.html).expect("written");
    assert_eq!(page.matches("class=\"heat\"").count(), 3, "a heat map for each pass");
    let table = page.split("id=\"rows\"").nth(1).expect("the table of all rows");
    assert_eq!(table.matches("<tr>").count(), 1 + rows(&report).len());
    let date = report["date"].as_str().expect("a word");
    assert!(page.contains(date) && page.contains("prefers-color-scheme: dark"));
}

#[test]
fn every_field_of_the_json_is_documented() {
    let report = Results::new().measured(&format!("--seq 32 --ring 2 {TINY}"));
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/bench.md");
    let docs = std::fs::read_to_string(docs).expect("readable");
    let documented: BTreeSet<String> = docs
        .lines()
        .filter(|line| line.starts_with("| `"))
        .flat_map(|line| line.split('|').nth(1).expect("a cell").split(',').map(|f| f.trim().replace('`', "")))
        .filter(|field| !field.starts_with("refused."))
        .collect();
    let mut found = BTreeSet::new();
    fields(&report, "", &mut found);
    assert_eq!(found, documented);
}

/// Names of all fields, with the names of what they are in.
fn fields(value: &Value, within: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                let name = format!("{within}{name}");
                fields(value, &format!("{name}."), found);
                found.insert(name);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| fields(value, within, found)),
        _ => {}
    }
}

#[test]
fn what_a_sweep_is_refused_is_in_the_report_and_the_rest_is_measured() {
    let results = Results::new();
    let report = results.measured(&format!("--backend cpu-ascend-like --seq 32 --sweep R --ring 2 {TINY}"));
    assert_eq!(rows(&report).len(), 1, "one ring rank needs no partials");
    let refused = &report["refused"][0];
    assert_eq!((refused["ring"].as_u64(), report["refused"].as_array().map(Vec::len)), (Some(2), Some(1)));
    assert!(refused["why"].as_str().expect("a word").contains("partial"), "{refused}");
    let page = std::fs::read_to_string(&results.html).expect("written");
    assert!(page.contains("Not measured: 32 tokens, 1 x 2"));
}

#[test]
fn bad_usage_is_refused_before_anything_runs() {
    for (words, what) in [
        ("--heads 5 --kv-heads 2", "KV heads"),
        ("--packed --head-dim 16 --head-dim-v 8", "one size"),
        ("--backend nothing", "unknown backend"),
        ("--backend cpu:7", "no device 7"),
        ("--exchange nccl", "one way only"),
        ("--exchange peer", "one way only"),
        ("--seq 0", "0"),
        ("--sweep X", "X"),
        ("--repeat 0", "0"),
        ("--head-dim 512 --seq 16", "1 to 256"),
        ("--seq 16 --ring 300000000", "1024 is the most"),
        ("--seq 16 --ring 4294967295 --sweep R", "1024 is the most"),
        ("--seq 16 --ranks 4294967295", "1..=1024"),
        ("--seq 18446744073709551615 --sweep S", "2^40"),
        ("--seq 16 --head-groups 9", "9 groups of 8 heads"),
        ("--seq 16 --backend mpi", "ranks are threads"),
    ] {
        let results = Results::new();
        let said = results.bench(words);
        assert_eq!(said.code, Some(2), "{words}: {said:?}");
        assert!(said.stderr.contains(what), "{words}: {}", said.stderr);
        assert!(results.is_empty(), "{words}: nothing may be written");
    }
    let said = longspan(&["bench", "--seq", "16", "--html", "/no/such/folder/x.html"]);
    assert_eq!(said.code, Some(2), "{said:?}");
}

#[test]
fn a_batch_that_no_memory_holds_is_refused_at_once() {
    let results = Results::new();
    let said = results.bench("--seq 1 --batch 4294967295");
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("out of memory: ") && results.is_empty(), "{said:?}");
}

/// Each process would run all of it, and write the same files.
#[test]
fn processes_of_a_launcher_are_refused() {
    let mpi = [("OMPI_COMM_WORLD_SIZE", "4")];
    let torchrun = [
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];
    for variables in [&mpi[..], &torchrun] {
        let results = Results::new();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_longspan"));
        command.args(["bench", "--seq", "64", "--json", text(&results.json)]).envs(variables.iter().copied());
        let said = said(&mut command);
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
        assert!(said.stderr.contains("bench's ranks are threads, and a launcher started several"), "{said:?}");
        assert!(results.is_empty(), "nothing is written");
    }
}

#[test]
fn the_exchange_is_chosen_or_refused_by_every_command() {
    let run = ["run", "--synthetic", "1,16,2,2,8", "--exchange"];
    let conformance = ["conformance", "--filter", "no such case", "--exchange"];
    for words in [&run[..], &conformance[..]] {
        let refused = longspan(&[words, &["nccl"]].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("one way only"), "{refused:?}");
    }
    assert_eq!(longspan(&[&run[..], &["auto"]].concat()).code, Some(0));
}

#[test]
fn the_cache_and_doctor_need_no_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    for more in [&[][..], &["--clear"]] {
        let said = std::process::Command::new(env!("CARGO_BIN_EXE_longspan"))
            .args([&["cache"][..], more].concat())
            .env("LONGSPAN_CACHE", folder.path())
            .output()
            .expect("the program starts");
        assert!(said.status.success(), "{said:?}");
    }
    let said = longspan(&["doctor"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let said = longspan(&["doctor", "--probe", "nothing"]);
    assert_eq!(said.code, Some(2), "{said:?}");
}

/// The trace is of the last row: a step, forward and backward of every rank.
#[test]
fn a_trace_is_of_the_last_step() {
    let results = Results::new();
    let trace = results.folder.path().join("t.json");
    let words = format!(
        "{TINY} --seq 64 --ulysses 2 --ring 2 --mask causal --layout zigzag --backward --trace {}",
        text(&trace)
    );
    results.measured(&words);
    let trace: Value = serde_json::from_slice(&std::fs::read(&trace).expect("written")).expect("JSON");
    assert!(trace["otherData"]["run"].as_str().is_some_and(|run| run.starts_with("bench, step")), "{trace}");
    let events = trace["traceEvents"].as_array().expect("a list");
    // A backward attends with the own block in two halves.
    for (pass, calls) in [("forward", 2), ("backward", 3)] {
        let attention = format!("attention {pass}, step");
        let of = |rank: u64| {
            let named = |e: &&Value| e["name"].as_str().is_some_and(|name| name.starts_with(&attention));
            events.iter().filter(named).filter(|e| e["pid"].as_u64() == Some(rank)).count()
        };
        assert_eq!([0, 1, 2, 3].map(of), [calls; 4], "{pass}: two ring steps on each rank");
    }
}

#[test]
fn outputs_have_names_of_their_own() {
    let results = Results::new();
    let said = results.bench(&format!("{TINY} --seq 16 --trace {}", text(&results.json)));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("is named twice"), "{said:?}");
    assert!(results.is_empty(), "nothing is left behind");
}
