//! Fused attention: `cargo test -p longspan-ascend --test fused`; see `suite`.

mod suite;

fn main() -> std::process::ExitCode {
    suite::main::<longspan_ascend::AscendFused>()
}
