//! The house itself: who depends on whom, under which licences, and that the README's example is the one that is compiled.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// Crates of ours, and which of ours each may depend on; dev-dependencies may go further (see [`dev_only`]).
const MAY: [(&str, &[&str]); 17] = [
    ("ascendcl-sys", &["longspan-dylib", "longspan-hal"]),
    (
        "longspan",
        &[
            "longspan-ascend",
            "longspan-cpu",
            "longspan-cuda",
            "longspan-hal",
            "longspan-mpi",
            "longspan-peers",
            "longspan-rocm",
            "longspan-seqpar",
        ],
    ),
    ("longspan-ascend", &["ascendcl-sys", "longspan-hal", "longspan-peers"]),
    ("longspan-ascend-emulator", &[]),
    ("longspan-cli", &["longspan", "longspan-conformance", "longspan-hal", "longspan-peers", "longspan-seqpar"]),
    ("longspan-conformance", &["longspan", "longspan-hal", "longspan-peers", "longspan-seqpar"]),
    ("longspan-cpu", &["longspan-hal"]),
    ("longspan-cuda", &["longspan-gpu", "longspan-hal", "longspan-kernels"]),
    ("longspan-dylib", &["longspan-hal"]),
    ("longspan-gpu", &["longspan-dylib", "longspan-hal", "longspan-kernels", "longspan-peers"]),
    ("longspan-hal", &[]),
    ("longspan-kernels", &["longspan-hal"]),
    ("longspan-mpi", &["longspan-cpu", "longspan-hal", "longspan-peers"]),
    ("longspan-peers", &["longspan-hal"]),
    ("longspan-rocm", &["longspan-gpu", "longspan-hal", "longspan-kernels"]),
    ("longspan-rocm-emulator", &[]),
    ("longspan-seqpar", &["longspan-hal"]),
];

/// Licences that dependencies may have: all permissive.
const LICENCES: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

#[test]
fn dependencies_go_in_the_right_direction() {
    let metadata = metadata(&["--no-deps"]);
    for package in list(&metadata["packages"]) {
        let name = word(&package["name"]);
        let allowed =
            MAY.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("`{name}` is missing in the table"));
        for dependency in list(&package["dependencies"]).iter().filter(|d| !d["path"].is_null()) {
            let (on, kind) = (word(&dependency["name"]), dependency["kind"].as_str().unwrap_or("normal"));
            let fine = allowed.1.contains(&on) || (kind == "dev" && dev_only(name, on));
            assert!(fine, "{name} must not have a {kind} dependency on {on}: see CONTRIBUTING.md");
        }
    }
}

/// Tests may use backends and the suite, but nothing above themselves.
fn dev_only(name: &str, on: &str) -> bool {
    match on {
        "longspan" => ["longspan-ascend", "longspan-conformance", "longspan-cuda", "longspan-mpi"].contains(&name),
        "longspan-hal" | "longspan-kernels" => name == "longspan-cuda",
        "longspan-ascend-emulator" | "longspan-seqpar" => name == "longspan-ascend",
        "longspan-rocm-emulator" => ["longspan-cli", "longspan-rocm"].contains(&name),
        "longspan-conformance" => name != "longspan-hal",
        "longspan-cpu" => ["longspan-conformance", "longspan-seqpar", "longspan-cli"].contains(&name),
        _ => false,
    }
}

#[test]
fn every_dependency_has_a_permissive_licence() {
    let host = host();
    let metadata = metadata(&["--filter-platform", &host]);
    let packages = list(&metadata["packages"]);
    assert!(packages.len() > 20, "the whole graph: {}", packages.len());
    for package in packages {
        let (name, licence) = (word(&package["name"]), package["license"].as_str().unwrap_or("none stated"));
        assert!(permitted(licence), "{name} is under `{licence}`");
    }
}

/// Whether an SPDX expression can be met with [`LICENCES`] alone.
fn permitted(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    either(&mut rest) && rest.is_empty()
}

fn either(rest: &mut &[&str]) -> bool {
    let mut fine = both(rest);
    while let ["OR", tail @ ..] = rest {
        *rest = tail;
        fine |= both(rest);
    }
    fine
}

fn both(rest: &mut &[&str]) -> bool {
    let mut fine = one(rest);
    while let ["AND", tail @ ..] = rest {
        *rest = tail;
        fine &= one(rest);
    }
    fine
}

fn one(rest: &mut &[&str]) -> bool {
    let (fine, tail) = match *rest {
        ["(", tail @ ..] => {
            let mut inner = tail;
            let fine = either(&mut inner);
            match inner {
                [")", tail @ ..] => (fine, tail),
                _ => return false,
            }
        }
        // An exception only permits more.
        [name, "WITH", _, tail @ ..] | [name, tail @ ..] => (LICENCES.contains(name), tail),
        [] => return false,
    };
    *rest = tail;
    fine
}

#[test]
fn licence_expressions_are_read() {
    for good in [
        "MIT",
        "MIT OR GPL-3.0",
        "(MIT OR Apache-2.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception",
        "MIT/GPL-2.0",
    ] {
        assert!(permitted(good), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND MPL-2.0", "", "none stated", "(MIT"] {
        assert!(!permitted(bad), "{bad}");
    }
}

#[test]
fn the_readme_shows_the_facades_doctest() {
    let [readme, facade] = ["README.md", "crates/longspan/src/lib.rs"].map(read);
    let example = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let doc: String = facade
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .fold(String::new(), |text, line| text + line.strip_prefix(' ').unwrap_or(line) + "\n");
    let doctest = doc.split("```\n").nth(1).expect("a doctest");
    assert_eq!(example, doctest);
}

#[test]
fn the_readme_names_every_command_and_folder() {
    let readme = read("README.md");
    for command in ["run", "bench", "layout", "conformance", "doctor", "cache"] {
        assert!(readme.contains(&format!("`longspan {command}`")), "{command}");
    }
    for (name, _) in MAY {
        let package = list(&metadata(&["--no-deps"])["packages"]).iter().find(|p| word(&p["name"]) == name).cloned();
        let manifest = PathBuf::from(word(&package.expect("a member")["manifest_path"]));
        let folder = manifest.parent().and_then(|f| f.strip_prefix(root()).ok()).expect("in the workspace").to_owned();
        assert!(readme.contains(&format!("`{}`", folder.display())), "{}", folder.display());
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two above").to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).expect("readable")
}

fn host() -> String {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let said = Command::new(rustc).arg("-vV").output().expect("rustc starts").stdout;
    let text = String::from_utf8(said).expect("UTF-8");
    text.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host").to_owned()
}

fn metadata(more: &[&str]) -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let args = [&["metadata", "--format-version", "1", "--offline", "--locked"][..], more].concat();
    let said = Command::new(cargo).args(args).current_dir(root()).output().expect("cargo starts");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    serde_json::from_slice(&said.stdout).expect("JSON")
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn word(value: &Value) -> &str {
    value.as_str().expect("a word")
}

#[test]
fn the_docs_show_what_the_program_draws() {
    let docs = read("docs/README.md");
    let commands: Vec<&str> = docs.lines().filter(|line| line.starts_with("longspan layout ")).collect();
    assert!(commands.len() >= 3, "{commands:?}");
    let folder = tempfile::tempdir().expect("a folder");
    for command in commands {
        let (words, path) = command.split_once(" --svg ").expect("a picture");
        let drawn = folder.path().join("drawn.svg");
        let mut program = Command::new(env!("CARGO_BIN_EXE_longspan"));
        program.args(words.split_whitespace().skip(1)).arg("--svg").arg(&drawn);
        assert!(program.output().expect("the program starts").status.success(), "{command}");
        assert!(docs.contains(&format!("]({})", path.trim_start_matches("docs/"))), "{path} is shown");
        assert!(std::fs::read_to_string(&drawn).expect("written") == read(path), "{path} is old; run `{command}`");
    }
    let timeline = read("docs/timeline.svg");
    roxmltree::Document::parse(&timeline).expect("well-formed");
}
