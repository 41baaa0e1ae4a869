//! Unified sequence parallelism over the hardware layer.
#![forbid(unsafe_code)]

pub mod layout;
pub mod mask;
pub mod mesh;
pub mod picture;
pub mod route;
