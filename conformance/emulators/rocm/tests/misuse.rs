//! Every planted misuse is caught, and the same calls done right are not.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use longspan_rocm_emulator::*;

const INVALID: i32 = 1;
const HANDLE: i32 = 400;
const LAUNCH: i32 = 719;
const NAN: u32 = u32::MAX;

/// Tests count misuses of the process, so one runs at a time.
static TURN: Mutex<()> = Mutex::new(());

fn begin() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: one test runs at a time; the emulator reads these once, at its first call.
    unsafe {
        std::env::set_var("LONGSPAN_EMULATOR_TIMEOUT_MS", "1500");
        std::env::set_var("LONGSPAN_EMULATOR_MEMORY_MIB", "256");
    }
    assert_eq!((hipInit(0), hipSetDevice(0)), (0, 0));
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
    assert_eq!(unsafe { hipStreamCreateWithPriority(&mut stream, 1, 0) }, 0);
    stream
}

fn memory(bytes: usize) -> *mut c_void {
    let mut memory = null_mut();
    assert_eq!(unsafe { hipMalloc(&mut memory, bytes) }, 0);
    memory
}

fn pinned(bytes: usize) -> *mut c_void {
    let mut memory = null_mut();
    assert_eq!(unsafe { hipHostMalloc(&mut memory, bytes, 1) }, 0);
    memory
}

fn event() -> *mut c_void {
    let mut event = null_mut();
    assert_eq!(unsafe { hipEventCreateWithFlags(&mut event, 2) }, 0);
    event
}

fn read(memory: *mut c_void, words: usize, on: *mut c_void) -> Vec<u32> {
    let host = pinned(4 * words);
    assert_eq!(hipMemcpyDtoHAsync(host, memory, 4 * words, on), 0);
    assert_eq!(hipStreamSynchronize(on), 0);
    let values = unsafe { std::slice::from_raw_parts(host.cast::<u32>(), words) }.to_vec();
    assert_eq!(hipHostFree(host), 0);
    values
}

/// What kernels of these tests take.
#[repr(C)]
struct Params {
    to: u64,
}

/// A kernel `test` with this body, launched on one block of 128 threads.
fn launch(body: &str, to: *mut c_void, on: *mut c_void) -> i32 {
    let source = format!("struct P {{ u64 to; }};\nKERNEL(128, 1) test(PARAMS(P) p) {{ {body} }}\n");
    let (source, name) = (CString::new(source).expect("text"), CString::new("test").expect("text"));
    let arch = CString::new("--offload-arch=gfx942").expect("text");
    let (mut program, mut bytes) = (null_mut(), 0);
    let (mut module, mut function) = (null_mut(), null_mut());
    unsafe {
        assert_eq!(hiprtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()), 0);
        assert_eq!(hiprtcCompileProgram(program, 1, &arch.as_ptr()), 0);
        assert_eq!(hiprtcGetCodeSize(program, &mut bytes), 0);
        let mut code = vec![0u8; bytes];
        assert_eq!(hiprtcGetCode(program, code.as_mut_ptr().cast()), 0);
        assert_eq!(hiprtcDestroyProgram(&mut program), 0);
        assert_eq!(hipModuleLoadData(&mut module, code.as_ptr().cast()), 0);
        assert_eq!(hipModuleGetFunction(&mut function, module, name.as_ptr()), 0);
        let mut params = Params { to: to as u64 };
        let mut list = [(&raw mut params).cast::<c_void>()];
        assert_eq!(hipModuleLaunchKernel(function, 1, 1, 1, 128, 1, 1, 1024, on, list.as_mut_ptr(), null_mut()), 0);
    }
    hipStreamSynchronize(on)
}

#[test]
fn right_use_is_not_refused() {
    let _turn = begin();
    fine(|| {
        let (a, b, x) = (stream(), stream(), memory(512));
        assert_eq!(hipMemsetD32Async(x, 7, 128, a), 0);
        let done = event();
        assert_eq!((hipEventRecord(done, a), hipStreamWaitEvent(b, done, 0)), (0, 0));
        // Recorded again elsewhere: the wait is still for the first record.
        assert_eq!(hipEventRecord(done, b), 0);
        assert_eq!(read(x, 128, b), [7; 128]);
        let body = "u32 *to = global<u32>(p.to); const float other = shuffle_xor(float(threadIdx.x), 1); barrier();
                    to[threadIdx.x] = u32(other);";
        assert_eq!(launch(body, x, a), 0);
        assert_eq!(read(x, 128, a), (0..128).map(|i| i ^ 1).collect::<Vec<u32>>());
        assert_eq!((hipFree(x), hipStreamDestroy(a), hipStreamDestroy(b), hipEventDestroy(done)), (0, 0, 0, 0));
    });
}

#[test]
fn memory_is_poisoned_before_and_after() {
    let _turn = begin();
    let (on, x) = (stream(), memory(64));
    assert_eq!(fine(|| read(x, 16, on)), [NAN; 16]);
    let body = "SHARED(u32, memory); global<u32>(p.to)[0] = memory[threadIdx.x];";
    assert_eq!(launch(body, x, on), 0);
    assert_eq!(read(x, 1, on), [NAN]);
}

#[test]
fn device_memory_is_out_of_the_hosts_reach() {
    if std::env::var_os("LONGSPAN_TOUCH").is_some() {
        let _turn = begin();
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

#[test]
fn frees_are_checked() {
    let _turn = begin();
    let (on, x, y) = (stream(), memory(64), memory(64));
    assert_eq!(hipFree(x), 0);
    caught(|| assert_ne!(hipFree(x), 0));
    caught(|| assert_eq!(hipFreeAsync(x, on), INVALID));
    // Queued work on memory that is freed before it runs.
    let late = stream();
    let gate = event();
    assert_eq!(launch("for (volatile int i = 0; i < 20000000 / 128; ++i) {}", y, late), 0);
    assert_eq!(hipEventRecord(gate, late), 0);
    caught(|| {
        for _ in 0..200 {
            assert_eq!(hipMemsetD32Async(y, 1, 16, late), 0);
        }
        assert_eq!(hipFree(y), 0);
        assert_ne!(hipStreamSynchronize(late), 0);
    });
}

#[test]
fn writes_behind_an_allocation_are_noticed() {
    let _turn = begin();
    let (on, x) = (stream(), memory(512));
    assert_eq!(fine(|| launch("if (threadIdx.x == 0) global<u32>(p.to)[128] = 1;", x, on)), 0);
    caught(|| assert_eq!(hipFree(x), 0));
}

#[test]
fn kernels_that_meet_in_divergent_code_fail() {
    let _turn = begin();
    for body in [
        "if (threadIdx.x < 3) shuffle_xor(1.0f, 1);",
        "if (threadIdx.x % 64 < 32) { any_lane(true); } else { shuffle_xor(1.0f, 1); }",
        "if (threadIdx.x < 70) barrier(); else if (threadIdx.x < 100) shuffle_xor(1.0f, 1);",
        "store_shared(1024, 1);",
        "store_shared(2, 1);",
    ] {
        let (on, x) = (stream(), memory(64));
        caught(|| assert_eq!(launch(body, x, on), LAUNCH, "{body}"));
    }
}

#[test]
fn handles_are_strict() {
    let _turn = begin();
    let (on, x, done) = (stream(), memory(64), event());
    assert_eq!(hipSetDevice(1), 0);
    caught(|| assert_eq!(hipMemsetD32Async(x, 1, 16, on), HANDLE));
    caught(|| assert_eq!(hipEventRecord(done, on), HANDLE));
    let other = stream();
    caught(|| assert_eq!(hipEventRecord(done, other), HANDLE));
    assert_eq!(hipSetDevice(0), 0);
    assert_eq!((hipStreamDestroy(on), hipEventDestroy(done)), (0, 0));
    caught(|| assert_eq!(hipStreamDestroy(on), HANDLE));
    caught(|| assert_eq!(hipEventQuery(done), HANDLE));
    assert_ne!(hipSetDevice(99), 0);
}

#[test]
fn copies_check_their_memory() {
    let _turn = begin();
    let (on, x, host) = (stream(), memory(1024), pinned(64));
    caught(|| assert_eq!(hipMemcpyHtoDAsync(x, host, 128, on), INVALID));
    let plain = [0u8; 64];
    caught(|| assert_eq!(hipMemcpyHtoDAsync(x, plain.as_ptr().cast(), 64, on), INVALID));
    caught(|| assert_eq!(hipMemcpyDtoHAsync(x, x, 64, on), INVALID));
    caught(|| assert_eq!(hipMemcpy2DAsync(x, 16, host, 16, 32, 2, 4, on), INVALID));
    caught(|| assert_eq!(hipMemcpyAsync(x, host, 64, 1, on), INVALID));
    fine(|| assert_eq!(hipMemcpyAsync(x, host, 64, 4, on), 0));
    // Another device's memory, before and after access is enabled.
    assert_eq!(hipSetDevice(1), 0);
    let (there, y) = (stream(), memory(64));
    caught(|| assert_eq!(hipMemcpyAsync(y, x, 64, 4, there), INVALID));
    assert_eq!(hipDeviceEnablePeerAccess(0, 0), 0);
    assert_eq!(hipDeviceEnablePeerAccess(0, 0), 704);
    fine(|| assert_eq!(hipMemcpyAsync(y, x, 64, 4, there), 0));
    assert_eq!(hipStreamSynchronize(there), 0);
}

#[test]
fn a_compiler_says_what_is_wrong() {
    let _turn = begin();
    let source = CString::new("KERNEL(1, 1) f(PARAMS(u64) p) { nothing(); }").expect("text");
    let name = CString::new("f.cu").expect("text");
    let arch = CString::new("--offload-arch=gfx942").expect("text");
    let mut program = null_mut();
    let mut bytes = 0;
    unsafe {
        assert_eq!(hiprtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()), 0);
        assert_ne!(hiprtcCompileProgram(program, 1, &arch.as_ptr()), 0);
        assert_eq!(hiprtcGetProgramLogSize(program, &mut bytes), 0);
        let mut log = vec![0u8; bytes];
        assert_eq!(hiprtcGetProgramLog(program, log.as_mut_ptr().cast()), 0);
        let text = String::from_utf8_lossy(&log);
        assert!(text.contains("nothing") && text.contains("f.cu:1"), "{text}");
        let other = CString::new("--offload-arch=gfx1030").expect("text");
        assert_ne!(hiprtcCompileProgram(program, 1, &other.as_ptr()), 0);
    }
}

/// Two ranks of a communicator, each on a device of its own, run `body`.
fn on_two(body: impl Fn(i32, *mut c_void, *mut c_void) + Sync) {
    let mut id = std::mem::MaybeUninit::<UniqueId>::uninit();
    assert_eq!(unsafe { ncclGetUniqueId(id.as_mut_ptr()) }, 0);
    let id = unsafe { id.assume_init() };
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let body = &body;
            scope.spawn(move || {
                assert_eq!(hipSetDevice(rank), 0);
                let mut comm = null_mut();
                assert_eq!(unsafe { ncclCommInitRank(&mut comm, 2, id, rank) }, 0);
                body(rank, comm, stream());
                assert_eq!(ncclCommAbort(comm), 0);
            });
        }
    });
}

#[test]
fn messages_arrive_and_lost_peers_are_not_told() {
    let _turn = begin();
    fine(|| {
        on_two(|rank, comm, on| {
            let (x, y) = (memory(64), memory(64));
            assert_eq!(hipMemsetD32Async(x, rank + 5, 16, on), 0);
            assert_eq!(ncclGroupStart(), 0);
            assert_eq!(ncclSend(x, 64, 1, 1 - rank, comm, on), 0);
            assert_eq!(ncclRecv(y, 64, 1, 1 - rank, comm, on), 0);
            assert_eq!(ncclGroupEnd(), 0);
            assert_eq!(read(y, 16, on), [(6 - rank) as u32; 16]);
        });
    });
    // Rank 1 does not take part, or no longer: only the emulator's own time limit ends the wait, on the host for the first message.
    for met in [false, true] {
        on_two(|rank, comm, on| {
            let x = memory(64);
            let send = || {
                assert_eq!(ncclGroupStart(), 0);
                let queued = match rank {
                    0 => ncclSend(x, 64, 1, 1, comm, on),
                    _ => ncclRecv(x, 64, 1, 0, comm, on),
                };
                assert_eq!(queued, 0);
                ncclGroupEnd()
            };
            if met {
                assert_eq!((send(), hipStreamSynchronize(on)), (0, 0));
            }
            if rank == 1 {
                std::thread::sleep(std::time::Duration::from_millis(1800));
                return;
            }
            if !met {
                assert_eq!(send(), 6);
                return;
            }
            assert_eq!((send(), hipStreamSynchronize(on)), (0, LAUNCH));
            let mut code = 0;
            assert_eq!(unsafe { ncclCommGetAsyncError(comm, &mut code) }, 0);
            assert_eq!(code, 6);
        });
    }
}

#[test]
fn messages_that_do_not_match_are_noticed() {
    let _turn = begin();
    caught(|| {
        on_two(|rank, comm, on| {
            let x = memory(64);
            assert_eq!(ncclGroupStart(), 0);
            let status = match rank {
                0 => ncclSend(x, 64, 1, 1, comm, on),
                _ => ncclRecv(x, 32, 1, 0, comm, on),
            };
            assert_eq!((status, ncclGroupEnd()), (0, 0));
            hipStreamSynchronize(on);
        });
    });
    on_two(|rank, comm, on| {
        if rank == 0 {
            let x = memory(64);
            caught(|| assert_ne!(ncclSend(x, 64, 1, 1, comm, on), 0));
            assert_eq!(ncclGroupStart(), 0);
            caught(|| assert_ne!(ncclSend(x, 64, 1, 0, comm, on), 0));
            caught(|| assert_ne!(ncclSend(null(), 64, 1, 1, comm, on), 0));
            assert_eq!(ncclGroupEnd(), 0);
        }
    });
}
