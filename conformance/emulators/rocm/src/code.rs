//! Codes of the vendor that the emulator gives: `hipError_t`.

/// Success.
pub const OK: i32 = 0;
/// A wrong argument.
pub const INVALID: i32 = 1;
/// Out of device memory.
pub const MEMORY: i32 = 2;
/// There is no such device.
pub const DEVICE: i32 = 101;
/// Code that can't be loaded.
pub const IMAGE: i32 = 200;
/// Memory of the process's own, opened as another's.
pub const CONTEXT: i32 = 201;
/// A handle that does not live, or of another device.
pub const HANDLE: i32 = 400;
/// A name that is not there.
pub const NOT_FOUND: i32 = 500;
/// Not yet.
pub const NOT_READY: i32 = 600;
/// Bad memory at run time.
pub const EXCEPTION: i32 = 700;
/// Peer access was enabled before.
pub const PEER_ENABLED: i32 = 704;
/// Host memory is registered already.
pub const REGISTERED: i32 = 712;
/// Host memory is not registered.
pub const NOT_REGISTERED: i32 = 713;
/// A kernel failed.
pub const LAUNCH: i32 = 719;
/// A wait on a stream ran out: HIP has no such wait.
pub const SYNC_TIMEOUT: i32 = 999;

/// What a code means.
pub fn name(code: i32) -> &'static std::ffi::CStr {
    match code {
        OK => c"hipSuccess",
        INVALID => c"hipErrorInvalidValue",
        MEMORY => c"hipErrorOutOfMemory",
        DEVICE => c"hipErrorInvalidDevice",
        IMAGE => c"hipErrorInvalidImage",
        CONTEXT => c"hipErrorInvalidContext",
        HANDLE => c"hipErrorInvalidHandle",
        NOT_FOUND => c"hipErrorNotFound",
        NOT_READY => c"hipErrorNotReady",
        EXCEPTION => c"hipErrorIllegalAddress",
        PEER_ENABLED => c"hipErrorPeerAccessAlreadyEnabled",
        REGISTERED => c"hipErrorHostMemoryAlreadyRegistered",
        NOT_REGISTERED => c"hipErrorHostMemoryNotRegistered",
        LAUNCH => c"hipErrorLaunchFailure",
        _ => c"hipErrorUnknown",
    }
}
