//! The device on the event loop: which events lead where.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::{VirtioDevice, is_watched};
use super::device::Block;

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        let watched =
            [Events::new(self.event.as_ref(), EventSet::IN), Events::new_raw(self.timer.as_raw_fd(), EventSet::IN)];
        for events in watched {
            is_watched(&self.name(), ops.add(events));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.timer.as_raw_fd() {
            self.timer.set(None);
            self.rate_allows();
        } else {
            let _ = self.event.read(); // Only to make it quiet; the queue is looked at below.
        }
        self.work();
    }
}
