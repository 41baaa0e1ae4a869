//! One launch of a kernel of a test on the emulator, after the text of `kernels/cu/amd_attention_forward.cu`.

#![allow(clippy::undocumented_unsafe_blocks)] // every call hands over pointers that live through it

use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut};

use longspan_kernels::{Prelude, Source};
use longspan_rocm_emulator::*;

/// A kernel `name` in `text`, which takes `PARAMS(Test)`: addresses `in` and `out`.
pub struct Kernel<'a> {
    pub arch: &'a str,
    pub bf16: bool,
    pub text: &'a str,
    pub name: &'a str,
    pub waves: u32,
    pub shared: u32,
}

const PARAMS: &str = "struct Test { u64 in, out; };\n";

/// Runs it on one block; the `words` of 32 bits that it wrote.
pub fn run(kernel: &Kernel<'_>, input: &[u16], words: usize) -> Vec<u32> {
    let name = CString::new(kernel.name).expect("text");
    let code = compile(kernel, &name);
    let (mut module, mut function, mut on, mut host) = (null_mut(), null_mut(), null_mut(), null_mut());
    let lanes = if kernel.arch.starts_with("gfx9") { 64 } else { 32 };
    let (offset, at) = (size_of_val(input).next_multiple_of(16), |host: *mut c_void| host as u64);
    unsafe {
        assert_eq!(hipModuleLoadData(&mut module, code.as_ptr().cast()), 0);
        assert_eq!(hipModuleGetFunction(&mut function, module, name.as_ptr()), 0);
        assert_eq!(hipStreamCreateWithPriority(&mut on, 1, 0), 0);
        assert_eq!(hipHostMalloc(&mut host, offset + 4 * words, 1), 0);
        // Kernels read and write page-locked memory of the host directly.
        std::ptr::copy_nonoverlapping(input.as_ptr(), host.cast(), input.len());
        let mut params = [at(host), at(host) + offset as u64];
        let mut parameters = [(&raw mut params).cast::<c_void>()];
        let (threads, list) = (kernel.waves * lanes, parameters.as_mut_ptr());
        let launched = hipModuleLaunchKernel(function, 1, 1, 1, threads, 1, 1, kernel.shared, on, list, null_mut());
        assert_eq!((launched, hipStreamSynchronize(on)), (0, 0));
        let written = std::slice::from_raw_parts(host.cast::<u8>().add(offset).cast::<u32>(), words).to_vec();
        assert_eq!(hipHostFree(host), 0);
        written
    }
}

fn compile(kernel: &Kernel<'_>, name: &CString) -> Vec<u8> {
    let dtype = if kernel.bf16 { "-DIO_BF16=1" } else { "-DIO_F16=1" };
    let tile = "HEAD_DIM=16 HEAD_DIM_V=16 EXACT=1 ALIGNED=1 SOFTCAP=0 ALIBI=0 DROPOUT=0 TRANSFORM=0 PARTIAL=0 WAVES=1 M_TILES=1 \
                BLOCK_N=16 Q_IN_REGISTERS=0 V_QUADS=1 SHARED_BYTES=2048";
    let options: Vec<CString> = [format!("--offload-arch={}", kernel.arch), "-std=c++17".into(), dtype.into()]
        .into_iter()
        .chain(tile.split_whitespace().map(|d| format!("-D{d}")))
        .map(|o| CString::new(o).expect("text"))
        .collect();
    let list: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let text = Source::AMD_FORWARD.text(Prelude::Hip) + PARAMS + kernel.text;
    let source = CString::new(text).expect("text");
    let (mut program, mut bytes) = (null_mut(), 0);
    unsafe {
        assert_eq!(hiprtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()), 0);
        let status = hiprtcCompileProgram(program, list.len() as i32, list.as_ptr());
        assert_eq!(hiprtcGetProgramLogSize(program, &mut bytes), 0);
        let mut log = vec![0u8; bytes];
        assert_eq!(hiprtcGetProgramLog(program, log.as_mut_ptr().cast()), 0);
        assert_eq!(status, 0, "{}", String::from_utf8_lossy(&log));
        assert_eq!(hiprtcGetCodeSize(program, &mut bytes), 0);
        let mut code = vec![0u8; bytes];
        assert_eq!(hiprtcGetCode(program, code.as_mut_ptr().cast()), 0);
        code
    }
}
