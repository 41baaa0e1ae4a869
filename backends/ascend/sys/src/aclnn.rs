//! Tensors and scalars: `aclnn/acl_meta.h`.

use std::ffi::c_void;

use crate::table::{codes, functions};
use crate::{aclDataType, aclFormat};

codes! {
    /// What an aclnn function returned; 0 is success.
    aclnnStatus: i32 {
        /// Success.
        ACLNN_SUCCESS = 0,
    }
}

/// A list of integers. Opaque.
#[repr(C)]
#[derive(Debug)]
pub struct aclIntArray([u8; 0]);

/// An operator between its two phases. Opaque; phase 2 ends it.
#[repr(C)]
#[derive(Debug)]
pub struct aclOpExecutor([u8; 0]);

/// A number. Opaque.
#[repr(C)]
#[derive(Debug)]
pub struct aclScalar([u8; 0]);

/// A strided tensor of device memory. Opaque.
#[repr(C)]
#[derive(Debug)]
pub struct aclTensor([u8; 0]);

functions! {
    /// Objects that operators take.
    pub struct Aclnn {
        /// A list of integers.
        fn aclCreateIntArray(value: *const i64, size: u64) -> *mut aclIntArray;
        /// A number.
        fn aclCreateScalar(value: *mut c_void, dataType: aclDataType) -> *mut aclScalar;
        /// A tensor over device memory.
        fn aclCreateTensor(viewDims: *const i64, viewDimsNum: u64, dataType: aclDataType, stride: *const i64, offset: i64, format: aclFormat, storageDims: *const i64, storageDimsNum: u64, tensorData: *mut c_void) -> *mut aclTensor;
        /// Ends a list.
        fn aclDestroyIntArray(array: *const aclIntArray) -> aclnnStatus;
        /// Ends a number.
        fn aclDestroyScalar(scalar: *const aclScalar) -> aclnnStatus;
        /// Ends a tensor; only after phase 2 returned.
        fn aclDestroyTensor(tensor: *const aclTensor) -> aclnnStatus;
    }
}
