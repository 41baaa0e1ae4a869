#!/usr/bin/env bash
# Ranks as MPI processes, on Open MPI and on MPICH: lints and tests of the feature, the suite with 1, 2, 4 and 8 processes, the
# README's run, refusals, a rank that is killed in a ring step, and Ctrl-C. Prints `N passed, N failed` for the checks of its own.
#
# Needs mpicc and libclang. Debian's packages are installed where they are missing and apt can be used; otherwise the wheels
# `mpich` and `libclang` of PyPI, and then only MPICH is judged.
#
# usage: ci/mpi.sh [FOLDER for programs and logs]
set -euo pipefail
cd "$(dirname "$0")/.."

readonly out=${1:-target/mpi}
readonly input=conformance/data/minilm-layer0.safetensors
# Only the backend mpi, not optimised: generic code is compiled once for each MPI, and it is not what takes the time.
readonly build=(--release --locked -p longspan-cli --no-default-features --features mpi
    --config profile.release.package.longspan-cli.opt-level=0 --config profile.release.package.longspan-cli.debug=false)
# As root in a container, more ranks than cores, no network that is not there.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_btl_base_warn_component_unused=0 UCX_LOG_LEVEL=error
passed=0
failed=0

# install: sets `flavours`, and what building needs.
install() {
    local packages="libopenmpi-dev openmpi-bin libmpich-dev mpich libclang-dev"
    local sudo=""
    ((EUID == 0)) || sudo="sudo -n"
    if ! have_debian && command -v apt-get >/dev/null; then
        # shellcheck disable=SC2086
        { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $packages; } \
            >"$out/apt.log" 2>&1 || tail -3 "$out/apt.log"
    fi
    if have_debian; then
        flavours="openmpi mpich"
        return
    fi
    echo "MPI of Debian can't be installed: MPICH from PyPI"
    local wheels=$out/wheels
    [[ -d $wheels ]] || python3 -m pip install --quiet --target "$wheels" mpich libclang
    local root
    root=$(cd "$wheels" && pwd)
    chmod +x "$root"/bin/* 2>/dev/null || true
    export PATH=$root/bin:$PATH LD_LIBRARY_PATH=$root/lib:${LD_LIBRARY_PATH:-} LIBCLANG_PATH=$root/clang/native
    flavours="mpich"
}

have_debian() {
    command -v mpicc.openmpi >/dev/null && command -v mpicc.mpich >/dev/null && ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1
}

# tool NAME FLAVOUR: Debian's name of a program of this MPI, or its plain name.
tool() {
    command -v "$1.$2" || command -v "$1"
}

# check NAME COMMAND...: runs it and counts it.
check() {
    local name=$1 start=$SECONDS status=0
    shift
    "$@" || status=$?
    if ((status == 0)); then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf -- '-- %s: exit %d, %d s\n' "$name" "$status" "$((SECONDS - start))"
}

# says STATUS PATTERN COMMAND...: the command ends with this exit status and says so, once or more.
says() {
    local wanted=$1 pattern=$2 status=0 log=$out/log
    shift 2
    timeout 100 "$@" >"$log" 2>&1 || status=$?
    if ((status != wanted)) || ! grep -qE -- "$pattern" "$log"; then
        printf 'exit %d, wanted %d, and /%s/ in:\n' "$status" "$wanted" "$pattern"
        cat "$log"
        return 1
    fi
    grep -m1 -E -- "$pattern" "$log"
}

# rank_of PID: the rank that a launcher gave this process.
rank_of() {
    tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | sed -n 's/^\(OMPI_COMM_WORLD_RANK\|PMI_RANK\)=//p' | head -1
}

# processes PROGRAM: those that run it, the witness too.
processes() {
    local pid
    for pid in /proc/[0-9]*; do
        if [[ $(readlink "$pid/exe" 2>/dev/null) == "$1" ]]; then echo "${pid#/proc/}"; fi
    done
}

# ranks_at_work PROGRAM: waits until 4 ranks have computed for 1.5 s each; their process ids by rank.
ranks_at_work() {
    local tries pid rank ticks found
    for ((tries = 0; tries < 600; tries++)); do
        found=()
        for pid in $(processes "$1"); do
            rank=$(rank_of "$pid")
            ticks=$(awk '{ print $14 + $15 }' "/proc/$pid/stat" 2>/dev/null || echo 0)
            if [[ -n $rank ]] && ! grep -qz witness "/proc/$pid/cmdline" && ((ticks > 150)); then found[rank]=$pid; fi
        done
        if ((${#found[@]} == 4)); then
            echo "${found[@]}"
            return
        fi
        sleep 0.1
    done
    return 1
}

# interrupted SIGNAL WHO PROGRAM MPIRUN...: starts a long ring, sends the signal to rank 2 or to the launcher, and checks that the
# job ends within 30 s, with an error, and leaves no process behind; a lost rank is named.
interrupted() {
    local signal=$1 who=$2 program=$3 log=$out/log status=0 job pids start
    shift 3
    "$@" -n 4 "$program" run --backend mpi --synthetic 1,32768,4,4,64 --mask causal --layout zigzag --ring 4 --backward >"$log" 2>&1 &
    job=$!
    read -r -a pids < <(ranks_at_work "$program") || { kill -9 $job; cat "$log"; return 1; }
    start=$(date +%s%N)
    if [[ $who == rank ]]; then kill -"$signal" "${pids[2]}"; else kill -"$signal" $job; fi
    wait $job || status=$?
    printf 'exit %d after %d ms\n' "$status" $((($(date +%s%N) - start) / 1000000))
    if (($(date +%s%N) - start > 30000000000 || status == 0)); then cat "$log"; return 1; fi
    if [[ $who == rank ]] && ! grep -m1 'lost rank 2' "$log"; then cat "$log"; return 1; fi
    local tries
    for ((tries = 0; tries < 80; tries++)); do
        if [[ -z $(processes "$program") ]]; then return; fi
        sleep 0.1
    done
    echo "left behind: $(processes "$program")"
    return 1
}

# traced COMMAND...: its trace has four ranks, and an arrow for every message of the ring.
traced() {
    says 0 'Wrote what every rank did' "$@" --trace "$out/trace.json"
    python3 - "$out/trace.json" <<'END'
import json, sys
events = json.load(open(sys.argv[1]))["traceEvents"]
count = {ph: sum(e["ph"] == ph and e["name"] != "thread_name" for e in events) for ph in "Xsf"}
ranks = {e["pid"] for e in events if e["ph"] == "X"}
print(f"{count['X']} spans of ranks {sorted(ranks)}, {count['s']} messages")
sys.exit(ranks != {0, 1, 2, 3} or count["s"] < 24 or count["s"] != count["f"])
END
}

# build FLAVOUR: its program.
build() {
    MPICC=$(tool mpicc "$1")
    export MPICC
    # Its build script does not notice that MPICC names another MPI.
    cargo clean --release --locked -p mpi-sys -p mpi 2>/dev/null
    cargo build "${build[@]}" && cp target/release/longspan "$out/longspan-$1"
}

# lint FLAVOUR: lints and tests with the features that need an MPI; nothing of it takes part in the runs.
lint() {
    MPICC=$(tool mpicc "$1")
    export MPICC
    cargo clippy -q --workspace --all-features --locked --all-targets -- -D warnings
    cargo test -q --locked -p longspan-mpi --features mpi,longspan/mpi --lib
}

# beside COMMAND...: starts it beside what follows; `await` waits for it.
beside() {
    (set -e; "$@") >"$out/beside" 2>&1 &
    other=$!
}

# await: shows what the other said, and ends as it did.
await() {
    local status=0
    wait "$other" || status=$?
    cat "$out/beside"
    return $status
}

# judge FLAVOUR: everything on one MPI.
judge() {
    local flavour=$1 program n mpirun
    program=$(realpath -m "$out/longspan-$flavour")
    mpirun=$(tool mpirun "$flavour")
    for n in 1 2 4 8; do
        printf -- '-- %s: suite with %d processes\n' "$flavour" "$n"
        timeout 300 "$mpirun" -n "$n" "$program" conformance --backend mpi --json "$out/mpi-$flavour-$n.json" || failed=$((failed + 1))
    done
    check "$flavour: the README's run" says 0 'dv .* ok$' "$mpirun" -n 4 "$program" run --backend mpi --input $input --ulysses 2 --ring 2 --backward --verify
    check "$flavour: another world than the mesh" says 2 'is 4 ranks, but the job has 2 processes' "$mpirun" -n 2 "$program" run --backend mpi --input $input --ring 4
    check "$flavour: a rank that fails" says 1 'rank 1: lost rank 1 during its own' "$mpirun" -n 2 "$program" run --backend mpi --input $input --ring 2 --backward --fault panic:1
    check "$flavour: wrong results" says 3 'verification failed: out' "$mpirun" -n 2 "$program" run --backend mpi --input $input --ring 2 --backward --verify --fault wrong:1
    check "$flavour: what every rank did when" traced "$mpirun" -n 4 "$program" run --backend mpi --input $input --ring 4 --backward
    check "$flavour: a rank is killed" interrupted KILL rank "$program" "$mpirun"
    check "$flavour: Ctrl-C" interrupted INT launcher "$program" "$mpirun"
    check "$flavour: two hosts" ci/mpi_hosts.sh "$program" "$flavour"
}

mkdir -p "$out"
install
# Ranks wait for each other half of the time, so the next build and the lints run beside them.
previous=
for flavour in $flavours; do
    if [[ -z $previous ]]; then
        check "$flavour: build" build "$flavour"
    else
        beside build "$flavour"
        judge "$previous"
        check "$flavour: build, beside the last runs" await
    fi
    previous=$flavour
done
beside lint "$previous"
judge "$previous"
check "lints and tests of all features, beside the last runs" await
printf '%d passed, %d failed\n' "$passed" "$failed"
((failed == 0))
