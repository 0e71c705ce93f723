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
//! - [`fork`]: other vmms get clones of the running machine
//! - [`reset`]: a checkpoint of the running machine, and back to it in place
//! - [`backend`]: where the memory of a restored guest comes from
//! - [`shell`]: what can be built before it is known what is restored
//! - [`wiring`]: devices and their places; [`disks`]: what lies behind the drives
//! - [`device_thread`]: where devices work; [`turns`]: whose turn it is to touch them; `report`: what is told of them
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
pub mod device_thread;
pub mod disks;
pub mod driver;
pub mod fork;
pub mod keeper;
mod merges;
pub mod phases;
mod private;
mod record;
mod report;
pub mod requests;
pub mod reset;
pub mod restore;
pub mod saved;
pub mod shell;
pub mod snapshot;
pub mod trim;
pub mod turns;
pub mod wiring;

use crate::devices::lock;
use crate::devices::virtio::block::Disk;
use crate::devices::virtio::block::overlay::Folded;
use crate::memory::kinds::Kinds;
use crate::memory::replay::Replay;
use crate::memory::{self, GuestRam};
use crate::notice::Notifier;
use crate::vcpu::state::StateShape;
use crate::vcpu::{self, Brake, Buses, Vcpu, VcpuError};
use ::snapshot::load::Lease;
use ::snapshot::state::DeviceState;
use api_spec::devices::{BalloonStatistics, Drive, Entropy, NetworkInterface};
use api_spec::fork::ForkServed;
use api_spec::stats::{DeviceAtWork, VmStats};
use bases::Bases;
use config::DevicePlan;
use device_thread::DeviceThread;
use keeper::Keeper;
use kvm_ioctls::{VcpuFd, VmFd};
use merges::Merges;
use report::Report;
use reset::Resets;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use turns::{AtWork, Turns};
use uffd_handler::listener::remove_all;
use wiring::Devices;

/// How long the owner waits for a moment to look at the devices, which takes as long as one of their events.
const LOOK_PATIENCE: Duration = Duration::from_millis(20);
/// How long a pause waits for a device to be done with what it is in the midst of, and for vCPUs where nobody serves pages.
const LAST_MOMENT: Duration = Duration::from_millis(100);
/// How long a device may take, at the end of the process, to be done with what it is in the midst of.
const LAST_EVENT: Duration = Duration::from_secs(1);

/// One microVM. Fields are dropped in this order: threads end before the VM, and the VM before its memory.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vec<Vcpu>,
    device_thread: DeviceThread,
    devices: Arc<Devices>,
    /// What was last seen of them.
    report: Mutex<Report>,
    shape: StateShape,
    vm: VmFd,
    ram: GuestRam,
    page_server: Option<Keeper>,
    /// Where that serves what, for others to be served likewise.
    served: Option<ForkServed>,
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
    /// The copies that are made of its disks' layers.
    merges: Merges,
    /// Whether vCPUs run, or one of them may.
    running: bool,
    /// The vCPUs are to stand still, whoever else lets them run: see [`Machine::halt`].
    halting: bool,
}

impl Machine {
    /// A machine whose vCPUs and devices stand still, with memory that nobody serves and no snapshot.
    fn new(
        (vcpus, device_thread): (Vec<Vcpu>, DeviceThread),
        devices: Devices,
        shape: StateShape,
        vm: VmFd,
        ram: GuestRam,
        plan: DevicePlan,
    ) -> Self {
        Machine {
            vcpus,
            device_thread,
            report: Mutex::new(Report::of(&devices)),
            devices: Arc::new(devices),
            shape,
            vm,
            ram,
            page_server: None,
            served: None,
            replay: None,
            ending: Arc::default(),
            plan,
            bases: Bases::default(),
            lease: None,
            resets: Resets::default(),
            merges: Merges::default(),
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
        if self.devices.balloon.is_some() {
            self.to_devices(move |devices| {
                if let Some(slot) = &devices.balloon {
                    lock(&slot.device).set_target(amount_mib);
                    slot.config_changed();
                }
            });
        }
    }

    /// Does something to the devices, between two of their events: now, or when the one is over that is being handled.
    fn to_devices(&self, errand: impl FnOnce(&Devices) + Send + 'static) {
        let devices = self.devices.clone();
        self.turns().have_done(move || errand(&devices));
    }

    /// The state of the devices of a machine that stands still. They first do what the guest has asked for; where that may have to wait
    /// for a page or a disk, it is their thread that waits.
    fn save_devices(&self) -> Result<DeviceState, AtWork> {
        let devices = self.devices.clone();
        let may_wait = self.page_server.is_some() || !devices.drives.is_empty();
        match may_wait {
            true => self.device_thread.ask(vcpu::PAUSE_DEADLINE, move || devices.save()),
            false => self.turns().look(vcpu::PAUSE_DEADLINE, || devices.save()),
        }
    }

    /// Whose turn it is to touch the devices.
    fn turns(&self) -> &Arc<Turns> {
        self.device_thread.turns()
    }

    /// What the devices have done, or had when they could last be looked at; and which device is in the way, if one is.
    fn report(&self) -> (Report, Option<DeviceAtWork>) {
        let mut last = lock(&self.report);
        let at_work = self.turns().look(LOOK_PATIENCE, || *last = Report::of(&self.devices)).err();
        (last.clone(), at_work.map(|at_work| at_work.document()))
    }

    /// How much memory the guest has given back so far, in bytes.
    pub fn given_back(&self) -> u64 {
        self.report().0.balloon.map_or(0, |(stats, _)| stats.discarded_bytes)
    }

    /// Has the guest report statistics every so many seconds. `false` if it has no balloon.
    pub fn set_balloon_interval(&mut self, seconds: u16) -> bool {
        let (Some(_), Some(config)) = (&self.devices.balloon, &mut self.plan.balloon) else { return false };
        config.stats_polling_interval_s = seconds;
        self.to_devices(move |devices| {
            devices.balloon.iter().for_each(|slot| lock(&slot.device).set_interval(seconds));
        });
        true
    }

    /// Where the balloon stands, if there is one.
    pub fn balloon_statistics(&self) -> Option<BalloonStatistics> {
        self.report().0.balloon.map(|(_, statistics)| statistics)
    }

    /// What tells of which kind the pages of guest memory are.
    pub fn memory_kinds(&self) -> Kinds {
        self.ram.kinds()
    }

    /// Puts in what vCPUs and devices have done.
    pub fn count(&self, stats: &mut VmStats) {
        let (Report { drives, network, vsock, entropy, balloon }, at_work) = self.report();
        stats.page_server = self.page_server.as_ref().map(Keeper::stats);
        stats.vcpus = self.vcpus.iter().map(Vcpu::stats).collect();
        stats.drives = drives;
        stats.network_interfaces = network;
        stats.vsock = vsock;
        stats.entropy = entropy;
        stats.balloon = balloon.map(|(stats, _)| stats);
        stats.device_at_work = at_work;
        stats.console = lock(&self.devices.serial).stats();
    }

    /// Makes devices that nobody has used yet those of a guest that was configured so: puts disks behind the drives, and bounds all of
    /// them as they were. Host sides stay what they are. The devices are the same ones, in the same order ([`shell::Shape::fits`]).
    fn adopt(&mut self, guest: DevicePlan, disks: Vec<Disk>) {
        let DevicePlan { drives, network, entropy, vsock: _, balloon: _ } = guest;
        self.devices.insert_disks(&drives, disks);
        self.plan.drives = drives;
        let interfaces = self.plan.network.iter_mut().zip(&self.devices.network);
        for ((own, slot), NetworkInterface { rx_rate_limiter, tx_rate_limiter, .. }) in interfaces.zip(network) {
            lock(&slot.device).set_rates(rx_rate_limiter.as_ref(), tx_rate_limiter.as_ref());
            (own.rx_rate_limiter, own.tx_rate_limiter) = (rx_rate_limiter, tx_rate_limiter);
        }
        if let Some(slot) = &self.devices.entropy {
            lock(&slot.device).set_rate(entropy.and_then(|entropy| entropy.rate_limiter).as_ref());
        }
        self.plan.entropy = entropy;
    }

    /// Gives the disk of this name the bounds that are said here.
    pub fn set_drive_bounds(&mut self, bounded: Drive) {
        let mut drives = self.plan.drives.iter_mut().enumerate();
        if let Some((number, drive)) = drives.find(|(_, drive)| drive.drive_id == bounded.drive_id) {
            let (max_overlay_mib, rate_limiter) = (bounded.max_overlay_mib, bounded.rate_limiter);
            *drive = bounded;
            self.to_devices(move |devices| {
                let mut device = lock(&devices.drives[number].device);
                device.set_max_overlay(max_overlay_mib);
                device.set_rate(rate_limiter.as_ref());
            });
        }
    }

    /// Gives the network interface of this name the bounds that are said here.
    pub fn set_network_bounds(&mut self, bounded: NetworkInterface) {
        let mut interfaces = self.plan.network.iter_mut().enumerate();
        if let Some((number, interface)) = interfaces.find(|(_, interface)| interface.iface_id == bounded.iface_id) {
            let (rx, tx) = (bounded.rx_rate_limiter, bounded.tx_rate_limiter);
            *interface = bounded;
            self.to_devices(move |devices| {
                lock(&devices.network[number].device).set_rates(rx.as_ref(), tx.as_ref());
            });
        }
    }

    /// Bounds what the guest gets of its source of entropy, if it has one. The machine must not have been resumed yet.
    pub fn set_entropy_bound(&mut self, bounded: Entropy) {
        if let Some(entropy) = &mut self.plan.entropy {
            *entropy = bounded;
            self.to_devices(move |devices| {
                if let Some(slot) = &devices.entropy {
                    lock(&slot.device).set_rate(bounded.rate_limiter.as_ref());
                }
            });
        }
    }

    /// The bound of a disk's overlay, in MiB, if it has one.
    pub fn max_overlay(&self, drive_id: &str) -> Option<u64> {
        self.plan.drives.iter().find(|drive| drive.drive_id == drive_id)?.max_overlay_mib
    }

    /// Whether a disk waits for room in its overlay, as far as it can be looked at: if it still does when it is resumed, it says so.
    pub fn is_full(&self, drive_id: &str) -> bool {
        let mut drives = self.plan.drives.iter().zip(&self.devices.drives);
        let drive = drives.find(|(drive, _)| drive.drive_id == drive_id);
        drive
            .is_some_and(|(_, slot)| self.turns().look(LOOK_PATIENCE, || lock(&slot.device).is_full()).unwrap_or(false))
    }

    /// Takes over what the background part of a snapshot, or of a fork, has made of the disks' layers.
    pub fn adopt_folded(&mut self, folded: Vec<(usize, Folded)>) {
        self.to_devices(move |devices| {
            for (number, folded) in folded {
                if let Some(slot) = devices.drives.get(number) {
                    lock(&slot.device).adopt(&folded);
                }
            }
        });
    }

    /// Lets devices work and all vCPUs run, unless they are being halted. Not to be called in the owner's turn.
    pub fn resume(&mut self) {
        if self.halting {
            return;
        }
        self.to_devices(Devices::resume);
        self.turns().go();
        self.vcpus.iter().for_each(Vcpu::run);
        self.running = true;
    }

    /// Brings all vCPUs to a standstill, or, if one cannot be brought there, lets all go on as before. Devices begin nothing more;
    /// one that is at work for longer is waited for by whoever has to touch it.
    pub fn pause(&mut self) -> Result<(), VcpuError> {
        // One that waits for a page which nobody serves does so for longer than anybody waits here.
        let is_served = self.page_server.as_ref().is_none_or(|server| server.unserved().is_none());
        let patience = if is_served { vcpu::PAUSE_DEADLINE } else { LAST_MOMENT };
        let paused = vcpu::pause_all(&self.vcpus, patience);
        match paused {
            Ok(()) => {
                self.running = false;
                self.turns().stop();
                // What it is in the midst of is over in a moment, most likely.
                drop(self.turns().take(LAST_MOMENT));
            }
            Err(_) if self.running && !self.halting => self.vcpus.iter().for_each(Vcpu::run),
            Err(_) => {}
        }
        paused
    }

    /// Brings all vCPUs to a standstill, waiting no longer than `patience` for it. If that fails, those that stand do so
    /// until a later call succeeds.
    pub fn halt(&mut self, patience: Duration) -> Result<(), VcpuError> {
        self.halting = true;
        self.turns().stop();
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

    /// Closes the machine, as the last thing before the process ends.
    pub fn close(mut self) {
        if !self.device_thread.end(LAST_EVENT) {
            // It may be in the midst of writing to a disk what is in a page that does not come, and must not find anything in its
            // place. So it waits until the process ends; what would be closed here is closed by that.
            tracing::info!("a device is in the midst of something, and ends with the process");
            remove_all();
            if self.page_server.is_some() {
                memory::cut_off(self.ram.memory());
            }
            std::mem::forget(self);
        }
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
        let devices_ended = self.device_thread.end(LAST_EVENT);
        let mut ended = vcpu::end_all(&self.vcpus);
        if let Some(server) = self.page_server.as_ref().filter(|_| devices_ended) {
            // Closing the VM waits for page faults that the kernel has taken over from vCPUs; see `Service`. A vCPU
            // that waits for one itself, deaf to signals on older kernels, is let go by the same.
            server.let_go(&self.ram);
            ended = ended || vcpu::end_all(&self.vcpus);
        }
        if !ended || !devices_ended {
            // A vCPU that does not end keeps its VM, and the VM may use this memory until the process ends; or a device may.
            std::mem::forget(self.ram.memory().clone());
            self.resets.leak();
        }
    }
}

/// Starts the threads of vCPUs and devices, standing still.
fn start_threads(
    fds: Vec<VcpuFd>,
    devices: &Devices,
    notifier: &Notifier,
) -> Result<(Vec<Vcpu>, DeviceThread), VcpuError> {
    let device_thread = devices.start(notifier).map_err(VcpuError::Start)?;
    Ok((start_vcpus(fds, &devices.buses, notifier)?, device_thread))
}

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
