//! A timer for the event loop.

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Becomes readable when its time has come. It never makes anybody wait: it may have been set anew since it was found ready.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// One that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Sets it: `Some` time after now, and again at each end of a period that is not zero.
    pub fn set(&self, after: Option<Duration>, period: Duration) -> io::Result<()> {
        // A time of zero means "not set" to the kernel.
        let after = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
        let setting = Itimerspec { it_interval: timespec(period), it_value: timespec(after) };
        rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &setting)?;
        Ok(())
    }

    /// Takes note of its time having come.
    pub fn hush(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn is_ready(timer: &Timer, wait_ms: i64) -> bool {
        let wait = Timespec { tv_sec: 0, tv_nsec: wait_ms * 1_000_000 };
        poll(&mut [PollFd::new(&timer.0, PollFlags::IN)], Some(&wait)).unwrap() == 1
    }

    #[test]
    fn it_is_ready_once_and_never_makes_wait() {
        let timer = Timer::new().unwrap();
        timer.hush();
        assert!(!is_ready(&timer, 0));
        timer.set(Some(Duration::ZERO), Duration::ZERO).unwrap();
        assert!(is_ready(&timer, 900));
        timer.hush();
        assert!(!is_ready(&timer, 0));
        timer.set(Some(Duration::ZERO), Duration::ZERO).unwrap();
        timer.set(None, Duration::ZERO).unwrap();
        timer.hush();
        assert!(!is_ready(&timer, 0));
    }
}
