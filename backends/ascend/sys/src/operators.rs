//! The operators of aclnn. Each has two phases: the first sizes the workspace and makes an executor, the second queues it.

use std::ffi::{c_char, c_void};

use crate::table::functions;
use crate::{aclDataType, aclIntArray, aclOpExecutor, aclScalar, aclTensor, aclnnStatus, aclrtStream};

/// [`functions!`] for operators: `op phase1 / phase2 (arguments)`.
macro_rules! operators {
    ($(#[$doc:meta])* pub struct $Table:ident { $( $(#[$about:meta])* $phase1:ident, $phase2:ident ( $($arg:ident : $type:ty),* $(,)? ); )* }) => {
        functions! {
            $(#[$doc])*
            pub struct $Table {
                $(
                    $(#[$about])*
                    fn $phase1($($arg: $type,)* workspaceSize: *mut u64, executor: *mut *mut aclOpExecutor) -> aclnnStatus;
                    #[doc = concat!("Queues what [`Self::", stringify!($phase1), "`] made.")]
                    fn $phase2(workspace: *mut c_void, workspaceSize: u64, executor: *mut aclOpExecutor, stream: aclrtStream) -> aclnnStatus;
                )*
            }
        }
    };
}

operators! {
    /// The operators that Longspan uses. Shapes broadcast; tensors may be strided.
    pub struct Operators {
        /// `out = self + alpha * other`.
        aclnnAddGetWorkspaceSize, aclnnAdd (this: *const aclTensor, other: *const aclTensor, alpha: *const aclScalar, out: *mut aclTensor);
        /// `out = self + alpha * other`, `other` a number.
        aclnnAddsGetWorkspaceSize, aclnnAdds (this: *const aclTensor, other: *const aclScalar, alpha: *const aclScalar, out: *mut aclTensor);
        /// `out = max(self)` along `dim`.
        aclnnAmaxGetWorkspaceSize, aclnnAmax (this: *const aclTensor, dim: *const aclIntArray, keepDim: bool, out: *mut aclTensor);
        /// `out[b] = self[b] mat2[b]`.
        aclnnBatchMatMulGetWorkspaceSize, aclnnBatchMatMul (this: *const aclTensor, mat2: *const aclTensor, out: *mut aclTensor, cubeMathType: i8);
        /// `out = self & other`.
        aclnnBitwiseAndScalarGetWorkspaceSize, aclnnBitwiseAndScalar (this: *const aclTensor, other: *const aclScalar, out: *mut aclTensor);
        /// `out = self ^ other`.
        aclnnBitwiseXorTensorGetWorkspaceSize, aclnnBitwiseXorTensor (this: *const aclTensor, other: *const aclTensor, out: *mut aclTensor);
        /// `out = self / other`.
        aclnnDivGetWorkspaceSize, aclnnDiv (this: *const aclTensor, other: *const aclTensor, out: *mut aclTensor);
        /// `out = self == other`, bool.
        aclnnEqScalarGetWorkspaceSize, aclnnEqScalar (this: *const aclTensor, other: *const aclScalar, out: *mut aclTensor);
        /// `out = exp(self)`.
        aclnnExpGetWorkspaceSize, aclnnExp (this: *const aclTensor, out: *mut aclTensor);
        /// Fused attention, forward.
        aclnnFlashAttentionScoreGetWorkspaceSize, aclnnFlashAttentionScore (query: *const aclTensor, key: *const aclTensor, value: *const aclTensor, realShiftOptional: *const aclTensor, dropMaskOptional: *const aclTensor, paddingMaskOptional: *const aclTensor, attenMaskOptional: *const aclTensor, prefixOptional: *const aclIntArray, scaleValue: f64, keepProb: f64, preTokens: i64, nextTokens: i64, headNum: i64, inputLayout: *mut c_char, innerPrecise: i64, sparseMode: i64, softmaxMaxOut: *const aclTensor, softmaxSumOut: *const aclTensor, softmaxOutOut: *const aclTensor, attentionOutOut: *const aclTensor);
        /// Fused attention, backward.
        aclnnFlashAttentionScoreGradGetWorkspaceSize, aclnnFlashAttentionScoreGrad (query: *const aclTensor, keyIn: *const aclTensor, value: *const aclTensor, dy: *const aclTensor, pseShiftOptional: *const aclTensor, dropMaskOptional: *const aclTensor, paddingMaskOptional: *const aclTensor, attenMaskOptional: *const aclTensor, softmaxMaxOptional: *const aclTensor, softmaxSumOptional: *const aclTensor, softmaxInOptional: *const aclTensor, attentionInOptional: *const aclTensor, prefixOptional: *const aclIntArray, scaleValue: f64, keepProb: f64, preTokens: i64, nextTokens: i64, headNum: i64, inputLayout: *mut c_char, innerPrecise: i64, sparseMode: i64, dqOut: *const aclTensor, dkOut: *const aclTensor, dvOut: *const aclTensor, dpseOut: *const aclTensor);
        /// `out = floor(self / other)`.
        aclnnFloorDividesGetWorkspaceSize, aclnnFloorDivides (this: *const aclTensor, other: *const aclScalar, out: *mut aclTensor);
        /// `self = src`, whatever their dtypes and strides.
        aclnnInplaceCopyGetWorkspaceSize, aclnnInplaceCopy (selfRef: *mut aclTensor, src: *const aclTensor);
        /// `self = value`.
        aclnnInplaceFillScalarGetWorkspaceSize, aclnnInplaceFillScalar (selfRef: *mut aclTensor, value: *const aclScalar);
        /// `self = value` where `mask`.
        aclnnInplaceMaskedFillScalarGetWorkspaceSize, aclnnInplaceMaskedFillScalar (selfRef: *mut aclTensor, mask: *const aclTensor, value: *const aclScalar);
        /// `out = ln(self)`.
        aclnnLogGetWorkspaceSize, aclnnLog (this: *const aclTensor, out: *mut aclTensor);
        /// `out = self < other`, bool.
        aclnnLtScalarGetWorkspaceSize, aclnnLtScalar (this: *const aclTensor, other: *const aclScalar, out: *mut aclTensor);
        /// `out = max(self, other)`.
        aclnnMaximumGetWorkspaceSize, aclnnMaximum (this: *const aclTensor, other: *const aclTensor, out: *mut aclTensor);
        /// `out = self * other`.
        aclnnMulGetWorkspaceSize, aclnnMul (this: *const aclTensor, other: *const aclTensor, out: *mut aclTensor);
        /// `out = self * other`, `other` a number.
        aclnnMulsGetWorkspaceSize, aclnnMuls (this: *const aclTensor, other: *const aclScalar, out: *mut aclTensor);
        /// `out = sum(self)` along `dims`.
        aclnnReduceSumGetWorkspaceSize, aclnnReduceSum (this: *const aclTensor, dims: *const aclIntArray, keepDims: bool, dtype: aclDataType, out: *mut aclTensor);
        /// `out = condition ? self : other`.
        aclnnSWhereGetWorkspaceSize, aclnnSWhere (condition: *const aclTensor, this: *const aclTensor, other: *const aclTensor, out: *mut aclTensor);
        /// `out = self - alpha * other`.
        aclnnSubGetWorkspaceSize, aclnnSub (this: *const aclTensor, other: *const aclTensor, alpha: *const aclScalar, out: *mut aclTensor);
        /// `out = tanh(self)`.
        aclnnTanhGetWorkspaceSize, aclnnTanh (this: *const aclTensor, out: *mut aclTensor);
    }
}
