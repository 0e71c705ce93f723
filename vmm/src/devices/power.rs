//! The two sleep registers of a hardware-reduced ACPI platform (ACPI 6.5, section 4.8.3.7), of which one state exists:
//! off.

use super::bus::BusDevice;
use crate::arch::acpi::SOFT_OFF;
use crate::notice::{Notice, Notifier};

/// First port.
pub const BASE: u64 = 0x600;
/// Number of ports.
pub const LEN: u64 = 2;
/// Offset of the control register.
pub const CONTROL: u64 = 0;
/// Offset of the status register.
pub const STATUS: u64 = 1;

/// Control: `SLP_TYP`, bits 2 to 4.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// Control: `SLP_EN`.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The registers.
pub struct Power {
    notifier: Notifier,
    /// The notice was sent: once is enough, however often the guest repeats itself.
    is_off: bool,
}

impl Power {
    /// Registers that send [`Notice::PowerOff`], once.
    pub fn new(notifier: Notifier) -> Self {
        Power { notifier, is_off: false }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (CONTROL, &[value]) = (offset, data)
            && value & SLEEP_ENABLE != 0
            && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SOFT_OFF
            && !std::mem::replace(&mut self.is_off, true)
        {
            self.notifier.send(Notice::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice;

    #[test]
    fn only_soft_off_powers_off() {
        let (notifier, notices) = notice::channel().unwrap();
        let mut device = Power::new(notifier);
        for (offset, value) in [(CONTROL, 0x14), (CONTROL, 0x20), (STATUS, 0x34), (CONTROL, 0x2c)] {
            device.write(offset, &[value]);
        }
        assert_eq!(notices.take(), []);
        device.write(CONTROL, &[0x34]);
        device.write(CONTROL, &[0x34]);
        assert_eq!(notices.take(), [Notice::PowerOff]);
    }
}
