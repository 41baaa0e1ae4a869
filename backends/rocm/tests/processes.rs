//! Ranks that are processes, over the emulator: `cargo test -p longspan-rocm --test processes`. A device fails or hangs while its
//! process lives and says nothing: whoever waits for it on the device is told.
//!
//! `crates/cli/tests/processes.rs` runs the program as processes, and the suite.

#[allow(dead_code)] // shared: not all of it is used here
#[path = "../../../conformance/emulators/shared/processes.rs"]
mod processes;

use std::path::PathBuf;
use std::time::Duration;

use longspan_hal::{Backend, Collective, DType, Device, Error, GroupId, P2p, Priority, Result, Strided, View, ViewMut};
use longspan_rocm::Rocm;
use processes::{listen, part, say};

/// Limit of every wait for a peer.
const LIMIT: Duration = Duration::from_secs(3);
/// No wait takes as long.
const LONG: Duration = Duration::from_secs(30);

/// The shared object that Cargo built for this test.
fn emulator() -> PathBuf {
    let folder = std::env::current_exe().ok().and_then(|p| p.parent().map(PathBuf::from)).expect("a folder");
    let name = "liblongspan_rocm_emulator.so";
    let found = [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.exists());
    found.expect("Cargo builds it beside the tests")
}

/// Two ranks, of which the second has `fault` in the second kernel of its process; what the first says of its wait.
fn wait_for_a_device(name: &str, exchange: &str, fault: &str) -> String {
    let start = |rank: u32| {
        let emulator = emulator();
        let cache = emulator.with_file_name("emulated-kernels");
        let mut variables: Vec<(&str, String)> = ["LONGSPAN_LIBAMDHIP64", "LONGSPAN_LIBHIPRTC", "LONGSPAN_LIBRCCL"]
            .map(|library| (library, emulator.display().to_string()))
            .into();
        variables.extend([("LONGSPAN_CACHE", cache.display().to_string()), ("LONGSPAN_QUIET", "1".into())]);
        variables.push(("LONGSPAN_EXCHANGE", exchange.into()));
        if rank == 1 {
            variables.push(("LONGSPAN_EMULATOR_FAULT", fault.into()));
        }
        processes::start(name, rank, &variables)
    };
    let mut both = [0, 1].map(start);
    let id = both[0].hear().expect("a group's id");
    both[1].tell(&id);
    let said = both[0].hear().expect("how it ended");
    both.iter_mut().for_each(|process| process.tell("end"));
    both.into_iter().for_each(|process| assert!(process.end().1, "it ends well"));
    said
}

/// A rank of [`wait_for_a_device`].
fn rank(rank: u32) -> Result<()> {
    let device = Rocm::open(&Rocm::devices()?[rank as usize])?;
    let stream = device.stream(Priority::Normal)?;
    let at = Strided::dense(DType::F32, [1, 4, 2, 16]);
    let (send, spoilt) = (device.alloc(at.bytes())?, device.alloc(at.bytes())?);
    // One that a kernel is needed for.
    let kernel = || device.fill(&stream, 1.0, ViewMut::new(&spoilt, at.narrow(2, 0..1)?)?);
    // It is compiled before others wait.
    kernel()?;
    device.synchronize(&stream, LONG)?;
    let id = if rank == 0 {
        let id = Rocm::group_id()?;
        say(&id.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        id
    } else {
        let text = listen();
        let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).expect("of two digits");
        GroupId((0..text.len()).step_by(2).map(byte).collect())
    };
    let group = Rocm::join(&device, &id, rank, 2, LIMIT)?;
    let window = group.window(at.bytes())?;
    let exchange = group.prepare(&[
        P2p::Send { to: 1 - rank, dtype: at.dtype(), extent: at.extent() },
        P2p::Recv { from: 1 - rank, into: ViewMut::new(&window, at)? },
    ])?;
    device.fill(&stream, 0.0, ViewMut::new(&send, at)?)?;
    if rank == 0 {
        let queued = group.exchange(&stream, &exchange, &[View::new(&send, at)?]);
        match queued.and_then(|()| device.synchronize(&stream, LONG)) {
            Err(Error::PeerLost { rank, .. }) => say(&format!("lost {rank}")),
            other => say(&format!("{other:?}")),
        }
    } else {
        kernel()?;
        // Whether its host knows already is a matter of luck.
        let _ = group.exchange(&stream, &exchange, &[View::new(&send, at)?]);
    }
    // The other one lives, and says nothing.
    listen();
    Ok(())
}

#[test]
fn a_device_that_fails_is_told_to_those_who_wait_for_it() {
    match part() {
        Some(part) => rank(part).expect("it goes well until the device fails"),
        None => {
            for exchange in ["nccl", "peer"] {
                let name = "a_device_that_fails_is_told_to_those_who_wait_for_it";
                assert_eq!(wait_for_a_device(name, exchange, "fail:2"), "lost 1", "{exchange}");
            }
        }
    }
}

#[test]
fn a_device_that_hangs_is_named_after_the_limit() {
    match part() {
        Some(part) => rank(part).expect("it goes well on the host"),
        None => {
            for exchange in ["nccl", "peer"] {
                let name = "a_device_that_hangs_is_named_after_the_limit";
                assert_eq!(wait_for_a_device(name, exchange, "hang:2"), "lost 1", "{exchange}");
            }
        }
    }
}
