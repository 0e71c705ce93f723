//! The virtio-vsock device over virtio-mmio (virtio 1.2, 4.2): its registers and its three queues.
//!
//! Memory that the device shares is made of atomics, so there is nothing unsafe about it. It is small and lies
//! together: each page of it that a restored guest touches is a page that has to be fetched and copied.

use crate::loader::Boot;
use crate::stub::Vector;
use crate::{apic, hw};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use embedded_guest::cmdline::MmioDevice;
use embedded_guest::frames::MAX_ANSWER;
use embedded_guest::vsock::{Header, PACKET_HEADER, Wire};

const VSOCK: u32 = 19;
const RECEIVE: usize = 16;
const TRANSMIT: usize = 8;
const EVENT: usize = 4;
const RECEIVE_BYTES: usize = 128;
const TRANSMIT_BYTES: usize = (PACKET_HEADER + MAX_ANSWER).next_multiple_of(8);
const EVENT_BYTES: usize = 8;

/// Register offsets.
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_AVAILABLE: u64 = 0x90;
    pub const QUEUE_USED: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register.
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

/// A device's registers.
#[derive(Clone, Copy)]
struct Registers(u64);

impl Registers {
    /// Registers where the command line says that a device is, if they can be reached.
    fn of(device: &MmioDevice) -> Option<Self> {
        let end = device.base.checked_add(device.size)?;
        let fits = device.size >= 0x200 && end <= 1 << 32 && device.base.is_multiple_of(4);
        fits.then_some(Registers(device.base))
    }

    fn read(self, register: u64) -> u32 {
        // SAFETY: a virtio-mmio register; the command line says so.
        unsafe { hw::mmio_read(self.0 + register) }
    }

    fn write(self, register: u64, value: u32) {
        // SAFETY: a virtio-mmio register. What the device may write to are the queues and buffers below, which are atomics.
        unsafe { hw::mmio_write(self.0 + register, value) }
    }

    fn write_address<T>(self, register: u64, place: &'static T) {
        let address = core::ptr::from_ref(place).expose_provenance() as u64;
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }
}

/// A descriptor of one buffer.
#[repr(C, align(16))]
struct Descriptor {
    address: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Available<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; N],
    used_event: AtomicU16,
}

#[repr(C)]
struct UsedEntry {
    id: AtomicU32,
    len: AtomicU32,
}

#[repr(C, align(4))]
struct Used<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedEntry; N],
    available_event: AtomicU16,
}

/// A queue's memory.
#[repr(C)]
struct Rings<const N: usize> {
    descriptors: [Descriptor; N],
    available: Available<N>,
    used: Used<N>,
}

impl<const N: usize> Rings<N> {
    const fn new() -> Self {
        Rings {
            descriptors: [const {
                Descriptor {
                    address: AtomicU64::new(0),
                    len: AtomicU32::new(0),
                    flags: AtomicU16::new(0),
                    next: AtomicU16::new(0),
                }
            }; N],
            available: Available {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const { AtomicU16::new(0) }; N],
                used_event: AtomicU16::new(0),
            },
            used: Used {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const { UsedEntry { id: AtomicU32::new(0), len: AtomicU32::new(0) } }; N],
                available_event: AtomicU16::new(0),
            },
        }
    }
}

/// `N` buffers of `BYTES` bytes, as words.
#[repr(C, align(8))]
struct Buffers<const N: usize, const WORDS: usize>([[AtomicU64; WORDS]; N]);

impl<const N: usize, const WORDS: usize> Buffers<N, WORDS> {
    const fn new() -> Self {
        Buffers([const { [const { AtomicU64::new(0) }; WORDS] }; N])
    }

    fn load(&self, index: usize, bytes: &mut [u8]) {
        for (bytes, word) in bytes.chunks_mut(8).zip(&self.0[index]) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..bytes.len()]);
        }
    }

    fn store(&self, index: usize, bytes: &[u8]) {
        for (bytes, word) in bytes.chunks(8).zip(&self.0[index]) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
    }
}

#[unsafe(link_section = ".hot.queues")]
static RECEIVE_RINGS: Rings<RECEIVE> = Rings::new();
#[unsafe(link_section = ".hot.queues")]
static TRANSMIT_RINGS: Rings<TRANSMIT> = Rings::new();
#[unsafe(link_section = ".hot.queues")]
static EVENT_RINGS: Rings<EVENT> = Rings::new();
#[unsafe(link_section = ".hot.queues")]
static TRANSMIT_BUFFERS: Buffers<TRANSMIT, { TRANSMIT_BYTES / 8 }> = Buffers::new();
#[unsafe(link_section = ".hot.queues")]
static EVENT_BUFFERS: Buffers<EVENT, { EVENT_BYTES / 8 }> = Buffers::new();
#[unsafe(link_section = ".hot.queues")]
static RECEIVE_BUFFERS: Buffers<RECEIVE, { RECEIVE_BYTES / 8 }> = Buffers::new();

/// A queue as the driver sees it.
struct Queue<const N: usize> {
    number: u32,
    rings: &'static Rings<N>,
    /// How many buffers have been put into the ring, and how many of them the device has been shown.
    queued: u16,
    shown: u16,
    /// How many used buffers have been taken back.
    taken: u16,
}

impl<const N: usize> Queue<N> {
    const WRITTEN_BY_DEVICE: u16 = 2;
    const QUIET: u16 = 1;

    /// Gives the device queue `number`, with descriptor `i` for buffer `i`.
    #[cold]
    fn set_up<const WORDS: usize>(
        registers: Registers,
        number: u32,
        rings: &'static Rings<N>,
        buffers: &'static Buffers<N, WORDS>,
    ) -> Option<Self> {
        for (descriptor, buffer) in rings.descriptors.iter().zip(&buffers.0) {
            let address = core::ptr::from_ref(buffer).expose_provenance() as u64;
            descriptor.address.store(address, Ordering::Relaxed);
            descriptor.len.store(8 * WORDS as u32, Ordering::Relaxed);
            descriptor.flags.store(Self::WRITTEN_BY_DEVICE, Ordering::Relaxed);
        }
        registers.write(register::QUEUE_SELECT, number);
        if (registers.read(register::QUEUE_SIZE_MAX) as usize) < N {
            return None;
        }
        registers.write(register::QUEUE_SIZE, N as u32);
        registers.write_address(register::QUEUE_DESCRIPTORS, &rings.descriptors);
        registers.write_address(register::QUEUE_AVAILABLE, &rings.available);
        registers.write_address(register::QUEUE_USED, &rings.used);
        registers.write(register::QUEUE_READY, 1);
        Some(Queue { number, rings, queued: 0, shown: 0, taken: 0 })
    }

    /// Puts a buffer into the ring.
    fn put(&mut self, buffer: usize) {
        self.rings.available.ring[usize::from(self.queued) % N].store(buffer as u16, Ordering::Relaxed);
        self.queued = self.queued.wrapping_add(1);
    }

    /// Shows the device what has been put, and tells it if it wants to be told.
    fn show(&mut self, registers: Registers) {
        if self.shown == self.queued {
            return;
        }
        self.shown = self.queued;
        self.rings.available.index.store(self.queued, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.rings.used.flags.load(Ordering::Relaxed) & Self::QUIET == 0 {
            registers.write(register::QUEUE_NOTIFY, self.number);
        }
    }

    /// Takes back a buffer that the device has used: which, and how many bytes were written to it.
    fn take(&mut self) -> Option<(usize, usize)> {
        if self.rings.used.index.load(Ordering::Acquire) == self.taken {
            return None;
        }
        let entry = &self.rings.used.ring[usize::from(self.taken) % N];
        self.taken = self.taken.wrapping_add(1);
        // A device that is wrong about a buffer's number shall not take the driver down with it.
        let buffer = entry.id.load(Ordering::Relaxed) as usize % N;
        Some((buffer, entry.len.load(Ordering::Relaxed) as usize))
    }

    /// Whether `take` would find nothing.
    fn is_drained(&self) -> bool {
        self.rings.used.index.load(Ordering::Acquire) == self.taken
    }

    /// Whether the device shall interrupt when it has used a buffer.
    fn interrupts(&self, wanted: bool) {
        self.rings.available.flags.store(if wanted { 0 } else { Self::QUIET }, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// What the driver finds when it looks.
pub enum News {
    /// The other side of the device has been exchanged.
    Reset,
    /// A packet: its header, and how many of the bytes after that belong to it.
    Packet(Header, usize),
}

/// Room for the largest packet, with its header.
pub type PacketBytes = [u8; RECEIVE_BYTES];
/// An empty one.
pub const NO_PACKET: PacketBytes = [0; RECEIVE_BYTES];

/// The device.
pub struct Device {
    registers: Registers,
    receive: Queue<RECEIVE>,
    events: Queue<EVENT>,
    outbox: Outbox,
}

/// The part of the device that takes packets.
pub struct Outbox {
    queue: Queue<TRANSMIT>,
    /// A bit for each buffer that the device does not have.
    free: u32,
}

impl Device {
    /// Looks for a vsock device among those of the command line, and sets it up.
    pub fn find(boot: &Boot) -> Option<Self> {
        boot.cmdline.devices().iter().find_map(Self::set_up)
    }

    #[cold]
    fn set_up(device: &MmioDevice) -> Option<Self> {
        const MAGIC: u32 = 0x7472_6976;
        const VERSION: u32 = 2;
        const VERSION_1: u32 = 1; // feature bit 32
        let registers = Registers::of(device)?;
        let identity = [register::MAGIC, register::VERSION, register::DEVICE_ID].map(|r| registers.read(r));
        if identity != [MAGIC, VERSION, VSOCK] {
            return None;
        }
        registers.write(register::STATUS, 0);
        let mut state = status::ACKNOWLEDGE | status::DRIVER;
        registers.write(register::STATUS, state);
        registers.write(register::DEVICE_FEATURES_SELECT, 1);
        if registers.read(register::DEVICE_FEATURES) & VERSION_1 == 0 {
            return None;
        }
        for (word, features) in [(0, 0), (1, VERSION_1)] {
            registers.write(register::DRIVER_FEATURES_SELECT, word);
            registers.write(register::DRIVER_FEATURES, features);
        }
        state |= status::FEATURES_OK;
        registers.write(register::STATUS, state);
        if registers.read(register::STATUS) & status::FEATURES_OK == 0 {
            return None;
        }
        let mut receive = Queue::set_up(registers, 0, &RECEIVE_RINGS, &RECEIVE_BUFFERS)?;
        let transmit = Queue::set_up(registers, 1, &TRANSMIT_RINGS, &TRANSMIT_BUFFERS)?;
        let mut events = Queue::set_up(registers, 2, &EVENT_RINGS, &EVENT_BUFFERS)?;
        (0..RECEIVE).for_each(|buffer| receive.put(buffer));
        (0..EVENT).for_each(|buffer| events.put(buffer));
        for descriptor in &TRANSMIT_RINGS.descriptors {
            descriptor.flags.store(0, Ordering::Relaxed);
        }
        transmit.interrupts(false);
        apic::route(device.irq, Vector::Virtio);
        registers.write(register::STATUS, state | status::DRIVER_OK);
        receive.show(registers);
        events.show(registers);
        Some(Device { registers, receive, events, outbox: Outbox { queue: transmit, free: (1 << TRANSMIT) - 1 } })
    }

    /// The guest's CID, which changes when the device's other side does.
    pub fn cid(&self) -> u64 {
        let [low, high] = [0, 4].map(|offset| u64::from(self.registers.read(register::CONFIG + offset)));
        low | high << 32
    }

    /// Where packets go out.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// What is new, the most urgent first. A packet is copied out, and its buffer goes back to the device.
    pub fn news(&mut self, packet: &mut PacketBytes) -> Option<News> {
        const TRANSPORT_RESET: u32 = 0;
        while let Some((buffer, _)) = self.events.take() {
            let mut event = [0; 4];
            EVENT_BUFFERS.load(buffer, &mut event);
            self.events.put(buffer);
            if u32::from_le_bytes(event) == TRANSPORT_RESET {
                return Some(News::Reset);
            }
        }
        let (buffer, len) = self.receive.take()?;
        let len = len.min(RECEIVE_BYTES);
        RECEIVE_BUFFERS.load(buffer, &mut packet[..len]);
        self.receive.put(buffer);
        let header = packet.first_chunk::<PACKET_HEADER>().map(Header::parse)?;
        let payload = header.payload_len().min(len.saturating_sub(PACKET_HEADER));
        Some(News::Packet(header, payload))
    }

    /// Hands the device what has been prepared for it: packets, and buffers for packets by the half queue, as each
    /// message to the device costs more than a buffer is worth.
    pub fn show(&mut self) {
        self.outbox.queue.show(self.registers);
        self.events.show(self.registers);
        if usize::from(self.receive.queued.wrapping_sub(self.receive.shown)) >= RECEIVE / 2 {
            self.receive.show(self.registers);
        }
    }

    /// Acknowledges interrupts. Whoever does so looks for news afterwards.
    pub fn acknowledge(&self) {
        self.registers.write(register::INTERRUPT_ACK, 3);
    }

    /// Gets ready to wait: asks for an interrupt when packets go out, if there is no room for more. False if there is
    /// news already.
    pub fn may_wait(&mut self, room_wanted: usize) -> bool {
        let blocked = self.outbox.room() < room_wanted;
        self.outbox.queue.interrupts(blocked);
        if blocked { self.outbox.queue.is_drained() } else { self.receive.is_drained() && self.events.is_drained() }
    }
}

impl Outbox {
    /// Takes back the buffers of packets that are out.
    pub fn collect(&mut self) {
        while let Some((buffer, _)) = self.queue.take() {
            self.free |= 1 << buffer;
        }
    }
}

impl Wire for Outbox {
    const PAYLOAD: usize = TRANSMIT_BYTES - PACKET_HEADER;

    fn room(&self) -> usize {
        self.free.count_ones() as usize
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
        let mut packet = [0; TRANSMIT_BYTES];
        let len = PACKET_HEADER + payload.len();
        let buffer = self.free.trailing_zeros() as usize;
        if buffer >= TRANSMIT || len > packet.len() {
            return;
        }
        self.free &= !(1 << buffer);
        packet[..PACKET_HEADER].copy_from_slice(&header.bytes());
        packet[PACKET_HEADER..len].copy_from_slice(payload);
        TRANSMIT_BUFFERS.store(buffer, &packet[..len]);
        self.queue.rings.descriptors[buffer].len.store(len as u32, Ordering::Relaxed);
        self.queue.put(buffer);
    }
}
