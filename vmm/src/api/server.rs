//! The API's socket and its clients, on the event loop's thread. Nothing here blocks.

use super::http::{self, Parsed};
use super::router::route;
use super::{Request, Response};
use event_manager::{EventOps, Events};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vmm_sys_util::epoll::EventSet;

use uffd_handler::listener::{ListenError, Listener};

/// Clients at a time; a further one takes the place of another.
const MAX_CLIENTS: usize = 32;
/// How many bytes of answers may wait for a client that does not read them.
const MAX_UNSENT: usize = 256 * 1024;

/// Names the client to whom an answer is due.
pub type ClientId = RawFd;

/// The API's socket and its clients.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    clients: BTreeMap<ClientId, Client>,
    /// Counts clients ever accepted, so that an answer that comes late never reaches a later client on the same number.
    accepted: u64,
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
    received: Vec<u8>,
    unsent: Vec<u8>,
    /// A request whose answer comes later; further ones wait.
    waiting: bool,
    /// The client will send nothing more, but may still read.
    ended: bool,
    /// Close when everything is sent.
    closing: bool,
}

impl Server {
    /// Listens at `path`, for the owner alone.
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        Ok(Server { listener: Listener::bind(path)?, clients: BTreeMap::new(), accepted: 0 })
    }

    /// What to watch the listening socket for. Edges only: a client that cannot be accepted now, for lack of descriptors,
    /// is not asked about again and again, but when the next one comes.
    pub fn listener_events(&self) -> Events {
        Events::new(&self.listener, EventSet::IN | EventSet::EDGE_TRIGGERED)
    }

    /// Whether events of `fd` belong here.
    pub fn owns(&self, fd: RawFd) -> bool {
        fd == self.listener.as_raw_fd() || self.clients.contains_key(&fd)
    }

    /// Handles an event of one of this server's descriptors, and returns the requests that have arrived.
    pub fn on_event(&mut self, events: Events, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
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
        client.waiting = false;
        client.queue(response, to.keep_alive);
        self.next_requests(to.id, ops)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        while let Ok(Some(stream)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS {
                self.make_room(ops);
            }
            if stream.set_nonblocking(true).is_err() || ops.add(Events::new(&stream, EventSet::IN)).is_err() {
                continue;
            }
            self.accepted += 1;
            let client = Client {
                serial: self.accepted,
                received: Vec::new(),
                unsent: Vec::new(),
                waiting: false,
                ended: false,
                closing: false,
                stream,
            };
            self.clients.insert(client.stream.as_raw_fd(), client);
        }
    }

    /// Parts with a client: one that has asked nothing, if there is one, and else the one that came first.
    fn make_room(&mut self, ops: &mut EventOps) {
        let oldest = self.clients.iter().min_by_key(|(_, client)| (client.waiting, client.serial)).map(|(id, _)| *id);
        if let Some(id) = oldest {
            self.close(id, ops);
        }
    }

    fn close(&mut self, id: ClientId, ops: &mut EventOps) {
        if let Some(client) = self.clients.remove(&id) {
            let _ = ops.remove(Events::empty(&client.stream));
        }
    }

    /// Takes the requests that are complete, answers those that are no requests, sends what can be sent.
    fn next_requests(&mut self, id: ClientId, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        let mut requests = Vec::new();
        while !client.waiting && !client.closing {
            match http::parse(&client.received) {
                Parsed::Partial { .. } if client.ended => client.closing = true,
                Parsed::Partial { expect_continue } => {
                    if expect_continue {
                        client.unsent.extend(http::CONTINUE);
                    }
                    break;
                }
                Parsed::Bad(status, reason) => client.queue(&Response::fault(status, &reason), false),
                Parsed::Complete(message, used) => {
                    client.received.drain(..used);
                    match route(&message) {
                        Ok(request) => {
                            client.waiting = true;
                            let pending = Pending { id, serial: client.serial, keep_alive: message.keep_alive };
                            requests.push((pending, request));
                        }
                        Err(response) => client.queue(&response, message.keep_alive),
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
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
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
