//! The virtio-mmio transport (virtio 1.2, section 4.2): a page of registers in front of a device.
//!
//! Normally the guest's writes to `QueueNotify` never arrive here: they are registered with KVM as ioeventfds, one for
//! each of [`MmioTransport::queue_events`], at [`QUEUE_NOTIFY`] with the queue's number as data.

use std::sync::{Arc, Mutex};

use snapshot::state::VirtioMmioState;
use vmm_sys_util::eventfd::EventFd;

use super::super::bus::BusDevice;
use super::super::{GuestMemory, lock};
use super::interrupt::{self, Interrupt};
use super::queue::{QueueConfig, QueueError};
use super::status::{self, Status, Step};
use super::{EVENT_IDX, VERSION_1, VirtioDevice};

/// Length of the transport's range, in bytes.
pub const LEN: u64 = 0x1000;
/// Offset of the register with which the driver tells of news in a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface.
const VERSION: u32 = 2;
const VENDOR: u32 = 0;
/// Where the device's own configuration begins.
const CONFIG: u64 = 0x100;
/// What the length of a shared memory region reads as when there is none.
const NO_REGION: u32 = u32::MAX;

/// Why a saved transport cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The driver had accepted features that the device does not offer.
    #[error("saved virtio device has features {0:#x}, which this device does not offer; use the version that saved it")]
    Features(u64),
    /// The status is none that a driver can reach.
    #[error("saved virtio device has the impossible status {0:#x}; the snapshot is damaged")]
    Status(u32),
    /// The interrupt status has unknown bits.
    #[error("saved virtio device has the impossible interrupt status {0:#x}; the snapshot is damaged")]
    InterruptStatus(u32),
    /// Another number of queues.
    #[error("saved virtio device has {saved} queues where this device has {offered}; use the version that saved it")]
    QueueCount {
        /// How many the snapshot has.
        saved: usize,
        /// How many the device has.
        offered: usize,
    },
    /// The driver was ready although a queue was not.
    #[error("saved virtio device is in use although its queue {0} is not ready; the snapshot is damaged")]
    QueueNotReady(usize),
    /// A queue is not in order.
    #[error("saved virtio queue {index} cannot be used: {error}; the snapshot is damaged or of another machine")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        error: QueueError,
    },
}

/// The transport of one device.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    mem: GuestMemory,
    interrupt: Arc<Interrupt>,

    // Facts about the device.
    device_type: u32,
    device_features: u64,
    queue_events: Vec<Arc<EventFd>>,

    // Registers.
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: Status,
    config_generation: u32,
    queues: Vec<QueueConfig>,
}

impl MmioTransport {
    /// A transport in front of `device`, as after power-on.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, mem: GuestMemory, interrupt: Arc<Interrupt>) -> Self {
        let guard = lock(&*device);
        let device_type = guard.device_type();
        let device_features = guard.features() | VERSION_1;
        let queue_events = guard.queue_events();
        let queues = guard.queue_max_sizes().iter().map(|&max| QueueConfig::new(max)).collect();
        drop(guard);
        MmioTransport {
            device,
            mem,
            interrupt,
            device_type,
            device_features,
            queue_events,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: Status::default(),
            config_generation: 0,
            queues,
        }
    }

    /// The event that tells the device of news in each queue, in order: to be registered as ioeventfds.
    pub fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.queue_events
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&mut self) {
        self.renew_config();
        self.interrupt.config_changed();
    }

    /// Marks the configuration as another one than before, without interrupting the driver.
    pub fn renew_config(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// The state to save. The device must have come to rest before.
    pub fn save(&self) -> VirtioMmioState {
        let device = lock(&*self.device);
        let live = device.queues();
        let queues = self.queues.iter().enumerate().map(|(i, config)| config.save(live.get(i))).collect();
        VirtioMmioState {
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            status: self.read_status(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.config_generation,
            queues,
        }
    }

    /// Takes over a saved state, if every field of it is in order, and activates the device if it was active.
    /// Touches no guest memory.
    pub fn restore(&mut self, state: &VirtioMmioState) -> Result<(), TransportError> {
        let VirtioMmioState {
            driver_features,
            device_features_select,
            driver_features_select,
            queue_select,
            status: bits,
            interrupt_status,
            config_generation,
            ref queues,
        } = *state;
        let unknown = driver_features & !self.device_features;
        if unknown != 0 {
            return Err(TransportError::Features(unknown));
        }
        let failed = bits & status::NEEDS_RESET != 0;
        let status = Status::from_bits(bits & !status::NEEDS_RESET).ok_or(TransportError::Status(bits))?;
        if interrupt_status & !interrupt::KNOWN != 0 {
            return Err(TransportError::InterruptStatus(interrupt_status));
        }
        if queues.len() != self.queues.len() {
            return Err(TransportError::QueueCount { saved: queues.len(), offered: self.queues.len() });
        }
        let event_idx = driver_features & EVENT_IDX != 0;
        let (mut configs, mut live) = (Vec::new(), Vec::new());
        for (index, (saved, own)) in queues.iter().zip(&self.queues).enumerate() {
            let (config, queue) = QueueConfig::restore(saved, own.max_size, &self.mem, event_idx)
                .map_err(|error| TransportError::Queue { index, error })?;
            configs.push(config);
            live.push(queue.ok_or(TransportError::QueueNotReady(index)));
        }
        let active = status.running() && !failed;
        let live = if active { Some(live.into_iter().collect::<Result<Vec<_>, _>>()?) } else { None };

        // Everything is in order; from here on nothing fails.
        self.driver_features = driver_features;
        self.device_features_select = device_features_select;
        self.driver_features_select = driver_features_select;
        self.queue_select = queue_select;
        self.status = status;
        self.config_generation = config_generation;
        self.queues = configs;
        self.interrupt.set(interrupt_status, failed);
        if let Some(live) = live {
            lock(&*self.device).activate(self.mem.clone(), live, self.interrupt.clone());
        }
        Ok(())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device_type,
            0x00c => VENDOR,
            0x010 => half(self.device_features, self.device_features_select),
            0x034 => queue.map_or(0, |q| q.max_size.into()),
            0x044 => queue.is_some_and(|q| q.ready).into(),
            0x060 => self.interrupt.status(),
            0x070 => self.read_status(),
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => NO_REGION,
            0x0fc => self.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_select = value,
            0x020 if self.status.choosing_features() => {
                set_half(&mut self.driver_features, self.driver_features_select, value);
            }
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            QUEUE_NOTIFY => self.notify(value),
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.write_status(value),
            0x044 => self.write_ready(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    /// The registers that describe the selected queue; they stand still once the queue is ready.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let queue = match self.queues.get_mut(self.queue_select as usize) {
            Some(queue) if self.status.setting_up_queues() && !queue.ready => queue,
            _ => return,
        };
        match offset {
            // 0 is no size, so that the queue cannot become ready.
            0x038 => queue.size = value.try_into().unwrap_or(0),
            0x080 => set_half(&mut queue.desc_table, 0, value),
            0x084 => set_half(&mut queue.desc_table, 1, value),
            0x090 => set_half(&mut queue.avail_ring, 0, value),
            0x094 => set_half(&mut queue.avail_ring, 1, value),
            0x0a0 => set_half(&mut queue.used_ring, 0, value),
            0x0a4 => set_half(&mut queue.used_ring, 1, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, value: u32) {
        let index = self.queue_select as usize;
        let event_idx = self.event_idx();
        let Some(queue) = self.queues.get_mut(index) else { return };
        if self.status.has(status::DRIVER_OK) {
            if value == 0 && queue.ready {
                self.fail(&format_args!("the driver disabled queue {index} while it was in use"));
            }
        } else if self.status.setting_up_queues() {
            let built = queue.build(&self.mem, event_idx);
            queue.ready = value == 1 && built.is_ok();
            if let (1, Err(error)) = (value, built) {
                self.fail(&format_args!("queue {index} cannot be used: {error}"));
            }
        }
    }

    fn read_status(&self) -> u32 {
        let failed = if self.interrupt.has_failed() { status::NEEDS_RESET } else { 0 };
        self.status.bits() | failed
    }

    fn write_status(&mut self, value: u32) {
        let acceptable = self.driver_features & !self.device_features == 0 && self.driver_features & VERSION_1 != 0;
        match self.status.write(value, acceptable) {
            Ok(Step::Reset) => self.reset(),
            Ok(Step::To(next)) => {
                let starts = next.running() && !self.status.running();
                self.status = next;
                if starts {
                    self.activate();
                }
            }
            Err(error) => log::debug!("virtio device {}: {error}", self.device_type),
        }
    }

    fn activate(&mut self) {
        if self.interrupt.has_failed() {
            return;
        }
        if let Some(index) = self.queues.iter().position(|queue| !queue.ready) {
            return self.fail(&format_args!("the driver started although queue {index} is not ready"));
        }
        let event_idx = self.event_idx();
        let queues: Result<Vec<_>, _> = self.queues.iter().map(|queue| queue.build(&self.mem, event_idx)).collect();
        match queues {
            Ok(queues) => lock(&*self.device).activate(self.mem.clone(), queues, self.interrupt.clone()),
            Err(error) => self.fail(&error),
        }
    }

    fn reset(&mut self) {
        lock(&*self.device).reset();
        self.interrupt.set(0, false);
        self.status = Status::default();
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueConfig::new(queue.max_size);
        }
    }

    /// The driver has broken the rules: the device stops until it is reset.
    fn fail(&self, reason: &dyn std::fmt::Display) {
        lock(&*self.device).reset();
        self.interrupt.fail(&format!("virtio device {}", self.device_type), reason);
    }

    fn notify(&self, queue: u32) {
        if let Some(event) = self.queue_events.get(queue as usize) {
            // The event is a counter that only overflows when the device is as good as told already.
            let _ = event.write(1);
        }
    }

    fn event_idx(&self) -> bool {
        self.driver_features & EVENT_IDX != 0
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            return lock(&*self.device).read_config(offset - CONFIG, data);
        }
        data.fill(0);
        match <&mut [u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => *data = self.read_register(offset).to_le_bytes(),
            _ => log::debug!("virtio device {}: register {offset:#x} was not read as 32 bits", self.device_type),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return lock(&*self.device).write_config(offset - CONFIG, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => self.write_register(offset, u32::from_le_bytes(data)),
            _ => log::debug!("virtio device {}: register {offset:#x} was not written as 32 bits", self.device_type),
        }
    }
}

/// The selected half of a 64-bit value; there are only two.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    let half = u64::from(half);
    match select {
        0 => *value = *value & !0xffff_ffff | half,
        1 => *value = *value & 0xffff_ffff | half << 32,
        _ => {}
    }
}
