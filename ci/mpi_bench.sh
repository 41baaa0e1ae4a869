#!/usr/bin/env bash
# Measures ranks as MPI processes: exchanges beside the library's own calls, and a ring as threads and as processes.
# The machine should be quiet: two processes that wait for each other feel every third one.
#
# usage: ci/mpi_bench.sh FLAVOUR [exchange] (openmpi or mpich, as Debian names them; exchanges alone)
set -euo pipefail
cd "$(dirname "$0")/.."

readonly flavour=$1
export MPICC=mpicc.$flavour OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
readonly out=${CARGO_TARGET_DIR:-target}/release
cargo clean --release --locked -p mpi-sys -p mpi 2>/dev/null
cargo build -q --release --locked -p longspan-mpi --features mpi,longspan/mpi --examples
"mpirun.$flavour" -n 2 "$out/examples/exchange"
[[ ${2:-} == exchange ]] && exit
for seq in 8192 16384; do
    "$out/examples/ring" threads $seq
    "mpirun.$flavour" -n 4 "$out/examples/ring" processes $seq
done
