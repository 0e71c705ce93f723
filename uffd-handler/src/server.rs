//! The server: who is connected, and what happens when something becomes ready.
//!
//! One thread owns everything here. The event loop calls [`Server::process`] with a token that says what is ready:
//!
//! ```text
//!   listener --> Handshake --hello--> store granted --attach--> Session --faults--> Store <-- Image
//!                    |                                          ^                              |
//!                    +--array of Firecracker's copy mode--------+                 threads of its own, inbox
//!   metrics listener --> Reader    tick (1 s): deadlines, audits    alarm: what was put off    signal: stop
//! ```
//!
//! Which stores there are, and who may have them, is the business of [`crate::stores`].

use crate::fetch::Inbox;
use crate::handshake::{Handshake, HandshakeError, Request, send};
use crate::huge::{HugePages, Joiner};
use crate::listener::Listener;
use crate::metrics::{MAX_READERS, Next, Reader};
use crate::process::{Credentials, Signals};
use crate::region::{PAGE_SIZE, RegionError, Regions};
use crate::session::{Guest, Parting, Scratch, Session};
use crate::socket::{Passed, receive};
use crate::source::Source;
use crate::stores::{GrantError, Stores};
use crate::text::one_line;
use crate::timer::Timer;
use crate::token::Token;
use crate::uffd::{self, AdoptError};
use api_spec::handshake::{Hello, Mode, Ping, Region, Reply, VERSION, Word};
use api_spec::page_server::Metrics;
use event_manager::{EventOps, Events, MutEventSubscriber};
use snapshot::working_set::Used;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;

/// How often deadlines and stores are checked.
const TICK: Duration = Duration::from_secs(1);
/// Connections that are accepted before others get their turn.
const ACCEPTS_IN_A_TURN: usize = 64;
/// Chunks that are taken from the inbox before others get their turn.
const CHUNKS_IN_A_TURN: usize = 32;
/// Clients that may be in their handshake at one time.
const MOST_HANDSHAKES: usize = 256;
/// When to go on with a guest whose turn ended before its work did.
const NEXT_TURN: Duration = Duration::from_millis(1);

/// What a server may use, and a choice that it cannot make by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Guests that are served at one time, at most.
    pub max_sessions: usize,
    /// Bytes in all stores together from which on nobody gets a new one.
    pub max_stores: Option<u64>,
    /// How long a store is kept that nobody uses.
    pub keep_warm: Duration,
    /// Which image a client gets that names none, if several have the size of its memory.
    pub copy_image: Option<usize>,
    /// From how many clones of each image its working set is learnt; from none if 0.
    pub record: usize,
    /// Whether stores are moved into huge pages.
    pub huge_pages: HugePages,
}

/// For how long a guest is served before it is asked what it has used.
const USED_AFTER: Duration = Duration::from_secs(2);

/// How long it has to tell that, before somebody else is asked.
const USED_WITHIN: Duration = Duration::from_secs(30);

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_sessions: 10_000,
            max_stores: None,
            keep_warm: Duration::from_secs(600),
            copy_image: None,
            record: 0,
            huge_pages: HugePages::Never,
        }
    }
}

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
    #[error("{0} guests are served here, and no more may be: start another page server, or raise --max-sessions")]
    Sessions(usize),
    #[error("{MOST_HANDSHAKES} other clients have come before this one had said what it wants: connect again")]
    Crowd,
    #[error("cannot watch the connection: {0}")]
    Watch(event_manager::Error),
}

/// What a client was granted by its hello.
#[derive(Clone, Copy)]
struct Grant {
    store: u64,
    mode: Mode,
}

/// A client that is not served yet.
struct Newcomer {
    handshake: Handshake,
    grant: Option<Grant>,
}

/// The page server.
pub struct Server {
    listener: Listener,
    metrics: Option<Listener>,
    signals: Option<Signals>,
    tick: Timer,
    alarm: Timer,
    /// What the alarm is set to.
    alarm_at: Option<Instant>,
    inbox: Inbox,
    limits: Limits,
    stores: Stores,
    newcomers: BTreeMap<u32, Newcomer>,
    sessions: BTreeMap<u32, Session>,
    readers: BTreeMap<u32, Reader>,
    /// Guests whose turn ended before their work did, and when it goes on.
    unfinished: BTreeSet<u32>,
    next_turn: Option<Instant>,
    scratch: Scratch,
    last_id: u32,
    sessions_total: u64,
    refused_total: u64,
    events_total: u64,
    accepting: bool,
    accepting_readers: bool,
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
        limits: Limits,
    ) -> io::Result<Self> {
        let inbox = Inbox::new()?;
        let joiner = (limits.huge_pages == HugePages::Collapse).then(Joiner::start).transpose()?;
        let mut stores = Stores::new(images, limits.max_stores, limits.record, &inbox, joiner);
        stores.prepare(rustix::process::getuid().as_raw(), Instant::now());
        let tick = Timer::new()?;
        tick.set(Some(TICK), TICK)?;
        Ok(Self {
            listener,
            metrics,
            signals,
            tick,
            alarm: Timer::new()?,
            alarm_at: None,
            stores,
            inbox,
            limits,
            newcomers: BTreeMap::new(),
            sessions: BTreeMap::new(),
            readers: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            next_turn: None,
            scratch: Scratch::new(),
            last_id: 0,
            sessions_total: 0,
            refused_total: 0,
            events_total: 0,
            accepting: true,
            accepting_readers: true,
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
        let mut of_stores = BTreeMap::new();
        for session in self.sessions.values() {
            *of_stores.entry(session.store()).or_default() += 1;
        }
        Metrics {
            stores: self.stores.metrics(&of_stores),
            images: self.stores.image_metrics(),
            sessions: self.sessions.values().map(Session::metrics).collect(),
            sessions_total: self.sessions_total,
            refused_total: self.refused_total,
            stores_retired_total: self.stores.retired_total(),
            faults: self.scratch.answered.clone(),
            fault_latency: self.scratch.latency.document(),
            huge_pages: self.stores.huge_metrics(),
        }
    }

    // ---- connections ----

    fn on_listener(&mut self, ops: &mut EventOps) {
        for _ in 0..ACCEPTS_IN_A_TURN {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    self.accepting = !pause(&self.listener, Token::Listener, &error, ops);
                    return;
                }
            };
            let id = self.next_id();
            let added =
                Handshake::new(stream).map_err(HandshakeError::from).map_err(Refusal::from).and_then(|handshake| {
                    watch(ops, handshake.stream().as_raw_fd(), Token::Socket(id))?;
                    Ok(handshake)
                });
            match added {
                Ok(handshake) => drop(self.newcomers.insert(id, Newcomer { handshake, grant: None })),
                Err(refusal) => self.count_refusal(Credentials::default(), &refusal),
            }
            self.refuse_crowd(ops);
        }
    }

    /// Who has been in its handshake for longest makes room.
    fn refuse_crowd(&mut self, ops: &mut EventOps) {
        if self.newcomers.len() > MOST_HANDSHAKES {
            let oldest = self.newcomers.iter().min_by_key(|(_, newcomer)| newcomer.handshake.began());
            if let Some(id) = oldest.map(|(&id, _)| id) {
                self.refuse(id, &Refusal::Crowd, ops);
            }
        }
    }

    fn resume_accepting(&mut self, ops: &mut EventOps) {
        if !self.accepting {
            self.accepting = resume(&self.listener, Token::Listener, ops);
        }
        if let (false, Some(listener)) = (self.accepting_readers, &self.metrics) {
            self.accepting_readers = resume(listener, Token::Metrics, ops);
        }
    }

    fn next_id(&mut self) -> u32 {
        loop {
            self.last_id = (self.last_id + 1) & Token::ID_MASK;
            let id = &self.last_id;
            let is_taken =
                self.newcomers.contains_key(id) || self.sessions.contains_key(id) || self.readers.contains_key(id);
            if !is_taken {
                return self.last_id;
            }
        }
    }

    fn on_socket(&mut self, id: u32, ops: &mut EventOps) {
        if self.newcomers.contains_key(&id) {
            self.on_handshake(id, ops);
        } else if let Some(session) = self.sessions.get_mut(&id) {
            match hear(session) {
                Ok(()) => self.serve(id, ops),
                Err(parting) => self.end_session(id, &parting, ops),
            }
        }
    }

    // ---- handshakes ----

    fn on_handshake(&mut self, id: u32, ops: &mut EventOps) {
        while let Some(newcomer) = self.newcomers.get_mut(&id) {
            let done = match newcomer.handshake.receive() {
                Ok(None) => return,
                Ok(Some(Request::Hello(hello))) => self.grant(id, &hello, ops),
                Ok(Some(Request::Attach(regions, uffd))) => self.begin_session(id, regions, uffd, ops),
                Ok(Some(Request::Copy(regions, uffd))) => self.attach_silently(id, regions, uffd, ops),
                Err(error) => Err(error.into()),
            };
            if let Err(refusal) = done {
                return self.refuse(id, &refusal, ops);
            }
        }
    }

    /// Answers a hello with a store of the wanted image, or with the promise to copy from one.
    fn grant(&mut self, id: u32, hello: &Hello, ops: &mut EventOps) -> Result<(), Refusal> {
        if hello.version != VERSION {
            return Err(Refusal::Version(hello.version));
        }
        self.check_room()?;
        let image = self.stores.find_image(hello)?;
        let store = self.grant_store(id, image, hello.mode, ops)?;
        let Some(newcomer) = self.newcomers.get_mut(&id) else { return Ok(()) };
        match hello.mode {
            Mode::Shared => newcomer.handshake.send_store(hello.size, self.stores.hand_out(store)?)?,
            Mode::Copy => newcomer.handshake.send_image(hello.size)?,
        }
        Ok(())
    }

    /// Lets a newcomer have a store: that of its user, or, to be copied from, the server's own.
    fn grant_store(&mut self, id: u32, image: usize, mode: Mode, ops: &mut EventOps) -> Result<u64, Refusal> {
        self.audit_stores(ops);
        let Some(newcomer) = self.newcomers.get_mut(&id) else { return Err(GrantError::Gone.into()) };
        let uid = match mode {
            Mode::Shared => Some(newcomer.handshake.peer.uid),
            Mode::Copy => None,
        };
        let store = self.stores.grant(image, uid)?;
        newcomer.grant = Some(Grant { store, mode });
        Ok(store)
    }

    fn check_room(&self) -> Result<(), Refusal> {
        match self.sessions.len() {
            sessions if sessions >= self.limits.max_sessions => Err(Refusal::Sessions(sessions)),
            _ => Ok(()),
        }
    }

    /// Turns the handshake of Firecracker's copy mode into a session, of the image that has the size of all regions.
    fn attach_silently(
        &mut self,
        id: u32,
        regions: Vec<Region>,
        uffd: OwnedFd,
        ops: &mut EventOps,
    ) -> Result<(), Refusal> {
        let size = regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.size));
        let image = self.stores.find_image_of_size(size, self.limits.copy_image)?;
        self.grant_store(id, image, Mode::Copy, ops)?;
        self.begin_session(id, regions, uffd, ops)
    }

    /// Turns a handshake into a session, and answers the attach message if there was one.
    fn begin_session(
        &mut self,
        id: u32,
        regions: Vec<Region>,
        uffd: OwnedFd,
        ops: &mut EventOps,
    ) -> Result<(), Refusal> {
        self.check_room()?;
        let Some(newcomer) = self.newcomers.get_mut(&id) else { return Ok(()) };
        let Grant { store, mode } = newcomer.grant.ok_or(Refusal::Order)?;
        let size = self.stores.sound_size(store)?;
        let regions = Regions::check(regions, size)?;
        let uffd = uffd::adopt(uffd)?;
        let speaks = newcomer.handshake.is_answered();
        if speaks {
            newcomer.handshake.send_serving()?;
        }
        let Some(Newcomer { handshake, .. }) = self.newcomers.remove(&id) else { return Ok(()) };
        self.sessions_total += 1;
        let (number, credentials) = (self.sessions_total, handshake.peer);
        let pages = size / PAGE_SIZE;
        let guest = Guest { number, peer: id, credentials, mode, speaks, store, pages, regions };
        let session = Session::new(guest, handshake.into_stream(), uffd);
        let (uffd, pidfd) = (session.uffd.as_raw_fd(), session.pidfd.as_ref().map(AsRawFd::as_raw_fd));
        self.sessions.insert(id, session);
        let how = if mode == Mode::Copy { " with copies" } else { "" };
        tracing::info!("session {number}: serving pid {} uid {}{how}", credentials.pid, credentials.uid);
        let watched = watch(ops, uffd, Token::Uffd(id))
            .and_then(|()| pidfd.map_or(Ok(()), |pidfd| watch(ops, pidfd, Token::Process(id))));
        if let Err(refusal) = watched {
            self.end_session(id, &Parting::silent(refusal.to_string()), ops);
        }
        Ok(())
    }

    fn refuse(&mut self, id: u32, refusal: &Refusal, ops: &mut EventOps) {
        let Some(Newcomer { mut handshake, grant }) = self.newcomers.remove(&id) else { return };
        if !matches!(refusal, Refusal::Handshake(HandshakeError::Closed)) {
            handshake.send_refusal(&one_line(&refusal.to_string()));
        }
        self.count_refusal(handshake.peer, refusal);
        unwatch([handshake.stream().as_raw_fd()], ops);
        if let Some(Grant { store, .. }) = grant {
            self.stores.release(store, Instant::now());
        }
    }

    fn count_refusal(&mut self, peer: Credentials, refusal: &Refusal) {
        self.refused_total += 1;
        tracing::warn!("refused pid {} uid {}: {}", peer.pid, peer.uid, one_line(&refusal.to_string()));
    }

    // ---- sessions ----

    fn on_faults(&mut self, id: u32, ready: EventSet, ops: &mut EventOps) {
        // The kernel reports an error, over and over, on a userfaultfd that somebody has made blocking.
        if ready.contains(EventSet::ERROR) {
            let parting = Parting::told("its userfaultfd was made blocking");
            return self.end_session(id, &parting, ops);
        }
        self.serve(id, ops);
    }

    /// Gives a guest a turn: answers its faults, and then its words.
    fn serve(&mut self, id: u32, ops: &mut EventOps) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let key = session.store();
        let served = self.stores.serve(session, &mut self.scratch);
        let answered = served
            .map_err(|error| Parting::from(&error))
            .and_then(|turn| Ok((turn, answer_words(session, self.stores.away(key))?)));
        match answered {
            Ok((turn, used)) => {
                if let Some(used) = used {
                    self.stores.learn(key, used);
                }
                if session.has_more_to_do() || session.talk.has_line() {
                    self.unfinished.insert(id);
                    self.next_turn.get_or_insert_with(|| Instant::now() + NEXT_TURN);
                }
                self.events_total += turn.events;
                if turn.foreign > 0 {
                    self.retire(key, ops);
                }
            }
            Err(parting) => self.end_session(id, &parting, ops),
        }
    }

    fn end_session(&mut self, id: u32, parting: &Parting, ops: &mut EventOps) {
        let Some(session) = self.sessions.remove(&id) else { return };
        let (number, reason) = (session.number(), one_line(&parting.reason));
        if parting.told && session.speaks() {
            // Who has no room for it sees the connection's end.
            let _ = send(&session.stream, &Reply::Refused { reason: reason.clone() });
        }
        let pidfd = session.pidfd.as_ref().map(AsRawFd::as_raw_fd);
        unwatch([session.stream.as_raw_fd(), session.uffd.as_raw_fd()].into_iter().chain(pidfd), ops);
        if parting.is_error {
            tracing::error!("session {number}: {reason}");
        }
        tracing::info!("session {number}: ended: {reason}");
        self.unfinished.remove(&id);
        self.stores.end(&session, Instant::now());
    }

    // ---- stores ----

    /// Looks for pages that nobody has put there: every second, and before a store is handed out.
    fn audit_stores(&mut self, ops: &mut EventOps) {
        for key in self.stores.unclean() {
            self.retire(key, ops);
        }
    }

    /// Gives a store to nobody else; ends its guests' sessions if it cannot be put right for them.
    fn retire(&mut self, key: u64, ops: &mut EventOps) {
        if self.stores.retire(key, &mut self.scratch.chunk, Instant::now()) {
            return self.stores.drop_doomed();
        }
        let has_it = |newcomer: &Newcomer| newcomer.grant.is_some_and(|grant| grant.store == key);
        let newcomers = self.newcomers.iter().filter(|(_, newcomer)| has_it(newcomer)).map(|(&id, _)| id);
        for id in newcomers.collect::<Vec<_>>() {
            self.refuse(id, &GrantError::Gone.into(), ops);
        }
        let sessions = self.sessions.iter().filter(|(_, session)| session.store() == key).map(|(&id, _)| id);
        let parting = Parting::told("its store has wrong pages that cannot be put right");
        for id in sessions.collect::<Vec<_>>() {
            self.end_session(id, &parting, ops);
        }
        self.stores.drop_doomed();
    }

    /// Chunks have come that guests have waited for.
    fn on_fetched(&mut self, ops: &mut EventOps) {
        self.inbox.hush();
        for _ in 0..CHUNKS_IN_A_TURN {
            let Some(fetched) = self.inbox.take() else { return };
            let Some(delivered) = self.stores.receive(fetched, Instant::now()) else { continue };
            for (id, pages) in delivered.ready {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.arrived(delivered.chunk, pages);
                    self.serve(id, ops);
                }
            }
            for (id, parting) in delivered.failed {
                self.end_session(id, &parting, ops);
            }
            for key in delivered.foreign {
                self.retire(key, ops);
            }
        }
        // There may be more.
        self.inbox.ring();
    }

    // ---- metrics ----

    fn on_metrics_listener(&mut self, ops: &mut EventOps) {
        for _ in 0..ACCEPTS_IN_A_TURN {
            let Some(listener) = &self.metrics else { return };
            let stream = match listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    self.accepting_readers = !pause(listener, Token::Metrics, &error, ops);
                    return;
                }
            };
            if self.readers.len() >= MAX_READERS {
                continue;
            }
            let Ok(reader) = Reader::new(stream) else { continue };
            let id = self.next_id();
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

    // ---- time ----

    fn on_tick(&mut self, ops: &mut EventOps) {
        self.tick.hush();
        self.resume_accepting(ops);
        let now = Instant::now();
        let overdue: Vec<u32> = self.readers.iter().filter(|(_, r)| r.is_overdue(now)).map(|(&id, _)| id).collect();
        for id in overdue {
            self.drop_reader(id, ops);
        }
        self.refuse_overdue(now, ops);
        self.audit_stores(ops);
        self.ask_what_was_used(now, ops);
        self.stores.tick(now, self.limits.keep_warm);
    }

    /// Asks guests that have been served for a while what they have used, where that is to be learnt.
    fn ask_what_was_used(&mut self, now: Instant, ops: &mut EventOps) {
        let mut deaf = Vec::new();
        for (&id, session) in &mut self.sessions {
            let age = now.duration_since(session.began);
            if age >= USED_AFTER + USED_WITHIN && session.telling.give_up() {
                self.stores.gave_up(session.store());
            }
            let is_ripe = session.shares() && session.speaks() && age >= USED_AFTER && age < USED_AFTER + USED_WITHIN;
            if is_ripe && self.stores.wants_to_learn(session.store()) && session.telling.ask() {
                self.stores.asked(session.store());
                if send(&session.stream, &Reply::Report).is_err() {
                    deaf.push(id);
                }
            }
        }
        for id in deaf {
            self.end_session(id, &Parting::silent("it does not read what it is asked"), ops);
        }
    }

    fn refuse_overdue(&mut self, now: Instant, ops: &mut EventOps) {
        let overdue = self
            .newcomers
            .iter()
            .filter_map(|(&id, newcomer)| newcomer.handshake.check_deadline(now).err().map(|error| (id, error)));
        for (id, error) in overdue.collect::<Vec<_>>() {
            self.refuse(id, &error.into(), ops);
        }
    }

    /// Goes on with what was put off, as far as its time has come.
    fn on_alarm(&mut self, ops: &mut EventOps) {
        self.alarm.hush();
        self.alarm_at = None;
        let now = Instant::now();
        self.stores.try_again(now);
        if self.next_turn.is_some_and(|at| at <= now) {
            self.next_turn = None;
            for id in std::mem::take(&mut self.unfinished) {
                self.serve(id, ops);
            }
        }
    }

    /// Sets the alarm to the next thing that was put off, if it is not set to that.
    fn set_alarm(&mut self) {
        let next = [self.next_turn, self.stores.next_attempt()].into_iter().flatten().min();
        if next == self.alarm_at {
            return;
        }
        let set = self.alarm.set(next.map(|at| at.saturating_duration_since(Instant::now())), Duration::ZERO);
        if set.is_ok() {
            self.alarm_at = next;
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
            Some(Token::Alarm) => self.on_alarm(ops),
            Some(Token::Fetched) => self.on_fetched(ops),
            Some(Token::Socket(id)) => self.on_socket(id, ops),
            Some(Token::Uffd(id)) => self.on_faults(id, events.event_set(), ops),
            Some(Token::Process(id)) => self.end_session(id, &Parting::silent("its process ended"), ops),
            Some(Token::Reader(id)) => self.on_reader(id, ops),
            None => {}
        }
        self.set_alarm();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut always = vec![
            (self.listener.as_raw_fd(), Token::Listener),
            (self.tick.as_raw_fd(), Token::Tick),
            (self.alarm.as_raw_fd(), Token::Alarm),
            (self.inbox.bell().as_raw_fd(), Token::Fetched),
        ];
        always.extend(self.metrics.as_ref().map(|listener| (listener.as_raw_fd(), Token::Metrics)));
        always.extend(self.signals.as_ref().map(|signals| (signals.as_raw_fd(), Token::Signals)));
        for (fd, token) in always {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token.encode(), EventSet::IN)) {
                self.fatal = Some(error);
            }
        }
    }
}

/// A listener that cannot accept (no descriptors left) stays ready; so as not to spin on it, it is not looked at until the next
/// tick. False if it cannot be paused.
fn pause(listener: &Listener, token: Token, error: &io::Error, ops: &mut EventOps) -> bool {
    tracing::error!("cannot accept connections at {}: {error}; trying again in a second", listener.path().display());
    ops.modify(Events::with_data(listener, token.encode(), EventSet::empty())).is_ok()
}

/// Looks at a listener again; false if that is not possible.
fn resume(listener: &Listener, token: Token, ops: &mut EventOps) -> bool {
    ops.modify(Events::with_data(listener, token.encode(), EventSet::IN)).is_ok()
}

fn watch(ops: &mut EventOps, fd: RawFd, token: Token) -> Result<(), Refusal> {
    ops.add(Events::with_data_raw(fd, token.encode(), EventSet::IN)).map_err(Refusal::Watch)
}

/// Must precede closing: the kernel watches the open file, of which the client has a descriptor too.
fn unwatch(fds: impl IntoIterator<Item = RawFd>, ops: &mut EventOps) {
    for fd in fds {
        let _ = ops.remove(Events::empty_raw(fd));
    }
}

/// Takes what a served client has sent: `Err` if that ends its session.
fn hear(session: &mut Session) -> Result<(), Parting> {
    let mut bytes = [0; 1024];
    let (count, passed) = match receive(&session.stream, &mut bytes) {
        Ok(received) => received,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Ok(()),
        Err(_) => return Err(Parting::silent("its connection failed")),
    };
    if count == 0 {
        return Err(Parting::silent("the client closed its connection"));
    }
    if !matches!(passed, Passed::None) {
        return Err(Parting::told("the client sent another descriptor after it was served: one for each connection"));
    }
    if !session.speaks() {
        return Err(Parting::told("the client sent bytes after it was served"));
    }
    session.talk.hear(&bytes[..count]).map_err(|error| Parting::told(error.to_string()))
}

/// Answers the words of a guest, if all of its faults are answered, or wait. Returns what it has used, if it has told all of that.
fn answer_words(session: &mut Session, away: Option<&str>) -> Result<Option<Used>, Parting> {
    let mut used = None;
    while session.is_settled() && session.talk.has_line() {
        let ping = match session.talk.take().map_err(|error| Parting::told(error.to_string()))? {
            Some(Word::Ping(Ping { ping })) => ping,
            Some(Word::Used(message)) => {
                let told = session.telling.hear(message).map_err(|error| Parting::told(error.to_string()))?;
                used = told.or(used);
                continue;
            }
            None => break,
        };
        let waiting = session.waiting();
        let away = away.filter(|_| waiting > 0).map(str::to_string);
        let pong = Reply::Pong { ping, waiting, away };
        send(&session.stream, &pong).map_err(|_| Parting::silent("it does not read what it is answered"))?;
    }
    Ok(used)
}
