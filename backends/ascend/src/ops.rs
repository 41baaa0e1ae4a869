//! Operators on tensors: phase 1, workspace, phase 2, in one call each. Objects end when phase 2 returned.

use std::ffi::c_void;

use ascendcl_sys::{
    Aclnn, Operators, aclDataType, aclFormat, aclIntArray, aclOpExecutor, aclScalar, aclTensor, aclnnStatus,
    aclrtStream,
};
use longspan_hal::{Error, Result};

use crate::NAME;
use crate::context::check_nn;
use crate::stream::StreamState;
use crate::tensor::Tensor;

/// Queues operators on one stream, whose context is bound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ops<'a> {
    stream: &'a StreamState,
    aclnn: &'static Aclnn,
    operators: &'static Operators,
}

/// An object of the vendor that ends with this value.
struct Object<T> {
    aclnn: &'static Aclnn,
    raw: *mut T,
    end: fn(&Aclnn, *mut T),
}

impl<T> Drop for Object<T> {
    fn drop(&mut self) {
        (self.end)(self.aclnn, self.raw);
    }
}

type Phase2 = unsafe extern "C" fn(*mut c_void, u64, *mut aclOpExecutor, aclrtStream) -> aclnnStatus;

/// Precision of matmuls: keep that of the operands.
const KEEP_PRECISION: i8 = 0;

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $phase1:ident, $phase2:ident;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, a: &Tensor, out: &Tensor) -> Result<()> {
                if out.is_empty() {
                    return Ok(());
                }
                let (a, out) = (self.tensor(a)?, self.tensor(out)?);
                self.run(stringify!($phase2), self.operators.$phase2, |size, executor| {
                    // SAFETY: all objects live.
                    unsafe { (self.operators.$phase1)(a.raw, out.raw, size, executor) }
                })
            }
        )*
    };
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident = $phase1:ident, $phase2:ident;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
                if out.is_empty() {
                    return Ok(());
                }
                let (a, b, out) = (self.tensor(a)?, self.tensor(b)?, self.tensor(out)?);
                self.run(stringify!($phase2), self.operators.$phase2, |size, executor| {
                    // SAFETY: all objects live.
                    unsafe { (self.operators.$phase1)(a.raw, b.raw, out.raw, size, executor) }
                })
            }
        )*
    };
}

macro_rules! with_number {
    ($($(#[$doc:meta])* $name:ident = $phase1:ident, $phase2:ident, $type:ty;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, a: &Tensor, number: $type, out: &Tensor) -> Result<()> {
                if out.is_empty() {
                    return Ok(());
                }
                let (a, number, out) = (self.tensor(a)?, self.scalar(number)?, self.tensor(out)?);
                self.run(stringify!($phase2), self.operators.$phase2, |size, executor| {
                    // SAFETY: all objects live.
                    unsafe { (self.operators.$phase1)(a.raw, number.raw, out.raw, size, executor) }
                })
            }
        )*
    };
}

/// `sparseMode`: a band, with the compressed mask.
const BAND: i64 = 4;

/// Arguments of fused attention: dense `[heads, rows, dim]`, statistics f32 `[heads, rows, 8]`.
#[derive(Debug)]
pub(crate) struct Fused<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// For a band: the compressed mask, `preTokens` and `nextTokens`.
    pub mask: Option<(Tensor, [i64; 2])>,
    pub scale: f32,
    /// Written by the forward, read by the backward.
    pub max: &'a Tensor,
    pub sum: &'a Tensor,
}

impl Fused<'_> {
    /// `sparseMode`, `preTokens`, `nextTokens`.
    fn sparse(&self) -> (i64, [i64; 2]) {
        self.mask.as_ref().map_or((0, [i64::from(i32::MAX); 2]), |(_, tokens)| (BAND, *tokens))
    }
}

/// A number that a scalar object can hold.
pub(crate) trait Number: Copy {
    /// The vendor's type of it.
    const DTYPE: aclDataType;
}

impl Number for f32 {
    const DTYPE: aclDataType = aclDataType::ACL_FLOAT;
}

impl Number for i64 {
    const DTYPE: aclDataType = aclDataType::ACL_INT64;
}

impl<'a> Ops<'a> {
    /// Operators on `stream`.
    pub fn new(stream: &'a StreamState) -> Self {
        let api = stream.context.api;
        Self { stream, aclnn: &api.aclnn, operators: &api.operators }
    }

    unary! {
        /// `out = exp(a)`.
        exp = aclnnExpGetWorkspaceSize, aclnnExp;
        /// `out = ln(a)`.
        log = aclnnLogGetWorkspaceSize, aclnnLog;
        /// `out = tanh(a)`.
        tanh = aclnnTanhGetWorkspaceSize, aclnnTanh;
    }

    binary! {
        /// `out = a ^ b`.
        bitxor = aclnnBitwiseXorTensorGetWorkspaceSize, aclnnBitwiseXorTensor;
        /// `out = a / b`.
        div = aclnnDivGetWorkspaceSize, aclnnDiv;
        /// `out = max(a, b)`.
        maximum = aclnnMaximumGetWorkspaceSize, aclnnMaximum;
        /// `out = a * b`.
        mul = aclnnMulGetWorkspaceSize, aclnnMul;
    }

    with_number! {
        /// `out = a & number`.
        bitand = aclnnBitwiseAndScalarGetWorkspaceSize, aclnnBitwiseAndScalar, i64;
        /// `out = a < number`.
        below = aclnnLtScalarGetWorkspaceSize, aclnnLtScalar, f32;
        /// `out = a == number`, integers.
        eq = aclnnEqScalarGetWorkspaceSize, aclnnEqScalar, i64;
        /// `out = a == number`.
        equals = aclnnEqScalarGetWorkspaceSize, aclnnEqScalar, f32;
        /// `out = floor(a / number)`.
        floor_div = aclnnFloorDividesGetWorkspaceSize, aclnnFloorDivides, i64;
        /// `out = a < number`, integers.
        less = aclnnLtScalarGetWorkspaceSize, aclnnLtScalar, i64;
        /// `out = a * number`.
        scale = aclnnMulsGetWorkspaceSize, aclnnMuls, f32;
        /// `out = a * number`, integers.
        scale_int = aclnnMulsGetWorkspaceSize, aclnnMuls, i64;
    }

    /// `out = a + b`.
    pub fn add(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let alpha = if a.dtype == aclDataType::ACL_INT64 { self.scalar(1i64)? } else { self.scalar(1.0f32)? };
        let (a, b, out) = (self.tensor(a)?, self.tensor(b)?, self.tensor(out)?);
        self.run("aclnnAdd", self.operators.aclnnAdd, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnAddGetWorkspaceSize)(a.raw, b.raw, alpha.raw, out.raw, size, executor) }
        })
    }

    /// `out = a + number`.
    pub fn add_number<N: Number>(&self, a: &Tensor, number: N, one: N, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, number, one, out) = (self.tensor(a)?, self.scalar(number)?, self.scalar(one)?, self.tensor(out)?);
        self.run("aclnnAdds", self.operators.aclnnAdds, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnAddsGetWorkspaceSize)(a.raw, number.raw, one.raw, out.raw, size, executor) }
        })
    }

    /// `out = a - alpha * b`.
    pub fn sub(&self, a: &Tensor, b: &Tensor, alpha: f32, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, b, alpha, out) = (self.tensor(a)?, self.tensor(b)?, self.scalar(alpha)?, self.tensor(out)?);
        self.run("aclnnSub", self.operators.aclnnSub, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnSubGetWorkspaceSize)(a.raw, b.raw, alpha.raw, out.raw, size, executor) }
        })
    }

    /// `out = max(a)` along `axis`, which is kept with size 1.
    pub fn amax(&self, a: &Tensor, axis: i64, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, axes, out) = (self.tensor(a)?, self.list(&[axis])?, self.tensor(out)?);
        self.run("aclnnAmax", self.operators.aclnnAmax, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnAmaxGetWorkspaceSize)(a.raw, axes.raw, true, out.raw, size, executor) }
        })
    }

    /// `out = sum(a)` along `axis`, which is kept with size 1.
    pub fn sum(&self, a: &Tensor, axis: i64, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, axes, out) = (self.tensor(a)?, self.list(&[axis])?, self.tensor(out)?);
        let kind = aclDataType::ACL_FLOAT;
        self.run("aclnnReduceSum", self.operators.aclnnReduceSum, |size, executor| {
            // SAFETY: all objects live.
            unsafe {
                (self.operators.aclnnReduceSumGetWorkspaceSize)(a.raw, axes.raw, true, kind, out.raw, size, executor)
            }
        })
    }

    /// `out[b] = a[b] b[b]`, three axes each; `out` is dense.
    pub fn matmul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, b, out) = (self.tensor(a)?, self.tensor(b)?, self.tensor(out)?);
        self.run("aclnnBatchMatMul", self.operators.aclnnBatchMatMul, |size, executor| {
            // SAFETY: all objects live.
            unsafe {
                (self.operators.aclnnBatchMatMulGetWorkspaceSize)(a.raw, b.raw, out.raw, KEEP_PRECISION, size, executor)
            }
        })
    }

    /// `to = from`, converted to the type of `to`, with broadcasting.
    pub fn copy(&self, from: &Tensor, to: &Tensor) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let (from, to) = (self.tensor(from)?, self.tensor(to)?);
        self.run("aclnnInplaceCopy", self.operators.aclnnInplaceCopy, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnInplaceCopyGetWorkspaceSize)(to.raw, from.raw, size, executor) }
        })
    }

    /// `to = value`.
    pub fn fill<N: Number>(&self, to: &Tensor, value: N) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let (to, value) = (self.tensor(to)?, self.scalar(value)?);
        self.run("aclnnInplaceFillScalar", self.operators.aclnnInplaceFillScalar, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnInplaceFillScalarGetWorkspaceSize)(to.raw, value.raw, size, executor) }
        })
    }

    /// `to = value` where `mask`, which is dense.
    pub fn fill_where(&self, to: &Tensor, mask: &Tensor, value: f32) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let (to, mask, value) = (self.tensor(to)?, self.tensor(mask)?, self.scalar(value)?);
        self.run("aclnnInplaceMaskedFillScalar", self.operators.aclnnInplaceMaskedFillScalar, |size, executor| {
            // SAFETY: all objects live.
            unsafe {
                (self.operators.aclnnInplaceMaskedFillScalarGetWorkspaceSize)(
                    to.raw, mask.raw, value.raw, size, executor,
                )
            }
        })
    }

    /// `out = condition ? a : b`.
    pub fn choose(&self, condition: &Tensor, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (c, a, b, out) = (self.tensor(condition)?, self.tensor(a)?, self.tensor(b)?, self.tensor(out)?);
        self.run("aclnnSWhere", self.operators.aclnnSWhere, |size, executor| {
            // SAFETY: all objects live.
            unsafe { (self.operators.aclnnSWhereGetWorkspaceSize)(c.raw, a.raw, b.raw, out.raw, size, executor) }
        })
    }

    /// Fused attention.
    pub fn fused(&self, call: &Fused<'_>, out: &Tensor) -> Result<()> {
        let mut layout = *b"BNSD\0";
        let (q, k, v) = (self.batched(call.q)?, self.batched(call.k)?, self.batched(call.v)?);
        let mask = call.mask.as_ref().map(|(m, _)| self.tensor(m)).transpose()?;
        let (max, sum, out) = (self.batched(call.max)?, self.batched(call.sum)?, self.batched(out)?);
        let (none, list, (mode, [before, after])) = (std::ptr::null(), std::ptr::null(), call.sparse());
        let mask = mask.as_ref().map_or(none, |m| m.raw.cast_const());
        self.run("aclnnFlashAttentionScore", self.operators.aclnnFlashAttentionScore, |size, executor| {
            // SAFETY: all objects and the layout's text live.
            unsafe {
                (self.operators.aclnnFlashAttentionScoreGetWorkspaceSize)(
                    q.raw,
                    k.raw,
                    v.raw,
                    none,
                    none,
                    none,
                    mask,
                    list,
                    f64::from(call.scale),
                    1.0,
                    before,
                    after,
                    call.q.dims[0],
                    layout.as_mut_ptr().cast(),
                    0,
                    mode,
                    max.raw,
                    sum.raw,
                    none,
                    out.raw,
                    size,
                    executor,
                )
            }
        })
    }

    /// Fused attention's gradients of q, k and v; `out` and its gradient have the shape of the output.
    pub fn fused_backward(&self, call: &Fused<'_>, [out, dy]: [&Tensor; 2], gradients: &[Tensor; 3]) -> Result<()> {
        let mut layout = *b"BNSD\0";
        let (q, k, v) = (self.batched(call.q)?, self.batched(call.k)?, self.batched(call.v)?);
        let mask = call.mask.as_ref().map(|(m, _)| self.tensor(m)).transpose()?;
        let (max, sum) = (self.batched(call.max)?, self.batched(call.sum)?);
        let (out, dy) = (self.batched(out)?, self.batched(dy)?);
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.batched(&gradients[i]));
        let (dq, dk, dv) = (dq?, dk?, dv?);
        let (none, list, (mode, [before, after])) = (std::ptr::null(), std::ptr::null(), call.sparse());
        let mask = mask.as_ref().map_or(none, |m| m.raw.cast_const());
        self.run("aclnnFlashAttentionScoreGrad", self.operators.aclnnFlashAttentionScoreGrad, |size, executor| {
            // SAFETY: all objects and the layout's text live.
            unsafe {
                (self.operators.aclnnFlashAttentionScoreGradGetWorkspaceSize)(
                    q.raw,
                    k.raw,
                    v.raw,
                    dy.raw,
                    none,
                    none,
                    none,
                    mask,
                    max.raw,
                    sum.raw,
                    none,
                    out.raw,
                    list,
                    f64::from(call.scale),
                    1.0,
                    before,
                    after,
                    call.q.dims[0],
                    layout.as_mut_ptr().cast(),
                    0,
                    mode,
                    dq.raw,
                    dk.raw,
                    dv.raw,
                    none,
                    size,
                    executor,
                )
            }
        })
    }

    /// A dense tensor with a first axis of 1.
    fn batched(&self, t: &Tensor) -> Result<Object<aclTensor>> {
        let dims: Vec<usize> = std::iter::once(1).chain(t.dims.iter().map(|&d| d as usize)).collect();
        self.tensor(&t.reshaped(&dims))
    }

    /// Both phases.
    fn run(
        &self,
        call: &'static str,
        phase2: Phase2,
        phase1: impl FnOnce(*mut u64, *mut *mut aclOpExecutor) -> aclnnStatus,
    ) -> Result<()> {
        let (mut size, mut executor) = (0, std::ptr::null_mut());
        check_nn(call, phase1(&mut size, &mut executor))?;
        self.stream.with_workspace(size, |workspace| {
            let memory = if size == 0 { 0 } else { workspace.address() };
            // SAFETY: the executor is fresh and runs once; the workspace has its size and is this stream's.
            check_nn(call, unsafe { phase2(memory as *mut c_void, size, executor, self.stream.raw()) })
        })
    }

    fn tensor(&self, t: &Tensor) -> Result<Object<aclTensor>> {
        let rank = t.dims.len() as u64;
        let storage = [t.span().max(1)];
        // SAFETY: the lists live during the call; the memory is kept by the caller until the operator ran.
        let raw = unsafe {
            (self.aclnn.aclCreateTensor)(
                t.dims.as_ptr(),
                rank,
                t.dtype,
                t.strides.as_ptr(),
                0,
                aclFormat::ACL_FORMAT_ND,
                storage.as_ptr(),
                1,
                t.address as *mut c_void,
            )
        };
        self.object("aclCreateTensor", raw, |aclnn, raw| {
            // SAFETY: created above, ended once, after phase 2.
            let _ = unsafe { (aclnn.aclDestroyTensor)(raw) };
        })
    }

    fn scalar<N: Number>(&self, mut number: N) -> Result<Object<aclScalar>> {
        // SAFETY: the value is of the type that is named, and is copied by the call.
        let raw = unsafe { (self.aclnn.aclCreateScalar)((&raw mut number).cast(), N::DTYPE) };
        self.object("aclCreateScalar", raw, |aclnn, raw| {
            // SAFETY: created above, ended once, after phase 2.
            let _ = unsafe { (aclnn.aclDestroyScalar)(raw) };
        })
    }

    fn list(&self, numbers: &[i64]) -> Result<Object<aclIntArray>> {
        // SAFETY: the list lives during the call, which copies it.
        let raw = unsafe { (self.aclnn.aclCreateIntArray)(numbers.as_ptr(), numbers.len() as u64) };
        self.object("aclCreateIntArray", raw, |aclnn, raw| {
            // SAFETY: created above, ended once, after phase 2.
            let _ = unsafe { (aclnn.aclDestroyIntArray)(raw) };
        })
    }

    fn object<T>(&self, call: &'static str, raw: *mut T, end: fn(&Aclnn, *mut T)) -> Result<Object<T>> {
        if raw.is_null() {
            let message = "it returned null: memory, dims or type are not what the library takes".to_owned();
            return Err(Error::Driver { backend: NAME, call, code: 0, message });
        }
        Ok(Object { aclnn: self.aclnn, raw, end })
    }
}
