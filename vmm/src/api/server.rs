//! The API's socket and its clients, on the event loop's thread. Nothing here blocks, but for [`Server::flush`].
//!
//! A request that comes in one piece costs one `read` and one `write`: what a client is watched for is changed only when
//! it is something else, and no timer runs while nobody is in the middle of something.

use super::http::{self, Delivery, Limits, MAX_HEAD, Parsed, Parser};
use super::router::route;
use super::{Request, Response};
use crate::logging::request_span;
use api_spec::client::rest::MAX_DESCRIPTORS;
use api_spec::stats::ApiStats;
use event_manager::{EventOps, Events};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use uffd_handler::listener::{ListenError, Listener};

/// Clients at a time; further ones wait in the socket's queue.
const MAX_CLIENTS: usize = 32;
/// How long a client may be silent while others wait, or in the midst of a request.
const SILENCE: Duration = Duration::from_secs(1);
/// How long one may be that has not said anything yet.
const GREETING: Duration = Duration::from_millis(100);
/// How long a request may take to come, from its first byte to its last.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// How long a client may take no part of the answers that are there for it.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How often clients that take too long are looked for.
const TICK: Duration = Duration::from_millis(250);
/// How many bytes of answers may wait for a client before its further requests do.
const MAX_UNSENT: usize = 64 * 1024;

/// Names the client to whom an answer is due.
pub type ClientId = RawFd;

/// The API's socket and its clients.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    limits: Limits,
    clients: BTreeMap<ClientId, Client>,
    /// Whether further clients are accepted.
    accepting: bool,
    /// Ticks while some client may come to take too long.
    timer: TimerFd,
    ticking: bool,
    /// Requests so far, each of which has its number.
    requests: u64,
    /// How many of them were refused.
    refused: u64,
}

/// Who is to get an answer that comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    client: ClientId,
    /// Number of the request. It counts over all clients, from 1, so a late answer never reaches a later request.
    pub request: u64,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// When it came, or was last answered.
    heard: Instant,
    /// It has been answered before.
    is_known: bool,
    parser: Parser,
    /// Descriptors that have come with what is not a complete request yet.
    descriptors: Vec<OwnedFd>,
    /// When the first byte of a request came that is not complete.
    begun: Option<Instant>,
    /// The request whose answer comes later; further ones wait.
    asked: Option<Asked>,
    unsent: Vec<u8>,
    /// When it last took some of what is unsent, or when that was nothing.
    took: Instant,
    /// What it is watched for.
    watched: EventSet,
    /// The client says nothing more.
    ended: bool,
    /// Close when everything is sent.
    closing: bool,
}

/// A request that has been understood as far as HTTP goes.
#[derive(Debug)]
struct Asked {
    request: u64,
    method: String,
    path: String,
    keep_alive: bool,
    since: Instant,
    descriptors: Vec<OwnedFd>,
}

impl Server {
    /// Listens at `path`, for the owner alone.
    pub fn listen(path: &Path, limits: Limits) -> Result<Self, ListenError> {
        let timer = TimerFd::new().map_err(|error| ListenError::Failed {
            step: "make a timer for",
            path: path.to_owned(),
            source: error.into(),
        })?;
        let listener = Listener::bind(path)?;
        Ok(Server {
            listener,
            limits,
            clients: BTreeMap::new(),
            accepting: true,
            timer,
            ticking: false,
            requests: 0,
            refused: 0,
        })
    }

    /// What it was asked.
    pub fn stats(&self) -> ApiStats {
        ApiStats { requests: self.requests, refused: self.refused }
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
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
            return Vec::new();
        }
        if events.fd() == self.timer.as_raw_fd() {
            self.on_tick(ops);
            return Vec::new();
        }
        let id = events.fd();
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        if client.receive(events.event_set()).is_err() {
            self.close(id, ops);
            return Vec::new();
        }
        self.go_on(id, ops)
    }

    /// Whether somebody still waits for this answer.
    pub fn awaits(&self, to: Pending) -> bool {
        self.clients.get(&to.client).is_some_and(|client| client.asked_for(to))
    }

    /// Descriptors that have come with a request which is not answered yet.
    pub fn take_descriptors(&mut self, with: Pending) -> Vec<OwnedFd> {
        let client = self.clients.get_mut(&with.client);
        let asked = client.and_then(|client| client.asked.as_mut()).filter(|asked| asked.request == with.request);
        asked.map(|asked| std::mem::take(&mut asked.descriptors)).unwrap_or_default()
    }

    /// The socket of the client who waits for this answer, for whoever wants to know whether it still does.
    pub fn client_of(&self, to: Pending) -> Option<UnixStream> {
        self.clients.get(&to.client).filter(|client| client.asked_for(to))?.stream.try_clone().ok()
    }

    /// Sends an answer that was due, and returns the client's further requests.
    pub fn respond(&mut self, to: Pending, response: &Response, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        let Some(client) = self.clients.get_mut(&to.client) else { return Vec::new() };
        let Some(asked) = client.asked.take_if(|asked| asked.request == to.request) else { return Vec::new() };
        self.refused += u64::from(response.status >= 400);
        client.answer(&asked, response);
        self.go_on(to.client, ops)
    }

    /// Sends an answer that was due, and closes the connection. For the end of the process: what the socket does not take
    /// at once is left to [`Server::flush`].
    pub fn answer_last(&mut self, to: Pending, response: &Response) {
        if let Some(client) = self.clients.get_mut(&to.client)
            && let Some(asked) = client.asked.take_if(|asked| asked.request == to.request)
        {
            self.refused += u64::from(response.status >= 400);
            client.answer(&Asked { keep_alive: false, ..asked }, response);
            // If it has gone, there is nobody to tell.
            let _ = client.send();
        }
    }

    /// Refuses every request whose answer was to come later, for this reason, likewise.
    pub fn refuse_pending(&mut self, reason: &str) {
        let pending = |(id, client): (&ClientId, &Client)| {
            client.asked.as_ref().map(|asked| Pending { client: *id, request: asked.request })
        };
        let pending: Vec<Pending> = self.clients.iter().filter_map(pending).collect();
        for to in pending {
            self.answer_last(to, &Response::fault(400, reason));
        }
    }

    /// Sends what has been answered and waits for clients to take it, for so long at most. For the end of the process.
    pub fn flush(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut behind: Vec<&mut Client> = self.clients.values_mut().collect();
        loop {
            behind.retain_mut(|client| client.send().is_ok() && !client.unsent.is_empty());
            let left = deadline.saturating_duration_since(Instant::now());
            if behind.is_empty() || left.is_zero() {
                return;
            }
            let mut writable: Vec<_> = behind.iter().map(|c| PollFd::new(&c.stream, PollFlags::OUT)).collect();
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut writable, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        loop {
            if self.clients.len() >= MAX_CLIENTS {
                if !self.is_waited_for() {
                    return;
                }
                let Some(silent) = self.longest_silent() else { break };
                self.close(silent, ops);
            }
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
            self.clients.insert(stream.as_raw_fd(), Client::new(stream, self.limits));
        }
        // No room for whoever waits: look at the queue again when a client has gone, or some time later.
        self.accepting = false;
        let _ = ops.modify(Events::new(&self.listener, EventSet::empty()));
        self.tick();
    }

    /// Whether a further client waits to be accepted.
    fn is_waited_for(&self) -> bool {
        poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// The client that has been silent for longest, of those that may be sent away for another.
    fn longest_silent(&self) -> Option<ClientId> {
        let silent = self.clients.iter().filter(|(_, client)| client.is_silent());
        silent.min_by_key(|(_, client)| client.heard).map(|(id, _)| *id)
    }

    /// Has the timer tick.
    fn tick(&mut self) {
        if !self.ticking {
            self.ticking = self.timer.reset(TICK, Some(TICK)).is_ok();
        }
    }

    /// Does something about clients that take too long, and looks again whether there is room for others.
    fn on_tick(&mut self, ops: &mut EventOps) {
        // Winding it again takes its tick back. Reading it could block: this event may be older than the last winding.
        self.ticking = false;
        let who = |which: &dyn Fn(&Client) -> bool| -> Vec<ClientId> {
            self.clients.iter().filter(|(_, client)| which(client)).map(|(id, _)| *id).collect()
        };
        let gone = who(&Client::is_deaf);
        let late = who(&Client::is_late);
        for id in gone {
            self.close(id, ops);
        }
        for id in late {
            if let Some(client) = self.clients.get_mut(&id) {
                self.requests += 1;
                self.refused += 1;
                client.refuse(self.requests, 408, &format!("the request was not complete within {REQUEST_TIME:?}"));
                self.go_on(id, ops);
            }
        }
        self.look_at_queue(ops);
        if self.clients.values().any(Client::is_busy) {
            self.tick();
        } else {
            let _ = self.timer.clear();
        }
    }

    fn look_at_queue(&mut self, ops: &mut EventOps) {
        if !self.accepting {
            self.accepting = ops.modify(Events::new(&self.listener, EventSet::IN)).is_ok();
        }
    }

    fn close(&mut self, id: ClientId, ops: &mut EventOps) {
        if let Some(client) = self.clients.remove(&id) {
            let _ = ops.remove(Events::empty(&client.stream));
        }
        self.look_at_queue(ops);
    }

    /// Takes the requests that are complete, answers those that are no requests, sends what can be sent.
    fn go_on(&mut self, id: ClientId, ops: &mut EventOps) -> Vec<(Pending, Request)> {
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        let mut requests = Vec::new();
        let sent = loop {
            let sent = client.send();
            if sent.is_err() || client.asked.is_some() || client.closing || client.unsent.len() > MAX_UNSENT {
                break sent;
            }
            let parsed = client.parser.parse();
            let incomplete = matches!(parsed, Parsed::Partial { .. }) && !client.parser.is_empty();
            client.begun = incomplete.then(|| client.begun.unwrap_or_else(Instant::now));
            match parsed {
                Parsed::Partial { expect_continue: true } => client.unsent().extend(http::CONTINUE),
                Parsed::Partial { .. } => {
                    client.closing |= client.ended;
                    break sent;
                }
                Parsed::Bad(status, reason) => {
                    self.requests += 1;
                    self.refused += 1;
                    client.refuse(self.requests, status, &reason);
                }
                Parsed::Complete(message) => {
                    self.requests += 1;
                    let routed = route(&message);
                    let asked = Asked {
                        request: self.requests,
                        method: message.method,
                        path: message.path,
                        keep_alive: message.keep_alive,
                        since: Instant::now(),
                        descriptors: std::mem::take(&mut client.descriptors),
                    };
                    match routed {
                        Ok(request) => {
                            requests.push((Pending { client: id, request: asked.request }, request));
                            client.asked = Some(asked);
                        }
                        Err(response) => {
                            self.refused += 1;
                            client.answer(&asked, &response);
                        }
                    }
                }
            }
        };
        if sent.is_err() || (client.closing && client.unsent.is_empty()) {
            self.close(id, ops);
            return requests;
        }
        // A request that has just come is answered in a moment, most likely. If it is not, and the client says more, there
        // will be another event.
        if requests.is_empty() || !client.unsent.is_empty() {
            client.watch(ops);
        }
        if client.is_busy() {
            self.tick();
        }
        requests
    }
}

impl Client {
    fn new(stream: UnixStream, limits: Limits) -> Self {
        let now = Instant::now();
        Client {
            stream,
            heard: now,
            is_known: false,
            parser: Parser::new(limits),
            descriptors: Vec::new(),
            begun: None,
            asked: None,
            unsent: Vec::new(),
            took: now,
            watched: EventSet::IN,
            ended: false,
            closing: false,
        }
    }

    /// Whether there is something to wait for that must not take too long.
    fn is_busy(&self) -> bool {
        self.begun.is_some() || !self.unsent.is_empty()
    }

    /// Whether a request takes too long to come.
    fn is_late(&self) -> bool {
        !self.closing && self.begun.is_some_and(|begun| begun.elapsed() >= REQUEST_TIME)
    }

    /// Whether it does not take its answers.
    fn is_deaf(&self) -> bool {
        !self.unsent.is_empty() && self.took.elapsed() >= ANSWER_TIME
    }

    /// Whether it waits for this answer.
    fn asked_for(&self, answer: Pending) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.request == answer.request)
    }

    /// Whether it holds a place that others could use: it says nothing, or takes its time.
    fn is_silent(&self) -> bool {
        let patience = if self.is_known || self.begun.is_some() { SILENCE } else { GREETING };
        self.asked.is_none() && self.begun.unwrap_or(self.heard).elapsed() >= patience
    }

    /// Has it watched for what it is to be watched for. While an answer is due nothing more is read, so that a client
    /// cannot make us keep more than one request; nor is it while answers are not taken.
    fn watch(&mut self, ops: &mut EventOps) {
        let listens = self.asked.is_none() && !self.ended && !self.closing && self.unsent.len() <= MAX_UNSENT;
        let mut wanted = if listens { EventSet::IN } else { EventSet::empty() };
        if !self.unsent.is_empty() {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched && ops.modify(Events::new(&self.stream, wanted)).is_ok() {
            self.watched = wanted;
        }
    }

    fn receive(&mut self, events: EventSet) -> io::Result<()> {
        let gone = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let listens = events.contains(EventSet::IN) && self.asked.is_none();
        if gone && !listens {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let mut chunk = [0; MAX_HEAD];
        while listens && self.parser.has_room() {
            match receive(&self.stream, &mut chunk, &mut self.descriptors) {
                Ok(0) if self.parser.is_empty() && self.unsent.is_empty() => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                // What it has said before is answered.
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => {
                    self.parser.push(&chunk[..n]);
                    // That was all, most likely. If it was not, there will be another event.
                    if n < chunk.len() {
                        break;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Answers what is no request; there is no telling where the next one would begin.
    fn refuse(&mut self, request: u64, status: u16, reason: &str) {
        request_span(request).in_scope(|| tracing::debug!("{status}: {}", reason.escape_debug()));
        self.queue(&Response::fault(status, reason), Delivery { request, keep_alive: false, without_body: false });
    }

    fn answer(&mut self, asked: &Asked, response: &Response) {
        let Asked { request, method, path, keep_alive, since, descriptors: _ } = asked;
        let (status, path) = (response.status, path.escape_debug());
        let took = since.elapsed().as_micros();
        request_span(*request).in_scope(|| tracing::debug!("{method} {path}: {status} in {took} us"));
        let without_body = method == "HEAD";
        self.queue(response, Delivery { request: *request, keep_alive: *keep_alive, without_body });
    }

    fn queue(&mut self, response: &Response, delivery: Delivery) {
        (self.heard, self.is_known) = (Instant::now(), true);
        self.begun = None;
        self.closing |= !delivery.keep_alive;
        http::encode(response, delivery, self.unsent());
    }

    /// Where to put what is to be sent.
    fn unsent(&mut self) -> &mut Vec<u8> {
        if self.unsent.is_empty() {
            self.took = Instant::now();
        }
        &mut self.unsent
    }

    /// Sends what the socket takes.
    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.unsent.drain(..n);
                    self.unsent.shrink_to(MAX_UNSENT / 4);
                    self.took = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Receives what is there, up to the size of `bytes`, and the descriptors that come with it. A client that sends more of those than any
/// call takes is heard no further.
fn receive(stream: &UnixStream, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
        return Err(ErrorKind::InvalidData.into());
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use std::io::Read;
    use std::net::Shutdown;
    use std::sync::{Arc, Mutex};

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Answers `GET /version` at once, and nothing else.
    struct Driver {
        server: Server,
        pending: Vec<Pending>,
    }

    impl MutEventSubscriber for Driver {
        fn init(&mut self, ops: &mut EventOps) {
            for fd in self.server.sources() {
                ops.add(Events::new_raw(fd, EventSet::IN)).unwrap();
            }
        }

        fn process(&mut self, events: Events, ops: &mut EventOps) {
            let mut requests = self.server.on_event(events, ops);
            while let Some((from, request)) = requests.pop() {
                match request {
                    Request::Version => requests = self.server.respond(from, &Response::text("1".into()), ops),
                    _ => self.pending.push(from),
                }
            }
        }
    }

    struct Rig {
        manager: EventManager<Arc<Mutex<Driver>>>,
        driver: Arc<Mutex<Driver>>,
        _place: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Self {
            let place = tempfile::tempdir().unwrap();
            let server = Server::listen(&place.path().join("api"), Limits::default()).unwrap();
            let driver = Arc::new(Mutex::new(Driver { server, pending: Vec::new() }));
            let mut manager = EventManager::new().unwrap();
            manager.add_subscriber(driver.clone());
            Rig { manager, driver, _place: place }
        }

        fn connect(&self) -> UnixStream {
            let stream = UnixStream::connect(self.driver.lock().unwrap().server.listener().path()).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        }

        fn until(&mut self, mut holds: impl FnMut(&mut Driver) -> bool) {
            let deadline = Instant::now() + PATIENCE;
            while !holds(&mut self.driver.lock().unwrap()) {
                assert!(Instant::now() < deadline, "it never came about");
                self.manager.run_with_timeout(10).unwrap();
            }
        }

        /// What this client reads until the server closes the connection.
        fn read_all(&mut self, client: &mut UnixStream) -> String {
            let mut bytes = Vec::new();
            self.until(|_| match client.read_to_end(&mut bytes) {
                Ok(_) => true,
                Err(e) => e.kind() != ErrorKind::WouldBlock,
            });
            String::from_utf8(bytes).unwrap()
        }
    }

    #[test]
    fn every_answer_has_the_number_of_its_request_and_that_to_head_has_no_body() {
        let mut rig = Rig::new();
        let mut client = rig.connect();
        let request = |method: &str, more: &str| format!("{method} /version HTTP/1.1\r\n{more}\r\n");
        let sent = [request("GET", ""), request("HEAD", ""), request("GET", "Connection: close\r\n")].concat();
        client.write_all(sent.as_bytes()).unwrap();
        let answers = rig.read_all(&mut client);
        let (heads, rest): (Vec<_>, Vec<_>) =
            answers.split("HTTP/1.1 ").skip(1).map(|a| a.split_once("\r\n\r\n").unwrap()).unzip();
        assert_eq!(rest, ["1", "", "1"]);
        for (number, (head, status)) in heads.iter().zip(["200 OK", "405 Method", "200 OK"]).enumerate() {
            assert!(head.starts_with(status) && head.contains(&format!("X-Request-Id: {}\r\n", number + 1)), "{head}");
        }
        let mut client = rig.connect();
        client.write_all(b"no request\r\n\r\n").unwrap();
        assert!(rig.read_all(&mut client).contains("X-Request-Id: 4\r\n"));
        assert!(rig.driver.lock().unwrap().server.clients.is_empty());
    }

    #[test]
    fn many_requests_at_once_wait_until_their_answers_are_taken() {
        let mut rig = Rig::new();
        let mut client = rig.connect();
        let (sent, count) = (b"GET /version HTTP/1.1\r\n\r\n".repeat(100), 200);
        let (mut written, mut answers, mut chunk) = (0, Vec::new(), vec![0; 1 << 20]);
        // It sends as long as it can, and only then reads; there is more to send than sockets hold.
        rig.until(|driver| {
            while written < sent.len() * count {
                match client.write(&sent[written % sent.len()..]) {
                    Ok(n) => written += n,
                    Err(_) => break,
                }
            }
            if written == sent.len() * count {
                client.shutdown(Shutdown::Write).unwrap();
            }
            let held = driver.server.clients.values().map(|client| client.unsent.len()).max().unwrap_or(0);
            assert!(held < MAX_UNSENT + 1024, "{held}");
            match client.read(&mut chunk) {
                Ok(0) => return true,
                Ok(n) => answers.extend_from_slice(&chunk[..n]),
                Err(_) => {}
            }
            false
        });
        let answers = String::from_utf8(answers).unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 100 * count);
        assert!(answers.contains(&format!("X-Request-Id: {}\r\n", 100 * count)));
    }

    #[test]
    fn whoever_waits_at_the_end_is_told_and_nobody_is_told_twice() {
        let mut rig = Rig::new();
        let (mut first, mut second) = (rig.connect(), rig.connect());
        for client in [&mut first, &mut second] {
            client.write_all(b"GET / HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n").unwrap();
        }
        rig.until(|driver| driver.pending.len() == 2);
        drop(second);
        rig.until(|driver| driver.server.clients.len() == 1);
        {
            let mut driver = rig.driver.lock().unwrap();
            driver.server.refuse_pending("the vmm ends");
            driver.server.refuse_pending("the vmm ends again");
            driver.server.flush(PATIENCE);
            assert!(driver.server.clients.values().all(|client| client.unsent.is_empty() && client.closing));
        }
        let (mut bytes, mut chunk) = (Vec::new(), [0; 1000]);
        while let Ok(n) = first.read(&mut chunk) {
            bytes.extend_from_slice(&chunk[..n]);
        }
        let answer = String::from_utf8(bytes).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("Connection: close\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n{\"fault_message\":\"the vmm ends\"}"), "{answer}");
    }

    #[test]
    fn waiting_for_answers_to_be_taken_has_an_end() {
        let mut rig = Rig::new();
        let mut deaf = rig.connect();
        let sent = b"GET /version HTTP/1.1\r\n\r\n".repeat(100);
        let mut written = 0;
        rig.until(|driver| {
            written += deaf.write(&sent[written % sent.len()..]).unwrap_or(0);
            driver.server.clients.values().any(|client| !client.unsent.is_empty())
        });
        rig.driver.lock().unwrap().server.flush(Duration::from_millis(1));
        assert_eq!(rig.driver.lock().unwrap().server.clients.len(), 1);
    }
}
