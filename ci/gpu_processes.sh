#!/usr/bin/env bash
# GPU ranks as processes, on the GPUs of this machine (one or two are enough): a line a check, exit 1 if one failed.
#
#   ci/gpu_processes.sh [FOLDER] [BACKEND] [CHECKS]
#                                              FOLDER (target/gpu) has `longspan`, as `ci/gpu.sh build` leaves it, and for
#                                              mpirun also `longspan-mpi` (features BACKEND,mpi); BACKEND is cuda (or rocm);
#                                              CHECKS is a pattern of names, such as 'killed-*'
#
# Needs neither Rust nor MPI nor a toolkit; takes a few minutes, the first of them for compiling kernels. Started as torchrun
# does: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. FOLDER/processes has what the ranks said.
set -uo pipefail

readonly folder=${1:-target/gpu} backend=${2:-cuda} checks=${3:-*}
readonly program=$folder/longspan out=$folder/processes
export LONGSPAN_CACHE=${LONGSPAN_CACHE:-$folder/cache} LONGSPAN_QUIET=1
# Smaller ones are for emulators.
readonly small=(--synthetic "${SHAPE:-1,4096,8,4,128}" --dtype bf16 --mask causal --layout zigzag --backward --verify)
passed=0
failed=0
port=$((21000 + RANDOM % 8000))
mkdir -p "$out"
# Nobody is left behind if this script is ended.
trap 'exit 143' TERM
trap 'kill $(jobs -p) 2>/dev/null' EXIT

# ranks NAME N ARGS...: N processes of the program; their exit statuses are in `status`, what rank R said in NAME.R.
ranks() {
    local name=$1 n=$2 rank
    shift 2
    port=$((port + 2))
    pids=()
    for ((rank = 0; rank < n; rank++)); do
        RANK=$rank WORLD_SIZE=$n LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            timeout -k 5 "${LIMIT:-120}" "$program" "$@" >"$out/$name.$rank" 2>&1 &
        pids[rank]=$!
    done
}

# join: waits for all; the statuses, by rank.
join() {
    local pid code
    status=""
    for pid in "${pids[@]}"; do
        code=0
        wait "$pid" || code=$?
        status="$status $code"
    done
}

# line NAME OK WHAT
line() {
    if [[ $2 == 0 ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-6s %-28s %s\n' "$([[ $2 == 0 ]] && echo ok || echo FAILED)" "$1" "$3"
}

# right NAME N ARGS...: all ranks end with 0, and the results are right.
right() {
    [[ $1 == $checks ]] || return 0
    local name=$1 n=$2 start=$SECONDS ok=0
    shift 2
    ranks "$name" "$n" run --backend "$backend" "${small[@]}" "$@"
    join
    [[ $status =~ ^(\ 0)+$ ]] && grep -q 'Verified against' "$out/$name.0" || ok=1
    line "$name" $ok "exit$status, $((SECONDS - start)) s; $(grep -hE '^ *(out|dv) ' "$out/$name.0" | tr -s ' ' | paste -sd';')"
    [[ $ok == 0 ]] || tail -n 4 "$out/$name".*
}

# refused NAME N PATTERN ARGS...: all ranks end with 2 and rank 0 says why.
refused() {
    [[ $1 == $checks ]] || return 0
    local name=$1 n=$2 pattern=$3 ok=0
    shift 3
    ranks "$name" "$n" run --backend "$backend" "${small[@]}" "$@"
    join
    [[ $status =~ ^(\ 2)+$ ]] && grep -q "$pattern" "$out/$name.0" || ok=1
    line "$name" $ok "exit$status; $(grep -hm1 error "$out/$name.0" | cut -c1-110)"
}

# suite NAME N EXCHANGE FILTER
suite() {
    [[ $1 == $checks ]] || return 0
    local name=$1 n=$2 ok=0
    LIMIT=300 ranks "$name" "$n" conformance --backend "$backend" --exchange "$3" --filter "$4" --json "$out/$name.json"
    join
    [[ $status =~ ^(\ 0)+$ ]] || ok=1
    line "$name" $ok "exit$status; $(tail -n1 "$out/$name.0")"
}

# killed NAME N EXCHANGE: a rank is killed while the devices compute; the others name it and end soon.
killed() {
    [[ $1 == $checks ]] || return 0
    local name=$1 n=$2 ok=0 rank child before during after start end
    before=$(used)
    # f32, whose kernels take their time.
    ranks "$name" "$n" run --backend "$backend" --exchange "$3" --synthetic "${LONG:-1,131072,8,8,128}" --ring "$n" --backward
    busy
    during=$(used)
    child=$(pgrep -P "${pids[1]}" | head -1)
    start=$(date +%s%N)
    [[ -n $child ]] && kill -9 "$child"
    join
    end=$(date +%s%N)
    for ((rank = 0; rank < n; rank++)); do
        [[ $rank == 1 ]] || grep -q 'lost rank 1' "$out/$name.$rank" || ok=1
    done
    [[ -n $child && ! $status =~ \ 124 && ! $status =~ ^\ 0 ]] && ((end - start < 30000000000)) || ok=1
    sleep 2
    after=$(used)
    # Memory of the killed and of the others is back: 64 MiB are less than one context.
    [[ $after == '?' ]] || ((after < before + 64)) || ok=1
    line "$name" $ok "exit$status, $(((end - start) / 1000000)) ms after the kill; MiB in use before, then, and after: $before, $during, $after"
    [[ $ok == 0 ]] || tail -n 3 "$out/$name".*
}

# busy: waits until a GPU computes, 40 s at most; without a tool that tells, KILL_AFTER s (15).
busy() {
    local tries
    command -v nvidia-smi >/dev/null || { sleep "${KILL_AFTER:-15}"; return; }
    for ((tries = 0; tries < 200; tries++)); do
        figure utilization.gpu | awk '$1 >= 90 { hot = 1 } END { exit !hot }' && break
        sleep 0.2
    done
    sleep 0.5
}

# used: MiB in use on the GPUs that ranks see.
used() {
    command -v nvidia-smi >/dev/null || { echo '?'; return; }
    figure memory.used | awk '{ all += $1 } END { print all }'
}

# figure NAME: one of each GPU that ranks see.
figure() {
    nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"} --query-gpu="$1" --format=csv,noheader,nounits
}

# by_mpi NAME N ARGS...: the same by mpirun, where there is one and the program for it.
by_mpi() {
    [[ $1 == $checks ]] || return 0
    local name=$1 n=$2 code=0
    shift 2
    if [[ ! -x $folder/longspan-mpi ]] || ! command -v mpirun >/dev/null; then
        printf 'skip   %-28s no mpirun, or no %s/longspan-mpi\n' "$name" "$folder"
        return
    fi
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 timeout -k 5 120 \
        mpirun -n "$n" "$folder/longspan-mpi" run --backend "$backend" "${small[@]}" "$@" >"$out/$name.0" 2>&1 || code=$?
    line "$name" $code "exit $code; $(grep -hE '^ *(out|dv) ' "$out/$name.0" | tr -s ' ' | paste -sd';')"
}

gpus=$("$program" doctor 2>/dev/null | grep -cE '^ *GPU [0-9]+' || true)
echo "$("$program" --version), backend $backend, $gpus GPUs, $(date -u +%F)"
right two-by-peer 2 --exchange peer --ring 2
right two-ulysses-by-peer 2 --exchange peer --ulysses 2
right four-by-peer 4 --exchange peer --ulysses 2 --ring 2
right eight-by-auto 8 --ulysses 4 --ring 2
if ((gpus > 1)); then
    right two-by-nccl 2 --exchange nccl --ring 2
    right two-ulysses-by-nccl 2 --exchange nccl --ulysses 2
    suite suite-two-by-nccl 2 nccl 'collective/*'
fi
refused more-ranks-than-devices $((gpus + 1)) 'a device for each rank' --exchange nccl --ulysses $((gpus + 1))
suite suite-two-by-peer 2 peer 'collective/*'
suite suite-four-by-peer 4 peer 'collective/*'
killed killed-by-peer 2 peer
if ((gpus > 1)); then killed killed-by-nccl 2 nccl; fi
by_mpi two-by-mpirun 2 --ring 2
echo "$passed ok, $failed failed"
((failed == 0))
