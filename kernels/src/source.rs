//! The kernel sources, compiled into the program.

/// What a vendor's kernels begin with: everything that only its GPUs have, under the same names.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Prelude {
    /// NVIDIA, for NVRTC.
    Cuda,
    /// AMD, for hipRTC.
    Hip,
}

impl Prelude {
    const fn text(self) -> &'static str {
        match self {
            Self::Cuda => include_str!("../cu/prelude_cuda.cuh"),
            Self::Hip => include_str!("../cu/prelude_hip.cuh"),
        }
    }
}

/// One kernel's source: the shared part, then what the kernel's own file (and the fragments that it uses) holds.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Source {
    /// File name, for compiler messages.
    pub file: &'static str,
    parts: &'static [&'static str],
}

macro_rules! sources {
    ($($(#[$doc:meta])* $name:ident = $($file:literal)+;)*) => {
        impl Source {
            $($(#[$doc])* pub const $name: Self = Self::of(
                [$($file),+],
                &[include_str!("../cu/common.cuh"), $(include_str!(concat!("../cu/", $file))),+],
            );)*
            /// All sources.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

sources! {
    /// `accumulate`.
    ACCUMULATE = "accumulate.cu";
    /// `attention_backward` for 16-bit elements on AMD's matrix units.
    AMD_BACKWARD = "fragments_amd.cuh" "amd_attention_backward.cu";
    /// `attention_backward_dq` for 16-bit elements on AMD's matrix units, used in the deterministic mode.
    AMD_BACKWARD_DQ = "fragments_amd.cuh" "amd_attention_backward_dq.cu";
    /// `attention_forward` for 16-bit elements on AMD's matrix units.
    AMD_FORWARD = "fragments_amd.cuh" "amd_attention_forward.cu";
    /// `copy_strided`.
    COPY = "copy_strided.cu";
    /// `fill`.
    FILL = "fill.cu";
    /// `attention_backward` and `attention_backward_dq` for f32.
    FMA_BACKWARD = "fma_attention_backward.cu";
    /// `attention_forward` for f32.
    FMA_FORWARD = "fma_attention_forward.cu";
    /// `prepare_delta` and `prepare_dsinks`.
    PREPARE = "attention_prepare.cu";
    /// `attention_backward` for 16-bit elements on NVIDIA's tensor cores.
    SM80_BACKWARD = "sm80_sums.cuh" "sm80_attention_backward.cu";
    /// `attention_backward_dq` for 16-bit elements on NVIDIA's tensor cores, used in the deterministic mode.
    SM80_BACKWARD_DQ = "sm80_attention_backward_dq.cu";
    /// `round_dq` and `reorder_dq`, for sums of dq of `attention_backward` with LINES.
    SM80_BACKWARD_ROUND = "sm80_sums.cuh" "sm80_attention_backward_round.cu";
    /// `attention_forward` for 16-bit elements on NVIDIA's tensor cores.
    SM80_FORWARD = "sm80_attention_forward.cu";
    /// `attention_backward` for 16-bit elements on sm_90a.
    SM90_BACKWARD = "prelude_sm90.cuh" "sm90_backward.cuh" "sm90_attention_backward.cu";
    /// `attention_backward_dq` for 16-bit elements on sm_90a: deterministic mode, large heads.
    SM90_BACKWARD_DQ = "prelude_sm90.cuh" "sm90_attention_backward_dq.cu";
    /// `round_dq` and `reorder_dq`, for sums of dq of `attention_backward` with DQ_QUADS.
    SM90_BACKWARD_ROUND = "sm90_attention_backward_round.cu";
    /// `attention_backward` for 16-bit elements and large heads on sm_90a.
    SM90_BACKWARD_WIDE = "prelude_sm90.cuh" "sm90_backward.cuh" "sm90_attention_backward_wide.cu";
    /// `attention_forward` for 16-bit elements on sm_90a.
    SM90_FORWARD = "prelude_sm90.cuh" "sm90_attention_forward.cu";
}

impl Source {
    const fn of<const N: usize>(files: [&'static str; N], parts: &'static [&'static str]) -> Self {
        Self { file: files[N - 1], parts }
    }

    /// The whole text for a vendor: no file needs to be included, no include path is needed.
    pub fn text(&self, prelude: Prelude) -> String {
        prelude.text().to_owned() + &self.parts.concat()
    }

    /// Content hash (FNV-1a, 128 bits) of all but the prelude.
    pub fn hash(&self) -> u128 {
        self.parts.iter().fold(FNV_OFFSET, |h, part| fnv1a(h, part.as_bytes()))
    }
}

pub(crate) const FNV_OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const FNV_PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

/// FNV-1a over 128 bits, with the length mixed in so that parts do not run together.
pub(crate) fn fnv1a(start: u128, bytes: &[u8]) -> u128 {
    let step = |h: u128, b: &u8| (h ^ u128::from(*b)).wrapping_mul(FNV_PRIME);
    let hash = bytes.iter().fold(start, step);
    (bytes.len() as u64).to_le_bytes().iter().fold(hash, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_its_own_hash_and_its_kernel() {
        for (i, a) in Source::ALL.iter().enumerate() {
            for text in [Prelude::Cuda, Prelude::Hip].map(|prelude| a.text(prelude)) {
                assert!(text.contains("KERNEL(") && !text.contains("#include"), "{}", a.file);
            }
            assert!(Source::ALL[..i].iter().all(|b| a.hash() != b.hash()));
        }
    }

    #[test]
    fn parts_do_not_run_together() {
        let of = |parts: &[&str]| parts.iter().fold(FNV_OFFSET, |h, p| fnv1a(h, p.as_bytes()));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
    }
}
