//! Codes of the vendor that the emulator gives.

/// Success.
pub const OK: i32 = 0;
/// A wrong argument.
pub const INVALID: i32 = 100_000;
/// `aclInit` a second time.
pub const REPEAT: i32 = 100_002;
/// No context on this thread.
pub const NO_CONTEXT: i32 = 107_002;
/// A stream or event of another context.
pub const OTHER_CONTEXT: i32 = 107_003;
/// Out of device memory.
pub const MEMORY: i32 = 207_001;
/// A core met an exception: bad memory at run time.
pub const EXCEPTION: i32 = 507_015;
/// A wait on a stream ran out.
pub const SYNC_TIMEOUT: i32 = 507_046;
/// A communication task ran out of time.
pub const TASK_TIMEOUT: i32 = 507_014;
/// aclnn: a wrong argument.
pub const NN_INVALID: i32 = 161_002;
/// aclnn: a null pointer or a handle that does not live.
pub const NN_NULL: i32 = 161_001;
