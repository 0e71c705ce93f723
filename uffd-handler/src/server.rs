//! The server: who is connected, which stores there are, and what happens when something becomes ready.
//!
//! One thread owns everything here. The event loop calls [`Server::process`] with a token that says what is ready:
//!
//! ```text
//!   listener --> Handshake --hello--> store granted --attach--> Session --faults--> Store <-- image
//!   metrics listener --> Reader        tick (1 s): deadlines, audits       signal: stop
//! ```
//!
//! A store belongs to one image and one user. It stays when its guests are gone, so that the next one finds it warm,
//! unless it was *retired*: given to nobody else, and dropped with its last guest.

use crate::handshake::{Handshake, HandshakeError, Request};
use crate::listener::Listener;
use crate::metrics::{MAX_READERS, Reader};
use crate::process::{Credentials, Signals};
use crate::region::{PAGE_SIZE, RegionError, Regions};
use crate::session::{Scratch, Session, SessionError};
use crate::source::Source;
use crate::store::{Audit, CreateError, FillError, Store};
use crate::uffd::{self, AdoptError};
use api_spec::handshake::{Hello, Metrics, Region, StoreMetrics, VERSION};
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
    #[error("image {wanted} is not served here, only {served}: start the page server with its snapshot")]
    Image { wanted: String, served: String },
    #[error("the image has {image} bytes, not {client}: the snapshot was changed")]
    Size { image: u64, client: u64 },
    #[error("the image is damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Store(#[from] CreateError),
    #[error(transparent)]
    Regions(#[from] RegionError),
    #[error(transparent)]
    Uffd(#[from] AdoptError),
    #[error("an attach message without a hello")]
    Order,
    #[error("cannot watch the connection: {0}")]
    Watch(event_manager::Error),
}

/// An image that is served, until it turns out to be damaged.
struct Image {
    source: Box<dyn Source>,
    damage: Option<String>,
}

/// A store and whom it is for.
struct StoreEntry {
    store: Store,
    image: usize,
    uid: u32,
    retired: bool,
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
    images: Vec<Image>,
    stores: BTreeMap<u64, StoreEntry>,
    peers: BTreeMap<u32, Peer>,
    readers: BTreeMap<u32, Reader>,
    scratch: Scratch,
    next_peer: u32,
    next_store: u64,
    sessions_total: u64,
    refused_total: u64,
    stores_retired_total: u64,
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
            images: images.into_iter().map(|source| Image { source, damage: None }).collect(),
            stores: BTreeMap::new(),
            peers: BTreeMap::new(),
            readers: BTreeMap::new(),
            scratch: Scratch::new(),
            next_peer: 0,
            next_store: 0,
            sessions_total: 0,
            refused_total: 0,
            stores_retired_total: 0,
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
            stores: self.stores.values().map(|entry| self.store_metrics(entry)).collect(),
            sessions: sessions.collect(),
            sessions_total: self.sessions_total,
            refused_total: self.refused_total,
            stores_retired_total: self.stores_retired_total,
        }
    }

    fn store_metrics(&self, entry: &StoreEntry) -> StoreMetrics {
        let source = &self.images[entry.image].source;
        StoreMetrics {
            image: source.root().to_string(),
            uid: entry.uid,
            image_pages: source.size() / PAGE_SIZE,
            filled_pages: entry.store.filled_pages(),
            retired: entry.retired,
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
        log::error!("cannot accept connections: {error}; trying again in a second");
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
                Ok(Some(Request::Hello(hello))) => self.grant_store(id, &hello),
                Ok(Some(Request::Attach(regions, uffd))) => self.attach(id, regions, uffd, ops),
                Err(error) => Err(error.into()),
            };
            if let Err(refusal) = done {
                return self.refuse(id, &refusal, ops);
            }
        }
    }

    /// Answers a hello with a store of the wanted image.
    fn grant_store(&mut self, id: u32, hello: &Hello) -> Result<(), Refusal> {
        let image = self.find_image(hello)?;
        let Some(Peer::Handshake(handshake, _)) = self.peers.get(&id) else { return Ok(()) };
        let store = self.find_or_create_store(image, handshake.peer.uid)?;
        let Some(Peer::Handshake(handshake, granted)) = self.peers.get_mut(&id) else { return Ok(()) };
        handshake.send_store(hello.size, self.stores[&store].store.hand_out())?;
        *granted = Some(store);
        Ok(())
    }

    fn find_image(&self, hello: &Hello) -> Result<usize, Refusal> {
        if hello.version != VERSION {
            return Err(Refusal::Version(hello.version));
        }
        let Some(index) = self.images.iter().position(|image| image.source.root() == hello.image) else {
            let served: Vec<&str> = self.images.iter().map(|image| image.source.root()).collect();
            return Err(Refusal::Image { wanted: hello.image.chars().take(64).collect(), served: served.join(", ") });
        };
        let image = &self.images[index];
        match &image.damage {
            Some(damage) => Err(Refusal::Damaged(damage.clone())),
            None if image.source.size() != hello.size => {
                Err(Refusal::Size { image: image.source.size(), client: hello.size })
            }
            None => Ok(index),
        }
    }

    /// Turns a handshake into a session and answers the attach message.
    fn attach(&mut self, id: u32, regions: Vec<Region>, uffd: OwnedFd, ops: &mut EventOps) -> Result<(), Refusal> {
        let Some(Peer::Handshake(handshake, store)) = self.peers.get_mut(&id) else { return Ok(()) };
        let store = store.ok_or(Refusal::Order)?;
        let image = &self.images[self.stores[&store].image];
        if let Some(damage) = &image.damage {
            return Err(Refusal::Damaged(damage.clone()));
        }
        let regions = Regions::check(regions, image.source.size())?;
        let uffd = uffd::adopt(uffd)?;
        handshake.send_serving()?;
        let Some(Peer::Handshake(handshake, _)) = self.peers.remove(&id) else { return Ok(()) };
        let peer = handshake.peer;
        let number = self.sessions_total + 1;
        let session = Session::new(number, peer, handshake.into_stream(), uffd, regions, store);
        let (uffd, pidfd) = (session.uffd.as_raw_fd(), session.pidfd.as_ref().map(AsRawFd::as_raw_fd));
        self.peers.insert(id, Peer::Session(session));
        self.sessions_total = number;
        log::info!("session {number}: serving pid {} uid {}", peer.pid, peer.uid);
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
        log::warn!("refused pid {} uid {}: {}", peer.pid, peer.uid, one_line(&refusal.to_string()));
    }

    fn end_session(&mut self, id: u32, reason: &str, ops: &mut EventOps) {
        let Some(peer) = self.peers.remove(&id) else { return };
        unwatch(&peer, ops);
        if let Peer::Session(session) = &peer {
            log::info!("session {}: ended: {}", session.metrics().id, one_line(reason));
        }
        drop(peer);
        self.drop_unused_stores();
    }

    // ---- faults ----

    fn on_faults(&mut self, id: u32, ready: EventSet, ops: &mut EventOps) {
        let Some(Peer::Session(session)) = self.peers.get_mut(&id) else { return };
        // The kernel reports an error on a userfaultfd that somebody has made blocking; reading it would stop everyone.
        if ready.contains(EventSet::ERROR) {
            return self.end_session(id, "its userfaultfd was made blocking", ops);
        }
        let key = session.store;
        let Some(entry) = self.stores.get_mut(&key) else { return };
        let image = entry.image;
        match session.serve(&mut entry.store, &*self.images[image].source, &mut self.scratch) {
            Ok(turn) => {
                self.events_total += turn.events;
                if turn.foreign > 0 {
                    self.retire(key, turn.foreign, ops);
                }
            }
            Err(SessionError::Fill(FillError::Source(error))) => {
                self.mark_damaged(image, &error.to_string());
                self.end_session(id, "its memory image is damaged", ops);
            }
            Err(error) => {
                log::error!("session {}: {error}", session.metrics().id);
                self.end_session(id, &error.to_string(), ops);
            }
        }
    }

    /// From now on nobody new is served this image; a guest that needs a bad chunk loses its connection.
    fn mark_damaged(&mut self, image: usize, damage: &str) {
        let image = &mut self.images[image];
        if image.damage.is_none() {
            log::error!("image {} is damaged: {damage}; new clients are refused", image.source.root());
            image.damage = Some(damage.to_string());
        }
    }

    // ---- stores ----

    /// The store of an image for a user, checked just before it is handed out.
    fn find_or_create_store(&mut self, image: usize, uid: u32) -> Result<u64, Refusal> {
        let usable = |entry: &StoreEntry| entry.image == image && entry.uid == uid && !entry.retired;
        if let Some((&key, _)) = self.stores.iter().find(|(_, entry)| usable(entry)) {
            if self.is_clean(key) {
                return Ok(key);
            }
            self.mark_retired(key);
        }
        let store = Store::create(self.images[image].source.size())?;
        self.next_store += 1;
        self.stores.insert(self.next_store, StoreEntry { store, image, uid, retired: false });
        Ok(self.next_store)
    }

    /// Whether a store holds no more than was put into it; one that cannot be looked at is not clean.
    fn is_clean(&self, key: u64) -> bool {
        self.stores.get(&key).is_none_or(|entry| matches!(entry.store.audit(), Ok(Audit::Clean)))
    }

    fn audit_stores(&mut self, ops: &mut EventOps) {
        let keys: Vec<u64> = self.stores.keys().copied().collect();
        for key in keys {
            let surplus = match self.stores[&key].store.audit() {
                Ok(Audit::Clean) => continue,
                Ok(Audit::Surplus(pages)) => pages,
                Err(_) => 0,
            };
            self.retire(key, surplus, ops);
        }
    }

    fn mark_retired(&mut self, key: u64) {
        let Some(entry) = self.stores.get_mut(&key) else { return };
        if !std::mem::replace(&mut entry.retired, true) {
            self.stores_retired_total += 1;
            let image = self.images[entry.image].source.root();
            log::warn!(
                "store of image {image} for uid {}: pages appeared that were not put there (somebody read it without \
                 userfaultfd); it is retired, its guests are served on, new ones get a fresh store",
                entry.uid
            );
        }
    }

    /// Gives a store to nobody else, and puts right what is wrong in it for those who have it.
    fn retire(&mut self, key: u64, surplus: u64, ops: &mut EventOps) {
        self.mark_retired(key);
        let Some(entry) = self.stores.get_mut(&key) else { return };
        let image = entry.image;
        let repaired = entry.store.repair(&*self.images[image].source, &mut self.scratch.chunk);
        match repaired {
            Ok(pages) => log::debug!("store {key}: {surplus} pages too many, {pages} put right"),
            Err(FillError::Source(error)) => self.mark_damaged(image, &error.to_string()),
            Err(error) => log::error!("store {key}: {error}"),
        }
        // Pages that cannot be found cannot be put right: a guest must not run into their zeros.
        if !self.is_clean(key) {
            self.end_sessions_of(key, "its store has wrong pages that cannot be put right", ops);
        }
        self.drop_unused_stores();
    }

    fn end_sessions_of(&mut self, key: u64, reason: &str, ops: &mut EventOps) {
        let ids: Vec<u32> = self.peers.iter().filter(|(_, p)| p.store() == Some(key)).map(|(&id, _)| id).collect();
        for id in ids {
            self.end_session(id, reason, ops);
        }
    }

    /// Drops what nobody uses and nobody will be given: retired stores and those of damaged images.
    fn drop_unused_stores(&mut self) {
        let Self { stores, peers, images, .. } = self;
        stores.retain(|key, entry| {
            let doomed = entry.retired || images[entry.image].damage.is_some();
            !doomed || peers.values().any(|peer| peer.store() == Some(*key))
        });
    }

    // ---- metrics and time ----

    fn on_metrics_listener(&mut self, ops: &mut EventOps) {
        while let Some(stream) = self.metrics.as_ref().and_then(|listener| listener.accept().ok().flatten()) {
            if self.readers.len() >= MAX_READERS {
                continue;
            }
            let Ok(mut reader) = Reader::new(stream, &self.metrics()) else { continue };
            if reader.push() {
                continue;
            }
            let id = self.next_peer_id();
            let events = Events::with_data(reader.stream(), Token::Reader(id).encode(), EventSet::OUT);
            if ops.add(events).is_ok() {
                self.readers.insert(id, reader);
            }
        }
    }

    fn on_reader(&mut self, id: u32, ops: &mut EventOps) {
        if self.readers.get_mut(&id).is_some_and(Reader::push) {
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

/// What a ready descriptor is, as the 32 bits that the event loop keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Listener,
    Metrics,
    Signals,
    Tick,
    Socket(u32),
    Uffd(u32),
    Process(u32),
    Reader(u32),
}

impl Token {
    const ID_BITS: u32 = 29;
    const ID_MASK: u32 = (1 << Self::ID_BITS) - 1;

    fn encode(self) -> u32 {
        let (kind, id) = match self {
            Token::Listener => (0, 0),
            Token::Metrics => (1, 0),
            Token::Signals => (2, 0),
            Token::Tick => (3, 0),
            Token::Socket(id) => (4, id),
            Token::Uffd(id) => (5, id),
            Token::Process(id) => (6, id),
            Token::Reader(id) => (7, id),
        };
        (kind << Self::ID_BITS) | id
    }

    fn decode(data: u32) -> Option<Self> {
        let id = data & Self::ID_MASK;
        Some(match data >> Self::ID_BITS {
            0 => Token::Listener,
            1 => Token::Metrics,
            2 => Token::Signals,
            3 => Token::Tick,
            4 => Token::Socket(id),
            5 => Token::Uffd(id),
            6 => Token::Process(id),
            7 => Token::Reader(id),
            _ => return None,
        })
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
    fn tokens_come_back_as_they_were() {
        let id = Token::ID_MASK;
        for token in [Token::Listener, Token::Metrics, Token::Signals, Token::Tick] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
        for token in [Token::Socket(id), Token::Uffd(1), Token::Process(0), Token::Reader(id)] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }

    #[test]
    fn a_peer_cannot_forge_log_lines() {
        assert_eq!(one_line("a\nb\u{1b}[0m"), "a b [0m");
    }
}
