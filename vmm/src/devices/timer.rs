//! A timer for the event loop that goes off once. Unlike a plain one it can be set anew, or read, at any time without waiting.

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The timer. Readable once it has gone off.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Timer> {
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?))
    }

    /// Has it go off after `wait`, instead of when it was to go off before.
    pub fn set(&self, wait: Duration) -> io::Result<()> {
        const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Nothing at all would mean never. A year is as good as any longer time.
        let wait = wait.clamp(Duration::from_nanos(1), Duration::from_secs(365 * 24 * 3600));
        let it_value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: NEVER, it_value })?;
        Ok(())
    }

    /// Makes it quiet. Whether it had gone off.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_off_once_and_never_makes_anybody_wait() {
        let timer = Timer::new().unwrap();
        assert!(!timer.take());
        timer.set(Duration::MAX).unwrap();
        assert!(!timer.take());
        timer.set(Duration::ZERO).unwrap();
        while !timer.take() {
            std::thread::yield_now();
        }
        assert!(!timer.take());
    }
}
