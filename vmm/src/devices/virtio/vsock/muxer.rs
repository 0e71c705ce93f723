//! All streams of the device: which packet belongs to which, and what each owes to whom.
//!
//! The muxer moves bytes between [`Connection`]s and their sockets on the host, which never block. It touches neither
//! queues nor the event loop: [`Muxer::next_packet`] gives packets for the guest, [`Muxer::watches`] says which events
//! its owner should wait for.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use api_spec::agent::READY_PORT;
use api_spec::stats::VsockStats;
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate, Ports, Received};
use super::host::{HostSocket, accepted_line};
use super::packet::{HOST_CID, Header, STREAM, op};
use super::ready::{Announcements, ReadySink};

/// How many streams there may be at a time.
pub const MAX_CONNECTIONS: usize = 1024;
/// How many resets may wait for the guest besides those of its streams. A guest that sends stray packets and takes no
/// answers loses the answers beyond.
const MAX_RESETS: usize = 1024;
/// Ports of the host that are given to clients, in turn.
const CLIENT_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// What is at the host's end of a stream.
#[derive(Debug)]
enum Host {
    /// A socket.
    Stream(UnixStream),
    /// The device itself, listening for announcements.
    Ready(Announcements),
}

/// A stream with its end on the host.
#[derive(Debug)]
struct Link {
    connection: Connection,
    host: Host,
    /// The socket has hung up: it gives no new events, only what is still in it.
    hung_up: bool,
    /// The socket has been told that no more will be written.
    told_end: bool,
    /// The socket has been told that no more will be read.
    told_deaf: bool,
    /// Stands in the ring of streams with a packet for the guest.
    in_ring: bool,
}

/// A change in what the owner should wait for.
#[derive(Debug)]
pub enum Watch {
    /// Wait for these events of the stream's socket, or for none at all.
    Events(Ports, Option<EventSet>),
    /// The stream is over: stop waiting for events of this socket, and close it.
    Closed(UnixStream),
}

/// All streams.
pub struct Muxer {
    guest_cid: u64,
    ready: ReadySink,
    links: HashMap<Ports, Link>,
    /// Streams with a packet for the guest, served in turn.
    ring: VecDeque<Ports>,
    /// Resets for packets that belong to no stream.
    resets: VecDeque<Header>,
    next_port: u32,
    /// Streams whose events may have changed.
    changed: HashSet<Ports>,
    /// Sockets of streams that are over.
    closed: Vec<UnixStream>,
    scratch: Vec<u8>,
    stats: VsockStats,
}

impl Muxer {
    /// No streams yet. `ready` hears the guest's announcements.
    pub fn new(guest_cid: u64, ready: ReadySink) -> Self {
        // A clone's guest may remember ports of the original: begin elsewhere each time.
        let start = RandomState::new().hash_one(0) as u32 % (CLIENT_PORTS.end - CLIENT_PORTS.start);
        Muxer {
            guest_cid,
            ready,
            links: HashMap::new(),
            ring: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: CLIENT_PORTS.start + start,
            changed: HashSet::new(),
            closed: Vec::new(),
            scratch: vec![0; super::connection::BUFFER],
            stats: VsockStats::default(),
        }
    }

    /// What has gone through here.
    pub fn stats(&self) -> VsockStats {
        VsockStats { connections: self.links.len() as u64, ..self.stats }
    }

    /// Whether the guest may believe that there is a stream.
    pub fn is_quiet(&self) -> bool {
        self.links.is_empty() && self.resets.is_empty()
    }

    /// Ends all streams; nothing is sent to the guest any more.
    pub fn clear(&mut self) {
        for (_, link) in self.links.drain() {
            if let Host::Stream(stream) = link.host {
                // Its client is not to wait until the device looks at its sockets again.
                let _ = stream.shutdown(Shutdown::Both);
                self.closed.push(stream);
            }
        }
        self.ring.clear();
        self.resets.clear();
        self.changed.clear();
    }

    /// A client of the host wants to reach `port` of the guest, and has said `data` already. Without room for another
    /// stream the client is turned away.
    pub fn connect(&mut self, stream: UnixStream, port: u32, data: &[u8]) {
        if !self.make_room() {
            tracing::warn!("vsock: {MAX_CONNECTIONS} streams are open; a client is turned away");
            return self.closed.push(stream);
        }
        let ports = self.free_ports(port);
        let mut connection = Connection::requested(ports);
        connection.from_host(data);
        self.insert(connection, Host::Stream(stream));
    }

    fn insert(&mut self, connection: Connection, host: Host) {
        let ports = connection.ports();
        let link = Link { connection, host, hung_up: false, told_end: false, told_deaf: false, in_ring: false };
        self.links.insert(ports, link);
        self.stats.opened += 1;
        self.settle(ports);
    }

    /// Ports for a stream to `guest`: the next after the last ones, so that a port rests before it is used again.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port =
                if self.next_port + 1 == CLIENT_PORTS.end { CLIENT_PORTS.start } else { self.next_port + 1 };
            if !self.links.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Makes room for one more stream, if need be by ending one of which only the guest's last word is missing.
    fn make_room(&mut self) -> bool {
        if self.links.len() < MAX_CONNECTIONS {
            return true;
        }
        let mut waiting = self.links.iter().filter(|(_, link)| link.connection.waits_for_last_word());
        match waiting.next().map(|(ports, _)| *ports) {
            Some(ports) => {
                self.reset(ports);
                true
            }
            None => false,
        }
    }

    /// Takes in a packet from the guest. `listener` knows where the host's ports are.
    pub fn receive(&mut self, header: &Header, payload: &[u8], listener: &HostSocket) {
        self.stats.tx_packets += 1;
        self.stats.tx_bytes += payload.len() as u64;
        if header.src_cid != self.guest_cid {
            return; // An answer would not arrive.
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.answer_with_reset(header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.links.get_mut(&ports) {
            Some(link) => match link.connection.receive(header, payload) {
                Received::Noted => self.settle(ports),
                Received::Accepted => self.accepted(ports),
                Received::Broken => self.reset(ports),
            },
            None if header.op == op::REQUEST => self.request(ports, header, listener),
            None => self.answer_with_reset(header),
        }
    }

    /// The guest wants to reach a port of the host.
    fn request(&mut self, ports: Ports, header: &Header, listener: &HostSocket) {
        if !self.make_room() {
            tracing::debug!("vsock: {MAX_CONNECTIONS} streams are open; the guest's request is refused");
            return self.answer_with_reset(header);
        }
        let host = match ports.host {
            READY_PORT => Ok(Host::Ready(Announcements::default())),
            port => listener.connect(port).map(Host::Stream),
        };
        match host {
            Ok(host) => self.insert(Connection::accepted(ports, header), host),
            Err(error) => {
                tracing::debug!("vsock: nobody answers for port {} of the host: {error}", ports.host);
                self.answer_with_reset(header);
            }
        }
    }

    /// The guest has accepted a client's request: the client hears of it before anything else.
    fn accepted(&mut self, ports: Ports) {
        let Some(link) = self.links.get_mut(&ports) else { return };
        let line = accepted_line(ports.host);
        // Nothing has been written to this socket before, so there is room unless the client is gone.
        let told = match &mut link.host {
            Host::Stream(stream) => stream.write(line.as_bytes()).is_ok_and(|len| len == line.len()),
            Host::Ready(_) => false,
        };
        if told { self.settle(ports) } else { self.reset(ports) }
    }

    fn answer_with_reset(&mut self, header: &Header) {
        if header.op != op::RST {
            self.queue_reset(header.reset());
        }
    }

    fn queue_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS && !self.resets.contains(&reset) {
            self.resets.push_back(reset);
        }
    }

    /// Ends a stream and tells the guest.
    fn reset(&mut self, ports: Ports) {
        self.queue_reset(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        });
        self.remove(ports);
    }

    fn remove(&mut self, ports: Ports) {
        let Some(link) = self.links.remove(&ports) else { return };
        if link.in_ring {
            self.ring.retain(|other| *other != ports);
        }
        self.changed.remove(&ports);
        if let Host::Stream(stream) = link.host {
            self.closed.push(stream);
        }
    }

    /// The socket of a stream has something to say.
    pub fn host_event(&mut self, ports: Ports, events: EventSet) {
        let Some(link) = self.links.get_mut(&ports) else { return };
        link.read(&mut self.scratch);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            link.hang_up();
        }
        self.settle(ports);
    }

    /// Does all that a stream can do now, and notes what it waits for.
    fn settle(&mut self, ports: Ports) {
        let Some(link) = self.links.get_mut(&ports) else { return };
        if link.flush(&mut self.ready).is_err() {
            return self.reset(ports);
        }
        link.pass_on_ends();
        match link.connection.fate() {
            Fate::Lives => {
                if link.connection.has_packet() && !link.in_ring {
                    link.in_ring = true;
                    self.ring.push_back(ports);
                }
                self.changed.insert(ports);
            }
            Fate::Reset => self.reset(ports),
            Fate::Over => self.remove(ports),
        }
    }

    /// Whether there is a packet for the guest.
    pub fn has_packet(&mut self) -> bool {
        while let Some(ports) = self.ring.front() {
            match self.links.get_mut(ports) {
                Some(link) if link.connection.has_packet() => return true,
                Some(link) => link.in_ring = false,
                None => {}
            }
            self.ring.pop_front();
        }
        !self.resets.is_empty()
    }

    /// The next packet for the guest, with at most `room` bytes of payload.
    pub fn next_packet(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Header> {
        let packet = self.take_packet(room, payload);
        if packet.is_some() {
            self.stats.rx_packets += 1;
            self.stats.rx_bytes += payload.len() as u64;
        }
        packet
    }

    fn take_packet(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Header> {
        payload.clear();
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(ports) = self.ring.pop_front() {
            let Some(link) = self.links.get_mut(&ports) else { continue };
            link.in_ring = false;
            let packet = link.connection.next_packet(room, payload);
            if link.hung_up {
                link.read(&mut self.scratch);
            }
            self.settle(ports);
            if let Some(header) = packet {
                return Some(Header { src_cid: HOST_CID, dst_cid: self.guest_cid, ..header });
            }
        }
        None
    }

    /// What has changed in the events to wait for since the last call.
    pub fn watches(&mut self) -> Vec<Watch> {
        let mut watches: Vec<_> = self.closed.drain(..).map(Watch::Closed).collect();
        for ports in self.changed.drain() {
            if let Some(link) = self.links.get(&ports) {
                watches.push(Watch::Events(ports, link.events()));
            }
        }
        watches
    }

    /// The socket of a stream, if it has one.
    pub fn socket(&self, ports: Ports) -> Option<&UnixStream> {
        match &self.links.get(&ports)?.host {
            Host::Stream(stream) => Some(stream),
            Host::Ready(_) => None,
        }
    }
}

/// The guest said something that its partner on the host does not understand.
struct NotUnderstood;

impl Link {
    /// Reads from the host what there is room for. `scratch` has room for a whole buffer of a connection.
    fn read(&mut self, scratch: &mut [u8]) {
        let Host::Stream(stream) = &mut self.host else { return };
        let room = self.connection.host_room();
        if room == 0 {
            return;
        }
        match stream.read(&mut scratch[..room]) {
            Ok(0) => self.connection.host_ended(),
            Ok(len) => self.connection.from_host(&scratch[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => {
                self.connection.host_ended();
                self.connection.host_gone();
            }
        }
    }

    /// The host has left. What it sent before is still in the socket.
    fn hang_up(&mut self) {
        self.hung_up = true;
        self.connection.host_gone();
    }

    /// Gives the host what there is for it, as far as it takes it now.
    fn flush(&mut self, ready: &mut ReadySink) -> Result<(), NotUnderstood> {
        loop {
            let data = self.connection.for_host();
            if data.is_empty() {
                return Ok(());
            }
            let took = match &mut self.host {
                Host::Stream(stream) => stream.write(data),
                Host::Ready(announcements) => {
                    announcements.take(data, ready).map_err(|_| NotUnderstood)?;
                    Ok(data.len())
                }
            };
            match took {
                Ok(len) => self.connection.host_took(len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => self.connection.host_gone(),
            }
        }
    }

    /// Tells the host which directions have ended.
    fn pass_on_ends(&mut self) {
        let Host::Stream(stream) = &self.host else { return };
        if self.connection.nothing_more_for_host() && !self.told_end {
            self.told_end = true;
            let _ = stream.shutdown(Shutdown::Write);
        }
        if self.connection.guest_takes_nothing() && !self.told_deaf {
            self.told_deaf = true;
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// The events of the socket to wait for. None at all once it has hung up, as it says so for ever.
    fn events(&self) -> Option<EventSet> {
        if self.hung_up {
            return None;
        }
        let mut events = EventSet::empty();
        if self.connection.host_room() > 0 {
            events |= EventSet::IN;
        }
        if !self.connection.for_host().is_empty() {
            events |= EventSet::OUT;
        }
        Some(events)
    }
}
