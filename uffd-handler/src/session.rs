//! One guest that is being served: from a fault event to the page and the wake-up.
//!
//! The way of a fault: the guest touches a page that is not in the store -> the kernel queues an event on the guest's
//! userfaultfd -> [`Session::serve`] reads it -> [`Regions::locate`] says which chunk of the image that is ->
//! [`Store::ensure`] puts the chunk into the store -> the range is woken, and the guest's retried access finds the page
//! by an ordinary kernel fault. The wake-up is sent for every event, also when the page was there already: somebody
//! else's filling it does not wake this guest's threads.

use crate::events::{BATCH, EventReader};
use crate::process::{Credentials, peer_pidfd};
use crate::region::Regions;
use crate::source::{Chunk, Source};
use crate::store::{FillError, Store};
use api_spec::page_server::SessionMetrics;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use userfaultfd::Uffd;

/// Batches of one guest that are served before others get their turn.
const BATCHES_IN_A_TURN: usize = 4;

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The userfaultfd cannot be read.
    #[error("its userfaultfd cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Its threads cannot be woken.
    #[error("its userfaultfd does not wake: {0}")]
    Wake(#[from] userfaultfd::Error),
    /// A fault where the client has no region.
    #[error("it faulted at {0:#x}, which is in none of its regions")]
    Outside(u64),
    /// The page cannot be had.
    #[error(transparent)]
    Fill(#[from] FillError),
}

/// Buffers that all sessions use in turn.
pub struct Scratch {
    faults: EventReader,
    /// Room for the chunk that is being filled.
    pub chunk: Box<Chunk>,
}

impl Scratch {
    /// Allocates them.
    pub fn new() -> Self {
        Self { faults: EventReader::new(), chunk: Box::new([0; size_of::<Chunk>()]) }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// What a turn of serving did.
#[derive(Debug, Default)]
pub struct Turn {
    /// Events answered.
    pub events: u64,
    /// Pages found in the store that the server had not put there.
    pub foreign: u64,
}

/// One guest.
pub struct Session {
    /// Who connected.
    pub peer: Credentials,
    /// The connection, which carries nothing more; its end is the session's.
    pub stream: UnixStream,
    /// The guest's userfaultfd.
    pub uffd: Uffd,
    /// Becomes readable when the guest's process ends, even if somebody else keeps its connection open.
    pub pidfd: Option<OwnedFd>,
    /// Key of the store that it maps.
    pub store: u64,
    regions: Regions,
    counters: SessionMetrics,
    other_event_logged: bool,
}

impl Session {
    /// Begins to serve a client whose handshake is complete.
    pub fn new(id: u64, peer: Credentials, stream: UnixStream, uffd: Uffd, regions: Regions, store: u64) -> Self {
        let pidfd = peer_pidfd(&stream);
        let counters = SessionMetrics { id, pid: peer.pid, ..SessionMetrics::default() };
        Self { peer, stream, uffd, pidfd, store, regions, counters, other_event_logged: false }
    }

    /// The counters as of now.
    pub fn metrics(&self) -> &SessionMetrics {
        &self.counters
    }

    /// Answers the events that wait on the userfaultfd, up to a fair share.
    pub fn serve(
        &mut self,
        store: &mut Store,
        image: &dyn Source,
        scratch: &mut Scratch,
    ) -> Result<Turn, SessionError> {
        let mut turn = Turn::default();
        for _ in 0..BATCHES_IN_A_TURN {
            let read = scratch.faults.read(&self.uffd)?;
            self.log_others(scratch.faults.others() + scratch.faults.removes().len());
            for &address in scratch.faults.addresses() {
                turn.foreign += self.answer(address, store, image, &mut scratch.chunk)?;
                turn.events += 1;
            }
            if read < BATCH {
                break;
            }
        }
        Ok(turn)
    }

    /// Says once that a guest's userfaultfd delivers what nobody asked for.
    fn log_others(&mut self, others: usize) {
        if others > 0 && !self.other_event_logged {
            self.other_event_logged = true;
            tracing::warn!("session {}: ignoring events that are no faults", self.counters.id);
        }
    }

    /// Puts the page of one fault into the store and wakes who waits for it; returns the foreign pages met.
    fn answer(
        &mut self,
        address: u64,
        store: &mut Store,
        image: &dyn Source,
        buffer: &mut Chunk,
    ) -> Result<u64, SessionError> {
        self.counters.uffd_events += 1;
        let fault = self.regions.locate(address).ok_or(SessionError::Outside(address))?;
        let filled = store.ensure(fault.chunk, image, buffer)?;
        self.counters.pages_filled += filled.pages;
        self.counters.already_present += u64::from(filled.pages == 0);
        self.uffd.wake(fault.wake.start as *mut _, (fault.wake.end - fault.wake.start) as usize)?;
        Ok(filled.foreign)
    }
}
