//! The side that is forked.

use crate::devices::virtio::block::disk::Image;
use crate::machine::Machine;
use crate::machine::config::DevicePlan;
use crate::machine::disks::{self, Merged};
use crate::machine::merges::Merge;
use crate::machine::phases::Phases;
use crate::machine::snapshot::{self, Ending, SnapshotError};
use crate::machine::turns::AtWork;
use crate::memory::changes::CaptureError;
use crate::memory::freeze::{FreezeError, Frozen};
use crate::memory::image;
use crate::memory::layer::{Copied, Layer, SEALED, Spare, Written};
use crate::memory::{PAGE_SIZE, layout};
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use crate::vcpu::{self, VcpuError};
use ::snapshot::state::{self, MachineState, StateError};
use ::snapshot::told;
use api_spec::client::rest::{MAX_DESCRIPTORS, PassingCall, RestError};
use api_spec::fork::{ForkLayer, ForkLoad, ForkTarget, ForkedClone, MAX_CLONES, MAX_DISK_LAYERS, VmFork, VmForked};
use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use uffd_handler::process::Signals;

/// How long the other vmms have, all together.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to leave everybody else alone before memory is got ready for the next fork.
const BREATHER: Duration = Duration::from_millis(5);

// The state, the layers of memory and what they lie over, and the layers and the image of each disk.
const _: () =
    assert!(MAX_DESCRIPTORS == 1 + image::MAX_LAYERS + 1 + layout::MAX_VIRTIO as usize * (MAX_DISK_LAYERS + 1));

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
    /// Nobody else can have what its guest writes.
    #[error(
        "drive {0}: the guest writes its image itself, so that clones cannot have it: a VM is forked with disks that have an `overlay` or are read only; use a snapshot (`PUT /snapshot/create`), whose clones have overlays"
    )]
    Written(String),
    /// A disk.
    #[error("drive {id} cannot be forked: {}", told(.source))]
    Disk {
        /// Which disk.
        id: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// Layers of disks that are still being copied.
    #[error(
        "the VM was forked so often that layers of its overlays have to be copied into fewer first, which takes longer than {} s: fork it again later",
        PATIENCE.as_secs()
    )]
    Merging,
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

/// A VM as it was, for clones.
pub struct Forked {
    /// Who is to have them.
    targets: Vec<ForkTarget>,
    /// But for what is still to be encoded.
    load: ForkLoad,
    taken: Taken,
    /// For the next time.
    spare: Spare,
    merging: Option<Arc<Merge>>,
    is_over: Arc<AtomicBool>,
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
    /// Disks, but for their layers.
    drives: Vec<disks::Shared>,
    disk_layers: Vec<disks::Layers>,
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

/// Takes a machine as it is for clones such as are asked for, and has them given to whoever is to have them. It runs again, if it ran,
/// when this returns.
pub fn fork(
    machine: &mut Machine,
    request: VmFork,
    max_private_mib: Option<u64>,
    signals: &Signals,
    phases: &mut Phases,
    notifier: &Notifier,
    giver: &Giver,
) -> Result<(), ForkError> {
    let begun = Instant::now();
    if let Some(id) = disks::written_in_place(&machine.plan.drives) {
        return Err(ForkError::Written(id.to_owned()));
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
    let taken = match taken {
        Ok(taken) => taken,
        Err(e) => {
            // What was frozen for it is still to be merged, or there would be more and more.
            machine.merge_layers(notifier);
            return Err(e);
        }
    };

    // From here on the guest runs, and nothing more can fail.
    let DevicePlan { vsock, network, entropy, balloon, drives: _ } = machine.plan.clone();
    let load = ForkLoad {
        vmm_version: env!("CARGO_PKG_VERSION").into(),
        vcpu_count: machine.vcpu_count(),
        memory_bytes: machine.memory_bytes(),
        vsock,
        drives: Vec::new(),
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
    let (merging, is_over) = (machine.merges.now(), machine.merges.is_over());
    giver.give(Forked {
        targets: request.into,
        load,
        taken,
        spare: machine.ram.spare(),
        merging,
        is_over,
        begun,
        pause_us,
    });
    Ok(())
}

/// Takes everything of a machine that stands still.
fn take(machine: &mut Machine, signals: &Signals, phases: &mut Phases) -> Result<Taken, ForkError> {
    let saved = snapshot::save(machine);
    phases.end("state");
    let turns = machine.turns().clone();
    let state = saved?;
    let _turn = turns.take(vcpu::PAUSE_DEADLINE)?;
    take_contents(machine, state, signals, phases)
}

fn take_contents(
    machine: &mut Machine,
    state: MachineState,
    signals: &Signals,
    phases: &mut Phases,
) -> Result<Taken, ForkError> {
    let drives = disks::share(&machine.devices, &machine.plan.drives);
    let drives = drives.map_err(|(id, source)| ForkError::Disk { id, source })?;
    let disk_layers = disks::layers(&machine.devices);
    if !drives.is_empty() {
        phases.end("disks");
    }
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
    Ok(Taken { state, frozen, own, layers, lowest, drives, disk_layers })
}

/// What gives clones to other vmms, on a thread that is there before the VM stands still, and stays: a VM that was forked is forked again.
pub struct Giver(mpsc::Sender<Forked>);

impl Giver {
    /// Starts it, and waits until it is there. It tells of each fork when that is done, and ends with this value.
    pub fn start(notifier: Notifier) -> Result<Self, ForkError> {
        let (sender, taken) = mpsc::channel::<Forked>();
        let (is_there, there) = mpsc::sync_channel(1);
        let thread = sandbox::spawn("fork", Kind::Peer, move || {
            let _ = is_there.send(()); // Somebody waits for it.
            let (mut next, mut shared) = (None, None);
            while let Some(forked) = next.take().or_else(|| taken.recv().ok()) {
                let (spare, copied_bytes) = (forked.spare.clone(), forked.taken.own.count() * PAGE_SIZE);
                let (given, kept) = match forked.give_all(&notifier) {
                    Ok((given, kept)) => (Ok(given), Some(kept)),
                    Err(e) => (Err(e.to_string()), None),
                };
                let before = std::mem::replace(&mut shared, kept);
                notifier.send(Notice::Forked(given));
                // Whoever waits is answered, and whoever has a clone asks it something. A next fork does not wait for what is left to do.
                next = taken.recv_timeout(BREATHER).ok();
                drop(before);
                if next.is_some() {
                    continue;
                }
                shared = None;
                let idle = || {
                    next = next.take().or_else(|| taken.try_recv().ok());
                    next.is_none()
                };
                if let Err(e) = spare.prepare(copied_bytes, idle) {
                    tracing::debug!("the next fork takes longer, as no memory is ready for it: {e}");
                }
            }
        });
        thread.map_err(ForkError::Thread)?;
        let _ = there.recv(); // It cannot but come there.
        Ok(Giver(sender))
    }

    /// Gives a clone of this to each of those that are to have one.
    fn give(&self, forked: Forked) {
        // It waits for nothing else.
        let _ = self.0.send(forked);
    }
}

/// Has no disk more layers than clones can have, and the machine know of it. Only where forks follow each other faster than layers are
/// merged afterwards is there anything to be done.
fn bound(
    layers: &mut [disks::Layers],
    merging: Option<Arc<Merge>>,
    is_over: &AtomicBool,
    notifier: &Notifier,
) -> Result<(), ForkError> {
    let are_too_many =
        |layers: &[disks::Layers]| layers.iter().any(|layers| layers.stack.layers().len() > MAX_DISK_LAYERS);
    if !are_too_many(layers) {
        return Ok(());
    }
    let deadline = Instant::now() + PATIENCE;
    let is_over = || is_over.load(Ordering::Relaxed) || Instant::now() >= deadline;
    let merge = |layers: &mut [disks::Layers], merging: Option<&Merge>| {
        let kept = |layers: &disks::Layers| merging.map_or(0, |merging| merging.holds(layers));
        let Merged { layers: merged, failed } = disks::merge(layers, MAX_DISK_LAYERS, kept, &is_over);
        if !merged.is_empty() {
            notifier.send(Notice::LayersMerged { merged, ends: false });
        }
        failed.map_or(Ok(()), |(id, source)| Err(ForkError::Disk { id, source }))
    };
    if let Some(merging) = merging {
        // Those that have come since it began are copied beside it. It is waited for if they are not enough.
        merge(layers, Some(&merging))?;
        if !are_too_many(layers) {
            return Ok(());
        }
        disks::adopt(layers, &merging.wait(deadline).ok_or(ForkError::Merging)?);
    }
    merge(layers, None)?;
    if are_too_many(layers) { Err(ForkError::Merging) } else { Ok(()) }
}

/// What was shared with clones, and takes a while to drop.
struct Shared {
    _layers: Vec<Layer>,
    _written: Written,
}

impl Forked {
    fn give_all(self, notifier: &Notifier) -> Result<(VmForked, Shared), ForkError> {
        let Forked { targets, mut load, taken, spare: _, merging, is_over, begun, pause_us } = self;
        let Taken { state, frozen, own, layers, lowest, drives, mut disk_layers } = taken;
        frozen.map(Frozen::finish).transpose()?;
        bound(&mut disk_layers, merging, &is_over, notifier)?;
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
        let mut disk_files = Vec::new();
        for (number, disks::Shared { told, image }) in drives.iter().enumerate() {
            let mut drive = told.clone();
            let own = disk_layers.iter().filter(|layers| layers.number == number);
            for (file, clusters) in own.flat_map(|layers| layers.stack.layers()) {
                let map = clusters.encode();
                drive.layer_map_bytes.push(map.len() as u64);
                bytes.extend(map);
                disk_files.push(file);
            }
            disk_files.extend(image.as_ref().map(Image::file));
            load.drives.push(drive);
        }
        let bundle = memfd_create("coppice-fork", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let bundle = File::from(bundle.map_err(|e| ForkError::Keep(e.into()))?);
        bundle.write_all_at(&bytes, 0).map_err(ForkError::Keep)?;
        fcntl_add_seals(&bundle, SEALED).map_err(|e| ForkError::Keep(e.into()))?;
        let files = std::iter::once(&bundle).chain(layers.iter().map(|layer| &layer.file)).chain(&lowest);
        let files = files.chain(disk_files);
        let descriptors: Vec<_> = files.map(AsFd::as_fd).collect();
        // All are called before the first is waited for, and have the same time.
        let deadline = Instant::now() + PATIENCE;
        let call = |ForkTarget { api_sock, vsock_override, network_overrides }| {
            let load = ForkLoad { vsock_override, network_overrides, ..load.clone() };
            let call = PassingCall::put(&api_sock, deadline, "/fork/load", &load, &descriptors);
            (api_sock, call)
        };
        let called: Vec<_> = targets.into_iter().map(call).collect();
        let answer = |call: Result<PassingCall, RestError>| call?.answer()?.body();
        let clones = called
            .into_iter()
            .map(|(api_sock, call)| ForkedClone { api_sock, error: answer(call).err().map(|e| e.to_string()) })
            .collect();
        let total_us = begun.elapsed().as_micros() as u64;
        let forked = VmForked { pause_us, total_us, copied_pages, clones };
        Ok((forked, Shared { _layers: layers, _written: written }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
