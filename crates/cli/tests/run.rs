//! Good runs: the results are right, whichever way the sequence is cut.

mod common;

use std::path::Path;

use common::{Folder, Raw, bytes_of, good_but, longspan, text};
use safetensors::SafeTensors;

const MINILM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../conformance/data/minilm-layer0.safetensors");

#[track_caller]
fn verified(args: &[&str]) {
    let said = longspan(&[&["run", "--verify"], args].concat());
    assert_eq!(said.code, Some(0), "{args:?}\n{}{}", said.stdout, said.stderr);
    assert!(said.stdout.contains("Verified against attention in f64"), "{}", said.stdout);
    assert!(!said.stdout.contains("OUTSIDE"), "{}", said.stdout);
}

#[test]
fn real_activations_full_mask_on_four_ranks() {
    verified(&["--input", MINILM, "--mask", "full", "--ulysses", "2", "--ring", "2", "--backward"]);
}

#[test]
fn real_activations_causal_zigzag() {
    verified(&[
        "--input",
        MINILM,
        "--mask",
        "causal",
        "--layout",
        "zigzag",
        "--ulysses",
        "2",
        "--ring",
        "2",
        "--backward",
    ]);
}

#[test]
fn real_activations_twelve_heads_over_eight_ranks() {
    verified(&["--input", MINILM, "--ulysses", "8", "--backward"]);
}

#[test]
fn every_option_at_once() {
    let shape = ["--synthetic", "2,77,6,2,24,16", "--backward", "--dtype", "bf16"];
    let options = ["--softcap", "20", "--alibi", "--sinks", "--dropout", "0.2", "--scale", "0.3", "--deterministic"];
    let cut =
        ["--ulysses", "2", "--ring", "3", "--layout", "stripe", "--mask", "window:20,5", "--placement", "ring-inner"];
    verified(&[&shape[..], &options, &cut].concat());
}

#[test]
fn bytes_and_memory_are_as_predicted() {
    let said = longspan(&["run", "--synthetic", "1,256,4,4,32", "--ring", "4", "--mask", "window:16", "--backward"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let ranks: Vec<&str> =
        said.stdout.lines().skip_while(|line| !line.contains("by the table")).skip(1).take(4).collect();
    for line in &ranks {
        assert_eq!(line.matches("equal").count(), 2, "bytes and memory in {line}");
    }
    assert_eq!(ranks.len(), 4);
}

#[test]
fn an_output_has_every_tensor_and_equals_that_of_one_rank() {
    let tensors = [Raw::f32("sinks", &[4]), Raw::f32("alibi_slopes", &[4]), Raw::i32("cu_seqlens", &[0, 3, 3, 8])];
    let folder = Folder::new(&bytes_of(&good_but(&tensors)));
    let run = |more: &[&str]| {
        let said = folder.run(&[&["--backward", "--mask", "causal", "--dtype", "f32", "--verify"], more].concat());
        assert_eq!(said.code, Some(0), "{said:?}");
        std::fs::read(&folder.output).expect("written")
    };
    let [one, six] = [run(&[]), run(&["--ulysses", "2", "--ring", "3"])];
    let [one, six] = [&one, &six].map(|bytes| SafeTensors::deserialize(bytes).expect("valid"));
    let wide = [2, 8, 4, 8];
    let shapes: [(&str, &[usize]); 6] = [
        ("out", &wide),
        ("lse", &[2, 4, 8]),
        ("dq", &wide),
        ("dk", &[2, 8, 2, 8]),
        ("dv", &[2, 8, 2, 8]),
        ("dsinks", &[4]),
    ];
    assert_eq!(one.names().len(), shapes.len());
    for (name, shape) in shapes {
        let [a, b] = [&one, &six].map(|file| file.tensor(name).expect("there"));
        assert_eq!((a.shape(), b.shape()), (shape, shape), "{name}");
        for (x, y) in floats(a.data()).zip(floats(b.data())) {
            assert!((x - y).abs() <= 1e-4 * x.abs().max(1.0), "{name}: {x} {y}");
        }
    }
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

#[test]
fn a_number_that_is_not_finite_stays_in_the_rows_that_see_it() {
    let mut k = Raw::f16("k", &[2, 8, 2, 8]);
    let row = 2 * 8 * 2; // token 5 of batch row 0, KV head 0
    k.bytes[5 * row..5 * row + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let folder = Folder::new(&bytes_of(&good_but(&[k])));
    let args = ["--mask", "causal", "--layout", "zigzag", "--ring", "2", "--dtype", "f32"];
    let refused = folder.run(&[&args[..], &["--verify"]].concat());
    assert!(refused.code == Some(2) && refused.stderr.contains("`k` has 1 numbers"), "{refused:?}");
    assert_eq!(folder.run(&args).code, Some(0));
    let bytes = std::fs::read(&folder.output).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("valid");
    for (i, x) in floats(file.tensor("out").expect("there").data()).enumerate() {
        let [batch, token, head] = [i / (8 * 4 * 8), i / (4 * 8) % 8, i / 8 % 4];
        assert_eq!(x.is_nan(), batch == 0 && token >= 5 && head < 2, "batch {batch}, token {token}, head {head}: {x}");
    }
}

#[test]
fn sinks_and_slopes_that_are_not_finite_are_not_verified() {
    for name in ["sinks", "alibi_slopes"] {
        for value in [f32::NAN, f32::INFINITY] {
            let mut numbers = Raw::f32(name, &[4]);
            numbers.bytes[8..12].copy_from_slice(&value.to_le_bytes());
            let folder = Folder::new(&bytes_of(&good_but(&[numbers])));
            let said = folder.run(&["--verify"]);
            let why = format!("`{name}` has 1 numbers that are not finite");
            assert!(said.code == Some(2) && said.stderr.contains(&why), "{said:?}");
            assert_eq!(folder.files(), ["in.safetensors"], "nothing is written");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |name: &str, seed: &str| {
        let path = folder.path().join(name);
        let args = ["run", "--synthetic", "1,40,2,1,8", "--ring", "2", "--backward", "--deterministic", "--seed", seed];
        let said = longspan(&[&args[..], &["--output", text(&path)]].concat());
        assert_eq!(said.code, Some(0), "{said:?}");
        std::fs::read(&path).expect("written")
    };
    assert_eq!(run("a", "5"), run("b", "5"));
    assert_ne!(run("a", "5"), run("b", "6"));
}

#[test]
fn more_ranks_than_tokens() {
    verified(&["--synthetic", "1,3,2,1,8", "--ring", "4", "--ulysses", "2", "--mask", "causal", "--backward"]);
}

#[test]
fn keys_of_another_length() {
    let tensors = [Raw::f16("k", &[2, 21, 2, 8]), Raw::f16("v", &[2, 21, 2, 12])];
    let folder = Folder::new(&bytes_of(&good_but(&tensors)));
    let said = folder.run(&["--ring", "3", "--backward", "--verify"]);
    assert_eq!(said.code, Some(0), "{said:?}");
}

#[test]
fn a_long_sequence_is_verified_in_a_sample_and_says_so() {
    let said = longspan(&[
        "run",
        "--synthetic",
        "1,8200,1,1,8",
        "--mask",
        "window:100",
        "--ring",
        "2",
        "--backward",
        "--verify",
    ]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stdout.contains("a sample: 64 query rows and 64 keys of 8200"), "{}", said.stdout);
}

#[test]
fn a_rank_that_panics_or_stops_is_named_by_the_others() {
    for fault in ["panic:2", "stop:2"] {
        let start = std::time::Instant::now();
        let folder = Folder::new(&bytes_of(&good_but(&[])));
        let said = folder.run(&["--ring", "2", "--ulysses", "2", "--backward", "--fault", fault, "--limit", "20"]);
        assert_eq!(said.code, Some(1), "{said:?}");
        for rank in [0, 1, 3] {
            let line = said.stderr.lines().find(|line| line.contains(&format!("rank {rank}: ")));
            let line = line.unwrap_or_else(|| panic!("nothing of rank {rank} in {}", said.stderr));
            assert!(line.contains("lost rank 2") && !line.contains("step: none"), "{fault}: {line}");
        }
        assert!(start.elapsed().as_secs() < 20, "{fault}: within the deadline");
        assert_eq!(folder.files(), ["in.safetensors"], "nothing is written");
    }
}

#[test]
fn one_wrong_number_fails_the_verification_and_nothing_is_written() {
    for verify in [true, false] {
        let folder = Folder::new(&bytes_of(&good_but(&[])));
        let mut args = vec!["--ring", "2", "--backward", "--fault", "wrong:1"];
        args.extend(verify.then_some("--verify"));
        let said = folder.run(&args);
        assert_eq!(said.code, Some(if verify { 3 } else { 0 }), "{said:?}");
        assert_eq!(folder.output.exists(), !verify);
        if verify {
            assert!(said.stderr.contains("verification failed: out outside the bound"), "{}", said.stderr);
            assert_eq!(said.stdout.matches("OUTSIDE").count(), 1, "{}", said.stdout);
        }
    }
}

#[test]
fn help_and_doctor_are_for_people() {
    for args in [&["--help"][..], &["run", "--help"], &["conformance", "--help"], &["doctor"]] {
        let said = longspan(args);
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(said.stdout.len() > 200 && said.stderr.is_empty(), "{said:?}");
    }
    assert!(Path::new(MINILM).exists());
}

#[test]
fn the_suite_judges_a_personality_and_writes_its_results() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("results.json");
    let args =
        ["conformance", "--backend", "cpu", "--personality", "push", "--filter", "device/", "--json", text(&json)];
    let said = longspan(&args);
    assert_eq!(said.code, Some(0), "{said:?}");
    let last = said.stdout.lines().last().expect("a last line");
    assert!(last.contains(" passed, 0 failed") && !last.starts_with("0 "), "{last}");
    let results: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).expect("written")).expect("JSON");
    assert_eq!(results["backend"], "cpu-push");
    let none = longspan(&["conformance", "--filter", "no such case", "--json", text(&folder.path().join("none.json"))]);
    assert_eq!((none.code, none.stdout.as_str()), (Some(2), ""), "{none:?}");
    assert!(none.stderr.contains("--filter no such case: no case of the quick tier"), "{none:?}");
    assert!(!folder.path().join("none.json").exists(), "nothing is written");
    assert_eq!(longspan(&["conformance", "--backend", "abacus"]).code, Some(2));
    assert_eq!(longspan(&["conformance", "--backend", "cpu:0", "--personality", "push"]).code, Some(2));
}
