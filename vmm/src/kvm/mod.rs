//! KVM: the system handle and the VM, made in the order that costs least.

mod slots;
pub mod state;
pub mod written;

use crate::memory::GuestRam;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::io;
use std::path::Path;

/// Where KVM is.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// Three pages below 4 GiB that old Intel processors need for real mode; nothing else may lie there.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The version of the KVM API, the same since 2007.
pub const KVM_API_VERSION: i32 = 12;

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM.
    #[error(
        "there is no {KVM_DEVICE} on this host: load the kvm_amd or kvm_intel module, or use a host that offers KVM; `vmm doctor` says more"
    )]
    Missing,
    /// There is a KVM, but not for us.
    #[error("no permission to open {KVM_DEVICE}: join its group (usually `kvm`) or run as root")]
    Forbidden,
    /// Something else.
    #[error("cannot open {KVM_DEVICE}: {0}")]
    Open(io::Error),
    /// Not the API we know.
    #[error("{KVM_DEVICE} speaks version {0} of the KVM API; this program speaks {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// The host's KVM lacks something that we cannot do without.
    #[error("this host's KVM lacks {0:?}, without which no microVM can run here; a newer kernel has it")]
    Lacks(Cap),
    /// More vCPUs than a VM may have here.
    #[error("this host's KVM gives a VM at most {most} vCPUs, and this one has {asked}; give it fewer")]
    Vcpus {
        /// How many were asked for.
        asked: u8,
        /// How many KVM gives.
        most: usize,
    },
    /// A step of making the VM failed.
    #[error("KVM refused {step}: {source}")]
    Step {
        /// Which step.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    /// Whether this host cannot run microVMs at all, as opposed to something that went wrong.
    pub fn host_cannot(&self) -> bool {
        match self {
            KvmError::Missing | KvmError::Forbidden | KvmError::ApiVersion(_) | KvmError::Lacks(_) => true,
            // The device file is there, but nothing behind it.
            KvmError::Open(e) => matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)),
            KvmError::Vcpus { .. } | KvmError::Step { .. } => false,
        }
    }

    fn step(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
        move |source| KvmError::Step { step, source }
    }
}

/// What we cannot do without.
const REQUIRED: [Cap; 9] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::UserMemory,
    Cap::ImmediateExit,
    Cap::SetTssAddr,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Pit2,
];

/// Opens KVM and checks that it has what we need.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match io::Error::from_raw_os_error(e.errno()) {
        source if source.kind() == io::ErrorKind::PermissionDenied => KvmError::Forbidden,
        _ if !Path::new(KVM_DEVICE).exists() => KvmError::Missing,
        source => KvmError::Open(source),
    })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => {}
        other => return Err(KvmError::ApiVersion(other)),
    }
    match REQUIRED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        Some(missing) => Err(KvmError::Lacks(missing)),
        None => Ok(kvm),
    }
}

/// The CPUID leaves that this host can give a guest. Slow (about 300 us): a restored guest brings its own.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::step("to list the CPUID leaves it supports"))
}

/// A VM and its vCPUs, with memory and interrupt controllers, before anything is loaded into them.
#[derive(Debug)]
pub struct Vm {
    /// The VM. Declared after the vCPUs' creation and dropped with them.
    pub fd: VmFd,
    /// The vCPUs, in order of their numbers.
    pub vcpus: Vec<VcpuFd>,
}

/// Makes a VM over `ram`.
///
/// Memory slots come first: after the interrupt controllers and the interval timer have registered themselves on KVM's
/// buses, each change of the slots waits for a grace period of several milliseconds.
pub fn create(kvm: &Kvm, ram: &GuestRam, vcpu_count: u8) -> Result<Vm, KvmError> {
    check_vcpus(vcpu_count, kvm.get_max_vcpus())?;
    let fd = kvm.create_vm().map_err(KvmError::step("to create a VM"))?;
    slots::set(&fd, ram).map_err(KvmError::step("a memory slot"))?;
    fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::step("the TSS address"))?;
    fd.create_irq_chip().map_err(KvmError::step("to create interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    fd.create_pit2(pit).map_err(KvmError::step("to create an interval timer"))?;
    let vcpus = (0..u64::from(vcpu_count))
        .map(|id| fd.create_vcpu(id).map_err(KvmError::step("to create a vCPU")))
        .collect::<Result<_, _>>()?;
    Ok(Vm { fd, vcpus })
}

/// Whether KVM gives a VM so many vCPUs.
fn check_vcpus(asked: u8, most: usize) -> Result<(), KvmError> {
    if usize::from(asked) <= most { Ok(()) } else { Err(KvmError::Vcpus { asked, most }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_vcpus_than_kvm_gives_are_refused_in_one_line() {
        check_vcpus(8, 8).unwrap();
        let refused = check_vcpus(8, 4).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "this host's KVM gives a VM at most 4 vCPUs, and this one has 8; give it fewer"
        );
        assert!(!refused.host_cannot(), "another configuration can run here");
    }
}
