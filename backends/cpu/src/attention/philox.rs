//! Dropout masks from Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! ```text
//! ten times:  (c0, c1, c2, c3) <- (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))
//!             (k0, k1) <- (k0 + W0, k1 + W1)
//! ```
//!
//! One call gives the four words of four neighbouring key positions: counter `[batch, head, qpos, kpos / 4]`, word `kpos % 4`.
//! Every number is global, so the mask of a pair does not depend on how the problem is cut.

const M: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const W: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
/// Counters that are computed side by side.
const LANES: usize = 8;

/// Dropout of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropout {
    /// Low and high word of the seed.
    pub key: [u32; 2],
    /// Words below it are dropped.
    pub threshold: u32,
    /// `1 / (1 - p)`.
    pub kept: f32,
}

impl Dropout {
    /// Dropout with probability `p`, of which `threshold` is `floor(p * 2^32)`.
    pub fn new(seed: u64, threshold: u32, p: f32) -> Self {
        let kept = (1.0 / (1.0 - f64::from(p))) as f32;
        Self { key: [seed as u32, (seed >> 32) as u32], threshold, kept }
    }
}

/// Dropout of one row of logits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub dropout: Dropout,
    /// Global batch row, head and query position.
    pub counter: [u32; 3],
    /// Global position of the first key, and the distance of neighbours.
    pub keys: [i64; 2],
}

/// Writes `1 / (1 - p)` for a key that is kept and 0 for one that is dropped.
#[inline(always)]
pub(super) fn factors(row: &Row, to: &mut [f32]) {
    let [first, step] = row.keys;
    if step == 1 {
        return neighbours(row, first, to);
    }
    for (i, part) in to.chunks_mut(LANES).enumerate() {
        let at: [i64; LANES] = std::array::from_fn(|l| first.wrapping_add(step.wrapping_mul((i * LANES + l) as i64)));
        let words = philox(row, at.map(|p| (p >> 2) as u32));
        for (l, x) in part.iter_mut().enumerate() {
            *x = factor(&row.dropout, words[(at[l] & 3) as usize][l]);
        }
    }
}

/// [`factors`] of keys whose positions are neighbours: every word of every call is used.
#[inline(always)]
fn neighbours(row: &Row, first: i64, to: &mut [f32]) {
    let skip = (first & 3) as usize;
    let mut four = first >> 2;
    let mut done = 0;
    while done < to.len() {
        let words = philox(row, std::array::from_fn(|l| (four + l as i64) as u32));
        let mut block = [0.0f32; 4 * LANES];
        for l in 0..LANES {
            for w in 0..4 {
                block[4 * l + w] = factor(&row.dropout, words[w][l]);
            }
        }
        let from = if done == 0 { skip } else { 0 };
        let many = (block.len() - from).min(to.len() - done);
        to[done..done + many].copy_from_slice(&block[from..from + many]);
        done += many;
        four += LANES as i64;
    }
}

#[inline(always)]
fn factor(d: &Dropout, word: u32) -> f32 {
    if word < d.threshold { 0.0 } else { d.kept }
}

/// The four words of each counter `[row.counter, last[lane]]`.
#[inline(always)]
fn philox(row: &Row, last: [u32; LANES]) -> [[u32; LANES]; 4] {
    let [a, b, c] = row.counter;
    let mut x = [[a; LANES], [b; LANES], [c; LANES], last];
    let [mut k0, mut k1] = row.dropout.key;
    for _ in 0..10 {
        let mut y = [[0u32; LANES]; 4];
        for l in 0..LANES {
            let p0 = u64::from(M[0]) * u64::from(x[0][l]);
            let p1 = u64::from(M[1]) * u64::from(x[2][l]);
            y[0][l] = (p1 >> 32) as u32 ^ x[1][l] ^ k0;
            y[1][l] = p1 as u32;
            y[2][l] = (p0 >> 32) as u32 ^ x[3][l] ^ k1;
            y[3][l] = p0 as u32;
        }
        x = y;
        k0 = k0.wrapping_add(W[0]);
        k1 = k1.wrapping_add(W[1]);
    }
    x
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::attention::simd::Kernels;

    fn words(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        let dropout = Dropout { key, threshold: 0, kept: 1.0 };
        let row = Row { dropout, counter: [counter[0], counter[1], counter[2]], keys: [0, 1] };
        philox(&row, [counter[3]; LANES]).map(|w| w[5])
    }

    /// The known answers that Random123 publishes for philox4x32, 10 rounds.
    #[test]
    fn known_answers() {
        assert_eq!(words([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(words([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            words([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    proptest! {
        #[test]
        fn a_row_is_its_pairs(
            first in 0i64..100_000, step in 1i64..9, n in 1usize..150, seed: u64, counter: [u32; 3], p in 0.0f32..0.99
        ) {
            let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
            let dropout = Dropout::new(seed, threshold, p);
            let row = Row { dropout, counter, keys: [first, step] };
            let want: Vec<f32> = (0..n as i64).map(|i| {
                let k = first + step * i;
                let w = words([counter[0], counter[1], counter[2], (k / 4) as u32], dropout.key)[(k % 4) as usize];
                if w < threshold { 0.0 } else { dropout.kept }
            }).collect();
            for k in Kernels::all() {
                let mut got = vec![-1.0; n];
                k.philox(&row, &mut got);
                prop_assert_eq!(&got, &want);
            }
        }
    }
}
