//! The most that the CPU computes: multiply-adds of f32 in registers, on all threads at once. Kernels convert bf16 and f16 to
//! f32, so it is the peak of every dtype.

use std::time::Instant;

use longspan_hal::Peak;

/// Rounds of one measurement of a thread: some tens of milliseconds.
const ROUNDS: usize = 4_000_000;

/// Measurements, of which the best counts: other work on the machine only takes away.
const MEASUREMENTS: usize = 4;

/// Measures the peak of all threads of the pool together.
pub(crate) fn peak() -> Peak {
    let once = || {
        let start = Instant::now();
        let made: usize = rayon::broadcast(|_| multiply_adds(ROUNDS)).into_iter().sum();
        2.0 * made as f64 / start.elapsed().as_secs_f64()
    };
    let flops_per_second = (0..MEASUREMENTS).map(|_| once()).fold(0.0, f64::max);
    Peak { flops_per_second, how: format!("f32 multiply-adds on {} threads", rayon::current_num_threads()) }
}

/// Runs independent chains of multiply-adds in registers, as wide as the CPU has them; how many multiply-adds were made.
#[cfg(target_arch = "x86_64")]
pub fn multiply_adds(rounds: usize) -> usize {
    let narrow = std::env::var("LONGSPAN_CPU_ARCH").is_ok_and(|arch| arch == "avx2");
    if is_x86_feature_detected!("avx512f") && !narrow {
        // SAFETY: the CPU has AVX-512F.
        unsafe { avx512(rounds) }
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has AVX2 and FMA.
        unsafe { avx2(rounds) }
    } else {
        plain(rounds)
    }
}

/// Runs independent chains of multiply-adds in registers; how many multiply-adds were made.
#[cfg(not(target_arch = "x86_64"))]
pub fn multiply_adds(rounds: usize) -> usize {
    plain(rounds)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let (a, b) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(1e-3));
    let mut c = [_mm256_set1_ps(1.0); 12];
    for _ in 0..rounds {
        for x in &mut c {
            *x = _mm256_fmadd_ps(*x, a, b);
        }
    }
    std::hint::black_box(c);
    rounds * 12 * 8
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(rounds: usize) -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let (a, b) = (_mm512_set1_ps(std::hint::black_box(0.999)), _mm512_set1_ps(1e-3));
    let mut c = [_mm512_set1_ps(1.0); 12];
    for _ in 0..rounds {
        for x in &mut c {
            *x = _mm512_fmadd_ps(*x, a, b);
        }
    }
    std::hint::black_box(c);
    rounds * 12 * 16
}

/// What the compiler makes of it: fused where the target always has it, two instructions elsewhere.
fn plain(rounds: usize) -> usize {
    let (a, b) = (std::hint::black_box(0.999f32), std::hint::black_box(1e-3f32));
    let mut c = [1.0f32; 64];
    for _ in 0..rounds {
        for x in &mut c {
            *x = if cfg!(target_arch = "aarch64") { x.mul_add(a, b) } else { *x * a + b };
        }
    }
    std::hint::black_box(c);
    rounds * c.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_that_of_the_rounds() {
        let one = multiply_adds(1);
        assert!(one >= 64 && multiply_adds(10) == 10 * one);
    }
}
