//! A virtqueue (virtio 1.2, 2.7), as this driver uses it: each descriptor stands for one buffer, always the same.

use super::registers::{Registers, register};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// How often to look for an answer before giving up: some seconds' worth at least.
const LOOKS: u32 = 1 << 27;

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
pub struct Rings<const N: usize> {
    descriptors: [Descriptor; N],
    available: Available<N>,
    used: Used<N>,
}

impl<const N: usize> Rings<N> {
    /// Empty ones.
    pub const fn new() -> Self {
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
pub struct Buffers<const N: usize, const WORDS: usize>([[AtomicU64; WORDS]; N]);

impl<const N: usize, const WORDS: usize> Buffers<N, WORDS> {
    /// Empty ones.
    pub const fn new() -> Self {
        Buffers([const { [const { AtomicU64::new(0) }; WORDS] }; N])
    }

    /// Copies out the beginning of a buffer.
    pub fn load(&self, index: usize, bytes: &mut [u8]) {
        for (bytes, word) in bytes.chunks_mut(8).zip(&self.0[index]) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..bytes.len()]);
        }
    }

    /// Copies bytes to the beginning of a buffer.
    pub fn store(&self, index: usize, bytes: &[u8]) {
        for (bytes, word) in bytes.chunks(8).zip(&self.0[index]) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
    }
}

/// A queue as the driver sees it.
pub struct Queue<const N: usize> {
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
    const GOES_ON: u16 = 1;

    /// Gives the device queue `number`, with descriptor `i` for buffer `i`.
    #[cold]
    pub fn set_up<const WORDS: usize>(
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
    pub fn put(&mut self, buffer: usize) {
        self.rings.available.ring[usize::from(self.queued) % N].store(buffer as u16, Ordering::Relaxed);
        self.queued = self.queued.wrapping_add(1);
    }

    /// Shows the device what has been put, and tells it if it wants to be told.
    pub fn show(&mut self, registers: Registers) {
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
    pub fn take(&mut self) -> Option<(usize, usize)> {
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
    pub fn is_drained(&self) -> bool {
        self.rings.used.index.load(Ordering::Acquire) == self.taken
    }

    /// Says how much of a buffer is to be sent, and that it is to be sent rather than filled.
    pub fn fill(&self, buffer: usize, len: usize) {
        self.rings.descriptors[buffer].len.store(len as u32, Ordering::Relaxed);
        self.rings.descriptors[buffer].flags.store(0, Ordering::Relaxed);
    }

    /// Has a buffer go on with the next one, which is put with it.
    pub fn chain(&self, buffer: usize) {
        self.rings.descriptors[buffer].flags.fetch_or(Self::GOES_ON, Ordering::Relaxed);
        self.rings.descriptors[buffer].next.store(buffer as u16 + 1, Ordering::Relaxed);
    }

    /// Says how much of a buffer the device is to fill.
    pub fn expect(&self, buffer: usize, len: usize) {
        self.rings.descriptors[buffer].len.store(len as u32, Ordering::Relaxed);
        self.rings.descriptors[buffer].flags.store(Self::WRITTEN_BY_DEVICE, Ordering::Relaxed);
    }

    /// Has a buffer be this memory instead of its own.
    pub fn place(&self, buffer: usize, address: u64) {
        self.rings.descriptors[buffer].address.store(address, Ordering::Relaxed);
    }

    /// Waits until the device has used a buffer, and takes it back. False if that takes too long.
    pub fn wait(&mut self) -> bool {
        (0..LOOKS).any(|_| {
            core::hint::spin_loop();
            self.take().is_some()
        })
    }

    /// How many buffers the device has not been shown.
    pub fn unshown(&self) -> usize {
        usize::from(self.queued.wrapping_sub(self.shown))
    }

    /// Whether the device shall interrupt when it has used a buffer.
    pub fn interrupts(&self, wanted: bool) {
        self.rings.available.flags.store(if wanted { 0 } else { Self::QUIET }, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}
