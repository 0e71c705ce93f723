//! The virtio balloon over virtio-mmio (virtio 1.2, 5.5), as far as this guest uses it: pages go in when the agent is told
//! so, and may be used again at once. Its memory is apart from that of the vsock device, which clones touch.

use super::identify;
use super::queue::{Buffers, Queue, Rings};
use super::registers::{Registers, register};
use crate::loader::Boot;

const BALLOON: u32 = 5;
const PAGE: u64 = 4096;
/// Page numbers in a buffer.
const NUMBERS: usize = 256;
/// How many pages the driver says are in the balloon.
const ACTUAL: u64 = register::CONFIG + 4;
static INFLATE_RINGS: Rings<1> = Rings::new();
static DEFLATE_RINGS: Rings<1> = Rings::new();
static INFLATE_BUFFER: Buffers<1, { NUMBERS / 2 }> = Buffers::new();
static DEFLATE_BUFFER: Buffers<1, 1> = Buffers::new();

/// The device.
pub struct Balloon {
    registers: Registers,
    inflate: Queue<1>,
    actual: u32,
}

impl Balloon {
    /// Looks for a balloon among the devices of the command line, and sets it up.
    #[cold]
    pub fn find(boot: &Boot) -> Option<Self> {
        boot.cmdline.devices().iter().find_map(|device| {
            let registers = identify(device, BALLOON)?;
            let inflate = Queue::set_up(registers, 0, &INFLATE_RINGS, &INFLATE_BUFFER)?;
            Queue::set_up(registers, 1, &DEFLATE_RINGS, &DEFLATE_BUFFER)?;
            inflate.interrupts(false);
            super::start(registers);
            Some(Balloon { registers, inflate, actual: 0 })
        })
    }

    /// Gives pages away, by their addresses. False if the device does not answer; it is of no use any more then.
    #[cold]
    pub fn give(&mut self, pages: impl Iterator<Item = u64>) -> bool {
        let mut bytes = [0; 4 * NUMBERS];
        let mut len = 0;
        for page in pages {
            bytes[len..len + 4].copy_from_slice(&((page / PAGE) as u32).to_le_bytes());
            len += 4;
            if len == bytes.len() {
                if !self.hand_over(&bytes) {
                    return false;
                }
                len = 0;
            }
        }
        len == 0 || self.hand_over(&bytes[..len])
    }

    fn hand_over(&mut self, numbers: &[u8]) -> bool {
        INFLATE_BUFFER.store(0, numbers);
        self.inflate.fill(0, numbers.len());
        self.inflate.put(0);
        self.inflate.show(self.registers);
        let answered = self.inflate.wait();
        if answered {
            self.actual = self.actual.wrapping_add(numbers.len() as u32 / 4);
            self.registers.write(ACTUAL, self.actual);
        }
        answered
    }
}
