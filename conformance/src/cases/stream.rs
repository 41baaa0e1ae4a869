//! Streams and events: the ordering contract of `hal/device.rs`.

use longspan_hal::{Backend, DType, Device, Priority, Strided};
use ndarray::Array4;

use super::Case;
use crate::rank::{Failure, Rank, Stream, Tensor, check};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    vec![
        Case::new("stream/buffers-outlive-their-handles", 1, buffers_outlive_their_handles),
        Case::new("stream/calls-from-any-thread", 1, calls_from_any_thread),
        Case::new("stream/elapsed", 1, elapsed),
        Case::new("stream/events-of-idle-streams", 1, events_of_idle_streams),
        Case::new("stream/events-order-a-chain", 1, events_order_a_chain),
        Case::new("stream/events-order-many-readers", 1, events_order_many_readers),
        Case::new("stream/events-order-two-streams", 1, events_order_two_streams),
        Case::new("stream/many-streams", 1, many_streams),
        Case::new("stream/one-stream-runs-in-order", 1, one_stream_runs_in_order),
        Case::new("stream/streams-drop-with-work", 1, streams_drop_with_work),
        Case::new("stream/upload-takes-its-bytes", 1, upload_takes_its_bytes),
    ]
}

const ELEMENTS: usize = 40_000;

fn line<B: Backend>(rank: &Rank<B>) -> Result<Tensor<B>, Failure> {
    Ok(rank.blank(Strided::dense(DType::F32, [1, 10, 4, ELEMENTS / 40]))?)
}

fn fill<B: Backend>(rank: &Rank<B>, on: &Stream<B>, to: &Tensor<B>, value: f32) -> Result<(), Failure> {
    Ok(rank.device.fill(on, value, to.view_mut()?)?)
}

fn copy<B: Backend>(rank: &Rank<B>, on: &Stream<B>, from: &Tensor<B>, to: &Tensor<B>) -> Result<(), Failure> {
    Ok(rank.device.copy(on, from.view()?, to.view_mut()?)?)
}

/// `on` continues after everything queued on `after` so far.
fn order<B: Backend>(rank: &Rank<B>, after: &Stream<B>, on: &Stream<B>) -> Result<(), Failure> {
    Ok(rank.device.wait(on, &rank.device.record(after)?)?)
}

fn holds<B: Backend>(rank: &Rank<B>, tensor: &Tensor<B>, value: f32) -> Result<(), Failure> {
    let values = rank.read(tensor)?;
    match values.iter().position(|x| *x != value) {
        Some(i) => Err(Failure::wrong(format!("element {i} is {:?}, wanted is {value}", values.iter().nth(i)))),
        None => Ok(()),
    }
}

/// Waits for `streams`; an error of theirs comes before wrong values.
fn finish<B: Backend>(rank: &Rank<B>, streams: &[Stream<B>]) -> Result<(), Failure> {
    Ok(streams.iter().try_for_each(|stream| rank.device.synchronize(stream, rank.limit))?)
}

fn one_stream_runs_in_order<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (a, b) = (line(rank)?, line(rank)?);
    for i in 0..50 {
        fill(rank, &rank.stream, &a, i as f32)?;
        copy(rank, &rank.stream, &a, &b)?;
        fill(rank, &rank.stream, &a, -1.0)?;
    }
    holds(rank, &b, 49.0)?;
    holds(rank, &a, -1.0)
}

fn events_order_two_streams<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let other = rank.device.stream(Priority::High)?;
    let (a, b) = (line(rank)?, line(rank)?);
    order(rank, &rank.stream, &other)?;
    for i in 0..50 {
        fill(rank, &rank.stream, &a, i as f32)?;
        order(rank, &rank.stream, &other)?;
        copy(rank, &other, &a, &b)?;
        order(rank, &other, &rank.stream)?;
    }
    finish(rank, &[other])?;
    holds(rank, &b, 49.0)
}

/// A value walks through six streams and back to the first.
fn events_order_a_chain<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let streams = (0..6).map(|_| rank.device.stream(Priority::Normal)).collect::<Result<Vec<_>, _>>()?;
    let lines = (0..7).map(|_| line(rank)).collect::<Result<Vec<_>, _>>()?;
    for round in 0..10 {
        fill(rank, &rank.stream, &lines[0], round as f32)?;
        let mut last = &rank.stream;
        for (i, stream) in streams.iter().enumerate() {
            order(rank, last, stream)?;
            copy(rank, stream, &lines[i], &lines[i + 1])?;
            last = stream;
        }
        order(rank, last, &rank.stream)?;
    }
    finish(rank, &streams)?;
    holds(rank, &lines[6], 9.0)
}

/// Many may read at once; the next writer waits for all of them.
fn events_order_many_readers<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let streams = (0..4).map(|_| rank.device.stream(Priority::Normal)).collect::<Result<Vec<_>, _>>()?;
    let source = line(rank)?;
    let copies = (0..4).map(|_| line(rank)).collect::<Result<Vec<_>, _>>()?;
    for round in 0..20 {
        fill(rank, &rank.stream, &source, round as f32)?;
        let written = rank.device.record(&rank.stream)?;
        for (stream, to) in streams.iter().zip(&copies) {
            rank.device.wait(stream, &written)?;
            copy(rank, stream, &source, to)?;
        }
        for stream in &streams {
            order(rank, stream, &rank.stream)?;
        }
    }
    finish(rank, &streams)?;
    copies.iter().try_for_each(|c| holds(rank, c, 19.0))
}

fn events_of_idle_streams<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let idle = rank.device.stream(Priority::Normal)?;
    let event = rank.device.record(&idle)?;
    for _ in 0..3 {
        rank.device.wait(&rank.stream, &event)?;
        rank.device.wait(&idle, &event)?;
    }
    drop(event);
    rank.device.synchronize(&idle, rank.limit)?;
    Ok(rank.synchronize()?)
}

fn many_streams<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let mut kept = Vec::new();
    for i in 0..24 {
        let (stream, to) = (rank.device.stream(Priority::Normal)?, line(rank)?);
        order(rank, &rank.stream, &stream)?;
        fill(rank, &stream, &to, i as f32)?;
        kept.push((stream, to, i as f32));
    }
    for (stream, to, value) in &kept {
        rank.device.synchronize(stream, rank.limit)?;
        order(rank, stream, &rank.stream)?;
        holds(rank, to, *value)?;
    }
    Ok(())
}

/// Contract, item 3: a queued call keeps the buffers that it uses alive.
fn buffers_outlive_their_handles<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let last = line(rank)?;
    for i in 0..40 {
        let (a, b) = (line(rank)?, line(rank)?);
        fill(rank, &rank.stream, &a, i as f32)?;
        copy(rank, &rank.stream, &a, &b)?;
        drop(a);
        copy(rank, &rank.stream, &b, &last)?;
    }
    holds(rank, &last, 39.0)
}

fn streams_drop_with_work<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    for i in 0..10 {
        let stream = rank.device.stream(Priority::Normal)?;
        let to = line(rank)?;
        order(rank, &rank.stream, &stream)?;
        fill(rank, &stream, &to, i as f32)?;
        order(rank, &stream, &rank.stream)?;
        drop(stream);
        holds(rank, &to, i as f32)?;
    }
    Ok(())
}

fn upload_takes_its_bytes<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let tensors = (0..8).map(|_| line(rank)).collect::<Result<Vec<_>, _>>()?;
    let mut bytes = vec![0u8; ELEMENTS * 4];
    for (i, tensor) in tensors.iter().enumerate() {
        bytes.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&(i as f32).to_le_bytes()));
        rank.device.upload(&rank.stream, &bytes, tensor.view_mut()?)?;
        bytes.fill(0xAB);
    }
    tensors.iter().enumerate().try_for_each(|(i, t)| holds(rank, t, i as f32))
}

/// Contract, item 6.
fn calls_from_any_thread<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let rank: &Rank<B> = rank;
    let (device, limit, main) = (&rank.device, rank.limit, &rank.stream);
    let tensors = (0..4).map(|_| line(rank)).collect::<Result<Vec<_>, _>>()?;
    let start = device.record(main)?;
    let work = |value: f32, to: &Tensor<B>| -> Result<(), Failure> {
        let own = device.stream(Priority::Normal)?;
        device.wait(&own, &start)?;
        device.fill(&own, value, to.view_mut()?)?;
        device.wait(main, &device.record(&own)?)?;
        let mut bytes = vec![0; to.at.bytes()];
        device.download(&own, to.view()?, &mut bytes, limit)?;
        check(bytes.chunks(4).all(|b| b == value.to_le_bytes()), || "another thread reads other values".into())
    };
    let (work, tensors) = (&work, &tensors);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || work(i as f32, &tensors[i]))).collect();
        let join = |t: std::thread::ScopedJoinHandle<'_, Result<(), Failure>>| {
            t.join().unwrap_or_else(|_| Err(Failure::wrong("a thread panicked")))
        };
        threads.into_iter().try_for_each(join)
    })?;
    tensors.iter().enumerate().try_for_each(|(i, t)| holds(rank, t, i as f32))
}

fn elapsed<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let tensor = line(rank)?;
    rank.write(&tensor, &Array4::zeros((1, 10, 4, ELEMENTS / 40)))?;
    let from = rank.device.record(&rank.stream)?;
    for _ in 0..20 {
        fill(rank, &rank.stream, &tensor, 1.0)?;
    }
    let to = rank.device.record(&rank.stream)?;
    let host = std::time::Instant::now();
    rank.synchronize()?;
    let time = rank.device.elapsed(&from, &to)?;
    check(!time.is_zero(), || "20 fills of 160 kB took no time".into())?;
    check(time < host.elapsed() + rank.limit, || format!("20 fills took {time:?}"))
}
