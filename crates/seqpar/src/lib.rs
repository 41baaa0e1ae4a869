//! Unified sequence parallelism over the hardware layer.
#![forbid(unsafe_code)]
