#!/bin/sh
# GPU checks in two halves, since a machine with a GPU needs neither Rust nor a CUDA toolkit:
#
#   ci/gpu.sh build [FOLDER]             here: builds the stripped programs into FOLDER (target/gpu); needs no GPU
#   ci/gpu.sh run [FOLDER] [FILTER]      there: needs FOLDER, this script, the driver and libnvrtc (LONGSPAN_LIBNVRTC names it
#                                        where it lies in no usual place); judges `cuda` with the conformance suite
#   ci/gpu_program.sh [FOLDER]           there: faults, the kernel cache, doctor and bench of the program, a line a check
#   ci/gpu_processes.sh [FOLDER]         there: ranks as processes, by peer copies and by NCCL, a line a check
#
# Most of the first run's time goes into compiling kernels, so the suite is cut into one part a core. Reports are
# FOLDER/report/PART.json, messages PART.log; compiled kernels stay in FOLDER/cache. Exit 1 if a part failed: a GPU is
# required there, not hoped for. `FOLDER/longspan run --backend cuda ...` is the program itself, and so is
# `FOLDER/longspan bench --backend cuda ...`, whose share of peak needs libcublas (LONGSPAN_LIBCUBLAS).
set -eu

command=${1:?usage: ci/gpu.sh build|run [FOLDER] [FILTER]}
folder=${2:-target/gpu}
filter=${3:-*}

case $command in
build)
    cargo build --release -p longspan-cli --features cuda
    cargo build --release -p longspan-cuda --example conformance
    mkdir -p "$folder"
    strip -o "$folder/longspan" target/release/longspan
    strip -o "$folder/conformance" target/release/examples/conformance
    # For ranks under mpirun, where there is an MPI to build with.
    if command -v mpicc >/dev/null && cargo build --release -p longspan-cli --features cuda,mpi; then
        strip -o "$folder/longspan-mpi" target/release/longspan
    fi
    ls -l "$folder"
    ;;
run)
    export LONGSPAN_CACHE="${LONGSPAN_CACHE:-$folder/cache}" LONGSPAN_REQUIRE=cuda
    parts=${PARTS:-$(nproc)}
    rm -rf "$folder/report"
    mkdir -p "$folder/report"
    part=0
    while [ "$part" -lt "$parts" ]; do
        report=$folder/report/$part
        ("$folder/conformance" "$part/$parts" "$report.json" "$filter" >"$report.log" 2>"$report.err" || touch "$report.failed") &
        part=$((part + 1))
    done
    wait
    cat "$folder"/report/*.log
    ! ls "$folder"/report/*.failed >/dev/null 2>&1
    ;;
*)
    echo "unknown command: $command" >&2
    exit 2
    ;;
esac
