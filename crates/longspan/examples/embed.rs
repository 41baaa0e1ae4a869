//! How a framework embeds attention over ranks: in its own memory, on its own stream, a rank a process (here: a thread).
//!
//! Crates: `longspan-seqpar` has the algorithms, `longspan-hal` the traits, and a backend's crate the machine: `longspan-cpu`
//! here, `longspan-cuda` or `longspan-rocm` on GPUs, where the type and the lines marked `GPU` change.

use std::sync::Arc;
use std::time::Duration;

use longspan_cpu::Cpu as Machine;
use longspan_hal::{Backend, DType, Device, Error, Extras, GroupId, Priority, Result, Strided, View, ViewMut};
use longspan_seqpar::{
    Gradients, Inputs, Layout, Mask, Member, Mesh, OutputRows, Outputs, Placement, Plan, Problem, Usp,
};

type Buffer = <<Machine as Backend>::Device as Device>::Buffer;

const SEQ: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const PACKED: usize = (HEADS + 2 * KV_HEADS) * DIM;
const LIMIT: Duration = Duration::from_secs(60);

/// Forward and backward on one rank; the gradients of its tokens, packed as q, k and v are.
fn rank(mesh: &Mesh, id: &GroupId, rank: u32) -> Result<Vec<f32>> {
    // How ranks meet: one of them made the id, and the framework carried its bytes to all. GPU: the device of LOCAL_RANK.
    let member = Member::<Machine>::join(&Machine::devices()?[0], id, rank, mesh.size(), LIMIT)?;
    let device = &member.device;
    // GPU: `unsafe { device.adopt_stream(handle) }`, the framework's own, which must outlive this.
    let stream = device.stream(Priority::Normal)?;

    // Once for all layers of one shape. Memory for the work may also come from the framework's allocator, adopted.
    let layout = Layout::zigzag(SEQ, mesh);
    let problem = Problem::new(DType::F32, 1, [HEADS, KV_HEADS], DIM).with_backward(true);
    let plan = Plan::new(&problem, &layout, &layout, &Mask::causal(), rank)?;
    let usp = Usp::prepare(&member, &stream, plan, |bytes| device.alloc(bytes))?;

    // Where a layer's tensors lie: q, k and v are heads of one packed tensor, of the tokens that this rank holds.
    let dense = |heads, dim| Strided::dense(DType::F32, [1, layout.rows(rank), heads, dim]);
    let (packed, wide, thin) = (dense(HEADS + 2 * KV_HEADS, DIM), dense(HEADS, DIM), dense(HEADS, 1));
    let part = |first: usize, count: usize| packed.narrow(2, first..first + count);
    let [q, k, v] = [part(0, HEADS)?, part(HEADS, KV_HEADS)?, part(HEADS + KV_HEADS, KV_HEADS)?];
    let [qkv, dqkv, out, lse, dout] =
        [packed, packed, wide, thin, wide].map(|at| adopt(device, vec![0; at.bytes().div_ceil(size_of::<u128>())]));
    let (qkv, dqkv, out, lse, dout) = (qkv?, dqkv?, out?, lse?, dout?);
    let mine = |row: usize| layout.shard(rank, &numbers(row), 1, row * DType::F32.size());
    device.upload(&stream, &mine(PACKED)?, ViewMut::new(&qkv, packed)?)?;
    device.upload(&stream, &mine(HEADS * DIM)?, ViewMut::new(&dout, wide)?)?;

    // All of this is queued, on one stream, and runs in this order. Nothing waits for a device.
    let inputs = Inputs {
        q: View::new(&qkv, q)?,
        k: View::new(&qkv, k)?,
        v: View::new(&qkv, v)?,
        joint: None,
        extras: Extras::default(),
    };
    let outputs = Outputs { out: ViewMut::new(&out, wide)?, lse: ViewMut::new(&lse, thin)?, joint: None };
    usp.forward(&member, &stream, &inputs, &outputs, None)?;
    let rows =
        OutputRows { out: outputs.out.read(), lse: outputs.lse.read(), dout: View::new(&dout, wide)?, dlse: None };
    let gradients = Gradients {
        dq: ViewMut::new(&dqkv, q)?,
        dk: ViewMut::new(&dqkv, k)?,
        dv: ViewMut::new(&dqkv, v)?,
        joint: None,
        dsinks: None,
    };
    usp.backward(&member, &stream, &inputs, &rows, None, &gradients, None)?;

    // This waits, and what failed in the queue comes out here.
    let mut bytes = vec![0; packed.bytes()];
    device.download(&stream, View::new(&dqkv, packed)?, &mut bytes, LIMIT)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Memory of the framework: aligned to 16 bytes, on this device. Buffers, and whatever is queued on them, keep its owner alive;
/// without an owner it must live until the work that is queued on the caller's stream has run.
fn adopt(device: &<Machine as Backend>::Device, mut memory: Vec<u128>) -> Result<Buffer> {
    let (at, bytes) = (memory.as_mut_ptr(), size_of_val(&memory[..]));
    // SAFETY: the owner has the memory and does not touch it.
    unsafe { device.adopt(at.cast(), bytes, Some(Arc::new(memory))) }
}

/// Numbers between -1 and 1 for all tokens, `row` for each, as bytes.
fn numbers(row: usize) -> Vec<u8> {
    (0..SEQ * row).flat_map(|i| ((i * 7919 % 201) as f32 / 100.0 - 1.0).to_le_bytes()).collect()
}

/// The gradients of all tokens, in order.
fn gradients(ulysses: u32, ring: u32) -> Result<Vec<f32>> {
    let (mesh, id) = (&Mesh::new(ulysses, ring, Placement::UlyssesInner)?, &Machine::group_id()?);
    let ranks = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..mesh.size()).map(|n| scope.spawn(move || rank(mesh, id, n))).collect();
        let lost = |_| Err(Error::invalid("rank", "it panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect::<Result<Vec<_>>>()
    })?;
    Layout::zigzag(SEQ, mesh).unshard(&ranks, 1, PACKED)
}

fn main() -> Result<()> {
    let [one, four] = [gradients(1, 1)?, gradients(2, 2)?];
    let furthest = one.iter().zip(&four).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("gradients of four ranks and of one differ by {furthest:e} at most");
    assert!(one.iter().any(|x| x.abs() > 0.1) && furthest < 1e-5);
    Ok(())
}

#[test]
fn four_ranks_compute_what_one_does() -> Result<()> {
    main()
}
