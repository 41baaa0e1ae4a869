//! Dropout masks on the device, from integer operators: Philox4x32-10 (Salmon et al., SC 2011) as `hal::Spec` defines it.
//!
//! ```text
//! ten times:  (c0, c1, c2, c3) <- (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))
//!             (k0, k1) <- (k0 + W0, k1 + W1)
//! ```
//!
//! Words of 32 bits live in 64-bit integers. A product of two words does not fit, so one factor is split at 16 bits:
//! `x = 2^16 h + l`, `a = l M`, `t = h M + a >> 16`, `high = t >> 16`, `low = (t mod 2^16) 2^16 + a mod 2^16`. Shifts are
//! floor divisions. Every pair computes all four words and takes that of its key's position.

use longspan_hal::Result;

use super::tile::{Tile, Work};
use crate::tensor::Tensor;
use ascendcl_sys::aclDataType;

const M: [i64; 2] = [0xd251_1f53, 0xcd9e_8d57];
const W: [i64; 2] = [0x9e37_79b9, 0xbb67_ae85];
const WORD: i64 = 0xffff_ffff;
const HALF: i64 = 1 << 16;

impl Work<'_> {
    /// The seed's words from 8 bytes of device memory.
    pub fn load_seed(&self, address: usize) -> Result<()> {
        let seed = self.slots.seed[0].of(&[2]);
        self.ops.copy(&Tensor::dense(address, aclDataType::ACL_INT32, &[2]), &seed)?;
        self.ops.bitand(&seed, WORD, &seed)
    }

    /// The seed's words from a number.
    pub fn store_seed(&self, seed: u64) -> Result<()> {
        let words = self.slots.seed[0].of(&[2]);
        self.ops.fill(&words.narrow(0, 0..1), (seed & WORD as u64) as i64)?;
        self.ops.fill(&words.narrow(0, 1..2), (seed >> 32) as i64)
    }

    /// True where the tile's pairs are dropped, `[heads, rows, keys]`.
    pub fn dropped(&self, tile: &Tile<'_>) -> Result<Tensor> {
        let dims = tile.logits();
        let drop = self.slots.drop.of(&dims);
        self.counters(tile)?;
        let words = self.rounds(dims)?;
        let word = self.select(tile, words)?;
        self.ops.less(&word, i64::from(self.spec.dropout_threshold()), &drop)?;
        Ok(drop)
    }

    /// Applies dropout to `x`: 0 where dropped, `1 / (1 - p)` times it elsewhere.
    pub fn drop(&self, x: &Tensor, dropped: &Tensor) -> Result<()> {
        let p = f64::from(self.spec.dropout.unwrap_or(0.0));
        self.ops.scale(x, (1.0 / (1.0 - p)) as f32, x)?;
        self.ops.fill_where(x, dropped, 0.0)
    }

    /// Counters `[batch, head, qpos, kpos / 4]` in words 0 to 3, and the keys of the first round.
    fn counters(&self, tile: &Tile<'_>) -> Result<()> {
        let ([heads, m, n], slice, ops) = (tile.logits(), tile.slice, &self.ops);
        let (q_pos, k_pos) = tile.positions();
        let word = |i: usize| self.slots.words[i].of(&[heads, m, n]);
        ops.fill(&word(0), self.spec.batch_first as i64 + i64::from(slice.batch))?;
        ops.copy(&self.constants.counts_int(&[heads, 1, 1]), &word(1))?;
        ops.add_number(&word(1), (self.spec.head_first + tile.unit.heads.start) as i64, 1, &word(1))?;
        let position = |slot: usize, dims: &[usize; 3], step: i64, first: i64| -> Result<Tensor> {
            let p = self.slots.positions[slot].of(dims);
            ops.scale_int(&self.constants.counts_int(dims), step, &p)?;
            ops.add_number(&p, first, 1, &p)?;
            Ok(p)
        };
        let q = position(0, &[1, m, 1], slice.q_step, q_pos)?;
        ops.bitand(&q, WORD, &q)?;
        ops.copy(&q, &word(2))?;
        let k = position(1, &[1, 1, n], slice.k_step, k_pos)?;
        let four = self.slots.positions[2].of(&[1, 1, n]);
        ops.floor_div(&k, 4, &four)?;
        ops.bitand(&four, WORD, &four)?;
        ops.copy(&four, &word(3))?;
        ops.bitand(&k, 3, &k)?;
        ops.copy(&self.slots.seed[0].of(&[2]), &self.slots.seed[1].of(&[2]))
    }

    /// Ten rounds; which slots hold words 0 to 3 then.
    fn rounds(&self, dims: [usize; 3]) -> Result<[usize; 4]> {
        let (mut c, mut free) = ([0, 1, 2, 3], [4, 5, 6, 7]);
        let (ops, word) = (&self.ops, |i: usize| self.slots.words[i].of(&dims));
        let keys = self.slots.seed[1].of(&[2]);
        let key = |i: usize| Tensor { dims: vec![1, 1, 1], strides: vec![1, 1, 1], ..keys.narrow(0, i..i + 1) };
        for _ in 0..10 {
            let [h1, l1, h0, l0] = free;
            self.product(&word(c[2]), M[1], &word(h1), &word(l1), dims)?;
            self.product(&word(c[0]), M[0], &word(h0), &word(l0), dims)?;
            ops.bitxor(&word(h1), &word(c[1]), &word(h1))?;
            ops.bitxor(&word(h1), &key(0), &word(h1))?;
            ops.bitxor(&word(h0), &word(c[3]), &word(h0))?;
            ops.bitxor(&word(h0), &key(1), &word(h0))?;
            (c, free) = ([h1, l1, h0, l0], c);
            for (i, w) in W.into_iter().enumerate() {
                ops.add_number(&key(i), w, 1, &key(i))?;
                ops.bitand(&key(i), WORD, &key(i))?;
            }
        }
        Ok(c)
    }

    /// High and low word of `x * by`.
    fn product(&self, x: &Tensor, by: i64, high: &Tensor, low: &Tensor, dims: [usize; 3]) -> Result<()> {
        let (ops, a) = (&self.ops, self.slots.words[8].of(&dims));
        let b = self.slots.words[9].of(&dims);
        ops.bitand(x, HALF - 1, &a)?;
        ops.scale_int(&a, by, &a)?;
        ops.floor_div(x, HALF, high)?;
        ops.scale_int(high, by, high)?;
        ops.floor_div(&a, HALF, &b)?;
        ops.add(high, &b, high)?;
        ops.bitand(high, HALF - 1, low)?;
        ops.scale_int(low, HALF, low)?;
        ops.bitand(&a, HALF - 1, &a)?;
        ops.add(low, &a, low)?;
        ops.floor_div(high, HALF, high)
    }

    /// Of the four words, that of each key's position modulo 4.
    fn select(&self, tile: &Tile<'_>, words: [usize; 4]) -> Result<Tensor> {
        let dims = tile.logits();
        let word = |i: usize| self.slots.words[i].of(&dims);
        let (modulo, here) = (self.slots.positions[1].of(&[1, 1, dims[2]]), self.slots.choice.of(&[1, 1, dims[2]]));
        let taken = word(words[0]);
        for (i, slot) in words.into_iter().enumerate().skip(1) {
            self.ops.eq(&modulo, i as i64, &here)?;
            self.ops.choose(&here, &word(slot), &taken, &taken)?;
        }
        Ok(taken)
    }
}
