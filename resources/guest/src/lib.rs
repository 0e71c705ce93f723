//! What the embedded guest does that needs no machine: parsing, protocol state and arithmetic.
//!
//! The executable beside this library (`main.rs`) holds everything that touches hardware, and all unsafe code. Here
//! nothing does, so that a host can test it with `cargo test --lib`.
//!
//! - [`cmdline`], [`ram`]: what the boot loader says
//! - [`frames`]: agent frames out of a stream of bytes
//! - [`agent`]: a request in, an answer out
//! - [`vsock`]: virtio-vsock connections
//! - [`rng`]: random bytes that live in guest memory only

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod agent;
pub mod cmdline;
pub mod frames;
pub mod ram;
pub mod rng;
pub mod vsock;
