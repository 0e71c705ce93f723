//! The agent protocol over the virtio-vsock device.

use crate::loader::Boot;
use crate::runtime::Cold;
use crate::virtio::{Device, NO_PACKET, News};
use embedded_guest::agent::{Agent, Machine};
use embedded_guest::vsock::{Buffers, MAX_CONNECTIONS, PACKET_HEADER, ROOM_PER_PACKET, Vsock, Wire};

static BUFFERS: Cold<[Buffers; MAX_CONNECTIONS]> = Cold::new([const { Buffers::new() }; MAX_CONNECTIONS]);

/// The device and the connections over it.
pub struct Socket {
    device: Device,
    connections: Vsock,
    buffers: &'static mut [Buffers; MAX_CONNECTIONS],
}

impl Socket {
    /// Looks for the device; there is one at most.
    pub fn find(boot: &Boot) -> Option<Self> {
        let device = Device::find(boot)?;
        let connections = Vsock::new(device.cid());
        Some(Socket { device, connections, buffers: BUFFERS.take() })
    }

    /// Begins to tell the host that the guest is ready.
    pub fn announce(&mut self) {
        self.connections.announce(self.device.outbox());
        self.device.show();
    }

    /// Whether somebody waits for a tick.
    pub fn waits(&self) -> bool {
        self.connections.waits()
    }

    /// Works until there is nothing to do but wait. Interrupts are acknowledged after the work: what waits for an
    /// answer should not wait for that too.
    pub fn work<M: Machine>(&mut self, interrupted: bool, agent: &mut Agent<M>) {
        self.round(agent);
        if interrupted {
            self.device.acknowledge();
        }
        while !self.device.may_wait(ROOM_PER_PACKET) {
            self.round(agent);
        }
    }

    fn round<M: Machine>(&mut self, agent: &mut Agent<M>) {
        let mut packet = NO_PACKET;
        self.device.outbox().collect();
        while self.device.outbox().room() >= ROOM_PER_PACKET {
            match self.device.news(&mut packet) {
                None => break,
                Some(News::Reset) => {
                    self.connections.reset(self.device.cid());
                    // The device learns from the returned event buffer that the reset is known here.
                    self.device.show();
                }
                Some(News::Packet(header, len)) => {
                    let payload = &packet[PACKET_HEADER..PACKET_HEADER + len];
                    self.connections.receive(&header, payload, self.buffers, agent, self.device.outbox());
                }
            }
        }
        self.connections.proceed(self.buffers, agent, self.device.outbox());
        self.device.show();
    }
}
