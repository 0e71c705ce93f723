//! A virtio block device over virtio-mmio (virtio 1.2, 5.2), as far as this guest uses it: a page at a time. Its memory is apart from that
//! of the vsock device, which clones touch.

use super::identify;
use super::queue::{Buffers, Queue, Rings};
use super::registers::Registers;
use crate::loader::Boot;
use embedded_guest::agent::Transfer;

const BLOCK: u32 = 2;
const PAGE: usize = 4096;
const SECTORS_PER_PAGE: u64 = 8;
/// The buffers of a request: what is wanted, the page, and how it went.
const HEADER: usize = 0;
const DATA: usize = 1;
const STATUS: usize = 2;
const HEADER_LEN: usize = 16;

static RINGS: Rings<4> = Rings::new();
static BUFFERS: Buffers<4, { HEADER_LEN / 8 }> = Buffers::new();

/// The device.
pub struct Disk {
    registers: Registers,
    queue: Queue<4>,
}

impl Disk {
    /// Looks for a disk among the devices of the command line, and sets the first up.
    #[cold]
    pub fn find(boot: &Boot) -> Option<Self> {
        boot.cmdline.devices().iter().find_map(|device| {
            let registers = identify(device, BLOCK)?;
            let queue = Queue::set_up(registers, 0, &RINGS, &BUFFERS)?;
            queue.interrupts(false);
            super::start(registers);
            Some(Disk { registers, queue })
        })
    }

    /// Moves the page at this address from or to a page of the disk. False if the device refuses, or does not answer.
    #[cold]
    pub fn transfer(&mut self, transfer: Transfer, address: u64, page: u32) -> bool {
        let (kind, sector) = (u32::from(transfer == Transfer::Write), u64::from(page) * SECTORS_PER_PAGE);
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        BUFFERS.store(HEADER, &header);
        BUFFERS.store(STATUS, &[u8::MAX]);
        self.queue.fill(HEADER, HEADER_LEN);
        self.queue.chain(HEADER);
        self.queue.place(DATA, address);
        match transfer {
            Transfer::Read => self.queue.expect(DATA, PAGE),
            Transfer::Write => self.queue.fill(DATA, PAGE),
        }
        self.queue.chain(DATA);
        self.queue.expect(STATUS, 1);
        self.queue.put(HEADER);
        self.queue.show(self.registers);
        let mut status = [0];
        self.queue.wait() && {
            BUFFERS.load(STATUS, &mut status);
            status == [0]
        }
    }
}
