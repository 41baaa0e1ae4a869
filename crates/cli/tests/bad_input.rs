//! Every bad input: exit code 2, a message that says what is wrong, and nothing written.

mod common;

use common::{Folder, Raw, Said, bytes_of, good, good_but, longspan, text};
use safetensors::tensor::Dtype;

/// Exit code 2, the words in the message, and no file beside the input.
#[track_caller]
fn refused(folder: &Folder, said: &Said, words: &[&str]) {
    assert_eq!(said.code, Some(2), "{said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "no `{word}` in {}", said.stderr);
    }
    assert!(said.stderr.starts_with("error: "), "{}", said.stderr);
    assert!(!said.stdout.contains("compute"), "nothing may run: {}", said.stdout);
    assert_eq!(folder.files(), ["in.safetensors"], "nothing may be written");
}

#[track_caller]
fn refuses_file(input: &[u8], words: &[&str]) {
    let folder = Folder::new(input);
    refused(&folder, &folder.run(&[]), words);
}

#[track_caller]
fn refuses_tensors(other: &[Raw], words: &[&str]) {
    refuses_file(&bytes_of(&good_but(other)), words);
}

#[track_caller]
fn refuses_options(more: &[&str], words: &[&str]) {
    let folder = Folder::new(&bytes_of(&good()));
    refused(&folder, &folder.run(more), words);
}

#[test]
fn the_good_file_is_good() {
    let folder = Folder::new(&bytes_of(&good()));
    let said = folder.run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(folder.files(), ["in.safetensors", "out.safetensors"]);
}

#[test]
fn a_missing_file() {
    let folder = Folder::new(b"");
    let said = longspan(&["run", "--input", "/no/such.safetensors", "--output", text(&folder.output)]);
    refused(&folder, &said, &["/no/such.safetensors", "cannot be opened"]);
}

#[test]
fn a_folder_in_place_of_a_file() {
    let folder = Folder::new(b"");
    let said = longspan(&["run", "--input", "/", "--output", text(&folder.output)]);
    refused(&folder, &said, &["not a regular file"]);
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file() {
    let folder = Folder::new(b"");
    let pipes = tempfile::tempdir().expect("a folder");
    let pipe = pipes.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo starts").success());
    let said = longspan(&["run", "--input", text(&pipe), "--output", text(&folder.output)]);
    refused(&folder, &said, &["not a regular file"]);
}

#[test]
fn truncated_files() {
    let whole = bytes_of(&good());
    refuses_file(b"", &["truncated", "0 bytes"]);
    refuses_file(&whole[..5], &["truncated", "5 bytes"]);
    refuses_file(&whole[..40], &["truncated", "header claims"]);
    refuses_file(&whole[..whole.len() - 1], &["truncated", "header describes"]);
    let longer = [&whole[..], &[0]].concat();
    refuses_file(&longer, &["no tensor owns"]);
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let whole = bytes_of(&good_but(&[]));
    for end in (0..whole.len()).step_by(97) {
        let folder = Folder::new(&whole[..end]);
        refused(&folder, &folder.run(&[]), &["in.safetensors: truncated"]);
    }
}

#[test]
fn headers_that_lie() {
    refuses_file(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        &["header claims 18446744073709551615 bytes", "limit"],
    );
    refuses_file(&[&100_000_001u64.to_le_bytes()[..], b"{}"].concat(), &["header claims 100000001 bytes", "limit"]);
    refuses_file(&[&7u64.to_le_bytes()[..], b"not json"].concat(), &["header is not valid"]);
    let overlapping = br#"{"q":{"dtype":"F16","shape":[1,1,1,1],"data_offsets":[0,2]},"k":{"dtype":"F16","shape":[1,1,1,1],"data_offsets":[0,2]}}"#;
    let file = [&(overlapping.len() as u64).to_le_bytes()[..], overlapping, &[0, 0]].concat();
    refuses_file(&file, &["header is not valid"]);
    let huge = br#"{"q":{"dtype":"F16","shape":[18446744073709551615,2,1,1],"data_offsets":[0,2]}}"#;
    refuses_file(&[&(huge.len() as u64).to_le_bytes()[..], huge, &[0, 0]].concat(), &["header is not valid"]);
}

#[test]
fn missing_and_unknown_tensors() {
    refuses_file(&bytes_of(&good()[..2]), &["tensor `v` is missing"]);
    refuses_tensors(&[Raw::f32("alibi_slope", &[4])], &["tensor `alibi_slope`", "alibi_slopes"]);
}

#[test]
fn wrong_dtypes() {
    let wrong = |name| Raw { dtype: Dtype::I16, ..Raw::f16(name, &[2, 8, 4, 8]) };
    refuses_tensors(&[wrong("q")], &["tensor `q` is I16", "bf16, f16 or f32"]);
    let other = Raw { dtype: Dtype::BF16, ..Raw::f16("k", &[2, 8, 2, 8]) };
    refuses_tensors(&[other], &["one dtype", "f16, bf16 and f16"]);
    refuses_tensors(
        &[Raw { dtype: Dtype::I32, ..Raw::f32("sinks", &[4]) }],
        &["tensor `sinks` is I32", "F32 [4] wanted"],
    );
    refuses_tensors(&[Raw { dtype: Dtype::F32, ..Raw::i32("cu_seqlens", &[0, 8]) }], &["tensor `cu_seqlens` is F32"]);
}

#[test]
fn wrong_ranks_and_shapes() {
    refuses_tensors(&[Raw::f16("q", &[16, 4, 8])], &["tensor `q` has rank 3", "[batch, seq, heads, head_dim]"]);
    refuses_tensors(&[Raw::f16("q", &[2, 0, 4, 8])], &["tensor `q` is empty"]);
    refuses_tensors(&[Raw::f16("q", &[1, 8, 4, 8])], &["1, 2 and 2 batch rows"]);
    refuses_tensors(&[Raw::f16("v", &[2, 9, 2, 8])], &["the same seq"]);
    refuses_tensors(&[Raw::f16("v", &[2, 8, 4, 8])], &["kv_heads"]);
    refuses_tensors(&[Raw::f16("q", &[2, 8, 4, 16])], &["head_dim of 16 and k of 8"]);
    refuses_tensors(&[Raw::f16("dout", &[2, 8, 4, 4])], &["tensor `dout`", "[2, 8, 4, 8] wanted"]);
    refuses_tensors(&[Raw::f32("alibi_slopes", &[2])], &["tensor `alibi_slopes`", "F32 [4] wanted"]);
}

#[test]
fn heads_that_are_no_multiple_of_kv_heads() {
    refuses_tensors(&[Raw::f16("q", &[2, 8, 3, 8])], &["H % HK != 0", "3 query heads", "2 kv heads"]);
    let said = longspan(&["run", "--synthetic", "1,8,3,2,8"]);
    assert!(said.code == Some(2) && said.stderr.contains("H % HK != 0"), "{said:?}");
}

#[test]
fn sequences_of_documents_that_do_not_fit() {
    refuses_tensors(&[Raw::i32("cu_seqlens", &[0, 5])], &["cu_seqlens", "end", "8"]);
    refuses_tensors(&[Raw::i32("cu_seqlens", &[0, 5, 3, 8])], &["cu_seqlens", "5", "3"]);
    refuses_tensors(&[Raw::i32("cu_seqlens", &[1, 8])], &["cu_seqlens", "start", "1"]);
    refuses_tensors(&[Raw::i32("cu_seqlens", &[])], &["cu_seqlens"]);
    refuses_tensors(&[Raw::i32("cu_seqlens", &[0, -1, 8])], &["cu_seqlens", "-1"]);
}

#[test]
fn a_head_dim_over_the_limit() {
    let wide = |name, heads| Raw::f16(name, &[1, 4, heads, 257]);
    refuses_tensors(&[wide("q", 2), wide("k", 1), wide("v", 1)], &["257", "256"]);
}

#[test]
fn meshes_without_ranks() {
    refuses_options(&["--ulysses", "0"], &["--ulysses", "0"]);
    refuses_options(&["--ring", "0"], &["--ring", "0"]);
    refuses_options(&["--ring", "-1"], &["-1"]);
    refuses_options(&["--ring", "70000", "--ulysses", "70000"], &["do not fit"]);
}

#[test]
fn more_ranks_than_are_of_use_and_groups_without_heads() {
    refuses_options(&["--ring", "3000"], &["3000 ranks", "1024"]);
    refuses_options(&["--ring", "4294967295"], &["4294967295 ranks", "4096"]);
    refuses_options(&["--ulysses", "64", "--ring", "65"], &["4160 ranks", "4096"]);
    refuses_options(&["--head-groups", "5", "--ring", "2"], &["5 groups of 4 heads"]);
    refuses_options(&["--head-groups", "4294967295"], &["4294967295 groups of 4 heads"]);
    let folder = Folder::new(&bytes_of(&good()));
    refused(&folder, &longspan(&["layout", "--ring", "4000000000"]), &["4000000000 ranks", "4096"]);
    assert_eq!(longspan(&["layout", "--ring", "4096"]).code, Some(0));
}

#[test]
fn masks_that_mean_nothing() {
    refuses_options(&["--mask", "window:-1"], &["window:-1", "window:L[,R]"]);
    refuses_options(&["--mask", "window:1,-2"], &["window:1,-2"]);
    refuses_options(&["--mask", "prefix:2,window:3"], &["prefix:2,window:3"]);
    refuses_options(&["--mask", "diagonal"], &["diagonal", "causal"]);
    let cross = [Raw::f16("k", &[2, 16, 2, 8]), Raw::f16("v", &[2, 16, 2, 8])];
    let folder = Folder::new(&bytes_of(&good_but(&cross)));
    for mask in ["causal", "window:3", "prefix:2"] {
        refused(&folder, &folder.run(&["--mask", mask]), &[mask, "8 queries and 16 keys", "full"]);
    }
}

#[test]
fn options_out_of_range() {
    refuses_options(&["--dropout", "1"], &["--dropout", "[0, 1)"]);
    refuses_options(&["--dropout", "-0.1"], &["--dropout", "[0, 1)"]);
    refuses_options(&["--softcap", "0"], &["--softcap", "above 0"]);
    refuses_options(&["--softcap", "nan"], &["--softcap"]);
    refuses_options(&["--scale", "inf"], &["--scale", "finite"]);
    refuses_options(&["--dtype", "f64"], &["--dtype", "bf16"]);
    refuses_options(&["--no-such-option"], &["--no-such-option"]);
}

#[test]
fn an_unknown_backend_says_which_there_are_and_how_to_get_others() {
    refuses_options(
        &["--backend", "abacus"],
        &["unknown backend `abacus`", "this build has ", " cpu,", "cargo feature"],
    );
    for (backend, words) in [
        ("cpu:7", ["no device 7", "it has 0"]),
        ("cpu:x", ["\"x\"", "device indices"]),
        ("cpu-push:0", ["cpu-push is one device", "write \"cpu-push\""]),
    ] {
        refuses_options(&["--backend", backend], &words);
        let said = longspan(&["run", "--synthetic", "1,8,2,2,8", "--backend", backend]);
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "refused before anything is said");
    }
}

#[test]
fn no_source_and_two_sources() {
    let none = longspan(&["run"]);
    assert!(none.code == Some(2) && none.stderr.contains("--input"), "{none:?}");
    refuses_options(&["--synthetic", "1,8,2,2,8"], &["cannot be used with"]);
}

#[test]
fn outputs_that_cannot_be_written() {
    let folder = Folder::new(&bytes_of(&good()));
    let before = std::fs::read(&folder.input).expect("readable");
    let to = |output: &str| longspan(&["run", "--input", text(&folder.input), "--output", output]);
    refused(&folder, &to("/no/such/folder/out.safetensors"), &["/no/such/folder/out.safetensors", "cannot be written"]);
    refused(&folder, &to(text(&folder.input)), &["is the input file"]);
    refused(&folder, &to("/dev/null"), &["not a regular file"]);
    refused(&folder, &to("/"), &["output /"]);
    assert_eq!(std::fs::read(&folder.input).expect("readable"), before, "the input is untouched");
}
