//! Messages of a process to itself: what MPI does with them is what it does between processes. The suite has the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use longspan_cpu::CpuDevice;
use longspan_cpu::transport::{Key, Part, window};
use longspan_hal::{Backend, DType, Device, Error, Priority, Result, Step, Strided, View, ViewMut};
use longspan_peers::{Board, Member, Reach};
use proptest::prelude::*;

use crate::datatype::Datatype;
use crate::flight::{Flight, Message};
use crate::{Mpi, world};

/// Tags of these tests, beyond those of groups that have few numbers.
static TAG: AtomicI32 = AtomicI32::new(30_000);

fn device() -> CpuDevice {
    Mpi::open(&Mpi::devices().expect("MPI starts")[0]).expect("the one device")
}

fn alone(limit: Duration) -> Member {
    Member::join(&Board::open(Reach::Host).expect("a socket"), 0, 1, limit).expect("nobody else is to come")
}

/// Sends the elements `from` of one buffer to the elements `to` of another; what the buffers hold in the end, as 16-bit words.
fn send(from: Strided, to: Strided, limit: Duration) -> (Result<()>, Vec<u16>, Vec<u16>) {
    let (device, member) = (device(), alone(limit));
    let stream = device.stream(Priority::Normal).expect("a stream");
    let buffer = |at: &Strided, first: u16| {
        let words = at.byte_range().end.div_ceil(2) + 3;
        let buffer = window(&device, 2 * words, Key::next()).expect("memory");
        let bytes: Vec<u8> =
            (0..words as u16).flat_map(|w| w.wrapping_mul(7).wrapping_add(first).to_le_bytes()).collect();
        let all = Strided::dense(DType::F16, [1, 1, 1, words]);
        device.upload(&stream, &bytes, ViewMut::new(&buffer, all).expect("fits")).expect("queued");
        (buffer, all)
    };
    let (source, target) = (buffer(&from, 1), buffer(&to, 2));
    device.synchronize(&stream, limit).expect("uploaded");
    let message = |receive, buffer, at: &Strided| Message {
        peer: 0,
        process: world().expect("started").rank,
        receive,
        at: Some((Part::new(buffer, *at).expect("inside"), Arc::new(Datatype::new(at).expect("a type")))),
    };
    let messages = vec![message(false, &source.0, &from), message(true, &target.0, &to)];
    let tag = TAG.fetch_add(1, Ordering::Relaxed);
    let result = Flight::post(world().expect("started"), tag, messages).and_then(|f| f.wait(&member, "exchange", 1));
    let [source, target] = [source, target].map(|(buffer, all)| {
        let mut bytes = vec![0; all.bytes()];
        device.download(&stream, View::new(&buffer, all).expect("fits"), &mut bytes, limit).expect("downloaded");
        bytes.chunks_exact(2).map(|w| u16::from_le_bytes([w[0], w[1]])).collect::<Vec<_>>()
    });
    (result, source, target)
}

const LIMIT: Duration = Duration::from_secs(20);

fn nested(dtype: DType, extent: [usize; 4], gaps: [usize; 3], order: [usize; 3], offset: usize) -> Strided {
    let mut strides = [0, 0, 0, 1];
    let mut span = extent[3].max(1);
    for (axis, gap) in order.into_iter().zip(gaps) {
        strides[axis] = span + gap;
        span += extent[axis].saturating_sub(1) * strides[axis];
    }
    Strided::new(dtype, offset, extent, strides).expect("nested by construction")
}

fn indices(extent: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let [b, s, h, d] = extent;
    (0..b * s * h * d).map(move |i| [i / (d * h * s), i / (d * h) % s, i / d % h, i % d])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn each_element_arrives_at_its_index_and_no_other_is_touched(
        dtype in prop_oneof![Just(DType::Bf16), Just(DType::F16), Just(DType::F32)],
        extent in [1usize..4, 1..6, 1..5, 1..9],
        gaps in [[0usize..3, 0..3, 0..3], [0usize..3, 0..3, 0..3]],
        orders in [Just([0usize, 1, 2]).prop_shuffle(), Just([0usize, 1, 2]).prop_shuffle()],
        offsets in [0usize..9, 0..9],
    ) {
        let from = nested(dtype, extent, gaps[0], orders[0], offsets[0]);
        let to = nested(dtype, extent, gaps[1], orders[1], offsets[1]);
        let (result, source, target) = send(from, to, LIMIT);
        prop_assert_eq!(result, Ok(()));
        let words = dtype.size() / 2;
        let mut wanted: Vec<u16> = (0..target.len() as u16).map(|w| w.wrapping_mul(7).wrapping_add(2)).collect();
        for at in indices(extent) {
            let (a, b) = (from.offset_of(at) * words, to.offset_of(at) * words);
            wanted[b..b + words].copy_from_slice(&source[a..a + words]);
        }
        prop_assert_eq!(target, wanted);
    }
}

#[test]
fn a_message_of_another_length_is_an_error_and_not_fatal() {
    let of = |n| Strided::dense(DType::F32, [1, 1, 1, n]);
    for (sent, received) in [(8, 4), (4, 8)] {
        let error = send(of(sent), of(received), LIMIT).0.expect_err("another length");
        assert!(matches!(error, Error::Driver { backend: "mpi", .. }), "{error}");
        assert!(error.to_string().contains("the message from rank 0"), "{error}");
    }
    assert_eq!(send(of(4), of(4), LIMIT).0, Ok(()), "MPI works on");
}

#[test]
fn a_message_that_does_not_come_ends_at_the_limit_or_with_the_group() {
    let limit = Duration::from_millis(200);
    let (device, member) = (device(), alone(limit));
    let receive = || {
        let at = Strided::dense(DType::F32, [1, 1, 1, 4]);
        let buffer = window(&device, at.bytes(), Key::next()).expect("memory");
        let kind = Arc::new(Datatype::new(&at).expect("a type"));
        let message =
            Message { peer: 0, process: 0, receive: true, at: Some((Part::new(&buffer, at).expect("inside"), kind)) };
        Flight::post(world().expect("started"), TAG.fetch_add(1, Ordering::Relaxed), vec![message]).expect("posted")
    };
    let lost = Err(Error::PeerLost { rank: 0, call: "exchange", step: Step::default(), late: Some(limit) });
    assert_eq!(receive().wait(&member, "exchange", 1), lost, "the rank that was waited for");
    assert_eq!(receive().wait(&member, "exchange", 2), lost, "at once");
}
