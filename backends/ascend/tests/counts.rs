//! What a step costs on any machine: operators launched, exchanges and their bytes, memory. Counted by the emulator, which sees
//! what the vendor's libraries are asked to do: `cargo test -p longspan-ascend --test counts -- --nocapture` prints the table.

mod suite;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Arc;

use longspan_ascend::{Ascend, AscendFused};
use longspan_conformance::cases::parallel::{Loaded, Setup, Whole, prepare};
use longspan_conformance::{Case, Failure, Options, Rank, run_cases};
use longspan_hal::{Backend, DType, Device};
use longspan_seqpar::{Layout, Mask, Mesh, Placement, Problem, Usp};

const SEQ: usize = 512;
const COUNTS: [&str; 4] = ["launch operator", "launch all-to-all", "launch exchange", "bytes sent"];

/// The counters of the loaded emulator.
struct Emulator(libloading::Library);

impl Emulator {
    fn load() -> Arc<Self> {
        assert!(suite::prepare(), "the emulator's shared object is not beside this test");
        let path = std::env::var_os("LONGSPAN_ASCEND_LIBRARY").expect("set above");
        // SAFETY: the emulator has no initializer; the backend loads the same file, so that both see the same counters.
        Arc::new(Self(unsafe { libloading::Library::new(path) }.expect("the emulator")))
    }

    fn counts(&self) -> [u64; 4] {
        COUNTS.map(|name| {
            let name = CString::new(name).expect("no NUL");
            // SAFETY: the signature is the emulator's.
            unsafe {
                let count =
                    self.0.get::<unsafe extern "C" fn(*const std::ffi::c_char) -> u64>(b"longspan_emulator_count");
                count.expect("the counter")(name.as_ptr())
            }
        })
    }
}

/// Figures of one step over all ranks, by their names.
type Figures = BTreeMap<String, f64>;

/// Causal attention of 512 tokens, 8 heads of 64, forward and backward.
fn setup(dtype: DType, (ulysses, ring): (u32, u32)) -> Setup {
    let mesh = Mesh::new(ulysses, ring, Placement::UlyssesInner).expect("a mesh");
    Setup::new(Problem::new(dtype, 1, [8, 8], 64), Layout::zigzag(SEQ, &mesh), Mask::causal())
}

fn step<B: Backend>(emulator: &Arc<Emulator>, dtype: DType, mesh: (u32, u32)) -> Figures {
    let emulator = Arc::clone(emulator);
    let setup = setup(dtype, mesh);
    let body = move |rank: &mut Rank<B>| {
        let whole = Whole::random(&setup, &mut rank.random());
        let loaded = Loaded::new(rank, &setup, &whole)?;
        let before = rank.device.memory()?.used;
        let usp = prepare(rank, &setup, &loaded)?;
        rank.synchronize()?;
        rank.figure("memory", (rank.device.memory()?.used - before) as f64);
        pass(rank, &emulator, &usp, false, |rank| Ok(loaded.forward(rank, &usp, None)?))?;
        pass(rank, &emulator, &usp, true, |rank| Ok(loaded.backward(rank, &usp, None)?))
    };
    let options = Options { name: B::NAME.into(), share_devices: false, ..Options::default() };
    let case = Case::<B>::new("counts", mesh.0 * mesh.1, body);
    let mut report = run_cases(&options, vec![case], &mut |_, _, _| {}).expect("options");
    let case = report.cases.remove(0);
    assert!(case.message.is_empty(), "{mesh:?}: {}", case.message);
    case.figures
}

/// Counts a pass of all ranks.
fn pass<B: Backend>(
    rank: &mut Rank<B>,
    emulator: &Emulator,
    usp: &Usp<B>,
    backward: bool,
    queue: impl FnOnce(&mut Rank<B>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    rank.synchronize()?;
    rank.share(Vec::new())?;
    let before = emulator.counts();
    rank.share(Vec::new())?;
    queue(rank)?;
    rank.synchronize()?;
    let table: u64 = usp.plan().traffic(backward)?.iter().map(|t| t.bytes).sum();
    let tables = rank.share(table.to_le_bytes().to_vec())?;
    let after = emulator.counts();
    rank.share(Vec::new())?;
    let word = if backward { "backward" } else { "forward" };
    for ((name, before), after) in COUNTS.iter().zip(before).zip(after) {
        rank.figure(format!("{word} {name}"), (after - before) as f64);
    }
    let all = tables.iter().map(|b| u64::from_le_bytes(b[..8].try_into().expect("8 bytes"))).sum::<u64>();
    rank.figure(format!("{word} table"), all as f64);
    Ok(())
}

/// Exchanges of a step are what the mesh asks for, their bytes those of the route table, and fused attention launches less.
#[test]
fn steps_launch_and_send_what_they_should() {
    let emulator = Emulator::load();
    // Tiles as on an NPU.
    // SAFETY: no other thread of this process runs yet.
    unsafe { std::env::remove_var("LONGSPAN_ASCEND_TILE") };
    println!("| backend | dtype | mesh | pass | operators | all-to-alls | batches | bytes | memory of a rank |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let meshes = [(1, 1), (4, 1), (1, 4), (2, 2)];
    for mesh in meshes {
        let basic = step::<Ascend>(&emulator, DType::F32, mesh);
        let fused = step::<AscendFused>(&emulator, DType::F32, mesh);
        for (name, figures) in [("ascend", &basic), ("ascend-fused", &fused)] {
            show(name, mesh, figures);
            judge(mesh, figures);
        }
        for pass in ["forward", "backward"] {
            let of = |f: &Figures| f[&format!("{pass} launch operator")];
            assert!(of(&fused) < of(&basic), "{mesh:?} {pass}: {} fused, {} basic", of(&fused), of(&basic));
        }
    }
}

fn judge((ulysses, ring): (u32, u32), figures: &Figures) {
    for pass in ["forward", "backward"] {
        let of = |name: &str| figures[&format!("{pass} {name}")];
        assert_eq!(of("bytes sent"), of("table"), "{pass} of U{ulysses} R{ring}: bytes");
        let (all, batches) = (of("launch all-to-all") > 0.0, of("launch exchange") > 0.0);
        assert_eq!(all, ulysses > 2 && ring == 1, "{pass} of U{ulysses} R{ring}: all-to-alls");
        assert_eq!(batches, ring > 1, "{pass} of U{ulysses} R{ring}: batches");
    }
}

fn show(name: &str, (ulysses, ring): (u32, u32), figures: &Figures) {
    for pass in ["forward", "backward"] {
        let numbers = COUNTS.map(|n| figures[&format!("{pass} {n}")]);
        let [operators, all, batches, bytes] = numbers;
        let memory = figures["memory"] / f64::from(1 << 20);
        println!(
            "| `{name}` | f32 | U{ulysses} R{ring} | {pass} | {operators} | {all} | {batches} | {bytes} | {memory:.1} MiB |"
        );
    }
}
