//! How a virtio device interrupts the guest, and how it tells that it has failed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bit of the interrupt status: the device has used buffers.
const USED_BUFFERS: u32 = 1;
/// Bit of the interrupt status: the configuration has changed, or the device needs a reset.
const CONFIG_CHANGED: u32 = 2;

/// How many failures of a device are logged as errors.
const LOGGED_FAILURES: u32 = 8;

/// The interrupt of a device, shared by the device and its transport.
#[derive(Debug)]
pub struct Interrupt {
    /// The `InterruptStatus` register.
    status: AtomicU32,
    /// The device has failed: `DEVICE_NEEDS_RESET`.
    failed: AtomicBool,
    /// How often it has failed.
    failures: AtomicU32,
    /// Raises the interrupt line.
    event: EventFd,
}

impl Interrupt {
    /// An interrupt that is not pending.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Interrupt { status: AtomicU32::new(0), failed: AtomicBool::new(false), failures: AtomicU32::new(0), event })
    }

    /// The event to register as irqfd of the device's interrupt line.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells the driver that buffers have been used.
    pub fn used_buffers(&self) {
        self.raise(USED_BUFFERS);
    }

    /// Tells the driver that the configuration has changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG_CHANGED);
    }

    /// Marks the device as failed until the driver resets it, and writes one log line. The first reason stands.
    pub fn fail(&self, device: &str, reason: &dyn std::fmt::Display) {
        if !self.failed.swap(true, Ordering::SeqCst) {
            // A driver can do this in a loop; what it does first is worth a line, the rest would only fill a disk.
            match self.failures.fetch_add(1, Ordering::Relaxed) {
                ..LOGGED_FAILURES => tracing::error!("{device}: stopped until the guest's driver resets it: {reason}"),
                _ => tracing::debug!("{device}: stopped until the guest's driver resets it: {reason}"),
            }
            self.raise(CONFIG_CHANGED);
        }
    }

    /// Raises the line again if something is still unacknowledged: a line that was raised just before the machine was
    /// saved may not have reached the saved interrupt controller.
    pub fn raise_again(&self) {
        match self.status.load(Ordering::SeqCst) {
            0 => {}
            pending => self.raise(pending),
        }
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        if let Err(error) = self.event.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!("virtio: an interrupt cannot be raised: {error}");
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Takes over saved values, or those of a reset device. Raises nothing.
    pub(super) fn set(&self, status: u32, failed: bool) {
        self.status.store(status, Ordering::SeqCst);
        self.failed.store(failed, Ordering::SeqCst);
    }
}

/// The bits that the interrupt status may have.
pub(super) const KNOWN: u32 = USED_BUFFERS | CONFIG_CHANGED;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_gather_until_acknowledged() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.raise_again();
        assert!(interrupt.event().read().is_err(), "nothing is pending");
        interrupt.used_buffers();
        interrupt.config_changed();
        assert_eq!(interrupt.status(), KNOWN);
        assert_eq!(interrupt.event().read().unwrap(), 2);
        interrupt.acknowledge(USED_BUFFERS);
        assert_eq!(interrupt.status(), CONFIG_CHANGED);
        interrupt.raise_again();
        assert_eq!(interrupt.event().read().unwrap(), 1);
    }

    #[test]
    fn a_failure_interrupts_once() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.fail("test", &"first");
        interrupt.fail("test", &"second");
        assert!(interrupt.has_failed());
        assert_eq!(interrupt.event().read().unwrap(), 1);
    }
}
