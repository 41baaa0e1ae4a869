//! Communicators: `hccl/hccl.h` and `hccl/hccl_types.h`.

use std::ffi::{c_char, c_void};

use crate::aclrtStream;
use crate::table::{Layout, codes, functions};

/// A communicator.
pub type HcclComm = *mut c_void;

codes! {
    /// What an HCCL function returned; 0 is success.
    HcclResult: i32 {
        /// Success.
        HCCL_SUCCESS = 0,
        /// An argument is wrong.
        HCCL_E_PARA = 1,
        /// A wait ran out.
        HCCL_E_TIMEOUT = 9,
        /// A peer failed.
        HCCL_E_REMOTE = 21,
        /// Device memory is used up.
        HCCL_E_OOM = 24,
    }
}

codes! {
    /// Element types of messages; not those of tensors.
    HcclDataType: i32 {
        /// f16.
        HCCL_DATA_TYPE_FP16 = 3,
        /// f32.
        HCCL_DATA_TYPE_FP32 = 4,
        /// u8.
        HCCL_DATA_TYPE_UINT8 = 7,
        /// bf16.
        HCCL_DATA_TYPE_BFP16 = 11,
    }
}

codes! {
    /// Direction of an item.
    HcclSendRecvType: i32 {
        /// Send.
        HCCL_SEND = 0,
        /// Receive.
        HCCL_RECV = 1,
    }
}

/// What rank 0 makes and hands to all ranks.
#[repr(C)]
#[derive(Clone)]
pub struct HcclRootInfo {
    /// Opaque.
    pub internal: [c_char; 4108],
}

impl std::fmt::Debug for HcclRootInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HcclRootInfo").finish_non_exhaustive()
    }
}

/// One message of a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HcclSendRecvItem {
    /// Direction.
    pub sendRecvType: HcclSendRecvType,
    /// Device memory.
    pub buf: *mut c_void,
    /// Elements.
    pub count: u64,
    /// Element type.
    pub dataType: HcclDataType,
    /// The other rank.
    pub remoteRank: u32,
}

/// Layouts for the ABI gate.
pub const HCCL_LAYOUTS: &[Layout] = &[
    Layout { name: "HcclRootInfo", size: size_of::<HcclRootInfo>(), offsets: &[("internal", 0)] },
    Layout {
        name: "HcclSendRecvItem",
        size: size_of::<HcclSendRecvItem>(),
        offsets: &[
            ("sendRecvType", std::mem::offset_of!(HcclSendRecvItem, sendRecvType)),
            ("buf", std::mem::offset_of!(HcclSendRecvItem, buf)),
            ("count", std::mem::offset_of!(HcclSendRecvItem, count)),
            ("dataType", std::mem::offset_of!(HcclSendRecvItem, dataType)),
            ("remoteRank", std::mem::offset_of!(HcclSendRecvItem, remoteRank)),
        ],
    },
];

functions! {
    /// Communicators.
    pub struct Hccl {
        /// Queues a message from every rank to every rank. Counts and displacements are lists of `u64`, one a rank, in elements.
        fn HcclAlltoAllV(sendBuf: *const c_void, sendCounts: *const c_void, sdispls: *const c_void, sendType: HcclDataType, recvBuf: *const c_void, recvCounts: *const c_void, rdispls: *const c_void, recvType: HcclDataType, comm: HcclComm, stream: aclrtStream) -> HcclResult;
        /// Queues a barrier.
        fn HcclBarrier(comm: HcclComm, stream: aclrtStream) -> HcclResult;
        /// Queues sends and receives that run together.
        fn HcclBatchSendRecv(sendRecvInfo: *mut HcclSendRecvItem, itemNum: u32, comm: HcclComm, stream: aclrtStream) -> HcclResult;
        /// Ends a communicator.
        fn HcclCommDestroy(comm: HcclComm) -> HcclResult;
        /// Joins a communicator; blocks until all ranks have.
        fn HcclCommInitRootInfo(nRanks: u32, rootInfo: *const HcclRootInfo, rank: u32, comm: *mut HcclComm) -> HcclResult;
        /// What went wrong in queued work, if anything.
        fn HcclGetCommAsyncError(comm: HcclComm, asyncError: *mut HcclResult) -> HcclResult;
        /// Text of a result.
        fn HcclGetErrorString(code: HcclResult) -> *const c_char;
        /// A new communicator's root info.
        fn HcclGetRootInfo(rootInfo: *mut HcclRootInfo) -> HcclResult;
    }
}
