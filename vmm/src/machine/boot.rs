//! Boot: configuration -> memory -> VM -> devices -> kernel -> vCPUs, standing still.

use super::config::BootPlan;
use super::phases::Phases;
use super::wiring::{self, Outside, WireError};
use super::{Machine, disks, start_threads};
use crate::arch::regs::{self, RegsError};
use crate::arch::{ACPI_TABLES, RESET_CODE, RESET_VECTOR, acpi, cpuid, msrs};
use crate::devices::virtio::block::DiskError;
use crate::kvm::{self, KvmError};
use crate::loader::{self, Kernel, LoadError};
use crate::memory::layout::GENERATION_PAGE;
use crate::memory::{GuestRam, MemoryError};
use crate::vcpu::VcpuError;
use crate::vcpu::state::{StateShape, VcpuStateError};
use api_spec::mac::MacAddr;
use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Why a machine could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Boot registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// CPUID.
    #[error("KVM refused the CPUID of vCPU {vcpu}: {source}")]
    Cpuid {
        /// Number of the vCPU.
        vcpu: u8,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// What firmware would set up.
    #[error("KVM refused the boot state of vCPU {vcpu}: {source}")]
    BootState {
        /// Number of the vCPU.
        vcpu: u8,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// More CPUID leaves than KVM takes.
    #[error("this host offers more CPUID leaves than KVM takes: {0:?}")]
    CpuidSize(vmm_sys_util::fam::Error),
    /// Disks.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Devices.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// What a guest expects of firmware: ACPI tables, and code at the reset vector.
    #[error("cannot write the ACPI tables into guest memory: {0}")]
    Firmware(GuestMemoryError),
    /// Generation id.
    #[error("cannot write the generation id into guest memory: {0}")]
    Generation(GuestMemoryError),
    /// No randomness.
    #[error("cannot get random bytes from the kernel: {0}")]
    Random(rustix::io::Errno),
    /// What the host keeps for a vCPU.
    #[error(transparent)]
    Shape(#[from] VcpuStateError),
    /// Threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Builds a machine with its kernel loaded. Its vCPUs stand still. What it spends its time on is told to `phases`.
pub fn boot(plan: &BootPlan, outside: Outside, phases: &mut Phases) -> Result<Machine, BootError> {
    let mut devices_plan = plan.devices.clone();
    for interface in &mut devices_plan.network {
        if interface.guest_mac.is_none() {
            interface.guest_mac = Some(fresh_mac().map_err(BootError::Random)?);
        }
    }
    // First, since they are the user's files.
    let disks = disks::open(&plan.devices.drives)?;
    phases.end("disks");
    let kvm = kvm::open()?;
    phases.end("kvm");
    let ram = GuestRam::fresh(plan.memory_bytes)?;
    phases.end("memory");
    let vm = kvm::create(&kvm, &ram, plan.vcpus)?;
    phases.end("vm");
    let notifier = outside.notifier.clone();
    let devices = wiring::wire(&vm.fd, &ram, &devices_plan, outside)?;
    devices.insert_disks(&devices_plan.drives, disks);
    phases.end("devices");
    set_up_vcpus(&kvm, &vm.vcpus)?;
    phases.end("vcpu_state");
    write_generation(ram.memory(), &fresh_generation().map_err(BootError::Random)?).map_err(BootError::Generation)?;

    let tables = acpi::tables(ACPI_TABLES, plan.vcpus, &wiring::virtio_devices(&plan.devices));
    ram.memory().write_slice(&tables, GuestAddress(ACPI_TABLES)).map_err(BootError::Firmware)?;
    ram.memory().write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR)).map_err(BootError::Firmware)?;
    let command_line = command_line(plan, vm.vcpus.first());
    let entry = loader::load(&ram, &plan.kernel, &command_line, plan.initrd.as_deref())?;
    if let Some(boot_vcpu) = vm.vcpus.first() {
        regs::set_boot_registers(boot_vcpu, entry)?;
    }
    phases.end("kernel");

    let shape = StateShape::of_host(&kvm, &vm.fd)?;
    let threads = start_threads(vm.vcpus, &devices, &notifier)?;
    phases.end("threads");
    Ok(Machine::new(threads, devices, shape, vm.fd, ram, devices_plan))
}

/// The CPUID of each vCPU of a machine that is booted here.
pub(super) fn cpuids(kvm: &Kvm, count: u8) -> Result<Vec<CpuId>, BootError> {
    let supported = kvm::supported_cpuid(kvm)?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let of_vcpu = |number| cpuid::for_vcpu(&supported, number, count, tsc_deadline).map_err(BootError::CpuidSize);
    (0..count).map(of_vcpu).collect()
}

/// Gives each vCPU its CPUID, and what firmware would set up.
fn set_up_vcpus(kvm: &Kvm, vcpus: &[VcpuFd]) -> Result<(), BootError> {
    for (number, (vcpu, cpuid)) in (0..).zip(vcpus.iter().zip(cpuids(kvm, vcpus.len() as u8)?)) {
        vcpu.set_cpuid2(&cpuid).map_err(|source| BootError::Cpuid { vcpu: number, source })?;
        msrs::set_up(vcpu, number == 0).map_err(|source| BootError::BootState { vcpu: number, source })?;
    }
    Ok(())
}

/// The command line as configured, with what a guest that reads no ACPI cannot find out by itself: where its devices are,
/// and its generation id, which the agent of a Linux guest reads as well.
fn command_line(plan: &BootPlan, vcpu: Option<&VcpuFd>) -> String {
    let mut words = vec![plan.command_line.clone()];
    words.extend(wiring::virtio_devices(&plan.devices).iter().map(wiring::device_word));
    words.push(format!("coppice.generation={GENERATION_PAGE:#x}"));
    if plan.kernel != Kernel::Embedded {
        words.extend(root_words(plan));
    } else {
        words.push(format!("coppice.vcpus={}", plan.vcpus));
        if let Some(khz) = vcpu.and_then(|vcpu| vcpu.get_tsc_khz().ok()) {
            words.push(format!("coppice.tsc_khz={khz}"));
        }
    }
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// Where a Linux guest finds its root file system, if it is on a disk and the configured command line does not say.
fn root_words(plan: &BootPlan) -> Option<String> {
    let root = plan.devices.drives.first().filter(|drive| drive.is_root_device)?;
    if plan.command_line.split_ascii_whitespace().any(|word| word.starts_with("root=")) {
        return None;
    }
    let device = match &root.partuuid {
        Some(uuid) => format!("PARTUUID={uuid}"),
        None => "/dev/vda".to_owned(),
    };
    Some(format!("root={device} {}", if root.is_read_only { "ro" } else { "rw" }))
}

/// A generation id that no other guest has.
pub(super) fn fresh_generation() -> Result<[u8; 16], rustix::io::Errno> {
    random()
}

/// A MAC address that no other guest has.
fn fresh_mac() -> Result<MacAddr, rustix::io::Errno> {
    random().map(MacAddr::local)
}

fn random<const N: usize>() -> Result<[u8; N], rustix::io::Errno> {
    let mut bytes = [0; N];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    // Requests of up to 256 bytes are never cut short once the kernel's generator is seeded (getrandom(2)).
    debug_assert_eq!(filled, N);
    Ok(bytes)
}

/// Writes a generation id where the guest finds it. No vCPU may run.
pub(super) fn write_generation(memory: &crate::memory::GuestMemory, id: &[u8; 16]) -> Result<(), GuestMemoryError> {
    memory.write_slice(id, GuestAddress(GENERATION_PAGE))
}

#[cfg(test)]
mod tests {
    use super::super::config;
    use super::*;

    #[test]
    fn a_linux_guest_is_told_where_its_root_is() {
        let line = |args: &str, drive: serde_json::Value| {
            let config = serde_json::json!({
                "boot-source": { "kernel_image_path": "k", "boot_args": args },
                "drives": [{ "drive_id": "data", "path_on_host": "d" }, drive],
            });
            command_line(&config::plan(&serde_json::from_value(config).unwrap()).unwrap(), None)
        };
        let generation = format!("coppice.generation={GENERATION_PAGE:#x}");
        let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        let devices = format!("{devices} {generation}");
        let root = serde_json::json!({ "drive_id": "r", "path_on_host": "r", "is_root_device": true });
        let with = |field: &str, value: serde_json::Value| {
            let mut root = root.clone();
            root[field] = value;
            root
        };
        assert_eq!(line("quiet", root.clone()), format!("quiet {devices} root=/dev/vda rw"));
        assert_eq!(line("", with("is_read_only", true.into())), format!("{devices} root=/dev/vda ro"));
        assert_eq!(line("", with("partuuid", "0b-1".into())), format!("{devices} root=PARTUUID=0b-1 rw"));
        assert_eq!(line("root=/dev/vdb", root.clone()), format!("root=/dev/vdb {devices}"));
        assert_eq!(line("", with("is_root_device", false.into())), devices);
    }
}
