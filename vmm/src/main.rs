//! vmm.
fn main() {}
