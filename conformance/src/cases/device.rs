//! Devices: opening, memory, figures, errors.

use longspan_hal::{Backend, DType, Device, Error, Priority, Strided, View, ViewMut};

use super::Case;
use crate::rank::{Failure, Rank, check, check_invalid};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    vec![
        Case::new("device/alloc", 1, alloc),
        Case::new("device/alloc-too-much", 1, alloc_too_much),
        Case::new("device/alloc-zero", 1, alloc_zero),
        Case::new("device/attention-opens-twice", 1, attention_opens_twice),
        Case::new("device/caps", 1, caps),
        Case::new("device/devices-are-listed-and-open", 1, devices_open),
        Case::new("device/handles-count", 1, handles_count),
        Case::new("device/memory-figures", 1, memory_figures),
        Case::new("device/views-stay-inside", 1, views_stay_inside),
    ]
}

fn alloc<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    for bytes in [1, 2, 255, 256, 257, 4096, 1 << 20] {
        let buffer = rank.device.alloc(bytes)?;
        check(B::Device::bytes(&buffer) == bytes, || {
            format!("{bytes} bytes asked for, the buffer has {}", B::Device::bytes(&buffer))
        })?;
        rank.poison(&buffer)?;
        check(rank.read_all(&buffer)?.iter().all(|b| *b == 0xFF), || "written bytes read back differently".into())?;
    }
    Ok(())
}

fn alloc_too_much<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    for bytes in [1usize << 50, usize::MAX / 2, usize::MAX] {
        match rank.device.alloc(bytes) {
            Err(Error::OutOfMemory { wanted, .. }) => {
                check(wanted == bytes as u64, || format!("{bytes} bytes asked for, the error says {wanted}"))?;
            }
            Err(other) => return Err(Failure::wrong(format!("wanted is OutOfMemory, it is: {other}"))),
            Ok(_) => return Err(Failure::wrong(format!("{bytes} bytes were given"))),
        }
    }
    // The device works on.
    alloc(rank)
}

fn alloc_zero<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (a, b) = (rank.device.alloc(0)?, rank.device.alloc(0)?);
    let at = Strided::dense(DType::F32, [1, 0, 3, 4]);
    rank.device.upload(&rank.stream, &[], ViewMut::new(&a, at)?)?;
    rank.device.copy(&rank.stream, View::new(&a, at)?, ViewMut::new(&b, at)?)?;
    rank.device.fill(&rank.stream, 1.0, ViewMut::new(&b, at)?)?;
    rank.device.download(&rank.stream, View::new(&b, at)?, &mut [], rank.limit)?;
    Ok(())
}

fn attention_opens_twice<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (_a, _b) = (B::attention(&rank.device)?, B::attention(&rank.device)?);
    Ok(())
}

fn caps<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let caps = rank.device.caps();
    check(!caps.name.is_empty() && !caps.arch.is_empty(), || format!("a name or an arch is missing: {caps:?}"))?;
    check(caps.units > 0 && caps.memory_bytes > 0, || format!("units or memory is 0: {caps:?}"))
}

fn devices_open<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let devices = B::devices()?;
    check(!devices.is_empty(), || "no device is listed, but one is open".into())?;
    let mut indexes: Vec<u32> = devices.iter().map(|d| d.index).collect();
    indexes.dedup();
    check(indexes.len() == devices.len(), || format!("indexes occur twice: {indexes:?}"))?;
    // A second handle of a device beside the first, and its memory is not the first's business.
    let second = B::open(&devices[0])?;
    let (stream, buffer) = (second.stream(Priority::High)?, second.alloc(64)?);
    let at = Strided::dense(DType::F32, [1, 1, 1, 16]);
    second.fill(&stream, 2.5, ViewMut::new(&buffer, at)?)?;
    let mut bytes = [0; 64];
    second.download(&stream, View::new(&buffer, at)?, &mut bytes, rank.limit)?;
    check(bytes.chunks(4).all(|b| b == 2.5f32.to_le_bytes()), || "a second handle computes wrongly".into())
}

fn handles_count<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let (a, b) = (rank.device.alloc(64)?, rank.device.alloc(64)?);
    let again = a.clone();
    check(B::Device::same(&a, &again), || "a clone is not the same memory".into())?;
    check(!B::Device::same(&a, &b), || "two allocations are the same memory".into())?;
    rank.poison(&a)?;
    drop(a);
    check(rank.read_all(&again)?.iter().all(|x| *x == 0xFF), || "memory was lost while a handle lived".into())
}

fn memory_figures<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    const BYTES: u64 = 3 << 20;
    rank.synchronize()?;
    let before = rank.device.memory()?;
    let buffer = rank.device.alloc(BYTES as usize)?;
    let during = rank.device.memory()?;
    drop(buffer);
    rank.synchronize()?;
    let after = rank.device.memory()?;
    let ok = during.used >= before.used + BYTES
        && during.used < before.used + BYTES + (1 << 20)
        && after.used == before.used
        && during.peak >= during.used
        && after.peak >= during.used
        && after.free > 0;
    check(ok, || format!("{BYTES} bytes were allocated and freed: {before:?}, {during:?}, {after:?}"))
}

fn views_stay_inside<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let buffer = rank.device.alloc(64)?;
    let at = |elements| Strided::dense(DType::F32, [1, 1, 1, elements]);
    View::<B::Device>::new(&buffer, at(16))?;
    check_invalid("a view that ends behind its buffer", View::<B::Device>::new(&buffer, at(17)))?;
    check_invalid("a view that starts behind its buffer", View::<B::Device>::new(&buffer, at(1).shifted(16)?))?;
    // Bytes that are a multiple of 2^64.
    let vast = Strided::dense(DType::F32, [1 << 62, 1, 1, 1]);
    check_invalid("a view whose end overflows", ViewMut::<B::Device>::new(&buffer, vast))
}
