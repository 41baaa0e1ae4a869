//! `longspan doctor`: what is on this machine, what is missing, and how to get it.
//!
//! Libraries are looked for as files, where the loader and the backends look. Those of backends in this build are also loaded,
//! to ask them for versions, devices and links, but in a process of their own: a broken library may end it or hang.

mod places;
mod probe;

use std::path::PathBuf;

use crate::args::DoctorArgs;
use crate::backends;
use crate::doctor::places::Places;
use crate::failure::Result;
use crate::report::{Table, bytes, say};

/// One thing that a backend needs.
struct Need {
    /// Name in the report.
    what: &'static str,
    /// File name without `.so`, a program, or a device file (absolute).
    kind: Kind,
    /// What the user can do.
    how: &'static str,
}

enum Kind {
    DeviceFile(&'static str),
    Library(&'static str),
    Program(&'static str),
    Variable(&'static str),
}

const ASCEND: [Need; 5] = [
    Need { what: "NPU", kind: Kind::DeviceFile("/dev/davinci0"), how: "needs an Ascend NPU and Huawei's driver" },
    Need {
        what: "ASCEND_HOME_PATH",
        kind: Kind::Variable("ASCEND_HOME_PATH"),
        how: "source set_env.sh of the CANN toolkit",
    },
    Need { what: "AscendCL", kind: Kind::Library("libascendcl"), how: "install the CANN toolkit (8 or newer)" },
    Need { what: "HCCL", kind: Kind::Library("libhccl"), how: "comes with the CANN toolkit" },
    Need { what: "operators", kind: Kind::Library("libopapi"), how: "install the CANN kernels package of your NPU" },
];

const CUDA: [Need; 4] = [
    Need { what: "GPU", kind: Kind::DeviceFile("/dev/nvidia0"), how: "needs an NVIDIA GPU" },
    Need { what: "driver", kind: Kind::Library("libcuda"), how: "install NVIDIA's driver" },
    Need {
        what: "NVRTC",
        kind: Kind::Library("libnvrtc"),
        how: "pip install nvidia-cuda-nvrtc, or install the CUDA toolkit",
    },
    Need { what: "NCCL", kind: Kind::Library("libnccl"), how: "pip install nvidia-nccl-cu13, or install libnccl2" },
];

const MPI: [Need; 4] = [
    Need { what: "launcher", kind: Kind::Program("mpirun"), how: "apt install openmpi-bin, or pip install mpich" },
    Need { what: "library", kind: Kind::Library("libmpi"), how: "apt install libopenmpi-dev, or pip install mpich" },
    Need {
        what: "compiler, to build",
        kind: Kind::Program("mpicc"),
        how: "apt install libopenmpi-dev, or pip install mpich and set MPICC",
    },
    Need {
        what: "libclang, to build",
        kind: Kind::Library("libclang"),
        how: "apt install libclang-dev, or pip install libclang and set LIBCLANG_PATH; then build with --features mpi",
    },
];

const ROCM: [Need; 4] = [
    Need { what: "GPU", kind: Kind::DeviceFile("/dev/kfd"), how: "needs an AMD GPU and the amdgpu driver" },
    Need { what: "HIP", kind: Kind::Library("libamdhip64"), how: "install ROCm's hip-runtime-amd" },
    Need { what: "hipRTC", kind: Kind::Library("libhiprtc"), how: "install ROCm's hip-runtime-amd" },
    Need { what: "RCCL", kind: Kind::Library("librccl"), how: "install ROCm's rccl" },
];

/// Prints the report.
///
/// # Errors
/// [`crate::failure::Failure::Run`] if stdout can't be written; what is missing is part of the report.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    if let Some(backend) = &args.probe {
        return probe::answer(backend);
    }
    let mut text = report(&Places::of_this_machine());
    for backend in longspan::backends().into_iter().filter(|name| !name.starts_with("cpu") && *name != "ascend-fused") {
        text.push_str(&format!("\nBackend {backend} (libraries were loaded)\n{}", probe::ask(backend)));
    }
    say(&text)
}

fn report(places: &Places) -> String {
    let mut text = format!("This machine\n{}\n", machine().render());
    text.push_str("Backends in this build\n");
    let mut table = Table::new(&["backend", "what"]);
    for name in longspan::backends() {
        table.row([name.to_owned(), backends::what(name).to_owned()]);
    }
    text.push_str(&table.render());
    text.push_str("\nLibraries of vendors (files only)\n");
    text.push_str(&libraries(places).render());
    text
}

fn libraries(places: &Places) -> Table {
    let mut table = Table::new(&["backend", "needs", "found", "where, or how to get it"]);
    for (backend, needs) in [("MPI", &MPI[..]), ("CUDA", &CUDA), ("ROCm", &ROCM), ("Ascend", &ASCEND)] {
        for (i, need) in needs.iter().enumerate() {
            let found = locate(places, &need.kind);
            let name = match need.kind {
                Kind::Library(library) => format!("{} ({library})", need.what),
                Kind::Program(program) => format!("{} ({program})", need.what),
                Kind::DeviceFile(_) | Kind::Variable(_) => need.what.to_owned(),
            };
            table.row([
                if i == 0 { backend.to_owned() } else { String::new() },
                name,
                if found.is_some() { "yes" } else { "no" }.to_owned(),
                found.unwrap_or_else(|| need.how.to_owned()),
            ]);
        }
    }
    table
}

fn locate(places: &Places, kind: &Kind) -> Option<String> {
    let shown = |path: PathBuf| path.display().to_string();
    match kind {
        Kind::DeviceFile(path) => PathBuf::from(path).exists().then(|| (*path).to_owned()),
        Kind::Library(name) => places.library(name).map(shown),
        Kind::Program(name) => places.program(name).map(shown),
        Kind::Variable(name) => std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()),
    }
}

/// The machine in one line, for reports.
pub fn machine_line() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores, {}", processor().unwrap_or_else(|| std::env::consts::ARCH.into()), features())
}

fn machine() -> Table {
    let mut table = Table::new(&["what", "value"]);
    let mut row = |what: &str, value: String| table.row([what.to_owned(), value]);
    row("system", format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH));
    row("processor", processor().unwrap_or_else(|| "unknown".into()));
    row("features", features());
    let cores = std::thread::available_parallelism().map_or_else(|_| "unknown".into(), |n| n.to_string());
    row("cores", format!("{cores} usable by this process"));
    row("memory", memory().unwrap_or_else(|| "unknown".into()));
    table
}

fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn memory() -> Option<String> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some(format!("{}, {} available", bytes(field("MemTotal:")?), bytes(field("MemAvailable:")?)))
}

/// The vector features that attention kernels care about.
#[cfg(target_arch = "x86_64")]
fn features() -> String {
    let all = [
        ("sse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("avx", std::arch::is_x86_feature_detected!("avx")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ("avx512fp16", std::arch::is_x86_feature_detected!("avx512fp16")),
    ];
    all.iter().filter(|f| f.1).map(|f| f.0).collect::<Vec<_>>().join(" ")
}

/// The vector features that attention kernels care about.
#[cfg(target_arch = "aarch64")]
fn features() -> String {
    let all = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    all.iter().filter(|f| f.1).map(|f| f.0).collect::<Vec<_>>().join(" ")
}

/// The vector features that attention kernels care about.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> String {
    "not looked for on this architecture".into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_library_is_found_with_its_place_and_a_missing_one_says_how_to_get_it() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("libnccl.so.2"), "").expect("writable");
        let places = Places { libraries: vec![folder.path().to_owned()], programs: vec![] };
        let text = report(&places);
        let line = |name: &str| text.lines().find(|l| l.contains(name)).expect("a line for each need").to_owned();
        assert!(line("(libnccl)").contains("yes"), "{text}");
        assert!(line("(libnccl)").contains("libnccl.so.2"), "{text}");
        assert!(line("(librccl)").contains("no") && line("(librccl)").contains("install ROCm's rccl"), "{text}");
        assert!(line("(mpirun)").contains("apt install openmpi-bin"), "{text}");
        assert!(line("(libclang)").contains("libclang-dev") && line("(libclang)").contains("--features mpi"), "{text}");
        for heading in ["This machine", "Backends in this build", "cores", "memory"] {
            assert!(text.contains(heading), "{heading} in {text}");
        }
    }
}
