//! Bank conflicts of shared memory, counted: every pattern by which a wave of the attention kernels reads or writes it, from
//! the functions of `kernels/cu/fragments_amd.cuh` themselves, for every head size.
//!
//! ```text
//! the cycles of an access = sum over its phases of the most different words that one bank has to give
//! phases: lanes that the hardware serves together; a phase moves at most 128 bytes (256 where there are 64 banks)
//! ```
//!
//! Which lanes are a phase is nowhere in AMD's manuals. For CDNA 3 AMD publishes the phases of reads and writes of 16 bytes
//! (ROCm blog, "Avoiding LDS bank conflicts", 2025); reads of 8 bytes join two of them, and writes take neighbours. gfx950 has
//! 64 banks and reads 8 bytes by halves of the wave (measured by the authors of HipKittens, 2025). Nothing of it was measured
//! here.

mod launch;

use std::collections::{BTreeMap, BTreeSet};

use launch::Kernel;

const THREADS: usize = 256;
const PATTERNS: usize = 6;
const SIZES: usize = 16;

/// Byte addresses of each thread, by head size and pattern; no address: the thread does nothing.
const KERNEL: &str = r"
constexpr int NAMED = 6, LENGTH = 256;
template <int DIM> DEVICE void addresses(u32 *out) {
    const int thread = threadIdx.x, lane = thread % WARP;
    auto put = [&](int pattern, u32 at) { out[pattern * LENGTH + thread] = at; };
    for (int i = 0; i < NAMED; ++i) put(i, ~0u);
    put(0, lane_by_rows<DIM>(lane));
    put(1, lane_by_columns<true, DIM>(lane));
    bool first = true;
    Travel<64, DIM, LENGTH>().each([&](int row, int column, const u32(&)[4]) {
        if (first) put(2, offset<DIM>(row, column));
        first = false;
    });
    first = true;
    TravelByQuads<64, DIM, LENGTH>().each([&](int row, int column, const u32(&)[4][2]) {
        if (first) put(3, offset<DIM>(row, column)), put(4, quad<DIM>(row, column));
        first = false;
    });
    put(5, offset<DIM>(product_row(lane, 0), lane % 16));
}
KERNEL(LENGTH, 1) banks(PARAMS(Test) p) {
    u32 *out = global<u32>(p.out);
    const int step = NAMED * LENGTH;
    addresses<16>(out), addresses<32>(out + step), addresses<48>(out + 2 * step), addresses<64>(out + 3 * step);
    addresses<80>(out + 4 * step), addresses<96>(out + 5 * step), addresses<112>(out + 6 * step), addresses<128>(out + 7 * step);
    out += 8 * step;
    addresses<144>(out), addresses<160>(out + step), addresses<176>(out + 2 * step), addresses<192>(out + 3 * step);
    addresses<208>(out + 4 * step), addresses<224>(out + 5 * step), addresses<240>(out + 6 * step), addresses<256>(out + 7 * step);
}
";

/// What a pattern is: the name, bytes a lane.
const NAMES: [(&str, u32); PATTERNS] = [
    ("read an operand by rows", 8),
    ("read an operand by columns, in quads", 8),
    ("write rows, 8 elements a thread", 16),
    ("write rows, 4 elements a thread", 8),
    ("write quads", 16),
    ("write a product, element by element", 2),
];

/// Phases of one access, and the number of banks.
struct Machine {
    read8: Vec<Vec<usize>>,
    banks: u32,
}

fn neighbours(n: usize) -> Vec<Vec<usize>> {
    (0..64 / n).map(|i| (n * i..n * (i + 1)).collect()).collect()
}

/// CDNA 3, as published.
fn gfx942() -> Machine {
    let half = |from: usize| {
        let of = |quads: [usize; 4]| quads.iter().flat_map(|q| from + 4 * q..from + 4 * q + 4).collect::<Vec<_>>();
        [of([0, 5, 3, 6]), of([1, 4, 2, 7])]
    };
    Machine { read8: [0, 32].into_iter().flat_map(half).collect(), banks: 32 }
}

fn gfx950() -> Machine {
    Machine { read8: neighbours(32), banks: 64 }
}

/// Should neighbours go together, which nobody says.
fn plain() -> Machine {
    Machine { read8: neighbours(16), banks: 32 }
}

impl Machine {
    fn phases(&self, pattern: usize) -> Vec<Vec<usize>> {
        match (NAMES[pattern].0.starts_with("read"), NAMES[pattern].1) {
            (true, _) => self.read8.clone(),
            (false, 16) => neighbours(8),
            (false, 8) => neighbours(16),
            (false, _) => neighbours(32),
        }
    }

    /// Cycles of a wave's access, and how many they would be without conflicts.
    fn cycles(&self, pattern: usize, lanes: &[u32]) -> [u32; 2] {
        let mut sum = [0, 0];
        for phase in self.phases(pattern) {
            let mut words: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
            for at in phase.iter().map(|lane| lanes[*lane]).filter(|at| *at != u32::MAX) {
                for word in at / 4..(at + NAMES[pattern].1).div_ceil(4) {
                    words.entry(word % self.banks).or_default().insert(word);
                }
            }
            let most = words.values().map(|w| w.len() as u32).max().unwrap_or(0);
            sum = [sum[0] + most, sum[1] + most.min(1)];
        }
        sum
    }
}

/// Addresses of the waves of one block: `[head size / 16 - 1][pattern][thread]`.
fn addresses() -> Vec<Vec<Vec<u32>>> {
    let kernel = Kernel { arch: "gfx942", bf16: true, text: KERNEL, name: "banks", waves: 4, shared: 2048 };
    let all = launch::run(&kernel, &[], SIZES * PATTERNS * THREADS);
    let of_size = |s: &[u32]| s.chunks(THREADS).map(<[u32]>::to_vec).collect();
    all.chunks(PATTERNS * THREADS).map(of_size).collect()
}

/// Cycles of all waves of a block, and without conflicts.
fn of_block(machine: &Machine, pattern: usize, threads: &[u32]) -> [u32; 2] {
    let waves = threads.chunks(64).map(|lanes| machine.cycles(pattern, lanes));
    waves.fold([0, 0], |sum, c| [sum[0] + c[0], sum[1] + c[1]])
}

#[test]
fn operands_are_read_without_conflicts() {
    let all = addresses();
    for (size, patterns) in all.iter().enumerate() {
        for (name, machine) in [("gfx942", gfx942()), ("gfx950", gfx950())] {
            for (pattern, threads) in patterns.iter().enumerate().take(2) {
                let [cycles, least] = of_block(&machine, pattern, threads);
                assert_eq!(cycles, least, "{name}, head size {}: {}", 16 * size + 16, NAMES[pattern].0);
            }
        }
        // Without the published phases rows would take twice the time, quads would not.
        let twice = [0, 1].map(|pattern| of_block(&plain(), pattern, &patterns[pattern])).map(|[c, least]| c / least);
        assert_eq!(twice, [2, 1], "head size {}", 16 * size + 16);
    }
}

/// Every wave reads what the block wrote once, so writes are the smaller part.
#[test]
fn writes_conflict_only_where_rows_are_no_multiple_of_64_elements() {
    for (size, patterns) in addresses().iter().enumerate() {
        let dim = 16 * size + 16;
        for (pattern, threads) in patterns.iter().enumerate().skip(2) {
            let [cycles, least] = of_block(&gfx942(), pattern, threads);
            let most = if dim % 64 == 0 || pattern == 5 { least } else { 2 * least };
            assert!(cycles <= most, "head size {dim}, {}: {cycles} cycles of {least}", NAMES[pattern].0);
        }
    }
}

/// The count is able to see a conflict: rows without padding.
#[test]
fn rows_without_padding_conflict() {
    let lanes: Vec<u32> = (0..64).map(|lane| lane % 16 * 128 + lane / 16 * 8).collect();
    for machine in [gfx942(), gfx950(), plain()] {
        let [cycles, least] = machine.cycles(0, &lanes);
        assert!(cycles >= 8 * least, "{cycles} of {least}");
    }
}
