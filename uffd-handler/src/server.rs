//! The server: who is connected, and what happens when something becomes ready.
//!
//! One thread owns everything here. The event loop calls [`Server::process`] with a token that says what is ready:
//!
//! ```text
//!   listener --> Handshake --hello--> store granted --attach--> Session --faults--> Store <-- image
//!   metrics listener --> Reader        tick (1 s): deadlines, audits       signal: stop
//! ```
//!
//! Which stores there are, and who may have them, is the business of [`crate::stores`].

use crate::handshake::{Handshake, HandshakeError, Request};
use crate::listener::Listener;
use crate::metrics::{MAX_READERS, Next, Reader};
use crate::process::{Credentials, Signals};
use crate::region::{RegionError, Regions};
use crate::session::{Scratch, Session};
use crate::source::Source;
use crate::stores::{GrantError, Stores};
use crate::token::Token;
use crate::uffd::{self, AdoptError};
use api_spec::handshake::{Hello, Region, VERSION};
use api_spec::page_server::Metrics;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

/// How often deadlines and stores are checked.
const TICK: Duration = Duration::from_secs(1);
/// Connections that are accepted before others get their turn.
const ACCEPTS_IN_A_TURN: usize = 64;

/// Why a client is refused. The text is the answer that it gets.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("protocol version {0} is not spoken here, only {VERSION}: use a vmm and a page server of one release")]
    Version(u32),
    #[error(transparent)]
    Grant(#[from] GrantError),
    #[error(transparent)]
    Regions(#[from] RegionError),
    #[error(transparent)]
    Uffd(#[from] AdoptError),
    #[error("an attach message without a hello")]
    Order,
    #[error("cannot watch the connection: {0}")]
    Watch(event_manager::Error),
}

/// One connection to the page-server socket.
enum Peer {
    /// Not served yet; the key of the store, once it was handed out.
    Handshake(Handshake, Option<u64>),
    Session(Session),
}

impl Peer {
    fn store(&self) -> Option<u64> {
        match self {
            Peer::Handshake(_, store) => *store,
            Peer::Session(session) => Some(session.store),
        }
    }

    fn watched(&self) -> Vec<RawFd> {
        match self {
            Peer::Handshake(handshake, _) => vec![handshake.stream().as_raw_fd()],
            Peer::Session(session) => {
                let pidfd = session.pidfd.as_ref().map(AsRawFd::as_raw_fd);
                [session.stream.as_raw_fd(), session.uffd.as_raw_fd()].into_iter().chain(pidfd).collect()
            }
        }
    }
}

/// The page server.
pub struct Server {
    listener: Listener,
    metrics: Option<Listener>,
    signals: Option<Signals>,
    timer: TimerFd,
    stores: Stores,
    peers: BTreeMap<u32, Peer>,
    readers: BTreeMap<u32, Reader>,
    scratch: Scratch,
    next_peer: u32,
    sessions_total: u64,
    refused_total: u64,
    events_total: u64,
    accepting: bool,
    stopping: bool,
    fatal: Option<event_manager::Error>,
}

impl Server {
    /// A server of these images on sockets that listen already. `signals` end it, if given.
    pub fn new(
        images: Vec<Box<dyn Source>>,
        listener: Listener,
        metrics: Option<Listener>,
        signals: Option<Signals>,
    ) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        timer.reset(TICK, Some(TICK)).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self {
            listener,
            metrics,
            signals,
            timer,
            stores: Stores::new(images),
            peers: BTreeMap::new(),
            readers: BTreeMap::new(),
            scratch: Scratch::new(),
            next_peer: 0,
            sessions_total: 0,
            refused_total: 0,
            events_total: 0,
            accepting: true,
            stopping: false,
            fatal: None,
        })
    }

    /// Whether a signal asked for the end, or the event loop failed.
    pub fn is_stopping(&self) -> bool {
        self.stopping || self.fatal.is_some()
    }

    /// The failure that made the server stop, if one did.
    pub fn take_failure(&mut self) -> Option<event_manager::Error> {
        self.fatal.take()
    }

    /// Fault events answered so far.
    pub fn events_total(&self) -> u64 {
        self.events_total
    }

    /// The counters as of now.
    pub fn metrics(&self) -> Metrics {
        let sessions = self.peers.values().filter_map(|peer| match peer {
            Peer::Session(session) => Some(session.metrics().clone()),
            Peer::Handshake(..) => None,
        });
        Metrics {
            stores: self.stores.metrics(),
            sessions: sessions.collect(),
            sessions_total: self.sessions_total,
            refused_total: self.refused_total,
            stores_retired_total: self.stores.retired_total(),
            ..Metrics::default()
        }
    }

    // ---- connections ----

    fn on_listener(&mut self, ops: &mut EventOps) {
        for _ in 0..ACCEPTS_IN_A_TURN {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => return self.pause_accepting(ops, &error),
            };
            let id = self.next_peer_id();
            let added =
                Handshake::new(stream).map_err(HandshakeError::from).map_err(Refusal::from).and_then(|handshake| {
                    watch(ops, handshake.stream().as_raw_fd(), Token::Socket(id))?;
                    Ok(handshake)
                });
            match added {
                Ok(handshake) => drop(self.peers.insert(id, Peer::Handshake(handshake, None))),
                Err(refusal) => self.count_refusal(Credentials::default(), &refusal),
            }
        }
    }

    /// A listener that cannot accept (no descriptors left) stays ready; do not spin on it, try again with the next tick.
    fn pause_accepting(&mut self, ops: &mut EventOps, error: &io::Error) {
        tracing::error!("cannot accept connections: {error}; trying again in a second");
        let paused = Events::with_data(&self.listener, Token::Listener.encode(), EventSet::empty());
        self.accepting = ops.modify(paused).is_err();
    }

    fn resume_accepting(&mut self, ops: &mut EventOps) {
        if !self.accepting {
            let resumed = Events::with_data(&self.listener, Token::Listener.encode(), EventSet::IN);
            self.accepting = ops.modify(resumed).is_ok();
        }
    }

    fn next_peer_id(&mut self) -> u32 {
        loop {
            self.next_peer = (self.next_peer + 1) & Token::ID_MASK;
            if !self.peers.contains_key(&self.next_peer) && !self.readers.contains_key(&self.next_peer) {
                return self.next_peer;
            }
        }
    }

    fn on_socket(&mut self, id: u32, ops: &mut EventOps) {
        match self.peers.get_mut(&id) {
            Some(Peer::Handshake(..)) => self.on_handshake(id, ops),
            Some(Peer::Session(session)) => match read_nothing(&mut session.stream) {
                Ok(()) => {}
                Err(reason) => self.end_session(id, reason, ops),
            },
            None => {}
        }
    }

    fn on_handshake(&mut self, id: u32, ops: &mut EventOps) {
        while let Some(Peer::Handshake(handshake, _)) = self.peers.get_mut(&id) {
            let done = match handshake.receive() {
                Ok(None) => return,
                Ok(Some(Request::Hello(hello))) => self.grant_store(id, &hello, ops),
                Ok(Some(Request::Attach(regions, uffd))) => self.attach(id, regions, uffd, ops),
                Err(error) => Err(error.into()),
            };
            if let Err(refusal) = done {
                return self.refuse(id, &refusal, ops);
            }
        }
    }

    /// Answers a hello with a store of the wanted image.
    fn grant_store(&mut self, id: u32, hello: &Hello, ops: &mut EventOps) -> Result<(), Refusal> {
        self.audit_stores(ops);
        let Some(Peer::Handshake(handshake, granted)) = self.peers.get_mut(&id) else { return Ok(()) };
        if hello.version != VERSION {
            return Err(Refusal::Version(hello.version));
        }
        let (key, descriptor) = self.stores.grant(hello, handshake.peer.uid)?;
        handshake.send_store(hello.size, descriptor)?;
        *granted = Some(key);
        Ok(())
    }

    /// Turns a handshake into a session and answers the attach message.
    fn attach(&mut self, id: u32, regions: Vec<Region>, uffd: OwnedFd, ops: &mut EventOps) -> Result<(), Refusal> {
        let Some(Peer::Handshake(handshake, store)) = self.peers.get_mut(&id) else { return Ok(()) };
        let store = store.ok_or(Refusal::Order)?;
        let regions = Regions::check(regions, self.stores.sound_size(store)?)?;
        let uffd = uffd::adopt(uffd)?;
        handshake.send_serving()?;
        let Some(Peer::Handshake(handshake, _)) = self.peers.remove(&id) else { return Ok(()) };
        let peer = handshake.peer;
        let number = self.sessions_total + 1;
        let session = Session::new(number, peer, handshake.into_stream(), uffd, regions, store);
        let (uffd, pidfd) = (session.uffd.as_raw_fd(), session.pidfd.as_ref().map(AsRawFd::as_raw_fd));
        self.peers.insert(id, Peer::Session(session));
        self.sessions_total = number;
        tracing::info!("session {number}: serving pid {} uid {}", peer.pid, peer.uid);
        let watched = watch(ops, uffd, Token::Uffd(id))
            .and_then(|()| pidfd.map_or(Ok(()), |pidfd| watch(ops, pidfd, Token::Process(id))));
        if let Err(refusal) = watched {
            self.end_session(id, &refusal.to_string(), ops);
        }
        Ok(())
    }

    fn refuse(&mut self, id: u32, refusal: &Refusal, ops: &mut EventOps) {
        let Some(Peer::Handshake(mut handshake, store)) = self.peers.remove(&id) else { return };
        // A copy-mode client does not read answers.
        if !matches!(refusal, Refusal::Handshake(HandshakeError::CopyMode | HandshakeError::Closed)) {
            handshake.send_refusal(&one_line(&refusal.to_string()));
        }
        self.count_refusal(handshake.peer, refusal);
        unwatch(&Peer::Handshake(handshake, store), ops);
        self.drop_unused_stores();
    }

    fn count_refusal(&mut self, peer: Credentials, refusal: &Refusal) {
        self.refused_total += 1;
        tracing::warn!("refused pid {} uid {}: {}", peer.pid, peer.uid, one_line(&refusal.to_string()));
    }

    fn end_session(&mut self, id: u32, reason: &str, ops: &mut EventOps) {
        let Some(peer) = self.peers.remove(&id) else { return };
        unwatch(&peer, ops);
        if let Peer::Session(session) = &peer {
            tracing::info!("session {}: ended: {}", session.metrics().id, one_line(reason));
        }
        drop(peer);
        self.drop_unused_stores();
    }

    // ---- faults ----

    fn on_faults(&mut self, id: u32, ready: EventSet, ops: &mut EventOps) {
        let Some(Peer::Session(session)) = self.peers.get_mut(&id) else { return };
        // The kernel reports an error, over and over, on a userfaultfd that somebody has made blocking.
        if ready.contains(EventSet::ERROR) {
            return self.end_session(id, "its userfaultfd was made blocking", ops);
        }
        let key = session.store;
        match self.stores.serve(session, &mut self.scratch) {
            Ok(turn) => {
                self.events_total += turn.events;
                if turn.foreign > 0 {
                    self.retire(key, ops);
                }
            }
            Err(error) => {
                tracing::error!("session {}: {error}", session.metrics().id);
                self.end_session(id, &error.to_string(), ops);
            }
        }
    }

    /// Looks for pages that nobody has put there: every second, and before a store is handed out.
    fn audit_stores(&mut self, ops: &mut EventOps) {
        for key in self.stores.unclean() {
            self.retire(key, ops);
        }
    }

    /// Gives a store to nobody else; ends its guests' sessions if it cannot be put right for them.
    fn retire(&mut self, key: u64, ops: &mut EventOps) {
        if !self.stores.retire(key, &mut self.scratch.chunk) {
            let ids = self.peers.iter().filter(|(_, peer)| peer.store() == Some(key)).map(|(&id, _)| id);
            for id in ids.collect::<Vec<_>>() {
                match self.peers.get(&id) {
                    Some(Peer::Handshake(..)) => self.refuse(id, &GrantError::Gone.into(), ops),
                    _ => self.end_session(id, "its store has wrong pages that cannot be put right", ops),
                }
            }
        }
        self.drop_unused_stores();
    }

    fn drop_unused_stores(&mut self) {
        let Self { stores, peers, .. } = self;
        stores.drop_unused(|key| peers.values().any(|peer| peer.store() == Some(key)));
    }

    // ---- metrics and time ----

    fn on_metrics_listener(&mut self, ops: &mut EventOps) {
        while let Some(stream) = self.metrics.as_ref().and_then(|listener| listener.accept().ok().flatten()) {
            if self.readers.len() >= MAX_READERS {
                continue;
            }
            let Ok(reader) = Reader::new(stream) else { continue };
            let id = self.next_peer_id();
            let events = Events::with_data(reader.stream(), Token::Reader(id).encode(), EventSet::IN);
            if ops.add(events).is_ok() {
                self.readers.insert(id, reader);
            }
        }
    }

    fn on_reader(&mut self, id: u32, ops: &mut EventOps) {
        let Some(mut reader) = self.readers.remove(&id) else { return };
        let next = reader.advance(|| self.metrics());
        let room = Events::with_data(reader.stream(), Token::Reader(id).encode(), EventSet::OUT);
        let goes_on = next == Next::Read || (next == Next::Write && ops.modify(room).is_ok());
        self.readers.insert(id, reader);
        if !goes_on {
            self.drop_reader(id, ops);
        }
    }

    fn drop_reader(&mut self, id: u32, ops: &mut EventOps) {
        if let Some(reader) = self.readers.remove(&id) {
            let _ = ops.remove(Events::empty(reader.stream()));
        }
    }

    fn on_tick(&mut self, ops: &mut EventOps) {
        let _ = self.timer.wait();
        self.resume_accepting(ops);
        let now = Instant::now();
        let overdue: Vec<u32> = self.readers.iter().filter(|(_, r)| r.is_overdue(now)).map(|(&id, _)| id).collect();
        for id in overdue {
            self.drop_reader(id, ops);
        }
        self.refuse_overdue(now, ops);
        self.audit_stores(ops);
    }

    fn refuse_overdue(&mut self, now: Instant, ops: &mut EventOps) {
        let overdue = self.peers.iter().filter_map(|(&id, peer)| match peer {
            Peer::Handshake(handshake, _) => handshake.check_deadline(now).err().map(|error| (id, error)),
            Peer::Session(_) => None,
        });
        for (id, error) in overdue.collect::<Vec<_>>() {
            self.refuse(id, &error.into(), ops);
        }
    }
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match Token::decode(events.data()) {
            Some(Token::Listener) => self.on_listener(ops),
            Some(Token::Metrics) => self.on_metrics_listener(ops),
            Some(Token::Signals) => self.stopping = true,
            Some(Token::Tick) => self.on_tick(ops),
            Some(Token::Socket(id)) => self.on_socket(id, ops),
            Some(Token::Uffd(id)) => self.on_faults(id, events.event_set(), ops),
            Some(Token::Process(id)) => self.end_session(id, "its process ended", ops),
            Some(Token::Reader(id)) => self.on_reader(id, ops),
            None => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut always = vec![(self.listener.as_raw_fd(), Token::Listener), (self.timer.as_raw_fd(), Token::Tick)];
        always.extend(self.metrics.as_ref().map(|listener| (listener.as_raw_fd(), Token::Metrics)));
        always.extend(self.signals.as_ref().map(|signals| (signals.as_raw_fd(), Token::Signals)));
        for (fd, token) in always {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token.encode(), EventSet::IN)) {
                self.fatal = Some(error);
            }
        }
    }
}

fn watch(ops: &mut EventOps, fd: RawFd, token: Token) -> Result<(), Refusal> {
    ops.add(Events::with_data_raw(fd, token.encode(), EventSet::IN)).map_err(Refusal::Watch)
}

/// Must precede closing: the kernel watches the open file, of which the client has a descriptor too.
fn unwatch(peer: &Peer, ops: &mut EventOps) {
    for fd in peer.watched() {
        let _ = ops.remove(Events::empty_raw(fd));
    }
}

/// A served client says nothing more: `Err` says what else its connection being ready means.
fn read_nothing(stream: &mut impl Read) -> Result<(), &'static str> {
    match stream.read(&mut [0; 16]) {
        Ok(0) => Err("the client closed its connection"),
        Ok(_) => Err("the client sent bytes after it was served"),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
        Err(_) => Err("its connection failed"),
    }
}

/// Text that may contain what a client sent, fit for one line of a log.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_forge_log_lines() {
        assert_eq!(one_line("a\nb\u{1b}[0m"), "a b [0m");
    }
}
