//! Attention through the device: arguments, scratch, seeds in memory, refusals.

use std::time::Duration;

use longspan_hal::{
    Accumulate, Attention, Backward, DType, Device, Error, Extras, Forward, Gradient, Partial, Prepare, Priority, Seed,
    Slice, Slices, Spec, Stage, Store, Strided, View, ViewMut,
};

use crate::{Buffer, CpuAttention, CpuDevice, CpuStream, Options, Personality};

const LIMIT: Duration = Duration::from_secs(20);

struct Bench {
    device: CpuDevice,
    stream: CpuStream,
}

impl Bench {
    fn new() -> Self {
        let device = CpuDevice::open("cpu", Options::new(Personality::Plain, true));
        let stream = device.stream(Priority::Normal).expect("a stream");
        Self { device, stream }
    }

    fn tensor(&self, at: Strided, value: f32) -> Buffer {
        let buffer = self.device.alloc(at.byte_range().end).expect("memory");
        self.device.fill(&self.stream, value, write(&buffer, at)).expect("a fill");
        buffer
    }

    fn values(&self, buffer: &Buffer, extent: [usize; 4]) -> Vec<f32> {
        let at = Strided::dense(DType::F32, extent);
        let mut bytes = vec![0; at.bytes()];
        self.device.download(&self.stream, read(buffer, at), &mut bytes, LIMIT).expect("a download");
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

fn read(buffer: &Buffer, at: Strided) -> View<'_, CpuDevice> {
    View::new(buffer, at).expect("inside")
}

fn write(buffer: &Buffer, at: Strided) -> ViewMut<'_, CpuDevice> {
    ViewMut::new(buffer, at).expect("inside")
}

/// Equal values and equal keys: out is the value, lse is the logit plus ln of the number of keys.
#[test]
fn forward_and_backward_of_a_constant() {
    let b = Bench::new();
    let attention = CpuAttention::new(&b.device).expect("attention");
    let spec = Spec::new(DType::Bf16, 1, [130, 130], [4, 2], 16);
    let slices = Slices::new(&spec, [Slice { hi: 0, ..Slice::full(0, 0..130, 0..130) }]).expect("valid");
    let plan = attention.plan(&b.stream, &spec, &slices).expect("a plan");
    let (wide, keys, thin) = ([1, 130, 4, 16], [1, 130, 2, 16], [1, 130, 4, 1]);
    let [io, io_k, row] =
        [Strided::dense(DType::Bf16, wide), Strided::dense(DType::Bf16, keys), Strided::dense(DType::F32, thin)];
    let (q, k, v) = (b.tensor(io, 1.0), b.tensor(io_k, 0.5), b.tensor(io_k, 3.0));
    let (out, lse, dout, delta) = (b.tensor(io, 9.0), b.tensor(row, 9.0), b.tensor(io, 1.0), b.tensor(row, 9.0));
    let inputs = || [read(&q, io), read(&k, io_k), read(&v, io_k)];
    let stage = Stage::All { out: write(&out, io), lse: write(&lse, row) };
    let args = Forward::new(&spec, inputs(), stage, Extras::default(), None).expect("valid");
    attention.forward(&b.stream, &plan, &args).expect("queued");
    for (i, lse) in b.values(&lse, thin).iter().enumerate() {
        let want = 0.25 * 16.0 * 0.5 + ((i / 4 + 1) as f32).ln();
        assert!((lse - want).abs() < 1e-5, "row {}: {lse}, wanted {want}", i / 4);
    }
    let rows = [read(&out, io), read(&dout, io)];
    let prepare = Prepare::new(&spec, rows, read(&lse, row), None, write(&delta, row), None).expect("valid");
    attention.backward_prepare(&b.stream, &spec, &prepare).expect("queued");
    assert!(b.values(&delta, thin).iter().all(|d| (d - 48.0).abs() < 0.5));

    let gradients = [b.tensor(io, 9.0), b.tensor(io_k, 9.0), b.tensor(io_k, 9.0)];
    let at = [io, io_k, io_k];
    let into = |i: usize| Gradient { into: write(&gradients[i], at[i]), store: Store::Write };
    let need = attention.scratch_bytes(&plan);
    assert_eq!(need, (130 * 4 * 16 * 4usize).next_multiple_of(256));
    let scratch = b.device.alloc(need).expect("memory");
    let run = |scratch| {
        let rows = [read(&dout, io), read(&lse, row), read(&delta, row)];
        let args = Backward::new(&spec, inputs(), rows, [into(0), into(1), into(2)], Extras::default(), scratch);
        attention.backward(&b.stream, &plan, &args.expect("valid"))
    };
    assert!(matches!(run(None), Err(Error::Invalid { what: "scratch", .. })));
    run(Some(&scratch)).expect("queued");
    b.device.synchronize(&b.stream, LIMIT).expect("ran");
    // Equal logits have no gradient; the columns of dv sum up the rows of dout.
    let dv = b.device.alloc(130 * 2 * 16 * 4).expect("memory");
    b.device.synchronize(&b.stream, LIMIT).expect("ran");
    let mut bytes = vec![0; io_k.bytes()];
    b.device.download(&b.stream, read(&gradients[2], io_k), &mut bytes, LIMIT).expect("a download");
    let total: f32 = bytes.chunks_exact(2).map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f32()).sum();
    assert!((total - (130 * 4 * 16) as f32).abs() < 0.01 * total, "{total}");
    drop(dv);
}

#[test]
fn stages_and_a_seed_in_memory_agree_with_one_call_and_a_known_seed() {
    let b = Bench::new();
    let attention = CpuAttention::new(&b.device).expect("attention");
    let spec = Spec::new(DType::F32, 1, [40, 200], [2, 2], 8).with_dropout(Some(0.3)).with_partial(true);
    let [io, io_k, row] =
        [[1, 40, 2, 8], [1, 200, 2, 8], [1, 40, 2, 1]].map(|extent| Strided::dense(DType::F32, extent));
    let (q, k, v) = (b.tensor(io, 1.0), b.tensor(io_k, 0.5), b.tensor(io_k, 3.0));
    let inputs = || [read(&q, io), read(&k, io_k), read(&v, io_k)];
    let plan = |keys: std::ops::Range<u32>| {
        let slices = Slices::new(&spec, [Slice::full(0, 0..40, keys)]).expect("valid");
        attention.plan(&b.stream, &spec, &slices).expect("a plan")
    };
    let [out, lse, out2, lse2] = [io, row, io, row].map(|at| b.tensor(at, 9.0));
    let all = Stage::All { out: write(&out, io), lse: write(&lse, row) };
    let host = Extras { seed: Some(Seed::Host(0x1234_5678_9abc_def0)), ..Extras::default() };
    let args = Forward::new(&spec, inputs(), all, host, None).expect("valid");
    attention.forward(&b.stream, &plan(0..200), &args).expect("queued");

    let seed = b.device.alloc(8).expect("memory");
    let words = Strided::dense(DType::F32, [1, 1, 1, 2]);
    let bytes = 0x1234_5678_9abc_def0_u64.to_le_bytes();
    b.device.upload(&b.stream, &bytes, write(&seed, words)).expect("queued");
    let [acc, m, l] = [io, row, row].map(|at| b.tensor(at, 7.0));
    let partial = || Partial { acc: write(&acc, io), m: write(&m, row), l: write(&l, row) };
    let extras = Extras { seed: Some(Seed::Device(&seed)), ..Extras::default() };
    let finish = Stage::Finish { partial: partial(), out: write(&out2, io), lse: write(&lse2, row) };
    let steps = [(0..50, Stage::Start(partial())), (50..120, Stage::Continue(partial())), (120..200, finish)];
    for (keys, stage) in steps {
        let args = Forward::new(&spec, inputs(), stage, extras, None).expect("valid");
        attention.forward(&b.stream, &plan(keys), &args).expect("queued");
    }
    for (buffers, extent) in [([&out, &out2], [1, 40, 2, 8]), ([&lse, &lse2], [1, 40, 2, 1])] {
        let [x, y] = buffers.map(|x| b.values(x, extent));
        assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5), "{x:?} {y:?}");
    }
    // The sum of three terms, one of which it replaces.
    let terms = [read(&out, io), read(&out2, io), read(&out, io)];
    let before = b.values(&out, [1, 40, 2, 8]);
    attention.accumulate(&b.stream, &Accumulate::new(write(&out, io), &terms).expect("valid")).expect("queued");
    let sums = b.values(&out, [1, 40, 2, 8]);
    assert!(sums.iter().zip(&before).all(|(s, x)| (s - 3.0 * x).abs() < 1e-4));
}

#[test]
fn what_is_not_supported_is_refused_with_a_reason() {
    let plain = CpuAttention::new(&CpuDevice::open("cpu", Options::new(Personality::Plain, false))).expect("attention");
    let ascend =
        CpuAttention::new(&CpuDevice::open("ascend", Options::new(Personality::AscendLike, false))).expect("attention");
    let spec = |dtype, dim| Spec::new(dtype, 1, [4, 4], [2, 2], dim);
    let refused = |a: &CpuAttention, s: Spec| matches!(a.supports(&s), Err(Error::Unsupported { .. }));
    assert!(plain.supports(&spec(DType::F32, 256)).is_ok());
    assert!(refused(&plain, spec(DType::F32, 257)));
    assert!(refused(&plain, spec(DType::F32, 64).with_head_dim_v(300)));
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let narrow = dtype != DType::F32;
        for s in [spec(dtype, 64).with_partial(true), spec(dtype, 64).with_accumulate(true)] {
            assert!(plain.supports(&s).is_ok());
            assert_eq!(refused(&ascend, s), narrow);
        }
        assert!(ascend.supports(&spec(dtype, 64)).is_ok());
    }
}
