#!/usr/bin/env bash
# What runs for the ROCm backend. Without an AMD GPU: the compile check and the emulator. With one: the conformance suite on it.
#
# usage: ci/rocm.sh            all specializations through clang-19, the emulator's own tests, the quick tier over the emulator
#        ci/rocm.sh full       the same with the full tier, on every architecture that is emulated, and by the emulated RCCL
#        ci/rocm.sh gpu        the suite on the AMD GPUs of this machine, by peer copies and (with two or more) by RCCL
# backends/rocm/README.md says how to report a result from hardware.
set -euo pipefail
cd "$(dirname "$0")/.."

suite() {
    cargo test --release -p longspan-rocm --test conformance -- "$@"
}

case "${1:-emulator}" in
gpu)
    cargo build --release -p longspan-cli --features rocm
    ./target/release/longspan doctor
    LONGSPAN_GPU=1 LONGSPAN_REQUIRE=rocm LONGSPAN_JSON=$PWD/rocm.json suite
    if (($(ls -d /sys/class/kfd/kfd/topology/nodes/*/ 2>/dev/null | wc -l) > 2)); then
        LONGSPAN_GPU=1 LONGSPAN_EXCHANGE=nccl LONGSPAN_RANKS=2 LONGSPAN_FILTER='collective/*' suite
    fi
    ./target/release/longspan run --backend rocm --input conformance/data/minilm-layer0.safetensors --mask causal \
        --layout zigzag --ulysses 2 --ring 2 --backward --verify
    ;;
emulator | full)
    python3 kernels/ci/compile_amd.py
    cargo test -p longspan-rocm-emulator
    cargo test -p longspan-rocm --lib --test banks --test fragments
    if [ "${1:-}" = full ]; then
        export LONGSPAN_TIER=full
        for arch in gfx942 gfx90a gfx1100; do LONGSPAN_EMULATOR_ARCH=$arch LONGSPAN_SAMPLE=1 suite; done
    else
        LONGSPAN_SAMPLE=1 suite
    fi
    LONGSPAN_EXCHANGE=nccl LONGSPAN_FILTER='collective/*' suite
    ;;
*)
    echo "usage: ci/rocm.sh [emulator|full|gpu]" >&2
    exit 2
    ;;
esac
