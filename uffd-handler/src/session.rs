//! One guest that is being served: from a fault event to the page and the wake-up.
//!
//! The way of a fault: the guest touches a page that it has not got -> the kernel queues an event on its userfaultfd ->
//! [`Session::serve`] reads it -> [`Regions`] say which page of the image that is -> [`Faults`] say what to do:
//! - in shared mode the page's chunk is put into the store, if it is not there, and the guest is woken: its retried access
//!   finds the page by an ordinary kernel fault. The wake-up is sent for every event, also when the page was there
//!   already: somebody else's filling it does not wake this guest's threads;
//! - in copy mode the page comes into the server's own store in the same way, and is copied from there into the guest's
//!   memory, which wakes it.
//!
//! A chunk whose bytes are not at hand is left to the threads of its [`Image`]; [`Session::arrived`] ends the waiting.

use crate::ahead::Ahead;
use crate::events::{BATCH, EventReader};
use crate::faults::{Action, Answer, Faults, Kind, Outcome, TooMany};
use crate::histogram::Histogram;
use crate::image::{Image, Waiter};
use crate::mmap::give_zeros;
use crate::process::{Credentials, peer_pidfd};
use crate::recorder::Telling;
use crate::region::{CHUNK_PAGES, PAGE_SIZE, Regions};
use crate::source::{Chunk, SourceError};
use crate::store::{FillError, Store};
use crate::talk::Talk;
use api_spec::handshake::Mode;
use api_spec::page_server::{FaultMetrics, SessionMetrics};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use userfaultfd::Uffd;

/// Batches of one guest that are read before others get their turn.
const BATCHES_IN_A_TURN: usize = 4;
/// Pages of one guest that are seen to before others get their turn.
const ACTIONS_IN_A_TURN: usize = 2 * BATCH;

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
    /// Too many faults.
    #[error(transparent)]
    TooMany(#[from] TooMany),
    /// The image cannot deliver the page, and never will.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The page cannot be put into the store.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// The page cannot be put into the client's memory.
    #[error("cannot copy a page into its memory: {0}")]
    Copy(io::Error),
    /// Too much of the store is wrong.
    #[error("{0} chunks of its store have pages that nobody has put there, too many to put right")]
    Spoilt(usize),
    /// The store cannot be looked at.
    #[error("cannot look for pages in the store: {0}")]
    Look(io::Error),
    /// There is nobody to be served any more.
    #[error("its process ended")]
    Ended,
}

impl SessionError {
    /// Whether the client is at the end of what it has, so that another server, or a second attempt, would not do.
    fn is_final(&self) -> bool {
        matches!(self, SessionError::Outside(_) | SessionError::TooMany(_))
    }
}

/// How a session ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parting {
    /// Why, for the log.
    pub reason: String,
    /// Whether the client is told, and so must not go on with what it was given. Otherwise it sees the connection's end
    /// only, and may look for another server.
    pub told: bool,
    /// Whether it is worth more than a note.
    pub is_error: bool,
}

impl Parting {
    /// The client is gone, or as good as.
    pub fn silent(reason: impl Into<String>) -> Self {
        Parting { reason: reason.into(), told: false, is_error: false }
    }

    /// The client has to hear of it.
    pub fn told(reason: impl Into<String>) -> Self {
        Parting { reason: reason.into(), told: true, is_error: false }
    }
}

impl From<&SessionError> for Parting {
    fn from(error: &SessionError) -> Self {
        let is_error = !matches!(error, SessionError::Ended);
        Parting { reason: error.to_string(), told: error.is_final(), is_error }
    }
}

/// What all sessions use in turn, and count in.
pub struct Scratch {
    events: EventReader,
    /// Room for the chunk that is being filled.
    pub chunk: Box<Chunk>,
    /// Faults answered, by how they were.
    pub answered: FaultMetrics,
    /// From reading a fault until its guest was woken.
    pub latency: Histogram,
}

impl Scratch {
    /// Allocates it.
    pub fn new() -> Self {
        Self {
            events: EventReader::new(),
            chunk: Box::new([0; size_of::<Chunk>()]),
            answered: FaultMetrics::default(),
            latency: Histogram::default(),
        }
    }

    fn count(&mut self, answer: Answer) {
        let Answer { kind, waited, faults, since } = answer;
        *match kind {
            Kind::Zeroed => &mut self.answered.zeroed,
            _ if waited => &mut self.answered.deferred,
            Kind::Filled => &mut self.answered.filled,
            Kind::Present => &mut self.answered.present,
            Kind::Copied => &mut self.answered.copied,
        } += faults;
        self.latency.record(since.elapsed(), faults);
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
    /// Fault events read.
    pub events: u64,
    /// Pages found in the store that the server had not put there.
    pub foreign: u64,
}

/// Who is served, and how.
pub struct Guest {
    /// Number of the session.
    pub number: u64,
    /// What the event loop knows it by.
    pub peer: u32,
    /// Who connected.
    pub credentials: Credentials,
    /// How pages come to it.
    pub mode: Mode,
    /// Whether it speaks our protocol: it may ping, and hears why its session ends. Otherwise it speaks Firecracker's.
    pub speaks: bool,
    /// Key of the store that its pages come from.
    pub store: u64,
    /// Size of the image, in pages.
    pub pages: u64,
    /// Its memory.
    pub regions: Regions,
}

/// One guest.
pub struct Session {
    guest: Guest,
    /// The connection; its end is the session's.
    pub stream: UnixStream,
    /// The guest's userfaultfd.
    pub uffd: Uffd,
    /// Becomes readable when the guest's process ends, even if somebody else keeps its connection open.
    pub pidfd: Option<OwnedFd>,
    /// What it says.
    pub talk: Talk,
    /// What it tells of the pages that it has used.
    pub telling: Telling,
    /// Since when it is served.
    pub began: Instant,
    faults: Faults,
    ahead: Ahead,
    chunks_ahead: Ahead,
    /// Chunks to put into the store once all faults are answered.
    to_fill: Range<u64>,
    counters: SessionMetrics,
    /// Whether the last read left no event.
    is_read: bool,
    other_event_logged: bool,
}

impl Session {
    /// Begins to serve a client whose handshake is complete.
    pub fn new(guest: Guest, stream: UnixStream, uffd: Uffd) -> Self {
        let pidfd = peer_pidfd(&stream);
        let counters = SessionMetrics {
            id: guest.number,
            pid: guest.credentials.pid,
            mode: guest.mode,
            ..SessionMetrics::default()
        };
        Self {
            faults: Faults::new(guest.pages),
            ahead: Ahead::of_pages(),
            chunks_ahead: Ahead::of_chunks(),
            to_fill: 0..0,
            guest,
            stream,
            uffd,
            pidfd,
            talk: Talk::default(),
            telling: Telling::default(),
            began: Instant::now(),
            counters,
            is_read: false,
            other_event_logged: false,
        }
    }

    /// Whether it shares what it has not written, so that what it uses can be told from what it has.
    pub fn shares(&self) -> bool {
        self.guest.mode == Mode::Shared
    }

    /// Number of the session.
    pub fn number(&self) -> u64 {
        self.guest.number
    }

    /// Whether it speaks our protocol.
    pub fn speaks(&self) -> bool {
        self.guest.speaks
    }

    /// Key of the store that its pages come from.
    pub fn store(&self) -> u64 {
        self.guest.store
    }

    /// As whom it waits for chunks.
    pub fn waiter(&self) -> Waiter {
        Waiter { store: self.guest.store, peer: Some(self.guest.peer) }
    }

    /// Faults that wait for bytes.
    pub fn waiting(&self) -> u64 {
        self.faults.waiting()
    }

    /// The counters as of now.
    pub fn metrics(&self) -> SessionMetrics {
        SessionMetrics { waiting: self.waiting(), ..self.counters.clone() }
    }

    /// Whether every fault that was raised before the last turn is answered, or waits for bytes.
    pub fn is_settled(&self) -> bool {
        self.is_read && self.faults.is_settled()
    }

    /// Whether there is something to answer that no new event will bring up.
    pub fn has_more_to_do(&self) -> bool {
        !self.faults.is_settled()
    }

    /// A chunk that it waits for is in the store; so many of its pages were put there on this guest's behalf.
    pub fn arrived(&mut self, chunk: u64, pages: u64) {
        self.counters.pages_filled += pages;
        self.faults.arrived(chunk);
    }

    /// Answers the events that wait on the userfaultfd, up to a fair share, and what was left of the last turn.
    pub fn serve(&mut self, store: &mut Store, image: &mut Image, scratch: &mut Scratch) -> Result<Turn, SessionError> {
        let mut turn = Turn::default();
        let mut actions = 0..ACTIONS_IN_A_TURN;
        for _ in 0..BATCHES_IN_A_TURN {
            turn.events += self.read(&mut scratch.events)?;
            while let Some(action) = self.faults.next_action() {
                if actions.next().is_none() {
                    return Ok(turn);
                }
                let outcome = self.act(action, store, image, scratch, &mut turn)?;
                if let Some(answer) = self.faults.done(action, outcome) {
                    self.count(answer);
                    scratch.count(answer);
                }
            }
            if self.is_read && !self.faults.must_read() {
                break;
            }
        }
        self.fill_ahead(store, image, scratch, &mut turn)?;
        Ok(turn)
    }

    /// Puts the chunks into the store that a guest which goes through its memory in order will want next; what is not at hand is
    /// read meanwhile.
    fn fill_ahead(
        &mut self,
        store: &mut Store,
        image: &mut Image,
        scratch: &mut Scratch,
        turn: &mut Turn,
    ) -> Result<(), SessionError> {
        let end = (self.guest.pages).div_ceil(CHUNK_PAGES);
        for chunk in std::mem::take(&mut self.to_fill).take_while(|chunk| *chunk < end) {
            if store.has_chunk(chunk) {
                continue;
            }
            match image.read_now(chunk, &mut scratch.chunk) {
                Ok(Some(len)) => {
                    let filled = store.fill(chunk, &scratch.chunk[..len])?;
                    image.is_stored(chunk);
                    self.counters.pages_filled += filled.pages;
                    turn.foreign += filled.foreign;
                }
                Ok(None) => {
                    image.read_ahead(chunk);
                }
                // Who has not asked for it goes on.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Reads a batch of events; returns how many faults there were.
    fn read(&mut self, events: &mut EventReader) -> Result<u64, SessionError> {
        let read = events.read(&self.uffd)?;
        let now = Instant::now();
        let mut others = events.others();
        for range in events.removes() {
            match self.guest.mode {
                Mode::Copy => {
                    let pages = self.guest.regions.pages_within(range.clone());
                    pages.into_iter().for_each(|pages| self.faults.remove(pages));
                }
                // The store is nobody's to change: what was given back comes from there again.
                Mode::Shared => others += 1,
            }
        }
        self.log_others(others);
        for &address in events.addresses() {
            let fault = self.guest.regions.locate(address).ok_or(SessionError::Outside(address))?;
            self.faults.fault(fault.page, now)?;
            self.counters.uffd_events += 1;
        }
        self.is_read = read < BATCH;
        if self.is_read {
            self.faults.drained();
        }
        Ok(events.addresses().len() as u64)
    }

    /// Says once that a guest's userfaultfd delivers what nobody asked for.
    fn log_others(&mut self, others: usize) {
        if others > 0 && !self.other_event_logged {
            self.other_event_logged = true;
            tracing::warn!("session {}: ignoring events that mean nothing in its mode", self.counters.id);
        }
    }

    fn count(&mut self, answer: Answer) {
        match answer.kind {
            Kind::Copied | Kind::Zeroed => self.counters.pages_copied += 1,
            Kind::Present if !answer.waited => self.counters.already_present += answer.faults,
            Kind::Present | Kind::Filled => {}
        }
    }

    fn act(
        &mut self,
        action: Action,
        store: &mut Store,
        image: &mut Image,
        scratch: &mut Scratch,
        turn: &mut Turn,
    ) -> Result<Outcome, SessionError> {
        let (Action::Give(page) | Action::Zero(page) | Action::Wake(page)) = action;
        // Always there: the page came from an address in a region.
        let address = self.guest.regions.address_of(page).ok_or(SessionError::Outside(0))?;
        let fault = self.guest.regions.locate(address).ok_or(SessionError::Outside(address))?;
        match action {
            Action::Zero(_) => give_zeros(&self.uffd, address).map_err(copy_failed),
            Action::Wake(_) => {
                let range = match self.guest.mode {
                    Mode::Shared => fault.wake,
                    Mode::Copy => address..address + PAGE_SIZE,
                };
                self.uffd.wake(range.start as *mut _, (range.end - range.start) as usize)?;
                Ok(Outcome::Woken)
            }
            Action::Give(_) => match self.obtain(fault.chunk, store, image, &mut scratch.chunk, turn)? {
                Outcome::Waits => Ok(Outcome::Waits),
                _ if self.guest.mode == Mode::Copy => {
                    let outcome = store.give(page, &self.uffd, address).map_err(copy_failed)?;
                    if outcome == Outcome::Placed {
                        self.give_ahead(page, address..fault.wake.end, store);
                    }
                    Ok(outcome)
                }
                Outcome::Filled => {
                    let wanted = self.chunks_ahead.at(fault.chunk);
                    self.to_fill = wanted.start + 1..wanted.end;
                    Ok(Outcome::Filled)
                }
                there => Ok(there),
            },
        }
    }

    /// Copies the pages after one that was copied, as far as they are likely to be asked for next; their chunk is in the store. Where
    /// that fails they are asked for if need be.
    fn give_ahead(&mut self, page: u64, room: Range<u64>, store: &Store) {
        let wanted = self.ahead.at(page).end.min(page + (room.end - room.start) / PAGE_SIZE);
        let end = (page + 1..wanted).find(|&next| self.faults.is_removed(next)).unwrap_or(wanted);
        if end > page + 1 {
            let copied = store.give_run(page + 1..end, &self.uffd, room.start + PAGE_SIZE);
            self.counters.pages_copied += copied;
        }
    }

    /// Sees to it that a chunk is in the store, or on its way.
    fn obtain(
        &mut self,
        chunk: u64,
        store: &mut Store,
        image: &mut Image,
        buffer: &mut Chunk,
        turn: &mut Turn,
    ) -> Result<Outcome, SessionError> {
        if store.has_chunk(chunk) {
            return Ok(Outcome::Present);
        }
        let Some(len) = image.read_now(chunk, buffer)? else {
            image.wait(chunk, self.waiter());
            return Ok(Outcome::Waits);
        };
        let filled = store.fill(chunk, &buffer[..len])?;
        image.is_stored(chunk);
        self.counters.pages_filled += filled.pages;
        turn.foreign += filled.foreign;
        Ok(Outcome::Filled)
    }
}

/// Why a page cannot be put into a client's memory.
fn copy_failed(error: io::Error) -> SessionError {
    match error.raw_os_error() {
        // The memory is gone; older kernels have the second word for it.
        Some(libc::ESRCH | libc::ENOSPC) => SessionError::Ended,
        _ => SessionError::Copy(error),
    }
}
