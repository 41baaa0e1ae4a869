//! The `longspan` program.
fn main() {}
