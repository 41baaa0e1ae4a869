//! Exact attention over sequences that do not fit one accelerator.
#![forbid(unsafe_code)]
