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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{BytesSource, Facts, Staging};
    use crate::manifest::Devices;
    use crate::state::MachineState;
    use std::sync::atomic::AtomicBool;

    fn host(arch: &str, vendor: &str, model: u32) -> HostFacts {
        let cpu = Cpu { vendor: vendor.into(), model, ..Cpu::default() };
        HostFacts { arch: arch.into(), cpu, kernel: "6.18.0".into() }
    }

    fn made_on(host: HostFacts) -> Manifest {
        let dir = tempfile::tempdir().unwrap();
        let mut staging = Staging::begin(&dir.path().join("s")).unwrap();
        let memory = staging.write_memory(&mut BytesSource::new(&[1; 4096]), &AtomicBool::new(false)).unwrap();
        let facts =
            Facts { vmm_version: "0.1.0".into(), host, devices: Devices::default(), readiness: None, config: None };
        staging.commit(memory, facts, &MachineState::blank(1)).unwrap()
    }

    #[test]
    fn another_architecture_or_vendor_is_refused_with_both_named() {
        let manifest = made_on(host("x86_64", "AuthenticAMD", 1));
        assert_eq!(check(&manifest, &host("x86_64", "AuthenticAMD", 17)), Ok(()));
        let arch = check(&manifest, &host("aarch64", "AuthenticAMD", 1)).unwrap_err().to_string();
        assert!(arch.contains("x86_64") && arch.contains("aarch64"), "{arch}");
        let vendor = check(&manifest, &host("x86_64", "GenuineIntel", 1)).unwrap_err().to_string();
        assert!(vendor.contains("AuthenticAMD") && vendor.contains("GenuineIntel"), "{vendor}");
    }
}
