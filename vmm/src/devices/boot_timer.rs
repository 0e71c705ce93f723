//! The boot timer: a byte of memory to which a guest writes when it has booted, and the log tells how long that took.
//!
//! There on request only (`--boot-timer`), at the address and with the value and the words that tools for Firecracker know.

use super::bus::BusDevice;
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Its address, the first that is no RAM.
pub const BASE: u64 = 0xc000_0000;
/// How many bytes of addresses it has.
pub const LEN: u64 = 0x1000;
/// What the guest writes, once it has booted.
const BOOTED: u8 = 123;

/// The device.
pub struct BootTimer {
    started: Instant,
    started_cpu: Duration,
    /// It has been said: once is enough, however often the guest repeats itself.
    is_told: bool,
}

impl BootTimer {
    /// A timer that starts now.
    pub fn start() -> Self {
        BootTimer { started: Instant::now(), started_cpu: cpu_time(), is_told: false }
    }
}

/// CPU time that this process has had.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [BOOTED] && !std::mem::replace(&mut self.is_told, true) {
            let (wall, cpu) = (self.started.elapsed(), cpu_time().saturating_sub(self.started_cpu));
            tracing::info!(
                "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
                wall.as_micros(),
                wall.as_millis(),
                cpu.as_micros(),
                cpu.as_millis()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_byte_that_says_so_is_the_end_of_booting() {
        let mut timer = BootTimer::start();
        for (offset, data) in [(0, &[122][..]), (1, &[BOOTED]), (0, &[BOOTED, 0])] {
            timer.write(offset, data);
            assert!(!timer.is_told);
        }
        timer.write(0, &[BOOTED]);
        assert!(timer.is_told);
    }
}
