//! The machine: what it is made of, and the paths that make it.
//!
//! ```text
//!                 boot                       PATCH /vm Resumed
//!   NotStarted ----------> Paused  ------------------------------> Running
//!       |                  ^    ^  <------------------------------   |  |
//!       |     restore      |    |        PATCH /vm Paused            |  | the guest resets, or cannot go on
//!       +------------------+    +---- snapshot (pause, state, freeze, +  v
//!                                     resume; memory in the background)  the process ends
//! ```
//!
//! - [`config`], [`requests`]: what can be built, and what is legal when (pure)
//! - [`boot`], [`restore`], [`snapshot`]: the three long constructions, each readable from top to bottom
//! - [`reset`]: a checkpoint of the running machine, and back to it in place
//! - [`backend`]: where the memory of a restored guest comes from
//! - [`shell`]: what can be built before it is known what is restored
//! - [`wiring`]: devices and their places; [`disks`]: what lies behind the drives
//! - [`driver`]: the one owner of all this, on the event loop
//! - [`saved`]: a machine that is saved when it stops and goes on when it starts
//! - [`phases`]: what an operation spends its time on
//! - `record`: how a snapshot records the configuration of devices (pure)
//! - `private`: watches over what the guest has of its own
//! - [`keeper`]: keeps memory coming whatever the page server does, and ends the process when the event loop cannot

pub mod backend;
mod bases;
pub mod boot;
pub mod config;
pub mod disks;
pub mod driver;
pub mod keeper;
pub mod phases;
mod private;
mod record;
pub mod requests;
pub mod reset;
pub mod restore;
pub mod saved;
pub mod shell;
pub mod snapshot;
pub mod trim;
pub mod wiring;

use crate::devices::lock;
use crate::devices::virtio::block::overlay::Folded;
use crate::memory::GuestRam;
use crate::memory::kinds::Kinds;
use crate::memory::replay::Replay;
use crate::notice::Notifier;
use crate::vcpu::state::StateShape;
use crate::vcpu::{self, Brake, Buses, Vcpu, VcpuError};
use ::snapshot::load::Lease;
use api_spec::devices::{BalloonStatistics, Drive, NetworkInterface};
use api_spec::stats::VmStats;
use bases::Bases;
use config::DevicePlan;
use keeper::Keeper;
use kvm_ioctls::{VcpuFd, VmFd};
use reset::Resets;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use wiring::Devices;

/// One microVM. Fields are dropped in this order: threads end before the VM, and the VM before its memory.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vec<Vcpu>,
    devices: Devices,
    shape: StateShape,
    vm: VmFd,
    ram: GuestRam,
    page_server: Option<Keeper>,
    /// Pages that are being got ready.
    replay: Option<Replay>,
    /// Set when this process is about to end.
    ending: Arc<AtomicBool>,
    plan: DevicePlan,
    /// Snapshots of its memory.
    bases: Bases,
    /// The snapshot that it was loaded from is in use.
    lease: Option<Lease>,
    /// The checkpoint that it can be reset to, and what that takes.
    resets: Resets,
    /// Whether vCPUs run, or one of them may.
    running: bool,
    /// The vCPUs are to stand still, whoever else lets them run: see [`Machine::halt`].
    halting: bool,
}

impl Machine {
    /// A machine whose vCPUs stand still, with memory that nobody serves and no snapshot.
    fn new(vcpus: Vec<Vcpu>, devices: Devices, shape: StateShape, vm: VmFd, ram: GuestRam, plan: DevicePlan) -> Self {
        Machine {
            vcpus,
            devices,
            shape,
            vm,
            ram,
            page_server: None,
            replay: None,
            ending: Arc::default(),
            plan,
            bases: Bases::default(),
            lease: None,
            resets: Resets::default(),
            running: false,
            halting: false,
        }
    }

    /// Whether vCPUs run.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether a file that guest memory is mapped from is shorter than it was.
    pub fn has_lost_memory(&self) -> bool {
        self.ram.is_cut_short()
    }

    /// A snapshot was taken of the machine, whose manifest has this digest.
    pub fn remember_snapshot(&mut self, dir: &Path, digest: String) {
        self.bases.add(dir, digest);
    }

    /// How often it was reset: a snapshot from before the last time is no snapshot of what it is since.
    pub fn times_reset(&self) -> u64 {
        self.resets.times()
    }

    /// The snapshot that it was loaded from is to be used for nothing more.
    pub fn forget_snapshots(&mut self) {
        self.bases = Bases::default();
        self.lease = None;
    }

    /// Guest memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.ram.size()
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// The configured devices as they stand on the host.
    pub fn plan(&self) -> &DevicePlan {
        &self.plan
    }

    /// Devices and their places.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Has the guest give back so much memory in all, in MiB. `false` if it has no balloon.
    pub fn set_balloon(&mut self, amount_mib: u64) -> bool {
        let (Some(_), Some(config)) = (&self.devices.balloon, &mut self.plan.balloon) else { return false };
        config.amount_mib = amount_mib;
        self.ask_for_balloon(amount_mib);
        true
    }

    /// Asks the guest for a balloon of so many MiB for now. How large it is configured to be stays as it is.
    pub fn ask_for_balloon(&self, amount_mib: u64) {
        if let Some(slot) = &self.devices.balloon {
            lock(&slot.device).set_target(amount_mib);
            slot.config_changed();
        }
    }

    /// How much memory the guest has given back so far, in bytes.
    pub fn given_back(&self) -> u64 {
        self.devices.balloon.as_ref().map_or(0, |slot| lock(&slot.device).stats().discarded_bytes)
    }

    /// Has the guest report statistics every so many seconds. `false` if it has no balloon.
    pub fn set_balloon_interval(&mut self, seconds: u16) -> bool {
        let (Some(slot), Some(config)) = (&self.devices.balloon, &mut self.plan.balloon) else { return false };
        config.stats_polling_interval_s = seconds;
        lock(&slot.device).set_interval(seconds);
        true
    }

    /// Where the balloon stands, if there is one.
    pub fn balloon_statistics(&self) -> Option<BalloonStatistics> {
        self.devices.balloon.as_ref().map(|slot| lock(&slot.device).statistics())
    }

    /// What tells of which kind the pages of guest memory are.
    pub fn memory_kinds(&self) -> Kinds {
        self.ram.kinds()
    }

    /// Puts in what vCPUs and devices have done.
    pub fn count(&self, stats: &mut VmStats) {
        let Devices { serial, vsock, network, entropy, balloon, drives, .. } = &self.devices;
        stats.page_server = self.page_server.as_ref().map(Keeper::stats);
        stats.vcpus = self.vcpus.iter().map(Vcpu::stats).collect();
        stats.drives = drives.iter().map(|slot| lock(&slot.device).stats()).collect();
        stats.network_interfaces = network.iter().map(|slot| lock(&slot.device).stats()).collect();
        stats.vsock = vsock.as_ref().map(|slot| lock(&slot.device).stats());
        stats.entropy = entropy.as_ref().map(|slot| lock(&slot.device).stats());
        stats.balloon = balloon.as_ref().map(|slot| lock(&slot.device).stats());
        stats.console = lock(serial).stats();
    }

    /// Gives the disk of this name the bounds that are said here.
    pub fn set_drive_bounds(&mut self, bounded: Drive) {
        let mut drives = self.plan.drives.iter_mut().zip(&self.devices.drives);
        if let Some((drive, slot)) = drives.find(|(drive, _)| drive.drive_id == bounded.drive_id) {
            let mut device = lock(&slot.device);
            device.set_max_overlay(bounded.max_overlay_mib);
            device.set_rate(bounded.rate_limiter.as_ref());
            *drive = bounded;
        }
    }

    /// Gives the network interface of this name the bounds that are said here.
    pub fn set_network_bounds(&mut self, bounded: NetworkInterface) {
        let mut interfaces = self.plan.network.iter_mut().zip(&self.devices.network);
        if let Some((interface, slot)) = interfaces.find(|(interface, _)| interface.iface_id == bounded.iface_id) {
            lock(&slot.device).set_rates(bounded.rx_rate_limiter.as_ref(), bounded.tx_rate_limiter.as_ref());
            *interface = bounded;
        }
    }

    /// The bound of a disk's overlay, in MiB, if it has one.
    pub fn max_overlay(&self, drive_id: &str) -> Option<u64> {
        self.plan.drives.iter().find(|drive| drive.drive_id == drive_id)?.max_overlay_mib
    }

    /// Whether a disk waits for room in its overlay.
    pub fn is_full(&self, drive_id: &str) -> bool {
        let drives = self.plan.drives.iter().zip(&self.devices.drives);
        drives.filter(|(drive, _)| drive.drive_id == drive_id).any(|(_, slot)| lock(&slot.device).is_full())
    }

    /// Takes over what the background part of a snapshot has made of the disks' layers.
    pub fn adopt_folded(&mut self, folded: Vec<(usize, Folded)>) {
        for (number, folded) in folded {
            if let Some(slot) = self.devices.drives.get(number) {
                lock(&slot.device).adopt(folded);
            }
        }
    }

    /// Lets all vCPUs run, unless they are being halted.
    pub fn resume(&mut self) {
        if self.halting {
            return;
        }
        self.devices.resume();
        self.vcpus.iter().for_each(Vcpu::run);
        self.running = true;
    }

    /// Brings all vCPUs to a standstill, or, if one cannot be brought there, lets all go on as before.
    pub fn pause(&mut self) -> Result<(), VcpuError> {
        let paused = vcpu::pause_all(&self.vcpus, vcpu::PAUSE_DEADLINE);
        match paused {
            Ok(()) => self.running = false,
            Err(_) if self.running && !self.halting => self.vcpus.iter().for_each(Vcpu::run),
            Err(_) => {}
        }
        paused
    }

    /// Brings all vCPUs to a standstill, waiting no longer than `patience` for it. If that fails, those that stand do so
    /// until a later call succeeds.
    pub fn halt(&mut self, patience: Duration) -> Result<(), VcpuError> {
        self.halting = true;
        vcpu::pause_all(&self.vcpus, patience)?;
        (self.running, self.halting) = (false, false);
        Ok(())
    }

    /// The vCPUs are not to be halted any more. Those that stand still do so until [`Machine::resume`].
    pub fn forget_halt(&mut self) {
        self.halting = false;
    }

    /// The keeper of its memory, if that comes from a page server.
    pub fn page_server(&self) -> Option<&Keeper> {
        self.page_server.as_ref()
    }

    /// What stops the vCPUs from another thread. Whoever does so must see to it that [`Machine::halt`] or
    /// [`Machine::resume`] follows.
    pub fn brakes(&self) -> Vec<Brake> {
        self.vcpus.iter().map(Vcpu::brake).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.replay = None;
        let mut ended = vcpu::end_all(&self.vcpus);
        if let Some(server) = &self.page_server {
            // Closing the VM waits for page faults that the kernel has taken over from vCPUs; see `Service`. A vCPU
            // that waits for one itself, deaf to signals on older kernels, is let go by the same.
            server.let_go(&self.ram);
            ended = ended || vcpu::end_all(&self.vcpus);
        }
        if !ended {
            // A vCPU that does not end keeps its VM, and the VM may use this memory until the process ends.
            std::mem::forget(self.ram.memory().clone());
            self.resets.leak();
        }
    }
}

/// Starts the threads of vCPUs, standing still.
fn start_vcpus(fds: Vec<VcpuFd>, buses: &Buses, notifier: &Notifier) -> Result<Vec<Vcpu>, VcpuError> {
    let mut vcpus = Vec::with_capacity(fds.len());
    for (number, fd) in fds.into_iter().enumerate() {
        match Vcpu::start(number as u8, fd, buses.clone(), notifier.clone()) {
            Ok(vcpu) => vcpus.push(vcpu),
            Err(e) => {
                vcpu::end_all(&vcpus);
                return Err(e);
            }
        }
    }
    Ok(vcpus)
}
