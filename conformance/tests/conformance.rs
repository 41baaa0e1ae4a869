//! The quick tier against every flavour of the CPU backend, and the reports that come out.

use std::sync::Arc;

use longspan_conformance::cases::adopted;
use longspan_conformance::rank::Lend;
use longspan_conformance::{Case, Failure, Options, Outcome, Report, expectations, run as judge, run_cases};
use longspan_cpu::Cpu;
use longspan_hal::Device;

fn passes(name: &'static str) {
    let options = Options {
        devices: Cpu::named(name).into_iter().collect(),
        name: name.into(),
        expectations: expectations::built_in(name).into(),
        ..Options::default()
    };
    let report = judge::<Cpu>(&options, &mut |_, _, _| {}).expect("the options are right");
    println!("{name}\n{}", report.summary());
    assert!(report.is_ok(), "{name}: see above");
    assert!(report.counts.passed > 300, "{name}: {:?}", report.counts);
    let again: Report = serde_json::from_str(&report.to_json().expect("plain data")).expect("the report's own JSON");
    assert_eq!(again.counts, report.counts);
}

#[test]
fn cpu() {
    passes("cpu");
}

#[test]
fn cpu_checked() {
    passes("cpu-checked");
}

#[test]
fn cpu_nccl_like() {
    passes("cpu-nccl-like");
}

#[test]
fn cpu_push() {
    passes("cpu-push");
}

#[test]
fn cpu_ascend_like() {
    passes("cpu-ascend-like");
}

#[test]
fn cpu_on_memory_of_others() {
    for name in ["cpu", "cpu-checked"] {
        let memory: Lend<Cpu> = Arc::new(|rank, bytes| {
            let mut owner = Box::new(vec![0u128; bytes.div_ceil(16)]);
            let at = owner.as_mut_ptr().cast();
            // SAFETY: the owner keeps it, and nobody else touches it.
            unsafe { rank.device.adopt(at, bytes, Some(Arc::new(owner))) }
        });
        let options =
            Options { devices: Cpu::named(name).into_iter().collect(), name: name.into(), ..Options::default() };
        let report =
            run_cases(&options, adopted::cases(&memory, None), &mut |_, _, _| {}).expect("the options are right");
        assert!(report.is_ok() && report.counts.passed == 3, "{name}: {}", report.summary());
    }
}

fn run(expectations: &str, body: fn() -> std::result::Result<(), Failure>) -> Report {
    let options = Options { expectations: expectations.into(), ..Options::default() };
    let case = Case::<Cpu>::new("group/case", 1, move |_| body());
    run_cases(&options, vec![case], &mut |_, _, _| {}).expect("the options are right")
}

#[test]
fn expectations_decide_what_is_good() {
    let never = "[[never]]\npattern = 'group/*'\nwhy = 'x'";
    let broken = "[[broken]]\npattern = 'group/case'\nwhy = 'x'\nlink = 'y'";
    let refused = || Err(Failure::Refused("no".into()));
    let wrong = || Err(Failure::wrong("wrong"));
    for (list, body, outcome) in [
        ("", (|| Ok(())) as fn() -> _, Outcome::Pass),
        ("", refused, Outcome::Fail),
        ("", wrong, Outcome::Fail),
        (never, refused, Outcome::Refused),
        (never, || Ok(()), Outcome::Fail),
        (broken, wrong, Outcome::Broken),
        (broken, || Ok(()), Outcome::Fail),
    ] {
        let report = run(list, body);
        assert_eq!(report.cases[0].outcome, outcome, "{list}");
        assert_eq!(report.exit_code(), u8::from(outcome == Outcome::Fail));
    }
    let idle = run("[[never]]\npattern = 'nothing'\nwhy = 'x'", || Ok(()));
    assert_eq!((idle.counts.passed, idle.exit_code()), (1, 1));
    assert!(idle.summary().ends_with("1 passed, 0 failed, 0 refused, 0 no machine, 0 broken"));
}

#[test]
fn a_case_with_more_ranks_than_devices_finds_no_machine() {
    let options = Options { share_devices: false, ..Options::default() };
    let case = Case::<Cpu>::new("group/case", 2, |_| Ok(()));
    let report = run_cases(&options, vec![case], &mut |_, _, _| {}).expect("the options are right");
    assert_eq!((report.cases[0].outcome, report.counts.passed), (Outcome::NoMachine, 0));
}
