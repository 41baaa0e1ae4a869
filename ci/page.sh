#!/usr/bin/env bash
# The page of `longspan bench` in a real browser.
#
#   ci/page.sh have                  whether Chromium and its driver are here or could be installed (Debian's packages; root)
#   ci/page.sh look PROGRAM FOLDER   makes two pages with PROGRAM (a sweep and a single case) and looks at them with ci/page.py;
#                                    pages, JSON and screenshots are left in FOLDER
set -euo pipefail
cd "$(dirname "$0")"

case ${1:-} in
have)
    have() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }
    have && exit 0
    export DEBIAN_FRONTEND=noninteractive
    timeout 40 apt-get update -qq >/dev/null 2>&1 || true
    timeout 120 apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null 2>&1 || true
    have
    ;;
look)
    program=../$2
    folder=../$3
    mkdir -p "$folder"
    shape="--heads 2 --head-dim 16 --mask causal --layout zigzag --backward --packed --repeat 1"
    # shellcheck disable=SC2086 # words, not one word
    {
        "$program" bench $shape --seq 256 --sweep S,R --ring 2 --json "$folder/sweep.json" --html "$folder/sweep.html"
        "$program" bench $shape --seq 64 --ulysses 2 --json "$folder/single.json" --html "$folder/single.html"
    } >/dev/null
    python3 page.py "$folder" sweep single
    ;;
*)
    echo "usage: ci/page.sh have | look PROGRAM FOLDER" >&2
    exit 2
    ;;
esac
