//! Ranks of one communicator in several processes: what they exchange arrives, and what goes wrong between them goes wrong as
//! between devices of one process.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use longspan_ascend_emulator::operators::*;
use longspan_ascend_emulator::*;

#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../shared/processes.rs"]
mod processes;

use processes::{Process, listen, part, say};

const TIMEOUT: i32 = 9; // HCCL
const SYNC_TIMEOUT: i32 = 507_046;
const TASK_TIMEOUT: i32 = 507_014;
const ROOT: usize = 4108;
/// Of the emulator's waits.
const LIMIT_MS: i32 = 1500;

/// Starts `n` processes for the test `name`; process 0 makes the root info, the others get it.
fn start(name: &str, n: u32) -> Vec<Process> {
    let one = |rank: u32| {
        let timeout = ("LONGSPAN_EMULATOR_TIMEOUT_MS", LIMIT_MS.to_string());
        let seed = ("LONGSPAN_EMULATOR_SEED", (rank + 1).to_string());
        processes::start(name, rank, &[timeout, seed, ("LONGSPAN_EMULATOR_MEMORY_MIB", "64".into())])
    };
    let mut all: Vec<Process> = (0..n).map(one).collect();
    let root = all[0].hear().expect("process 0 makes the root info");
    all[1..].iter_mut().for_each(|process| process.tell(&root));
    all
}

/// Starts the runtime on device `me`; the root info that process 0 made.
fn root(me: u32) -> Vec<u8> {
    assert_eq!((aclInit(null()), aclrtSetDevice(me as i32)), (0, 0));
    if me > 0 {
        return listen()
            .as_bytes()
            .chunks(2)
            .map(|hex| u8::from_str_radix(str::from_utf8(hex).expect("hex"), 16).expect("hex"))
            .collect();
    }
    let mut root = vec![0u8; ROOT];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    say(&root.iter().map(|b| format!("{b:02x}")).collect::<String>());
    root
}

fn join(root: &[u8], me: u32, size: u32) -> (i32, *mut c_void) {
    let mut comm = null_mut();
    let code = unsafe { HcclCommInitRootInfo(size, root.as_ptr().cast(), me, &mut comm) };
    (code, comm)
}

/// A communicator of so many processes, and a stream.
fn joined(me: u32, size: u32) -> (*mut c_void, *mut c_void) {
    let (code, comm) = join(&root(me), me, size);
    assert_eq!(code, 0);
    let mut on = null_mut();
    assert_eq!(unsafe { aclrtCreateStreamWithConfig(&mut on, 0, 0) }, 0);
    (comm, on)
}

fn memory(floats: usize) -> *mut c_void {
    let mut memory = null_mut();
    assert_eq!(unsafe { aclrtMalloc(&mut memory, 4 * floats, 0) }, 0);
    memory
}

/// Fills device memory with a number.
fn fill(to: *mut c_void, floats: usize, mut x: f32, on: *mut c_void) {
    let n = floats as i64;
    let tensor = unsafe { aclCreateTensor(&n, 1, 0, &1, 0, 2, &n, 1, to) };
    let number = unsafe { aclCreateScalar((&raw mut x).cast(), 0) };
    let (mut size, mut executor) = (0, null_mut());
    assert_eq!(unsafe { aclnnInplaceFillScalarGetWorkspaceSize(tensor, number, &mut size, &mut executor) }, 0);
    assert_eq!(aclnnInplaceFillScalar(memory(size as usize), size, executor, on), 0);
    assert_eq!((aclDestroyTensor(tensor), aclDestroyScalar(number)), (0, 0));
}

fn read(from: *mut c_void, floats: usize, on: *mut c_void) -> Vec<f32> {
    let (mut host, bytes) = (null_mut(), 4 * floats);
    assert_eq!(unsafe { aclrtMallocHost(&mut host, bytes) }, 0);
    assert_eq!(unsafe { aclrtMemcpyAsync(host, bytes, from, bytes, 2, on) }, 0);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10 * LIMIT_MS), 0);
    unsafe { std::slice::from_raw_parts(host.cast::<f32>(), floats) }.to_vec()
}

#[repr(C)]
struct Item {
    kind: i32,
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    peer: u32,
}

fn send(buffer: *mut c_void, floats: usize, peer: u32) -> Item {
    Item { kind: 0, buffer, count: floats as u64, dtype: 4, peer }
}

fn receive(buffer: *mut c_void, floats: usize, peer: u32) -> Item {
    Item { kind: 1, ..send(buffer, floats, peer) }
}

fn batch(items: &[Item], comm: *mut c_void, on: *mut c_void) {
    let n = items.len() as u32;
    assert_eq!(unsafe { HcclBatchSendRecv(items.as_ptr().cast_mut().cast(), n, comm, on) }, 0);
}

/// Every process ended well, without a misuse.
fn all_well(all: Vec<Process>) {
    for (rank, process) in all.into_iter().enumerate() {
        let (said, well) = process.end();
        assert!(well && said == ["0 misuses"], "process {rank}: {said:?}");
    }
}

fn say_misuses() {
    say(&format!("{} misuses", longspan_emulator_misuses(1)));
}

#[test]
fn messages_between_processes_arrive() {
    const N: u32 = 3;
    let Some(me) = part() else { return all_well(start("messages_between_processes_arrive", N)) };
    let (comm, on) = joined(me, N);
    let (next, before) = ((me + 1) % N, (me + N - 1) % N);
    let (from, to, wide) = (memory(1000), memory(1000), memory(3 * N as usize));
    for round in 0..20 {
        let mark = |rank: u32| (100 * round + rank) as f32;
        fill(from, 1000, mark(me), on);
        batch(&[receive(to, 1000, before), send(from, 1000, next)], comm, on);
        assert_eq!(read(to, 1000, on), [mark(before); 1000]);
        // Three of the same floats to everybody else.
        let (mut counts, mut starts) = ([3u64; N as usize], [0u64; N as usize]);
        counts[me as usize] = 0;
        let places: Vec<u64> = (0..u64::from(N)).map(|r| 3 * r).collect();
        let (n, at) = (counts.as_mut_ptr().cast(), starts.as_mut_ptr().cast());
        let code = unsafe { HcclAlltoAllV(from, n, at, 4, wide, n, places.as_ptr().cast(), 4, comm, on) };
        assert_eq!(code, 0);
        let got = read(wide, 3 * N as usize, on);
        for rank in (0..N).filter(|r| *r != me) {
            assert_eq!(got[3 * rank as usize..][..3], [mark(rank); 3]);
        }
        assert_eq!(HcclBarrier(comm, on), 0);
    }
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10 * LIMIT_MS), 0);
    assert_eq!(HcclCommDestroy(comm), 0);
    say_misuses();
}

#[test]
fn a_send_to_another_process_waits_for_its_receive() {
    let Some(me) = part() else {
        let mut all = start("a_send_to_another_process_waits_for_its_receive", 2);
        assert_eq!(all[0].hear().as_deref(), Some("still sending"));
        all[1].tell("receive");
        return all_well(all);
    };
    let (comm, on) = joined(me, 2);
    let data = memory(8);
    if me == 0 {
        fill(data, 8, 1.0, on);
        batch(&[send(data, 8, 1)], comm, on);
        assert_eq!(aclrtSynchronizeStreamWithTimeout(on, LIMIT_MS / 5), SYNC_TIMEOUT);
        say("still sending");
    } else {
        assert_eq!(listen(), "receive");
        batch(&[receive(data, 8, 0)], comm, on);
        assert_eq!(read(data, 8, on), [1.0; 8]);
    }
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10 * LIMIT_MS), 0);
    say_misuses();
}

#[test]
fn an_order_that_differs_between_processes_fails() {
    let Some(me) = part() else {
        let ends = start("an_order_that_differs_between_processes_fails", 2).into_iter().map(Process::end);
        let said: Vec<String> = ends.map(|(said, well)| format!("{well} {}", said.concat())).collect();
        assert!(said.iter().all(|s| s.starts_with("true")), "{said:?}");
        assert!(said.iter().any(|s| s.ends_with("failed by misuse")), "{said:?}");
        return;
    };
    let (comm, on) = joined(me, 2);
    let sizes = if me == 0 { [4, 8] } else { [8, 4] };
    for floats in sizes {
        batch(&[send(memory(8), floats, 1 - me), receive(memory(8), floats, 1 - me)], comm, on);
    }
    let code = aclrtSynchronizeStreamWithTimeout(on, 10 * LIMIT_MS);
    let by_misuse = code != 0 && longspan_emulator_misuses(0) > 0;
    say(if by_misuse { "failed by misuse" } else { "not noticed here" });
}

#[test]
fn nobody_is_told_of_a_killed_process() {
    let Some(me) = part() else {
        let mut all = start("nobody_is_told_of_a_killed_process", 2);
        assert_eq!(all[1].hear().as_deref(), Some("joined"));
        all[1].kill();
        all[0].tell("receive");
        let (said, well) = all.swap_remove(0).end();
        return assert!(well && said == ["still receiving", "timeout"], "{said:?}");
    };
    let (comm, on) = joined(me, 2);
    if me == 1 {
        say("joined");
        listen();
        return;
    }
    assert_eq!(listen(), "receive");
    batch(&[receive(memory(8), 8, 1)], comm, on);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, LIMIT_MS / 5), SYNC_TIMEOUT);
    let mut error = 0;
    assert_eq!((unsafe { HcclGetCommAsyncError(comm, &mut error) }, error), (0, 0));
    say("still receiving");
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10 * LIMIT_MS), TASK_TIMEOUT);
    assert_eq!((unsafe { HcclGetCommAsyncError(comm, &mut error) }, error), (0, TIMEOUT));
    say("timeout");
}

#[test]
fn a_process_that_does_not_come_is_waited_for_in_vain() {
    let Some(me) = part() else {
        let mut all = start("a_process_that_does_not_come_is_waited_for_in_vain", 3);
        all[2].kill();
        for process in all.drain(..2) {
            let (said, well) = process.end();
            assert!(well && said == ["did not join"], "{said:?}");
        }
        return;
    };
    let root = root(me);
    if me == 2 {
        listen();
        return;
    }
    assert_eq!(join(&root, me, 3).0, TIMEOUT);
    say("did not join");
}
