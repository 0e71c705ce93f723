//! Builds the embedded guest, so that this program can carry it.
//!
//! The guest is a freestanding program in a workspace of its own: it is built with the same cargo and compiler for the
//! same host target, but with none of the flags and wrappers that are meant for this build.
//!
//! And makes programs of the tables of system calls.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

#[path = "src/sandbox/tables.rs"]
mod tables;

const INHERITED: [&str; 7] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET",
    "CLIPPY_ARGS",
];

fn main() {
    write_filters();
    build_guest();
}

fn write_filters() {
    println!("cargo:rerun-if-changed=src/sandbox/tables.rs");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let tables = [
        ("PROCESS", tables::PROCESS),
        ("VCPU", tables::VCPU),
        ("DEVICES", tables::DEVICES),
        ("STREAM", tables::STREAM),
        ("WRITER", tables::WRITER),
        ("MEMORY", tables::MEMORY),
        ("PEER", tables::PEER),
    ];
    sandbox::build::write_programs(&Path::new(&out).join("filters.rs"), &tables).expect("the tables become programs");
}

fn build_guest() {
    let guest = Path::new("../resources/guest");
    for source in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "linker.ld"] {
        println!("cargo:rerun-if-changed={}", guest.join(source).display());
    }
    println!("cargo:rerun-if-changed=../api-spec/src/agent.rs");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let target = Path::new(&out).join("guest");
    let mut build = Command::new(env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    build.args(["build", "--release", "--locked", "--manifest-path"]).arg(guest.join("Cargo.toml"));
    build.arg("--target-dir").arg(&target);
    for name in INHERITED {
        build.env_remove(name);
    }
    let status = build.status().expect("cannot start cargo to build the embedded guest");
    assert!(status.success(), "the embedded guest does not build: {status}");
    let elf = target.join("release").join("embedded-guest");
    fs::copy(&elf, Path::new(&out).join("embedded-guest.elf")).expect("cannot copy the embedded guest");
}
