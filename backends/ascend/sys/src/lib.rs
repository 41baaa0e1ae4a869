//! The functions of AscendCL, aclnn and HCCL that Longspan uses, and nothing else.
//!
//! Nothing is linked: [`Ascend::get`] finds the vendor's libraries when the program runs, and a missing library or symbol is
//! an error value. Types and functions carry the vendor's own names, so that the ABI gate (`ci/ascend_abi`) can compare
//! every prototype of the tables below with the vendor's headers.
//!
//! | table | library | what it is |
//! |---|---|---|
//! | [`Runtime`] | `libascendcl.so`, newer `libacl_rt.so` | devices, contexts, memory, streams, events |
//! | [`Hccl`] | `libhccl.so`, newer `libhcomm.so` | communicators |
//! | [`Aclnn`] | `libnnopbase.so`, `libopapi.so` or `libopapi_{math,nn,transformer}.so` | tensors and operators |
//!
//! `LONGSPAN_ASCEND_LIBRARY` names one shared object that holds everything (the emulator). Otherwise the libraries are looked
//! for in `lib64` of `ASCEND_HOME_PATH` and `ASCEND_TOOLKIT_HOME`, then where the loader looks.

#![allow(non_camel_case_types, non_snake_case)] // the vendor's names

mod aclnn;
mod hccl;
mod libraries;
mod operators;
mod runtime;
mod table;

pub use aclnn::*;
pub use hccl::*;
pub use libraries::{Ascend, Libraries};
pub use operators::Operators;
pub use runtime::*;
pub use table::{Layout, Prototype};
