//! Restore: snapshot -> memory (and the page server's word that it serves) -> VM -> state -> devices -> vCPUs,
//! standing still.

use super::backend::{Backend, BackendError};
use super::bases::Bases;
use super::boot::{fresh_generation, write_generation};
use super::config::{self, ConfigError, DevicePlan, MAX_VCPUS};
use super::disks::{self, RestoreDisksError};
use super::keeper::{Charge, Keeper};
use super::reset::Resets;
use super::wiring::{self, Outside, WireError};
use super::{Machine, record, start_vcpus};
use crate::devices::virtio::block::Disk;
use crate::host;
use crate::kvm::state::{Clock, VmStateError};
use crate::kvm::{self, KvmError};
use crate::memory::layout;
use crate::memory::replay::Replay;
use crate::memory::uffd::Service;
use crate::vcpu::VcpuError;
use crate::vcpu::state::{OtherTsc, StateShape, VcpuStateError};
use api_spec::devices::NetworkInterface;
use api_spec::mac::MacError;
use api_spec::snapshot::{AllowedMismatch, NetworkOverride, SnapshotLoad, VsockOverride};
use snapshot::compat::{self, Field, Mismatch, Verdict};
use snapshot::load::{LoadError, Snapshot};
use snapshot::manifest::Manifest;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vm_memory::GuestMemoryError;

/// Why a snapshot could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It does not belong on this host.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// It is of a machine that this program does not build.
    #[error(
        "the snapshot's memory of {bytes} bytes does not lie as this program lays it out; it was written by another one"
    )]
    Layout {
        /// Guest memory, in bytes.
        bytes: u64,
    },
    /// It is of a machine that this program does not build.
    #[error("the snapshot has {0} vCPUs; this program runs 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// Another host side for a device that is not there.
    #[error("vsock_override: the snapshot has no vsock device")]
    NoVsock,
    /// A device that cannot be built.
    #[error("vsock_override: {0}")]
    Vsock(ConfigError),
    /// More devices than there are places for.
    #[error("the snapshot cannot be restored: {0}")]
    Places(ConfigError),
    /// Disks.
    #[error(transparent)]
    Disks(#[from] RestoreDisksError),
    /// Another host side for an interface that is not there.
    #[error("network_overrides: the snapshot has no network interface {iface_id}; it has: {known}")]
    NoInterface {
        /// Which one.
        iface_id: String,
        /// Those that there are.
        known: String,
    },
    /// Two host sides for one interface.
    #[error("network_overrides: the network interface {0} is named twice")]
    TwoOverrides(String),
    /// Network interfaces that cannot be built.
    #[error("{at}: {source}")]
    Network {
        /// Whose they are.
        at: &'static str,
        /// What is wrong with them.
        source: ConfigError,
    },
    /// A MAC address in the snapshot that none can be.
    #[error("the snapshot's network interfaces: {0}; the snapshot was not written by this program")]
    Mac(#[from] MacError),
    /// Where memory comes from.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The page server cannot be watched.
    #[error("cannot watch the page server: {0}; limits on open files or processes may be reached (ulimit -n, -u)")]
    Guard(std::io::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU's state.
    #[error("vCPU {vcpu}: {source}")]
    VcpuState {
        /// Number of the vCPU.
        vcpu: usize,
        /// What went wrong.
        source: VcpuStateError,
    },
    /// The VM's state.
    #[error(transparent)]
    VmState(#[from] VmStateError),
    /// Devices.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Generation id.
    #[error("cannot write the generation id into guest memory: {0}")]
    Generation(GuestMemoryError),
    /// The interrupt that says so.
    #[error("cannot tell the guest of its new generation id: {0}")]
    Announce(io::Error),
    /// No randomness.
    #[error("cannot get random bytes from the kernel: {0}")]
    Random(rustix::io::Errno),
    /// What the host keeps for a vCPU.
    #[error(transparent)]
    Shape(VcpuStateError),
    /// Threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Builds a machine from a snapshot. Its vCPUs stand still. It writes the images of the disks `in_place` itself.
pub fn restore(request: &SnapshotLoad, in_place: &[String], outside: Outside) -> Result<Machine, RestoreError> {
    let backend = Backend::of(request)?;
    // A page server may have memory from where there is no file.
    let open = if backend.is_served() { snapshot::load::open_without_memory } else { snapshot::load::open };
    let snapshot = open(&request.snapshot_path)?;
    let allowed: Vec<Field> = request.allow_mismatch.iter().map(allowed_field).collect();
    check(&snapshot, &allowed)?;
    let (plan, disks) = devices(&snapshot, request, in_place)?;
    let kvm = kvm::open()?;

    let Outside { notifier, signals, .. } = &outside;
    let ending = Arc::<AtomicBool>::default();
    // All that it lies over, too, opened now: if the page server is lost, it may be looked for no more where it is.
    let lease = match snapshot.lease() {
        Err(_) if backend.is_served() => snapshot.lease_alone()?,
        lease => lease?,
    };
    let (snapshot, shares, replay_over) = (Arc::new(snapshot), backend.shares(), Arc::<AtomicBool>::default());
    let (ram, service) = backend.map(&snapshot)?;
    // Before anything touches guest memory and may have to wait.
    let keep = |service: Service| -> Result<Keeper, RestoreError> {
        service.wait_until_it_serves(&ram, signals).map_err(BackendError::from)?;
        let charge = Charge {
            snapshot: snapshot.clone(),
            policy: request.mem_backend.as_ref().and_then(|backend| backend.on_handler_loss).unwrap_or_default(),
            signals: signals.try_clone().map_err(RestoreError::Guard)?,
            notifier: notifier.clone(),
            ending: ending.clone(),
            replay_over: replay_over.clone(),
        };
        Keeper::start(service, &ram, charge).map_err(RestoreError::Guard)
    };
    let page_server = service.map(keep).transpose()?;
    let vm = kvm::create(&kvm, &ram, snapshot.manifest().machine.vcpus as u8)?;
    let state = snapshot.state();
    let other_tsc = if allowed.contains(&Field::TscKhz) { OtherTsc::Allowed } else { OtherTsc::Refused };
    for (number, (vcpu, saved)) in vm.vcpus.iter().zip(&state.vcpus).enumerate() {
        let fail = |source| RestoreError::VcpuState { vcpu: number, source };
        crate::vcpu::state::load(vcpu, &vm.fd, saved, number == 0, other_tsc).map_err(fail)?;
    }
    let clock = if request.clock_realtime { Clock::CatchesUp } else { Clock::GoesOn };
    kvm::state::load(&vm.fd, &state.vm, clock)?;
    // Guest memory may have been touched already, since KVM writes the wall clock where an MSR tells it to; the keeper and
    // the page server have been at work from the start.
    if request.new_generation {
        let id = fresh_generation().map_err(RestoreError::Random)?;
        write_generation(ram.memory(), &id).map_err(RestoreError::Generation)?;
    }
    let notifier = outside.notifier.clone();
    let devices = wiring::wire(&vm.fd, &ram, &plan, disks, Some(&state.devices), outside)?;
    // After the interrupt controllers' state, which would undo it.
    if request.new_generation {
        devices.announce_generation().map_err(RestoreError::Announce)?;
    }

    let shape = StateShape::of_host(&kvm, &vm.fd).map_err(RestoreError::Shape)?;
    let vcpus = start_vcpus(vm.vcpus, &devices.buses, &notifier)?;
    let bases = Bases::of(&snapshot);
    let mut machine = Machine {
        vcpus,
        devices,
        shape,
        vm: vm.fd,
        ram,
        page_server,
        ending,
        plan,
        bases,
        lease: Some(lease),
        replay: None,
        resets: Resets::default(),
        running: false,
        halting: false,
    };
    if request.replay_working_set && shares {
        // Last, when whatever fails takes the memory away before its page server is let go.
        let writes = request.max_private_mib.is_none();
        machine.replay = Replay::start(snapshot, &machine.ram, writes, replay_over).unwrap_or_else(|e| {
            tracing::warn!("no thread to get the pages of the working set ready: {e}");
            None
        });
    }
    Ok(machine)
}

/// Whether this program on this host can run the snapshot, going by what can be known without KVM.
fn check(snapshot: &Snapshot, allowed: &[Field]) -> Result<(), RestoreError> {
    let manifest = snapshot.manifest();
    for warning in compat::check(manifest, snapshot.state(), &host::to_compare(), allowed)? {
        // KVM knows the frequency, and is asked when it is loaded.
        if (warning.field, warning.verdict) != (Field::TscKhz, Verdict::Unknown) {
            tracing::warn!("{warning}; it is restored all the same");
        }
    }
    check_machine(manifest)
}

fn allowed_field(allowed: &AllowedMismatch) -> Field {
    match allowed {
        AllowedMismatch::Vendor => Field::Vendor,
        AllowedMismatch::CpuFeatures => Field::CpuFeatures,
        AllowedMismatch::Xsave => Field::Xsave,
        AllowedMismatch::TscKhz => Field::TscKhz,
    }
}

/// Whether the snapshot is of a machine that this program builds, on whatever host.
pub fn check_machine(manifest: &Manifest) -> Result<(), RestoreError> {
    let bytes = manifest.machine.memory_bytes;
    if manifest.memory.regions != layout::ram_regions(bytes) || bytes >> 20 > layout::MAX_MIB {
        return Err(RestoreError::Layout { bytes });
    }
    if !(1..=u32::from(MAX_VCPUS)).contains(&manifest.machine.vcpus) {
        return Err(RestoreError::Vcpus(manifest.machine.vcpus));
    }
    Ok(())
}

/// The devices, and the disks behind the drives: as they were, but for what the request overrides.
fn devices(
    snapshot: &Snapshot,
    request: &SnapshotLoad,
    in_place: &[String],
) -> Result<(DevicePlan, Vec<Disk>), RestoreError> {
    let (drives, disks) = disks::restore(snapshot, request, in_place)?;
    let mut plan = DevicePlan { drives, ..record::plan(&snapshot.manifest().devices)? };
    if let Some(VsockOverride { uds_path }) = &request.vsock_override {
        plan.vsock.as_mut().ok_or(RestoreError::NoVsock)?.uds_path = uds_path.clone();
    }
    override_network(&mut plan.network, &request.network_overrides)?;
    plan.vsock.as_ref().map(config::check_vsock).transpose().map_err(RestoreError::Vsock)?;
    config::check_places(&plan).map_err(RestoreError::Places)?;
    Ok((plan, disks))
}

/// Gives network interfaces their other host sides.
fn override_network(interfaces: &mut [NetworkInterface], overrides: &[NetworkOverride]) -> Result<(), RestoreError> {
    let check = |interfaces: &[NetworkInterface], at| {
        config::check_network(interfaces).map_err(|source| RestoreError::Network { at, source })
    };
    check(interfaces, "the snapshot's network interfaces")?;
    for (i, NetworkOverride { iface_id, host_dev_name, guest_mac }) in overrides.iter().enumerate() {
        if overrides[..i].iter().any(|other| other.iface_id == *iface_id) {
            return Err(RestoreError::TwoOverrides(iface_id.clone()));
        }
        let Some(interface) = interfaces.iter_mut().find(|interface| interface.iface_id == *iface_id) else {
            let ids: Vec<&str> = interfaces.iter().map(|interface| interface.iface_id.as_str()).collect();
            let known = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            return Err(RestoreError::NoInterface { iface_id: iface_id.clone(), known });
        };
        interface.host_dev_name = host_dev_name.clone();
        interface.guest_mac = guest_mac.or(interface.guest_mac);
    }
    check(interfaces, "network_overrides")
}
