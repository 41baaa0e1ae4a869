//! Streams, events, races.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use longspan_hal::{DType, Device, Error, Strided};
use proptest::prelude::*;

use super::*;
use crate::table::Access;

const N: usize = 64;

fn whole() -> Strided {
    dense([1, 1, 1, N])
}

#[test]
fn work_on_one_stream_runs_in_call_order_off_the_host() {
    let device = device(PLAIN);
    let on = stream(&device);
    let seen = Arc::new(AtomicUsize::new(0));
    let host = std::thread::current().id();
    for i in 0..100 {
        let seen = Arc::clone(&seen);
        on.submit("count", Vec::new(), move || {
            assert_ne!(std::thread::current().id(), host);
            assert_eq!(seen.fetch_add(1, Ordering::SeqCst), i);
            Ok(())
        })
        .expect("queued");
    }
    device.synchronize(&on, LONG).expect("all ran in order");
    assert_eq!(seen.load(Ordering::SeqCst), 100);
}

#[test]
fn queueing_and_waiting_for_an_event_do_not_block_the_host() {
    let device = device(CHECKED);
    let (a, b) = (stream(&device), stream(&device));
    let (go, held) = mpsc::channel::<()>();
    a.submit("hold", Vec::new(), move || held.recv().map_err(|e| Error::invalid("hold", e.to_string())))
        .expect("queued");
    let event = device.record(&a).expect("queued");
    device.wait(&b, &event).expect("queued");
    let done = device.record(&b).expect("queued");
    assert!(device.elapsed(&event, &done).is_err(), "neither has happened");
    let timeout = device.synchronize(&b, Duration::from_millis(20));
    assert!(matches!(timeout, Err(Error::Timeout { .. })), "{timeout:?}");
    go.send(()).expect("the job waits");
    device.synchronize(&b, LONG).expect("released");
    device.elapsed(&event, &done).expect("both happened");
}

#[test]
fn a_missing_wait_is_a_race_in_checked_mode_even_when_lucky() {
    let device = device(CHECKED);
    let (a, b) = (stream(&device), stream(&device));
    let buffer = device.alloc(N * 4).expect("little");
    device.fill(&a, 1.0, write(&buffer, whole())).expect("queued");
    // Surely over in time, but nothing orders it before `b`.
    watch(&device, &a);
    match download(&device, &b, &buffer, whole()) {
        Err(Error::Race { first, second }) => {
            assert!(first.contains("`fill` on stream 0") && first.contains("writes"), "{first}");
            assert!(second.contains("`download` on stream 1") && second.contains("reads"), "{second}");
        }
        other => panic!("not a race: {other:?}"),
    }
}

#[test]
fn the_right_waits_pass() {
    let device = device(CHECKED);
    let [a, b, c] = [stream(&device), stream(&device), stream(&device)];
    let buffer = device.alloc(N * 4).expect("little");
    device.fill(&a, 1.0, write(&buffer, whole())).expect("queued");
    device.wait(&b, &device.record(&a).expect("queued")).expect("queued");
    device.fill(&b, 2.0, write(&buffer, whole())).expect("queued");
    // Through a third stream, which touches nothing.
    device.wait(&c, &device.record(&b).expect("queued")).expect("queued");
    device.wait(&a, &device.record(&c).expect("queued")).expect("queued");
    assert_eq!(download(&device, &a, &buffer, whole()), Ok(vec![2.0; N]));
    // After the host synchronised, everything is ordered.
    device.synchronize(&b, LONG).expect("fine");
    assert_eq!(download(&device, &c, &buffer, whole()), Ok(vec![2.0; N]));
}

#[test]
fn an_old_wait_does_not_cover_new_work_and_a_read_must_end_before_a_write() {
    let device = device(CHECKED);
    let (a, b) = (stream(&device), stream(&device));
    let buffer = device.alloc(N * 4).expect("little");
    let other = device.alloc(N * 4).expect("little");
    let event = device.record(&a).expect("queued");
    device.fill(&a, 1.0, write(&buffer, whole())).expect("queued");
    device.copy(&a, read(&buffer, whole()), write(&other, whole())).expect("queued");
    let written = device.record(&a).expect("queued");
    watch(&device, &a);
    device.wait(&b, &event).expect("queued");
    device.fill(&b, 2.0, write(&buffer, whole())).expect("queued");
    assert!(matches!(device.synchronize(&b, LONG), Err(Error::Race { .. })));
    // A failed stream stays failed, and a new one with the right wait passes.
    assert!(matches!(device.synchronize(&b, LONG), Err(Error::Race { .. })));
    let c = stream(&device);
    device.wait(&c, &written).expect("queued");
    device.fill(&c, 3.0, write(&buffer, whole())).expect("queued");
    device.synchronize(&c, LONG).expect("ordered");
}

#[test]
fn reads_beside_reads_and_disjoint_strided_writes_are_no_race() {
    let device = device(CHECKED);
    let packed = dense([1, 4, 6, 8]);
    let buffer = device.alloc(packed.bytes()).expect("little");
    let streams: Vec<_> = (0..3).map(|_| stream(&device)).collect();
    for (i, on) in streams.iter().enumerate() {
        let part = packed.narrow(2, 2 * i..2 * i + 2).expect("inside");
        device.fill(on, i as f32, write(&buffer, part)).expect("queued");
    }
    for on in &streams {
        device.synchronize(on, LONG).expect("disjoint heads");
    }
    for on in &streams {
        assert_eq!(download(&device, on, &buffer, packed).map(|v| v.len()), Ok(192));
    }
}

#[test]
fn a_race_that_strikes_is_found_without_checked_mode() {
    let device = device(PLAIN);
    let (a, b) = (stream(&device), stream(&device));
    let buffer = device.alloc(N * 4).expect("little");
    let (started, has_started) = mpsc::channel();
    let (go, held) = mpsc::channel::<()>();
    a.submit("hold", vec![Access::write(write(&buffer, whole()))], move || {
        started.send(()).map_err(|e| Error::invalid("hold", e.to_string()))?;
        held.recv().map_err(|e| Error::invalid("hold", e.to_string()))
    })
    .expect("queued");
    has_started.recv().expect("it starts");
    device.fill(&b, 1.0, write(&buffer, whole().narrow(3, 5..6).expect("inside"))).expect("queued");
    let race = device.synchronize(&b, LONG);
    assert!(matches!(&race, Err(Error::Race { first, .. }) if first.contains("`hold`")), "{race:?}");
    go.send(()).expect("the job waits");
    device.synchronize(&a, LONG).expect("the first one is fine");
    let c = stream(&device);
    device.fill(&c, 1.0, write(&buffer, whole())).expect("queued");
    device.synchronize(&c, LONG).expect("nothing is active any more");
}

#[test]
fn a_failure_skips_later_work_and_travels_through_waits() {
    let device = device(PLAIN);
    let (a, b, c) = (stream(&device), stream(&device), stream(&device));
    a.submit("doomed", Vec::new(), || Err(Error::invalid("doomed", "as planned"))).expect("queued");
    a.submit("after", Vec::new(), || panic!("must be skipped")).expect("queued");
    device.wait(&b, &device.record(&a).expect("queued")).expect("queued");
    b.submit("after", Vec::new(), || panic!("must be skipped")).expect("queued");
    device.wait(&c, &device.record(&b).expect("queued")).expect("queued");
    for on in [&a, &b, &c] {
        assert_eq!(device.synchronize(on, LONG), Err(Error::invalid("doomed", "as planned")));
    }
}

#[test]
fn a_panic_in_a_job_is_an_error_of_its_stream() {
    let device = device(CHECKED);
    let on = stream(&device);
    let buffer = device.alloc(N * 4).expect("little");
    on.submit("explode", vec![Access::write(write(&buffer, whole()))], || panic!("bang {}", 7)).expect("queued");
    match device.synchronize(&on, LONG) {
        Err(Error::Driver { backend: "cpu", call: "explode", message, .. }) => assert!(message.contains("bang 7")),
        other => panic!("{other:?}"),
    }
    let other = stream(&device);
    device.fill(&other, 0.0, write(&buffer, whole())).expect("queued");
    device.synchronize(&other, LONG).expect("its ranges are free again");
}

#[test]
fn dropping_a_busy_stream_does_not_block_and_its_work_still_runs() {
    let device = device(PLAIN);
    let (go, held) = mpsc::channel::<()>();
    let (done, is_done) = mpsc::channel();
    let on = stream(&device);
    on.submit("hold", Vec::new(), move || held.recv().map_err(|e| Error::invalid("hold", e.to_string())))
        .expect("queued");
    on.submit("tell", Vec::new(), move || done.send(()).map_err(|e| Error::invalid("tell", e.to_string())))
        .expect("queued");
    let begun = Instant::now();
    drop(on);
    assert!(begun.elapsed() < Duration::from_secs(5));
    go.send(()).expect("the job waits");
    is_done.recv_timeout(LONG).expect("queued work runs");
}

#[test]
fn memory_handed_over_by_the_host_is_in_order() {
    let (one, two) = (device(CHECKED), device(CHECKED));
    let (a, b) = (stream(&one), stream(&two));
    let buffer = one.alloc(N * 4).expect("little");
    one.fill(&a, 4.0, write(&buffer, whole())).expect("queued");
    one.synchronize(&a, LONG).expect("fine");
    assert_eq!(download(&two, &b, &buffer, whole()), Ok(vec![4.0; N]));
    // Not synchronised: a race.
    one.fill(&a, 5.0, write(&buffer, whole())).expect("queued");
    let c = stream(&one);
    watch(&one, &a);
    assert!(matches!(download(&one, &c, &buffer, whole()), Err(Error::Race { .. })));
}

#[test]
fn checked_mode_stays_compact() {
    let device = device(CHECKED);
    let (a, b) = (stream(&device), stream(&device));
    let parts: Vec<_> = (0..16).map(|i| dense([1, 1, 16, 4]).narrow(2, i..i + 1).expect("inside")).collect();
    let buffer = device.alloc(N * 4).expect("little");
    for _ in 0..500 {
        for part in &parts {
            device.fill(&a, 1.0, write(&buffer, *part)).expect("queued");
        }
        device.wait(&b, &device.record(&a).expect("queued")).expect("queued");
        device.fill(&b, 2.0, write(&buffer, whole())).expect("queued");
        device.wait(&a, &device.record(&b).expect("queued")).expect("queued");
    }
    device.synchronize(&a, LONG).expect("ordered");
    assert!(buffer.table().remembered() <= 17, "{}", buffer.table().remembered());
}

/// Parts of a buffer of 4 rows of 2 heads of 8: rows, heads, blocks, single elements, everything.
fn parts() -> Vec<Strided> {
    let all = Strided::dense(DType::F32, [1, 4, 2, 8]);
    let cut = |axis, range| all.narrow(axis, range).expect("inside");
    let corner = cut(1, 0..2).narrow(2, 0..1).expect("inside");
    vec![all, cut(1, 0..1), cut(1, 1..3), cut(2, 0..1), cut(2, 1..2), cut(3, 0..3), cut(3, 5..6), corner]
}

/// A random program over three streams and the parts of a buffer.
#[derive(Clone, Copy, Debug)]
enum Op {
    Touch { stream: usize, part: usize, write: bool },
    Join { from: usize, to: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0usize..3, 0usize..8, any::<bool>()).prop_map(|(stream, part, write)| Op::Touch { stream, part, write }),
        (0usize..3, 0usize..3).prop_map(|(from, to)| Op::Join { from, to }),
    ]
}

/// Whether some conflicting pair has no path of joins between, by brute force: reach[i] is the set of operations before.
fn races(ops: &[Op], parts: &[Strided]) -> bool {
    let mut seen: [std::collections::BTreeSet<usize>; 3] = Default::default();
    for (i, op) in ops.iter().enumerate() {
        match *op {
            Op::Join { from, to } => {
                let before = seen[from].clone();
                seen[to].extend(before);
            }
            Op::Touch { stream, part, write } => {
                for (j, earlier) in ops[..i].iter().enumerate() {
                    let Op::Touch { part: p, write: w, .. } = *earlier else { continue };
                    if parts[p].overlaps(&parts[part]) && (w || write) && !seen[stream].contains(&j) {
                        return true;
                    }
                }
                seen[stream].insert(i);
            }
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn checked_mode_finds_a_race_exactly_where_there_is_one(ops in prop::collection::vec(op(), 1..20)) {
        let (device, parts) = (device(CHECKED), parts());
        let streams = [stream(&device), stream(&device), stream(&device)];
        let buffer = device.alloc(N * 4).expect("little");
        for op in &ops {
            match *op {
                Op::Join { from, to } => {
                    let event = device.record(&streams[from]).expect("queued");
                    device.wait(&streams[to], &event).expect("queued");
                }
                Op::Touch { stream, part, write: is_write } => {
                    let access = Access { buffer: buffer.clone(), at: parts[part], write: is_write };
                    streams[stream].submit("touch", vec![access], || Ok(())).expect("queued");
                }
            }
        }
        let results = streams.each_ref().map(|on| device.synchronize(on, LONG));
        let found = results.iter().any(|r| matches!(r, Err(Error::Race { .. })));
        prop_assert_eq!(found, races(&ops, &parts), "{:?}", results);
    }
}
