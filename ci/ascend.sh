#!/usr/bin/env bash
# What runs for the Ascend backend. Without an NPU: the ABI gate and the emulator. With one: the conformance suite on it.
#
# usage: ci/ascend.sh            ABI gate, the emulator's own tests, the quick tier over the emulator
#        ci/ascend.sh npu        the same suite on the NPUs of this machine (source CANN's set_env.sh first)
#        ci/ascend.sh full       the full tier over the emulator
# backends/ascend/README.md says how to report a result from hardware.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-emulator}" in
npu)
    ci/ascend_abi/check.sh
    cargo build --release -p longspan-cli --features ascend
    ./target/release/longspan doctor
    LONGSPAN_REQUIRE=ascend ./target/release/longspan conformance --backend ascend --json ascend.json
    LONGSPAN_NPU=1 LONGSPAN_BACKEND=ascend-fused LONGSPAN_FILTER='attention/*' \
        cargo test --release -p longspan-ascend --test conformance
    ;;
emulator | full)
    ci/ascend_abi/check.sh
    cargo check -p longspan-cli --features ascend
    cargo test -p ascendcl-sys -p longspan-ascend-emulator
    [ "${1:-}" != full ] || export LONGSPAN_TIER=full
    LONGSPAN_RANKS=8 cargo test -p longspan-ascend
    LONGSPAN_BACKEND=ascend-fused LONGSPAN_FILTER='attention/*' cargo test -p longspan-ascend --test conformance
    ;;
*)
    echo "usage: ci/ascend.sh [emulator|full|npu]" >&2
    exit 2
    ;;
esac
