//! A driver of our own in place of the guest's, for the tests of devices. The event loop runs on the test's thread, so
//! nothing depends on time: [`Driver::run`] returns when there is nothing more to do.

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::interrupt::Interrupt;
use super::mmio::MmioTransport;
use super::{VERSION_1, VirtioDevice, status};
use crate::devices::bus::BusDevice;
use crate::devices::{GuestMemory, lock};

/// Guest memory, in bytes.
pub const MEMORY: usize = 4 << 20;
/// Entries of each queue.
pub const SIZE: u16 = 16;
/// The first byte that no queue uses.
pub const FREE: u64 = 0x1_0000;
/// Flags of descriptors.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;

/// The driver's side of one queue. Survives with the guest's memory, as a driver's variables do.
#[derive(Clone, Debug)]
pub struct Ring {
    base: u64,
    next_avail: u16,
    seen_used: u16,
    event_idx: bool,
}

impl Ring {
    fn new(index: usize, event_idx: bool) -> Self {
        Ring { base: 0x1000 + index as u64 * 0x1000, next_avail: 0, seen_used: 0, event_idx }
    }

    fn avail(&self) -> u64 {
        self.base + 0x400
    }

    fn used(&self) -> u64 {
        self.base + 0x800
    }

    /// Offers the chain that begins at descriptor `head`. Says whether the device wants to be told.
    fn offer(&mut self, mem: &GuestMemory, head: u16) -> bool {
        let slot = self.avail() + 4 + 2 * u64::from(self.next_avail % SIZE);
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        let old = self.next_avail;
        self.next_avail = old.wrapping_add(1);
        mem.write_obj(self.next_avail, GuestAddress(self.avail() + 2)).unwrap();
        if !self.event_idx {
            return mem.read_obj::<u16>(GuestAddress(self.used())).unwrap() & 1 == 0;
        }
        let event: u16 = mem.read_obj(GuestAddress(self.used() + 4 + 8 * u64::from(SIZE))).unwrap();
        self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
    }
}

/// A machine with nothing but one virtio device, and its driver.
pub struct Driver<D: VirtioDevice + MutEventSubscriber + 'static> {
    pub mem: GuestMemory,
    pub device: Arc<Mutex<D>>,
    pub transport: MmioTransport,
    pub rings: Vec<Ring>,
    events: EventManager<Arc<Mutex<D>>>,
    features: u64,
}

impl<D: VirtioDevice + MutEventSubscriber + 'static> Driver<D> {
    /// A machine before its driver starts.
    pub fn cold(device: Arc<Mutex<D>>, mem: GuestMemory) -> Self {
        let transport = MmioTransport::new(device.clone(), mem.clone(), Arc::new(Interrupt::new().unwrap()));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        Driver { mem, device, transport, rings: Vec::new(), events, features: 0 }
    }

    /// A machine whose driver has accepted these features, besides `VERSION_1`.
    pub fn started(device: Arc<Mutex<D>>, features: u64) -> Self {
        let mut driver = Driver::cold(device, memory());
        driver.start(features);
        driver
    }

    /// Another machine that goes on with this one's guest on `device`, which `restore` brings to its saved state, before
    /// its vCPUs start.
    pub fn restored(&self, device: Arc<Mutex<D>>, restore: impl FnOnce(&Mutex<D>, &mut MmioTransport)) -> Self {
        let (mem, bytes) = (memory(), self.contents());
        mem.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut driver = Driver::cold(device, mem);
        (driver.rings, driver.features) = (self.rings.clone(), self.features);
        restore(&driver.device, &mut driver.transport);
        driver.run();
        assert!(driver.contents() == bytes, "restoring leaves guest memory alone");
        driver
    }

    /// All of guest memory.
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// The driver starts, after a reset if it had been started before.
    pub fn start(&mut self, features: u64) {
        self.features = features | VERSION_1;
        for value in [0, 1, 3] {
            self.write(0x70, value);
        }
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, (self.features >> (32 * select)) as u32);
        }
        self.write(0x70, 0xb);
        self.rings.clear();
        let count = lock(&self.device).queue_max_sizes().len();
        for index in 0..count {
            let ring = Ring::new(index, features & super::EVENT_IDX != 0);
            self.mem.write_slice(&[0; 0x1000], GuestAddress(ring.base)).unwrap();
            self.write(0x30, index as u32);
            self.write(0x38, SIZE.into());
            self.write(0x80, ring.base as u32);
            self.write(0x90, ring.avail() as u32);
            self.write(0xa0, ring.used() as u32);
            self.write(0x44, 1);
            self.rings.push(ring);
        }
        self.write(0x70, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        let mut data = [0; 4];
        self.transport.read(0x70, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the device has marked itself as failed.
    pub fn has_failed(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// The vCPUs are about to run.
    pub fn resume(&mut self) {
        lock(&self.device).resume();
        self.run();
    }

    /// Runs the event loop until there is nothing to do.
    pub fn run(&mut self) {
        // A device that never comes to rest fails the test instead of hanging it.
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Runs the event loop until this holds, which needs a timer of the device to go off.
    #[track_caller]
    pub fn run_until(&mut self, mut holds: impl FnMut(&mut Self) -> bool) {
        for _ in 0..100 {
            if holds(self) {
                return;
            }
            self.events.run_with_timeout(60_000).unwrap();
        }
        panic!("it never comes to hold");
    }

    /// Writes one descriptor.
    pub fn describe(&self, queue: usize, id: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.rings[queue].base + 16 * u64::from(id);
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Offers a chain of these pieces: addresses, lengths, and flags. It takes descriptors from `head` on.
    pub fn offer(&mut self, queue: usize, head: u16, pieces: &[(u64, u32, u16)]) {
        for (i, &(addr, len, flags)) in pieces.iter().enumerate() {
            let id = head + i as u16;
            let more = if i + 1 < pieces.len() { NEXT } else { 0 };
            self.describe(queue, id, addr, len, flags | more, id + 1);
        }
        self.offer_head(queue, head);
    }

    /// Offers the chain that begins at this descriptor, and tells the device if it wants to be told.
    pub fn offer_head(&mut self, queue: usize, head: u16) {
        if self.rings[queue].offer(&self.mem, head) {
            self.kick(queue);
        }
    }

    /// Tells the device of news.
    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// The next used chain and how much was written to it. Asks for an interrupt at the one after.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        if self.mem.read_obj::<u16>(GuestAddress(ring.used() + 2)).unwrap() == ring.seen_used {
            return None;
        }
        let slot = ring.used() + 4 + 8 * u64::from(ring.seen_used % SIZE);
        ring.seen_used = ring.seen_used.wrapping_add(1);
        self.mem.write_obj(ring.seen_used, GuestAddress(ring.avail() + 4 + 2 * u64::from(SIZE))).unwrap();
        let id: u32 = self.mem.read_obj(GuestAddress(slot)).unwrap();
        Some((id as u16, self.mem.read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    /// Whether the device has interrupted since this was last asked.
    pub fn interrupted(&self) -> bool {
        self.transport.interrupt().event().read().is_ok()
    }

    /// Bytes of guest memory.
    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

/// Guest memory of zeros.
pub fn memory() -> GuestMemory {
    crate::memory::from_zero(MEMORY)
}

/// Runs a test in both ways of telling each other of news; it is given the feature for that.
pub fn both(test: fn(u64)) {
    test(0);
    test(super::EVENT_IDX);
}

/// What a hostile driver may leave in a queue: any descriptors, and any heads.
#[derive(Clone, Debug)]
pub struct Noise {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
}

/// Queues that are wrong now and then, and sometimes right.
pub fn noise() -> impl Strategy<Value = Noise> {
    let addr = prop_oneof![8 => FREE..MEMORY as u64, 1 => MEMORY as u64 - 64..MEMORY as u64 + 64, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..100, 2 => 0u32..3000, 1 => 60_000u32..70_000, 1 => any::<u32>()];
    let flags =
        prop_oneof![4 => Just(0), 4 => Just(WRITE), 3 => Just(NEXT), 3 => Just(NEXT | WRITE), 1 => any::<u16>()];
    let descriptor = (addr, len, flags, 0..SIZE + 2);
    let descriptors = prop::collection::vec(descriptor, usize::from(SIZE));
    let heads = prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 0..=usize::from(SIZE));
    (descriptors, heads).prop_map(|(descriptors, heads)| Noise { descriptors, heads })
}

impl<D: VirtioDevice + MutEventSubscriber + 'static> Driver<D> {
    /// Fills a queue with noise, and tells the device.
    pub fn scribble(&mut self, queue: usize, noise: &Noise) {
        for (id, &(addr, len, flags, next)) in noise.descriptors.iter().enumerate() {
            self.describe(queue, id as u16, addr, len, flags, next);
        }
        for &head in &noise.heads {
            self.rings[queue].offer(&self.mem, head);
        }
        self.kick(queue);
    }
}
