#!/usr/bin/env bash
# The ABI gate: compares every C prototype, size, offset and enum value of ascendcl-sys with the vendor's headers.
#
# Where a CANN toolkit is installed (ASCEND_HOME_PATH), its own headers judge everything: runtime, HCCL, aclnn objects, operators.
# Elsewhere the headers inside the PyPI wheel torch-npu do (downloaded, not installed, never committed), which has no operators;
# without it this says so loudly and ends with 0 (LONGSPAN_REQUIRE=ascend-abi makes that a failure). test.sh tests this script.
#
# usage: ci/ascend_abi/check.sh [FOLDER]    FOLDER keeps the download (default: a temporary one)
set -euo pipefail
cd "$(dirname "$0")/../.."

wheel=torch-npu==2.14.0
work=${1:-$(mktemp -d)}
mkdir -p "$work"
[ $# -ge 1 ] || trap 'rm -rf "$work"' EXIT

skip() {
    echo "ABI GATE SKIPPED: $1" >&2
    case ",${LONGSPAN_REQUIRE:-}," in *,ascend-abi,*) exit 1 ;; esac
    exit 0
}

gate() { # NAME SOURCE: passes as it is, and fails once the arguments of one prototype are swapped
    g++ "${flags[@]}" "$2" || { echo "ABI gate: $1 differs from the vendor's headers" >&2; exit 1; }
    sed -E '0,/\(\*\)\(([^,()]+), ([^,()]+)/s//(*)(\2, \1/' "$2" > "$work/swapped.cpp"
    if g++ "${flags[@]}" "$work/swapped.cpp" 2>/dev/null; then
        echo "ABI gate: swapped arguments were not noticed in $1" >&2
        exit 1
    fi
    echo "ABI gate: $1 agrees ($(grep -c 'prototype of' "$2") prototypes, $(grep -c static_assert "$2") assertions)"
}

emit() { cargo run --quiet -p ascendcl-sys --example abi -- "$1" > "$work/$1.cpp"; }

# by_toolkit FOLDER: what the toolkit there declares.
by_toolkit() {
    local include=$1/include
    flags=(-std=c++17 -fsyntax-only -I "$work" -I "$include" -I "$include/aclnnop")
    emit runtime
    gate runtime "$work/runtime.cpp"
    emit operators
    # Every header that declares one of ours; links are followed, since toolkits have some. Without any, the compiler says which.
    grep -oE 'aclnn[A-Za-z0-9]+GetWorkspaceSize' "$work/operators.cpp" | sort -u | while read -r name; do
        grep -RlE "\b$name\(" "$include/aclnnop" | sed 's/.*/#include "&"/' || true
    done | sort -u > "$work/all_operators.h"
    gate "objects and operators" "$work/operators.cpp"
}

# by_wheel: what the wheel's headers declare.
by_wheel() {
    if ! ls "$work"/torch_npu-*.whl >/dev/null 2>&1; then
        pip download --quiet --no-deps --dest "$work" --python-version 3.11 --only-binary=:all: \
            --platform manylinux_2_28_x86_64 "$wheel" >/dev/null 2>&1 || skip "can't download the wheel $wheel"
    fi
    local include=$work/headers/torch_npu/include
    [ -d "$include" ] || python3 -m zipfile -e "$work"/torch_npu-*.whl "$work/headers" || skip "can't unpack the wheel"
    local third=$include/third_party
    flags=(-std=c++17 -fsyntax-only -I "$work" -I "$include" -I "$third/acl/inc" -I "$third/hccl/inc")
    emit runtime
    gate runtime "$work/runtime.cpp"
    # Typedefs of the object functions: everything from `typedef struct aclTensor` to the last `_aclDestroy...`.
    awk '/^typedef struct acl(OpExecutor|Tensor|Scalar|IntArray|FloatArray|BoolArray|TensorList|ScalarList) /{print}
         /^typedef acl[A-Za-z]+\* \(\*_acl|^typedef int \(\*_aclDestroy/{on=1} on{print} on&&/;/{on=0}' \
        "$third/op-plugin/op_plugin/utils/op_api_common_base.h" > "$work/typedefs.h"
    emit objects
    gate objects "$work/objects.cpp"
    echo "ABI gate: operators NOT compared, there is no CANN toolkit (ASCEND_HOME_PATH)"
}

command -v g++ >/dev/null || skip "there is no g++"
cann=${ASCEND_HOME_PATH:-${ASCEND_TOOLKIT_HOME:-}}
if [ -d "$cann/include/aclnnop" ]; then by_toolkit "$cann"; else by_wheel; fi
