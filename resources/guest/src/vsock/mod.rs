//! Virtio-vsock connections (virtio 1.2, 5.10), without the queues below them.
//!
//! A connection serves agent requests in order. In the common case a packet holds whole requests, which are served
//! where they lie and answered at once; [`Buffers`] hold what does not fit that case (a request cut in two, an answer
//! that the peer gives no credit for), and are not touched otherwise: a clone pays for every page that it writes.
//!
//! [`Wire::room`] packets can be sent at any time. Whoever feeds packets in leaves room for two, of which answers never
//! take the last: it is for control packets, so these always go out at once and need no memory.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use crate::agent::{Agent, Machine};
use crate::frames::{Answer, READY};
use api_spec::agent::{AGENT_PORT, READY_PORT};
pub use connection::Buffers;
use connection::{Broken, Connection, Stage};
pub use packet::{Header, PACKET_HEADER, Wire};
use packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 16;
/// The room that a packet needs before it is fed in.
pub const ROOM_PER_PACKET: usize = 2;

const HOST_CID: u64 = 2;
/// The port from which the guest announces that it is ready.
const EPHEMERAL_PORT: u32 = 0xc000_0000;

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

    /// Whether somebody waits for a tick.
    pub fn waits(&self) -> bool {
        self.connections.iter().any(Connection::waits)
    }

    /// Begins to tell the host that the guest is ready.
    pub fn announce(&mut self, wire: &mut impl Wire) {
        let connection = &mut self.connections[0];
        *connection = Connection::new(Stage::Asked, (self.cid, EPHEMERAL_PORT), (HOST_CID, READY_PORT));
        connection.control(wire, op::REQUEST, 0);
    }

    /// Takes a packet. The wire has room for [`ROOM_PER_PACKET`].
    pub fn receive<M: Machine>(
        &mut self,
        header: &Header,
        payload: &[u8],
        buffers: &mut [Buffers; MAX_CONNECTIONS],
        agent: &mut Agent<M>,
        wire: &mut impl Wire,
    ) {
        let found = self.connections.iter().position(|connection| connection.is_of(header));
        let sound = header.kind == STREAM && header.dst_cid == self.cid;
        match (header.op, found) {
            (op::REQUEST, found) if sound && header.dst_port == AGENT_PORT => self.accept(found, header, wire),
            (op::RST, Some(index)) => self.connections[index] = Connection::FREE,
            (op::RST, None) => {}
            (_, Some(index)) if sound => {
                let connection = &mut self.connections[index];
                connection.note_credit(header);
                let result = on_packet(connection, header, payload, &mut buffers[index], agent, wire);
                settle(connection, result, wire);
            }
            _ => refuse(header, wire),
        }
    }

    /// Opens a connection, in place of an old one between the same ports if there is one: the host has forgotten it.
    fn accept(&mut self, found: Option<usize>, header: &Header, wire: &mut impl Wire) {
        let place = |stage| self.connections.iter().position(|connection| connection.stage == stage);
        let Some(index) = found.or_else(|| place(Stage::Free)).or_else(|| place(Stage::Closed)) else {
            return refuse(header, wire);
        };
        let connection = &mut self.connections[index];
        let (guest, peer) = ((header.dst_cid, header.dst_port), (header.src_cid, header.src_port));
        *connection = Connection::new(Stage::Open, guest, peer);
        connection.note_credit(header);
        connection.control(wire, op::RESPONSE, 0);
    }

    /// Does what has become possible without a packet: answers whose tick has come, answers for which there is room
    /// again, requests behind them, and closing.
    pub fn proceed<M: Machine>(
        &mut self,
        buffers: &mut [Buffers; MAX_CONNECTIONS],
        agent: &mut Agent<M>,
        wire: &mut impl Wire,
    ) {
        for (connection, buffers) in self.connections.iter_mut().zip(buffers) {
            if !matches!(connection.stage, Stage::Open | Stage::Finishing) || wire.room() < ROOM_PER_PACKET {
                continue;
            }
            connection.answer_tick(buffers, agent, wire);
            connection.flush(buffers, wire);
            let result = connection.serve_kept(buffers, agent, wire);
            if result.is_ok() && wire.room() < ROOM_PER_PACKET {
                continue;
            }
            if result.is_ok() && connection.stage == Stage::Finishing && connection.is_done() {
                connection.stage = Stage::Closed;
                connection.control(wire, op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
            } else {
                settle(connection, result, wire);
            }
        }
    }
}

/// Resets a broken connection; tells the peer of a sound one that there is room again.
fn settle(connection: &mut Connection, result: Result<(), Broken>, wire: &mut impl Wire) {
    if result.is_err() {
        connection.control(wire, op::RST, 0);
        *connection = Connection::FREE;
    } else if connection.owes_credit() {
        connection.control(wire, op::CREDIT_UPDATE, 0);
    }
}

/// Answers a packet that belongs to no connection.
fn refuse(header: &Header, wire: &mut impl Wire) {
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

/// A packet of a connection. Failing ends the connection.
fn on_packet<M: Machine>(
    connection: &mut Connection,
    header: &Header,
    payload: &[u8],
    buffers: &mut Buffers,
    agent: &mut Agent<M>,
    wire: &mut impl Wire,
) -> Result<(), Broken> {
    match (header.op, connection.stage) {
        (op::RESPONSE, Stage::Asked) => {
            connection.stage = Stage::Finishing;
            connection.answer(&Answer::new(0, READY), buffers, wire);
        }
        (op::RW, Stage::Open) => connection.take(payload, buffers, agent, wire)?,
        (op::RW, Stage::Finishing | Stage::Closed) => {}
        // The host takes no more bytes, or agrees to what the guest has closed: over.
        (op::SHUTDOWN, Stage::Closed) => return Err(Broken),
        (op::SHUTDOWN, _) if header.flags & SHUTDOWN_RECEIVE != 0 => return Err(Broken),
        (op::SHUTDOWN, Stage::Open | Stage::Finishing) => {
            if header.flags & SHUTDOWN_SEND != 0 {
                connection.stage = Stage::Finishing;
            }
        }
        (op::CREDIT_UPDATE, _) => {}
        (op::CREDIT_REQUEST, _) => connection.control(wire, op::CREDIT_UPDATE, 0),
        _ => return Err(Broken),
    }
    Ok(())
}
