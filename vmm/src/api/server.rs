//! The API's socket and its clients, on the event loop's thread. Nothing here blocks.

use super::http::{self, Parsed};
use super::router::route;
use super::{Request, Response};
use api_spec::stats::ApiStats;
use event_manager::{EventOps, Events};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use uffd_handler::listener::{ListenError, Listener};

/// Clients at a time; further ones wait in the socket's queue.
const MAX_CLIENTS: usize = 32;
/// How long a client may be silent while others wait.
const SILENCE: Duration = Duration::from_secs(1);
/// How often silent clients are looked for while others wait.
const TICK: Duration = Duration::from_millis(250);
/// How many bytes of answers may wait for a client that does not read them: the longest answer, a map of memory, fits.
const MAX_UNSENT: usize = 1 << 20;

/// Names the client to whom an answer is due.
pub type ClientId = RawFd;

/// The API's socket and its clients.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    clients: BTreeMap<ClientId, Client>,
    /// Runs while no further client can be accepted.
    timer: TimerFd,
    /// Counts clients ever accepted, so that an answer that comes late never reaches a later client on the same number.
    accepted: u64,
    stats: ApiStats,
}

/// Who is to get an answer that comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    id: ClientId,
    serial: u64,
    keep_alive: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    serial: u64,
    /// When it last said something or was answered.
    heard: Instant,
    received: Vec<u8>,
    unsent: Vec<u8>,
    /// A request whose answer comes later; further ones wait.
    waiting: bool,
    /// The client says nothing more.
    ended: bool,
    /// Close when everything is sent.
    closing: bool,
}

impl Server {
    /// Listens at `path`, for the owner alone.
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        let timer = TimerFd::new().map_err(|error| ListenError::Failed {
            step: "make a timer for",
            path: path.to_owned(),
            source: error.into(),
        })?;
        Ok(Server {
            listener: Listener::bind(path)?,
            clients: BTreeMap::new(),
            timer,
            accepted: 0,
            stats: ApiStats::default(),
        })
    }

    /// What it was asked.
    pub fn stats(&self) -> ApiStats {
        self.stats
    }

    /// The listening socket.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// What is to be watched for input from the start.
    pub fn sources(&self) -> [RawFd; 2] {
        [self.listener.as_raw_fd(), self.timer.as_raw_fd()]
    }

    /// Whether events of `fd` belong here.
    pub fn owns(&self, fd: RawFd) -> bool {
        self.sources().contains(&fd) || self.clients.contains_key(&fd)
    }

    /// Handles an event of one of this server's descriptors, and returns the requests that have arrived.
    pub fn on_event(&mut self, events: Events, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        if events.fd() == self.listener().as_raw_fd() {
            self.accept(ops);
            return Vec::new();
        }
        if events.fd() == self.timer.as_raw_fd() {
            self.send_silent_away(ops);
            return Vec::new();
        }
        let id = events.fd();
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        let alive = client.receive(events.event_set()).is_ok();
        if !alive {
            self.close(id, ops);
            return Vec::new();
        }
        self.next_requests(id, ops)
    }

    /// Sends an answer that was due, and returns the client's further requests.
    pub fn respond(&mut self, to: Pending, response: &Response, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        let Some(client) = self.clients.get_mut(&to.id).filter(|client| client.serial == to.serial) else {
            return Vec::new();
        };
        self.stats.refused += u64::from(response.status >= 400);
        client.waiting = false;
        client.heard = Instant::now();
        client.queue(response, to.keep_alive);
        self.next_requests(to.id, ops)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        while self.clients.len() < MAX_CLIENTS {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    // It would be reported again and again.
                    tracing::warn!("a client of the API cannot be accepted: {error}; trying again in {TICK:?}");
                    break;
                }
            };
            if stream.set_nonblocking(true).is_err() || ops.add(Events::new(&stream, EventSet::IN)).is_err() {
                continue;
            }
            self.accepted += 1;
            let client = Client {
                serial: self.accepted,
                heard: Instant::now(),
                received: Vec::new(),
                unsent: Vec::new(),
                waiting: false,
                ended: false,
                closing: false,
                stream,
            };
            self.clients.insert(client.stream.as_raw_fd(), client);
        }
        // No room: look at the queue again when a client has gone, or some time later.
        let _ = ops.modify(Events::new(self.listener(), EventSet::empty()));
        let _ = self.timer.reset(TICK, Some(TICK));
    }

    /// Makes room for clients that may be waiting.
    fn send_silent_away(&mut self, ops: &mut EventOps) {
        // Winding it again takes its tick back. Reading it could block: this event may be older than the last winding.
        let _ = self.timer.reset(TICK, Some(TICK));
        let silent = |client: &Client| !client.waiting && client.heard.elapsed() >= SILENCE;
        let silent: Vec<_> = self.clients.iter().filter(|(_, client)| silent(client)).map(|(id, _)| *id).collect();
        for id in silent {
            self.close(id, ops);
        }
        if self.clients.len() < MAX_CLIENTS {
            self.look_at_queue(ops);
        }
    }

    fn look_at_queue(&mut self, ops: &mut EventOps) {
        let _ = ops.modify(Events::new(self.listener(), EventSet::IN));
        let _ = self.timer.clear();
    }

    fn close(&mut self, id: ClientId, ops: &mut EventOps) {
        if let Some(client) = self.clients.remove(&id) {
            let _ = ops.remove(Events::empty(&client.stream));
        }
        self.look_at_queue(ops);
    }

    /// Takes the requests that are complete, answers those that are no requests, sends what can be sent.
    fn next_requests(&mut self, id: ClientId, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        let mut requests = Vec::new();
        while !client.waiting && !client.closing {
            match http::parse(&client.received) {
                Parsed::Partial { expect_continue } => {
                    client.closing |= client.ended;
                    if expect_continue {
                        client.unsent.extend(http::CONTINUE);
                    }
                    break;
                }
                Parsed::Bad(status, reason) => {
                    self.stats.requests += 1;
                    self.stats.refused += 1;
                    client.queue(&Response::fault(status, &reason), false);
                }
                Parsed::Complete(message, used) => {
                    self.stats.requests += 1;
                    client.received.drain(..used);
                    match route(&message) {
                        Ok(request) => {
                            client.waiting = true;
                            let pending = Pending { id, serial: client.serial, keep_alive: message.keep_alive };
                            requests.push((pending, request));
                        }
                        Err(response) => {
                            self.stats.refused += 1;
                            client.queue(&response, message.keep_alive);
                        }
                    }
                }
            }
        }
        if client.send().is_err() || (client.closing && client.unsent.is_empty()) {
            self.close(id, ops);
        } else {
            let wanted = client.wanted();
            let _ = ops.modify(Events::new(&client.stream, wanted));
        }
        requests
    }
}

impl Client {
    /// What the client is to be watched for. While an answer is due nothing more is read, so that a client cannot make us
    /// keep more than one request.
    fn wanted(&self) -> EventSet {
        let mut wanted = if self.waiting || self.ended || self.closing { EventSet::empty() } else { EventSet::IN };
        if !self.unsent.is_empty() {
            wanted |= EventSet::OUT;
        }
        wanted
    }

    fn receive(&mut self, events: EventSet) -> io::Result<()> {
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP) && !events.contains(EventSet::IN) {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let mut chunk = [0; 4096];
        while events.contains(EventSet::IN) && self.received.len() <= http::MAX_HEAD + http::MAX_BODY {
            match self.stream.read(&mut chunk) {
                Ok(0) if self.received.is_empty() && self.unsent.is_empty() => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                // What it has said before is answered.
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => {
                    self.heard = Instant::now();
                    self.received.extend_from_slice(&chunk[..n]);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn queue(&mut self, response: &Response, keep_alive: bool) {
        self.unsent.extend(http::encode(response, keep_alive));
        self.closing |= !keep_alive;
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.unsent.len() > MAX_UNSENT { Err(ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}
