//! The machine: boots, snapshots and restores one microVM.
//!
//! Three paths to follow: [`machine::boot`], [`machine::snapshot`], [`machine::restore`]. The page-fault path begins at
//! [`memory::uffd`] and goes on in the `uffd-handler` crate.

pub mod api;
pub mod arch;
pub mod bench;
pub mod children;
pub mod cli;
pub mod console;
pub mod demo;
pub mod devices;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod loader;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod notice;
pub mod sandbox;
pub mod stats;
pub mod vcpu;
