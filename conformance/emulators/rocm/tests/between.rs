//! What processes have in common: right use works, and every planted misuse is caught.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::c_void;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use longspan_rocm_emulator::*;

const INVALID: i32 = 1;
const CONTEXT: i32 = 201;
const NOT_READY: i32 = 600;
const EXCEPTION: i32 = 700;

/// Names the handle in a process that a test started.
const HANDLE: &str = "LONGSPAN_TEST_HANDLE";

/// Tests count misuses of the process, so one runs at a time.
static TURN: Mutex<()> = Mutex::new(());

fn begin() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: one test runs at a time; the emulator reads this once, at its first call.
    unsafe { std::env::set_var("LONGSPAN_EMULATOR_MEMORY_MIB", "64") };
    assert_eq!((hipInit(0), hipSetDevice(0)), (0, 0));
    turn
}

/// Runs `f`; whether that was noticed as a misuse.
fn caught<T>(f: impl FnOnce() -> T) -> (T, bool) {
    let before = longspan_emulator_misuses(0);
    let value = f();
    (value, longspan_emulator_misuses(0) > before)
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

fn handle(memory: *mut c_void) -> Result<[u8; 64], i32> {
    let mut handle = [0u8; 64];
    match unsafe { hipIpcGetMemHandle(handle.as_mut_ptr().cast(), memory) } {
        0 => Ok(handle),
        code => Err(code),
    }
}

fn open(handle: &[u8; 64]) -> Result<*mut c_void, i32> {
    let mut memory = null_mut();
    match unsafe { hipIpcOpenMemHandle(&mut memory, handle.as_ptr().cast::<MemoryHandle>().read_unaligned(), 1) } {
        0 => Ok(memory),
        code => Err(code),
    }
}

/// Another process, which opens `handle` and then does what it is told, a word a line; it answers with a line.
struct Other(Child, BufReader<std::process::ChildStdout>);

impl Other {
    fn start(handle: &[u8; 64]) -> Self {
        let text: String = handle.iter().map(|b| format!("{b:02x}")).collect();
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["as_another_process", "--exact", "--nocapture", "--quiet"])
            .env(HANDLE, text)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut other = Self(child, out);
        assert_eq!(other.answer(), "opened");
        other
    }

    fn tell(&mut self, word: &str) -> String {
        writeln!(self.0.stdin.as_mut().expect("it is piped"), "{word}").expect("it listens");
        self.answer()
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.1.read_line(&mut line).expect("text") > 0, "it ended without an answer");
            // The test's own frame has other lines.
            if let Some((_, answer)) = line.trim_end().rsplit_once("says ") {
                return answer.to_owned();
            }
        }
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().expect("it ends").success());
    }
}

/// Not a test of its own: what [`Other`] runs.
#[test]
fn as_another_process() {
    let Ok(text) = std::env::var(HANDLE) else { return };
    let _turn = begin();
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("hex");
    let theirs = open(&std::array::from_fn(byte)).expect("it lives");
    let on = stream();
    println!("says opened");
    for line in std::io::stdin().lines() {
        let ((), noticed) = caught(|| match line.expect("text").as_str() {
            "close" => assert!([0, INVALID].contains(&hipIpcCloseMemHandle(theirs))),
            "fill" => {
                assert_eq!(hipMemsetD32Async(theirs, 7, 32, on), 0);
                let _ = hipStreamSynchronize(on);
            }
            "free" => assert_eq!(hipFree(theirs), INVALID),
            other => panic!("{other}"),
        });
        println!("says {}", if noticed { "misuse" } else { "fine" });
    }
}

#[test]
fn another_process_writes_memory_that_was_handed_out() {
    let _turn = begin();
    let (mine, on, mut host) = (memory(128), stream(), null_mut());
    let mut other = Other::start(&handle(mine).expect("plain memory"));
    assert_eq!(
        (other.tell("fill"), other.tell("free"), other.tell("close")),
        ("fine".into(), "misuse".into(), "fine".into())
    );
    assert_eq!(other.tell("close"), "misuse", "closed twice");
    other.end();
    assert_eq!(unsafe { hipHostMalloc(&mut host, 128, 1) }, 0);
    assert_eq!((hipMemcpyDtoHAsync(host, mine, 128, on), hipStreamSynchronize(on)), (0, 0));
    assert_eq!(unsafe { std::slice::from_raw_parts(host.cast::<u32>(), 32) }, [7; 32]);
    assert_eq!(caught(|| hipFree(mine)), (0, false));
}

#[test]
fn what_another_process_has_open_must_not_be_freed_nor_used_afterwards() {
    let _turn = begin();
    let mine = memory(128);
    let mut other = Other::start(&handle(mine).expect("plain memory"));
    assert!(caught(|| hipFree(mine)).1, "freed while it is open");
    assert_eq!(other.tell("fill"), "misuse");
    other.end();
    // A process that died has nothing open, waited for or not.
    let mine = memory(128);
    let mut other = Other::start(&handle(mine).expect("plain memory"));
    other.0.kill().expect("it runs");
    while std::fs::read_to_string(format!("/proc/{}/stat", other.0.id())).is_ok_and(|s| !s.contains(") Z")) {
        std::thread::yield_now();
    }
    assert_eq!(caught(|| hipFree(mine)), (0, false));
    other.0.wait().expect("it was killed");
}

#[test]
fn handles_are_of_whole_memory_of_another_process() {
    let _turn = begin();
    let mine = memory(128);
    let own = handle(mine).expect("plain memory");
    assert_eq!(caught(|| open(&own)), (Err(CONTEXT), true));
    assert_eq!(caught(|| open(&[0; 64])), (Err(INVALID), true));
    assert_eq!(caught(|| handle(mine.wrapping_byte_add(16))), (Err(INVALID), true));
    assert_eq!(caught(|| hipIpcCloseMemHandle(mine)), (INVALID, true));
    assert_eq!(hipFree(mine), 0);
}

#[test]
fn streams_wait_for_values_that_streams_or_the_host_write() {
    let _turn = begin();
    let flags = [const { AtomicU32::new(0) }; 16];
    let (host, mut at) = (flags.as_ptr().cast_mut().cast::<c_void>(), null_mut());
    assert!(caught(|| hipStreamWaitValue32(stream(), host, 1, 0, u32::MAX)).1, "not registered");
    assert_eq!(hipHostRegister(host, 64, 3), 0);
    assert!(caught(|| hipHostRegister(host, 64, 3)).1, "registered twice");
    assert_eq!(unsafe { hipHostGetDevicePointer(&mut at, host, 0) }, 0);
    assert!(caught(|| hipStreamWaitValue32(stream(), host, 1, 0, u32::MAX)).1, "at the host's address");
    let (a, b) = (stream(), stream());
    assert_eq!((hipStreamWaitValue32(a, at, 1, 0, u32::MAX), hipStreamWriteValue32(a, at, 0, 0)), (0, 0));
    assert_eq!(hipStreamWriteValue32(b, at, 1, 0), 0);
    assert_eq!((hipStreamSynchronize(a), hipStreamSynchronize(b)), (0, 0));
    assert_eq!(flags[0].load(Ordering::Acquire), 0, "it returned to its first value");
    // A wait that no stream ends, and the host does.
    let mut event = null_mut();
    assert_eq!(unsafe { hipEventCreateWithFlags(&mut event, 2) }, 0);
    assert_eq!((hipStreamWaitValue32(a, at.wrapping_byte_add(4), 1, 0, u32::MAX), hipEventRecord(event, a)), (0, 0));
    assert_eq!(hipEventQuery(event), NOT_READY);
    flags[1].store(1, Ordering::Release);
    assert_eq!(hipStreamSynchronize(a), 0);
    // Registered memory that goes away under a wait.
    assert_eq!(hipStreamWaitValue32(a, at.wrapping_byte_add(8), 1, 0, u32::MAX), 0);
    let (code, noticed) = caught(|| {
        assert_eq!(hipHostUnregister(host), 0);
        hipStreamSynchronize(a)
    });
    assert_eq!((code, noticed), (EXCEPTION, true));
    assert!(caught(|| hipHostUnregister(host)).1, "twice");
}
