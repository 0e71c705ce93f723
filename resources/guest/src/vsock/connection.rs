//! One connection: a stream of requests in, a stream of answers out, and credit for both.

use super::ROOM_PER_PACKET;
use super::packet::{Header, STREAM, Wire, op};
use crate::agent::{Agent, Machine, Outcome};
use crate::frames::{self, Answer, MAX_ANSWER, MAX_BODY, Next};
use api_spec::agent::HEADER_LEN;

/// What the peer may send ahead of the guest: two of the longest requests.
pub const INPUT: usize = 2 * (HEADER_LEN + MAX_BODY);
/// Answers that are kept when the peer gives no credit; after that its requests have to wait.
const OUTPUT: usize = 512;

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

/// The peer has sent what is no request, or more than it was given credit for.
pub struct Broken;

/// Stages of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
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
pub struct Connection {
    pub stage: Stage,
    /// Both ends.
    cid: u64,
    port: u32,
    peer_cid: u64,
    peer_port: u32,
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
    /// None.
    pub const FREE: Self = Connection {
        stage: Stage::Free,
        cid: 0,
        port: 0,
        peer_cid: 0,
        peer_port: 0,
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

    /// One at `stage` between the guest's CID and port and the peer's.
    pub fn new(stage: Stage, (cid, port): (u64, u32), (peer_cid, peer_port): (u64, u32)) -> Self {
        Connection { stage, cid, port, peer_cid, peer_port, ..Self::FREE }
    }

    /// Whether a packet with this header is for this connection.
    pub fn is_of(&self, header: &Header) -> bool {
        self.stage != Stage::Free
            && (self.peer_cid, self.peer_port, self.port) == (header.src_cid, header.src_port, header.dst_port)
    }

    /// Whether it waits for a tick.
    pub fn waits(&self) -> bool {
        self.waits.is_some()
    }

    /// Whether nothing is left to be sent.
    pub fn is_done(&self) -> bool {
        self.output == 0 && self.waits.is_none()
    }

    /// Takes note of the credit that comes with each packet. A peer that has been asked for more and has none says so
    /// when it has; asking again at once would go on for ever.
    pub fn note_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_taken = header.fwd_cnt;
        self.asked_for_credit &= self.credit() == 0;
    }

    /// Whether the peer should hear that there is room again.
    pub fn owes_credit(&self) -> bool {
        self.taken.wrapping_sub(self.told) as usize >= INPUT / 4
    }

    /// How many bytes the peer has room for.
    fn credit(&self) -> usize {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_taken)) as usize
    }

    /// Sends a packet without bytes.
    pub fn control(&mut self, wire: &mut impl Wire, op: u16, flags: u32) {
        self.send(wire, op, flags, &[]);
    }

    fn send(&mut self, wire: &mut impl Wire, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: self.cid,
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
    pub fn answer(&mut self, answer: &Answer, buffers: &mut Buffers, wire: &mut impl Wire) {
        self.answer_or_keep(answer.bytes(), &mut buffers.output, wire);
    }

    fn answer_or_keep(&mut self, answer: &[u8], output: &mut [u8; OUTPUT], wire: &mut impl Wire) {
        let kept = usize::from(self.output);
        if kept == 0 && answer.len() <= self.credit() && wire.room() >= ROOM_PER_PACKET {
            self.send(wire, op::RW, 0, answer);
        } else {
            output[kept..kept + answer.len()].copy_from_slice(answer);
            self.output += answer.len() as u16;
        }
    }

    /// Sends what has been kept, as far as room and credit go.
    pub fn flush<W: Wire>(&mut self, buffers: &mut Buffers, wire: &mut W) {
        while self.output > 0 && wire.room() >= ROOM_PER_PACKET {
            let kept = usize::from(self.output);
            let len = kept.min(self.credit()).min(W::PAYLOAD);
            if len == 0 {
                if !self.asked_for_credit {
                    self.asked_for_credit = true;
                    self.control(wire, op::CREDIT_REQUEST, 0);
                }
                return;
            }
            self.send(wire, op::RW, 0, &buffers.output[..len]);
            buffers.output.copy_within(len..kept, 0);
            self.output -= len as u16;
        }
    }

    /// Answers the request that waits for a tick, if that has come.
    pub fn answer_tick<M: Machine>(&mut self, buffers: &mut Buffers, agent: &Agent<M>, wire: &mut impl Wire) {
        if let Some((id, _)) = self.waits.take_if(|(_, tick)| *tick <= agent.ticks()) {
            self.answer(&Answer::new(id, agent.ticks_so_far()), buffers, wire);
        }
    }

    /// Serves what has arrived and keeps what is incomplete or has to wait.
    pub fn take<M: Machine>(
        &mut self,
        payload: &[u8],
        buffers: &mut Buffers,
        agent: &mut Agent<M>,
        wire: &mut impl Wire,
    ) -> Result<(), Broken> {
        let mut rest = payload;
        if self.input == 0 {
            let served = self.serve(payload, &mut buffers.output, agent, wire)?;
            rest = &payload[served..];
        }
        if rest.is_empty() {
            return Ok(());
        }
        let kept = usize::from(self.input);
        buffers.input.get_mut(kept..kept + rest.len()).ok_or(Broken)?.copy_from_slice(rest);
        self.input += rest.len() as u16;
        if kept == 0 { Ok(()) } else { self.serve_kept(buffers, agent, wire) }
    }

    /// Serves requests that have been kept.
    pub fn serve_kept<M: Machine>(
        &mut self,
        buffers: &mut Buffers,
        agent: &mut Agent<M>,
        wire: &mut impl Wire,
    ) -> Result<(), Broken> {
        let kept = usize::from(self.input);
        let served = self.serve(&buffers.input[..kept], &mut buffers.output, agent, wire)?;
        if served > 0 {
            buffers.input.copy_within(served..kept, 0);
            self.input -= served as u16;
        }
        Ok(())
    }

    /// Serves the requests that `bytes` begins with, and returns how many bytes they were.
    fn serve<M: Machine>(
        &mut self,
        bytes: &[u8],
        output: &mut [u8; OUTPUT],
        agent: &mut Agent<M>,
        wire: &mut impl Wire,
    ) -> Result<usize, Broken> {
        let mut at = 0;
        while self.may_serve() {
            match frames::next(&bytes[at..]) {
                Next::More => break,
                Next::Broken => return Err(Broken),
                Next::Frame(request, len) => {
                    at += len;
                    self.taken = self.taken.wrapping_add(len as u32);
                    match agent.serve(&request.body) {
                        Outcome::Answer(response) => {
                            self.answer_or_keep(Answer::new(request.id, response).bytes(), output, wire);
                        }
                        Outcome::AtTick(tick) => self.waits = Some((request.id, tick)),
                        Outcome::Nothing => {}
                    }
                }
            }
        }
        Ok(at)
    }

    /// Whether another request may be served: requests are answered in order, and each needs room for its answer.
    fn may_serve(&self) -> bool {
        self.waits.is_none() && usize::from(self.output) + MAX_ANSWER <= OUTPUT
    }
}
