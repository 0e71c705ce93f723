//! COM1: a second way to the agent, for machines without virtio-vsock, and the place for last words.

use crate::hw;
use crate::runtime::Cold;
use api_spec::agent::HEADER_LEN;
use embedded_guest::agent::{Agent, Machine, Outcome};
use embedded_guest::frames::{self, Answer, MAX_BODY, Next};

/// COM1's interrupt, as an input of the IOAPIC.
pub const IRQ: u32 = 4;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 0x3f9;
const FIFO_CONTROL: u16 = 0x3fa;
const MODEM_CONTROL: u16 = 0x3fc;
const LINE_STATUS: u16 = 0x3fd;
const SCRATCH: u16 = 0x3ff;

const RECEIVED: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_DEPTH: usize = 16;

/// The serial port.
#[derive(Clone, Copy)]
pub struct Port(());

impl Port {
    /// Looks for the port and has it interrupt when bytes arrive.
    #[cold]
    pub fn find() -> Option<Self> {
        const RECEIVE_INTERRUPT: u8 = 1;
        const FIFO_ON: u8 = 1;
        const OUT2_DTR_RTS: u8 = 0x0b; // OUT2 lets the interrupt through on real machines
        hw::port_write(SCRATCH, 0x5a);
        if hw::port_read(SCRATCH) != 0x5a {
            return None;
        }
        hw::port_write(FIFO_CONTROL, FIFO_ON);
        hw::port_write(MODEM_CONTROL, OUT2_DTR_RTS);
        hw::port_write(INTERRUPT_ENABLE, RECEIVE_INTERRUPT);
        Some(Port(()))
    }

    /// The port as it is found when something has gone wrong.
    pub fn for_last_words() -> Self {
        Port(())
    }

    fn read(self) -> Option<u8> {
        (hw::port_read(LINE_STATUS) & RECEIVED != 0).then(|| hw::port_read(DATA))
    }

    /// Sends bytes. Waits for the port, but not for ever.
    pub fn write(self, bytes: &[u8]) {
        for chunk in bytes.chunks(FIFO_DEPTH) {
            for _ in 0..100_000 {
                if hw::port_read(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            for &byte in chunk {
                hw::port_write(DATA, byte);
            }
        }
    }
}

const ROOM: usize = HEADER_LEN + MAX_BODY;

static INPUT: Cold<[u8; ROOM]> = Cold::new([0; ROOM]);

/// The agent protocol over the port.
pub struct Line {
    port: Port,
    input: &'static mut [u8; ROOM],
    filled: usize,
    /// The request that waits for a tick, and the tick.
    waits: Option<(u32, u64)>,
}

impl Line {
    /// The protocol over `port`; there is one.
    pub fn new(port: Port) -> Self {
        Line { port, input: INPUT.take(), filled: 0, waits: None }
    }

    /// Tells the host that the guest is ready.
    pub fn announce(&mut self) {
        self.send(&Answer::new(0, frames::READY));
    }

    fn send(&mut self, answer: &Answer) {
        self.port.write(answer.bytes());
    }

    /// Whether somebody waits for a tick.
    pub fn waits(&self) -> bool {
        self.waits.is_some()
    }

    /// Takes what has arrived.
    pub fn receive<M: Machine>(&mut self, agent: &mut Agent<M>) {
        while let Some(byte) = self.port.read() {
            self.input[self.filled] = byte;
            self.filled += 1;
            self.serve(agent);
        }
    }

    /// Answers who has waited long enough.
    pub fn ticked<M: Machine>(&mut self, agent: &mut Agent<M>) {
        if let Some((id, _)) = self.waits.take_if(|(_, tick)| *tick <= agent.ticks()) {
            self.send(&Answer::new(id, agent.ticks_so_far()));
            self.serve(agent);
        }
    }

    /// Serves the requests in the buffer, up to one that waits. The buffer holds the longest frame, so whenever it is
    /// full there is a frame to serve, or nonsense to drop.
    fn serve<M: Machine>(&mut self, agent: &mut Agent<M>) {
        while self.waits.is_none() {
            match frames::next(&self.input[..self.filled]) {
                Next::More => return,
                // A line cannot be closed: forget what has come, and hope for a frame.
                Next::Broken => self.filled = 0,
                Next::Frame(request, len) => {
                    self.input.copy_within(len..self.filled, 0);
                    self.filled -= len;
                    match agent.serve(&request.body) {
                        Outcome::Answer(response) => self.send(&Answer::new(request.id, response)),
                        Outcome::AtTick(tick) => self.waits = Some((request.id, tick)),
                        Outcome::Nothing => {}
                    }
                }
            }
        }
        if self.filled == ROOM {
            self.filled = 0; // more than fits was sent behind a request that waits
        }
    }
}
