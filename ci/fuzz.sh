#!/usr/bin/env bash
# Fuzzes what reads what a user gives, each target of fuzz/ for SECONDS (default 6): no panic, no hang (30 s), no allocation
# above 256 MiB and no more than 1 GiB in all. Ends with `N passed, N failed`.
#
#     ci/fuzz.sh [SECONDS [TARGET...]]
#
# Stable Rust will do: the compiler's coverage instrumentation needs no sanitizer. What was found is kept in target/fuzz:
# corpus/TARGET across runs, artifacts/TARGET-* for an input that failed. libFuzzer is C++, so a C++ compiler is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly seconds=${1:-6} home=target/fuzz
shift || true
targets=("$@")
((${#targets[@]})) || targets=(flags layout safetensors)
readonly host=$(rustc -vV | sed -n 's/^host: //p')

instrument="-Cpasses=sancov-module --cfg fuzzing"
for pass in level=4 inline-8bit-counters pc-table trace-compares; do
    instrument+=" -Cllvm-args=-sanitizer-coverage-$pass"
done
cargo fmt --check --manifest-path fuzz/Cargo.toml
# With a target of its own, build scripts and macros are not instrumented.
CARGO_TARGET_DIR=$home/build RUSTFLAGS=$instrument cargo build --quiet --release --locked --manifest-path fuzz/Cargo.toml --target "$host"

TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
failed=0
for target in "${targets[@]}"; do
    mkdir -p "$home/corpus/$target" "$home/artifacts" "fuzz/seeds/$target"
    log=$home/$target.log
    if "$home/build/$host/release/$target" "$home/corpus/$target" "fuzz/seeds/$target" \
        -max_total_time="$seconds" -timeout=30 -rss_limit_mb=1024 -malloc_limit_mb=256 -max_len=2048 -print_final_stats=1 \
        -artifact_prefix="$home/artifacts/$target-" >"$log" 2>&1; then
        said=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        peak=$(sed -n 's/^stat::peak_rss_mb: *//p' "$log")
        cover=$(grep -o 'cov: [0-9]*' "$log" | tail -1)
        echo "fuzz $target: $said executions, $cover, ${peak} MiB at most"
    else
        failed=$((failed + 1))
        tail -40 "$log"
        echo "fuzz $target: FAILED; the input is in $home/artifacts"
    fi
done
echo "$((${#targets[@]} - failed)) passed, $failed failed"
((failed == 0))
