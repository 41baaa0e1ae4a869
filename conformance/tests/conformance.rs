//! The quick tier against every flavour of the CPU backend.

use longspan_conformance::{Options, expectations, run};
use longspan_cpu::{Cpu, CpuAscendLike, CpuChecked, CpuNcclLike, CpuPush};
use longspan_hal::Backend;

fn passes<B: Backend>(filter: Option<&str>) {
    let options = Options {
        filter: filter.map(Into::into),
        expectations: expectations::built_in(B::NAME).into(),
        ..Options::default()
    };
    let report = run::<B>(&options, &mut |_, _, _| {}).expect("the options are right");
    println!("{}\n{}", B::NAME, report.summary());
    assert!(report.is_ok(), "{}\n{}", B::NAME, report.summary());
    let again: longspan_conformance::Report =
        serde_json::from_str(&report.to_json().expect("plain data")).expect("the report's own JSON");
    assert_eq!(again.counts, report.counts);
}

#[test]
fn cpu() {
    passes::<Cpu>(None);
}

#[test]
fn cpu_checked() {
    passes::<CpuChecked>(None);
}

#[test]
fn cpu_nccl_like() {
    passes::<CpuNcclLike>(None);
}

#[test]
fn cpu_push() {
    passes::<CpuPush>(None);
}

#[test]
fn cpu_ascend_like() {
    passes::<CpuAscendLike>(None);
}
