//! Ranks that are processes, as torchrun starts them, over the emulator: `cargo test -p longspan-ascend --test processes`.
//!
//! Part of the suite passes, and of a process that is killed or stopped all others are told, and end by themselves.

mod suite;

#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../../conformance/emulators/shared/processes.rs"]
mod processes;

use std::sync::Arc;
use std::time::Duration;

use longspan::{Board, Engine, Error, Layout, Mask, Mesh, Placement, Problem, Processes, Tensor, in_group};
use longspan_ascend::{Ascend, AscendFused};
use longspan_conformance::{Options, expectations, run};
use longspan_hal::{Backend, DType};
use processes::{Process, listen, part, say};

/// Limit of every wait for a peer.
const LIMIT: Duration = Duration::from_secs(4);

/// Starts `n` processes with torchrun's variables for the test `name`.
fn start(name: &str, n: u32) -> Vec<Process> {
    // Processes meet at the port after torchrun's own.
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = socket.local_addr().expect("bound").port() - 1;
    drop(socket);
    let one = |rank: u32| {
        let numbers = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", n), ("LOCAL_WORLD_SIZE", n)];
        let mut variables: Vec<_> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        variables.extend([("MASTER_ADDR", "127.0.0.1".into()), ("MASTER_PORT", port.to_string())]);
        variables.push(("LONGSPAN_EMULATOR_SEED", (rank + 1).to_string()));
        processes::start(name, rank, &variables)
    };
    (0..n).map(one).collect()
}

/// This process's place in the job of its test.
fn job() -> Processes {
    assert!(suite::prepare(), "the emulator's shared object is not beside this test");
    Processes::join("ascend", Board::open).expect("all come").expect("several processes")
}

/// Runs the cases that `filter` selects, on as many ranks as there are processes.
fn judge<B: Backend>(job: &Arc<Processes>, filter: &str) {
    let mut options = Options { name: B::NAME.into(), share_devices: false, ..Options::default() };
    options.ranks = job.size();
    options.filter = Some(filter.into());
    options.processes = Some(Arc::clone(job));
    options.expectations = expectations::built_in(B::NAME).to_owned();
    let report = run::<B>(&options, &mut |_, _, _| {}).expect("nobody dies");
    let wrong: Vec<_> = report.cases.iter().filter(|c| !c.message.is_empty()).map(|c| (&c.name, &c.message)).collect();
    assert!(report.is_ok() && report.counts.passed > 0, "{filter}: {:?} {wrong:?}", report.problems);
}

#[test]
fn the_suite_passes() {
    let Some(_) = part() else {
        for (rank, process) in start("the_suite_passes", 4).into_iter().enumerate() {
            let (said, well) = process.end();
            assert!(well && said == ["0 misuses"], "process {rank}: {said:?}");
        }
        return;
    };
    let job = Arc::new(job());
    judge::<Ascend>(&job, "collective/*");
    judge::<Ascend>(&job, "seqpar/layers-in-a-row-*");
    judge::<Ascend>(&job, "seqpar/dropout-mask-is-exact-*");
    judge::<AscendFused>(&job, "seqpar/layers-in-a-row-f32-*");
    say(&format!("{} misuses", misuses()));
}

/// Misuses that the emulator noticed in this process.
fn misuses() -> u64 {
    let path = std::env::var_os("LONGSPAN_ASCEND_LIBRARY").expect("set");
    // SAFETY: the emulator is loaded already, and the signature is its own.
    unsafe {
        let emulator = libloading::Library::new(path).expect("the emulator");
        emulator.get::<unsafe extern "C" fn(i32) -> u64>(b"longspan_emulator_misuses").expect("its counter")(1)
    }
}

/// Ring attention forward and backward, again and again; says so after the first time.
fn work(engine: &mut dyn Engine) -> longspan::Result<()> {
    let mesh = Mesh::new(1, engine.size(), Placement::UlyssesInner)?;
    let layout = Layout::zigzag(64, &mesh);
    let problem = Problem::new(DType::F32, 1, [2, 2], 16).with_backward(true);
    let shard = |seed| Tensor::normal(DType::F32, [1, 64, 2, 16], seed).shard(&layout, engine.rank());
    let (q, k, v, dout) = (shard(1)?, shard(2)?, shard(3)?, shard(4)?);
    engine.prepare(&problem, [&layout, &layout], &Mask::causal())?;
    for round in 0..100_000 {
        engine.forward([&q, &k, &v], &Default::default())?;
        engine.backward(&dout, None)?;
        if round == 0 {
            say("at work");
        }
    }
    Ok(())
}

/// A process of a job that loses one: says how its work ended.
fn work_until_somebody_is_lost() {
    let job = job();
    let run = || {
        let id = job.group_id::<Ascend>()?;
        let devices = Ascend::devices()?;
        let device = job.device(&devices, Ascend::NAME)?;
        in_group::<Ascend, ()>(device, &id, [job.rank(), job.size()], LIMIT, work)
    };
    match run() {
        Err(Error::PeerLost { rank, .. }) => say(&format!("lost {rank}")),
        other => say(&format!("{other:?}")),
    }
    // The job's board is in process 0, which stays until the others have said what they know.
    listen();
}

/// Four processes are at work when `lose` befalls the one of rank `victim`; what all others say then.
fn lose(name: &str, victim: usize, lose: fn(&mut Process)) -> Vec<String> {
    let mut all = start(name, 4);
    for process in &mut all {
        assert_eq!(process.hear().as_deref(), Some("at work"));
    }
    let mut lost = all.remove(victim);
    lose(&mut lost);
    let said = all.iter_mut().map(|process| process.hear().expect("it says how it ended")).collect();
    for mut process in all {
        process.tell("end");
        assert!(process.end().1, "it ends well");
    }
    said
}

#[test]
fn a_killed_process_is_named() {
    match part() {
        Some(_) => work_until_somebody_is_lost(),
        None => assert_eq!(lose("a_killed_process_is_named", 2, Process::kill), ["lost 2"; 3]),
    }
}

#[test]
fn the_killed_first_process_is_named() {
    match part() {
        Some(_) => work_until_somebody_is_lost(),
        None => assert_eq!(lose("the_killed_first_process_is_named", 0, Process::kill), ["lost 0"; 3]),
    }
}

/// Nothing tells who is stopped if that happens within an exchange which all have come to; but all end, and say the same.
#[test]
fn a_stopped_process_holds_up_nobody_for_good() {
    if part().is_some() {
        return work_until_somebody_is_lost();
    }
    let said = lose("a_stopped_process_holds_up_nobody_for_good", 1, Process::stop);
    assert!(said[0].starts_with("lost ") && said.iter().all(|s| *s == said[0]), "{said:?}");
}
