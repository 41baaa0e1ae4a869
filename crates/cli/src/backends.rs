//! Backends by name, as `--backend` takes them: `NAME` or `NAME:DEVICE[,DEVICE...]`.

use longspan::{KernelClass, Transport};

use crate::args::{Exchange, Kernel};
use crate::failure::{Failure, Result};

/// Checks that the backend that `selector` names is compiled in.
///
/// # Errors
/// [`Failure::Input`] that lists those compiled in, and how to get others.
pub fn check(selector: &str) -> Result<()> {
    let name = selector.split(':').next().unwrap_or(selector);
    let have = longspan::backends();
    if have.contains(&name) {
        return Ok(());
    }
    if name == "mpi" {
        return Err(Failure::Input(
            "this build has no MPI: build with `--features mpi`. That needs an MPI and libclang: apt install libopenmpi-dev \
             openmpi-bin libclang-dev, or pip install mpich libclang and set MPICC, LIBCLANG_PATH and LD_LIBRARY_PATH to what they \
             brought"
                .into(),
        ));
    }
    Err(Failure::Input(format!(
        "unknown backend `{name}`: this build has {}. Every other backend is a cargo feature of the crate `longspan`; \
         `longspan doctor` shows what it needs on this machine",
        have.join(", ")
    )))
}

/// Lets messages of the backend that `selector` names travel as `exchange` says, and attention run on the kernels that
/// `kernel` says; without them, as the backend would.
///
/// # Errors
/// [`Failure::Input`] where the backend has no choice, or is not on this machine.
pub fn choose(selector: &str, exchange: Option<Exchange>, kernel: Option<Kernel>) -> Result<()> {
    if let Some(exchange) = exchange {
        let wanted = match exchange {
            Exchange::Auto => Transport::Auto,
            Exchange::Nccl => Transport::Library,
            Exchange::Peer => Transport::Peer,
        };
        longspan::set_transport(selector, wanted)?;
    }
    if let Some(kernel) = kernel {
        let wanted = match kernel {
            Kernel::Auto => KernelClass::Auto,
            Kernel::Flash2 => KernelClass::Flash2,
            Kernel::Flash3 => KernelClass::Flash3,
        };
        longspan::set_kernels(selector, wanted)?;
    }
    Ok(())
}

/// One line about a backend, for people.
pub fn what(name: &str) -> &'static str {
    match name {
        "ascend" => "Huawei Ascend NPUs: attention from matmuls and small operators, with every option",
        "ascend-fused" => "the same with the fused forward where it can, refused where it can't",
        "cpu" => "ranks are threads of this process",
        "cpu-ascend-like" => "the same with Ascend's habits: no partials in bf16 and f16, blocking rendezvous",
        "cpu-checked" => "the same, and every access is checked for a missing order",
        "cpu-nccl-like" => "the same with NCCL's habits: packs what it sends, arrives late",
        "mpi" => "the CPU, with the processes of an MPI job as ranks: mpirun -n 4 longspan run --backend mpi ...",
        "cpu-push" => "the same with senders that write into the receivers' windows",
        "cuda" => {
            "NVIDIA GPUs: ranks are threads of this process or processes, on devices of their own or on shared ones"
        }
        "rocm" => "AMD GPUs: ranks are threads of this process or processes, on devices of their own or on shared ones",
        _ => "",
    }
}
