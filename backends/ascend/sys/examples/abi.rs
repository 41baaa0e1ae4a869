//! Writes C++ that compares the tables of this crate with the vendor's headers: `abi runtime`,
//! `abi objects` or `abi operators`.
//!
//! Every prototype becomes a `static_assert(std::is_same_v<...>)`, every size, offset and enum value another.

use ascendcl_sys::{
    Aclnn, HCCL_LAYOUTS, Hccl, HcclDataType, HcclResult, HcclSendRecvType, Operators, Prototype, Runtime, aclDataType,
    aclError, aclFormat, aclSysParamOpt, aclrtEventRecordedStatus, aclrtMemAttr, aclrtMemMallocPolicy, aclrtMemcpyKind,
};

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("objects") => objects(),
        Some("operators") => operators(),
        _ => runtime(),
    }
}

fn runtime() {
    println!("#include <cstddef>\n#include <cstdint>\n#include <type_traits>");
    println!("#include \"acl/acl.h\"\n#include \"acl/error_codes/rt_error_codes.h\"\n#include \"hccl/hccl.h\"\n");
    [Runtime::PROTOTYPES, Hccl::PROTOTYPES].concat().iter().for_each(prototype);
    for layout in HCCL_LAYOUTS {
        println!("static_assert(sizeof({0}) == {1}, \"size of {0}\");", layout.name, layout.size);
        for (member, at) in layout.offsets {
            println!("static_assert(offsetof({0}, {member}) == {at}, \"offset of {0}::{member}\");", layout.name);
        }
    }
    let values = [
        aclDataType::VALUES,
        aclError::VALUES,
        aclFormat::VALUES,
        aclSysParamOpt::VALUES,
        aclrtEventRecordedStatus::VALUES,
        aclrtMemAttr::VALUES,
        aclrtMemMallocPolicy::VALUES,
        aclrtMemcpyKind::VALUES,
        HcclDataType::VALUES,
        HcclResult::VALUES,
        HcclSendRecvType::VALUES,
        &[
            ("ACL_EVENT_SYNC", ascendcl_sys::ACL_EVENT_SYNC as i64),
            ("ACL_EVENT_TIME_LINE", ascendcl_sys::ACL_EVENT_TIME_LINE as i64),
        ],
    ];
    for (name, number) in values.concat() {
        println!("static_assert(static_cast<long long>({name}) == {number}, \"value of {name}\");");
    }
    for name in ["aclDataType", "aclFormat", "aclrtMemcpyKind", "HcclDataType", "HcclResult", "HcclSendRecvType"] {
        println!("static_assert(sizeof({name}) == 4, \"size of {name}\");");
    }
    println!("int main() {{ return 0; }}");
}

/// The wheel has the object functions as typedefs only (`_aclCreateTensor`), which ci/ascend_abi/check.sh extracts.
fn objects() {
    println!("#include <cstdint>\n#include <type_traits>\n#include \"acl/acl.h\"\ntypedef int32_t aclnnStatus;");
    println!("#include \"typedefs.h\"");
    for p in Aclnn::PROTOTYPES {
        println!("static_assert(std::is_same_v<_{0}, {1}>, \"prototype of {0}\");", p.name, pointer(p));
    }
    println!("int main() {{ return 0; }}");
}

fn operators() {
    println!("#include <cstdint>\n#include <type_traits>\n#include \"acl/acl.h\"\n#include \"aclnn/acl_meta.h\"");
    // Written by ci/ascend_abi/check.sh: includes every header of aclnnop that declares one of these operators.
    println!("#include \"all_operators.h\"");
    [Aclnn::PROTOTYPES, Operators::PROTOTYPES].concat().iter().for_each(prototype);
    println!("int main() {{ return 0; }}");
}

fn prototype(p: &Prototype) {
    println!("static_assert(std::is_same_v<decltype(&{0}), {1}>, \"prototype of {0}\");", p.name, pointer(p));
}

fn pointer(p: &Prototype) -> String {
    let arguments: Vec<String> = p.arguments.iter().map(|a| cpp(a)).collect();
    format!("{} (*)({})", cpp(p.result), arguments.join(", "))
}

/// The C++ spelling of a Rust type.
fn cpp(rust: &str) -> String {
    let rust = rust.trim();
    if let Some(pointer) = rust.strip_prefix('*').map(str::trim) {
        let inner = |word| pointer.strip_prefix(word).map(cpp);
        return inner("const")
            .map(|t| format!("const {t}*"))
            .or_else(|| inner("mut").map(|t| format!("{t}*")))
            .unwrap_or_default();
    }
    match rust {
        "c_char" => "char",
        "c_void" => "void",
        "f32" => "float",
        "f64" => "double",
        "i8" => "int8_t",
        "i32" => "int32_t",
        "i64" => "int64_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        other => other,
    }
    .to_owned()
}
