//! Any bytes as a safetensors file: tensors that fit each other, or a refusal; never a panic, a hang, or memory for what a
//! header only claims.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use longspan_fuzz::failure::Failure;
use longspan_fuzz::file;

/// One file a process.
fn path() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| std::env::temp_dir().join(format!("longspan-fuzz-{}.safetensors", std::process::id())))
}

fuzz_target!(|bytes: &[u8]| {
    // Even: the bytes as they are. Odd: the length of the header is put right, which mutations seldom hit. The header ends at
    // the last brace.
    let Some((&how, rest)) = bytes.split_first() else { return };
    let header = rest.iter().rposition(|b| *b == b'}').map_or(rest.len(), |at| at + 1);
    let whole = if how % 2 == 0 { rest.to_vec() } else { [&(header as u64).to_le_bytes()[..], rest].concat() };
    std::fs::write(path(), &whole).expect("writable");
    match file::read(path()) {
        Ok(input) => {
            let [q, k, v] = [&input.q, &input.k, &input.v].map(|t| t.extent());
            assert_eq!((q[0], q[3], k[..3].to_vec()), (k[0], k[3], v[..3].to_vec()));
            assert_eq!(q[2] % k[2], 0);
            for tensor in [&input.q, &input.k, &input.v] {
                assert_eq!(tensor.bytes().len(), tensor.extent().iter().product::<usize>() * tensor.dtype().size());
            }
        }
        Err(failure) => assert!(matches!(failure, Failure::Input(_)), "{failure}"),
    }
});
