//! The runtime: `acl/acl_rt.h` and `acl/acl_base.h`.

use std::ffi::{c_char, c_void};

use crate::table::{codes, functions};

/// A context: the device and the defaults that a thread works with.
pub type aclrtContext = *mut c_void;
/// An event.
pub type aclrtEvent = *mut c_void;
/// A stream.
pub type aclrtStream = *mut c_void;

codes! {
    /// What a runtime function returned; 0 is success.
    aclError: i32 {
        /// Success.
        ACL_SUCCESS = 0,
        /// An argument is wrong.
        ACL_ERROR_INVALID_PARAM = 100_000,
        /// `aclInit` was called before: success for our purpose.
        ACL_ERROR_REPEAT_INITIALIZE = 100_002,
        /// No context on this thread.
        ACL_ERROR_RT_CONTEXT_NULL = 107_002,
        /// A stream of another context.
        ACL_ERROR_RT_STREAM_CONTEXT = 107_003,
        /// Device memory is used up.
        ACL_ERROR_RT_MEMORY_ALLOCATION = 207_001,
        /// A wait on a stream ran out.
        ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507_046,
    }
}

codes! {
    /// Element types of tensors; not those of HCCL.
    aclDataType: i32 {
        /// f32.
        ACL_FLOAT = 0,
        /// f16.
        ACL_FLOAT16 = 1,
        /// i32.
        ACL_INT32 = 3,
        /// u8.
        ACL_UINT8 = 4,
        /// i64.
        ACL_INT64 = 9,
        /// f64.
        ACL_DOUBLE = 11,
        /// bool, one byte.
        ACL_BOOL = 12,
        /// bf16.
        ACL_BF16 = 27,
    }
}

codes! {
    /// Memory formats of tensors.
    aclFormat: i32 {
        /// Plain strided memory.
        ACL_FORMAT_ND = 2,
    }
}

codes! {
    /// Which memory a question is about.
    aclrtMemAttr: i32 {
        /// Device memory.
        ACL_HBM_MEM = 1,
    }
}

codes! {
    /// How device memory is laid into pages.
    aclrtMemMallocPolicy: i32 {
        /// Huge pages where they fit.
        ACL_MEM_MALLOC_HUGE_FIRST = 0,
    }
}

codes! {
    /// Direction of a copy.
    aclrtMemcpyKind: i32 {
        /// Host to device.
        ACL_MEMCPY_HOST_TO_DEVICE = 1,
        /// Device to host.
        ACL_MEMCPY_DEVICE_TO_HOST = 2,
        /// Within the device.
        ACL_MEMCPY_DEVICE_TO_DEVICE = 3,
    }
}

codes! {
    /// Whether the last record of an event has run (the deprecated `aclrtEventStatus` is the inverse).
    aclrtEventRecordedStatus: i32 {
        /// Not yet.
        ACL_EVENT_RECORDED_STATUS_NOT_READY = 0,
        /// It has.
        ACL_EVENT_RECORDED_STATUS_COMPLETE = 1,
    }
}

codes! {
    /// Options of a context.
    aclSysParamOpt: i32 {
        /// Operators give the same bits every time.
        ACL_OPT_DETERMINISTIC = 0,
    }
}

/// `ACL_EVENT_SYNC`: an event that streams can wait for.
pub const ACL_EVENT_SYNC: u32 = 1;
/// `ACL_EVENT_TIME_LINE`: an event that carries a time.
pub const ACL_EVENT_TIME_LINE: u32 = 8;

functions! {
    /// Devices, contexts, memory, streams and events.
    pub struct Runtime {
        /// Starts AscendCL in this process.
        fn aclInit(configPath: *const c_char) -> aclError;
        /// Text of this thread's last error.
        fn aclGetRecentErrMsg() -> *const c_char;
        /// Sets an option of the current context.
        fn aclrtCtxSetSysParamOpt(opt: aclSysParamOpt, value: i64) -> aclError;
        /// A new event.
        fn aclrtCreateEventExWithFlag(event: *mut aclrtEvent, flag: u32) -> aclError;
        /// A new stream.
        fn aclrtCreateStreamWithConfig(stream: *mut aclrtStream, priority: u32, flag: u32) -> aclError;
        /// Ends an event.
        fn aclrtDestroyEvent(event: aclrtEvent) -> aclError;
        /// Ends a stream.
        fn aclrtDestroyStream(stream: aclrtStream) -> aclError;
        /// Milliseconds between two events.
        fn aclrtEventElapsedTime(ms: *mut f32, startEvent: aclrtEvent, endEvent: aclrtEvent) -> aclError;
        /// Frees device memory at once.
        fn aclrtFree(devPtr: *mut c_void) -> aclError;
        /// Frees page-locked host memory.
        fn aclrtFreeHost(hostPtr: *mut c_void) -> aclError;
        /// The context of this thread.
        fn aclrtGetCurrentContext(context: *mut aclrtContext) -> aclError;
        /// Number of devices.
        fn aclrtGetDeviceCount(count: *mut u32) -> aclError;
        /// Free and total bytes of the current device.
        fn aclrtGetMemInfo(attr: aclrtMemAttr, free: *mut usize, total: *mut usize) -> aclError;
        /// Name of the chip, such as `Ascend910B2`.
        fn aclrtGetSocName() -> *const c_char;
        /// Version of the runtime.
        fn aclrtGetVersion(majorVersion: *mut i32, minorVersion: *mut i32, patchVersion: *mut i32) -> aclError;
        /// Device memory.
        fn aclrtMalloc(devPtr: *mut *mut c_void, size: usize, policy: aclrtMemMallocPolicy) -> aclError;
        /// Page-locked host memory.
        fn aclrtMallocHost(hostPtr: *mut *mut c_void, size: usize) -> aclError;
        /// Queues a copy of `height` rows of `width` bytes.
        fn aclrtMemcpy2dAsync(dst: *mut c_void, dpitch: usize, src: *const c_void, spitch: usize, width: usize, height: usize, kind: aclrtMemcpyKind, stream: aclrtStream) -> aclError;
        /// Queues a copy.
        fn aclrtMemcpyAsync(dst: *mut c_void, destMax: usize, src: *const c_void, count: usize, kind: aclrtMemcpyKind, stream: aclrtStream) -> aclError;
        /// Whether an event's last record has run.
        fn aclrtQueryEventStatus(event: aclrtEvent, status: *mut aclrtEventRecordedStatus) -> aclError;
        /// Queues a record of an event.
        fn aclrtRecordEvent(event: aclrtEvent, stream: aclrtStream) -> aclError;
        /// Makes a context this thread's.
        fn aclrtSetCurrentContext(context: aclrtContext) -> aclError;
        /// Makes a device's own context this thread's.
        fn aclrtSetDevice(deviceId: i32) -> aclError;
        /// Gives up what is queued on a stream.
        fn aclrtStreamAbort(stream: aclrtStream) -> aclError;
        /// Queues a wait for the last record of an event.
        fn aclrtStreamWaitEvent(stream: aclrtStream, event: aclrtEvent) -> aclError;
        /// Blocks until a stream is done, for at most `timeout` milliseconds.
        fn aclrtSynchronizeStreamWithTimeout(stream: aclrtStream, timeout: i32) -> aclError;
    }
}
