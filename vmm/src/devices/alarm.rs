//! Has a device take its turn on the event loop again after some time.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// A timer on the event loop. It is never read: setting it again, or clearing it, is what makes it quiet.
#[derive(Debug)]
pub struct Alarm {
    timer: TimerFd,
    armed: bool,
}

impl Alarm {
    /// An alarm that is not set.
    pub fn new() -> io::Result<Self> {
        Ok(Alarm { timer: TimerFd::new()?, armed: false })
    }

    /// Has it go off after this time, in place of any other; with none, not at all. No time means: as soon as others had
    /// their turn.
    pub fn set(&mut self, after: Option<Duration>) {
        if after.is_none() && !self.armed {
            return;
        }
        let done = match after {
            Some(after) => self.timer.reset(after.max(Duration::from_nanos(1)), None),
            None => self.timer.clear(),
        };
        match done {
            Ok(()) => self.armed = after.is_some(),
            Err(error) => tracing::error!("a device's timer cannot be set: {error}"),
        }
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    #[test]
    fn it_goes_off_until_it_is_set_anew_or_cleared() {
        let mut alarm = Alarm::new().unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, alarm.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        let goes_off = |within_ms| epoll.wait(within_ms, &mut [EpollEvent::default()]).unwrap() == 1;
        assert!(!goes_off(0));
        alarm.set(Some(Duration::ZERO));
        assert!(goes_off(60_000) && goes_off(0), "until something is done about it");
        alarm.set(Some(Duration::from_secs(3600)));
        assert!(!goes_off(0));
        alarm.set(Some(Duration::from_millis(1)));
        assert!(goes_off(60_000));
        alarm.set(None);
        assert!(!goes_off(0));
    }
}
