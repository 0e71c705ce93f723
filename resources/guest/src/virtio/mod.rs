//! Devices over virtio-mmio (virtio 1.2, 4.2): the vsock device with its registers and its three queues, the balloon, and a disk.
//!
//! Memory that the device shares is made of atomics, so there is nothing unsafe about it. It is small and lies
//! together: each page of it that a restored guest touches is a page that has to be fetched and copied.

mod balloon;
mod disk;
mod queue;
mod registers;

pub use balloon::Balloon;
pub use disk::Disk;

use crate::apic;
use crate::loader::Boot;
use crate::stub::Vector;
use embedded_guest::cmdline::MmioDevice;
use embedded_guest::frames::MAX_ANSWER;
use embedded_guest::vsock::{Header, PACKET_HEADER, Wire};
use queue::{Buffers, Queue, Rings};
use registers::{Registers, register, status};

const VSOCK: u32 = 19;
const RECEIVE: usize = 16;
const TRANSMIT: usize = 8;
const EVENT: usize = 4;
const RECEIVE_BYTES: usize = 128;
const TRANSMIT_BYTES: usize = (PACKET_HEADER + MAX_ANSWER).next_multiple_of(8);
const EVENT_BYTES: usize = 8;

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

/// The registers of a device, if it is of this kind, which has agreed to be driven without any feature.
#[cold]
fn identify(device: &MmioDevice, kind: u32) -> Option<Registers> {
    const MAGIC: u32 = 0x7472_6976;
    const VERSION: u32 = 2;
    const VERSION_1: u32 = 1; // feature bit 32
    let registers = Registers::of(device)?;
    let identity = [register::MAGIC, register::VERSION, register::DEVICE_ID].map(|r| registers.read(r));
    if identity != [MAGIC, VERSION, kind] {
        return None;
    }
    registers.write(register::STATUS, 0);
    // One at a time: there are devices that take no more.
    registers.write(register::STATUS, status::ACKNOWLEDGE);
    registers.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    registers.write(register::DEVICE_FEATURES_SELECT, 1);
    if registers.read(register::DEVICE_FEATURES) & VERSION_1 == 0 {
        return None;
    }
    for (word, features) in [(0, 0), (1, VERSION_1)] {
        registers.write(register::DRIVER_FEATURES_SELECT, word);
        registers.write(register::DRIVER_FEATURES, features);
    }
    registers.write(register::STATUS, AGREED);
    (registers.read(register::STATUS) & status::FEATURES_OK != 0).then_some(registers)
}

/// Status of a device that has agreed.
const AGREED: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

/// Lets a device work, once its queues are set up.
fn start(registers: Registers) {
    registers.write(register::STATUS, AGREED | status::DRIVER_OK);
}

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
        let registers = identify(device, VSOCK)?;
        let mut receive = Queue::set_up(registers, 0, &RECEIVE_RINGS, &RECEIVE_BUFFERS)?;
        let transmit = Queue::set_up(registers, 1, &TRANSMIT_RINGS, &TRANSMIT_BUFFERS)?;
        let mut events = Queue::set_up(registers, 2, &EVENT_RINGS, &EVENT_BUFFERS)?;
        (0..RECEIVE).for_each(|buffer| receive.put(buffer));
        (0..EVENT).for_each(|buffer| events.put(buffer));
        transmit.interrupts(false);
        apic::route(device.irq, Vector::Virtio);
        start(registers);
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
        if self.receive.unshown() >= RECEIVE / 2 {
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
        self.queue.fill(buffer, len);
        self.queue.put(buffer);
    }
}
