//! Waiting: asleep when nobody faults, awake for a moment after a fault, because the next one is often close behind.
//!
//! Waking a sleeping server is most of a fault's cost. So after a fault was served the loop polls for a short time; the
//! time adapts, so that guests that fault now and then do not keep a CPU busy.

use crate::server::Server;
use event_manager::{EventManager, SubscriberOps};
use std::time::{Duration, Instant};

/// Longest time that the loop polls after a fault.
const LONGEST_POLL: Duration = Duration::from_micros(50);
/// Shortest time that the loop polls after a fault: enough to notice that faults have become frequent again.
const SHORTEST_POLL: Duration = Duration::from_micros(5);

/// How long to poll: longer when the last time brought a fault, shorter when it did not.
#[derive(Debug)]
struct Patience {
    poll: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { poll: LONGEST_POLL }
    }

    fn rewarded(&mut self) {
        self.poll = (self.poll * 2).min(LONGEST_POLL);
    }

    fn disappointed(&mut self) {
        self.poll = (self.poll / 2).max(SHORTEST_POLL);
    }
}

/// Runs the server until a signal ends it.
pub fn run(server: Server) -> Result<(), event_manager::Error> {
    let mut manager = EventManager::new()?;
    let id = manager.add_subscriber(server);
    let mut patience = Patience::new();
    let mut events_before = 0;
    let mut poll_until = None;
    loop {
        let server = manager.subscriber_mut(id)?;
        if server.is_stopping() {
            return server.take_failure().map_or(Ok(()), Err);
        }
        let events = server.events_total();
        if events != events_before {
            if poll_until.is_some() {
                patience.rewarded();
            }
            events_before = events;
            poll_until = Some(Instant::now() + patience.poll);
        } else if poll_until.is_some_and(|until| Instant::now() >= until) {
            patience.disappointed();
            poll_until = None;
        }
        manager.run_with_timeout(if poll_until.is_some() { 0 } else { -1 })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_shrinks_and_recovers_within_bounds() {
        let mut patience = Patience::new();
        (0..10).for_each(|_| patience.disappointed());
        assert_eq!(patience.poll, SHORTEST_POLL);
        (0..10).for_each(|_| patience.rewarded());
        assert_eq!(patience.poll, LONGEST_POLL);
    }
}
