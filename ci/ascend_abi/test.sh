#!/usr/bin/env bash
# Tests what check.sh does with a toolkit's headers, which no machine of ours has: a made-up toolkit whose runtime and HCCL are the
# wheel's, and whose operators are written here from our own table. It agrees; then one header at a time is spoilt, and the gate
# has to name the operator. Only a real toolkit can say that the operators are right.
#
# usage: ci/ascend_abi/test.sh FOLDER    a folder that check.sh was given, with the wheel in it
set -euo pipefail
cd "$(dirname "$0")/../.."

third=$(realpath -m "$1/headers/torch_npu/include/third_party")
[ -d "$third" ] || { echo "ABI GATE'S TEST SKIPPED: $1 has no headers of the wheel" >&2; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
include=$work/cann/include
export ASCEND_HOME_PATH=$work/cann

# headers: one for the objects, one for each operator, declarations made of our assertions.
headers() {
    rm -rf "$work/cann"
    mkdir -p "$include/aclnn" "$work/elsewhere"
    cp -r "$third/acl/inc/acl" "$third/hccl/inc/hccl" "$include"
    # The wheel's headers name each other by paths of the wheel.
    ln -s "$third" "$include/third_party"
    ln -sfn "$work/elsewhere" "$include/aclnnop"
    local declared base name
    declared=$(sed -nE 's/^static_assert\(std::is_same_v<decltype\(&([A-Za-z0-9]+)\), (.*) \(\*\)\((.*)\)>, .*/\2 \1(\3);/p' "$work/operators.cpp")
    base='#pragma once\n#include "acl/acl.h"\ntypedef int32_t aclnnStatus;\n'
    base+='typedef struct aclOpExecutor aclOpExecutor; typedef struct aclTensor aclTensor;\n'
    base+='typedef struct aclScalar aclScalar; typedef struct aclIntArray aclIntArray;\n'
    { printf "$base" && echo 'extern "C" {' && grep -E ' acl(Create|Destroy)' <<<"$declared" && echo '}'; } > "$include/aclnn/acl_meta.h"
    grep -oE 'aclnn[A-Za-z0-9]+GetWorkspaceSize' <<<"$declared" | sort -u | while read -r name; do
        name=${name%GetWorkspaceSize}
        { printf '#include "aclnn/acl_meta.h"\nextern "C" {\n' && grep -E " $name(GetWorkspaceSize)?\(" <<<"$declared" && echo '}'; } \
            > "$work/elsewhere/aclnn_$name.h"
    done
}

# spoilt WHAT PATTERN: the gate fails and says so.
spoilt() {
    if ci/ascend_abi/check.sh "$work/gate" > "$work/log" 2>&1 || ! grep -qE -- "$2" "$work/log"; then
        cat "$work/log"
        echo "ABI gate's test: $1 was not noticed" >&2
        exit 1
    fi
    echo "ABI gate's test: $1 is noticed"
}

cargo run --quiet -p ascendcl-sys --example abi -- operators > "$work/operators.cpp"
headers
ci/ascend_abi/check.sh "$work/gate"

sed -i 's/int64_t, int64_t, int64_t, char\*/int64_t, int64_t, char*, int64_t/' "$work/elsewhere/aclnn_aclnnFlashAttentionScoreGrad.h"
spoilt "an argument at another place" 'prototype of aclnnFlashAttentionScoreGradGetWorkspaceSize'
headers
rm "$work/elsewhere/aclnn_aclnnExp.h"
spoilt "an operator that is not there" 'aclnnExp.* was not declared'
headers
sed -i 's/uint64_t, aclOpExecutor\*/uint64_t*, aclOpExecutor*/' "$work/elsewhere/aclnn_aclnnMul.h"
spoilt "another second phase" 'prototype of aclnnMul'
headers
sed -i 's/aclDestroyScalar(const/aclDestroyScalar(/' "$include/aclnn/acl_meta.h"
spoilt "another object function" 'prototype of aclDestroyScalar'
headers
sed -i 's/ACL_BF16 = 27/ACL_BF16 = 28/' "$include/acl/acl_base.h" "$include"/acl/*.h "$include"/acl/*/*.h 2>/dev/null || true
spoilt "another number of a type" 'value of ACL_BF16'
