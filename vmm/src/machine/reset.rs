//! Checkpoint and reset: a running machine is remembered, and becomes again what it was, in place.
//!
//! ```text
//!   checkpoint:  pause -> device, vCPU and VM state -> disks -> freeze (if the guest writes its own file) -> copy of what is its own
//!                -> logs of what is written -> resume
//!   reset:       pause -> what was written -> memory -> vCPUs, VM, what that has written -> translations -> devices, disks -> resume
//! ```
//!
//! Memory goes first, as when a snapshot is restored: special registers may refer to it. KVM may write to it when it is given
//! state, as it writes the wall clock where an MSR says; so the log is read once more, and what was written goes back too.
//!
//! Nothing is registered anew with KVM or an event loop, and nothing is opened: a reset is no more than copies and calls. What the
//! guest has sent is gone: bytes of its console, frames, and what a client of its vsock device has read. Streams are cut off; the
//! guest is told to forget those that were open at the checkpoint.
//!
//! An interrupt that a device raises goes through a queue of the kernel's. One that was in there when the machine was reset reaches
//! the guest afterwards, which finds nothing to do; every driver must be able to cope with that.

use super::Machine;
use super::bases::Bases;
use super::boot::{fresh_generation, write_generation};
use super::keeper::Keeper;
use super::phases::{Phases, us_since};
use super::snapshot::{self, SnapshotError};
use super::turns::AtWork;
use super::wiring::{Devices, WireError};
use crate::devices::lock;
use crate::devices::virtio::block::overlay::OverlayMark;
use crate::kvm::state::{Clock, VmStateError};
use crate::kvm::written::{Log, WrittenError};
use crate::memory::bits::Bits;
use crate::memory::freeze::{FreezeError, Frozen};
use crate::memory::rollback::{MarkError, PutBack, PutBackError, Rollback};
use crate::vcpu::rewind::{Translations, VcpuMark};
use crate::vcpu::state::VcpuStateError;
use crate::vcpu::{self, VcpuError};
use ::snapshot::state::{DeviceState, MachineState, VmState};
use api_spec::reset::{VmCheckpointed, VmReset};
use std::io;
use std::time::Instant;
use vm_memory::GuestMemoryError;

/// Why there is no checkpoint. The guest goes on.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device.
    #[error(transparent)]
    Device(#[from] AtWork),
    /// State.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// A vCPU's state.
    #[error("vCPU {vcpu}: {source}")]
    VcpuState {
        /// Number of the vCPU.
        vcpu: usize,
        /// What went wrong.
        source: VcpuStateError,
    },
    /// A disk.
    #[error("drive {id} cannot be reset: {source}")]
    Disk {
        /// Which disk.
        id: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// Memory.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MarkError),
    /// Its log.
    #[error(transparent)]
    Log(#[from] WrittenError),
}

/// Why a machine was not reset.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// There is nothing to come back to. The guest goes on.
    #[error("there is no checkpoint: `PUT /vm/checkpoint` sets one")]
    NoCheckpoint,
    /// vCPUs. The guest goes on.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device. The guest goes on.
    #[error(transparent)]
    Device(#[from] AtWork),
    /// Too much was written. The guest stands still, as it is.
    #[error(
        "replace: the guest has written {pages} pages since the checkpoint, and max_dirty_pages is {most}; it stands still, and can be reset without a bound, or ended for another clone to take its place"
    )]
    Dirty {
        /// How many pages.
        pages: u64,
        /// How many there may be.
        most: u64,
    },
    /// A page cannot be had again. The guest stands still, as it is.
    #[error(
        "replace: pages that the guest has written would have to come from its page server again, which was gone or silent since; it stands still: end it, and have another clone take its place"
    )]
    Lost,
    /// The guest is neither what it was nor what it is to be.
    #[error("the VM is reset in part, and ends: {0}")]
    Broken(#[from] Broken),
}

/// What has failed half-way.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The log.
    #[error(transparent)]
    Log(#[from] WrittenError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] PutBackError),
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
    Devices(#[from] WireError),
    /// A disk.
    #[error("drive {id}: {source}")]
    Disk {
        /// Which disk.
        id: String,
        /// What went wrong.
        source: io::Error,
    },
    /// A page cannot be had again.
    #[error("KVM has written a page that cannot be had from the page server again")]
    Lost,
    /// No randomness.
    #[error("cannot get random bytes from the kernel: {0}")]
    Random(rustix::io::Errno),
    /// Generation id.
    #[error("cannot write the generation id into guest memory: {0}")]
    Generation(GuestMemoryError),
    /// The interrupt that says so.
    #[error("cannot tell the guest of its new generation id: {0}")]
    Announce(io::Error),
}

/// What a machine has for being reset.
#[derive(Debug, Default)]
pub struct Resets {
    mark: Option<Mark>,
    /// KVM's log, from the first checkpoint on.
    log: Option<Log>,
    times: u64,
}

impl Resets {
    /// How often the machine was reset.
    pub fn times(&self) -> u64 {
        self.times
    }

    /// What KVM has of it stays until the process ends.
    pub fn leak(&mut self) {
        std::mem::forget(self.log.take());
    }
}

/// What a machine was at its checkpoint.
#[derive(Debug)]
struct Mark {
    devices: DeviceState,
    drives: Vec<Option<OverlayMark>>,
    vcpus: Vec<VcpuMark>,
    vm: VmState,
    memory: Rollback,
    /// Pages that were written since and that the logs do not have any more.
    written: Vec<Bits>,
    /// How large its balloon was to be.
    balloon_mib: Option<u64>,
    /// Snapshots of it, as far as it had changed by then.
    bases: Bases,
}

/// Remembers what the machine is, in place of what was remembered before. The guest runs again, if it ran, when this returns. The
/// layers of its disks are folded with `may_fold`, which nobody else may be doing then.
pub fn checkpoint(machine: &mut Machine, may_fold: bool) -> Result<VmCheckpointed, CheckpointError> {
    let (started, was_running) = (Instant::now(), machine.is_running());
    machine.pause()?;
    let marked = mark(machine, may_fold);
    if was_running {
        machine.resume();
    }
    let pause_us = us_since(started);
    // What takes long, while the guest goes on.
    let marked = marked.and_then(|(mark, frozen)| {
        frozen.map(Frozen::finish).transpose()?;
        Ok(mark)
    });
    match marked {
        Ok(mark) => {
            let private_pages = mark.memory.private_pages();
            machine.resets.mark = Some(mark);
            Ok(VmCheckpointed { private_pages, pause_us, total_us: us_since(started) })
        }
        // Whatever stood in the way of it before that was forgotten.
        Err(e) if machine.has_checkpoint() => Err(e),
        Err(e) => {
            machine.forget_checkpoint();
            Err(e)
        }
    }
}

/// Remembers what a machine is that stands still.
fn mark(machine: &mut Machine, may_fold: bool) -> Result<(Mark, Option<Frozen>), CheckpointError> {
    let MachineState { vcpus, vm, devices } = snapshot::save(machine)?;
    let turns = machine.turns().clone();
    let _turn = turns.take(vcpu::PAUSE_DEADLINE)?;
    machine.forget_mark();
    unmark(&machine.devices);
    let vcpus = vcpus.iter().enumerate().map(|(number, saved)| {
        VcpuMark::of(&machine.vm, saved).map_err(|source| CheckpointError::VcpuState { vcpu: number, source })
    });
    let vcpus = vcpus.collect::<Result<_, _>>()?;
    let drives = machine.devices.drives.iter().map(|slot| {
        let mut block = lock(&slot.device);
        block.mark(may_fold).map_err(|source| CheckpointError::Disk { id: block.id().to_owned(), source })
    });
    let drives = drives.collect::<Result<_, _>>()?;
    let frozen = machine.ram.freeze()?;
    let memory = machine.ram.mark()?;
    machine.ram.keep_written();
    // Nobody has written since it was copied.
    machine.ram.take_written(&mut machine.ram.no_pages());
    match &machine.resets.log {
        Some(log) => log.take(&machine.vm, &machine.ram, &mut machine.ram.no_pages())?,
        None => machine.resets.log = Some(Log::keep(&machine.vm, &machine.ram)?),
    }
    let mark = Mark {
        devices,
        drives,
        vcpus,
        vm,
        memory,
        written: machine.ram.no_pages(),
        balloon_mib: machine.plan.balloon.map(|balloon| balloon.amount_mib),
        bases: machine.bases.clone(),
    };
    Ok((mark, frozen))
}

/// What a reset has undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undone {
    /// Pages that were brought back.
    pub pages: u64,
    /// Of those, pages of the image of which there was no copy yet.
    pub fresh: u64,
    /// Other pages that were dropped, since they were not written for several resets.
    pub dropped: u64,
}

/// Makes the machine what it was at its checkpoint. Its vCPUs stand still when this returns, unless there is no checkpoint, or one
/// of them does not come to a standstill.
pub fn reset(machine: &mut Machine, request: &VmReset, phases: &mut Phases) -> Result<Undone, ResetError> {
    let was_running = machine.is_running();
    let mut mark = machine.resets.mark.take().ok_or(ResetError::NoCheckpoint)?;
    let turns = machine.turns().clone();
    let done = machine.pause().map_err(ResetError::from).and_then(|()| {
        let _turn = turns.take(vcpu::PAUSE_DEADLINE)?;
        phases.end("pause");
        mark.reset(machine, request, phases)
    });
    if !matches!(done, Err(ResetError::Broken(_))) {
        machine.resets.mark = Some(mark);
    }
    if was_running && matches!(done, Err(ResetError::Device(_))) {
        machine.resume();
    }
    let done = done?;
    machine.resets.times += 1;
    Ok(done)
}

impl Machine {
    /// Whether there is something to reset the machine to.
    pub fn has_checkpoint(&self) -> bool {
        self.resets.mark.is_some()
    }

    /// The machine is not to be reset to what it was. Not to be called in the owner's turn.
    fn forget_checkpoint(&mut self) {
        self.forget_mark();
        self.to_devices(unmark);
    }

    fn forget_mark(&mut self) {
        self.resets.mark = None;
        self.ram.forget_mark();
    }

    /// Adds what vCPUs, KVM and devices have written since the last time.
    fn take_written(&self, written: &mut [Bits]) -> Result<(), WrittenError> {
        self.ram.take_written(written);
        self.resets.log.as_ref().map_or(Ok(()), |log| log.take(&self.vm, &self.ram, written))
    }
}

/// The disks are not to be reset to what they were.
fn unmark(devices: &Devices) {
    devices.drives.iter().for_each(|slot| lock(&slot.device).unmark());
}

impl Mark {
    /// Resets a machine whose vCPUs stand still.
    fn reset(&mut self, machine: &mut Machine, request: &VmReset, phases: &mut Phases) -> Result<Undone, ResetError> {
        machine.take_written(&mut self.written).map_err(Broken::from)?;
        let pages = self.written.iter().map(Bits::count).sum();
        phases.end("written");
        if let Some(most) = request.max_dirty_pages.filter(|most| pages > *most) {
            return Err(ResetError::Dirty { pages, most });
        }
        // What hides a wrong page of a store without a server must not be dropped.
        let can_drop = !machine.page_server().is_some_and(Keeper::was_without);
        if !can_drop && self.memory.has_to_drop(&self.written) {
            return Err(ResetError::Lost);
        }
        let done = self.put_back_memory(machine)?;
        let dropped = if can_drop { self.memory.tidy(&machine.ram).map_err(Broken::from)? } else { 0 };
        phases.end("memory");
        self.put_back_state(machine)?;
        machine.take_written(&mut self.written).map_err(Broken::from)?;
        if !can_drop && self.memory.has_to_drop(&self.written) {
            return Err(Broken::Lost.into());
        }
        self.put_back_memory(machine)?;
        phases.end("state");
        if let Some(log) = &machine.resets.log {
            log.forget_tables(&machine.vm).map_err(Broken::from)?;
        }
        phases.end("translations");
        self.put_back_devices(machine)?;
        if request.new_generation {
            renew_generation(machine)?;
        }
        machine.bases = self.bases.clone();
        phases.end("device_state");
        let PutBack { pages, fresh } = done;
        Ok(Undone { pages, fresh, dropped })
    }

    fn put_back_memory(&mut self, machine: &Machine) -> Result<PutBack, Broken> {
        let done = self.memory.put_back(&machine.ram, &self.written)?;
        self.written.iter_mut().for_each(Bits::clear);
        Ok(done)
    }

    fn put_back_state(&self, machine: &Machine) -> Result<(), Broken> {
        let forgotten = machine.resets.log.as_ref().is_some_and(Log::forgets_translations);
        let translations = if forgotten { Translations::Forgotten } else { Translations::Stale };
        for (number, (vcpu, mark)) in machine.vcpus.iter().zip(&self.vcpus).enumerate() {
            let fail = |source| Broken::VcpuState { vcpu: number, source };
            mark.put_back(&vcpu.lock(), number == 0, translations).map_err(fail)?;
        }
        // After the local APICs, as when a snapshot is restored.
        Ok(crate::kvm::state::load(&machine.vm, &self.vm, Clock::GoesOn)?)
    }

    fn put_back_devices(&self, machine: &Machine) -> Result<(), Broken> {
        for (slot, mark) in machine.devices.drives.iter().zip(&self.drives) {
            let mut block = lock(&slot.device);
            if let Some(mark) = mark {
                block.rewind(mark).map_err(|source| Broken::Disk { id: block.id().to_owned(), source })?;
            }
        }
        machine.devices.restore(&machine.plan, &self.devices)?;
        // The host's wish is not the guest's state, and the guest does not know of it any more.
        if let Some(slot) = &machine.devices.balloon
            && machine.plan.balloon.map(|balloon| balloon.amount_mib) != self.balloon_mib
        {
            slot.config_changed();
        }
        Ok(())
    }
}

/// Tells the guest that it is another one than went on from here before.
fn renew_generation(machine: &Machine) -> Result<(), Broken> {
    let id = fresh_generation().map_err(Broken::Random)?;
    write_generation(machine.ram.memory(), &id).map_err(Broken::Generation)?;
    machine.devices.announce_generation().map_err(Broken::Announce)
}
