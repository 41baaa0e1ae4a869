//! The quick tier against every flavour of the CPU backend.

use longspan_conformance::{Options, expectations, run};
use longspan_cpu::Cpu;

fn passes(name: &str, filter: Option<&str>) {
    let options = Options {
        filter: filter.map(Into::into),
        expectations: expectations::built_in(name).into(),
        devices: Cpu::named(name).into_iter().collect(),
        name: name.into(),
        ..Options::default()
    };
    let report = run::<Cpu>(&options, &mut |_, _, _| {}).expect("the options are right");
    println!("{name}\n{}", report.summary());
    assert!(report.is_ok(), "{name}\n{}", report.summary());
    let again: longspan_conformance::Report =
        serde_json::from_str(&report.to_json().expect("plain data")).expect("the report's own JSON");
    assert_eq!(again.counts, report.counts);
}

#[test]
fn cpu() {
    passes("cpu", None);
}

#[test]
fn cpu_checked() {
    passes("cpu-checked", None);
}

#[test]
fn cpu_nccl_like() {
    passes("cpu-nccl-like", None);
}

#[test]
fn cpu_push() {
    passes("cpu-push", None);
}

#[test]
fn cpu_ascend_like() {
    passes("cpu-ascend-like", None);
}
