//! The device as a whole: a driver of our own in place of the guest, and real sockets on the host.
//!
//! The event loop runs on the test's thread, so nothing here depends on time: [`Rig::run`] returns when there is
//! nothing more to do.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api_spec::agent::{self, Envelope, GuestKind, Level, READY_PORT, Response};
use event_manager::{EventManager, SubscriberOps};
use snapshot::state::VsockState;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::interrupt::Interrupt;
use super::super::mmio::MmioTransport;
use super::super::{EVENT_IDX, VERSION_1, status};
use super::connection::BUFFER;
use super::packet::{BOTH_ENDS, HEADER_LEN, HOST_CID, Header, NO_RECEIVE, NO_SEND, STREAM, op};
use super::{ReadySink, Vsock, VsockError};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::VirtioDevice;
use crate::devices::{GuestMemory, lock};

const CID: u64 = 3;
const MEMORY: usize = 1 << 20;
const SIZE: u16 = 16;
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
/// Length of each buffer of the driver, in bytes.
const BUFFER_LEN: u32 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// A deadline for what a peer on this very thread has already done.
const SOON: Duration = Duration::from_secs(10);

/// The driver's side of one queue. Survives with the guest's memory, as a driver's variables do.
#[derive(Clone, Debug)]
struct Ring {
    base: u64,
    /// Where buffer number n begins.
    buffers: u64,
    next_avail: u16,
    seen_used: u16,
    event_idx: bool,
}

impl Ring {
    fn new(index: usize, event_idx: bool) -> Self {
        let index = index as u64;
        Ring {
            base: 0x1000 + index * 0x1000,
            buffers: 0x1_0000 + index * 0x2_0000,
            next_avail: 0,
            seen_used: 0,
            event_idx,
        }
    }

    fn desc(&self) -> u64 {
        self.base
    }

    fn avail(&self) -> u64 {
        self.base + 0x400
    }

    fn used(&self) -> u64 {
        self.base + 0x800
    }

    fn buffer(&self, id: u16) -> u64 {
        self.buffers + u64::from(id) * u64::from(BUFFER_LEN)
    }

    fn describe(&self, mem: &GuestMemory, id: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.desc() + 16 * u64::from(id);
        mem.write_obj(addr, GuestAddress(at)).unwrap();
        mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Offers the chain that begins at descriptor `head`. Says whether the device wants to be told.
    fn offer(&mut self, mem: &GuestMemory, head: u16) -> bool {
        let slot = self.avail() + 4 + 2 * u64::from(self.next_avail % SIZE);
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        let old = self.next_avail;
        self.next_avail = old.wrapping_add(1);
        mem.write_obj(self.next_avail, GuestAddress(self.avail() + 2)).unwrap();
        if !self.event_idx {
            return mem.read_obj::<u16>(GuestAddress(self.used())).unwrap() & 1 == 0;
        }
        let event: u16 = mem.read_obj(GuestAddress(self.used() + 4 + 8 * u64::from(SIZE))).unwrap();
        self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
    }

    /// The next used chain and how much was written to it. Asks for an interrupt at the one after.
    fn take_used(&mut self, mem: &GuestMemory) -> Option<(u16, u32)> {
        if mem.read_obj::<u16>(GuestAddress(self.used() + 2)).unwrap() == self.seen_used {
            return None;
        }
        let slot = self.used() + 4 + 8 * u64::from(self.seen_used % SIZE);
        self.seen_used = self.seen_used.wrapping_add(1);
        mem.write_obj(self.seen_used, GuestAddress(self.avail() + 4 + 2 * u64::from(SIZE))).unwrap();
        let id: u32 = mem.read_obj(GuestAddress(slot)).unwrap();
        Some((id as u16, mem.read_obj(GuestAddress(slot + 4)).unwrap()))
    }
}

/// A machine with nothing but a vsock device.
struct Rig {
    mem: GuestMemory,
    rings: [Ring; 3],
    vsock: Arc<Mutex<Vsock>>,
    transport: MmioTransport,
    events: EventManager<Arc<Mutex<Vsock>>>,
    ready: Receiver<(Level, GuestKind)>,
    dir: TempDir,
    event_idx: bool,
}

impl Rig {
    /// A machine before its driver starts.
    fn cold(cid: u64, mem: GuestMemory, event_idx: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (send, ready) = channel();
        let sink: ReadySink = Box::new(move |level, kind| send.send((level, kind)).unwrap());
        let vsock = Vsock::new(cid, &dir.path().join("v"), sink).unwrap();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let transport = MmioTransport::new(vsock.clone(), mem.clone(), interrupt);
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(vsock.clone());
        let rings = [RX, TX, EVENTS].map(|index| Ring::new(index, event_idx));
        Rig { mem, rings, vsock, transport, events, ready, dir, event_idx }
    }

    fn memory() -> GuestMemory {
        crate::memory::from_zero(MEMORY)
    }

    /// A machine whose driver has started, without buffers for packets, with `events` buffers for events.
    fn bare(event_idx: bool, events: u16) -> Self {
        let mut rig = Rig::cold(CID, Rig::memory(), event_idx);
        rig.start_driver();
        for id in 0..events {
            rig.offer_buffer(EVENTS, id);
        }
        rig.run();
        rig
    }

    /// A machine whose driver has started and offers all its buffers.
    fn new(event_idx: bool) -> Self {
        let mut rig = Rig::bare(event_idx, 4);
        rig.offer_all();
        rig.run();
        rig
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        let mut data = [0; 4];
        self.transport.read(0x70, &mut data);
        u32::from_le_bytes(data)
    }

    fn has_failed(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    fn start_driver(&mut self) {
        let features = VERSION_1 | if self.event_idx { EVENT_IDX } else { 0 };
        for value in [0, 1, 3] {
            self.write(0x70, value);
        }
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, (features >> (32 * select)) as u32);
        }
        self.write(0x70, 0xb);
        for index in [RX, TX, EVENTS] {
            let ring = Ring::new(index, self.event_idx);
            for offset in (0..0x1000).step_by(8) {
                self.mem.write_obj(0u64, GuestAddress(ring.base + offset)).unwrap();
            }
            self.write(0x30, index as u32);
            self.write(0x38, SIZE.into());
            self.write(0x80, ring.desc() as u32);
            self.write(0x90, ring.avail() as u32);
            self.write(0xa0, ring.used() as u32);
            self.write(0x44, 1);
            self.rings[index] = ring;
        }
        self.write(0x70, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    /// Runs the event loop until there is nothing to do.
    fn run(&mut self) {
        // A device that never comes to rest fails the test instead of hanging it.
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn offer(&mut self, queue: usize, head: u16) {
        if self.rings[queue].offer(&self.mem, head) {
            self.write(0x50, queue as u32);
        }
    }

    fn offer_buffer(&mut self, queue: usize, id: u16) {
        let ring = &self.rings[queue];
        ring.describe(&self.mem, id, ring.buffer(id), BUFFER_LEN, WRITE, 0);
        self.offer(queue, id);
    }

    fn offer_all(&mut self) {
        for id in 0..SIZE {
            self.offer_buffer(RX, id);
        }
    }

    /// The driver sends a packet, spread over three descriptors, and the device takes it.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..header };
        self.send_raw(&[&header.to_bytes(), payload].concat());
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let ring = &self.rings[TX];
        let addr = ring.buffers;
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
        let cuts = [0, bytes.len().min(20), bytes.len().min(50), bytes.len()];
        for (id, cut) in cuts.windows(2).enumerate() {
            let flags = if id < 2 { NEXT } else { 0 };
            ring.describe(&self.mem, id as u16, addr + cut[0] as u64, (cut[1] - cut[0]) as u32, flags, id as u16 + 1);
        }
        self.offer(TX, 0);
        self.run();
        if !self.has_failed() {
            assert_eq!(self.rings[TX].take_used(&self.mem), Some((0, 0)), "the packet was taken");
        }
    }

    /// The next packet that the device has sent; its buffer is offered again.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.peek()?;
        self.offer_buffer(RX, packet.0);
        self.run();
        Some((packet.1, packet.2))
    }

    fn peek(&mut self) -> Option<(u16, Header, Vec<u8>)> {
        let (id, len) = self.rings[RX].take_used(&self.mem)?;
        let mut bytes = vec![0; len as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(self.rings[RX].buffer(id))).unwrap();
        let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::from_bytes(header);
        assert_eq!(header.len as usize, payload.len());
        Some((id, header, payload.to_vec()))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive().expect("the device sends a packet");
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn silent(&mut self) {
        assert_eq!(self.receive(), None);
    }

    fn interrupted(&self) -> bool {
        self.transport.interrupt().event().read().is_ok()
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("v{suffix}"))
    }

    /// A client connects and says `line`.
    fn client(&mut self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        self.run();
        client
    }

    /// A client that the guest has accepted, and the guest's packet header for the stream.
    fn connected(&mut self, buf_alloc: u32) -> (UnixStream, Header) {
        let mut client = self.client("CONNECT 5000\n");
        let request = self.expect(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_cid, request.kind, request.dst_port), (HOST_CID, CID, STREAM, 5000));
        assert_eq!(request.buf_alloc as usize, BUFFER);
        let back = Header { src_port: 5000, dst_port: request.src_port, buf_alloc, ..from_guest(op::RESPONSE) };
        self.send(back, &[]);
        assert_eq!(line(&mut client), format!("OK {}\n", request.src_port));
        (client, back)
    }

    /// A service on the host that the guest has connected to, and the guest's packet header for the stream.
    fn served(&mut self) -> (UnixStream, Header) {
        let service = UnixListener::bind(self.path("_77")).unwrap();
        let header = Header { src_port: 1234, dst_port: 77, buf_alloc: 1 << 18, ..from_guest(op::REQUEST) };
        self.send(header, &[]);
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (77, 1234));
        let (stream, _) = service.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        (stream, header)
    }

    fn save(&mut self) -> VsockState {
        super::save(&self.vsock, || self.transport.save())
    }

    /// Another machine that goes on with this one's guest, before its vCPUs start.
    fn restored(&self, state: &VsockState, cid: u64) -> Rig {
        let mem = Rig::memory();
        let mut bytes = vec![0; MEMORY];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        mem.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut rig = Rig::cold(cid, mem, self.event_idx);
        rig.rings = self.rings.clone();
        super::restore(&rig.vsock, &mut rig.transport, state).unwrap();
        rig.run();
        assert_eq!(rig.contents(), bytes, "restoring leaves guest memory alone");
        rig
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn resume(&mut self) {
        lock(&self.vsock).resume();
        self.run();
    }
}

fn from_guest(op: u16) -> Header {
    Header { src_cid: CID, dst_cid: HOST_CID, kind: STREAM, op, ..Header::default() }
}

fn of(header: Header, op: u16) -> Header {
    Header { op, ..header }
}

/// A line that the client reads, byte by byte.
fn line(client: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn closed(client: &mut UnixStream) -> bool {
    matches!(client.read(&mut [0]), Ok(0))
        || client.read(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

/// Runs a test in both ways of telling each other of news.
fn both(test: fn(bool)) {
    test(false);
    test(true);
}

#[test]
fn a_client_reaches_the_guest_and_bytes_flow_both_ways() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut client, header) = rig.connected(1 << 18);
        rig.send(of(header, op::RW), b"from the guest");
        let mut read = [0; 14];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"from the guest");
        client.write_all(b"from the host").unwrap();
        rig.run();
        let (packet, payload) = rig.receive().unwrap();
        assert_eq!((packet.op, payload.as_slice()), (op::RW, b"from the host".as_slice()));
        assert!(rig.interrupted());
        rig.silent();
    });
}

#[test]
fn bytes_right_behind_the_connect_line_are_kept() {
    let mut rig = Rig::new(true);
    let mut client = rig.client("CONNECT 5000\nearly");
    client.write_all(b" bird").unwrap();
    rig.run();
    let request = rig.expect(op::REQUEST);
    rig.silent();
    let header = Header { src_port: 5000, dst_port: request.src_port, buf_alloc: 4096, ..from_guest(op::RESPONSE) };
    rig.send(header, &[]);
    assert_eq!(rig.receive().unwrap().1, b"early bird");
    assert!(line(&mut client).starts_with("OK "));
}

#[test]
fn a_refused_client_is_closed_without_a_word() {
    let mut rig = Rig::new(true);
    let mut client = rig.client("CONNECT 5000\n");
    let request = rig.expect(op::REQUEST);
    rig.send(Header { src_port: 5000, dst_port: request.src_port, ..from_guest(op::RST) }, &[]);
    assert!(closed(&mut client));
    rig.silent();
}

#[test]
fn nonsense_and_clients_before_the_driver_are_closed() {
    let mut rig = Rig::new(true);
    for said in ["HELLO\n", "CONNECT 70000000000\n", &"x".repeat(100)] {
        assert!(closed(&mut rig.client(said)), "{said}");
    }
    rig.write(0x70, 0);
    assert!(closed(&mut rig.client("CONNECT 5000\n")));
}

#[test]
fn a_client_that_leaves_is_taken_back() {
    let mut rig = Rig::bare(true, 4);
    drop(rig.client("CONNECT 5000\n"));
    rig.run();
    rig.offer_all();
    rig.run();
    rig.silent();
    let client = rig.client("CONNECT 5000\n");
    let request = rig.expect(op::REQUEST);
    drop(client);
    rig.run();
    assert_eq!(rig.expect(op::RST).src_port, request.src_port);
    assert!(lock(&rig.vsock).muxer.is_quiet());
}

#[test]
fn client_ports_are_not_used_twice_in_a_row() {
    let mut rig = Rig::new(true);
    let mut last = None;
    for _ in 0..5 {
        drop(rig.client("CONNECT 5000\n"));
        rig.run();
        let port = rig.expect(op::REQUEST).src_port;
        rig.expect(op::RST);
        assert_ne!(last.replace(port), Some(port));
    }
}

#[test]
fn the_guest_reaches_a_service_of_the_host() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut service, header) = rig.served();
        rig.send(of(header, op::RW), b"hello");
        let mut read = [0; 5];
        service.read_exact(&mut read).unwrap();
        service.write_all(&read).unwrap();
        rig.run();
        assert_eq!(rig.receive().unwrap().1, b"hello");
    });
}

#[test]
fn a_port_without_a_service_is_refused() {
    let mut rig = Rig::new(true);
    rig.send(Header { src_port: 9, dst_port: 78, ..from_guest(op::REQUEST) }, &[]);
    let reset = rig.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port, reset.src_cid, reset.dst_cid), (78, 9, HOST_CID, CID));
}

#[test]
fn much_data_passes_through_tiny_credit() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut client, header) = rig.connected(7);
        let text = text(5000);
        client.write_all(&text).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        rig.run();
        let (mut got, mut ended) = (Vec::new(), false);
        while !ended {
            let (packet, payload) = rig.receive().expect("the device goes on");
            assert!(payload.len() <= 7);
            got.extend(payload);
            ended = packet.op == op::SHUTDOWN && packet.flags == NO_SEND;
            rig.send(Header { fwd_cnt: got.len() as u32, ..of(header, op::CREDIT_UPDATE) }, &[]);
        }
        assert_eq!(got, text);
    });
}

#[test]
fn much_data_passes_to_a_slow_reader_and_others_are_not_held_up() {
    let mut rig = Rig::new(true);
    let (mut slow, header) = rig.connected(1 << 18);
    let text = text(2 << 20);
    let mut sent = 0;
    let mut credit = BUFFER;
    // Nobody reads: the sockets fill up, then the device's buffer, then the guest is out of credit.
    while credit > 0 {
        let len = credit.min(4000).min(text.len() - sent);
        rig.send(of(header, op::RW), &text[sent..sent + len]);
        sent += len;
        credit -= len;
        while let Some((packet, _)) = rig.receive() {
            assert_eq!(packet.op, op::CREDIT_UPDATE);
            credit = BUFFER - (sent - packet.fwd_cnt as usize);
        }
    }
    assert!(sent < text.len(), "the device's buffers are bounded");
    let (mut quick, other) = rig.connected(1 << 18);
    rig.send(of(other, op::RW), b"quick");
    let mut read = [0; 5];
    quick.read_exact(&mut read).unwrap();

    let mut got = vec![0; sent];
    let mut at = 0;
    while at < sent {
        at += slow.read(&mut got[at..]).unwrap();
        rig.run();
    }
    assert_eq!(got, text[..sent]);
    assert_eq!(rig.expect(op::CREDIT_UPDATE).fwd_cnt as usize, sent);
}

#[test]
fn a_guest_that_ignores_credit_is_reset() {
    let mut rig = Rig::new(true);
    let (client, header) = rig.connected(1 << 18);
    let mut reset = false;
    for _ in 0..2000 {
        rig.send(of(header, op::RW), &[7; 4000]);
        while let Some((packet, _)) = rig.receive() {
            reset |= packet.op == op::RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset);
    drop(client);
    assert!(!rig.has_failed());
}

#[test]
fn each_direction_ends_by_itself() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut client, header) = rig.connected(1 << 18);
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        rig.run();
        assert_eq!(rig.receive().unwrap().1, b"question");
        assert_eq!(rig.expect(op::SHUTDOWN).flags, NO_SEND);
        rig.send(of(header, op::RW), b"answer");
        rig.send(Header { flags: BOTH_ENDS, ..of(header, op::SHUTDOWN) }, &[]);
        rig.expect(op::RST);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        assert!(lock(&rig.vsock).muxer.is_quiet());
    });
}

#[test]
fn a_guest_that_sends_no_more_can_still_receive() {
    let mut rig = Rig::new(true);
    let (mut client, header) = rig.connected(1 << 18);
    rig.send(Header { flags: NO_SEND, ..of(header, op::SHUTDOWN) }, &[]);
    assert!(closed(&mut client), "end of file");
    client.write_all(b"more").unwrap();
    rig.run();
    assert_eq!(rig.receive().unwrap().1, b"more");
    rig.send(Header { flags: NO_RECEIVE, ..of(header, op::SHUTDOWN) }, &[]);
    rig.expect(op::RST);
    assert!(client.write_all(b"too late").is_err());
}

#[test]
fn a_client_that_vanishes_ends_the_stream_after_its_last_byte() {
    let mut rig = Rig::new(true);
    let (mut client, header) = rig.connected(1 << 20);
    let text = text(150_000);
    client.write_all(&text).unwrap(); // more than the device keeps, less than the socket does
    drop(client);
    rig.run();
    let mut got = Vec::new();
    loop {
        let (packet, payload) = rig.receive().expect("the device goes on");
        got.extend(payload);
        if packet.op == op::SHUTDOWN && packet.flags == BOTH_ENDS {
            break;
        }
    }
    assert_eq!(got, text);
    rig.send(of(header, op::RST), &[]);
    assert!(lock(&rig.vsock).muxer.is_quiet());
    rig.silent();
}

#[test]
fn a_reset_by_the_guest_closes_the_client() {
    let mut rig = Rig::new(true);
    let (mut client, header) = rig.connected(1 << 18);
    rig.send(of(header, op::RST), &[]);
    assert!(closed(&mut client));
    rig.silent();
}

#[test]
fn stray_packets_are_answered_with_resets_except_resets() {
    let mut rig = Rig::new(true);
    let stray = Header { src_port: 1, dst_port: 2, ..from_guest(op::RW) };
    for header in [
        stray,
        of(stray, op::RESPONSE),
        of(stray, 99),
        Header { dst_cid: 77, ..of(stray, op::REQUEST) },
        Header { kind: 2, ..of(stray, op::REQUEST) },
    ] {
        rig.send(header, b"");
        let reset = rig.expect(op::RST);
        assert_eq!((reset.src_cid, reset.kind), (header.dst_cid, header.kind));
    }
    rig.send(of(stray, op::RST), &[]);
    rig.send(Header { src_cid: 9, ..stray }, &[]);
    rig.silent();
    assert!(!rig.has_failed());
}

#[test]
fn broken_packets_stop_the_device_until_it_is_reset() {
    type Breakage = fn(&mut Rig);
    let breakages: [(&str, Breakage); 8] = [
        ("header too short", |rig| rig.send_raw(&[0; HEADER_LEN - 1])),
        ("payload longer than its chain", |rig| {
            rig.send_raw(&Header { len: 1, ..from_guest(op::RW) }.to_bytes());
        }),
        ("payload absurdly long", |rig| {
            rig.send_raw(&Header { len: u32::MAX, ..from_guest(op::RW) }.to_bytes());
        }),
        ("chain that loops", |rig| {
            rig.rings[TX].describe(&rig.mem, 0, 0x1000, 64, NEXT, 1);
            rig.rings[TX].describe(&rig.mem, 1, 0x1000, 64, NEXT, 0);
            rig.offer(TX, 0);
        }),
        ("chain out of memory", |rig| {
            rig.rings[TX].describe(&rig.mem, 0, MEMORY as u64 - 4, 64, 0, 0);
            rig.offer(TX, 0);
        }),
        ("chain of the wrong direction", |rig| rig.offer_buffer(TX, 0)),
        ("head out of its table", |rig| rig.offer(TX, SIZE)),
        ("more chains than the queue has", |rig| {
            let index = rig.rings[TX].next_avail.wrapping_add(SIZE + 1);
            rig.mem.write_obj(index, GuestAddress(rig.rings[TX].avail() + 2)).unwrap();
            rig.write(0x50, TX as u32);
        }),
    ];
    for (name, breakage) in breakages {
        let mut rig = Rig::new(true);
        let (mut client, _) = rig.connected(1 << 18);
        while rig.interrupted() {}
        breakage(&mut rig);
        rig.run();
        assert!(rig.has_failed(), "{name}");
        assert!(rig.interrupted(), "{name}: the driver is told");
        assert!(closed(&mut client), "{name}");
        let before = rig.contents();
        rig.write(0x50, TX as u32);
        rig.run();
        assert_eq!(rig.contents(), before, "{name}: a failed device leaves memory alone");

        rig.start_driver();
        rig.offer_all();
        rig.run();
        rig.connected(1 << 18);
    }
}

#[test]
fn receive_buffers_too_short_for_a_packet_stop_the_device() {
    for (len, flags) in [(HEADER_LEN as u32, WRITE), (4096, 0)] {
        let mut rig = Rig::bare(true, 4);
        rig.rings[RX].describe(&rig.mem, 0, 0x8_0000, len, flags, 0);
        rig.offer(RX, 0);
        rig.client("CONNECT 5000\n");
        assert!(rig.has_failed());
    }
}

#[test]
fn without_receive_buffers_packets_wait() {
    both(|event_idx| {
        let mut rig = Rig::bare(event_idx, 4);
        let mut clients: Vec<_> = (0..3).map(|_| rig.client("CONNECT 5000\n")).collect();
        assert!(rig.peek().is_none());
        for _ in 0..2000 {
            rig.send(Header { src_port: 5, dst_port: 6, ..from_guest(op::RW) }, &[]);
        }
        let mut ops = Vec::new();
        for _ in 0..4 {
            rig.offer_buffer(RX, 0);
            rig.run();
            let (_, header, _) = rig.peek().expect("the new buffer is noticed");
            ops.push(header.op);
        }
        ops.sort_unstable();
        assert_eq!(ops, [op::REQUEST, op::REQUEST, op::REQUEST, op::RST], "one reset for equal stray packets");
        drop(clients.pop());
    });
}

#[test]
fn one_interrupt_serves_many_packets_and_none_comes_unwanted() {
    let mut rig = Rig::bare(false, 4);
    let _clients: Vec<_> = (0..3).map(|_| rig.client("CONNECT 5000\n")).collect();
    while rig.interrupted() {}
    rig.offer_all();
    rig.run();
    assert_eq!(rig.transport.interrupt().event().read().unwrap(), 1);
    rig.mem.write_obj(1u16, GuestAddress(rig.rings[TX].avail())).unwrap();
    rig.send(Header { src_port: 5, dst_port: 6, ..from_guest(op::RST) }, &[]);
    assert!(!rig.interrupted());
}

#[test]
fn too_many_streams_are_refused() {
    let mut rig = Rig::new(true);
    let request = |port| Header { src_port: port, dst_port: READY_PORT, ..from_guest(op::REQUEST) };
    for port in 0..1024 {
        rig.send(request(port), &[]);
        rig.expect(op::RESPONSE);
    }
    rig.send(request(2000), &[]);
    rig.expect(op::RST);
    assert!(closed(&mut rig.client("CONNECT 5000\n")));
    rig.send(Header { flags: BOTH_ENDS, ..of(request(0), op::SHUTDOWN) }, &[]);
    rig.expect(op::RST);
    rig.send(request(2000), &[]);
    rig.expect(op::RESPONSE);
}

#[test]
fn the_guest_announces_that_it_is_ready() {
    let mut rig = Rig::new(true);
    let header = Header { src_port: 9, dst_port: READY_PORT, buf_alloc: 4096, ..from_guest(op::REQUEST) };
    rig.send(header, &[]);
    rig.expect(op::RESPONSE);
    let body = Response::Ready { level: Level::Full, kind: GuestKind::Linux };
    let mut buf = [0; 64];
    let frame = agent::encode(&Envelope { id: 0, body }, &mut buf).unwrap();
    rig.send(of(header, op::RW), &frame[..3]);
    assert!(rig.ready.try_recv().is_err());
    rig.send(of(header, op::RW), &frame[3..]);
    assert_eq!(rig.ready.try_recv(), Ok((Level::Full, GuestKind::Linux)));
    rig.send(Header { flags: BOTH_ENDS, ..of(header, op::SHUTDOWN) }, &[]);
    rig.expect(op::RST);
    assert!(!rig.save().needs_reset, "a guest that is only ready has nothing to forget");

    rig.send(header, &[]);
    rig.expect(op::RESPONSE);
    rig.send(of(header, op::RW), b"GET / HTTP/1.0\n");
    rig.expect(op::RST);
    assert!(rig.ready.try_recv().is_err());
}

#[test]
fn a_driver_reset_closes_everything_and_the_device_works_again() {
    let mut rig = Rig::new(true);
    let (mut client, _) = rig.connected(1 << 18);
    rig.write(0x70, 0);
    rig.run();
    assert!(closed(&mut client));
    rig.start_driver();
    rig.offer_all();
    rig.run();
    rig.silent();
    rig.connected(1 << 18);
}

#[test]
fn a_quiet_device_is_restored_as_it_was() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (client, header) = rig.connected(1 << 18);
        drop(client);
        rig.run();
        rig.expect(op::SHUTDOWN);
        rig.send(of(header, op::RST), &[]);
        let state = rig.save();
        assert!(!state.needs_reset);
        assert_eq!(state.guest_cid, CID);

        let mut clone = rig.restored(&state, CID);
        assert_eq!(clone.save(), state, "every field comes back");
        let before = clone.contents();
        clone.resume();
        assert_eq!(clone.contents(), before, "there was nothing to tell");
        assert_eq!(clone.rings[EVENTS].take_used(&clone.mem), None);
        let (mut client, header) = clone.connected(1 << 18);
        clone.send(of(header, op::RW), b"alive");
        let mut read = [0; 5];
        client.read_exact(&mut read).unwrap();
    });
}

#[test]
fn a_clone_is_told_to_forget_streams_and_new_ones_wait_until_it_has() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut client, header) = rig.connected(1 << 18);
        let state = rig.save();
        assert!(state.needs_reset);

        let mut clone = rig.restored(&state, CID);
        assert!(clone.save().needs_reset, "it has not been told yet");
        let early = clone.client("CONNECT 5000\n");
        let before = clone.contents();
        clone.run();
        assert_eq!(clone.contents(), before, "its memory is left alone until it runs");
        clone.resume();
        assert!(clone.interrupted());
        let (id, len) = clone.rings[EVENTS].take_used(&clone.mem).expect("the reset event");
        let event: u32 = clone.mem.read_obj(GuestAddress(clone.rings[EVENTS].buffer(id))).unwrap();
        assert_eq!((event, len), (0, 4));
        // The guest still uses the old stream; the answer must wait, too.
        clone.send(of(header, op::RW), b"stale");
        clone.run();
        assert!(clone.peek().is_none(), "nothing reaches a guest that is about to drop all streams");
        assert!(clone.save().needs_reset, "it has not said that it has forgotten");
        clone.offer_buffer(EVENTS, id);
        clone.run();
        let mut ops = [clone.receive().unwrap().0.op, clone.receive().unwrap().0.op];
        ops.sort_unstable();
        assert_eq!(ops, [op::REQUEST, op::RST]);
        drop(early);

        // The original goes on as if nothing had happened.
        rig.send(of(header, op::RW), b"alive");
        let mut read = [0; 5];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"alive");
        rig.resume();
        assert_eq!(rig.rings[EVENTS].take_used(&rig.mem), None, "a pause without restore resets nothing");
    });
}

#[test]
fn the_reset_event_waits_for_a_buffer() {
    both(|event_idx| {
        let mut rig = Rig::bare(event_idx, 0);
        rig.offer_all();
        let _client = rig.connected(1 << 18);
        let state = rig.save();
        let mut clone = rig.restored(&state, CID);
        clone.resume();
        assert_eq!(clone.rings[EVENTS].take_used(&clone.mem), None);
        clone.offer_buffer(EVENTS, 3);
        clone.run();
        assert_eq!(clone.rings[EVENTS].take_used(&clone.mem), Some((3, 4)));
        clone.offer_buffer(EVENTS, 3);
        clone.connected(1 << 18);
    });
}

#[test]
fn a_clone_with_another_context_id_is_told() {
    let mut rig = Rig::new(true);
    let state = rig.save();
    assert!(!state.needs_reset);
    let mut clone = rig.restored(&state, 44);
    clone.resume();
    assert!(clone.rings[EVENTS].take_used(&clone.mem).is_some());
    let mut config = [0; 12];
    clone.transport.read(0x100, &mut config);
    assert_eq!(config, [44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(clone.save().transport.config_generation, state.transport.config_generation + 1);
}

#[test]
fn packets_in_the_queue_are_taken_in_before_saving() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        let (mut client, header) = rig.connected(1 << 18);
        // The guest has sent and was paused before the event loop could look.
        let bytes = [Header { len: 4, ..of(header, op::RW) }.to_bytes().as_slice(), b"last"].concat();
        let ring = &rig.rings[TX];
        rig.mem.write_slice(&bytes, GuestAddress(ring.buffers)).unwrap();
        ring.describe(&rig.mem, 0, ring.buffers, bytes.len() as u32, 0, 0);
        rig.offer(TX, 0);
        let state = rig.save();
        assert_eq!(state.transport.queues[TX].next_avail, rig.rings[TX].next_avail);
        assert_eq!(state.transport.queues[TX].next_used, rig.rings[TX].next_avail);
        let mut read = [0; 4];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"last");
        assert!(rig.interrupted(), "a driver that waits for its buffer is not left waiting");

        let mut clone = rig.restored(&state, CID);
        clone.rings[TX].take_used(&clone.mem).unwrap();
        clone.resume();
        let (id, _) = clone.rings[EVENTS].take_used(&clone.mem).unwrap();
        clone.offer_buffer(EVENTS, id);
        clone.run();
        clone.connected(1 << 18);
    });
}

#[test]
fn answers_that_the_guest_has_not_fetched_are_something_to_forget() {
    let mut rig = Rig::bare(true, 4);
    rig.send(Header { src_port: 5, dst_port: 6, ..from_guest(op::RW) }, &[]);
    assert!(rig.save().needs_reset);
}

#[test]
fn a_failed_device_is_restored_as_failed() {
    let mut rig = Rig::new(true);
    rig.send_raw(&[0; 3]);
    assert!(rig.has_failed());
    let state = rig.save();
    let mut clone = rig.restored(&state, CID);
    clone.resume();
    assert!(clone.has_failed());
    clone.start_driver();
    clone.offer_all();
    clone.run();
    clone.connected(1 << 18);
}

#[test]
fn damaged_states_are_refused() {
    let mut rig = Rig::new(true);
    let mut state = rig.save();
    state.transport.queues[1].used_ring = MEMORY as u64;
    let mut other = Rig::cold(CID, Rig::memory(), true);
    let refused = super::restore(&other.vsock, &mut other.transport, &state).unwrap_err();
    assert!(refused.to_string().contains("queue 1"), "{refused}");
}

#[test]
fn reserved_context_ids_and_bad_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let new = |cid, path: &str| Vsock::new(cid, &dir.path().join(path), Box::new(|_, _| {}));
    for cid in [0, 1, 2, u32::MAX.into(), u64::MAX] {
        assert!(matches!(new(cid, "v"), Err(VsockError::Cid(c)) if c == cid));
    }
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(new(3, "file"), Err(VsockError::Listen(_))));
    let vsock = new(3, "v").unwrap();
    assert_eq!(lock(&vsock).uds_path(), dir.path().join("v"));
    drop(vsock);
    assert!(!dir.path().join("v").exists());
}
