//! Devices and their places: ports, addresses, interrupt lines.
//!
//! | device | where | interrupt |
//! |---|---|---|
//! | COM1 | ports 0x3f8 to 0x3ff | GSI 4 |
//! | i8042 | ports 0x60 to 0x64 | none |
//! | pvpanic | port 0x505 | none |
//! | sleep registers | ports 0x600 and 0x601 | none |
//! | vsock on virtio-mmio | 0xd000_0000, 4 KiB | GSI 5 |
//! | generation id | its page of memory | GSI 23, through the ACPI event device |
//!
//! A guest finds them in the ACPI tables ([`crate::arch::acpi`]). Virtio-mmio devices are also named on the kernel command
//! line, for guests that read no ACPI, such as the embedded one. A Linux kernel that heeds both
//! (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`; Debian's do not) takes each device once, and logs that its range is taken when
//! it meets it again.
//!
//! Interrupts reach the guest through irqfds and kicks reach devices through ioeventfds, so that neither passes through a
//! vCPU's thread.

use crate::arch::acpi::VirtioMmio;
use crate::devices::bus::{Bus, BusDevice, BusError};
use crate::devices::i8042::{self, I8042};
use crate::devices::lock;
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::{self, Pvpanic};
use crate::devices::serial::{self, Serial, SerialError};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::vsock::{self, Vsock, VsockError};
use crate::memory::GuestMemory;
use crate::memory::layout::{EVENT_GSI, MMIO_BASE, MMIO_GSI, MMIO_STRIDE};
use crate::notice::{Notice, Notifier};
use crate::vcpu::Buses;
use api_spec::vm;
use kvm_ioctls::{IoEventAddress, VmFd};
use snapshot::state::DeviceState;
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
    /// No event descriptor.
    #[error("cannot create an event descriptor: {0}; the limit on open files may be reached (ulimit -n)")]
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
    /// The vsock device's saved state.
    #[error(transparent)]
    VsockState(#[from] vsock::RestoreError),
    /// A device that the snapshot lists and did not save, or the reverse.
    #[error(
        "the snapshot's list of devices and their saved state do not agree on vsock; it was not written by this program"
    )]
    DeviceMismatch,
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
}

/// The devices of a machine.
pub struct Devices {
    /// What vCPUs' exits lead to.
    pub buses: Buses,
    /// The serial port.
    pub serial: Arc<Mutex<Serial>>,
    /// The vsock device and its transport.
    pub vsock: Option<VsockSlot>,
    /// The interrupt of the event device.
    event: EventFd,
}

/// The vsock device and its transport.
#[derive(Clone)]
pub struct VsockSlot {
    /// The device.
    pub device: Arc<Mutex<Vsock>>,
    transport: Arc<Mutex<MmioTransport>>,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").field("vsock", &self.vsock.is_some()).finish_non_exhaustive()
    }
}

impl Devices {
    /// The state of all devices of a machine whose vCPUs stand still.
    pub fn save(&self) -> DeviceState {
        DeviceState {
            serial: lock(&self.serial).save(),
            vsock: self.vsock.as_ref().map(|slot| vsock::save(&slot.device, &lock(&slot.transport))),
        }
    }

    /// Tells the guest that its generation id has changed.
    pub fn announce_generation(&self) -> io::Result<()> {
        self.event.write(1)
    }

    /// To be called before vCPUs run.
    pub fn resume(&self) {
        if let Some(slot) = &self.vsock {
            lock(&slot.device).resume();
        }
    }
}

/// Where the virtio-mmio devices of a machine are.
pub fn virtio_devices(has_vsock: bool) -> Vec<VirtioMmio> {
    (0..u32::from(has_vsock)).map(|index| VirtioMmio { base: address(index), gsi: MMIO_GSI + index }).collect()
}

/// The word of a kernel command line that says the same.
pub fn device_word(device: &VirtioMmio) -> String {
    format!("virtio_mmio.device=4K@{:#x}:{}", device.base, device.gsi)
}

fn address(index: u32) -> u64 {
    MMIO_BASE + u64::from(index) * MMIO_STRIDE
}

/// Builds the devices of a machine, fresh or from saved state, and connects them.
pub fn wire(
    vm: &VmFd,
    memory: &GuestMemory,
    vsock: Option<&vm::Vsock>,
    saved: Option<&DeviceState>,
    outside: Outside,
) -> Result<Devices, WireError> {
    let Outside { notifier, console, reset, signals: _ } = outside;
    if saved.is_some_and(|saved| saved.vsock.is_some() != vsock.is_some()) {
        return Err(WireError::DeviceMismatch);
    }
    let (mut pio, mut mmio) = (Bus::ports(), Bus::memory());
    let serial = wire_serial(vm, &mut pio, saved, console)?;
    pio.insert(i8042::BASE, i8042::LEN, shared(I8042::new(reset)))?;
    pio.insert(power::BASE, power::LEN, shared(Power::new(notifier.clone())))?;
    pio.insert(pvpanic::BASE, pvpanic::LEN, shared(Pvpanic::new(notifier.clone())))?;
    let event = interrupt_line(vm, EVENT_GSI)?;
    let vsock = vsock.map(|config| wire_vsock(vm, &mut mmio, memory, config, saved, notifier)).transpose()?;
    Ok(Devices { buses: Buses { pio: Arc::new(pio), mmio: Arc::new(mmio) }, serial, vsock, event })
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

fn wire_serial(
    vm: &VmFd,
    pio: &mut Bus,
    saved: Option<&DeviceState>,
    console: Box<dyn Write + Send>,
) -> Result<Arc<Mutex<Serial>>, WireError> {
    let irq = interrupt_line(vm, serial::IRQ)?;
    let serial = shared(match saved {
        None => Serial::new(irq, console),
        Some(saved) => Serial::restore(&saved.serial, irq, console)?,
    });
    pio.insert(serial::BASE, serial::LEN, serial.clone())?;
    Ok(serial)
}

fn wire_vsock(
    vm: &VmFd,
    mmio: &mut Bus,
    memory: &GuestMemory,
    config: &vm::Vsock,
    saved: Option<&DeviceState>,
    notifier: Notifier,
) -> Result<VsockSlot, WireError> {
    // Only what is new: a guest may repeat itself as fast as it can.
    let mut announced = None;
    let ready = Box::new(move |level, _kind| {
        if announced.replace(level) != Some(level) {
            notifier.send(Notice::Ready(level));
        }
    });
    let device = Vsock::new(config.guest_cid.into(), &config.uds_path, ready)?;
    let interrupt = Arc::new(Interrupt::new().map_err(WireError::Event)?);
    let transport = shared(MmioTransport::new(device.clone(), memory.clone(), interrupt));
    if let Some(saved) = saved.and_then(|saved| saved.vsock.as_ref()) {
        vsock::restore(&device, &mut lock(&transport), saved)?;
    }
    place(vm, mmio, 0, &transport)?;
    Ok(VsockSlot { device, transport })
}

/// Gives virtio-mmio device number `index` its addresses, its interrupt and its kicks.
fn place(vm: &VmFd, mmio: &mut Bus, index: u32, transport: &Arc<Mutex<MmioTransport>>) -> Result<(), WireError> {
    let refused = |what| move |source| WireError::Register { what, source };
    let base = address(index);
    mmio.insert(base, MMIO_STRIDE, transport.clone())?;
    let transport = lock(transport);
    vm.register_irqfd(transport.interrupt().event(), MMIO_GSI + index).map_err(refused("interrupt"))?;
    let notify = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
    for (queue, event) in transport.queue_events().iter().enumerate() {
        vm.register_ioevent(event, &notify, queue as u32).map_err(refused("kick"))?;
    }
    Ok(())
}
