//! Virtio-vsock connections (virtio 1.2, 5.10), without the queues below them.
//!
//! A connection serves agent requests in order. In the common case a packet holds whole requests, which are served where
//! they lie and answered at once; [`Buffers`] hold what does not fit that case (a request cut in two, an answer that the
//! peer gives no credit for), and are not touched otherwise: a clone pays for every page that it writes.
//!
//! [`Wire::room`] packets can be sent at any time. Whoever feeds packets in leaves room for two, of which answers never
//! take the last: it is for control packets, so these always go out at once and need no memory.

use crate::agent::{Agent, Machine, Outcome};
use crate::frames::{self, Answer, MAX_ANSWER, MAX_BODY, Next};
use api_spec::agent::{AGENT_PORT, HEADER_LEN, READY_PORT};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 16;
/// Length of a packet's header, in bytes.
pub const PACKET_HEADER: usize = 44;
/// The room that a packet needs before it is fed in.
pub const ROOM_PER_PACKET: usize = 2;

const HOST_CID: u64 = 2;
/// The port from which the guest announces that it is ready.
const EPHEMERAL_PORT: u32 = 0xc000_0000;
const STREAM: u16 = 1;
const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;

const INPUT: usize = 2 * (HEADER_LEN + MAX_BODY);
const OUTPUT: usize = 512;

/// What a packet is for.
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header. `dst` is the receiver of the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; PACKET_HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes the header.
    pub fn bytes(&self) -> [u8; PACKET_HEADER] {
        let mut bytes = [0; PACKET_HEADER];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// How many bytes follow the header.
    pub fn payload_len(&self) -> usize {
        self.len as usize
    }
}

/// Where packets go.
pub trait Wire {
    /// Longest payload of a packet.
    const PAYLOAD: usize;
    /// How many packets can be sent now.
    fn room(&self) -> usize;
    /// Sends a packet, if there is room.
    fn send(&mut self, header: &Header, payload: &[u8]);
}

/// A connection's rarely used memory.
pub struct Buffers {
    input: [u8; INPUT],
    output: [u8; OUTPUT],
}

impl Buffers {
    /// Empty ones.
    pub const fn new() -> Self {
        Buffers { input: [0; INPUT], output: [0; OUTPUT] }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// Stages of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No connection.
    Free,
    /// The guest has asked the host for one.
    Asked,
    /// Open.
    Open,
    /// Open, but all that is left to do is to send what waits and close.
    Finishing,
    /// The guest has closed and waits for the host to agree.
    Closed,
}

/// A connection. All counters of bytes wrap around, as the protocol has it.
#[derive(Clone, Copy)]
struct Connection {
    stage: Stage,
    peer_cid: u64,
    peer_port: u32,
    port: u32,
    /// The peer's buffer, what it has taken out of it, and what the guest has sent.
    peer_buffer: u32,
    peer_taken: u32,
    sent: u32,
    /// What the guest has taken of what the peer sent, and what it last told the peer about that.
    taken: u32,
    told: u32,
    /// Filled parts of [`Buffers`].
    input: u16,
    output: u16,
    asked_for_credit: bool,
    /// The request that waits for a tick, and the tick.
    waits: Option<(u32, u64)>,
}

impl Connection {
    const FREE: Self = Connection {
        stage: Stage::Free,
        peer_cid: 0,
        peer_port: 0,
        port: 0,
        peer_buffer: 0,
        peer_taken: 0,
        sent: 0,
        taken: 0,
        told: 0,
        input: 0,
        output: 0,
        asked_for_credit: false,
        waits: None,
    };

    /// How many bytes the peer has room for.
    fn credit(&self) -> usize {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_taken)) as usize
    }

    /// Whether the peer should hear that there is room again.
    fn owes_credit(&self) -> bool {
        self.taken.wrapping_sub(self.told) as usize >= INPUT / 4
    }

    fn send(&mut self, cid: u64, wire: &mut impl Wire, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: cid,
            dst_cid: self.peer_cid,
            src_port: self.port,
            dst_port: self.peer_port,
            len: payload.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: INPUT as u32,
            fwd_cnt: self.taken,
        };
        self.told = self.taken;
        self.sent = self.sent.wrapping_add(payload.len() as u32);
        wire.send(&header, payload);
    }

    /// Sends an answer, or keeps it until it can be sent. There is room to keep it.
    fn answer(&mut self, cid: u64, wire: &mut impl Wire, output: &mut [u8; OUTPUT], answer: &[u8]) {
        let kept = usize::from(self.output);
        if kept == 0 && answer.len() <= self.credit() && wire.room() >= ROOM_PER_PACKET {
            self.send(cid, wire, op::RW, 0, answer);
        } else {
            output[kept..kept + answer.len()].copy_from_slice(answer);
            self.output += answer.len() as u16;
        }
    }

    /// Sends what has been kept, as far as room and credit go.
    fn flush(&mut self, cid: u64, wire: &mut impl Wire, output: &mut [u8; OUTPUT], payload: usize) {
        while self.output > 0 && wire.room() >= ROOM_PER_PACKET {
            let kept = usize::from(self.output);
            let len = kept.min(self.credit()).min(payload);
            if len == 0 {
                if !self.asked_for_credit {
                    self.asked_for_credit = true;
                    self.send(cid, wire, op::CREDIT_REQUEST, 0, &[]);
                }
                return;
            }
            self.send(cid, wire, op::RW, 0, &output[..len]);
            output.copy_within(len..kept, 0);
            self.output -= len as u16;
        }
    }

    /// Whether another request may be served: requests are answered in order, and each needs room for its answer.
    fn may_serve(&self) -> bool {
        self.stage != Stage::Closed && self.waits.is_none() && usize::from(self.output) + MAX_ANSWER <= OUTPUT
    }
}

/// Serves the requests that `bytes` begins with. Returns how many bytes they were, or nothing if a request is broken.
fn serve<M: Machine, W: Wire>(
    connection: &mut Connection,
    cid: u64,
    bytes: &[u8],
    output: &mut [u8; OUTPUT],
    agent: &mut Agent<M>,
    wire: &mut W,
) -> Option<usize> {
    let mut at = 0;
    while connection.may_serve() {
        match frames::next(&bytes[at..]) {
            Next::More => break,
            Next::Broken => return None,
            Next::Frame(request, len) => {
                at += len;
                connection.taken = connection.taken.wrapping_add(len as u32);
                match agent.serve(&request.body) {
                    Outcome::Answer(response) => {
                        connection.answer(cid, wire, output, Answer::new(request.id, response).bytes());
                    }
                    Outcome::AtTick(tick) => connection.waits = Some((request.id, tick)),
                    Outcome::Nothing => {}
                }
            }
        }
    }
    Some(at)
}

/// All connections.
pub struct Vsock {
    cid: u64,
    connections: [Connection; MAX_CONNECTIONS],
}

impl Vsock {
    /// No connections yet, of a guest with this CID.
    pub const fn new(cid: u64) -> Self {
        Vsock { cid, connections: [Connection::FREE; MAX_CONNECTIONS] }
    }

    /// Forgets all connections: the device's other side has been exchanged, as after a restore.
    pub fn reset(&mut self, cid: u64) {
        *self = Self::new(cid);
    }

    /// Begins to tell the host that the guest is ready.
    pub fn announce(&mut self, wire: &mut impl Wire) {
        let connection = &mut self.connections[0];
        *connection = Connection {
            stage: Stage::Asked,
            peer_cid: HOST_CID,
            peer_port: READY_PORT,
            port: EPHEMERAL_PORT,
            ..Connection::FREE
        };
        connection.send(self.cid, wire, op::REQUEST, 0, &[]);
    }

    /// Whether somebody waits for a tick.
    pub fn waits(&self) -> bool {
        self.connections.iter().any(|connection| connection.waits.is_some())
    }

    /// Takes a packet. The wire has room for [`ROOM_PER_PACKET`].
    pub fn receive<M: Machine, W: Wire>(
        &mut self,
        header: &Header,
        payload: &[u8],
        buffers: &mut [Buffers; MAX_CONNECTIONS],
        agent: &mut Agent<M>,
        wire: &mut W,
    ) {
        let found = self.connections.iter().position(|c| {
            c.stage != Stage::Free
                && (c.peer_cid, c.peer_port, c.port) == (header.src_cid, header.src_port, header.dst_port)
        });
        let sound = header.kind == STREAM && header.dst_cid == self.cid;
        match (header.op, found) {
            (op::REQUEST, found) if sound && header.dst_port == AGENT_PORT => self.accept(found, header, wire),
            (op::RST, Some(index)) => self.connections[index] = Connection::FREE,
            (op::RST, None) => {}
            (_, Some(index)) if sound => self.on_packet(index, header, payload, &mut buffers[index], agent, wire),
            _ => self.refuse(header, wire),
        }
    }

    /// Opens a connection, in place of an old one between the same ports if there is one: the host has forgotten it.
    fn accept(&mut self, found: Option<usize>, header: &Header, wire: &mut impl Wire) {
        let place = |stage: Stage| self.connections.iter().position(|c| c.stage == stage);
        match found.or_else(|| place(Stage::Free)).or_else(|| place(Stage::Closed)) {
            None => self.refuse(header, wire),
            Some(index) => {
                let connection = &mut self.connections[index];
                *connection = Connection {
                    stage: Stage::Open,
                    peer_cid: header.src_cid,
                    peer_port: header.src_port,
                    port: header.dst_port,
                    peer_buffer: header.buf_alloc,
                    peer_taken: header.fwd_cnt,
                    ..Connection::FREE
                };
                connection.send(self.cid, wire, op::RESPONSE, 0, &[]);
            }
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&self, header: &Header, wire: &mut impl Wire) {
        let answer = Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: op::RST,
            ..Header::default()
        };
        wire.send(&answer, &[]);
    }

    /// A packet of connection `index`.
    fn on_packet<M: Machine, W: Wire>(
        &mut self,
        index: usize,
        header: &Header,
        payload: &[u8],
        buffers: &mut Buffers,
        agent: &mut Agent<M>,
        wire: &mut W,
    ) {
        let cid = self.cid;
        let connection = &mut self.connections[index];
        connection.peer_buffer = header.buf_alloc;
        connection.peer_taken = header.fwd_cnt;
        connection.asked_for_credit = false;
        let fine = match (header.op, connection.stage) {
            (op::RESPONSE, Stage::Asked) => {
                connection.stage = Stage::Finishing;
                connection.answer(cid, wire, &mut buffers.output, Answer::new(0, frames::READY).bytes());
                true
            }
            (op::RW, Stage::Open) => Self::on_data(connection, cid, payload, buffers, agent, wire),
            (op::RW, Stage::Finishing | Stage::Closed) => true,
            (op::SHUTDOWN, Stage::Open | Stage::Finishing | Stage::Closed) => {
                // Nobody reads answers any more, or the guest was only waiting for this: agree by a reset.
                let over = header.flags & SHUTDOWN_RECEIVE != 0 || connection.stage == Stage::Closed;
                if header.flags & SHUTDOWN_SEND != 0 && !over {
                    connection.stage = Stage::Finishing;
                }
                !over
            }
            (op::CREDIT_UPDATE, _) => true,
            (op::CREDIT_REQUEST, _) => {
                connection.send(cid, wire, op::CREDIT_UPDATE, 0, &[]);
                true
            }
            _ => false,
        };
        if !fine {
            connection.send(cid, wire, op::RST, 0, &[]);
            *connection = Connection::FREE;
        } else if connection.owes_credit() {
            connection.send(cid, wire, op::CREDIT_UPDATE, 0, &[]);
        }
    }

    /// Serves what has arrived and keeps what is incomplete or has to wait. False if the peer has broken the protocol.
    fn on_data<M: Machine, W: Wire>(
        connection: &mut Connection,
        cid: u64,
        payload: &[u8],
        buffers: &mut Buffers,
        agent: &mut Agent<M>,
        wire: &mut W,
    ) -> bool {
        let mut rest = payload;
        if connection.input == 0 {
            match serve(connection, cid, payload, &mut buffers.output, agent, wire) {
                Some(served) => rest = &payload[served..],
                None => return false,
            }
        }
        if rest.is_empty() {
            return true;
        }
        let kept = usize::from(connection.input);
        let Some(room) = buffers.input.get_mut(kept..kept + rest.len()) else { return false };
        room.copy_from_slice(rest);
        connection.input += rest.len() as u16;
        kept == 0 || Self::serve_kept(connection, cid, buffers, agent, wire)
    }

    /// Serves requests that have been kept. False if the peer has broken the protocol.
    fn serve_kept<M: Machine, W: Wire>(
        connection: &mut Connection,
        cid: u64,
        buffers: &mut Buffers,
        agent: &mut Agent<M>,
        wire: &mut W,
    ) -> bool {
        let kept = usize::from(connection.input);
        match serve(connection, cid, &buffers.input[..kept], &mut buffers.output, agent, wire) {
            None => false,
            Some(0) => true,
            Some(served) => {
                buffers.input.copy_within(served..kept, 0);
                connection.input -= served as u16;
                true
            }
        }
    }

    /// Does what has become possible without a packet: answers whose tick has come, answers for which there is room
    /// again, requests behind them, and closing.
    pub fn proceed<M: Machine, W: Wire>(
        &mut self,
        buffers: &mut [Buffers; MAX_CONNECTIONS],
        agent: &mut Agent<M>,
        wire: &mut W,
    ) {
        let cid = self.cid;
        for (connection, buffers) in self.connections.iter_mut().zip(buffers) {
            if !matches!(connection.stage, Stage::Open | Stage::Finishing) || wire.room() < ROOM_PER_PACKET {
                continue;
            }
            if let Some((id, _)) = connection.waits.take_if(|(_, tick)| *tick <= agent.ticks()) {
                let answer = Answer::new(id, agent.ticks_so_far());
                connection.answer(cid, wire, &mut buffers.output, answer.bytes());
            }
            connection.flush(cid, wire, &mut buffers.output, W::PAYLOAD);
            let fine = connection.input == 0 || Self::serve_kept(connection, cid, buffers, agent, wire);
            if !fine {
                connection.send(cid, wire, op::RST, 0, &[]);
                *connection = Connection::FREE;
                continue;
            }
            if wire.room() < ROOM_PER_PACKET {
                continue;
            }
            if connection.stage == Stage::Finishing && connection.output == 0 && connection.waits.is_none() {
                connection.stage = Stage::Closed;
                connection.send(cid, wire, op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, &[]);
            } else if connection.owes_credit() {
                connection.send(cid, wire, op::CREDIT_UPDATE, 0, &[]);
            }
        }
    }
}
