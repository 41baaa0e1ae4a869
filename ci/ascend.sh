#!/usr/bin/env bash
# What runs for the Ascend backend. Without an NPU: the ABI gate and the emulator. With one: the conformance suite on it.
#
# usage: ci/ascend.sh            ABI gate, the emulator's own tests, the program and the quick tier over the emulator
#        ci/ascend.sh program    only the program: doctor and verified runs over the emulator
#        ci/ascend.sh npu        the same suite on the NPUs of this machine (source CANN's set_env.sh first)
#        ci/ascend.sh full       the full tier over the emulator
# backends/ascend/README.md says how to report a result from hardware.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly input=conformance/data/minilm-layer0.safetensors
readonly target=${CARGO_TARGET_DIR:-target}

# processes PROGRAM RANKS: a verified run whose ranks are processes, with the variables that torchrun sets.
processes() {
    local rank job=()
    for ((rank = 0; rank < $2; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$2 LOCAL_WORLD_SIZE=$2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \
            "$1" run --input $input --backward --verify --backend ascend --ring "$2" --mask causal --layout zigzag &
        job+=($!)
    done
    for rank in "${job[@]}"; do wait "$rank"; done
}

# runs PROGRAM RANKS: doctor, and verified runs on so many ranks.
runs() {
    "$1" doctor
    "$1" run --input $input --backward --verify --backend ascend --ulysses "$2"
    "$1" run --input $input --backward --verify --backend ascend --ring "$2" --mask causal --layout zigzag
    "$1" run --input $input --backward --verify --backend ascend-fused --ulysses "$2" --mask causal
    if (($2 > 1)); then processes "$1" "$2"; fi
}

# emulated: builds the program and the emulator, and runs the one over the other.
emulated() {
    cargo build -p longspan-ascend-emulator
    cargo build -p longspan-cli --features ascend
    LONGSPAN_ASCEND_LIBRARY=$(realpath "$target/debug/liblongspan_ascend_emulator.so") runs "$target/debug/longspan" 4
}

case "${1:-emulator}" in
npu)
    ci/ascend_abi/check.sh
    cargo build --release -p longspan-cli --features ascend
    npus=$(find /dev -maxdepth 1 -name 'davinci[0-9]*' | wc -l)
    ranks=$((npus < 1 ? 1 : npus < 8 ? npus : 8))
    runs "$target/release/longspan" $ranks
    failed=0
    for backend in ascend ascend-fused; do
        LONGSPAN_REQUIRE=$backend "$target/release/longspan" conformance --backend $backend \
            --ranks $ranks --json $backend.json || failed=1
    done
    exit $failed
    ;;
program)
    emulated
    ;;
emulator | full)
    ci/ascend_abi/check.sh
    emulated
    cargo test -p ascendcl-sys -p longspan-ascend-emulator
    [ "${1:-}" != full ] || export LONGSPAN_TIER=full
    LONGSPAN_RANKS=8 cargo test -p longspan-ascend --no-fail-fast
    ;;
*)
    echo "usage: ci/ascend.sh [emulator|program|full|npu]" >&2
    exit 2
    ;;
esac
