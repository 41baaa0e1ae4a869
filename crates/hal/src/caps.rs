//! What a device says of itself, for people to read.

/// Facts about an open device. For people and reports only: [`crate::Attention::supports`] alone decides
/// what runs.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Caps {
    /// The device's name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Architecture, such as `sm_90a`, `gfx942`, `x86-64+avx2+fma`.
    pub arch: String,
    /// Cores, streaming multiprocessors or compute units.
    pub units: u32,
    /// Total memory in bytes.
    pub memory_bytes: u64,
    /// Whether an exchange moves strided memory without packing it first.
    pub strided_exchange: bool,
    /// Driver, runtime and library versions, as `name version`.
    pub versions: Vec<String>,
}
