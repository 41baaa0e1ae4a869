#!/bin/sh
# GPU checks in two halves, since a machine with a GPU needs neither Rust nor a CUDA toolkit:
#
#   ci/gpu.sh build [FOLDER]          here: builds the stripped program into FOLDER (target/gpu); needs no GPU
#   ci/gpu.sh run [FOLDER] [ARG...]   there: needs FOLDER, this script, the driver and libnvrtc (or LONGSPAN_LIBNVRTC);
#                                     runs `longspan conformance --backend cuda ARG...`
#
# Most of the first run's time goes into compiling kernels, so it is cut into parts by the cases' names, one a core. Reports
# are FOLDER/report/PART.json, messages PART.log; compiled kernels stay in FOLDER/cache. Exit 1 if a part failed. A GPU is
# required there, not hoped for: a part that finds none fails.
set -eu

command=${1:?usage: ci/gpu.sh build|run [FOLDER] [ARG...]}
folder=${2:-target/gpu}
shift "$(($# < 2 ? $# : 2))"

# Every case is in exactly one part; parts without a case are left out below.
parts() {
    for group in device stream view engine agreement; do echo "$group/*"; done
    echo "collective/*"
    for a in a b c d e f g h i j k l m n o p q r s t u v w x y z; do
        case $a in
        s) for b in a b c d e f g h i j k l m n o p q r s t u v x y z; do echo "attention/s$b*"; done ;;
        *) echo "attention/$a*" ;;
        esac
    done
    for tens in 00 01 02 03 04 05 06 07 08 09 1 2 3; do echo "attention/sweep-$tens*"; done
    for tens in 00 01 02 03 04 05 06 07 08 09 1 2 3 4 5 6 7 8 9; do echo "seqpar/pairs-0$tens*"; done
    for a in 1 2 3 4 5; do echo "seqpar/pairs-$a*"; done
    for a in a b c d e f g h i j k l m n o q r s t u v w x y z; do echo "seqpar/$a*"; done
}

case $command in
build)
    cargo build --release -p longspan-cli --features cuda
    mkdir -p "$folder"
    strip -o "$folder/longspan" target/release/longspan
    ls -l "$folder/longspan"
    ;;
run)
    LONGSPAN_CACHE=${LONGSPAN_CACHE:-$folder/cache}
    export LONGSPAN_CACHE LONGSPAN_REQUIRE=cuda
    rm -rf "$folder/report" "$folder/failed"
    mkdir -p "$folder/report"
    parts | xargs -P "$(nproc)" -I '{}' "$0" part "$folder" '{}' "$@" || true
    cat "$folder"/report/*.log
    test -n "$(ls "$folder/report")" && test ! -e "$folder/failed"
    ;;
part)
    part=$1
    shift
    name=$(echo "$part" | tr -d '*' | tr / -)
    report=$folder/report/$name
    if ! "$folder/longspan" conformance --backend cuda --filter "$part" --json "$report.json" "$@" >"$report.log" 2>&1; then
        if grep -q 'no case was selected' "$report.log"; then rm -f "$report.log" "$report.json"; else touch "$folder/failed"; fi
    fi
    ;;
*)
    echo "unknown command: $command" >&2
    exit 2
    ;;
esac
