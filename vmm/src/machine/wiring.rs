//! Devices and their places: ports, addresses, interrupt lines.
//!
//! | device | where | interrupt |
//! |---|---|---|
//! | COM1 | ports 0x3f8 to 0x3ff | GSI 4 |
//! | i8042 | ports 0x60 to 0x64 | none |
//! | pvpanic | port 0x505 | none |
//! | sleep registers | ports 0x600 and 0x601 | none |
//! | virtio-mmio devices, as far as there are: vsock, disks (the root disk first), network interfaces, entropy, balloon | from 0xd000_0000, 4 KiB each | from GSI 5, up to 22 |
//! | boot timer, on request | 0xc000_0000 | none |
//! | generation id | its page of memory | GSI 23, through the ACPI event device |
//!
//! A guest finds them in the ACPI tables ([`crate::arch::acpi`]). Virtio-mmio devices are also named on the kernel command
//! line, for guests that read no ACPI, such as the embedded one. A Linux kernel that heeds both
//! (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`; Debian's do not) takes each device once, and logs that its range is taken when
//! it meets it again.
//!
//! Interrupts reach the guest through irqfds and kicks reach devices through ioeventfds, so that neither passes through a
//! vCPU's thread.

use super::config::DevicePlan;
use super::device_thread::{DeviceThread, Subscriber};
use crate::arch::acpi::VirtioMmio;
use crate::devices::boot_timer::{self, BootTimer};
use crate::devices::bus::{Bus, BusDevice, BusError};
use crate::devices::i8042::{self, I8042};
use crate::devices::lock;
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::{self, Pvpanic};
use crate::devices::serial::{self, Serial, SerialError};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::{self, Balloon, BalloonError};
use crate::devices::virtio::block::{self, Block, BlockConfig, Disk};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::mmio::{MmioTransport, TransportError};
use crate::devices::virtio::net::{self, Net, Tap, TapError};
use crate::devices::virtio::rng::{self, Rng, RngError};
use crate::devices::virtio::vsock::{self, Vsock, VsockError};
use crate::memory::layout::{EVENT_GSI, MMIO_BASE, MMIO_GSI, MMIO_STRIDE};
use crate::memory::{GuestMemory, GuestRam};
use crate::notice::{Notice, Notifier};
use crate::vcpu::Buses;
use api_spec::devices::{self, CacheType, Drive};
use api_spec::vm;
use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, VmFd};
use snapshot::state::{DeviceState, VirtioMmioState};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use uffd_handler::process::Signals;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Offset of `QueueNotify` in a virtio-mmio device (virtio 1.2, section 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// Why devices could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Two devices in one place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// No descriptor.
    #[error("cannot create a descriptor for a device: {0}; the limit on open files may be reached (ulimit -n)")]
    Event(io::Error),
    /// KVM refused an interrupt or a kick.
    #[error("KVM refused the {what} of a device: {source}")]
    Register {
        /// Which of the two.
        what: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A network interface's tap device.
    #[error("network interface {iface_id}: {source}")]
    Tap {
        /// Which interface.
        iface_id: String,
        /// What is wrong with its tap device.
        source: TapError,
    },
    /// The source of entropy.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A device's saved state.
    #[error("{device}: {source}")]
    State {
        /// Which device.
        device: String,
        /// What is wrong with it.
        source: TransportError,
    },
    /// A device that the snapshot lists and did not save, or the reverse.
    #[error(
        "the snapshot's list of devices and their saved state do not agree on {0}; it was not written by this program"
    )]
    DeviceMismatch(&'static str),
}

/// What devices need from outside the machine.
pub struct Outside {
    /// Where notices go.
    pub notifier: Notifier,
    /// Where the guest's console goes. Must not block.
    pub console: Box<dyn Write + Send>,
    /// Signalled when the guest resets its machine.
    pub reset: EventFd,
    /// Signals that ask the process to end.
    pub signals: Signals,
    /// Tell how long a guest that is booted takes for it.
    pub boot_timer: bool,
}

/// The devices of a machine.
pub struct Devices {
    /// What vCPUs' exits lead to.
    pub buses: Buses,
    /// The serial port.
    pub serial: Arc<Mutex<Serial>>,
    /// The vsock device.
    pub vsock: Option<Slot<Vsock>>,
    /// The network interfaces.
    pub network: Vec<Slot<Net>>,
    /// The source of entropy.
    pub entropy: Option<Slot<Rng>>,
    /// The balloon.
    pub balloon: Option<Slot<Balloon>>,
    /// The disks, in the order of the plan.
    pub drives: Vec<Slot<Block>>,
    /// All virtio devices, in order of their places.
    virtio: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    /// The same devices, for their thread.
    subscribers: Vec<Subscriber>,
    /// The interrupt of the event device.
    event: EventFd,
}

/// A virtio device and its transport.
pub struct Slot<D> {
    /// The device.
    pub device: Arc<Mutex<D>>,
    transport: Arc<Mutex<MmioTransport>>,
}

impl<D> Slot<D> {
    fn save_transport(&self) -> VirtioMmioState {
        lock(&self.transport).save()
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        lock(&self.transport).config_changed();
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<String> = self.virtio.iter().map(|device| lock(&**device).name()).collect();
        f.debug_struct("Devices").field("virtio", &names).finish_non_exhaustive()
    }
}

impl Devices {
    /// The state of all devices of a machine whose vCPUs and devices stand still.
    pub fn save(&self) -> DeviceState {
        DeviceState {
            serial: lock(&self.serial).save(),
            vsock: self.vsock.as_ref().map(|slot| vsock::save(&slot.device, || slot.save_transport())),
            network: self.network.iter().map(|slot| net::save(&slot.device, || slot.save_transport())).collect(),
            entropy: self.entropy.as_ref().map(|slot| rng::save(&slot.device, || slot.save_transport())),
            balloon: self.balloon.as_ref().map(|slot| balloon::save(&slot.device, || slot.save_transport())),
            drives: self.drives.iter().map(|slot| block::save(&slot.device, || slot.save_transport())).collect(),
        }
    }

    /// Puts disks behind the drives, in the order of the plan. The guest must not have seen them yet.
    pub fn insert_disks(&self, drives: &[Drive], disks: Vec<Disk>) {
        debug_assert!(self.drives.len() == drives.len() && drives.len() == disks.len());
        for (slot, (drive, disk)) in self.drives.iter().zip(drives.iter().zip(disks)) {
            lock(&slot.device).insert(block_config(drive), disk);
        }
    }

    /// Brings all devices of a machine whose vCPUs stand still to their saved state. The interrupt controllers must have theirs,
    /// since interrupts that were pending are raised again here. Devices leave guest memory alone until [`Devices::resume`].
    pub fn restore(&self, plan: &DevicePlan, saved: &DeviceState) -> Result<(), WireError> {
        check_saved(plan, saved)?;
        let DeviceState { serial, vsock, network, entropy, balloon, drives } = saved;
        lock(&self.serial).restore(serial)?;
        restore(&self.vsock, vsock, vsock::restore)?;
        restore(&self.drives, drives, block::restore)?;
        restore(&self.network, network, net::restore)?;
        restore(&self.entropy, entropy, rng::restore)?;
        restore(&self.balloon, balloon, balloon::restore)
    }

    /// Tells the guest that its generation id has changed.
    pub fn announce_generation(&self) -> io::Result<()> {
        self.event.write(1)
    }

    /// To be called before they work again.
    pub fn resume(&self) {
        for device in &self.virtio {
            lock(&**device).resume();
        }
    }

    /// Starts the thread on which they work.
    pub fn start(&self, notifier: &Notifier) -> io::Result<DeviceThread> {
        let names = self.virtio.iter().map(|device| lock(&**device).name()).collect();
        DeviceThread::start(names, &self.subscribers, notifier.clone())
    }
}

/// Brings devices of one kind to their saved state, as if they were fresh.
fn restore<'a, D: VirtioDevice + 'a, S: 'a>(
    slots: impl IntoIterator<Item = &'a Slot<D>>,
    saved: impl IntoIterator<Item = &'a S>,
    restore: fn(&Mutex<D>, &mut MmioTransport, &S) -> Result<(), TransportError>,
) -> Result<(), WireError> {
    for (Slot { device, transport }, saved) in slots.into_iter().zip(saved) {
        lock(device).reset();
        restore(device, &mut lock(transport), saved)
            .map_err(|source| WireError::State { device: lock(device).name(), source })?;
    }
    Ok(())
}

/// Where the virtio-mmio devices of a machine are.
pub fn virtio_devices(plan: &DevicePlan) -> Vec<VirtioMmio> {
    (0..plan.virtio_count()).map(|index| VirtioMmio { base: address(index), gsi: MMIO_GSI + index }).collect()
}

/// The word of a kernel command line that says the same.
pub fn device_word(device: &VirtioMmio) -> String {
    format!("virtio_mmio.device=4K@{:#x}:{}", device.base, device.gsi)
}

fn address(index: u32) -> u64 {
    MMIO_BASE + u64::from(index) * MMIO_STRIDE
}

/// Builds the devices of a machine, as after power-on, and connects them. There are no disks behind the drives yet
/// ([`Devices::insert_disks`]).
pub fn wire(vm: &VmFd, ram: &GuestRam, plan: &DevicePlan, outside: Outside) -> Result<Devices, WireError> {
    let Outside { notifier, console, reset, signals: _, boot_timer } = outside;
    let DevicePlan { vsock, drives, network, entropy, balloon } = plan;
    let mut pio = Bus::ports();
    let serial = shared(Serial::new(interrupt_line(vm, serial::IRQ)?, console));
    pio.insert(serial::BASE, serial::LEN, serial.clone())?;
    pio.insert(i8042::BASE, i8042::LEN, shared(I8042::new(reset)))?;
    pio.insert(power::BASE, power::LEN, shared(Power::new(notifier.clone())))?;
    pio.insert(pvpanic::BASE, pvpanic::LEN, shared(Pvpanic::new(notifier.clone())))?;
    let event = interrupt_line(vm, EVENT_GSI)?;

    let memory = ram.memory();
    let mut mmio = Bus::memory();
    if boot_timer {
        mmio.insert(boot_timer::BASE, boot_timer::LEN, shared(BootTimer::start()))?;
    }
    let mut virtio = Virtio { vm, memory, mmio, devices: Vec::new(), subscribers: Vec::new() };
    let vsock = vsock.as_ref().map(|config| virtio.add_vsock(config, notifier.clone())).transpose()?;
    let drives = drives.iter().map(|drive| virtio.add_drive(drive, notifier.clone())).collect::<Result<_, _>>()?;
    let network = network.iter().map(|config| virtio.add_net(config)).collect::<Result<_, _>>()?;
    let entropy = entropy.as_ref().map(|config| virtio.add_entropy(config)).transpose()?;
    let balloon = balloon.map(|config| virtio.add_balloon(config, ram)).transpose()?;

    let Virtio { mmio, devices, subscribers, .. } = virtio;
    let buses = Buses { pio: Arc::new(pio), mmio: Arc::new(mmio) };
    Ok(Devices { buses, serial, vsock, drives, network, entropy, balloon, virtio: devices, subscribers, event })
}

/// Whether what was saved is of these devices.
fn check_saved(plan: &DevicePlan, saved: &DeviceState) -> Result<(), WireError> {
    let DevicePlan { vsock, drives, network, entropy, balloon } = plan;
    let agree = [
        ("vsock", vsock.is_some() == saved.vsock.is_some()),
        ("drives", drives.len() == saved.drives.len()),
        ("network interfaces", network.iter().map(|n| &n.iface_id).eq(saved.network.iter().map(|s| &s.iface_id))),
        ("entropy", entropy.is_some() == saved.entropy.is_some()),
        ("balloon", balloon.is_some() == saved.balloon.is_some()),
    ];
    match agree.into_iter().find(|(_, agree)| !agree) {
        Some((device, _)) => Err(WireError::DeviceMismatch(device)),
        None => Ok(()),
    }
}

fn block_config(drive: &Drive) -> BlockConfig {
    BlockConfig {
        id: drive.drive_id.clone(),
        flush: drive.cache_type == CacheType::Writeback,
        rate_limiter: drive.rate_limiter,
        max_overlay_mib: drive.max_overlay_mib,
    }
}

fn shared<T: BusDevice + 'static>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

/// An event whose signals are interrupts of the guest.
fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, WireError> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(WireError::Event)?;
    vm.register_irqfd(&line, gsi).map_err(|source| WireError::Register { what: "interrupt", source })?;
    Ok(line)
}

/// Virtio devices on their way into the machine; each gets the next place.
struct Virtio<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    mmio: Bus,
    devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    subscribers: Vec<Subscriber>,
}

impl Virtio<'_> {
    /// Puts a device behind a transport, and gives them the next place: addresses, interrupt and kicks.
    fn add<D: VirtioDevice + MutEventSubscriber + 'static>(
        &mut self,
        device: Arc<Mutex<D>>,
    ) -> Result<Slot<D>, WireError> {
        let index = self.devices.len() as u32;
        let interrupt = Arc::new(Interrupt::new().map_err(WireError::Event)?);
        let transport = shared(MmioTransport::new(device.clone(), self.memory.clone(), interrupt));
        self.place(index, &transport)?;
        self.devices.push(device.clone());
        self.subscribers.push(device.clone());
        Ok(Slot { device, transport })
    }

    fn place(&mut self, index: u32, transport: &Arc<Mutex<MmioTransport>>) -> Result<(), WireError> {
        let refused = |what| move |source| WireError::Register { what, source };
        let base = address(index);
        self.mmio.insert(base, MMIO_STRIDE, transport.clone())?;
        let transport = lock(transport);
        self.vm.register_irqfd(transport.interrupt().event(), MMIO_GSI + index).map_err(refused("interrupt"))?;
        let notify = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
        for (queue, event) in transport.queue_events().iter().enumerate() {
            self.vm.register_ioevent(event, &notify, queue as u32).map_err(refused("kick"))?;
        }
        Ok(())
    }

    fn add_drive(&mut self, drive: &Drive, notifier: Notifier) -> Result<Slot<Block>, WireError> {
        let halt = Box::new(move |halt| notifier.send(Notice::Halt(halt)));
        let device = Block::new(block_config(drive), halt).map_err(WireError::Event)?;
        self.add(device)
    }

    fn add_vsock(&mut self, config: &vm::Vsock, notifier: Notifier) -> Result<Slot<Vsock>, WireError> {
        // Only what is new: a guest may repeat itself as fast as it can.
        let mut announced = None;
        let ready = Box::new(move |level, kind| {
            if announced.replace(level) != Some(level) {
                notifier.send(Notice::Ready(level, kind));
            }
        });
        let device = Vsock::new(config.guest_cid.into(), &config.uds_path, ready)?;
        self.add(device)
    }

    fn add_net(&mut self, config: &devices::NetworkInterface) -> Result<Slot<Net>, WireError> {
        let tap = Tap::open(&config.host_dev_name)
            .map_err(|source| WireError::Tap { iface_id: config.iface_id.clone(), source })?;
        let device = Net::new(config, Box::new(tap)).map_err(WireError::Event)?;
        self.add(device)
    }

    fn add_entropy(&mut self, config: &devices::Entropy) -> Result<Slot<Rng>, WireError> {
        let device = Rng::new(config.rate_limiter.as_ref())?;
        self.add(device)
    }

    fn add_balloon(&mut self, config: devices::Balloon, ram: &GuestRam) -> Result<Slot<Balloon>, WireError> {
        let device = Balloon::new(config, ram.discarder())?;
        self.add(device)
    }
}
