//! Makes programs of the tables of system calls.

use std::env;
use std::path::Path;

#[path = "src/sandbox/tables.rs"]
mod tables;

fn main() {
    println!("cargo:rerun-if-changed=src/sandbox/tables.rs");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let tables = [
        ("PROCESS", tables::PROCESS),
        ("REMOTE_PROCESS", tables::REMOTE_PROCESS),
        ("MEMORY", tables::MEMORY),
        ("WRITER", tables::WRITER),
    ];
    sandbox::build::write_programs(&Path::new(&out).join("filters.rs"), &tables).expect("the tables become programs");
}
