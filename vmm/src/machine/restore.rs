//! Restore: snapshot -> shell (VM, vCPUs, devices) -> memory, and the page server's word that it serves -> state of vCPUs, VM
//! and devices. The vCPUs stand still.

use super::backend::{Backend, BackendError};
use super::bases::Bases;
use super::boot::{fresh_generation, write_generation};
use super::config::{self, ConfigError, DevicePlan, MAX_VCPUS};
use super::disks::{self, RestoreDisksError};
use super::fork::receive::ForkLoadError;
use super::keeper::{Charge, GivenUp, Keeper};
use super::phases::Phases;
use super::shell::{Misfit, Shape, Shell, ShellError};
use super::wiring::{Outside, WireError};
use super::{Machine, record};
use crate::devices::virtio::block::Disk;
use crate::host;
use crate::kvm;
use crate::kvm::state::{Clock, VmStateError};
use crate::memory::layout;
use crate::memory::replay::Replay;
use crate::memory::uffd::UffdError;
use crate::notice::Notifier;
use crate::vcpu::state::{OtherTsc, VcpuStateError};
use api_spec::devices::NetworkInterface;
use api_spec::fork::ForkServed;
use api_spec::mac::MacError;
use api_spec::snapshot::{AllowedMismatch, MemBackend, NetworkOverride, OnHandlerLoss, SnapshotLoad, VsockOverride};
use snapshot::compat::{self, Field, Mismatch, Verdict};
use snapshot::load::{Lease, LoadError, Snapshot};
use snapshot::manifest::Manifest;
use snapshot::state::{MachineState, VcpuState};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use uffd_handler::process::Signals;
use vm_memory::GuestMemoryError;

/// Why a snapshot could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What another vmm offers.
    #[error(transparent)]
    Fork(#[from] ForkLoadError),
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
    /// It does not serve.
    #[error(
        "the snapshot is not loaded: pages that this takes do not come from the page server at {path}: {reason}; see that server's \
         log, check the snapshot that it serves (vmm snapshot verify), and load again once a server has it whole"
    )]
    Unserved {
        /// Its socket.
        path: PathBuf,
        /// Why they do not.
        reason: String,
    },
    /// What it is loaded into.
    #[error(transparent)]
    Shell(#[from] ShellError),
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
}

/// A snapshot that was read and found right, and what is to become of it.
#[derive(Debug)]
pub struct Opened<'a> {
    request: &'a SnapshotLoad,
    backend: Backend<'a>,
    snapshot: Snapshot,
    allowed: Vec<Field>,
    /// All that it lies over, too, opened now: if the page server is lost, it may be looked for no more where it is.
    lease: Lease,
    shape: Shape,
    disks: Vec<Disk>,
}

/// Reads the snapshot that a request names, and looks whether it can be loaded here. The machine is to write the images of the
/// disks `in_place` itself.
pub fn open<'a>(
    request: &'a SnapshotLoad,
    in_place: &[String],
    phases: &mut Phases,
) -> Result<Opened<'a>, RestoreError> {
    let backend = Backend::of(request)?;
    // A page server may have memory from where there is no file.
    let open = if backend.is_served() { snapshot::load::open_without_memory } else { snapshot::load::open };
    let snapshot = open(&request.snapshot_path)?;
    phases.end("snapshot");
    let allowed: Vec<Field> = request.allow_mismatch.iter().map(allowed_field).collect();
    check(&snapshot, &allowed)?;
    let (devices, disks) = devices(&snapshot, request, in_place)?;
    let lease = lease(&snapshot, &backend)?;
    let machine = &snapshot.manifest().machine;
    let shape = Shape { vcpus: machine.vcpus as u8, memory_bytes: machine.memory_bytes, devices };
    phases.end("check");
    Ok(Opened { request, backend, snapshot, allowed, lease, shape, disks })
}

/// Says that a snapshot is in use, and opens all that it lies over, if that is here.
pub(super) fn lease(snapshot: &Snapshot, backend: &Backend) -> Result<Lease, RestoreError> {
    match snapshot.lease() {
        Err(_) if backend.is_served() => Ok(snapshot.lease_alone()?),
        lease => Ok(lease?),
    }
}

/// A machine that was read and found right, to be loaded into a shell.
pub trait Loadable: Sized {
    /// Whether it can be loaded into this one.
    fn fits(&self, shell: &Shell) -> Result<(), Misfit>;

    /// Builds a shell for it. `former` is one that was there and that it did not fit, if there was one.
    fn shell(&mut self, former: Option<Shape>, outside: Outside, phases: &mut Phases) -> Result<Shell, RestoreError>;

    /// Loads it into a shell that it fits. The machine's vCPUs stand still.
    fn load(
        self,
        shell: Shell,
        notifier: &Notifier,
        signals: &Signals,
        phases: &mut Phases,
    ) -> Result<Machine, RestoreError>;
}

impl Loadable for Opened<'_> {
    fn fits(&self, shell: &Shell) -> Result<(), Misfit> {
        let SnapshotLoad { vsock_override, network_overrides, .. } = self.request;
        shell.shape().fits(&self.shape, vsock_override.as_ref(), !network_overrides.is_empty())
    }

    fn shell(&mut self, _former: Option<Shape>, outside: Outside, phases: &mut Phases) -> Result<Shell, RestoreError> {
        Ok(Shell::build(self.shape.clone(), outside, phases)?)
    }

    fn load(
        self,
        shell: Shell,
        notifier: &Notifier,
        signals: &Signals,
        phases: &mut Phases,
    ) -> Result<Machine, RestoreError> {
        let Opened { request, backend, snapshot, allowed, lease, shape, disks } = self;
        let (mut machine, held, low) = shell.open(shape.devices, disks);
        let (snapshot, shares) = (Arc::new(snapshot), backend.shares());
        let policy = request.mem_backend.as_ref().and_then(|backend| backend.on_handler_loss);
        let replay_over = show(
            &mut machine,
            low,
            &snapshot,
            (backend, policy.unwrap_or_default(), false),
            notifier,
            signals,
            phases,
        )?;
        let how = HowToLoad {
            other_tsc: if allowed.contains(&Field::TscKhz) { OtherTsc::Allowed } else { OtherTsc::Refused },
            clock: if request.clock_realtime { Clock::CatchesUp } else { Clock::GoesOn },
            new_generation: request.new_generation,
        };
        let state_loaded = load_state(&machine, snapshot.state(), &held, how, phases);
        // Whatever came of it: it may have been let go because pages do not come.
        machine.page_server.as_ref().map_or(Ok(()), loaded)?;
        state_loaded?;
        machine.bases = Bases::of(&snapshot);
        machine.lease = Some(lease);
        machine.served =
            request.mem_backend.clone().filter(|_| matches!(backend, Backend::Shared(_))).and_then(|mem_backend| {
                // Whoever is told of it may live in another directory.
                let there = |path: &Path| std::path::absolute(path).ok();
                let backend_path = there(&mem_backend.backend_path)?;
                let mem_backend = MemBackend { backend_path, ..mem_backend };
                let digest = snapshot.manifest().digest.clone();
                Some(ForkServed { snapshot_path: there(snapshot.dir())?, digest, mem_backend })
            });
        if request.replay_working_set && shares {
            // Last, when whatever fails takes the memory away before its page server is let go.
            let writes = request.max_private_mib.is_none();
            machine.replay = Replay::start(snapshot, &machine.ram, writes, replay_over).unwrap_or_else(|e| {
                tracing::warn!("no thread to get the pages of the working set ready: {e}");
                None
            });
            phases.end("replay");
        }
        Ok(machine)
    }
}

/// Shows the memory of a snapshot in a machine that has touched none yet, and has somebody watch over the page server, if one serves
/// it. What is returned ends the preparation of pages that nobody has asked for.
pub(super) fn show(
    machine: &mut Machine,
    low: OwnedFd,
    snapshot: &Arc<Snapshot>,
    (backend, policy, is_fork): (Backend, OnHandlerLoss, bool),
    notifier: &Notifier,
    signals: &Signals,
    phases: &mut Phases,
) -> Result<Arc<AtomicBool>, RestoreError> {
    let replay_over = Arc::<AtomicBool>::default();
    let service = backend.show(snapshot, &mut machine.ram, low)?;
    phases.end("memory");
    // Before anything touches guest memory and may have to wait.
    if let Some(service) = service {
        service.wait_until_it_serves(&machine.ram, signals).map_err(BackendError::from)?;
        let charge = Charge {
            snapshot: snapshot.clone(),
            policy,
            signals: signals.try_clone().map_err(RestoreError::Guard)?,
            notifier: notifier.clone(),
            ending: machine.ending.clone(),
            replay_over: replay_over.clone(),
            is_fork,
        };
        machine.page_server = Some(Keeper::start(service, &machine.ram, charge).map_err(RestoreError::Guard)?);
        phases.end("page_server");
    }
    Ok(replay_over)
}

/// Whether the page server has served to the end of a load, or somebody in its place.
pub(super) fn loaded(keeper: &Keeper) -> Result<(), RestoreError> {
    keeper.loaded().map_err(|why| match why {
        GivenUp::Ending => BackendError::from(UffdError::Ending).into(),
        GivenUp::Unserved(reason) => RestoreError::Unserved { path: keeper.path().to_owned(), reason },
    })
}

/// What is done with the state of a machine when it is loaded.
pub(super) struct HowToLoad {
    pub other_tsc: OtherTsc,
    pub clock: Clock,
    /// The guest is told that it is another one than was saved.
    pub new_generation: bool,
}

/// Loads the state of vCPUs, VM and devices: all that touches guest memory, and may have to wait for it.
pub(super) fn load_state(
    machine: &Machine,
    state: &MachineState,
    held: &[VcpuState],
    how: HowToLoad,
    phases: &mut Phases,
) -> Result<(), RestoreError> {
    let HowToLoad { other_tsc, clock, new_generation } = how;
    for (number, (vcpu, saved)) in machine.vcpus.iter().zip(&state.vcpus).enumerate() {
        let fail = |source| RestoreError::VcpuState { vcpu: number, source };
        let (held, is_first) = (held.get(number), number == 0);
        crate::vcpu::state::load(&vcpu.lock(), &machine.vm, saved, held, is_first, other_tsc).map_err(fail)?;
    }
    phases.end("vcpu_state");
    kvm::state::load(&machine.vm, &state.vm, clock)?;
    // Guest memory may have been touched already, since KVM writes the wall clock where an MSR tells it to; the keeper and
    // the page server have been at work from the start.
    if new_generation {
        let id = fresh_generation().map_err(RestoreError::Random)?;
        write_generation(machine.ram.memory(), &id).map_err(RestoreError::Generation)?;
    }
    phases.end("vm_state");
    // After the interrupt controllers' state, which would undo what these raise.
    machine.devices.restore(&machine.plan, &state.devices)?;
    if new_generation {
        machine.devices.announce_generation().map_err(RestoreError::Announce)?;
    }
    phases.end("device_state");
    Ok(())
}

/// Whether this program on this host can run the snapshot, going by what can be known without KVM.
fn check(snapshot: &Snapshot, allowed: &[Field]) -> Result<(), RestoreError> {
    let manifest = snapshot.manifest();
    for warning in compat::check(manifest, snapshot.state(), host::to_compare(), allowed)? {
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
    override_host_side(&mut plan, request.vsock_override.as_ref(), &request.network_overrides)?;
    Ok((plan, disks))
}

/// Gives devices their other host sides, and looks whether there can be such devices.
pub(super) fn override_host_side(
    plan: &mut DevicePlan,
    vsock: Option<&VsockOverride>,
    network: &[NetworkOverride],
) -> Result<(), RestoreError> {
    if let Some(VsockOverride { uds_path }) = vsock {
        plan.vsock.as_mut().ok_or(RestoreError::NoVsock)?.uds_path = uds_path.clone();
    }
    override_network(&mut plan.network, network)?;
    plan.vsock.as_ref().map(config::check_vsock).transpose().map_err(RestoreError::Vsock)?;
    config::check_places(plan).map_err(RestoreError::Places)
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
