//! Basic attention: `cargo test -p longspan-ascend --test conformance`; see `suite`.

mod suite;

fn main() -> std::process::ExitCode {
    suite::main::<longspan_ascend::Ascend>()
}
