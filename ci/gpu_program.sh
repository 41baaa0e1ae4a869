#!/usr/bin/env bash
# The program on a machine with a GPU: what is missing, wrong devices, too little memory, the kernel cache, doctor and bench. A
# line a check, exit 1 if one failed.
#
#   ci/gpu_program.sh [FOLDER] [BACKEND]     FOLDER (target/gpu) has `longspan`, as `ci/gpu.sh build` leaves it; BACKEND is cuda
#                                            (or rocm, also over the emulator)
#
# Needs neither Rust nor a toolkit; two minutes, most of them for compiling kernels. FOLDER/program has what was said.
set -uo pipefail

readonly folder=${1:-target/gpu} backend=${2:-cuda}
readonly program=$folder/longspan out=$folder/program
readonly shape=${SHAPE:-1,256,2,2,64}
readonly run=(run --backend "$backend" --synthetic "$shape" --dtype bf16 --mask causal --backward --verify)
case $backend in
cuda) libraries=(LONGSPAN_LIBCUDA LONGSPAN_LIBNVRTC LONGSPAN_LIBNCCL) ;;
rocm) libraries=(LONGSPAN_LIBAMDHIP64 LONGSPAN_LIBHIPRTC LONGSPAN_LIBRCCL) ;;
*) echo "unknown backend: $backend" >&2 && exit 2 ;;
esac
readonly emulated=${LONGSPAN_LIBAMDHIP64:+yes} nowhere=/nowhere/lib.so
unset LONGSPAN_QUIET
passed=0
failed=0
rm -rf "$out"
mkdir -p "$out"

# line NAME OK WHAT
line() {
    if [[ $2 == 0 ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-6s %-24s %s\n' "$([[ $2 == 0 ]] && echo ok || echo FAILED)" "$1" "$3"
    [[ $2 == 0 ]] || tail -n 4 "$out/$1" 2>/dev/null
}

# check NAME CODE PATTERN COMMAND...: it ends with CODE within two minutes, and says PATTERN; the line that says so is shown.
check() {
    local name=$1 wanted=$2 pattern=$3 code=0 ok=0 start=$SECONDS
    shift 3
    timeout -k 5 120 "$@" >"$out/$name" 2>&1 </dev/null || code=$?
    [[ $code == "$wanted" ]] && grep -qE "$pattern" "$out/$name" || ok=1
    line "$name" $ok "exit $code, $((SECONDS - start)) s; $(grep -m1 -oE "$pattern.*" "$out/$name" | cut -c1-110)"
}

# count PATTERN NAME...: lines that match in what was said.
count() {
    local pattern=$1
    shift
    (cd "$out" && cat -- "$@" | grep -cE "$pattern")
}

# kernels FOLDER: number of compiled kernels there; anything else counts as a thousand.
kernels() {
    find "$1" -type f | awk '/\.kernel$/ { n += 1; next } { n += 1000 } END { print n + 0 }'
}

# ---- what is missing or wrong: refused before anything runs, with the way to get it ----

check no-gpu 2 'error: .*(no .*device|has none)' \
    env CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= LONGSPAN_EMULATOR_DEVICES=0 "$program" "${run[@]}"
check no-driver 2 "is not available: $nowhere.*install" env "${libraries[0]}=$nowhere" "$program" "${run[@]}"
check no-compiler 2 "is not available: $nowhere.*install" env "${libraries[1]}=$nowhere" "$program" "${run[@]}"
check no-collectives 2 "is not available: $nowhere.*install" \
    env "${libraries[2]}=$nowhere" "$program" "${run[@]}" --ring 2 --exchange nccl
check peer-needs-none 0 'Verified' env "${libraries[2]}=$nowhere" "$program" "${run[@]}" --ring 2 --exchange peer
check wrong-device 2 'has no device 99, it has 0' "$program" run --backend "$backend:99" --synthetic "$shape"
check too-little-memory 1 'out of memory: [0-9]{13,} bytes wanted, [0-9]+ bytes free' \
    "$program" bench --backend "$backend" --heads 64 --head-dim 256 --seq 33554432

# ---- the kernel cache ----

export LONGSPAN_CACHE=$out/cache
mkdir "$LONGSPAN_CACHE"
for i in 1 2 3 4; do
    timeout -k 5 120 "$program" "${run[@]}" >"$out/at-once.$i" 2>&1 &
done
wait
made=$(kernels "$LONGSPAN_CACHE/$backend")
ok=0
[[ $(count Verified at-once.{1..4}) == 4 && $made -gt 0 && $made -lt 1000 ]] || ok=1
line at-once $ok "4 processes with one empty cache: $(count compiled at-once.{1..4}) compilations, $made files"
check found-again 0 Verified "$program" "${run[@]}"
[[ $(count 'compiled|damaged' found-again) == 0 ]]
line nothing-compiled $? "$(count compiled found-again) compilations with a full cache"

# A cut file, an empty one, and then files of a foreign kind.
ls "$LONGSPAN_CACHE/$backend"/*.kernel | head -n 1 | while read -r file; do truncate -s -1 "$file"; done
ls "$LONGSPAN_CACHE/$backend"/*.kernel | tail -n +2 | while read -r file; do echo 'not a kernel' >"$file"; done
check damaged 0 'is damaged; it is made again' "$program" "${run[@]}"
[[ $(count damaged damaged) == "$made" && $(count Verified damaged) == 1 ]]
line damaged-and-right $? "$(count 'is damaged' damaged) of $made files were damaged and made again"
check repaired 0 Verified "$program" "${run[@]}"
[[ $(count 'compiled|damaged' repaired) == 0 ]]
line all-repaired $? "$(count compiled repaired) compilations after that"

echo theirs >"$LONGSPAN_CACHE/$backend/notes.txt"
check cache-shown 0 "$backend +$made +.*$backend" "$program" cache
check cache-cleared 0 "Removed" "$program" cache --clear
[[ $(ls "$LONGSPAN_CACHE/$backend") == notes.txt ]]
line only-kernels $? "left in the folder: $(ls "$LONGSPAN_CACHE/$backend" | paste -sd' ')"

check unwritable 0 "kernels can't be kept in /dev/null" env LONGSPAN_CACHE=/dev/null "$program" "${run[@]}"
[[ $(count "can't be kept" unwritable) == 1 && $(count Verified unwritable) == 1 ]]
line warned-once $? "$(count "can't be kept" unwritable) warning, and the run is right"
# Files may have a kilobyte and no more, as on a full disk; what is said goes through a pipe. (The emulator's compiler writes files
# of its own.)
if [[ -z $emulated ]]; then
    check full-disk 0 "kernels can't be kept" \
        bash -c "set -o pipefail; (trap '' XFSZ; ulimit -f 1; exec \"\$@\" 2>&1) | cat" bash "$program" "${run[@]}"
    [[ $(ls "$LONGSPAN_CACHE/$backend") == notes.txt && $(count Verified full-disk) == 1 ]]
    line nothing-half-written $? "left in the folder: $(ls "$LONGSPAN_CACHE/$backend" | paste -sd' ')"
fi
rm "$LONGSPAN_CACHE/$backend/notes.txt"

# ---- doctor and bench ----

check doctor 0 'GPU 0 ' "$program" doctor
for what in 'driver (' 'compiler (' 'collectives (' 'GPU 0' 'kernel cache'; do
    grep -F "$what" "$out/doctor" | grep -q ' yes ' || touch "$out/doctor.missing"
done
gpus=$(count '^ *GPU [0-9]+' doctor)
((gpus < 2)) || grep -qE 'peer access +yes' "$out/doctor" || touch "$out/doctor.missing"
[[ ! -e $out/doctor.missing ]]
line doctor-complete $? "driver, compiler, collectives, $gpus GPUs, their links, cache"
sed -n '/libraries were loaded/,$p' "$out/doctor" | sed 's/^/       /' | cut -c1-180

ring=$((gpus < 2 ? 1 : 2))
check bench 0 'Wrote .*html' "$program" bench --backend "$backend" --seq "${BENCH_SEQ:-4096}" --heads 4 --head-dim 64 --ring $ring \
    --mask causal --layout zigzag --backward --packed --json "$out/bench.json" --html "$out/bench.html"
python3 - "$out/bench.json" $ring "$emulated" >"$out/bench-figures" 2>&1 <<'END'
import json, sys
report, ring, emulated = json.load(open(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
rows = report["rows"]
assert [r["packed"] for r in rows] == [False] * 3 + [True] * 3, rows
for r in rows:
    assert r["peak_bytes"] == r["predicted_bytes"] > 0, r
    assert r["flops_per_second"] > 0 and r["kernels"], r
    assert emulated or 0 < r["share_of_peak"] < 1, r
    assert ring == 1 or r["exchange_gb_s"] > 0 and r["overlap_efficiency"] > 0, r
share = lambda r: f"{r['share_of_peak'] or 0:.0%} of peak"
apart, packed = (next(r for r in rows if r["pass"] == "step" and r["packed"] == p) for p in (False, True))
print(f"step {apart['flops_per_second'] / 1e12:.1f} TFLOP/s, {share(apart)}; packed {packed['flops_per_second'] / 1e12:.1f}, {share(packed)}")
END
line bench-figures $? "$(tail -n 1 "$out/bench-figures")"

echo "$passed ok, $failed failed"
((failed == 0))
