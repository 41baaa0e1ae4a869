//! `libnnopbase`: tensors, scalars, lists of integers, executors.

use std::ffi::c_void;

use crate::memory::span;
use crate::operator::Executor;
use crate::state::{Handles, code, misuse, print_counts};
use crate::tensor::{Tensor, dtype};

pub(crate) static TENSORS: Handles<Tensor> = Handles::new();
pub(crate) static SCALARS: Handles<Scalar> = Handles::new();
pub(crate) static ARRAYS: Handles<Vec<i64>> = Handles::new();
pub(crate) static EXECUTORS: Handles<Executor> = Handles::new();

/// A number: as real and as integer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar {
    pub real: f32,
    pub int: i64,
}

/// Prints all counters and live objects on standard error.
#[unsafe(no_mangle)]
pub extern "C" fn longspan_emulator_report() {
    print_counts();
    let (tensors, scalars, arrays, executors) = (TENSORS.len(), SCALARS.len(), ARRAYS.len(), EXECUTORS.len());
    eprintln!("live tensors: {tensors}, scalars: {scalars}, int arrays: {arrays}, executors: {executors}");
}

fn null<T>(text: &str) -> *mut T {
    misuse(code::NN_INVALID, text);
    std::ptr::null_mut()
}

/// Copies `n` integers from the client.
///
/// # Safety
/// `from` is null or points to `n` integers.
unsafe fn list(from: *const i64, n: u64) -> Option<Vec<i64>> {
    if from.is_null() {
        return (n == 0).then(Vec::new);
    }
    // SAFETY: by the caller.
    Some(unsafe { std::slice::from_raw_parts(from, n as usize) }.to_vec())
}

/// `acl_meta.h`.
///
/// # Safety
/// The lists have the lengths that are given.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the vendor's signature
pub unsafe extern "C" fn aclCreateTensor(
    view: *const i64,
    rank: u64,
    kind: i32,
    stride: *const i64,
    offset: i64,
    format: i32,
    storage: *const i64,
    storage_rank: u64,
    data: *mut c_void,
) -> *mut c_void {
    // SAFETY: by the caller.
    let lists = unsafe { (list(view, rank), list(stride, rank), list(storage, storage_rank)) };
    let (Some(dims), Some(strides), Some(storage)) = lists else { return null("a tensor without dims or strides") };
    let Some(size) = dtype::size(kind) else { return null("a tensor of a type that is not emulated") };
    if format != 2 || rank > 8 || offset < 0 || dims.iter().chain(&strides).chain(&storage).any(|&x| x < 0) {
        return null("a tensor of another format, of more than 8 axes, or with negative numbers");
    }
    let to_usize = |list: &[i64]| list.iter().map(|&x| x as usize).collect::<Vec<_>>();
    let (dims, strides) = (to_usize(&dims), to_usize(&strides));
    let first = (data as usize).wrapping_add(offset as usize * size);
    if dims.contains(&0) {
        return TENSORS.add(Tensor { dtype: kind, dims, strides, span: None, first });
    }
    let last: usize = dims.iter().zip(&strides).map(|(d, s)| (d - 1) * s).sum();
    let have: usize = to_usize(&storage).iter().product();
    if offset as usize + last >= have {
        return null("a tensor that ends behind its storage");
    }
    let Some(span) = span(first as *const c_void, (last + 1) * size) else {
        return null("a tensor over memory that is not allocated on the device");
    };
    TENSORS.add(Tensor { dtype: kind, dims, strides, span: Some(span), first })
}

/// `acl_meta.h`.
///
/// # Safety
/// `value` points to a value of the type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclCreateScalar(value: *mut c_void, kind: i32) -> *mut c_void {
    if value.is_null() {
        return null("a scalar without a value");
    }
    // SAFETY: by the caller.
    let scalar = unsafe {
        match kind {
            dtype::F32 => {
                let x = value.cast::<f32>().read_unaligned();
                Scalar { real: x, int: x as i64 }
            }
            dtype::I64 => {
                let x = value.cast::<i64>().read_unaligned();
                Scalar { real: x as f32, int: x }
            }
            dtype::BOOL => {
                let x = value.cast::<u8>().read();
                Scalar { real: f32::from(x), int: i64::from(x) }
            }
            _ => return null("a scalar of a type that is not emulated"),
        }
    };
    SCALARS.add(scalar)
}

/// `acl_meta.h`.
///
/// # Safety
/// `value` points to `size` integers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclCreateIntArray(value: *const i64, size: u64) -> *mut c_void {
    // SAFETY: by the caller.
    unsafe { list(value, size) }.map_or_else(|| null("an array without values"), |list| ARRAYS.add(list))
}

fn destroy<T>(handles: &Handles<T>, handle: *const c_void, what: &str) -> i32 {
    match handles.remove(handle) {
        Some(_) => code::OK,
        None => misuse(code::NN_INVALID, format!("{what} was destroyed that does not live (twice?)")),
    }
}

/// `acl_meta.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyTensor(tensor: *const c_void) -> i32 {
    destroy(&TENSORS, tensor, "a tensor")
}

/// `acl_meta.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyScalar(scalar: *const c_void) -> i32 {
    destroy(&SCALARS, scalar, "a scalar")
}

/// `acl_meta.h`.
#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyIntArray(array: *const c_void) -> i32 {
    destroy(&ARRAYS, array, "an int array")
}
