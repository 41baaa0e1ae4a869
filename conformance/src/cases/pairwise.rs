//! Covering arrays: few configurations in which every pair of levels of any two factors occurs.
//!
//! ```text
//! open = all pairs (factor a, level i, factor b, level j) that some valid row can hold
//! while open:
//!     candidates = random valid rows that hold a random open pair
//!     take the candidate that closes the most open pairs
//! ```
//!
//! (Greedy, after Cohen et al., "The AETG system", IEEE TSE 1997.)

use std::collections::HashSet;

use crate::host::Random;

/// A row: one level of each factor.
pub type Row = Vec<usize>;

type Pairing = (usize, usize, usize, usize);

/// Random rows tried before a pair is given up as impossible.
const TRIES: usize = 400;

/// Rows that hold every possible pair; `levels` are the numbers of levels, `valid` says which rows may be.
pub fn cover(levels: &[usize], valid: &dyn Fn(&Row) -> bool, random: &mut Random) -> Vec<Row> {
    let mut open: Vec<Pairing> = Vec::new();
    for a in 0..levels.len() {
        for b in a + 1..levels.len() {
            open.extend((0..levels[a]).flat_map(|i| (0..levels[b]).map(move |j| (a, i, b, j))));
        }
    }
    random.shuffle(&mut open);
    let mut left: HashSet<Pairing> = open.iter().copied().collect();
    let mut rows = Vec::new();
    while let Some(&seed) = open.last() {
        if !left.contains(&seed) {
            open.pop();
            continue;
        }
        let found = candidates(levels, valid, seed, random);
        let Some(best) = found.into_iter().max_by_key(|row| closed(row).filter(|p| left.contains(p)).count()) else {
            left.remove(&seed);
            continue;
        };
        for pair in closed(&best) {
            left.remove(&pair);
        }
        rows.push(best);
    }
    rows
}

/// A few valid rows that hold the pair `(a, i, b, j)`.
fn candidates(levels: &[usize], valid: &dyn Fn(&Row) -> bool, (a, i, b, j): Pairing, random: &mut Random) -> Vec<Row> {
    let mut found = Vec::new();
    for _ in 0..TRIES {
        let mut row: Row = levels.iter().map(|n| random.below(*n)).collect();
        (row[a], row[b]) = (i, j);
        if valid(&row) {
            found.push(row);
        }
        if found.len() == 20 {
            break;
        }
    }
    found
}

/// The pairs that a row holds.
fn closed(row: &Row) -> impl Iterator<Item = Pairing> {
    (0..row.len()).flat_map(move |a| (a + 1..row.len()).map(move |b| (a, row[a], b, row[b])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_possible_pair_occurs_and_no_forbidden_row() {
        let levels = [5, 4, 3, 2, 2];
        let valid = |row: &Row| !(row[0] == 1 && row[1] == 2);
        for seed in 0..10 {
            let rows = cover(&levels, &valid, &mut Random::new(seed));
            assert!(rows.iter().all(&valid));
            let held: HashSet<Pairing> = rows.iter().flat_map(closed).collect();
            let all = 5 * 4 + 5 * 3 + 2 * 5 * 2 + 4 * 3 + 2 * 4 * 2 + 2 * 3 * 2 + 2 * 2;
            assert_eq!(held.len(), all - 1);
            assert!(rows.len() < 40, "{} rows", rows.len());
        }
    }
}
