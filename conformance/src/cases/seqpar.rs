//! Sequence-parallel attention: 1 to 8 ranks, every U x R, both placements, every layout, mask, option and dtype.

use longspan_hal::{Backend, DType, Error};
use longspan_seqpar::heads::{HeadCut, head_groups};
use longspan_seqpar::{Documents, Layout, Mask, Mesh, Placement, Problem, Run};

use super::pairwise::{Row, cover};
use super::parallel::{Setup, run};
use super::problem::Memory;
use super::{Case, agreement};
use crate::host::Random;

/// The cases of this file. `seed` chooses rows, sizes and values of the sweeps.
pub fn cases<B: Backend>(seed: u64) -> Vec<Case<B>> {
    let mut cases = agreement::cases();
    let mut random = Random::new(seed ^ 0x5e9);
    let rows = cover(&LEVELS, &valid, &mut random);
    cases.extend(rows.iter().enumerate().filter_map(|(i, row)| case(i, row, &mut random)));
    // More rows, each with sizes and seeds of its own.
    for more in 1..6 {
        let rows = cover(&LEVELS, &valid, &mut random);
        let list = rows.iter().enumerate().filter_map(|(i, row)| case(1000 * more + i, row, &mut random));
        cases.extend(list.map(Case::full));
    }
    cases
}

/// Ulysses x ring.
const MESHES: [(u32, u32); 20] = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 3),
    (3, 1),
    (1, 4),
    (2, 2),
    (4, 1),
    (1, 5),
    (5, 1),
    (1, 6),
    (2, 3),
    (3, 2),
    (6, 1),
    (1, 7),
    (7, 1),
    (1, 8),
    (2, 4),
    (4, 2),
    (8, 1),
];
const PLACEMENTS: [Placement; 2] = [Placement::RingInner, Placement::UlyssesInner];
const LAYOUTS: [&str; 4] = ["contiguous", "zigzag", "stripe", "runs"];
const MASKS: [&str; 10] = [
    "full",
    "causal",
    "window",
    "window-both",
    "prefix",
    "documents-causal",
    "documents-full",
    "documents-prefix",
    "cross",
    "joint",
];
const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];
/// Query and KV heads: even, grouped, uneven, one KV head, fewer heads than ranks.
const HEADS: [[usize; 2]; 6] = [[8, 8], [8, 2], [6, 3], [12, 4], [7, 1], [2, 1]];
const DIMS: [[usize; 2]; 4] = [[16, 16], [32, 32], [24, 8], [9, 9]];
const SOFTCAPS: [Option<f32>; 2] = [None, Some(3.0)];
const DROPOUTS: [Option<f32>; 2] = [None, Some(0.2)];
const MEMORIES: [Memory; 3] = [Memory::Bshd, Memory::Bhsd, Memory::Random];
/// Tokens: fewer than ranks, uneven, even.
const SEQS: [usize; 4] = [5, 37, 64, 97];
const GROUPS: [usize; 3] = [1, 2, 3];

/// Numbers of levels, in the order of [`Choice`].
const LEVELS: [usize; 16] = [
    MESHES.len(),
    PLACEMENTS.len(),
    LAYOUTS.len(),
    MASKS.len(),
    DTYPES.len(),
    HEADS.len(),
    DIMS.len(),
    SOFTCAPS.len(),
    2, // alibi
    2, // sinks
    DROPOUTS.len(),
    2, // dlse
    2, // deterministic
    MEMORIES.len(),
    SEQS.len(),
    GROUPS.len(),
];

/// Joint tokens have no position, so that ALiBi is refused with them.
fn valid(row: &Row) -> bool {
    !(MASKS[row[3]] == "joint" && row[8] == 1)
}

fn case<B: Backend>(index: usize, row: &Row, random: &mut Random) -> Option<Case<B>> {
    let setup = setup(row, random).ok()?;
    let (problem, mesh) = (&setup.problem, setup.mesh());
    let (u, r) = (mesh.ulysses(), mesh.ring());
    let groups = head_groups(problem, mesh, [setup.q.seq(), setup.k.seq()], &setup.mask);
    let mut words = vec![format!("u{u}r{r}"), LAYOUTS[row[2]].to_owned(), MASKS[row[3]].to_owned()];
    words.push(problem.dtype.to_string());
    let options = [
        ("partial", r > 1),
        ("accumulate", r > 1 || HeadCut::new(problem, u, groups).replicates()),
        ("softcap", problem.softcap.is_some()),
        ("alibi", problem.alibi),
        ("sinks", problem.sinks),
        ("dropout", problem.dropout.is_some()),
        ("dlse", setup.dlse),
        ("deterministic", problem.deterministic),
    ];
    words.extend(options.iter().filter(|(_, on)| *on).map(|(word, _)| (*word).to_owned()));
    let config = format!(
        "{} batch {} tokens {}x{} joint {} heads {}:{} dim {}/{} head groups {} {:?}",
        mesh.placement(),
        problem.batch,
        setup.q.seq(),
        setup.k.seq(),
        problem.joint,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        problem.head_dim_v,
        groups,
        setup.memory
    );
    let name = format!("seqpar/pairs-{index:04}-{}", words.join("-"));
    Some(Case::new(name, mesh.size(), move |rank| run(rank, &setup)).with_config(config))
}

fn setup(row: &Row, random: &mut Random) -> Result<Setup, Error> {
    let (u, r) = MESHES[row[0]];
    let mesh = Mesh::new(u, r, PLACEMENTS[row[1]])?;
    let seq = SEQS[row[14]];
    let mask_name = MASKS[row[3]];
    let k_seq = if mask_name == "cross" { random.between(1, 80) } else { seq };
    let q = layout(LAYOUTS[row[2]], seq, &mesh, random)?;
    let k = if mask_name == "cross" { layout(LAYOUTS[row[2]], k_seq, &mesh, random)? } else { q.clone() };
    let [d, v] = DIMS[row[6]];
    let problem = Problem::new(DTYPES[row[4]], random.between(1, 2), HEADS[row[5]], d)
        .with_head_dim_v(v)
        .with_softcap(SOFTCAPS[row[7]])
        .with_alibi(row[8] == 1)
        .with_sinks(row[9] == 1)
        .with_dropout(DROPOUTS[row[10]])
        .with_deterministic(row[12] == 1)
        .with_head_groups(GROUPS[row[15]].min(HEADS[row[5]][0]))
        .with_joint(if mask_name == "joint" { random.between(1, 11) } else { 0 })
        .with_backward(true);
    let mask = mask(mask_name, seq, random)?;
    Ok(Setup { problem, q, k, mask, dlse: row[11] == 1, memory: MEMORIES[row[13]] })
}

/// A layout by its name; `runs` deals three chunks a ring rank in any order.
pub fn layout(name: &str, seq: usize, mesh: &Mesh, random: &mut Random) -> Result<Layout, Error> {
    match name {
        "contiguous" => Ok(Layout::contiguous(seq, mesh)),
        "stripe" => Ok(Layout::stripe(seq, mesh)),
        "zigzag" => Ok(Layout::zigzag(seq, mesh)),
        _ => {
            let ring = mesh.ring() as usize;
            let mut cuts: Vec<usize> = (0..3 * ring - 1).map(|_| random.below(seq + 1)).collect();
            cuts.extend([0, seq]);
            cuts.sort_unstable();
            let chunks = cuts.windows(2).map(|w| Run { start: w[0], len: w[1] - w[0], step: 1 });
            let mut chunks: Vec<Run> = chunks.filter(|run| run.len > 0).collect();
            random.shuffle(&mut chunks);
            let mut lists = vec![Vec::new(); ring];
            for chunk in chunks {
                lists[random.below(ring)].push(chunk);
            }
            Layout::from_runs(seq, mesh, lists)
        }
    }
}

fn mask(name: &str, seq: usize, random: &mut Random) -> Result<Mask, Error> {
    let shape = match name.trim_start_matches("documents-") {
        "causal" => Mask::causal(),
        "prefix" => Mask::prefix(random.below(seq + 1)),
        "window" => Mask::window(Some(random.below(seq / 2 + 1)), Some(0)),
        "window-both" => Mask::window(Some(random.below(9)), Some(random.below(9))),
        _ => Mask::full(),
    };
    if !name.starts_with("documents-") {
        return Ok(shape);
    }
    // Repeated borders are empty documents.
    let mut borders: Vec<i32> = (0..random.between(1, 6)).map(|_| random.below(seq + 1) as i32).collect();
    borders.extend([0, seq as i32]);
    borders.sort_unstable();
    Ok(shape.with_documents(Documents::from_cu_seqlens(&borders, seq)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_becomes_a_case_and_every_mesh_meets_every_mask() {
        let mut random = Random::new(3);
        let rows = cover(&LEVELS, &valid, &mut random);
        for row in &rows {
            setup(row, &mut random).unwrap_or_else(|e| panic!("{row:?}: {e}"));
        }
        for (mesh, mask) in (0..MESHES.len()).flat_map(|mesh| (0..MASKS.len()).map(move |mask| (mesh, mask))) {
            assert!(rows.iter().any(|row| row[0] == mesh && row[3] == mask));
        }
        assert!(rows.len() < 320, "{} rows", rows.len());
    }
}
