#!/bin/sh
# compute-sanitizer over the conformance suite, on a machine with a GPU:
#
#   ci/gpu_sanitize.sh [FOLDER] [FILTER] [SECONDS]      after `ci/gpu.sh build FOLDER`; a tool gets SECONDS
#
# Kernels are compiled without a tool first (FOLDER/cache keeps them). Then each of TOOLS runs over the suite cut into PARTS, as many
# as cores: to start a process under a tool takes as long as many cases (racecheck: 8 seconds of a core a case with 16 parts of
# 42 cases, 90 with 230 parts of 232). A line a tool: cases, errors, hazards, and the parts that were ended because the time was over, whose cases count
# as not checked. Messages are FOLDER/sanitize/TOOL.PART.log. Exit 1 unless all parts ended without an error, and no case failed that
# passes without a tool.
set -eu

folder=${1:-target/gpu}
filter=${2:-attention/*}
seconds=${3:-60}
tools=${TOOLS:-memcheck racecheck synccheck initcheck}
cores=$(nproc)
parts=${PARTS:-$cores}
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || find / -name compute-sanitizer -type f -perm -u+x 2>/dev/null | head -n 1)}
[ -x "$sanitizer" ] || { echo "compute-sanitizer not found; SANITIZER names it" >&2; exit 2; }
export LONGSPAN_CACHE="${LONGSPAN_CACHE:-$folder/cache}" LONGSPAN_REQUIRE=cuda
program=$folder/conformance work=$folder/sanitize
rm -rf "$work"
mkdir -p "$work"

# each COMMAND: for every PART of it.
each() {
    seq 0 $((parts - 1)) | xargs -P "$cores" -I PART sh -c "$1"
}

# sum NAME WORDS: of the numbers after these words in the messages of a tool.
sum() {
    cat "$work/$1".*.log 2>/dev/null | grep -o "$2 *[0-9]*" | sed 's/.*[^0-9]//' | awk '{ n += $1 } END { print n + 0 }'
}

each "'$program' PART/$parts $work/none.PART.json '$filter' >$work/none.PART.log 2>&1 || true"
known=$(sum none passed,)
echo "without a tool: $(sum none '/[0-9]*:') passed, $known failed"
bad=0
for tool in $tools; do
    end=$(($(date +%s) + seconds))
    each "left=\$(($end - \$(date +%s))); [ \$left -gt 0 ] &&
        timeout \$left '$sanitizer' --tool $tool '$program' PART/$parts $work/$tool.PART.json '$filter' >$work/$tool.PART.log 2>&1 || true"
    open=
    for part in $(seq 0 $((parts - 1))); do
        grep -q '^part' "$work/$tool.$part.log" 2>/dev/null || open="$open $part"
    done
    failed=$(sum "$tool" passed,) errors=$(sum "$tool" 'ERROR SUMMARY:') hazards=$(sum "$tool" 'hazards displayed (')
    echo "$tool: $(sum "$tool" '/[0-9]*:') passed, $failed failed, $errors errors, $hazards hazards; not ended of $parts parts:${open:- none}"
    [ "$failed" -le "$known" ] && [ "$errors$hazards$open" = 00 ] || bad=1
done
exit $bad
