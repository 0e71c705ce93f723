//! The i8042 keyboard controller, of which only the line that resets the machine exists.
//!
//! It answers ports 0x60 to 0x64. Port 0x61 in their midst belongs to KVM's timer chip, which answers it in the
//! kernel, so accesses to it never arrive here.

use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// First port.
pub const BASE: u64 = 0x60;
/// Number of ports.
pub const LEN: u64 = 5;

/// Offset of the status register (read) and the command register (write), port 0x64.
const COMMAND: u64 = 4;
/// The port of the command register.
pub const COMMAND_PORT: u64 = BASE + COMMAND;
/// The command that pulses the processor's reset line.
pub const RESET: u8 = 0xfe;
/// "A byte is waiting". As it never goes away, a driver that probes for keyboards gives up at once instead of after a
/// second of waiting; a driver that wants to reset the machine waits for another bit and is not held up.
const OUTPUT_FULL: u8 = 0x01;

/// The controller.
pub struct I8042 {
    reset: EventFd,
}

impl I8042 {
    /// A controller that signals `reset` when the guest asks for a reset.
    pub fn new(reset: EventFd) -> Self {
        I8042 { reset }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == COMMAND { OUTPUT_FULL } else { 0 });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND
            && data == [RESET]
            && let Err(error) = self.reset.write(1)
        {
            tracing::error!("i8042: the guest asked for a reset and it cannot be passed on: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn only_the_reset_command_resets() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut device = I8042::new(event.try_clone().unwrap());
        device.write(0, &[RESET]);
        device.write(COMMAND, &[0xd1]);
        assert!(event.read().is_err(), "no reset was asked for");
        device.write(COMMAND, &[RESET]);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn status_tells_a_probe_to_give_up_and_a_reset_to_go_on() {
        let mut device = I8042::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut status = [0];
        device.read(COMMAND, &mut status);
        assert_eq!(status[0] & 0b11, OUTPUT_FULL);
    }
}
