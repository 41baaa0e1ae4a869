//! Every planted misuse is caught, and the same calls done right are not.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longspan_ascend_emulator::operators::*;
use longspan_ascend_emulator::*;

const INVALID: i32 = 100_000;
const NN_INVALID: i32 = 161_002;
const NO_CONTEXT: i32 = 107_002;
const OTHER_CONTEXT: i32 = 107_003;
const EXCEPTION: i32 = 507_015;
const SYNC_TIMEOUT: i32 = 507_046;
const TASK_TIMEOUT: i32 = 507_014;

/// Tests count misuses of the process, so one runs at a time.
static TURN: Mutex<()> = Mutex::new(());

fn begin(device: i32) -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: one test runs at a time; the emulator reads these once, at its first call.
    unsafe {
        std::env::set_var("LONGSPAN_EMULATOR_TIMEOUT_MS", "1500");
        std::env::set_var("LONGSPAN_EMULATOR_MEMORY_MIB", "256");
    }
    let started = aclInit(null());
    assert!(started == 0 || started == 100_002);
    assert_eq!(aclrtSetDevice(device), 0);
    turn
}

/// Runs `f`, which must be noticed as at least one misuse.
fn caught(f: impl FnOnce()) {
    let before = longspan_emulator_misuses(0);
    f();
    assert!(longspan_emulator_misuses(0) > before, "nobody noticed");
}

/// Runs `f`, which is no misuse.
fn fine<T>(f: impl FnOnce() -> T) -> T {
    let before = longspan_emulator_misuses(0);
    let value = f();
    assert_eq!(longspan_emulator_misuses(0), before, "a right use was refused");
    value
}

fn stream() -> *mut c_void {
    let mut stream = null_mut();
    assert_eq!(unsafe { aclrtCreateStreamWithConfig(&mut stream, 0, 0) }, 0);
    stream
}

fn memory(bytes: usize) -> *mut c_void {
    let mut memory = null_mut();
    assert_eq!(unsafe { aclrtMalloc(&mut memory, bytes, 0) }, 0);
    memory
}

fn pinned(bytes: usize) -> *mut c_void {
    let mut memory = null_mut();
    assert_eq!(unsafe { aclrtMallocHost(&mut memory, bytes) }, 0);
    memory
}

fn event() -> *mut c_void {
    let mut event = null_mut();
    assert_eq!(unsafe { aclrtCreateEventExWithFlag(&mut event, 9) }, 0);
    event
}

fn line(memory: *mut c_void, n: i64) -> *mut c_void {
    let tensor = unsafe { aclCreateTensor(&n, 1, 0, &1, 0, 2, &n, 1, memory) };
    assert!(!tensor.is_null());
    tensor
}

fn number(mut x: f32) -> *mut c_void {
    unsafe { aclCreateScalar((&raw mut x).cast(), 0) }
}

/// Phase 1 of a fill.
fn plan_fill(tensor: *mut c_void, value: *mut c_void) -> (u64, *mut c_void) {
    let (mut size, mut executor) = (0, null_mut());
    let status = unsafe { aclnnInplaceFillScalarGetWorkspaceSize(tensor, value, &mut size, &mut executor) };
    assert_eq!(status, 0);
    (size, executor)
}

fn fill(memory: *mut c_void, n: i64, x: f32, on: *mut c_void) {
    let (tensor, value) = (line(memory, n), number(x));
    let (size, executor) = plan_fill(tensor, value);
    let workspace = self::memory(size as usize);
    assert_eq!(aclnnInplaceFillScalar(workspace, size, executor, on), 0);
    assert_eq!((aclDestroyTensor(tensor), aclDestroyScalar(value)), (0, 0));
    // The workspace stays: queued work uses it.
}

fn read(memory: *mut c_void, n: usize, on: *mut c_void) -> Vec<f32> {
    let host = pinned(4 * n);
    assert_eq!(unsafe { aclrtMemcpyAsync(host, 4 * n, memory, 4 * n, 2, on) }, 0);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10_000), 0);
    let values = unsafe { std::slice::from_raw_parts(host.cast::<f32>(), n) }.to_vec();
    assert_eq!(aclrtFreeHost(host), 0);
    values
}

#[test]
fn right_use_is_not_refused() {
    let _turn = begin(0);
    fine(|| {
        let (a, b, x) = (stream(), stream(), memory(64));
        fill(x, 16, 2.5, a);
        let done = event();
        assert_eq!((aclrtRecordEvent(done, a), aclrtStreamWaitEvent(b, done)), (0, 0));
        assert_eq!(read(x, 16, b), [2.5; 16]);
        assert_eq!((aclrtDestroyEvent(done), aclrtDestroyStream(b), aclrtDestroyStream(a)), (0, 0, 0));
        assert_eq!(aclrtFree(x), 0);
    });
}

/// A missing wait: the reader sees poison, since the writer still waits.
#[test]
fn a_missing_wait_reads_poison() {
    let _turn = begin(0);
    let (writer, reader, x, held) = (stream(), stream(), memory(64), stream());
    // The writer waits for an event that happens late: its stream waits for a peer that never comes.
    let gate = event();
    let (root, comm) = lonely(0);
    block(held, comm);
    assert_eq!((aclrtRecordEvent(gate, held), aclrtStreamWaitEvent(writer, gate)), (0, 0));
    fill(x, 16, 1.0, writer);
    assert!(read(x, 16, reader).iter().all(|x| x.is_nan()), "unwritten memory is not poisoned");
    for on in [held, writer] {
        assert_eq!(aclrtStreamAbort(on), 0);
    }
    drop(root);
}

#[test]
fn new_and_freed_memory_holds_nan() {
    let _turn = begin(0);
    let on = stream();
    let x = memory(64);
    fill(x, 16, 0.0, on);
    assert_eq!(read(x, 16, on), [0.0; 16]);
    assert_eq!(aclrtFree(x), 0);
    let y = memory(64);
    assert!(read(y, 16, on).iter().all(|x| x.is_nan()));
}

/// Memory that is freed while work on it is queued fails the stream.
#[test]
fn an_early_free_fails_the_stream() {
    let _turn = begin(0);
    let (on, held, x, gate) = (stream(), stream(), memory(64), event());
    let (_root, comm) = lonely(0);
    block(held, comm);
    assert_eq!((aclrtRecordEvent(gate, held), aclrtStreamWaitEvent(on, gate)), (0, 0));
    let source = pinned(64);
    assert_eq!(unsafe { aclrtMemcpyAsync(x, 64, source, 64, 1, on) }, 0);
    caught(|| {
        assert_eq!(aclrtFree(x), 0);
        // The held stream fails by its timeout, which fails who waits for it; then nothing runs. So let it go instead:
        assert_eq!(aclrtStreamAbort(on), 0);
        assert_eq!(unsafe { aclrtMemcpyAsync(x, 64, source, 64, 1, on) }, INVALID);
    });
    let (y, plain) = (memory(64), stream());
    caught(|| {
        for _ in 0..200 {
            assert_eq!(unsafe { aclrtMemcpyAsync(y, 64, source, 64, 1, plain) }, 0);
        }
        assert_eq!(aclrtFree(y), 0);
        assert_eq!(aclrtSynchronizeStreamWithTimeout(plain, 10_000), EXCEPTION);
    });
    // What waits for the failed stream fails too.
    let (failed, other) = (event(), stream());
    assert_eq!((aclrtRecordEvent(failed, plain), aclrtStreamWaitEvent(other, failed)), (0, 0));
    assert_eq!(aclrtSynchronizeStreamWithTimeout(other, 10_000), EXCEPTION);
}

#[test]
fn streams_of_another_context_and_threads_without_one_are_refused() {
    let _turn = begin(0);
    let on = stream();
    caught(|| {
        assert_eq!(aclrtSetDevice(1), 0);
        assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 100), OTHER_CONTEXT);
        assert_eq!(aclrtSetDevice(0), 0);
    });
    caught(|| {
        let bare = std::thread::spawn(|| {
            let mut pointer = null_mut();
            unsafe { aclrtMalloc(&mut pointer, 64, 0) }
        });
        assert_eq!(bare.join().ok(), Some(NO_CONTEXT));
    });
    assert_eq!(aclrtSetDevice(99), INVALID);
}

#[test]
fn an_executor_runs_once() {
    let _turn = begin(0);
    let (on, x, workspace) = (stream(), memory(64), memory(4096));
    let (tensor, value) = (line(x, 16), number(1.0));
    let (size, executor) = plan_fill(tensor, value);
    fine(|| assert_eq!(aclnnInplaceFillScalar(workspace, size, executor, on), 0));
    caught(|| assert_eq!(aclnnInplaceFillScalar(workspace, size, executor, on), NN_INVALID));
    // Phase 2 of another operator.
    let (size, executor) = plan_fill(tensor, value);
    caught(|| assert_eq!(aclnnExp(workspace, size, executor, on), NN_INVALID));
}

#[test]
fn tensors_must_live_until_phase_2() {
    let _turn = begin(0);
    let (on, x, workspace) = (stream(), memory(64), memory(4096));
    let (tensor, value) = (line(x, 16), number(1.0));
    let (size, executor) = plan_fill(tensor, value);
    assert_eq!(aclDestroyTensor(tensor), 0);
    caught(|| assert_eq!(aclnnInplaceFillScalar(workspace, size, executor, on), NN_INVALID));
    caught(|| assert_eq!(aclDestroyTensor(tensor), NN_INVALID));
}

#[test]
fn workspaces_are_never_empty_and_must_be_large_enough() {
    let _turn = begin(0);
    let (on, x) = (stream(), memory(64));
    let (tensor, value) = (line(x, 16), number(1.0));
    let (size, executor) = plan_fill(tensor, value);
    assert!(size >= 512);
    caught(|| assert_eq!(aclnnInplaceFillScalar(null_mut(), 0, executor, on), NN_INVALID));
    let (size, executor) = plan_fill(tensor, value);
    let small = memory(512);
    caught(|| assert_eq!(aclnnInplaceFillScalar(small, size + 4096, executor, on), NN_INVALID));
}

#[test]
fn copies_check_their_room_and_their_host_memory() {
    let _turn = begin(0);
    let (on, x, source) = (stream(), memory(1024), pinned(64));
    caught(|| assert_eq!(unsafe { aclrtMemcpyAsync(x, 32, source, 64, 1, on) }, INVALID));
    caught(|| assert_eq!(unsafe { aclrtMemcpyAsync(x, 64, source, 128, 1, on) }, INVALID));
    let plain = [0u8; 64];
    caught(|| assert_eq!(unsafe { aclrtMemcpyAsync(x, 64, plain.as_ptr().cast(), 64, 1, on) }, INVALID));
    caught(|| assert_eq!(unsafe { aclrtMemcpyAsync(x, 64, x, 64, 2, on) }, INVALID));
}

#[test]
fn tensors_and_shapes_are_checked() {
    let _turn = begin(0);
    let x = memory(64);
    let n = 200; // memory is in blocks of 512 bytes
    caught(|| assert!(unsafe { aclCreateTensor(&n, 1, 0, &1, 0, 2, &n, 1, x) }.is_null()));
    let (sixteen, four) = (16, 4);
    caught(|| assert!(unsafe { aclCreateTensor(&sixteen, 1, 0, &1, 1, 2, &sixteen, 1, x) }.is_null()));
    let (a, b) = (line(x, 16), line(memory(64), four));
    let (mut size, mut executor) = (0, null_mut());
    caught(|| assert_ne!(unsafe { aclnnExpGetWorkspaceSize(b, a, &mut size, &mut executor) }, 0));
    // An output that overlaps its input without being it.
    let shifted = unsafe { aclCreateTensor(&four, 1, 0, &1, 2, 2, &sixteen, 1, x) };
    let start = line(x, four);
    caught(|| assert_ne!(unsafe { aclnnExpGetWorkspaceSize(start, shifted, &mut size, &mut executor) }, 0));
}

#[test]
fn handles_end_once() {
    let _turn = begin(0);
    let (on, done, x) = (stream(), event(), memory(64));
    assert_eq!((aclrtDestroyStream(on), aclrtDestroyEvent(done), aclrtFree(x)), (0, 0, 0));
    caught(|| assert_eq!(aclrtDestroyStream(on), INVALID));
    caught(|| assert_eq!(aclrtDestroyEvent(done), INVALID));
    caught(|| assert_eq!(aclrtFree(x), INVALID));
    caught(|| assert_eq!(unsafe { aclrtMalloc(&mut null_mut(), 0, 0) }, INVALID));
}

/// The host may not touch device memory: another process that does dies.
#[test]
fn device_memory_is_out_of_the_hosts_reach() {
    if std::env::var_os("LONGSPAN_TOUCH").is_some() {
        let _turn = begin(0);
        unsafe { memory(64).cast::<u8>().write_volatile(1) };
        return;
    }
    let me = std::env::current_exe().expect("this test has a path");
    let child = std::process::Command::new(me)
        .args(["--exact", "device_memory_is_out_of_the_hosts_reach"])
        .env("LONGSPAN_TOUCH", "1")
        .output()
        .expect("this test can run itself");
    let signal = std::os::unix::process::ExitStatusExt::signal(&child.status);
    assert_eq!(signal, Some(libc::SIGSEGV), "{child:?}");
}

#[repr(C)]
struct Item {
    kind: i32,
    buffer: *mut c_void,
    count: u64,
    dtype: i32,
    peer: u32,
}

/// Two ranks of which only `device` takes part in what follows.
fn lonely(device: i32) -> (Vec<u8>, *mut c_void) {
    let mut root = vec![0u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let theirs = root.clone();
    let peer = std::thread::spawn(move || {
        assert_eq!(aclrtSetDevice(device + 1), 0);
        let mut comm = null_mut();
        assert_eq!(unsafe { HcclCommInitRootInfo(2, theirs.as_ptr().cast(), 1, &mut comm) }, 0);
    });
    let mut comm = null_mut();
    assert_eq!(unsafe { HcclCommInitRootInfo(2, root.as_ptr().cast(), 0, &mut comm) }, 0);
    peer.join().expect("the peer joined");
    (root, comm)
}

/// Queues a receive that nobody serves.
fn block(on: *mut c_void, comm: *mut c_void) {
    let item = Item { kind: 1, buffer: memory(64), count: 64, dtype: 7, peer: 1 };
    assert_eq!(unsafe { HcclBatchSendRecv((&raw const item).cast_mut().cast(), 1, comm, on) }, 0);
}

#[test]
fn a_peer_that_does_not_come_is_a_timeout() {
    let _turn = begin(0);
    let (_root, comm) = lonely(0);
    let (on, start) = (stream(), Instant::now());
    block(on, comm);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 200), SYNC_TIMEOUT);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 20_000), TASK_TIMEOUT);
    assert!(start.elapsed() >= Duration::from_millis(1500));
    let mut error = 0;
    assert_eq!(unsafe { HcclGetCommAsyncError(comm, &mut error) }, 0);
    assert_eq!(error, 9);
}

/// Two ranks exchange `first` and `second` bytes in their own orders.
fn exchange(orders: [[u64; 2]; 2]) -> [i32; 2] {
    let mut root = vec![0u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let rank = |me: u32, order: [u64; 2]| {
        let root = root.clone();
        std::thread::spawn(move || {
            assert_eq!(aclrtSetDevice(me as i32), 0);
            let mut comm = null_mut();
            assert_eq!(unsafe { HcclCommInitRootInfo(2, root.as_ptr().cast(), me, &mut comm) }, 0);
            let on = stream();
            for bytes in order {
                let item = |kind| Item { kind, buffer: memory(64), count: bytes, dtype: 7, peer: 1 - me };
                let items = [item(0), item(1)];
                assert_eq!(unsafe { HcclBatchSendRecv(items.as_ptr().cast_mut().cast(), 2, comm, on) }, 0);
            }
            aclrtSynchronizeStreamWithTimeout(on, 20_000)
        })
    };
    let ranks = [rank(0, orders[0]), rank(1, orders[1])];
    ranks.map(|r| r.join().expect("a rank's thread"))
}

#[test]
fn exchanges_in_another_order_fail() {
    let _turn = begin(0);
    assert_eq!(fine(|| exchange([[16, 32], [16, 32]])), [0, 0]);
    caught(|| assert!(exchange([[16, 32], [32, 16]]).iter().any(|code| *code != 0)));
}

/// Two ranks exchange 16 bytes by an all-to-all, from `offsets[rank]` on of 32 bytes; rank 1 calls it only if `both`.
fn all_to_all(offsets: [u64; 2], both: bool) -> [[i32; 2]; 2] {
    let mut root = vec![0u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let ranks = [0, 1].map(|me| {
        let root = root.clone();
        std::thread::spawn(move || {
            assert_eq!(aclrtSetDevice(me as i32), 0);
            let mut comm = null_mut();
            assert_eq!(unsafe { HcclCommInitRootInfo(2, root.as_ptr().cast(), me, &mut comm) }, 0);
            let (on, from, to) = (stream(), memory(32), memory(32));
            let peer = 1 - me as usize;
            let [mut counts, mut starts] = [[0u64; 2]; 2];
            (counts[peer], starts[peer]) = (16, offsets[me as usize]);
            let (n, at) = (counts.as_ptr().cast(), starts.as_ptr().cast());
            let code = if both || me == 0 {
                unsafe { HcclAlltoAllV(from, n, at, 7, to, n, [0u64; 2].as_ptr().cast(), 7, comm, on) }
            } else {
                let item = |kind, buffer| Item { kind, buffer, count: 16, dtype: 7, peer: peer as u32 };
                let items = [item(0, from), item(1, to)];
                unsafe { HcclBatchSendRecv(items.as_ptr().cast_mut().cast(), 2, comm, on) }
            };
            [code, aclrtSynchronizeStreamWithTimeout(on, 20_000)]
        })
    });
    ranks.map(|r| r.join().expect("a rank's thread"))
}

#[test]
fn an_all_to_all_that_a_rank_takes_for_a_batch_or_that_leaves_its_memory_fails() {
    let _turn = begin(0);
    assert_eq!(fine(|| all_to_all([0, 16], true)), [[0; 2]; 2]);
    caught(|| assert!(all_to_all([0, 16], false).iter().any(|codes| codes[1] != 0)));
    caught(|| assert!(all_to_all([0, 1 << 30], true)[1][0] != 0));
}

#[test]
fn two_ranks_on_one_device_are_refused() {
    let _turn = begin(0);
    let mut root = vec![0u8; 4108];
    assert_eq!(unsafe { HcclGetRootInfo(root.as_mut_ptr().cast()) }, 0);
    let join = |rank| {
        let root = root.clone();
        std::thread::spawn(move || {
            assert_eq!(aclrtSetDevice(0), 0);
            unsafe { HcclCommInitRootInfo(2, root.as_ptr().cast(), rank, &mut null_mut()) }
        })
    };
    let ranks = [join(0), join(1)].map(|r| r.join().expect("a rank's thread"));
    assert!(ranks.iter().any(|code| *code != 0), "{ranks:?}");
}

/// Counters say what was launched, allocated and sent.
#[test]
fn counters_count() {
    let _turn = begin(0);
    let count = |name: &str| {
        let name = CString::new(name).expect("no NUL");
        unsafe { longspan_emulator_count(name.as_ptr()) }
    };
    let (before, on, x) = (count("launch aclnnInplaceFillScalar"), stream(), memory(64));
    fill(x, 16, 1.0, on);
    assert_eq!(aclrtSynchronizeStreamWithTimeout(on, 10_000), 0);
    assert_eq!(count("launch aclnnInplaceFillScalar"), before + 1);
    assert!(count("memory peak") >= 64);
}
