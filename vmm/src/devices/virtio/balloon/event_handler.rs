//! The device on the event loop: which events lead where.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::is_watched;
use super::device::Balloon;

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        for event in &self.events {
            is_watched("balloon", ops.add(Events::new(event.as_ref(), EventSet::IN)));
        }
        is_watched("balloon", ops.add(Events::new(&self.timer, EventSet::IN)));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let fd = events.fd();
        if let Some(queue) = self.events.iter().position(|event| event.as_raw_fd() == fd) {
            let _ = self.events[queue].read(); // Only to make it quiet.
            self.take(queue);
        } else if fd == self.timer.as_raw_fd() {
            self.ask_for_statistics();
        }
    }
}
