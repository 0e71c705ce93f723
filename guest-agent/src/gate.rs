//! Which requests a guest may serve in which state.
//!
//! ```text
//!            generation changed, or the host's end was reset
//!   Itself ---------------------------------------------------> Restored
//!      ^                                                           |
//!      '----- Resumed was handled, and nothing changed meanwhile --'
//! ```
//!
//! A guest that was booted is itself from the start. In a clone, whoever asks before it was resumed would see the
//! parent's random state, clock and names, so only what finds out about the guest, or resumes it, is served.
//!
//! Two things tell that the guest was restored. The generation id in its memory is the better one, and is believed
//! alone if the agent can read it. Without it, the connection to the host's ready port tells: a restore resets it.

use api_spec::agent::linux::{AnyRequest, Either, Request as Linux};
use api_spec::agent::{Refusal, Request};

/// A generation id.
pub type Generation = [u8; 16];

/// What the agent sees of the machine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// The generation id in guest memory, if the agent can read it.
    pub generation: Option<Generation>,
    /// How often the connection to the ready port has been reset so far.
    pub resets: u64,
}

/// Knows whether the guest is itself.
#[derive(Debug)]
pub struct Gate {
    /// The signs by which the guest last was itself.
    settled: Signs,
    /// The generation that it was last told.
    told: Option<Generation>,
}

impl Gate {
    /// The gate of a guest that is itself by these signs.
    pub fn new(settled: Signs) -> Self {
        Gate { settled, told: None }
    }

    /// Whether the guest has been restored since it last was itself.
    pub fn is_restored(&self, now: Signs) -> bool {
        match (self.settled.generation, now.generation) {
            (Some(settled), Some(now)) => settled != now,
            _ => self.settled.resets != now.resets,
        }
    }

    /// Whether a request may be served.
    pub fn may(&self, request: &AnyRequest, now: Signs) -> Result<(), Refusal> {
        if self.is_restored(now) && !is_for_clones(request) { Err(Refusal::NotResumed) } else { Ok(()) }
    }

    /// The guest was told a generation and has become itself, by the signs from `before` it began. False if it was
    /// restored again meanwhile, in which case nothing is settled.
    pub fn settle(&mut self, told: Generation, before: Signs, now: Signs) -> bool {
        if before != now {
            return false;
        }
        *self = Gate { settled: now, told: Some(told) };
        true
    }

    /// The generation that the guest was last told.
    pub fn told(&self) -> Option<Generation> {
        self.told
    }
}

/// Whether a clone serves it before it was resumed.
fn is_for_clones(request: &AnyRequest) -> bool {
    match request {
        Either::Common(request) => matches!(
            request,
            Request::Ping { .. } | Request::Resumed(_) | Request::Info | Request::Generation | Request::Reset
        ),
        Either::Linux(request) => match request {
            Linux::Identity(_) | Linux::Readiness | Linux::PowerOff | Linux::Reboot => true,
            // Of no conversation: dropped, whoever sends it.
            Linux::Data(_) => true,
            Linux::Exec(_) | Linux::Signal { .. } | Linux::Put { .. } | Linux::Get { .. } => false,
            Linux::PreSnapshot | Linux::Trim => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::agent::Resumed;
    use api_spec::agent::linux::{Exec, Identity};
    use proptest::prelude::*;

    const BOOTED: Signs = Signs { generation: Some([1; 16]), resets: 0 };
    const RESTORED: Signs = Signs { generation: Some([2; 16]), resets: 1 };

    fn exec() -> AnyRequest {
        Either::Linux(Linux::Exec(Exec::default()))
    }

    #[test]
    fn a_booted_guest_serves_everything() {
        let gate = Gate::new(BOOTED);
        assert_eq!(gate.may(&exec(), BOOTED), Ok(()));
        assert_eq!(gate.told(), None);
    }

    #[test]
    fn a_clone_serves_only_what_makes_it_itself() {
        let gate = Gate::new(BOOTED);
        let resumed = Resumed { generation: [2; 16], time_ns: 0, entropy: [0; 32] };
        for request in [
            Either::Common(Request::Ping { token: 0 }),
            Either::Common(Request::Info),
            Either::Common(Request::Resumed(resumed)),
            Either::Linux(Linux::Identity(Identity::new(resumed))),
            Either::Linux(Linux::Readiness),
        ] {
            assert_eq!(gate.may(&request, RESTORED), Ok(()), "{request:?}");
        }
        for request in [
            exec(),
            Either::Common(Request::Random),
            Either::Common(Request::Time),
            Either::Common(Request::Nonce),
            Either::Linux(Linux::Get { path: "/etc/machine-id".into() }),
            Either::Linux(Linux::Put { path: "/x".into(), mode: 0, size: 0 }),
            Either::Linux(Linux::Signal { exec: 1, signal: 9 }),
            Either::Linux(Linux::PreSnapshot),
            Either::Linux(Linux::Trim),
        ] {
            assert_eq!(gate.may(&request, RESTORED), Err(Refusal::NotResumed), "{request:?}");
        }
    }

    #[test]
    fn a_clone_that_was_resumed_serves_everything() {
        let mut gate = Gate::new(BOOTED);
        assert!(gate.settle([2; 16], RESTORED, RESTORED));
        assert_eq!(gate.may(&exec(), RESTORED), Ok(()));
        assert_eq!(gate.told(), Some([2; 16]));
        assert!(gate.is_restored(BOOTED), "another generation is another restore, even an older one");
    }

    #[test]
    fn a_clone_that_is_restored_while_it_is_resumed_has_to_be_told_again() {
        let mut gate = Gate::new(BOOTED);
        let again = Signs { generation: Some([3; 16]), resets: 2 };
        assert!(!gate.settle([2; 16], RESTORED, again));
        assert!(gate.is_restored(again));
    }

    #[test]
    fn a_reset_connection_tells_only_where_the_generation_does_not() {
        let reset = |generation| Signs { generation, resets: 1 };
        let settled = |generation| Gate::new(Signs { generation, resets: 0 });
        assert!(!settled(Some([1; 16])).is_restored(reset(Some([1; 16]))));
        assert!(settled(None).is_restored(reset(None)));
        assert!(settled(None).is_restored(reset(Some([1; 16]))), "it has become readable only now");
    }

    proptest! {
        #[test]
        fn whoever_has_settled_is_itself_by_the_same_signs(g: [u8; 16], h: [u8; 16], resets: u64, known: bool) {
            let now = Signs { generation: known.then_some(g), resets };
            let mut gate = Gate::new(Signs::default());
            prop_assert!(gate.settle(h, now, now));
            prop_assert!(!gate.is_restored(now));
        }
    }
}
