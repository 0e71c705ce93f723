//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2).

use crate::hw;
use embedded_guest::cmdline::MmioDevice;

/// Register offsets.
pub mod register {
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
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Registers(u64);

impl Registers {
    /// Registers where the command line says that a device is, if they can be reached.
    pub fn of(device: &MmioDevice) -> Option<Self> {
        let end = device.base.checked_add(device.size)?;
        let fits = device.size >= 0x200 && end <= 1 << 32 && device.base.is_multiple_of(4);
        fits.then_some(Registers(device.base))
    }

    /// Reads a register.
    pub fn read(self, register: u64) -> u32 {
        // SAFETY: a virtio-mmio register; the command line says so.
        unsafe { hw::mmio_read(self.0 + register) }
    }

    /// Writes a register.
    pub fn write(self, register: u64, value: u32) {
        // SAFETY: a virtio-mmio register. What it makes the device write to are
        // queues and buffers, which are atomics.
        unsafe { hw::mmio_write(self.0 + register, value) }
    }

    /// Writes an address to a pair of registers.
    pub fn write_address<T>(self, register: u64, place: &'static T) {
        let address = core::ptr::from_ref(place).expose_provenance() as u64;
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }
}
