//! One stream between a port of the host and a port of the guest: a state machine without any I/O.
//!
//! ```text
//!   host asks:   Requested ── RESPONSE ──> Open          guest asks:   Open (a RESPONSE is owed)
//!                                           │
//!   each direction ends by itself:          │ host's end of file  -> SHUTDOWN(no send) once all data is sent
//!                                           │ host is gone        -> SHUTDOWN(no receive)
//!                                           │ SHUTDOWN of guest   -> end of file for the host once all data is there
//!                                           v
//!   over: both ends shut by the guest (answered with RST), RST from the guest, or a broken rule (RST)
//! ```
//!
//! Credit works the same both ways (virtio 1.2, section 5.10.6.3): a sender never has more bytes under way than the
//! receiver said it has room for, counting by `sent - fwd_cnt`, modulo 2^32.

use std::collections::VecDeque;

use super::packet::{BOTH_ENDS, Header, NO_RECEIVE, NO_SEND, STREAM, op};

/// How many bytes a connection keeps in each direction. The guest is told this as our `buf_alloc`.
pub const BUFFER: usize = 64 * 1024;

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

/// What a packet from the guest means for whoever owns the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing beyond what the connection remembers.
    Noted,
    /// The guest has accepted the host's request.
    Accepted,
    /// The guest has broken the rules; the connection must be reset.
    Broken,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over and the guest must be told.
    Reset,
    /// It is over and the guest knows.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host has asked and the guest has not answered.
    Requested,
    /// Data may flow.
    Open,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    phase: Phase,

    // Host to guest.
    to_guest: VecDeque<u8>,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes of these that the guest has consumed, modulo 2^32.
    guest_consumed: u32,
    /// How many bytes the guest has room for in all.
    guest_room: u32,
    /// The host will send no more.
    host_ended: bool,

    // Guest to host.
    to_host: VecDeque<u8>,
    /// Bytes that the host has consumed, modulo 2^32.
    consumed: u32,
    /// How many of them the guest knows of.
    announced: u32,
    /// The host receives no more: what the guest sends is thrown away.
    host_gone: bool,
    /// Which ends the guest has shut.
    guest_shut: u32,
    /// The guest has reset the connection: nothing is sent to it any more.
    guest_gone: bool,

    // Packets owed to the guest.
    owes_request: bool,
    owes_response: bool,
    owes_credit: bool,
    /// The guest has been asked for credit since it last had any.
    asked_credit: bool,
    /// Which ends the guest has been told to be shut.
    told_shut: u32,
}

impl Connection {
    /// A connection that the host asks for.
    pub fn requested(ports: Ports) -> Self {
        Connection {
            ports,
            phase: Phase::Requested,
            to_guest: VecDeque::new(),
            sent: 0,
            guest_consumed: 0,
            guest_room: 0,
            host_ended: false,
            to_host: VecDeque::new(),
            consumed: 0,
            announced: 0,
            host_gone: false,
            guest_shut: 0,
            guest_gone: false,
            owes_request: true,
            owes_response: false,
            owes_credit: false,
            asked_credit: false,
            told_shut: 0,
        }
    }

    /// A connection that the guest has asked for with `request`, and that the host accepts.
    pub fn accepted(ports: Ports, request: &Header) -> Self {
        let mut connection =
            Connection { phase: Phase::Open, owes_request: false, owes_response: true, ..Connection::requested(ports) };
        connection.take_credit(request);
        connection
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Takes in a packet from the guest.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) -> Received {
        if header.op == op::RST {
            self.guest_gone = true;
            self.to_guest.clear();
            return Received::Noted;
        }
        if self.guest_gone {
            return Received::Broken;
        }
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) if !self.owes_request => {
                self.phase = Phase::Open;
                Received::Accepted
            }
            (Phase::Open, op::RW) => self.receive_data(header, payload),
            (Phase::Open, op::CREDIT_UPDATE) => Received::Noted,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.owes_credit = true;
                Received::Noted
            }
            (Phase::Open, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & BOTH_ENDS;
                if self.guest_shut & NO_RECEIVE != 0 {
                    self.to_guest.clear();
                }
                Received::Noted
            }
            _ => Received::Broken,
        }
    }

    fn receive_data(&mut self, header: &Header, payload: &[u8]) -> Received {
        let shut = self.guest_shut & NO_SEND != 0;
        let room = BUFFER - self.to_host.len();
        if shut || payload.len() != header.len as usize || payload.len() > room {
            return Received::Broken;
        }
        self.to_host.extend(payload);
        if self.host_gone {
            self.host_took(payload.len());
        }
        Received::Noted
    }

    /// Every packet of the guest carries its credit.
    fn take_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        // Packets of several threads in the guest may overtake each other: an older count is not taken back, and one
        // beyond what was sent is not believed.
        let under_way = self.sent.wrapping_sub(self.guest_consumed);
        let progress = header.fwd_cnt.wrapping_sub(self.guest_consumed);
        if progress <= under_way {
            self.guest_consumed = header.fwd_cnt;
        }
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// How many bytes the guest has room for now.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_consumed);
        self.guest_room.saturating_sub(under_way) as usize
    }

    /// How many bytes may be read from the host now.
    pub fn host_room(&self) -> usize {
        let ended = self.host_ended || self.guest_gone || self.guest_shut & NO_RECEIVE != 0;
        if ended { 0 } else { BUFFER - self.to_guest.len() }
    }

    /// Takes bytes read from the host, at most [`Connection::host_room`].
    pub fn from_host(&mut self, data: &[u8]) {
        debug_assert!(data.len() <= self.host_room());
        self.to_guest.extend(data);
    }

    /// The host sends no more.
    pub fn host_ended(&mut self) {
        self.host_ended = true;
    }

    /// Whether the host is known to send no more.
    pub fn has_host_ended(&self) -> bool {
        self.host_ended
    }

    /// The host receives no more.
    pub fn host_gone(&mut self) {
        self.host_gone = true;
        self.host_took(self.to_host.len());
    }

    /// The next bytes for the host.
    pub fn for_host(&self) -> &[u8] {
        let (first, second) = self.to_host.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// The host has taken `count` bytes of [`Connection::for_host`].
    pub fn host_took(&mut self, count: usize) {
        self.to_host.drain(..count);
        self.consumed = self.consumed.wrapping_add(count as u32);
        // Telling of every byte would cost a packet each; a sender that waits has been told of less than half.
        if self.consumed.wrapping_sub(self.announced) as usize >= BUFFER / 2 {
            self.owes_credit = true;
        }
    }

    /// Whether the host has all that the guest will ever send it.
    pub fn nothing_more_for_host(&self) -> bool {
        let ended = self.guest_gone || self.guest_shut & NO_SEND != 0;
        ended && self.to_host.is_empty()
    }

    /// Whether the guest takes nothing more from the host.
    pub fn guest_takes_nothing(&self) -> bool {
        self.guest_gone || self.guest_shut & NO_RECEIVE != 0
    }

    /// Whether the connection is over.
    pub fn fate(&self) -> Fate {
        let delivered = self.to_host.is_empty();
        if self.guest_gone {
            return if delivered { Fate::Over } else { Fate::Lives };
        }
        match self.phase {
            Phase::Requested if self.host_gone && self.owes_request => Fate::Over,
            Phase::Requested if self.host_gone => Fate::Reset,
            Phase::Open if self.guest_shut == BOTH_ENDS && delivered => Fate::Reset,
            _ => Fate::Lives,
        }
    }

    /// Whether only the guest's last word is missing: when room for connections is short, these go first.
    pub fn waits_for_last_word(&self) -> bool {
        self.told_shut == BOTH_ENDS || self.guest_gone
    }

    /// Which ends the guest is still to be told to be shut.
    fn shut_to_tell(&self) -> u32 {
        let no_send = if self.host_ended && self.to_guest.is_empty() { NO_SEND } else { 0 };
        let no_receive = if self.host_gone { NO_RECEIVE } else { 0 };
        let shut = no_send | no_receive;
        if shut & !self.told_shut != 0 { shut } else { 0 }
    }

    /// Whether there is a packet for the guest.
    pub fn has_packet(&self) -> bool {
        if self.guest_gone {
            return false;
        }
        match self.phase {
            Phase::Requested => self.owes_request,
            Phase::Open => {
                let data = !self.to_guest.is_empty() && (self.credit() > 0 || !self.asked_credit);
                self.owes_response || self.owes_credit || data || self.shut_to_tell() != 0
            }
        }
    }

    /// The next packet for the guest, if there is one, with at most `room` bytes of payload. The context ids are for
    /// the caller to fill in.
    pub fn next_packet(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Header> {
        payload.clear();
        if !self.has_packet() {
            return None;
        }
        let (op, flags) = self.next_op(room, payload);
        self.owes_credit = false;
        self.announced = self.consumed;
        Some(Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: payload.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER as u32,
            fwd_cnt: self.consumed,
            ..Header::default()
        })
    }

    fn next_op(&mut self, room: usize, payload: &mut Vec<u8>) -> (u16, u32) {
        if std::mem::take(&mut self.owes_request) {
            return (op::REQUEST, 0);
        }
        if std::mem::take(&mut self.owes_response) {
            return (op::RESPONSE, 0);
        }
        let len = room.min(self.credit()).min(self.to_guest.len());
        if len > 0 {
            payload.extend(self.to_guest.drain(..len));
            self.sent = self.sent.wrapping_add(len as u32);
            return (op::RW, 0);
        }
        let shut = self.shut_to_tell();
        if shut != 0 {
            self.told_shut |= shut;
            return (op::SHUTDOWN, shut);
        }
        if !self.to_guest.is_empty() && !self.asked_credit {
            self.asked_credit = true;
            return (op::CREDIT_REQUEST, 0);
        }
        (op::CREDIT_UPDATE, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PORTS: Ports = Ports { host: 1024, guest: 5000 };

    fn packet(op: u16) -> Header {
        Header { op, kind: STREAM, buf_alloc: 1 << 20, ..Header::default() }
    }

    fn data(payload: &[u8]) -> Header {
        Header { len: payload.len() as u32, ..packet(op::RW) }
    }

    fn shutdown(flags: u32) -> Header {
        Header { flags, ..packet(op::SHUTDOWN) }
    }

    fn next(connection: &mut Connection) -> Option<(u16, Vec<u8>)> {
        let mut payload = Vec::new();
        connection.next_packet(4096, &mut payload).map(|header| (header.op, payload))
    }

    /// A connection that the guest has asked for and been answered.
    fn open() -> Connection {
        let mut connection = Connection::accepted(PORTS, &packet(op::REQUEST));
        assert_eq!(next(&mut connection).unwrap().0, op::RESPONSE);
        connection
    }

    #[test]
    fn a_request_of_the_host_waits_for_its_answer() {
        let mut connection = Connection::requested(PORTS);
        connection.from_host(b"early");
        assert_eq!(connection.receive(&packet(op::RESPONSE), &[]), Received::Broken, "nothing has been asked");
        assert_eq!(next(&mut connection).unwrap().0, op::REQUEST);
        assert!(!connection.has_packet(), "no data before the answer");
        assert_eq!(connection.receive(&packet(op::RESPONSE), &[]), Received::Accepted);
        assert_eq!(next(&mut connection), Some((op::RW, b"early".to_vec())));
    }

    #[test]
    fn a_refused_request_is_over() {
        let mut connection = Connection::requested(PORTS);
        next(&mut connection);
        assert_eq!(connection.receive(&packet(op::RST), &[]), Received::Noted);
        assert_eq!(connection.fate(), Fate::Over);
    }

    #[test]
    fn a_client_that_leaves_early_is_taken_back() {
        let mut connection = Connection::requested(PORTS);
        connection.host_gone();
        assert_eq!(connection.fate(), Fate::Over, "the guest has not heard of it");
        let mut connection = Connection::requested(PORTS);
        next(&mut connection);
        connection.host_gone();
        assert_eq!(connection.fate(), Fate::Reset);
    }

    #[test]
    fn broken_rules_are_noticed() {
        let broken = |header: Header, payload: &[u8]| open().receive(&header, payload) == Received::Broken;
        assert!(broken(packet(op::REQUEST), &[]));
        assert!(broken(packet(op::RESPONSE), &[]));
        assert!(broken(packet(0), &[]));
        assert!(broken(packet(8), &[]));
        assert!(broken(data(&[0; BUFFER + 1]), &[0; BUFFER + 1]), "more than there is room for");
        assert!(broken(Header { len: u32::MAX, ..packet(op::RW) }, &[]), "a payload too long to be read");
        let mut connection = open();
        connection.receive(&shutdown(NO_SEND), &[]);
        assert_eq!(connection.receive(&data(b"x"), b"x"), Received::Broken, "data after the end");
    }

    #[test]
    fn the_hosts_end_follows_its_last_byte() {
        let mut connection = open();
        connection.from_host(b"last");
        connection.host_ended();
        assert_eq!(connection.host_room(), 0);
        assert_eq!(next(&mut connection), Some((op::RW, b"last".to_vec())));
        let mut payload = Vec::new();
        let end = connection.next_packet(100, &mut payload).unwrap();
        assert_eq!((end.op, end.flags), (op::SHUTDOWN, NO_SEND));
        assert_eq!(next(&mut connection), None, "said once");
        assert_eq!(connection.receive(&data(b"still"), b"still"), Received::Noted, "the other way is open");
        assert_eq!(connection.for_host(), b"still");
    }

    #[test]
    fn the_guests_end_follows_its_last_byte() {
        let mut connection = open();
        connection.receive(&data(b"last"), b"last");
        connection.receive(&shutdown(NO_SEND), &[]);
        assert!(!connection.nothing_more_for_host());
        connection.host_took(4);
        assert!(connection.nothing_more_for_host());
        connection.from_host(b"still");
        assert_eq!(next(&mut connection), Some((op::RW, b"still".to_vec())));
        assert_eq!(connection.fate(), Fate::Lives);
        connection.receive(&shutdown(NO_RECEIVE), &[]);
        assert_eq!(connection.fate(), Fate::Reset, "both ends are shut: the guest waits for the reset");
    }

    #[test]
    fn a_reset_still_delivers_what_came_before() {
        let mut connection = open();
        connection.receive(&data(b"last"), b"last");
        connection.from_host(b"too late");
        connection.receive(&packet(op::RST), &[]);
        assert!(!connection.has_packet());
        assert_eq!(connection.fate(), Fate::Lives);
        connection.host_took(4);
        assert_eq!(connection.fate(), Fate::Over);
        assert_eq!(connection.receive(&packet(op::RST), &[]), Received::Noted, "a reset is never answered");
    }

    #[test]
    fn a_host_that_is_gone_swallows_data() {
        let mut connection = open();
        connection.receive(&data(b"lost"), b"lost");
        connection.host_gone();
        connection.host_ended();
        connection.receive(&data(&[0; BUFFER]), &[0; BUFFER]);
        assert!(connection.for_host().is_empty());
        let mut payload = Vec::new();
        let packet = connection.next_packet(100, &mut payload).unwrap();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, BOTH_ENDS));
        assert_eq!(packet.fwd_cnt as usize, BUFFER + 4);
        assert!(connection.waits_for_last_word());
    }

    #[test]
    fn credit_is_asked_for_once_and_told_when_asked() {
        let mut connection = open();
        connection.receive(&Header { buf_alloc: 3, ..packet(op::CREDIT_UPDATE) }, &[]);
        connection.from_host(b"abcdef");
        assert_eq!(next(&mut connection), Some((op::RW, b"abc".to_vec())));
        assert_eq!(next(&mut connection), Some((op::CREDIT_REQUEST, vec![])));
        assert_eq!(next(&mut connection), None);
        connection.receive(&Header { buf_alloc: 3, fwd_cnt: 1, ..packet(op::CREDIT_UPDATE) }, &[]);
        assert_eq!(next(&mut connection), Some((op::RW, b"d".to_vec())));
        connection.receive(&Header { buf_alloc: 3, fwd_cnt: 0, ..packet(op::CREDIT_REQUEST) }, &[]);
        assert_eq!(next(&mut connection), Some((op::CREDIT_REQUEST, vec![])), "an old count gives no credit");
        assert_eq!(
            connection.receive(&Header { buf_alloc: 3, fwd_cnt: 9, ..packet(op::CREDIT_REQUEST) }, &[]),
            Received::Noted
        );
        assert_eq!(next(&mut connection), Some((op::CREDIT_UPDATE, vec![])), "nor does an impossible one");
    }

    /// One thing that happens to the model.
    #[derive(Clone, Debug)]
    enum Event {
        HostSends(usize),
        HostTakes(usize),
        GuestSends(usize),
        GuestConsumes(usize),
        GuestTellsCredit,
        GuestAsksCredit,
        DeviceSends(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (1usize..3000).prop_map(Event::HostSends),
            (1usize..40000).prop_map(Event::HostTakes),
            (1usize..40000).prop_map(Event::GuestSends),
            (1usize..3000).prop_map(Event::GuestConsumes),
            Just(Event::GuestTellsCredit),
            Just(Event::GuestAsksCredit),
            (1usize..4096).prop_map(Event::DeviceSends),
        ]
    }

    /// A guest and a host that keep the rules, and a record of every byte.
    struct Model {
        connection: Connection,
        room: u32,
        /// How many bytes each has sent and received; byte number n is `byte(n)`.
        host_sent: usize,
        guest_received: usize,
        guest_consumed: usize,
        guest_sent: usize,
        host_received: usize,
        /// What the guest knows of the device's credit.
        device_room: u32,
        device_consumed: u32,
    }

    fn byte(n: usize) -> u8 {
        (n % 251) as u8
    }

    fn bytes(from: usize, len: usize) -> Vec<u8> {
        (from..from + len).map(byte).collect()
    }

    impl Model {
        fn new(room: u32) -> Self {
            let request = Header { buf_alloc: room, ..packet(op::REQUEST) };
            let mut model = Model {
                connection: Connection::accepted(PORTS, &request),
                room,
                host_sent: 0,
                guest_received: 0,
                guest_consumed: 0,
                guest_sent: 0,
                host_received: 0,
                device_room: 0,
                device_consumed: 0,
            };
            model.apply(&Event::DeviceSends(1));
            model
        }

        fn guest_says(&mut self, op: u16, payload: &[u8]) {
            let header = Header {
                len: payload.len() as u32,
                buf_alloc: self.room,
                fwd_cnt: self.guest_consumed as u32,
                ..packet(op)
            };
            assert_eq!(self.connection.receive(&header, payload), Received::Noted);
        }

        fn guest_credit(&self) -> usize {
            let under_way = (self.guest_sent as u32).wrapping_sub(self.device_consumed);
            self.device_room.saturating_sub(under_way) as usize
        }

        fn apply(&mut self, event: &Event) -> bool {
            match *event {
                Event::HostSends(len) => {
                    let len = len.min(self.connection.host_room());
                    self.connection.from_host(&bytes(self.host_sent, len));
                    self.host_sent += len;
                    len > 0
                }
                Event::HostTakes(len) => {
                    let offered = self.connection.for_host();
                    let len = len.min(offered.len());
                    assert_eq!(offered[..len], bytes(self.host_received, len));
                    self.connection.host_took(len);
                    self.host_received += len;
                    len > 0
                }
                Event::GuestSends(len) => {
                    let len = len.min(self.guest_credit());
                    let payload = bytes(self.guest_sent, len);
                    self.guest_sent += len;
                    self.guest_says(op::RW, &payload);
                    len > 0
                }
                Event::GuestConsumes(len) => {
                    let len = len.min(self.guest_received - self.guest_consumed);
                    self.guest_consumed += len;
                    len > 0
                }
                Event::GuestTellsCredit => {
                    self.guest_says(op::CREDIT_UPDATE, &[]);
                    false
                }
                Event::GuestAsksCredit => {
                    self.guest_says(op::CREDIT_REQUEST, &[]);
                    false
                }
                Event::DeviceSends(room) => self.device_sends(room),
            }
        }

        fn device_sends(&mut self, room: usize) -> bool {
            let mut payload = Vec::new();
            let promised = self.connection.has_packet();
            let sent = self.connection.next_packet(room, &mut payload);
            assert_eq!(sent.is_some(), promised);
            let Some(header) = sent else { return false };
            assert!(payload.len() <= room);
            assert_eq!(payload, bytes(self.guest_received, payload.len()), "in order, none lost or doubled");
            self.guest_received += payload.len();
            assert!(self.guest_received - self.guest_consumed <= self.room as usize, "credit is kept");
            (self.device_room, self.device_consumed) = (header.buf_alloc, header.fwd_cnt);
            if header.op == op::CREDIT_REQUEST {
                self.apply(&Event::GuestTellsCredit);
            }
            true
        }

        /// Lets everything under way arrive, without either side sending anything new.
        fn drain(&mut self) {
            loop {
                let mut moved = self.apply(&Event::HostTakes(usize::MAX));
                moved |= self.apply(&Event::GuestConsumes(usize::MAX));
                self.apply(&Event::GuestTellsCredit);
                moved |= self.apply(&Event::DeviceSends(1000));
                if !moved {
                    return;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn streams_carry_every_byte_in_order(room in 1u32..10_000, events in proptest::collection::vec(event(), 1..200)) {
            let mut model = Model::new(room);
            for event in &events {
                model.apply(event);
            }
            model.drain();
            prop_assert_eq!(model.guest_received, model.host_sent);
            prop_assert_eq!(model.host_received, model.guest_sent);
            // A guest that ran out of credit has been told of more without asking.
            prop_assert!(model.guest_credit() > BUFFER / 4);
        }

        #[test]
        fn no_packets_make_a_connection_fail_badly(packets in proptest::collection::vec(
            (0u16..9, any::<u32>(), any::<u32>(), 0u32..4, 0usize..70_000), 1..40)
        ) {
            let mut connection = open();
            for (op, buf_alloc, fwd_cnt, flags, len) in packets {
                let header = Header { op, buf_alloc, fwd_cnt, flags, len: len as u32, ..Header::default() };
                if connection.receive(&header, &vec![0; len]) == Received::Broken || connection.fate() != Fate::Lives {
                    break;
                }
                connection.from_host(&vec![1; connection.host_room().min(100)]);
                next(&mut connection);
                connection.host_took(connection.for_host().len().min(len));
            }
        }
    }
}
