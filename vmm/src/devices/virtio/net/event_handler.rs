//! The device on the event loop: which events lead where.

use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::is_watched;
use super::device::{Due, Net, RX, TX};

/// When to try again to wait for frames of the host.
const RETRY: Duration = Duration::from_millis(500);

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        for event in &self.events {
            is_watched("network", ops.add(Events::new(event.as_ref(), EventSet::IN)));
        }
        is_watched("network", ops.add(Events::new(&self.alarm, EventSet::IN)));
        self.update_watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        let kicked = |queue: usize| self.events[queue].as_raw_fd() == fd;
        let due = Due { tx: kicked(TX), rx: kicked(RX) || self.cable.as_raw_fd() == fd };
        for event in self.events.iter().filter(|event| event.as_raw_fd() == fd) {
            let _ = event.read(); // Only to make it quiet.
        }
        // What waits for the alarm has its turn whatever event this is.
        self.exchange(due);
        self.update_watch(ops);
    }
}

impl Net {
    /// Has the event loop wait for frames of the host, or wait no longer.
    fn update_watch(&mut self, ops: &mut EventOps) {
        let wanted = self.wants_frames();
        if wanted != self.watched {
            let done = match wanted {
                true => ops.add(Events::new(&self.cable, EventSet::IN)),
                false => ops.remove(Events::empty(&self.cable)),
            };
            match is_watched("network", done) {
                true => self.watched = wanted,
                // The system is out of something, which may come back.
                false => self.alarm.set(Some(RETRY)),
            }
        }
    }
}
