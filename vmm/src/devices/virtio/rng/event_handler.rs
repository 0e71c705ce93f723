//! The device on the event loop: which events lead where.

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::is_watched;
use super::device::Rng;

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        for events in [Events::new(self.event.as_ref(), EventSet::IN), Events::new(&self.alarm, EventSet::IN)] {
            is_watched("entropy", ops.add(events));
        }
    }

    /// Both events say the same: there may be something to do.
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.event.read(); // Only to make it quiet; it may not even be set.
        self.serve();
    }
}
