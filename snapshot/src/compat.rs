//! May a snapshot run on this host?

use crate::manifest::{Cpu, Manifest};

/// What matters about a host. Whoever has the means to ask the CPU and the kernel fills this in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Architecture, as `uname -m` names it: `x86_64`.
    pub arch: String,
    /// The CPU.
    pub cpu: Cpu,
    /// Release of the kernel, as `uname -r` prints it.
    pub kernel: String,
}

/// Why a snapshot cannot run on a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another architecture.
    #[error("the snapshot was made on {snapshot} and this host is {host}; restore it on a {snapshot} host")]
    Arch {
        /// Architecture in the snapshot.
        snapshot: String,
        /// Architecture of the host.
        host: String,
    },
    /// A CPU of another maker: its feature registers and quirks differ from what the guest has settled on.
    #[error(
        "the snapshot was made on a {snapshot} CPU and this host has {host}; restore it on a {snapshot} host, or create it anew here"
    )]
    CpuVendor {
        /// CPU vendor in the snapshot.
        snapshot: String,
        /// CPU vendor of the host.
        host: String,
    },
}

/// Checks that the snapshot can run on the host.
pub fn check(manifest: &Manifest, host: &HostFacts) -> Result<(), Mismatch> {
    if manifest.arch != host.arch {
        return Err(Mismatch::Arch { snapshot: manifest.arch.clone(), host: host.arch.clone() });
    }
    if manifest.cpu.vendor != host.cpu.vendor {
        return Err(Mismatch::CpuVendor { snapshot: manifest.cpu.vendor.clone(), host: host.cpu.vendor.clone() });
    }
    Ok(())
}
