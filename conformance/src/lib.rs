//! One suite that judges every backend.
#![forbid(unsafe_code)]
