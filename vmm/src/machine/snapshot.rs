//! Snapshot: the guest stands still for its state and for the freeze; memory is written after it went on.
//!
//! ```text
//!   event loop:  pause -> device state -> vCPU state -> VM state -> disks -> freeze -> resume
//!   background:          seal -> memory -> disks -> commit (rename), reply -> fold the disks' layers <-/
//! ```
//!
//! Layers are folded however the snapshot went: one that fails leaves no more of them behind than one that succeeds.
//!
//! Memory comes last because saving devices may still change it. A guest that is itself a private view (a clone) has
//! nothing to freeze: what it has changed of its image is copied while it stands still, and written over a snapshot of that
//! image when it goes on (`super::bases`). Where there is no such snapshot any more, all of its memory is written while it
//! stands still. So is a disk image that the guest writes itself; overlays are frozen ([`super::disks`]).

use super::bases::NoBase;
use super::saved::{self, Configuration};
use super::turns::AtWork;
use super::{Machine, disks, record};
use crate::devices::virtio::block::overlay::Folded;
use crate::host;
use crate::kvm::state::VmStateError;
use crate::memory::changes::{CaptureError, Changes};
use crate::memory::discard::Contents;
use crate::memory::freeze::{FreezeError, Frozen};
use crate::memory::{GuestMemory, GuestRam};
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use crate::vcpu::state::VcpuStateError;
use crate::vcpu::{self, VcpuError};
use api_spec::snapshot::{SnapshotCreate, SnapshotState, SnapshotStatus, SnapshotType};
use api_spec::vm::Readiness;
use snapshot::create::{Base, Cancel, CreateError, Facts, FileSource, MemoryDigest, MemorySource, Staging, Stored};
use snapshot::manifest::MemoryRegion;
use snapshot::state::MachineState;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uffd_handler::process::Signals;
use vm_memory::{Bytes, GuestAddress};

/// Why a snapshot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It would never end.
    #[error("max_write_mib_s is 0; it must be at least 1, or be absent")]
    NoRate,
    /// There is nothing that a snapshot could lie over.
    #[error("snapshot_type `Diff`: the snapshot that this one was to lie over cannot be used: {0}; use `Full`")]
    NoBase(NoBase),
    /// What the guest has changed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device.
    #[error(transparent)]
    Device(#[from] AtWork),
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
    /// A disk.
    #[error("drive {id} cannot be snapshotted: {source}")]
    Disk {
        /// Which disk.
        id: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// Memory.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The files.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The background thread.
    #[error("cannot start the thread that writes the snapshot: {0}")]
    Thread(io::Error),
}

/// A snapshot that is being written in the background, and then the folding of the disks' layers.
#[derive(Debug)]
pub struct Job {
    /// `None` once it was waited for.
    thread: Option<JoinHandle<Vec<(usize, Folded)>>>,
    written: mpsc::Receiver<Result<Written, SnapshotError>>,
    writing: Arc<Writing>,
    path: PathBuf,
    started: Instant,
    pause_us: u64,
}

/// A snapshot that is complete.
#[derive(Debug)]
struct Written {
    memory_bytes: u64,
    /// The digest of its manifest.
    digest: String,
    parent: Option<PathBuf>,
}

/// What whoever writes a snapshot shares with whoever waits for it.
#[derive(Debug)]
struct Writing {
    cancelled: AtomicBool,
    /// Nobody waits for anything any more.
    is_ending: AtomicBool,
    /// Bytes of memory so far.
    written: AtomicU64,
    /// Most bytes of memory in a second.
    limit: Option<u64>,
    started: Instant,
}

/// How long a writer that is to be slow waits before it looks whether it is wanted any more.
const NAP: Duration = Duration::from_millis(20);

impl Cancel for Writing {
    fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    fn progress(&self, written: u64) {
        self.written.store(written, Ordering::Relaxed);
        let Some(limit) = self.limit else { return };
        let due = self.started + Duration::from_secs_f64(written as f64 / limit as f64);
        while !self.is_cancelled() {
            match due.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => std::thread::sleep(left.min(NAP)),
                _ => return,
            }
        }
    }
}

impl Job {
    /// How much memory was written so far, in bytes.
    pub fn written_bytes(&self) -> u64 {
        self.writing.written.load(Ordering::Relaxed)
    }

    /// How the snapshot went, and the digest of its manifest if it is complete. To be called once, when
    /// [`Notice::SnapshotWritten`] has come; waits otherwise.
    pub fn status(&self) -> (SnapshotStatus, Option<String>) {
        let written = self.written.recv();
        let status = SnapshotStatus {
            state: SnapshotState::Done,
            snapshot_path: Some(self.path.clone()),
            pause_us: self.pause_us,
            total_us: self.started.elapsed().as_micros() as u64,
            ..Default::default()
        };
        let error = match written {
            Ok(Ok(Written { memory_bytes, digest, parent })) => {
                return (SnapshotStatus { memory_bytes, parent, ..status }, Some(digest));
            }
            Ok(Err(e)) => e.to_string(),
            Err(mpsc::RecvError) => "the thread that writes the snapshot panicked".to_owned(),
        };
        (SnapshotStatus { state: SnapshotState::Failed, error: Some(error), ..status }, None)
    }

    /// Has the snapshot be given up, unless it is complete, and remove what it has written.
    pub fn cancel(&self) {
        self.writing.cancelled.store(true, Ordering::Relaxed);
    }

    /// What became of the disks' layers. To be called when [`Notice::LayersFolded`] has come; waits otherwise.
    pub fn finish(mut self) -> Vec<(usize, Folded)> {
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Job {
    /// The process is ending.
    fn drop(&mut self) {
        self.cancel();
        self.writing.is_ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Memory as it is when the guest goes on.
enum Captured {
    /// Immutable from now on; still to be written.
    Frozen(Frozen, Vec<MemoryRegion>),
    /// What has changed of a snapshot; still to be written over it.
    Changed(Changes, Box<Base>, Stored),
    /// Written already.
    Written(MemoryDigest),
}

/// Refuses what can only fail, as far as that is known before anything is done.
pub fn check(request: &SnapshotCreate) -> Result<(), SnapshotError> {
    check_rate(request)?;
    Ok(Staging::check(&request.snapshot_path)?)
}

fn check_rate(request: &SnapshotCreate) -> Result<(), SnapshotError> {
    if request.max_write_mib_s == Some(0) { Err(SnapshotError::NoRate) } else { Ok(()) }
}

/// Takes a snapshot. The guest runs again, if it ran, when this returns. The result may be the job of a snapshot that has
/// failed: what was frozen for it is still to be folded. With a configuration it is a saved state of the machine that was
/// started with it.
pub fn create(
    machine: &mut Machine,
    request: &SnapshotCreate,
    saved: Option<&Configuration>,
    readiness: Option<Readiness>,
    notifier: Notifier,
    signals: &Signals,
) -> Result<Job, SnapshotError> {
    let started = Instant::now();
    check_rate(request)?;
    let stored = match request.snapshot_type {
        SnapshotType::Full => Stored::Whole,
        SnapshotType::Diff => Stored::Changes,
    };
    let (base, why_not) = match machine.bases.open(stored == Stored::Changes) {
        Ok(base) => (base.map(|base| (base, stored)), "no complete snapshot of it is known".to_owned()),
        Err(e) if stored == Stored::Changes => return Err(SnapshotError::NoBase(e)),
        Err(e) => (None, format!("its snapshot cannot be used: {e}")),
    };
    let mut staging = Staging::begin(&request.snapshot_path)?;
    if let Some(path) = &request.mem_file_path {
        staging.link_memory(path)?;
    }
    let facts = facts(machine, readiness, saved);
    if let Some(configuration) = saved {
        staging.add_file(saved::CONFIGURATION, configuration.text())?;
        staging.add_file(saved::MARK, saved::FRESH)?;
    }

    let was_running = machine.is_running();
    let stood_still = Instant::now();
    let (captured, layers) = match machine.pause() {
        Ok(()) => capture(machine, saved.is_some(), &mut staging, base.ok_or(why_not), signals),
        Err(e) => (Err(e.into()), Vec::new()),
    };
    if was_running {
        machine.resume();
    }
    let pause_us = stood_still.elapsed().as_micros() as u64;

    let writing = Arc::new(Writing {
        cancelled: AtomicBool::new(false),
        is_ending: AtomicBool::new(false),
        written: AtomicU64::new(0),
        limit: request.max_write_mib_s.map(|mib| mib.saturating_mul(1 << 20)),
        started: Instant::now(),
    });
    let shared = writing.clone();
    let (sender, written) = mpsc::channel();
    let thread = sandbox::spawn("snapshot", Kind::Writer, move || {
        let result = captured.and_then(|(state, disks, memory)| write(staging, memory, disks, facts, &state, &shared));
        let _ = sender.send(result); // Nobody asks any more only when the process is ending.
        notifier.send(Notice::SnapshotWritten);
        let folded = disks::fold(&layers, &shared.is_ending);
        notifier.send(Notice::LayersFolded);
        folded
    })
    .map_err(SnapshotError::Thread)?;
    let path = request.snapshot_path.clone();
    Ok(Job { thread: Some(thread), written, writing, path, started, pause_us })
}

/// Whether the process is about to end: because its page server is gone, or because it was asked to.
pub(super) struct Ending<'a> {
    flag: Arc<AtomicBool>,
    signals: &'a Signals,
}

impl<'a> Ending<'a> {
    /// That of the process that has this machine and these signals.
    pub(super) fn of(machine: &Machine, signals: &'a Signals) -> Self {
        Ending { flag: machine.ending.clone(), signals }
    }
}

impl Cancel for Ending<'_> {
    fn is_cancelled(&self) -> bool {
        self.flag.is_cancelled() || self.signals.have_come()
    }
}

/// A guest at one moment.
type Moment = (MachineState, Vec<disks::Captured>, Captured);

/// Saves everything of a machine whose vCPUs stand still; and what its disks have, whatever comes of that, that does not change any more.
fn capture(
    machine: &mut Machine,
    in_place: bool,
    staging: &mut Staging,
    base: Result<(Base, Stored), String>,
    signals: &Signals,
) -> (Result<Moment, SnapshotError>, Vec<disks::Layers>) {
    let turns = machine.turns().clone();
    let saved = save(machine).and_then(|state| Ok((state, turns.take(vcpu::PAUSE_DEADLINE)?)));
    match saved {
        Ok((state, _turn)) => {
            let contents = capture_contents(machine, in_place, staging, base, signals);
            (contents.map(|(disks, memory)| (state, disks, memory)), disks::layers(&machine.devices))
        }
        Err(e) => (Err(e), Vec::new()),
    }
}

/// Saves disks and memory.
fn capture_contents(
    machine: &mut Machine,
    in_place: bool,
    staging: &mut Staging,
    base: Result<(Base, Stored), String>,
    signals: &Signals,
) -> Result<(Vec<disks::Captured>, Captured), SnapshotError> {
    // What is copied now is copied on the event loop's thread, which hears of nothing meanwhile but through this.
    let ending = Ending::of(machine, signals);
    let disks = disks::capture(&machine.devices, &machine.plan.drives, in_place, staging, &ending)?;
    let captured = match machine.ram.freeze()? {
        Some(frozen) => Captured::Frozen(frozen, machine.ram.regions().to_vec()),
        None => match base.map(|(base, stored)| (base, stored, machine.ram.capture(&ending))) {
            Ok((base, stored, Ok(Some(changes)))) => Captured::Changed(changes, Box::new(base), stored),
            Ok((_, Stored::Changes, Err(e)) | (_, _, Err(e @ CaptureError::Cancelled))) => return Err(e.into()),
            unknown => {
                let reason = match unknown {
                    Ok((_, _, Err(e))) => e.to_string(),
                    Ok(_) => "it is not known what it has changed".to_owned(),
                    Err(why_not) => why_not,
                };
                tracing::warn!("the guest stands still until all of its memory is written: {reason}");
                Captured::Written(staging.write_memory(&mut ViewSource::new(&machine.ram), &ending)?)
            }
        },
    };
    Ok((disks, captured))
}

/// The state of a machine that stands still. Not to be called in the owner's turn.
pub(super) fn save(machine: &Machine) -> Result<MachineState, SnapshotError> {
    let devices = machine.save_devices()?;
    let vcpus = machine
        .vcpus
        .iter()
        .enumerate()
        .map(|(number, vcpu)| {
            crate::vcpu::state::save(&vcpu.lock(), &machine.shape)
                .map_err(|source| SnapshotError::VcpuState { vcpu: number, source })
        })
        .collect::<Result<_, _>>()?;
    let vm = crate::kvm::state::save(&machine.vm)?;
    Ok(MachineState { vcpus, vm, devices })
}

/// The part that may take long.
fn write(
    mut staging: Staging,
    memory: Captured,
    disks: Vec<disks::Captured>,
    mut facts: Facts,
    state: &MachineState,
    writing: &Writing,
) -> Result<Written, SnapshotError> {
    let mut parent = None;
    let digest = match memory {
        Captured::Written(digest) => digest,
        Captured::Changed(changes, base, stored) => {
            parent = (stored == Stored::Changes).then(|| base.dir().to_owned());
            staging.write_changes(&base, &changes, stored, writing)?
        }
        Captured::Frozen(frozen, regions) => {
            let image = frozen.finish()?;
            let unreadable = |source| CreateError::Source { offset: 0, source };
            staging.write_memory(&mut FileSource::new(&image, regions).map_err(unreadable)?, writing)?
        }
    };
    facts.devices.drives = disks::write(&mut staging, disks, &writing.cancelled)?;
    let memory_bytes = digest.data_bytes();
    let manifest = staging.commit(digest, facts, state)?;
    Ok(Written { memory_bytes, digest: manifest.digest, parent })
}

pub(super) fn facts(machine: &Machine, readiness: Option<Readiness>, saved: Option<&Configuration>) -> Facts {
    Facts {
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        host: host::facts(),
        // The disks are added when they are written.
        devices: record::devices(&machine.plan),
        readiness: readiness.map(record::readiness),
        config: saved.map(Configuration::digest),
    }
}

/// The memory of a guest that is a private view, read through that view. What it has discarded and not written since is
/// not even looked at.
struct ViewSource {
    memory: GuestMemory,
    regions: Vec<MemoryRegion>,
    contents: Contents,
    size: u64,
}

impl ViewSource {
    fn new(ram: &GuestRam) -> Self {
        ViewSource {
            memory: ram.memory().clone(),
            regions: ram.regions().to_vec(),
            contents: ram.contents(),
            size: ram.size(),
        }
    }
}

impl MemorySource for ViewSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn regions(&self) -> Vec<MemoryRegion> {
        self.regions.clone()
    }

    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.contents.next(from)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let region = self.regions.iter().find(|r| (r.offset..r.offset + r.size_bytes).contains(&at));
            let region = region.ok_or(io::ErrorKind::UnexpectedEof)?;
            let n = (buf.len() - done).min((region.offset + region.size_bytes - at) as usize);
            let from = GuestAddress(region.guest_addr + (at - region.offset));
            self.memory.read_slice(&mut buf[done..done + n], from).map_err(io::Error::other)?;
            done += n;
        }
        Ok(())
    }
}
