//! Processes that meet by torchrun's variables alone, without MPI: real ones, each this test once more.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use longspan::{Board, Error, Processes};
use longspan_cpu::Cpu;
use longspan_hal::Backend;

/// What a process of the job does: the variable that tells it.
const PART: &str = "LONGSPAN_TEST_PART";

/// Variables of one process.
struct Launch {
    rank: u32,
    size: u32,
    port: u16,
    run: &'static str,
    part: &'static str,
}

impl Launch {
    fn start(&self) -> Child {
        let Self { rank, size, port, run, part } = self;
        Command::new(std::env::current_exe().expect("this test"))
            .args(["--ignored", "--exact", "a_process_of_the_job", "--nocapture", "--test-threads", "1"])
            .envs([("RANK", rank), ("WORLD_SIZE", size)].map(|(name, value)| (name, value.to_string())))
            .envs([("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size)].map(|(name, value)| (name, value.to_string())))
            .envs([("MASTER_ADDR", "127.0.0.1"), ("TORCHELASTIC_RUN_ID", run), (PART, part)])
            .env("MASTER_PORT", port.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process")
    }
}

/// A port whose next one is free: torchrun's own store would have the port itself.
fn port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    free - 1
}

/// How a process ended, and the lines that it said.
fn end(mut child: Child) -> (ExitStatus, Vec<String>) {
    let mut text = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    let said = text.lines().filter_map(|line| Some(line.split_once("said: ")?.1.to_owned()));
    (child.wait().expect("ended"), said.collect())
}

fn say(text: impl std::fmt::Display) {
    println!("said: {text}");
    std::io::stdout().flush().expect("a pipe");
}

#[test]
#[ignore = "a process of the tests below"]
fn a_process_of_the_job() {
    let part = std::env::var(PART).expect("started by the tests below");
    let backend = if part == "threads" { "cpu" } else { "ascend" };
    let processes = match Processes::join(backend, Board::open) {
        Ok(processes) => processes.expect("launched"),
        Err(error) => return say(error),
    };
    let rank = processes.rank();
    if part == "die" && rank == 1 {
        std::process::exit(7);
    }
    let all = match processes.share("names", format!("rank {rank}").as_bytes()) {
        Ok(all) => all,
        Err(Error::PeerLost { rank, .. }) => return say(format_args!("lost rank {rank}")),
        Err(other) => panic!("{other}"),
    };
    say(all.iter().map(|bytes| String::from_utf8_lossy(bytes)).collect::<Vec<_>>().join(", "));
    say(format_args!("{:?}", processes.group_id::<Cpu>().expect("process 0 makes one").0));
    let devices = vec![Cpu::devices().expect("the host").remove(0); 2];
    let device = processes.device(&devices, "cpu").expect("one of two");
    say(devices.iter().position(|d| std::ptr::eq(d, device)).expect("of these"));
    let gathered = processes.gather("sizes", vec![0; rank as usize]).expect("all are here");
    say(format_args!("{:?}", gathered.iter().map(Vec::len).collect::<Vec<_>>()));
    processes.leave();
}

#[test]
fn processes_meet_share_and_hand_a_group_id_round() {
    let port = port();
    let launch = |rank| Launch { rank, size: 3, port, run: "a", part: "work" }.start();
    // Process 0, where the others meet, comes last.
    let [two, one] = [launch(2), launch(1)];
    std::thread::sleep(Duration::from_millis(300));
    let ended = [launch(0), one, two].map(end);
    assert!(ended.iter().all(|(status, _)| status.success()), "{ended:?}");
    let id = &ended[0].1[1];
    for (rank, (_, said)) in ended.iter().enumerate() {
        let sizes = if rank == 0 { "[0, 1, 2]" } else { "[]" };
        assert_eq!(said[..], ["rank 0, rank 1, rank 2", id, &(rank % 2).to_string(), sizes]);
    }
}

#[test]
fn a_process_that_dies_is_named_by_the_others() {
    let port = port();
    let ended = [0, 1, 2].map(|rank| Launch { rank, size: 3, port, run: "b", part: "die" }.start()).map(end);
    assert_eq!(ended[1].0.code(), Some(7));
    for survivor in [&ended[0], &ended[2]] {
        assert_eq!((survivor.0.success(), &survivor.1[..]), (true, &["lost rank 1".to_owned()][..]));
    }
}

#[test]
fn a_process_of_another_run_on_the_port_is_refused() {
    let port = port();
    let mut first = Launch { rank: 0, size: 2, port, run: "c", part: "work" }.start();
    let (_, said) = end(Launch { rank: 1, size: 2, port, run: "d", part: "work" }.start());
    assert!(said.len() == 1 && said[0].contains("it is of another group or job"), "{said:?}");
    first.kill().and_then(|()| first.wait()).expect("it waits");
}

#[test]
fn variables_that_do_not_fit_and_ranks_that_are_threads_are_refused() {
    let (_, said) = end(Launch { rank: 5, size: 2, port: 29500, run: "e", part: "work" }.start());
    assert!(said.len() == 1 && said[0].contains("RANK=5"), "{said:?}");
    let (_, said) = end(Launch { rank: 0, size: 2, port: 29500, run: "f", part: "threads" }.start());
    assert!(said.len() == 1 && said[0].contains("threads of one process"), "{said:?}");
}
