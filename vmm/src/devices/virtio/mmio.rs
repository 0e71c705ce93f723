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
    /// The device had kept a buffer that its queue cannot have.
    #[error("saved virtio device keeps buffer {0}, which its queue does not have; the snapshot is damaged")]
    Held(u16),
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
    name: String,
    device_type: u32,
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
        let name = guard.name();
        let device_type = guard.device_type();
        let queue_events = guard.queue_events();
        let queues = guard.queue_max_sizes().iter().map(|&max| QueueConfig::new(max)).collect();
        drop(guard);
        MmioTransport {
            device,
            mem,
            interrupt,
            name,
            device_type,
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

    /// What the device offers, now: what lies behind it may have come after the transport.
    fn device_features(&self) -> u64 {
        lock(&*self.device).features() | VERSION_1
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
        let unknown = driver_features & !self.device_features();
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
        let used = if active { lock(&*self.device).negotiated(driver_features) } else { 0 };
        let live = live.into_iter().take(used).collect::<Result<Vec<_>, _>>()?;

        // Everything is in order; from here on nothing fails.
        self.driver_features = driver_features;
        self.device_features_select = device_features_select;
        self.driver_features_select = driver_features_select;
        self.queue_select = queue_select;
        self.status = status;
        self.config_generation = config_generation;
        self.queues = configs;
        self.interrupt.set(interrupt_status, failed);
        match active {
            // It raises again what may have been lost when it is resumed.
            true => lock(&*self.device).activate(self.mem.clone(), live, self.interrupt.clone()),
            // Its driver may still have to hear that it has failed.
            false => self.interrupt.raise_again(),
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
            0x010 => half(self.device_features(), self.device_features_select),
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
        let acceptable = self.driver_features & !self.device_features() == 0 && self.driver_features & VERSION_1 != 0;
        match self.status.write(value, acceptable) {
            Ok(Step::Reset) => self.reset(),
            Ok(Step::To(next)) => {
                let starts = next.running() && !self.status.running();
                self.status = next;
                if starts {
                    self.activate();
                }
            }
            Err(error) => tracing::debug!("{}: {error}", self.name),
        }
    }

    fn activate(&mut self) {
        if self.interrupt.has_failed() {
            return;
        }
        let used = lock(&*self.device).negotiated(self.driver_features);
        if let Some(index) = self.queues.iter().take(used).position(|queue| !queue.ready) {
            return self.fail(&format_args!("the driver started although queue {index} is not ready"));
        }
        let event_idx = self.event_idx();
        let queues = self.queues.iter().take(used);
        let queues: Result<Vec<_>, _> = queues.map(|queue| queue.build(&self.mem, event_idx)).collect();
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
        self.interrupt.fail(&self.name, reason);
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
            return read_config(&lock(&*self.device).config(), offset - CONFIG, data);
        }
        data.fill(0);
        match <&mut [u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => *data = self.read_register(offset).to_le_bytes(),
            _ => tracing::debug!("{}: register {offset:#x} was not read as 32 bits", self.name),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return lock(&*self.device).write_config(offset - CONFIG, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => self.write_register(offset, u32::from_le_bytes(data)),
            _ => tracing::debug!("{}: register {offset:#x} was not written as 32 bits", self.name),
        }
    }
}

/// Reads a configuration space from `offset` on; beyond its end there are zeros.
fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
    data[len..].fill(0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::state::QueueState;
    use virtio_queue::{Queue, QueueT};

    const FEATURE: u64 = 1 << 5;

    /// A device with two queues that only remembers.
    struct Probe {
        events: Vec<Arc<EventFd>>,
        queues: Vec<Queue>,
        resets: usize,
        config: Vec<u8>,
    }

    impl VirtioDevice for Probe {
        fn name(&self) -> String {
            "probe".to_owned()
        }
        fn device_type(&self) -> u32 {
            42
        }
        fn queue_max_sizes(&self) -> &'static [u16] {
            &[16, 8]
        }
        fn features(&self) -> u64 {
            FEATURE | EVENT_IDX
        }
        fn queue_events(&self) -> Vec<Arc<EventFd>> {
            self.events.clone()
        }
        fn config(&self) -> Vec<u8> {
            vec![0, 1, 2, 3, 4, 5, 6, 7, 7]
        }
        fn write_config(&mut self, _: u64, data: &[u8]) {
            self.config = data.to_vec();
        }
        fn activate(&mut self, _: GuestMemory, queues: Vec<Queue>, _: Arc<Interrupt>) {
            self.queues = queues;
        }
        fn queues(&self) -> &[Queue] {
            &self.queues
        }
        fn reset(&mut self) {
            self.resets += 1;
            self.queues.clear();
        }
        fn resume(&mut self) {}
    }

    struct Rig {
        transport: MmioTransport,
        device: Arc<Mutex<Probe>>,
    }

    impl Rig {
        fn new() -> Self {
            let event = || Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
            let device = Probe { events: vec![event(), event()], queues: vec![], resets: 0, config: vec![] };
            let device = Arc::new(Mutex::new(device));
            let mem = crate::memory::from_zero(0x10000);
            let interrupt = Arc::new(Interrupt::new().unwrap());
            Rig { transport: MmioTransport::new(device.clone(), mem, interrupt), device }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0xee; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }

        fn negotiate(&mut self, features: u64) {
            self.write(0x70, 1);
            self.write(0x70, 3);
            for select in [0, 1] {
                self.write(0x24, select);
                self.write(0x20, half(features, select));
            }
            self.write(0x70, 0xb);
        }

        fn set_up_queue(&mut self, index: u32, base: u32) {
            self.write(0x30, index);
            self.write(0x38, 8);
            self.write(0x80, base);
            self.write(0x90, base + 0x400);
            self.write(0xa0, base + 0x800);
            self.write(0x44, 1);
        }

        fn start(&mut self) {
            self.negotiate(VERSION_1 | FEATURE);
            self.set_up_queue(0, 0x1000);
            self.set_up_queue(1, 0x2000);
            self.write(0x70, 0xf);
        }

        fn live_queues(&self) -> usize {
            lock(&self.device).queues.len()
        }
    }

    #[test]
    fn a_driver_finds_and_starts_the_device() {
        let mut rig = Rig::new();
        assert_eq!([0, 4, 8].map(|offset| rig.read(offset)), [MAGIC, 2, 42]);
        rig.write(0x14, 0);
        assert_eq!(rig.read(0x10), FEATURE as u32 | EVENT_IDX as u32);
        rig.write(0x14, 1);
        assert_eq!(rig.read(0x10), 1, "VERSION_1 is always offered");
        rig.start();
        assert_eq!(rig.read(0x70), 0xf);
        let device = lock(&rig.device);
        assert_eq!(device.queues.iter().map(QueueT::size).collect::<Vec<_>>(), [8, 8]);
        assert_eq!(device.queues[1].used_ring(), 0x2800);
    }

    #[test]
    fn unknown_features_and_legacy_drivers_are_refused() {
        for features in [VERSION_1 | 1 << 20, FEATURE] {
            let mut rig = Rig::new();
            rig.negotiate(features);
            assert_eq!(rig.read(0x70), 3);
        }
    }

    #[test]
    fn a_bad_queue_does_not_become_ready_and_stops_the_device() {
        for (register, value) in
            [(0x38, 0), (0x38, 7), (0x38, 0x10008), (0x80, 0x20000), (0x84, 1), (0x90, 1), (0xa0, 2)]
        {
            let mut rig = Rig::new();
            rig.negotiate(VERSION_1);
            rig.set_up_queue(1, 0x2000);
            rig.write(0x44, 0);
            rig.write(register, value);
            rig.write(0x44, 1);
            assert_eq!(rig.read(0x44), 0, "{register:#x}");
            assert_eq!(rig.read(0x70), 0xb | status::NEEDS_RESET);
            rig.set_up_queue(0, 0x1000);
            rig.write(0x70, 0xf);
            assert_eq!(rig.live_queues(), 0, "a failed device does not start");
        }
    }

    #[test]
    fn starting_without_a_queue_stops_the_device() {
        let mut rig = Rig::new();
        rig.negotiate(VERSION_1);
        rig.set_up_queue(0, 0x1000);
        rig.write(0x70, 0xf);
        assert_eq!((rig.read(0x70), rig.live_queues()), (0xf | status::NEEDS_RESET, 0));
        assert_eq!(rig.read(0x60), 2, "the driver is told");
    }

    #[test]
    fn queues_stand_still_while_in_use_and_disabling_one_stops_the_device() {
        let mut rig = Rig::new();
        rig.start();
        rig.write(0x80, 0x3000);
        rig.write(0x38, 4);
        assert_eq!(rig.transport.save().queues[1].desc_table, 0x2000);
        assert_eq!(rig.read(0x70), 0xf);
        rig.write(0x44, 0);
        assert_eq!((rig.read(0x70), rig.live_queues()), (0xf | status::NEEDS_RESET, 0));
        rig.write(0x70, 0);
        assert_eq!(rig.read(0x70), 0);
        rig.start();
        assert_eq!((rig.read(0x70), rig.live_queues()), (0xf, 2), "a reset heals");
    }

    #[test]
    fn notifications_that_arrive_as_writes_reach_the_device() {
        let mut rig = Rig::new();
        rig.write(0x50, 1);
        rig.write(0x50, 9);
        assert!(lock(&rig.device).events[0].read().is_err());
        assert_eq!(lock(&rig.device).events[1].read().unwrap(), 1);
    }

    #[test]
    fn interrupts_are_shown_and_acknowledged() {
        let mut rig = Rig::new();
        rig.transport.interrupt().used_buffers();
        rig.transport.config_changed();
        assert_eq!((rig.read(0x60), rig.read(0xfc)), (3, 1));
        rig.write(0x64, 1);
        assert_eq!(rig.read(0x60), 2);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let mut rig = Rig::new();
        let mut data = [0xee; 8];
        rig.transport.read(0, &mut data);
        assert_eq!(data, [0; 8]);
        rig.transport.read(2, &mut data[..4]);
        assert_eq!(data, [0; 8]);
        rig.transport.write(0x70, &[1]);
        assert_eq!(rig.read(0x70), 0);
        rig.write(0x30, 77);
        assert_eq!((rig.read(0x34), rig.read(0x44)), (0, 0), "there is no such queue");
        rig.write(0x38, 4);
        rig.write(0x44, 1);
        rig.transport.read(0x100 + 7, &mut data[..2]);
        assert_eq!(data[..2], [7, 7]);
        for (offset, read) in [(6, [6, 7, 7, 0]), (9, [0; 4]), (0xefc, [0; 4])] {
            let mut data = [0xff; 4];
            rig.transport.read(0x100 + offset, &mut data);
            assert_eq!(data, read, "what is beyond the configuration reads as zeros");
        }
        rig.transport.write(0x100, &[5]);
        assert_eq!(lock(&rig.device).config, [5]);
    }

    fn saved() -> VirtioMmioState {
        let mut rig = Rig::new();
        rig.start();
        rig.transport.interrupt().used_buffers();
        rig.transport.renew_config();
        rig.write(0x14, 1);
        lock(&rig.device).queues[1].set_next_avail(7);
        lock(&rig.device).queues[1].set_next_used(6);
        rig.transport.save()
    }

    #[test]
    fn every_field_survives_save_and_restore() {
        let state = saved();
        assert_eq!((state.queues[1].next_avail, state.queues[1].next_used), (7, 6));
        let mut rig = Rig::new();
        rig.transport.restore(&state).unwrap();
        assert_eq!(rig.transport.save(), state);
        assert_eq!(rig.live_queues(), 2);
        assert!(rig.transport.interrupt().event().read().is_err(), "restoring raises nothing");
    }

    #[test]
    fn a_device_in_mid_setup_or_failed_survives_too() {
        let mut rig = Rig::new();
        rig.negotiate(VERSION_1);
        rig.set_up_queue(0, 0x1000);
        let half_way = rig.transport.save();
        rig.write(0x70, 0xf);
        let failed = rig.transport.save();
        assert_eq!(failed.status, 0xf | status::NEEDS_RESET);
        for state in [half_way, failed, Rig::new().transport.save()] {
            let mut rig = Rig::new();
            rig.transport.restore(&state).unwrap();
            assert_eq!((rig.transport.save(), rig.live_queues()), (state, 0));
        }
    }

    #[test]
    fn damaged_states_are_refused_by_name_and_change_nothing() {
        let refused = |change: fn(&mut VirtioMmioState)| {
            let mut state = saved();
            change(&mut state);
            let mut rig = Rig::new();
            let fresh = rig.transport.save();
            let error = rig.transport.restore(&state).unwrap_err();
            assert_eq!((rig.transport.save(), rig.live_queues()), (fresh, 0));
            error
        };
        assert_eq!(refused(|s| s.driver_features |= 1), TransportError::Features(1));
        assert_eq!(refused(|s| s.status = 5), TransportError::Status(5));
        assert_eq!(refused(|s| s.interrupt_status = 4), TransportError::InterruptStatus(4));
        assert_eq!(refused(|s| s.queues.truncate(1)), TransportError::QueueCount { saved: 1, offered: 2 });
        assert_eq!(refused(|s| s.queues[1].ready = false), TransportError::QueueNotReady(1));
        let queue = |change: fn(&mut QueueState)| {
            let mut state = saved();
            change(&mut state.queues[1]);
            Rig::new().transport.restore(&state).unwrap_err()
        };
        assert!(matches!(queue(|q| q.size = 3), TransportError::Queue { index: 1, error: QueueError::Size { .. } }));
        assert!(matches!(
            queue(|q| q.desc_table = 0x10000),
            TransportError::Queue { index: 1, error: QueueError::Memory { .. } }
        ));
    }
}
