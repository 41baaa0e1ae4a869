//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as plainly as possible.
//!
//! ```text
//! repeat 10 times:
//!     (hi0, lo0) = M0 * c0          (hi1, lo1) = M1 * c2          64-bit products
//!     c = [hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0]
//!     k = [k0 + W0, k1 + W1]                                     wrapping
//! ```

/// The four random words of counter `c` under key `k`.
pub fn philox4x32(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * u64::from(c[0]);
        let b = 0xCD9E_8D57_u64 * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// Whether dropout with probability `p` keeps the pair at these global indices (see [`longspan_hal::Spec`]).
pub fn keeps(p: f32, seed: u64, batch: usize, head: usize, q_pos: i64, k_pos: i64) -> bool {
    let threshold = (f64::from(p) * 4_294_967_296.0).floor() as u32;
    let counter = [batch as u32, head as u32, q_pos as u32, (k_pos / 4) as u32];
    let word = philox4x32(counter, [seed as u32, (seed >> 32) as u32])[(k_pos % 4) as usize];
    word >= threshold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_published_known_answers() {
        let (zero, ones) = (0, u32::MAX);
        assert_eq!(philox4x32([zero; 4], [zero; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox4x32(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn keeps_about_the_asked_share_and_all_at_zero() {
        let kept = |p| (0..20_000).filter(|&i| keeps(p, 7, 0, 1, i / 100, i % 100)).count();
        assert_eq!(kept(0.0), 20_000);
        assert!((kept(0.25) as f64 / 20_000.0 - 0.75).abs() < 0.015);
    }
}
