//! Fork: a machine that runs, and goes on, becomes several. Nothing of it is written to a disk.
//!
//! ```text
//!   event loop:  pause -> device, vCPU and VM state -> freeze, or copy of what is the guest's own -> resume
//!   thread:      seal -> one call to each of the other vmms, with descriptors -> their answers
//!   other vmm:   check -> shell -> map the lowest file, and the longer runs of the layers; copy the shorter ones -> state -> run
//! ```
//!
//! What a guest that was booted here has written is its image, from then on; nothing of it is copied. A clone's own pages are copied into
//! a layer over the image that it is a view of, and a fork of a fork has one layer more, until they are copied into one
//! ([`GuestRam::layers`](crate::memory::GuestRam::layers)). All clones of a fork share these files, which nobody can write. Where a page
//! server has what the layers lie over, it serves each of them as it serves the machine itself.

use super::Machine;
use super::backend::{Backend, BackendError};
use super::config::{DevicePlan, MAX_VCPUS};
use super::phases::Phases;
use super::restore::{HowToLoad, Loadable, RestoreError, lease, load_state, loaded, override_host_side, show};
use super::shell::{Misfit, Shape, Shell};
use super::snapshot::{self, Ending, SnapshotError};
use super::turns::AtWork;
use super::wiring::Outside;
use crate::kvm::state::Clock;
use crate::memory::changes::CaptureError;
use crate::memory::freeze::{FreezeError, Frozen};
use crate::memory::image::LayError;
use crate::memory::layer::{Copied, Layer, SEALED, Spare, is_sealed};
use crate::memory::{PAGE_SIZE, layout};
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use crate::vcpu::state::OtherTsc;
use crate::vcpu::{self, VcpuError};
use ::snapshot::clusters::{Clusters, MapError};
use ::snapshot::load;
use ::snapshot::state::{self, MachineState, StateError};
use ::snapshot::told;
use api_spec::client::rest::{MAX_DESCRIPTORS, PassingCall, RestError};
use api_spec::fork::{ForkLayer, ForkLoad, ForkServed, ForkTarget, ForkedClone, MAX_CLONES, VmFork, VmForked};
use rustix::fs::{MemfdFlags, OFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use uffd_handler::process::Signals;

/// How long the other vmms have, all together.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to leave everybody else alone before memory is got ready for the next fork.
const BREATHER: Duration = Duration::from_millis(5);
/// Longest state that is taken, in bytes.
const MAX_STATE: u64 = 64 << 20;

/// Why a VM was not forked. It goes on.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// Nobody is to have a clone.
    #[error("into: name the vmms that are to have a clone each, 1 to {MAX_CLONES}; there are {0}")]
    Number(usize),
    /// Another number than it says.
    #[error("count is {count}, and into names {named} vmms; name as many, or leave count out")]
    Count {
        /// The number that was said.
        count: u32,
        /// How many there are.
        named: usize,
    },
    /// One of them twice.
    #[error("into: {} is named twice", .0.display())]
    Twice(PathBuf),
    /// It has disks.
    #[error("a VM with disks is not forked: they are not taken along; use a snapshot (`PUT /snapshot/create`)")]
    Drives,
    /// Its memory is not to be had for others.
    #[error(
        "a VM into which a page server copies its pages is not forked, as they cannot be shared; use `UffdShared`, or a snapshot (`PUT /snapshot/create`)"
    )]
    Copied,
    /// What it has changed is not known.
    #[error("the VM cannot be forked: an earlier attempt to freeze its memory failed half-way; use a snapshot")]
    Mixed,
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device.
    #[error(transparent)]
    Device(#[from] AtWork),
    /// State.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// The state cannot be told to others.
    #[error(transparent)]
    Encode(#[from] StateError),
    /// Memory.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Memory.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// No memory, or no descriptor.
    #[error("cannot keep the state of the VM for its clones: {}", told(.0))]
    Keep(io::Error),
    /// No thread.
    #[error("cannot start the thread that gives the clones to the other vmms: {0}")]
    Thread(io::Error),
}

/// Why a clone that another vmm offers is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ForkLoadError {
    /// It speaks of something else.
    #[error("the VM is forked by vmm {theirs} and this is vmm {}; use one version for both", env!("CARGO_PKG_VERSION"))]
    Version {
        /// The other's version.
        theirs: String,
    },
    /// It is of a machine that this program does not build.
    #[error("the VM that is forked has {vcpus} vCPUs and {bytes} bytes of memory; this program runs no such machine")]
    Shape {
        /// Number of vCPUs.
        vcpus: u8,
        /// Guest memory, in bytes.
        bytes: u64,
    },
    /// Too few descriptors, or too many.
    #[error(
        "the call is made by a vmm whose VM is forked (PUT /vm/fork), with {expected} descriptors; {found} came with this one"
    )]
    Descriptors {
        /// How many belong to it.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// A file is not what it should be.
    #[error("descriptor {number} is of no use: {problem}")]
    Descriptor {
        /// Which one.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// What a page server serves the VM is there no more.
    #[error("{} is another snapshot by now than the VM that is forked was restored from; it cannot be forked any more", .0.display())]
    OtherSnapshot(PathBuf),
    /// The parent's socket is not to be had.
    #[error(
        "this vmm has no shell that the clone fits: say in `into`, by `vsock_override`, where its vsock device is to listen"
    )]
    NoSocket,
    /// The state.
    #[error("the state of the VM that is forked: {0}")]
    State(#[from] StateError),
    /// It is of another machine.
    #[error("the state of the VM that is forked is of {0} vCPUs")]
    Vcpus(usize),
    /// The map of a layer.
    #[error("the map of layer {layer}: {source}")]
    Map {
        /// Which one.
        layer: usize,
        /// What is wrong with it.
        source: MapError,
    },
}

/// A VM as it was, for clones.
pub struct Forked {
    /// But for what is still to be encoded.
    load: ForkLoad,
    taken: Taken,
    /// For the next time.
    spare: Spare,
    begun: Instant,
    pause_us: u64,
}

/// What is taken of a machine.
struct Taken {
    state: MachineState,
    /// What was frozen for it, to be sealed.
    frozen: Option<Frozen>,
    /// What lies over all else, likewise.
    own: Copied,
    layers: Vec<Layer>,
    /// What they lie over, unless a page server has that.
    lowest: Option<File>,
}

/// Looks whether a request can be granted, whatever the VM is. Pure.
pub fn check(request: &VmFork) -> Result<(), ForkError> {
    let named = request.into.len();
    if !(1..=MAX_CLONES).contains(&named) {
        return Err(ForkError::Number(named));
    }
    match request.count {
        Some(count) if count as usize != named => return Err(ForkError::Count { count, named }),
        _ => {}
    }
    let paths: Vec<_> = request.into.iter().map(|target| &target.api_sock).collect();
    let twice = paths.iter().enumerate().find(|(number, path)| paths[..*number].contains(path));
    twice.map_or(Ok(()), |(_, path)| Err(ForkError::Twice(path.to_path_buf())))
}

/// Takes a machine as it is for clones such as are asked for, whoever gets them. It runs again, if it ran, when this returns.
pub fn fork(
    machine: &mut Machine,
    request: &VmFork,
    max_private_mib: Option<u64>,
    signals: &Signals,
    phases: &mut Phases,
) -> Result<Forked, ForkError> {
    let begun = Instant::now();
    if !machine.plan.drives.is_empty() {
        return Err(ForkError::Drives);
    }
    if machine.page_server.is_some() && machine.served.is_none() {
        return Err(ForkError::Copied);
    }
    let was_running = machine.is_running();
    machine.pause()?;
    phases.end("pause");
    let taken = take(machine, signals, phases);
    if was_running {
        machine.resume();
    }
    phases.end("resume");
    let pause_us = begun.elapsed().as_micros() as u64;
    let taken = taken?;

    // From here on the guest runs, and nothing more can fail.
    let DevicePlan { vsock, network, entropy, balloon, drives: _ } = machine.plan.clone();
    let load = ForkLoad {
        vmm_version: env!("CARGO_PKG_VERSION").into(),
        vcpu_count: machine.vcpu_count(),
        memory_bytes: machine.memory_bytes(),
        vsock,
        network_interfaces: network,
        entropy,
        balloon,
        served: machine.served.clone(),
        max_private_mib,
        state_bytes: 0,
        layers: Vec::new(),
        resume_vm: request.resume_vm,
        new_generation: request.new_generation,
        vsock_override: None,
        network_overrides: Vec::new(),
    };
    Ok(Forked { load, taken, spare: machine.ram.spare(), begun, pause_us })
}

/// Takes everything of a machine that stands still.
fn take(machine: &mut Machine, signals: &Signals, phases: &mut Phases) -> Result<Taken, ForkError> {
    let state = snapshot::save(machine)?;
    phases.end("state");
    let turns = machine.turns().clone();
    let _turn = turns.take(vcpu::PAUSE_DEADLINE)?;
    let lowest = match machine.served {
        Some(_) => None,
        None => Some(machine.ram.store().ok_or(ForkError::Mixed)?.try_clone().map_err(ForkError::Keep)?),
    };
    let frozen = machine.ram.freeze()?;
    phases.end("freeze");
    // What is copied now is copied on the event loop's thread, which hears of nothing meanwhile but through this.
    let layers = machine.ram.layers(&Ending::of(machine, signals)).map_err(ForkError::from);
    let (own, layers) = match layers.and_then(|layers| layers.ok_or(ForkError::Mixed)) {
        Ok(layers) => layers,
        Err(e) => {
            // Whatever comes later relies on its being sealed.
            frozen.map(Frozen::finish).transpose()?;
            return Err(e);
        }
    };
    phases.end("copy");
    Ok(Taken { state, frozen, own, layers, lowest })
}

/// What gives clones to other vmms, on a thread that is there before the VM stands still.
pub struct Giver(mpsc::Sender<Forked>);

impl Giver {
    /// Starts it, and waits until it is there. It tells when it is done.
    pub fn start(targets: Vec<ForkTarget>, notifier: Notifier) -> Result<Self, ForkError> {
        let (sender, forked) = mpsc::channel::<Forked>();
        let (is_there, there) = mpsc::sync_channel(1);
        let thread = sandbox::spawn("fork", Kind::Peer, move || {
            let _ = is_there.send(()); // Somebody waits for it.
            // If there is none, whoever has asked for it has been told.
            let Ok(forked) = forked.recv() else { return };
            let (spare, copied_bytes) = (forked.spare.clone(), forked.taken.own.count() * PAGE_SIZE);
            let given = forked.give_all(targets).map_err(|e| e.to_string());
            notifier.send(Notice::Forked(given));
            // Whoever waits is answered, and whoever has a clone asks it something.
            std::thread::sleep(BREATHER);
            if let Err(e) = spare.prepare(copied_bytes) {
                tracing::debug!("the next fork takes longer, as no memory is ready for it: {e}");
            }
        });
        thread.map_err(ForkError::Thread)?;
        let _ = there.recv(); // It cannot but come there.
        Ok(Giver(sender))
    }

    /// Gives a clone of this to each of them.
    pub fn give(self, forked: Forked) {
        // It waits for nothing else.
        let _ = self.0.send(forked);
    }
}

impl Forked {
    fn give_all(self, targets: Vec<ForkTarget>) -> Result<VmForked, ForkError> {
        let Forked { mut load, taken, spare: _, begun, pause_us } = self;
        let Taken { state, frozen, own, layers, lowest } = taken;
        frozen.map(Frozen::finish).transpose()?;
        let copied_pages = own.count();
        let (own, written) = own.seal().map_err(ForkError::Keep)?;
        let layers: Vec<Layer> = std::iter::once(own).filter(|own| !own.pages.is_empty()).chain(layers).collect();
        let mut bytes = state::encode(&state)?;
        load.state_bytes = bytes.len() as u64;
        for layer in &layers {
            let map = layer.pages.encode();
            load.layers.push(ForkLayer { map_bytes: map.len() as u64, packed: layer.packed });
            bytes.extend(map);
        }
        let bundle = memfd_create("coppice-fork", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let bundle = File::from(bundle.map_err(|e| ForkError::Keep(e.into()))?);
        bundle.write_all_at(&bytes, 0).map_err(ForkError::Keep)?;
        fcntl_add_seals(&bundle, SEALED).map_err(|e| ForkError::Keep(e.into()))?;
        let files = std::iter::once(&bundle).chain(layers.iter().map(|layer| &layer.file)).chain(&lowest);
        let descriptors: Vec<_> = files.map(AsFd::as_fd).collect();
        // All are called before the first is waited for, and have the same time.
        let deadline = Instant::now() + PATIENCE;
        let call = |ForkTarget { api_sock, vsock_override, network_overrides }| {
            let load = ForkLoad { vsock_override, network_overrides, ..load.clone() };
            let call = PassingCall::put(&api_sock, deadline, "/fork/load", &load, &descriptors);
            (api_sock, call)
        };
        let called: Vec<_> = targets.into_iter().map(call).collect();
        drop(written);
        let answer = |call: Result<PassingCall, RestError>| call?.answer()?.body();
        let clones = called
            .into_iter()
            .map(|(api_sock, call)| ForkedClone { api_sock, error: answer(call).err().map(|e| e.to_string()) })
            .collect();
        let total_us = begun.elapsed().as_micros() as u64;
        Ok(VmForked { pause_us, total_us, copied_pages, clones })
    }
}

/// A clone that another vmm offers, found right.
#[derive(Debug)]
pub struct Offered {
    shape: Shape,
    state: MachineState,
    /// The uppermost first.
    layers: Vec<Layer>,
    lowest: Option<File>,
    load: ForkLoad,
}

/// Looks at what another vmm offers. Descriptors are checked: nobody can write a layer, and none is shorter than it has to be.
pub fn open(load: &ForkLoad, descriptors: Vec<OwnedFd>) -> Result<Offered, RestoreError> {
    let ForkLoad { vmm_version, vcpu_count: vcpus, memory_bytes, state_bytes, layers: told, .. } = load;
    if vmm_version != env!("CARGO_PKG_VERSION") {
        return Err(ForkLoadError::Version { theirs: vmm_version.clone() }.into());
    }
    let is_whole = memory_bytes % (1 << 20) == 0 && (1..=layout::MAX_MIB).contains(&(memory_bytes >> 20));
    if !is_whole || !(1..=MAX_VCPUS).contains(vcpus) {
        return Err(ForkLoadError::Shape { vcpus: *vcpus, bytes: *memory_bytes }.into());
    }
    // The state, the layers, and what they lie over.
    let (expected, found) = (told.len() + 1 + usize::from(load.served.is_none()), descriptors.len());
    if expected != found || found > MAX_DESCRIPTORS {
        return Err(ForkLoadError::Descriptors { expected, found }.into());
    }
    let mut files = descriptors.into_iter().map(File::from);
    let bundle = files.next().ok_or(ForkLoadError::Descriptors { expected, found })?;
    let longest = Clusters::max_encoded(*memory_bytes);
    let bad = |problem: &str| ForkLoadError::Descriptor { number: 0, problem: problem.into() };
    if *state_bytes > MAX_STATE || told.iter().any(|layer| layer.map_bytes > longest) {
        return Err(bad("what it is said to hold is longer than it can be").into());
    }
    let length = state_bytes + told.iter().map(|layer| layer.map_bytes).sum::<u64>();
    check_file(0, &bundle, length)?;
    check_sealed(0, &bundle)?;
    let mut bytes = vec![0; length as usize];
    bundle.read_exact_at(&mut bytes, 0).map_err(|e| bad(&e.to_string()))?;
    let (own, mut maps) = bytes.split_at(*state_bytes as usize);
    let state = state::decode(own).map_err(ForkLoadError::from)?;
    if state.vcpus.len() != usize::from(*vcpus) {
        return Err(ForkLoadError::Vcpus(state.vcpus.len()).into());
    }

    let mut layers = Vec::new();
    for (layer, (ForkLayer { map_bytes, packed }, file)) in told.iter().zip(files.by_ref()).enumerate() {
        let (map, rest) = maps.split_at(*map_bytes as usize);
        maps = rest;
        let pages = Clusters::decode(map, *memory_bytes).map_err(|source| ForkLoadError::Map { layer, source })?;
        check_file(layer + 1, &file, if *packed { pages.data() * PAGE_SIZE } else { *memory_bytes })?;
        check_memory(layer + 1, &file, *packed)?;
        layers.push(Layer { file, pages, packed: *packed });
    }
    let lowest = files.next();
    if let Some(file) = &lowest {
        check_file(expected - 1, file, *memory_bytes)?;
        check_memory(expected - 1, file, false)?;
    }

    let mut devices = DevicePlan {
        vsock: load.vsock.clone(),
        drives: Vec::new(),
        network: load.network_interfaces.clone(),
        entropy: load.entropy,
        balloon: load.balloon,
    };
    override_host_side(&mut devices, load.vsock_override.as_ref(), &load.network_overrides)?;
    let shape = Shape { vcpus: *vcpus, memory_bytes: *memory_bytes, devices };
    Ok(Offered { shape, state, layers, lowest, load: load.clone() })
}

/// Whether a descriptor is of a file that can be read and holds so much.
fn check_file(number: usize, file: &File, bytes: u64) -> Result<(), ForkLoadError> {
    let bad = |problem: String| ForkLoadError::Descriptor { number, problem };
    let metadata = file.metadata().map_err(|e| bad(e.to_string()))?;
    if !metadata.is_file() {
        return Err(bad("it is of no regular file".into()));
    }
    let access = fcntl_getfl(file).map_err(|e| bad(e.to_string()))? & OFlags::RWMODE;
    if access == OFlags::WRONLY || access.contains(OFlags::PATH) {
        return Err(bad("it is not open for reading".into()));
    }
    if metadata.len() < bytes {
        return Err(bad(format!("its file has {} bytes, and should have {bytes}", metadata.len())));
    }
    Ok(())
}

/// Whether nobody can change a file that is only in memory, as a layer that was packed always is. Files on a disk are those of snapshots.
fn check_memory(number: usize, file: &File, always: bool) -> Result<(), ForkLoadError> {
    let has_name = file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
    let is_on_disk = !always && (has_name || fcntl_get_seals(file).is_err());
    if is_on_disk { Ok(()) } else { check_sealed(number, file) }
}

fn check_sealed(number: usize, file: &File) -> Result<(), ForkLoadError> {
    match fcntl_get_seals(file) {
        Ok(seals) if is_sealed(seals) => Ok(()),
        _ => Err(ForkLoadError::Descriptor {
            number,
            problem: "its file could still be written (it is not sealed)".into(),
        }),
    }
}

impl Loadable for Offered {
    fn fits(&self, shell: &Shell) -> Result<(), Misfit> {
        let ForkLoad { vsock_override, network_overrides, .. } = &self.load;
        shell.shape().fits(&self.shape, vsock_override.as_ref(), !network_overrides.is_empty())
    }

    fn shell(&mut self, outside: Outside, phases: &mut Phases) -> Result<Shell, RestoreError> {
        if self.shape.devices.vsock.is_some() && self.load.vsock_override.is_none() {
            return Err(ForkLoadError::NoSocket.into());
        }
        Ok(Shell::build(self.shape.clone(), Vec::new(), outside, phases)?)
    }

    fn load(
        self,
        shell: Shell,
        notifier: &Notifier,
        signals: &Signals,
        phases: &mut Phases,
    ) -> Result<Machine, RestoreError> {
        let Offered { state, layers, lowest, load, .. } = self;
        let (mut machine, low) = shell.open();
        if let Some(served) = load.served {
            let ForkServed { snapshot_path, digest, mem_backend } = &served;
            let snapshot = Arc::new(load::open_without_memory(snapshot_path)?);
            if snapshot.manifest().digest != *digest {
                return Err(ForkLoadError::OtherSnapshot(snapshot_path.clone()).into());
            }
            let backend = Backend::Shared(&mem_backend.backend_path);
            let lease = lease(&snapshot, &backend)?;
            let policy = mem_backend.on_handler_loss.unwrap_or_default();
            show(&mut machine, low, &snapshot, (backend, policy, true), notifier, signals, phases)?;
            machine.lease = Some(lease);
            machine.served = Some(served);
        } else if let Some(lowest) = &lowest {
            machine.ram.show(lowest).map_err(LayError::from).map_err(BackendError::from)?;
            phases.end("memory");
        }
        let laid = machine.ram.show_above(layers);
        phases.end("layers");
        let new_generation = load.new_generation;
        let how = HowToLoad { other_tsc: OtherTsc::Refused, clock: Clock::GoesOn, new_generation };
        let laid = laid.map_err(|e| BackendError::from(e).into());
        let state_loaded = laid.and_then(|()| load_state(&machine, &state, how, phases));
        machine.page_server.as_ref().map_or(Ok(()), loaded)?;
        state_loaded?;
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};

    fn request(sockets: &[&str]) -> VmFork {
        let target =
            |socket: &&str| ForkTarget { api_sock: socket.into(), vsock_override: None, network_overrides: Vec::new() };
        VmFork { into: sockets.iter().map(target).collect(), count: None, resume_vm: true, new_generation: true }
    }

    #[test]
    fn clones_are_named_once_each_and_as_many_as_are_counted() {
        let counted = |count, sockets: &[&str]| check(&VmFork { count, ..request(sockets) });
        assert!(counted(None, &["a"]).is_ok() && counted(Some(2), &["a", "b"]).is_ok());
        assert!(matches!(counted(None, &[]), Err(ForkError::Number(0))));
        assert!(matches!(counted(Some(3), &["a"]), Err(ForkError::Count { count: 3, named: 1 })));
        assert!(
            matches!(counted(None, &["a", "b", "a"]), Err(ForkError::Twice(path)) if path == std::path::Path::new("a"))
        );
        let many: Vec<String> = (0..=MAX_CLONES).map(|number| number.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(counted(None, &many[1..]).is_ok());
        assert!(matches!(counted(None, &many), Err(ForkError::Number(65))));
    }

    fn memory_file(bytes: u64, seals: SealFlags) -> OwnedFd {
        let file = memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    /// Each thing that can be wrong with an offer is told by its name, and none of it is used.
    #[test]
    fn an_offer_that_is_not_right_is_refused() {
        const SIZE: u64 = 8 << 20;
        let load = ForkLoad {
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            vcpu_count: 1,
            memory_bytes: SIZE,
            vsock: None,
            network_interfaces: Vec::new(),
            entropy: None,
            balloon: None,
            served: None,
            max_private_mib: None,
            state_bytes: 100,
            layers: vec![ForkLayer { map_bytes: 0, packed: true }],
            resume_vm: true,
            new_generation: true,
            vsock_override: None,
            network_overrides: Vec::new(),
        };
        let files = || vec![memory_file(100, SEALED), memory_file(SIZE, SEALED), memory_file(SIZE, SEALED)];
        let refused = |load: &ForkLoad, files: Vec<OwnedFd>| open(load, files).unwrap_err().to_string();
        let with = |change: fn(&mut ForkLoad)| {
            let mut load = load.clone();
            change(&mut load);
            refused(&load, files())
        };
        assert!(refused(&load, files()).starts_with("the state of the VM that is forked: "), "100 zeros are no state");
        assert!(with(|load| load.vmm_version = "0".into()).contains("vmm 0"));
        for shape in [
            with(|load| load.vcpu_count = 0),
            with(|load| load.memory_bytes += 1),
            with(|load| load.memory_bytes = u64::MAX << 20),
        ] {
            assert!(shape.contains("runs no such machine"), "{shape}");
        }
        assert!(with(|load| load.layers.clear()).contains("with 2 descriptors; 3 came"));
        assert!(
            with(|load| load.layers = vec![ForkLayer { map_bytes: 0, packed: true }; 300])
                .contains("with 302 descriptors")
        );
        assert!(with(|load| load.state_bytes = u64::MAX).contains("longer than it can be"));
        assert!(with(|load| load.layers[0].map_bytes = u64::MAX).contains("longer than it can be"));
        assert!(with(|load| load.state_bytes = 101).contains("should have 101"));
        assert!(refused(&load, Vec::new()).contains("0 came"));
        let mut socket = files();
        socket[0] = std::os::unix::net::UnixStream::pair().unwrap().0.into();
        assert!(refused(&load, socket).contains("no regular file"));
    }

    #[test]
    fn a_layer_that_somebody_could_write_is_refused() {
        let file = |bytes, seals| File::from(memory_file(bytes, seals));
        assert!(check_sealed(1, &file(4096, SEALED)).is_ok());
        for fewer in [SealFlags::empty(), SealFlags::WRITE, SealFlags::SHRINK | SealFlags::GROW] {
            assert!(check_sealed(1, &file(4096, fewer)).unwrap_err().to_string().contains("not sealed"));
        }
        assert!(check_sealed(1, &tempfile::tempfile().unwrap()).is_err(), "a file on a disk");
        assert!(check_file(1, &file(4095, SEALED), 4096).unwrap_err().to_string().contains("4095 bytes"));
        let (in_memory, unsealed) = (file(4096, SEALED), file(4096, SealFlags::empty()));
        assert!(check_memory(1, &in_memory, false).is_ok() && check_memory(1, &in_memory, true).is_ok());
        assert!(check_memory(1, &unsealed, false).is_err());
        let named = tempfile::NamedTempFile::new().unwrap();
        assert!(check_memory(1, named.as_file(), false).is_ok() && check_memory(1, named.as_file(), true).is_err());
        let unreadable = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert!(check_file(1, &unreadable, 0).is_err());
    }
}
