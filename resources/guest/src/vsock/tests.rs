//! A host in miniature, on a wire that can be as narrow as a test likes.

use super::*;
use crate::agent::tests::{Mock, agent};
use api_spec::agent::{self, Envelope, Request, Response};

const GUEST: u64 = 3;
const PORT: u32 = 700;

/// Collects what the guest sends.
struct Packets {
    sent: Vec<(Header, Vec<u8>)>,
    room: usize,
}

impl Wire for Packets {
    const PAYLOAD: usize = 64;
    fn room(&self) -> usize {
        self.room
    }
    fn send(&mut self, header: &Header, payload: &[u8]) {
        self.room = self.room.checked_sub(1).expect("the guest sends no packet that does not fit");
        assert_eq!(Header::parse(&header.bytes()), *header);
        assert_eq!(header.payload_len(), payload.len());
        self.sent.push((*header, payload.to_vec()));
    }
}

struct Host {
    vsock: Vsock,
    buffers: Box<[Buffers; MAX_CONNECTIONS]>,
    agent: Agent<Mock>,
    wire: Packets,
    /// What the guest is told about the host's buffer.
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Host {
    fn new() -> Self {
        Host {
            vsock: Vsock::new(GUEST),
            buffers: Box::new([const { Buffers::new() }; MAX_CONNECTIONS]),
            agent: agent(),
            wire: Packets { sent: Vec::new(), room: 1000 },
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        }
    }

    fn header(&self, port: u32, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST,
            src_port: port,
            dst_port: AGENT_PORT,
            kind: STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn packet(&mut self, header: Header, payload: &[u8]) {
        assert!(self.wire.room >= ROOM_PER_PACKET);
        let header = Header { len: payload.len() as u32, ..header };
        self.vsock.receive(&header, payload, &mut self.buffers, &mut self.agent, &mut self.wire);
    }

    fn control(&mut self, port: u32, op: u16) {
        self.packet(self.header(port, op), &[]);
    }

    fn data(&mut self, bytes: &[u8]) {
        self.packet(self.header(PORT, op::RW), bytes);
    }

    fn proceed(&mut self) {
        self.vsock.proceed(&mut self.buffers, &mut self.agent, &mut self.wire);
    }

    /// The operations of the packets that have come, and their bytes in one.
    fn drain(&mut self) -> (Vec<u16>, Vec<u8>) {
        let packets = std::mem::take(&mut self.wire.sent);
        (packets.iter().map(|(header, _)| header.op).collect(), packets.into_iter().flat_map(|(_, p)| p).collect())
    }

    fn ops(&mut self) -> Vec<u16> {
        self.drain().0
    }
}

/// A host with one open connection.
fn connected() -> Host {
    let mut host = Host::new();
    host.control(PORT, op::REQUEST);
    assert_eq!(host.ops(), [op::RESPONSE]);
    host
}

fn frame(id: u32, request: Request) -> Vec<u8> {
    agent::encode(&Envelope { id, body: request }, &mut [0; 128]).unwrap().to_vec()
}

fn pings(count: u32) -> Vec<u8> {
    (0..count).flat_map(|id| frame(id, Request::Ping { token: id.into() })).collect()
}

fn answers(mut bytes: &[u8]) -> Vec<Envelope<Response>> {
    let mut all = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk() {
        let (body, rest) = rest.split_at(agent::body_len(header).unwrap());
        all.push(agent::decode(body).unwrap());
        bytes = rest;
    }
    all
}

fn pongs(count: u32) -> Vec<Envelope<Response>> {
    (0..count).map(|id| Envelope { id, body: Response::Pong { token: id.into() } }).collect()
}

#[test]
fn requests_are_answered_however_they_are_cut() {
    for cut in [1, 7, 11, 12, 64, 1000] {
        let mut host = connected();
        for piece in pings(20).chunks(cut) {
            host.data(piece);
        }
        assert_eq!(answers(&host.drain().1), pongs(20), "pieces of {cut}");
    }
}

#[test]
fn answers_keep_to_the_credit_and_requests_wait_behind_them() {
    let mut host = Host::new();
    host.buf_alloc = 20;
    host.control(PORT, op::REQUEST);
    host.drain();
    let mut received = Vec::new();
    host.data(&pings(100));
    for _ in 0..200 {
        host.proceed();
        let (ops, bytes) = host.drain();
        assert!(bytes.len() <= 20);
        assert!(ops.iter().filter(|op| **op == op::CREDIT_REQUEST).count() <= 1);
        received.extend_from_slice(&bytes);
        host.fwd_cnt = received.len() as u32;
        host.control(PORT, op::CREDIT_UPDATE);
    }
    assert_eq!(answers(&received), pongs(100));
}

#[test]
fn credit_is_asked_for_once() {
    let mut host = Host::new();
    host.buf_alloc = 5;
    host.control(PORT, op::REQUEST);
    host.data(&pings(1));
    host.proceed();
    assert_eq!(host.ops(), [op::RESPONSE, op::RW, op::CREDIT_REQUEST]);
    host.control(PORT, op::CREDIT_UPDATE);
    host.proceed();
    assert_eq!(host.ops(), [], "an update that gives nothing is no reason to ask again");
    host.fwd_cnt = 5;
    host.control(PORT, op::CREDIT_UPDATE);
    host.proceed();
    assert_eq!(host.ops(), [op::RW, op::CREDIT_REQUEST]);
}

#[test]
fn a_narrow_wire_delays_answers_and_loses_none() {
    let mut host = connected();
    host.wire.room = ROOM_PER_PACKET;
    host.data(&pings(60));
    let mut received = Vec::new();
    for _ in 0..100 {
        received.extend(host.drain().1);
        host.wire.room = ROOM_PER_PACKET;
        host.proceed();
    }
    assert_eq!(answers(&received), pongs(60));
}

#[test]
fn the_host_hears_of_room_when_no_answer_tells_it() {
    let mut host = connected();
    // Requests without an answer, so that nothing else is sent.
    let silent = frame(1, Request::Reset).repeat(60);
    host.data(&silent);
    let (header, _) = host.wire.sent[0];
    assert_eq!((header.op, header.fwd_cnt as usize), (op::CREDIT_UPDATE, silent.len()));
}

#[test]
fn a_wait_holds_up_its_own_connection_only() {
    let mut host = connected();
    host.data(&[frame(1, Request::Ticks { advance: 2 }), frame(2, Request::Info)].concat());
    assert!(host.vsock.waits());
    host.control(PORT + 1, op::REQUEST);
    host.packet(host.header(PORT + 1, op::RW), &pings(1));
    assert_eq!(host.ops(), [op::RESPONSE, op::RW]);
    host.agent.tick();
    host.proceed();
    assert_eq!(host.ops(), []);
    host.agent.tick();
    host.proceed();
    let answers = answers(&host.drain().1);
    assert_eq!(answers[0], Envelope { id: 1, body: Response::Ticks { count: 2 } });
    assert_eq!(answers[1].id, 2);
    assert!(!host.vsock.waits());
}

#[test]
fn whoever_breaks_the_protocol_is_reset() {
    for broken in [&[0, 0, 0, 0, 2, 0, 0, 0][..], &[1, 4, 0, 0, 1, 0, 0, 0], &[1, 0, 0, 0, 1, 0, 0, 0, 99]] {
        let mut host = connected();
        host.data(&[pings(1), broken.to_vec()].concat());
        assert_eq!(host.ops(), [op::RW, op::RST]);
        host.data(&pings(1));
        assert_eq!(host.ops(), [op::RST], "there is no connection any more");
    }
    let mut host = connected();
    host.data(&frame(1, Request::Ticks { advance: 1 }));
    host.data(&[0; connection::INPUT]);
    host.data(&[0]);
    assert_eq!(host.ops(), [op::RST], "more than there was credit for");
}

#[test]
fn closing_is_agreed_on() {
    let mut host = connected();
    let mut shutdown = host.header(PORT, op::SHUTDOWN);
    shutdown.flags = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
    host.packet(shutdown, &[]);
    assert_eq!(host.ops(), [op::RST]);

    host.control(PORT, op::REQUEST);
    host.data(&frame(1, Request::Ticks { advance: 1 }));
    shutdown.flags = SHUTDOWN_SEND;
    host.packet(shutdown, &[]);
    host.proceed();
    assert_eq!(host.ops(), [op::RESPONSE], "an answer is still to come");
    host.agent.tick();
    host.proceed();
    assert_eq!(host.ops(), [op::RW, op::SHUTDOWN]);
    host.control(PORT, op::RST);
    assert_eq!(host.ops(), []);
}

#[test]
fn only_sound_packets_for_the_agent_are_taken() {
    let mut host = Host::new();
    let request = host.header(PORT, op::REQUEST);
    for header in [
        Header { dst_port: 99, ..request },
        Header { kind: 2, ..request },
        Header { dst_cid: 77, ..request },
        Header { op: op::RW, ..request },
        Header { op: 99, ..request },
    ] {
        host.packet(header, &[]);
        let (answer, _) = host.wire.sent.pop().unwrap();
        assert_eq!(answer.op, op::RST);
        assert_eq!((answer.dst_cid, answer.dst_port), (header.src_cid, header.src_port));
    }
    for port in 0..MAX_CONNECTIONS as u32 {
        host.control(port, op::REQUEST);
    }
    assert_eq!(host.ops(), [op::RESPONSE; MAX_CONNECTIONS]);
    host.control(PORT, op::REQUEST);
    assert_eq!(host.ops(), [op::RST], "the table is full");
    host.control(0, op::REQUEST);
    assert_eq!(host.ops(), [op::RESPONSE], "a host that asks again has forgotten the old connection");
    host.vsock.reset(GUEST + 1);
    host.data(&pings(1));
    assert_eq!(host.ops(), [op::RST], "a reset forgets everything");
}

#[test]
fn the_guest_announces_itself_once_and_closes() {
    let mut host = Host::new();
    host.vsock.announce(&mut host.wire);
    let (asked, _) = host.wire.sent.pop().unwrap();
    assert_eq!((asked.op, asked.dst_cid, asked.dst_port), (op::REQUEST, HOST_CID, READY_PORT));
    let back = Header { src_port: READY_PORT, dst_port: asked.src_port, ..host.header(0, op::RESPONSE) };
    host.packet(back, &[]);
    host.proceed();
    let (ops, bytes) = host.drain();
    assert_eq!(ops, [op::RW, op::SHUTDOWN]);
    assert_eq!(answers(&bytes), [Envelope { id: 0, body: READY }]);
    host.packet(Header { op: op::RST, ..back }, &[]);
    host.proceed();
    assert_eq!(host.ops(), []);
}
