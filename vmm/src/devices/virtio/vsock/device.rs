//! The device and its queues.
//!
//! ```text
//!   Gate:   Open ── restored ──> Restored ── resume, nothing to tell ──> Open
//!                                   │ resume, the guest must forget its streams
//!                                   v
//!                                ResetDue ── event buffer filled ──> ResetSent ── buffer given back ──> Open
//! ```
//!
//! After a restore the guest may believe in streams that no longer exist. It is told by a reset event, which it
//! handles some time later, and then it drops every stream that it has. So nothing is sent to it between the event and
//! the guest's giving back the event's buffer, or a new stream would be dropped with the old ones.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use api_spec::stats::VsockStats;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::super::chain::{Buffer, Direction};
use super::super::interrupt::Interrupt;
use super::super::rings::{QueueBroken, Rings};
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice};
use super::event_handler::Clients;
use super::host::HostSocket;
use super::muxer::Muxer;
use super::packet;
use super::ready::ReadySink;
use crate::devices::GuestMemory;
use uffd_handler::listener::ListenError;

/// The device's number in the virtio specification.
const DEVICE_TYPE: u32 = 19;
/// The queues: packets to the guest, packets from the guest, events to the guest.
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENTS: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// The smallest and the largest context id that a guest may have.
const GUEST_CIDS: std::ops::RangeInclusive<u64> = 3..=u32::MAX as u64 - 1;
/// "All streams are gone, and the context id may be another one": `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
/// How many packets are taken from the guest before other work has its turn.
const BATCH: usize = 256;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is reserved.
    #[error("vsock context id {0} is not one that a guest may have; use 3 to 4294967294")]
    Cid(u64),
    /// The socket on the host.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refuses an event or a timer.
    #[error("vsock device cannot have its events: {0}; raise the limit on open files")]
    Events(io::Error),
}

/// What the guest may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Anything.
    Open,
    /// Nothing, and its memory is left alone: its vCPUs have not started.
    Restored {
        /// It must then be told to forget its streams.
        reset: bool,
    },
    /// The reset event, as soon as there is a buffer for it.
    ResetDue,
    /// Nothing until it gives the event's buffer back.
    ResetSent {
        /// The index of available event buffers as it was when the event was sent.
        avail: u16,
    },
}

/// What the device has while the driver drives it.
pub(super) struct Active {
    rings: Rings,
    /// The chain at hand.
    buffer: Buffer,
    /// The payload at hand.
    payload: Vec<u8>,
}

/// The virtio socket device.
pub struct Vsock {
    pub(super) guest_cid: u64,
    pub(super) events: [Arc<EventFd>; 3],
    pub(super) listener: HostSocket,
    pub(super) clients: Clients,
    pub(super) timer: TimerFd,
    pub(super) muxer: Muxer,
    pub(super) gate: Gate,
    pub(super) active: Option<Active>,
}

impl Vsock {
    /// A device for the guest `guest_cid` that listens for clients on `uds_path`. `ready` hears of it when the guest
    /// says that it is ready, on the devices' thread.
    ///
    /// The result is both the device for a transport and a subscriber for the event manager.
    pub fn new(guest_cid: u64, uds_path: &Path, ready: ReadySink) -> Result<Arc<Mutex<Self>>, VsockError> {
        if !GUEST_CIDS.contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let event = || EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(VsockError::Events);
        Ok(Arc::new(Mutex::new(Vsock {
            guest_cid,
            events: [event()?, event()?, event()?],
            listener: HostSocket::bind(uds_path)?,
            clients: Clients::default(),
            timer: TimerFd::new().map_err(|error| VsockError::Events(error.into()))?,
            muxer: Muxer::new(guest_cid, ready),
            gate: Gate::Open,
            active: None,
        })))
    }

    /// The path on which the device listens for clients.
    pub fn uds_path(&self) -> PathBuf {
        self.listener.path().into()
    }

    /// What the device has done.
    pub fn stats(&self) -> VsockStats {
        self.muxer.stats()
    }

    /// Has the devices' thread look at the queues and the sockets.
    pub(super) fn wake(&self) {
        let _ = self.events[TX].write(1); // It can only overflow when it is set already.
    }

    /// Moves packets both ways as far as possible now.
    pub(super) fn exchange(&mut self) {
        if matches!(self.gate, Gate::Restored { .. }) {
            return;
        }
        let Some(active) = &mut self.active else { return };
        let mut work = Work { active, muxer: &mut self.muxer, listener: &self.listener };
        match work.exchange(&mut self.gate) {
            Ok(more) if more => self.wake(),
            Ok(_) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Takes in all that the guest has sent, so that nothing of it is left in the queue.
    pub(super) fn take_all(&mut self) {
        if matches!(self.gate, Gate::Restored { .. }) {
            return;
        }
        let Some(active) = &mut self.active else { return };
        let mut work = Work { active, muxer: &mut self.muxer, listener: &self.listener };
        // The vCPUs stand still, so a queue holds no more than its size.
        if let Err(error) = work.take_packets(usize::from(u16::MAX)).and_then(|_| work.active.rings.interrupt()) {
            self.fail(&error);
        }
        self.wake();
    }

    /// The driver has broken the rules: the device leaves its memory alone until it is reset.
    fn fail(&mut self, reason: &QueueBroken) {
        if let Some(active) = self.active.take() {
            active.rings.fail("vsock", reason);
        }
        self.reset();
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> String {
        "vsock".to_owned()
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        VERSION_1 | EVENT_IDX
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.events.to_vec()
    }

    /// The configuration is the guest's context id.
    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) {
        let (buffer, payload) = (Buffer::default(), Vec::new());
        self.active = Some(Active { rings: Rings::new(mem, queues, interrupt), buffer, payload });
    }

    fn queues(&self) -> &[Queue] {
        self.active.as_ref().map_or(&[], |active| active.rings.queues())
    }

    fn reset(&mut self) {
        self.active = None;
        self.gate = Gate::Open;
        self.muxer.clear();
        self.wake(); // for the sockets of the streams that were
    }

    /// After a restore this is what lets the device work again: on the devices' thread it looks at its queues once, and
    /// tells the guest to forget its streams if it must.
    fn resume(&mut self) {
        let Gate::Restored { reset } = self.gate else { return };
        self.gate = if reset { Gate::ResetDue } else { Gate::Open };
        if let Some(active) = &mut self.active {
            active.rings.resume(&[TX]);
        }
        self.wake();
    }
}

/// Everything that moving packets needs.
struct Work<'a> {
    active: &'a mut Active,
    muxer: &'a mut Muxer,
    listener: &'a HostSocket,
}

impl Work<'_> {
    /// Moves packets both ways; one interrupt at most for each queue. The result is whether there is more to do.
    fn exchange(&mut self, gate: &mut Gate) -> Result<bool, QueueBroken> {
        let more = self.take_packets(BATCH)?;
        self.pass_gate(gate)?;
        if *gate == Gate::Open {
            self.give_packets()?;
        }
        self.active.rings.interrupt()?;
        Ok(more)
    }

    /// Takes up to `limit` packets from the guest. The result is whether there are more.
    fn take_packets(&mut self, limit: usize) -> Result<bool, QueueBroken> {
        for _ in 0..limit {
            let Some(head) = self.next_chain(TX, Direction::FromDriver)? else { return Ok(false) };
            let Active { rings, buffer, payload } = &mut *self.active;
            let header = packet::read(buffer, rings.mem(), payload).map_err(|error| QueueBroken::Chain(TX, error))?;
            self.muxer.receive(&header, payload, self.listener);
            self.active.rings.used(TX, head, 0)?;
        }
        Ok(true)
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn give_packets(&mut self) -> Result<(), QueueBroken> {
        while self.muxer.has_packet() {
            let Some(head) = self.next_chain(RX, Direction::ToDriver)? else { break };
            let Active { rings, buffer, payload } = &mut *self.active;
            let broken = |error| QueueBroken::Chain(RX, error);
            let room = packet::room(buffer).map_err(broken)?;
            match self.muxer.next_packet(room, payload) {
                Some(header) => {
                    let len = packet::write(buffer, rings.mem(), &header, payload).map_err(broken)?;
                    rings.used(RX, head, len)?;
                }
                None => {
                    rings.put_back(RX);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Takes the gate one step further if the guest has made that possible.
    fn pass_gate(&mut self, gate: &mut Gate) -> Result<(), QueueBroken> {
        if *gate == Gate::ResetDue
            && let Some(head) = self.next_chain(EVENTS, Direction::ToDriver)?
        {
            let Active { rings, buffer, .. } = &mut *self.active;
            buffer.write(rings.mem(), 0, &TRANSPORT_RESET).map_err(|error| QueueBroken::Chain(EVENTS, error))?;
            *gate = Gate::ResetSent { avail: rings.avail_index(EVENTS)? };
            rings.used(EVENTS, head, TRANSPORT_RESET.len() as u32)?;
        }
        if let Gate::ResetSent { avail } = *gate {
            // Ask to be told, then look: what comes in between is not missed.
            let rings = &mut self.active.rings;
            rings.ask_for_news(EVENTS)?;
            if rings.avail_index(EVENTS)? != avail {
                *gate = Gate::Open;
            }
        }
        Ok(())
    }

    /// Loads the next chain of a queue into the buffer and returns its head.
    fn next_chain(&mut self, index: usize, direction: Direction) -> Result<Option<u16>, QueueBroken> {
        let Active { rings, buffer, .. } = &mut *self.active;
        let next = rings.next(index, |chain| buffer.load(chain, direction))?;
        Ok(next.map(|(head, ())| head))
    }
}
