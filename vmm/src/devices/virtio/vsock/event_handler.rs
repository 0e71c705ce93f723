//! The device on the event loop: which events lead where.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::is_watched;
use super::connection::Ports;
use super::device::Vsock;
use super::host::{Greeting, Said};
use super::muxer::Watch;

/// How many clients may be about to say what they want.
const MAX_GREETINGS: usize = 256;
/// How many clients are accepted before other work has its turn.
const ACCEPT_BATCH: usize = 64;
/// How often clients are looked at that take too long.
const TICK: Duration = Duration::from_millis(500);

/// The host's sockets that are watched.
#[derive(Default)]
pub(super) struct Clients {
    /// Clients that have not yet said what they want.
    greetings: HashMap<RawFd, Greeting>,
    /// Sockets of streams, and the events that are waited for.
    streams: HashMap<RawFd, (Ports, EventSet)>,
    /// The listening socket is not watched until the next tick: the system is out of something.
    listener_rests: bool,
    /// The timer runs.
    ticking: bool,
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        for event in &self.events {
            is_watched("vsock", ops.add(Events::new(event.as_ref(), EventSet::IN)));
        }
        is_watched("vsock", ops.add(Events::new(&self.listener, EventSet::IN)));
        is_watched("vsock", ops.add(Events::new(&self.timer, EventSet::IN)));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if let Some(event) = self.events.iter().find(|event| event.as_raw_fd() == fd) {
            let _ = event.read(); // Only to make it quiet; all queues are looked at below.
        } else if fd == self.listener.as_raw_fd() {
            self.accept(ops);
        } else if fd == self.timer.as_raw_fd() {
            self.tick(ops);
        } else if self.clients.greetings.contains_key(&fd) {
            self.listen_to(fd, ops);
        } else if let Some((ports, _)) = self.clients.streams.get(&fd) {
            self.muxer.host_event(*ports, events.event_set());
        }
        self.exchange();
        self.update_watches(ops);
        self.update_timer();
    }
}

impl Vsock {
    fn accept(&mut self, ops: &mut EventOps) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok(Some(stream)) if self.clients.greetings.len() < MAX_GREETINGS => self.greet(stream, ops),
                Ok(Some(_)) => {
                    tracing::warn!(
                        "vsock: {MAX_GREETINGS} clients have not said what they want; one more is turned away"
                    )
                }
                Ok(None) => return,
                Err(error) => return self.rest_listener(&error, ops),
            }
        }
    }

    fn greet(&mut self, stream: UnixStream, ops: &mut EventOps) {
        if is_watched("vsock", ops.add(Events::new(&stream, EventSet::IN))) {
            self.clients.greetings.insert(stream.as_raw_fd(), Greeting::new(stream));
        }
    }

    /// The waiting client cannot be accepted, and would be reported again and again.
    fn rest_listener(&mut self, error: &io::Error, ops: &mut EventOps) {
        tracing::warn!("vsock: a client cannot be accepted: {error}; trying again in {TICK:?}");
        is_watched("vsock", ops.remove(Events::empty(&self.listener)));
        self.clients.listener_rests = true;
    }

    /// A client says what it wants.
    fn listen_to(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(greeting) = self.clients.greetings.get_mut(&fd) else { return };
        match greeting.read() {
            Said::Nothing => {}
            Said::Connect { port, rest } => {
                let Some(stream) = self.stop_greeting(fd, ops) else { return };
                // Without a driver in the guest there is nobody to ask; the client sees its connection closed.
                if self.active.is_some() {
                    self.muxer.connect(stream, port, &rest);
                }
            }
            Said::Nonsense => drop(self.stop_greeting(fd, ops)),
        }
    }

    fn stop_greeting(&mut self, fd: RawFd, ops: &mut EventOps) -> Option<UnixStream> {
        let greeting = self.clients.greetings.remove(&fd)?;
        is_watched("vsock", ops.remove(Events::empty(greeting.stream())));
        Some(greeting.into_stream())
    }

    fn tick(&mut self, ops: &mut EventOps) {
        let _ = self.timer.wait();
        let now = Instant::now();
        let greetings = self.clients.greetings.iter();
        let late: Vec<RawFd> = greetings.filter(|(_, greeting)| greeting.is_late(now)).map(|(fd, _)| *fd).collect();
        for fd in late {
            drop(self.stop_greeting(fd, ops));
        }
        if std::mem::take(&mut self.clients.listener_rests) {
            is_watched("vsock", ops.add(Events::new(&self.listener, EventSet::IN)));
        }
    }

    /// The timer runs as long as there is something to wait for.
    fn update_timer(&mut self) {
        let needed = self.clients.listener_rests || !self.clients.greetings.is_empty();
        if needed != self.clients.ticking {
            let set = if needed { self.timer.reset(TICK, Some(TICK)) } else { self.timer.clear() };
            match set {
                Ok(()) => self.clients.ticking = needed,
                Err(error) => tracing::error!("vsock: the timer for slow clients cannot be set: {error}"),
            }
        }
    }

    /// Has the event loop wait for what the streams need now.
    fn update_watches(&mut self, ops: &mut EventOps) {
        for watch in self.muxer.watches() {
            match watch {
                Watch::Closed(stream) => self.clients.unwatch(&stream, ops),
                Watch::Events(ports, wanted) => {
                    let Some(socket) = self.muxer.socket(ports) else { continue };
                    match wanted {
                        Some(events) => self.clients.watch(socket, ports, events, ops),
                        None => self.clients.unwatch(socket, ops),
                    }
                }
            }
        }
    }
}

impl Clients {
    fn watch(&mut self, socket: &UnixStream, ports: Ports, events: EventSet, ops: &mut EventOps) {
        let fd = socket.as_raw_fd();
        let done = match self.streams.get(&fd) {
            Some((_, watched)) if *watched == events => return,
            Some(_) => ops.modify(Events::new(socket, events)),
            None => ops.add(Events::new(socket, events)),
        };
        if is_watched("vsock", done) {
            self.streams.insert(fd, (ports, events));
        }
    }

    fn unwatch(&mut self, socket: &UnixStream, ops: &mut EventOps) {
        if self.streams.remove(&socket.as_raw_fd()).is_some() {
            is_watched("vsock", ops.remove(Events::empty(socket)));
        }
    }
}
