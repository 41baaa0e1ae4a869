//! What this machine says of itself.

use std::fs;
use std::thread::available_parallelism;

use longspan_hal::Caps;

/// Facts about the machine under this process. `strided_exchange` is the personality's.
pub(crate) fn caps(strided_exchange: bool) -> Caps {
    let mut caps = Caps::default();
    caps.name = name();
    caps.arch = arch();
    caps.units = available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    caps.memory_bytes = total_memory();
    caps.strided_exchange = strided_exchange;
    caps.versions = vec![format!("longspan-cpu {}", env!("CARGO_PKG_VERSION"))];
    caps
}

/// Name of the processor; its architecture where the system does not tell.
pub(crate) fn name() -> String {
    fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model_name(&text)).unwrap_or_else(arch)
}

/// Memory of the machine in bytes; 0 where the system does not tell.
pub(crate) fn total_memory() -> u64 {
    meminfo("MemTotal:").unwrap_or(0)
}

/// Memory that can be had now, in bytes; the largest number where the system does not tell.
pub(crate) fn free_memory() -> u64 {
    meminfo("MemAvailable:").unwrap_or(u64::MAX)
}

fn model_name(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned()).filter(|name| !name.is_empty())
}

fn meminfo(field: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn kibibytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(target_arch = "x86_64")]
fn arch() -> String {
    let found = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    join("x86-64", &found)
}

#[cfg(target_arch = "aarch64")]
fn arch() -> String {
    let found = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    join("aarch64", &found)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn arch() -> String {
    join(std::env::consts::ARCH, &[])
}

fn join(base: &str, found: &[(&str, bool)]) -> String {
    let present = found.iter().filter(|f| f.1).map(|f| f.0);
    std::iter::once(base).chain(present).collect::<Vec<_>>().join("+")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_tells_and_survives_what_it_does_not() {
        let text = "MemTotal:       16384 kB\nMemAvailable:    1024 kB\nOdd: 12\n";
        assert_eq!(kibibytes(text, "MemTotal:"), Some(16 << 20));
        assert_eq!(kibibytes(text, "MemAvailable:"), Some(1 << 20));
        assert_eq!((kibibytes(text, "Odd:"), kibibytes(text, "None:")), (None, None));
        assert_eq!(model_name("processor : 0\nmodel name\t: A: B\n"), Some("A: B".to_owned()));
        assert_eq!(model_name("processor : 0\n"), None);
    }

    #[test]
    fn this_machine_has_a_name_and_a_unit() {
        let caps = caps(true);
        assert!(!caps.name.is_empty() && !caps.arch.is_empty() && caps.units > 0 && caps.strided_exchange);
    }
}
