//! GPU ranks as processes: started as torchrun does, over the emulator of AMD GPUs, which refuses what a driver would. And the
//! script that checks the program on a machine with a GPU.
//!
//! Only with `--features rocm`: `cargo test -p longspan-cli --features rocm --test processes`.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// What a process said, and its exit code; none if a signal ended it.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    text: String,
}

/// Ports of jobs: two each.
static PORT: AtomicU16 = AtomicU16::new(0);

/// Variables that name the vendor's libraries.
const LIBRARIES: [&str; 3] = ["LONGSPAN_LIBAMDHIP64", "LONGSPAN_LIBHIPRTC", "LONGSPAN_LIBRCCL"];

/// No job of these tests takes as long.
const LONG: Duration = Duration::from_secs(150);

/// The shared object that Cargo built for this test.
fn emulator() -> PathBuf {
    let folder = std::env::current_exe().ok().and_then(|p| p.parent().map(PathBuf::from)).expect("a folder");
    let name = "liblongspan_rocm_emulator.so";
    let found = [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists());
    found.expect("Cargo builds it beside the tests")
}

/// `longspan ARGS` as so many ranks, with variables that may differ between them.
fn start(ranks: usize, args: &[&str], variables: &[(&str, &dyn Fn(usize) -> String)]) -> Vec<Child> {
    let jobs = 20_000 + (std::process::id() % 10_000) as u16 + 2 * PORT.fetch_add(1, Ordering::Relaxed);
    let emulator = emulator();
    let one = |rank: usize| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longspan"));
        command.args(args).env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
        command.env("LOCAL_RANK", rank.to_string()).env("LOCAL_WORLD_SIZE", ranks.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", jobs.to_string());
        command.envs(LIBRARIES.map(|library| (library, &emulator)));
        command.env("LONGSPAN_CACHE", emulator.with_file_name("emulated-kernels"));
        command.env("LONGSPAN_QUIET", "1").env("LONGSPAN_EMULATOR_LOUD", "1");
        for (name, value) in variables {
            command.env(name, value(rank));
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
    };
    (0..ranks).map(one).collect()
}

/// Waits for all; none may take for ever.
fn all(children: Vec<Child>) -> Vec<Said> {
    let until = Instant::now() + LONG;
    let wait = |mut child: Child| {
        let streams = [
            child.stdout.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
            child.stderr.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
        ];
        let readers = streams.map(|stream| {
            std::thread::spawn(move || {
                let lines = BufReader::new(stream.expect("it is piped")).lines();
                lines.map_while(Result::ok).fold(String::new(), |all, line| all + &line + "\n")
            })
        });
        let code = loop {
            match child.try_wait().expect("it is a child") {
                Some(status) => break status.code(),
                None if Instant::now() > until => {
                    child.kill().expect("it runs");
                    panic!("a rank hung");
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        Said { code, text: readers.map(|r| r.join().expect("no panic")).concat() }
    };
    children.into_iter().map(wait).collect()
}

fn run(ranks: usize, args: &[&str], variables: &[(&str, &dyn Fn(usize) -> String)]) -> Vec<Said> {
    let shape = ["run", "--backend", "rocm", "--synthetic", "1,64,4,2,32", "--backward", "--verify"];
    all(start(ranks, &[&shape[..], args].concat(), variables))
}

/// All ranks did well, and misused nothing; rank 0 says that results are right.
#[track_caller]
fn right(said: &[Said]) {
    assert!(said.iter().all(|s| s.code == Some(0) && !s.text.contains("misuse")), "{said:?}");
    assert!(said[0].text.contains("Verified against attention in f64"), "{}", said[0].text);
    assert!(said[1..].iter().all(|s| s.text.is_empty()), "only rank 0 speaks: {said:?}");
}

/// All ranks refuse, and rank 0 says why.
#[track_caller]
fn refused(said: &[Said], why: &str) {
    assert!(said.iter().all(|s| s.code == Some(2) && !s.text.contains("misuse")), "{said:?}");
    assert!(said[0].text.contains(why), "{}", said[0].text);
}

#[test]
fn two_and_four_processes_are_right_by_peer_copies_and_by_the_library() {
    for exchange in ["peer", "nccl"] {
        right(&run(2, &["--exchange", exchange, "--ring", "2"], &[]));
        let cut = ["--ulysses", "2", "--ring", "2", "--mask", "causal", "--layout", "zigzag"];
        right(&run(4, &[&["--exchange", exchange][..], &cut].concat(), &[]));
    }
}

#[test]
fn processes_share_a_device_by_peer_copies_only() {
    let one: [(&str, &dyn Fn(usize) -> String); 1] = [("LONGSPAN_EMULATOR_DEVICES", &|_| "1".into())];
    right(&run(2, &["--ring", "2"], &one));
    refused(&run(2, &["--ring", "2", "--exchange", "nccl"], &one), "a device for each rank");
}

#[test]
fn auto_takes_the_library_where_devices_do_not_reach_each_other_or_are_hidden() {
    let far: [(&str, &dyn Fn(usize) -> String); 1] = [("LONGSPAN_EMULATOR_PEERS", &|_| "0".into())];
    right(&run(2, &["--ring", "2"], &far));
    refused(&run(2, &["--ring", "2", "--exchange", "peer"], &far), "can't access memory of device");
    let closed: [(&str, &dyn Fn(usize) -> String); 1] = [("LONGSPAN_EMULATOR_IPC", &|_| "0".into())];
    right(&run(2, &["--ring", "2"], &closed));
    refused(&run(2, &["--ring", "2", "--exchange", "peer"], &closed), "hipIpcOpenMemHandle");
    // Each process sees one device, another one, as number 0.
    let hidden: [(&str, &dyn Fn(usize) -> String); 2] = [
        ("LONGSPAN_EMULATOR_DEVICES", &|_| "1".into()),
        ("LONGSPAN_EMULATOR_FIRST_BUS", &|rank| (16 + rank).to_string()),
    ];
    right(&run(2, &["--ulysses", "2"], &hidden));
    refused(&run(2, &["--ulysses", "2", "--exchange", "peer"], &hidden), "hidden from this process");
}

#[test]
fn ranks_that_ask_for_different_exchanges_are_refused() {
    let differ: [(&str, &dyn Fn(usize) -> String); 1] =
        [("LONGSPAN_EXCHANGE", &|rank| ["peer", "nccl"][rank].to_owned())];
    refused(&run(2, &["--ring", "2"], &differ), "all ranks must ask for the same");
}

/// A rank that dies in a ring step: the others say which, end within the deadline, and leave nothing in shared memory.
#[test]
fn a_killed_process_is_named_and_nobody_hangs() {
    for exchange in ["peer", "nccl"] {
        // Long enough that the signal strikes while ranks compute.
        let args = ["run", "--backend", "rocm", "--exchange", exchange, "--synthetic", "1,2048,2,2,64"];
        let mut children = start(3, &[&args[..], &["--ring", "3", "--backward"]].concat(), &[]);
        let at_work = |child: &Child| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
            let ticks = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
            ticks.filter_map(|t| t.parse::<u64>().ok()).sum::<u64>() > 60
        };
        let until = Instant::now() + LONG;
        while !children.iter().all(at_work) {
            assert!(Instant::now() < until, "ranks do not get to work");
            assert!(children.iter_mut().all(|c| matches!(c.try_wait(), Ok(None))), "a rank ended before");
            std::thread::sleep(Duration::from_millis(20));
        }
        children[1].kill().expect("it runs");
        let said = all(children);
        assert_eq!(said[1].code, None, "by a signal");
        for rank in [0, 2] {
            assert_eq!(said[rank].code, Some(1), "{exchange}: {said:?}");
            assert!(said[rank].text.contains("lost rank 1"), "{exchange}: {}", said[rank].text);
        }
        assert!(said.iter().all(|s| !s.text.contains("misuse")), "{said:?}");
    }
}

/// Ranks that stay away, leave or give up, as the suite has them: the library's host calls wait for them without end.
#[test]
fn lost_ranks_are_noticed_between_processes_as_between_threads() {
    for (exchange, cases) in
        [("nccl", "collective/peer-*"), ("nccl", "collective/drops-*"), ("peer", "collective/peer-*")]
    {
        let suite = ["conformance", "--backend", "rocm", "--exchange", exchange, "--ranks", "4", "--filter", cases];
        let said = all(start(4, &suite, &[]));
        assert!(said.iter().all(|s| s.code == Some(0) && !s.text.contains("misuse")), "{exchange} {cases}: {said:?}");
        assert!(said[0].text.contains(" passed, 0 failed"), "{}", said[0].text);
    }
}

/// What is missing or wrong, the kernel cache, doctor and bench, as `ci/gpu_program.sh` checks them on a machine with a GPU.
#[cfg(unix)]
#[test]
fn the_checks_of_the_program_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_longspan"), folder.path().join("longspan")).expect("a link");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/gpu_program.sh");
    let output = Command::new("bash")
        .args([script.as_ref(), folder.path().as_os_str(), "rocm".as_ref()])
        .envs(LIBRARIES.map(|library| (library, emulator())))
        .envs([("LONGSPAN_EMULATOR_DEVICES", "2"), ("SHAPE", "1,32,2,2,16"), ("BENCH_SEQ", "64")])
        .output()
        .expect("bash starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains(" ok, 0 failed"), "{said}");
}
