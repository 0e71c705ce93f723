//! pvpanic: a port through which the guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst).
//!
//! Without it a panic cannot be told from a reset, or from a guest that idles. Reading the port gives the events that the
//! device knows, a bit each; writing it announces some of them.

use super::bus::BusDevice;
use crate::notice::{Notice, Notifier};
use crate::vcpu::GuestEnd;

/// Its port.
pub const BASE: u64 = 0x505;
/// Number of ports.
pub const LEN: u64 = 1;

/// Event: the kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// Event: the kernel has panicked, and another one that is loaded for this purpose will see to it.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
pub struct Pvpanic {
    notifier: Notifier,
    /// Events that were announced: once is enough, however often the guest repeats itself.
    announced: u8,
}

impl Pvpanic {
    /// A device that sends [`Notice::End`] when the guest's kernel has panicked.
    pub fn new(notifier: Notifier) -> Self {
        Pvpanic { notifier, announced: 0 }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let &[events] = data else { return };
        let news = events & !self.announced;
        self.announced |= events;
        if news & CRASH_LOADED != 0 {
            tracing::warn!("the guest's kernel panicked, and its crash kernel takes over");
        }
        if news & PANICKED != 0 {
            self.notifier.send(Notice::End(GuestEnd::Panic));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice;

    #[test]
    fn a_panic_is_announced_once_and_a_crash_kernel_goes_on() {
        let (notifier, notices) = notice::channel().unwrap();
        let mut device = Pvpanic::new(notifier);
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED | CRASH_LOADED]);
        for nothing in [&[0][..], &[CRASH_LOADED], &[0x80], &[PANICKED, PANICKED], &[]] {
            device.write(0, nothing);
        }
        assert_eq!(notices.take(), []);
        device.write(0, &[PANICKED]);
        device.write(0, &[PANICKED | CRASH_LOADED]);
        assert_eq!(notices.take(), [Notice::End(GuestEnd::Panic)]);
    }
}
