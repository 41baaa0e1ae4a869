//! Lists of slices for one-rank cases: the usual masks, anything that the contract allows, and cuts into pieces.

use longspan_hal::{Slice, Spec};

use crate::host::Random;

/// Every batch row, all pairs.
pub fn full(spec: &Spec) -> Vec<Slice> {
    (0..spec.batch as u32).map(|b| Slice::full(b, 0..spec.q_rows as u32, 0..spec.k_rows as u32)).collect()
}

/// Every batch row, keys up to the query's own position.
pub fn causal(spec: &Spec) -> Vec<Slice> {
    full(spec).into_iter().map(|s| Slice { hi: 0, ..s }).collect()
}

/// Every batch row, keys at most `left` before and `right` behind the query.
pub fn window(spec: &Spec, left: i64, right: i64) -> Vec<Slice> {
    full(spec).into_iter().map(|s| Slice { lo: -left, hi: right, ..s }).collect()
}

/// Cuts `0..n` into at most `parts` neighbouring ranges, some of them left out.
fn stretches(random: &mut Random, n: usize, parts: usize) -> Vec<std::ops::Range<u32>> {
    let mut cuts: Vec<usize> = (1..random.between(1, parts)).map(|_| random.below(n + 1)).collect();
    cuts.extend([0, n]);
    cuts.sort_unstable();
    let all = cuts.windows(2).filter(|w| w[0] < w[1]).map(|w| w[0] as u32..w[1] as u32);
    all.collect::<Vec<_>>().into_iter().filter(|_| !random.one_in(6)).collect()
}

/// Anything that the contract allows: several stretches of queries, each with several key ranges, bands of all kinds, rows
/// and keys that nothing selects, steps and positions as layouts make them.
pub fn any(spec: &Spec, random: &mut Random) -> Vec<Slice> {
    let mut slices = Vec::new();
    for batch in 0..spec.batch as u32 {
        for q in stretches(random, spec.q_rows, 4) {
            for k in stretches(random, spec.k_rows, 4) {
                slices.push(one(random, batch, q.clone(), k));
            }
        }
    }
    slices
}

fn one(random: &mut Random, batch: u32, q: std::ops::Range<u32>, k: std::ops::Range<u32>) -> Slice {
    let (m, n) = (q.len(), k.len());
    let mut s = Slice::full(batch, q, k);
    (s.q_pos, s.k_pos) = (random.below(3000) as i64, random.below(3000) as i64);
    let step = random.between(1, 4) as i64;
    (s.q_step, s.k_step) = (step, step);
    let diagonal = |random: &mut Random| random.below(m + n + 2) as i64 - m as i64;
    match random.below(5) {
        0 => s.hi = diagonal(random),
        1 => s.lo = diagonal(random),
        2 => {
            (s.lo, s.hi) = (diagonal(random), diagonal(random));
            if s.lo > s.hi {
                std::mem::swap(&mut s.lo, &mut s.hi);
            }
        }
        3 => s.k_step = random.between(1, 4) as i64,
        _ => {}
    }
    s
}

/// Cuts a slice before its key row `row` (counted from its first); the band moves with the second part.
fn cut(s: &Slice, row: u32) -> [Slice; 2] {
    let at = s.k.start + row;
    let by = i64::from(row);
    let first = Slice { k: s.k.start..at, ..s.clone() };
    let shift = |d: i64, none: i64| if d == none { d } else { d - by };
    let second = Slice {
        k: at..s.k.end,
        lo: shift(s.lo, Slice::LO_NONE),
        hi: shift(s.hi, Slice::HI_NONE),
        k_pos: s.k_pos + by * s.k_step,
        ..s.clone()
    };
    [first, second]
}

/// Deals `slices`, cut along their keys, to `count` lists at random; together they select the same pairs. Some lists may be
/// empty, and a list may select nothing of most rows.
pub fn pieces(slices: &[Slice], count: usize, random: &mut Random) -> Vec<Vec<Slice>> {
    if count <= 1 {
        return vec![slices.to_vec()];
    }
    let mut dealt = vec![Vec::new(); count];
    for slice in slices {
        let mut rest = slice.clone();
        let mut parts = Vec::new();
        for _ in 0..count {
            if rest.k.len() > 1 {
                let [first, second] = cut(&rest, 1 + random.below(rest.k.len() - 1) as u32);
                parts.push(first);
                rest = second;
            }
        }
        parts.push(rest);
        for part in parts {
            dealt[random.below(count)].push(part);
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use longspan_hal::{DType, Slices};
    use proptest::prelude::*;

    use super::*;
    use crate::cases::problem::Grid;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn pieces_select_every_pair_once_with_its_positions(seed: u64, q in 0usize..20, k in 0usize..20, n in 1usize..5) {
            let spec = Spec::new(DType::F32, 2, [q, k], [1, 1], 4);
            let mut random = Random::new(seed);
            let slices = super::any(&spec, &mut random);
            let whole = Grid::new(&spec, Slices::new(&spec, slices.clone()).expect("allowed").as_slice());
            let grids: Vec<Grid> = pieces(&slices, n, &mut random)
                .into_iter()
                .map(|p| Grid::new(&spec, Slices::new(&spec, p).expect("allowed").as_slice()))
                .collect();
            for (b, i, j) in (0..2).flat_map(|b| (0..q).flat_map(move |i| (0..k).map(move |j| (b, i, j)))) {
                let parts: Vec<_> = grids.iter().filter_map(|g| g.of(b, i, j)).collect();
                prop_assert_eq!(parts, whole.of(b, i, j).into_iter().collect::<Vec<_>>());
            }
        }
    }
}
