//! Strided views: copies, uploads, downloads and fills touch exactly their elements.

use longspan_hal::{Backend, DType, Device, Extent, Strided, View, ViewMut};

use super::Case;
use crate::host::{self, Random, random_strided};
use crate::rank::{Failure, Rank, Tensor, check, check_invalid};

/// The cases of this file.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    let mut cases = vec![
        Case::new("view/copies-that-overlap-are-refused", 1, overlapping_copies),
        Case::new("view/parts-of-one-buffer", 1, parts_of_one_buffer),
        Case::new("view/transposes", 1, transposes),
        Case::new("view/wrong-sizes-are-refused", 1, wrong_sizes),
    ];
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        cases.push(Case::new(format!("view/copy-random-{dtype}"), 1, move |r| copy_random(r, dtype, 60)));
        cases.push(Case::new(format!("view/copy-random-many-{dtype}"), 1, move |r| copy_random(r, dtype, 2000)).full());
        cases.push(Case::new(format!("view/fill-rounds-{dtype}"), 1, move |r| fill_rounds(r, dtype)));
    }
    cases
}

fn random_extent(random: &mut Random) -> Extent {
    let mut extent = [random.between(1, 4), random.between(1, 9), random.between(1, 6), random.between(1, 40)];
    if random.one_in(8) {
        extent[random.below(4)] = 0;
    }
    extent
}

/// Random bits, so that NaNs with payloads and denormals travel too.
fn random_bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.bits() as u8).collect()
}

/// Upload to one random layout, copy to another, download: the same bits, and nothing beside them.
fn copy_random<B: Backend>(rank: &mut Rank<B>, dtype: DType, rounds: usize) -> Result<(), Failure> {
    let mut random = rank.random();
    for round in 0..rounds {
        let extent = random_extent(&mut random);
        let offsets = [random.below(50), random.below(50)];
        let from = rank.blank(random_strided(&mut random, dtype, offsets[0], extent)?)?;
        let to = rank.blank(random_strided(&mut random, dtype, offsets[1], extent)?)?;
        let bytes = random_bytes(&mut random, from.at.bytes());
        rank.device.upload(&rank.stream, &bytes, from.view_mut()?)?;
        rank.device.copy(&rank.stream, from.view()?, to.view_mut()?)?;
        let say = |what: &str| format!("round {round}: {what}, {:?} to {:?}", from.at, to.at);
        check(rank.read_bytes(&from)? == bytes, || say("what was uploaded reads back differently"))?;
        check(rank.read_bytes(&to)? == bytes, || say("the copy differs"))?;
        rank.check_around(&say("upload"), &from)?;
        rank.check_around(&say("copy"), &to)?;
    }
    Ok(())
}

fn fill_rounds<B: Backend>(rank: &mut Rank<B>, dtype: DType) -> Result<(), Failure> {
    let mut random = rank.random();
    let values = [
        0.0,
        -0.0,
        1.0,
        1.0 / 3.0,
        -2.0 / 3.0,
        65504.0,
        1e30,
        1e-7,
        f32::MIN_POSITIVE,
        f32::INFINITY,
        f32::NEG_INFINITY,
    ];
    for value in values {
        let offset = random.below(9);
        let at = random_strided(&mut random, dtype, offset, [2, 3, 4, 5])?;
        let tensor = rank.blank(at)?;
        rank.device.fill(&rank.stream, value, tensor.view_mut()?)?;
        let wanted = host::encode(dtype, vec![value; at.elements()]);
        check(rank.read_bytes(&tensor)? == wanted, || {
            format!("{value} in {dtype} is not what rounding to nearest gives")
        })?;
        rank.check_around("fill", &tensor)?;
    }
    let tensor = rank.blank(Strided::dense(dtype, [1, 1, 2, 8]))?;
    rank.device.fill(&rank.stream, 0.0, tensor.view_mut()?)?;
    rank.device.fill(&rank.stream, f32::NAN, tensor.view_mut()?)?;
    check(rank.read(&tensor)?.iter().all(|x| x.is_nan()), || "NaN filled, something else found".into())
}

/// BSHD to BHSD and back.
fn transposes<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let mut random = rank.random();
    let extent = [2, 17, 5, 24];
    let values = random.tensor(DType::F32, extent);
    let bshd = rank.put(Strided::dense(DType::F32, extent), &values)?;
    let bhsd = rank.blank(Strided::dense_bhsd(DType::F32, extent))?;
    rank.device.copy(&rank.stream, bshd.view()?, bhsd.view_mut()?)?;
    check(rank.read(&bhsd)? == values, || "BSHD to BHSD changed values".into())?;
    // As it lies: [batch, heads, seq, dim].
    let lying = Tensor::<B> { buffer: bhsd.buffer.clone(), at: Strided::dense(DType::F32, [2, 5, 17, 24]) };
    check(rank.read(&lying)? == values.permuted_axes([0, 2, 1, 3]), || {
        "BHSD does not lie as [batch, heads, seq, dim]".into()
    })
}

/// Packed QKV: three views of one buffer are written and read beside each other.
fn parts_of_one_buffer<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let mut random = rank.random();
    let packed = rank.blank(Strided::dense(DType::Bf16, [2, 7, 12, 16]))?;
    let parts = [0..8, 8..10, 10..12].map(|heads| packed.at.narrow(2, heads));
    let mut kept = Vec::new();
    for at in parts {
        let part = Tensor::<B> { buffer: packed.buffer.clone(), at: at? };
        let values = random.tensor(DType::Bf16, part.at.extent());
        rank.write(&part, &values)?;
        kept.push((part, values));
    }
    for (part, values) in &kept {
        check(rank.read(part)? == *values, || "a part of a packed buffer was disturbed".into())?;
    }
    rank.check_around("packed", &packed)?;
    // Rows of a sequence, copied from part to part of the same buffer.
    let (k, v) = (&kept[1].0, &kept[2].0);
    let (from, to) = (k.view()?.narrow(1, 2..5)?, v.view_mut()?.narrow(1, 4..7)?);
    rank.device.copy(&rank.stream, from, to)?;
    let (k, v) = (rank.read(k)?, rank.read(v)?);
    let same = k.slice(ndarray::s![.., 2..5, .., ..]) == v.slice(ndarray::s![.., 4..7, .., ..]);
    check(same, || "rows were copied wrongly within a buffer".into())
}

fn wrong_sizes<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let a = rank.blank(Strided::dense(DType::F32, [1, 2, 3, 4]))?;
    let b = rank.blank(Strided::dense(DType::F32, [1, 3, 2, 4]))?;
    let c = rank.blank(Strided::dense(DType::F16, [1, 2, 3, 4]))?;
    let (device, on) = (&rank.device, &rank.stream);
    check_invalid("a copy between extents", device.copy(on, a.view()?, b.view_mut()?))?;
    check_invalid("a copy between dtypes", device.copy(on, a.view()?, c.view_mut()?))?;
    check_invalid("a short upload", device.upload(on, &[0; 95], a.view_mut()?))?;
    check_invalid("a long upload", device.upload(on, &[0; 97], a.view_mut()?))?;
    check_invalid("a short download", device.download(on, a.view()?, &mut [0; 92], rank.limit))?;
    check_invalid("a long download", device.download(on, a.view()?, &mut [0; 100], rank.limit))?;
    for tensor in [&a, &b, &c] {
        rank.check_untouched("a refused call", tensor)?;
    }
    Ok(())
}

fn overlapping_copies<B: Backend>(rank: &mut Rank<B>) -> Result<(), Failure> {
    let buffer = rank.device.alloc(4096)?;
    rank.poison(&buffer)?;
    let at = Strided::dense(DType::F32, [1, 4, 4, 4]);
    let view = |elements| View::<B::Device>::new(&buffer, at.shifted(elements)?);
    let target = |elements| ViewMut::<B::Device>::new(&buffer, at.shifted(elements)?);
    check_invalid("a copy to itself", rank.device.copy(&rank.stream, view(0)?, target(0)?))?;
    check_invalid("a copy to an overlapping part", rank.device.copy(&rank.stream, view(0)?, target(63)?))?;
    rank.device.copy(&rank.stream, view(0)?, target(64)?)?;
    // Interleaved, yet apart.
    let even = Strided::new(DType::F32, 0, [1, 8, 1, 4], [64, 8, 8, 1])?;
    let odd = even.shifted(4)?;
    rank.device.copy(&rank.stream, View::new(&buffer, even)?, ViewMut::new(&buffer, odd)?)?;
    check(rank.read_all(&buffer)?.iter().all(|b| *b == 0xFF), || "copies of poison wrote something else".into())
}
