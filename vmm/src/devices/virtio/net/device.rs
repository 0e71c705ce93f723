//! The device and its queues.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api_spec::devices::{NetworkInterface, RateLimiter};
use api_spec::mac::MacAddr;
use api_spec::stats::NetworkStats;
use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::{Buffer, ChainError, Direction};
use super::super::interrupt::Interrupt;
use super::super::rings::{QueueBroken, Rings};
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice};
use super::frame::{self, HEADER_LEN, MAX_LEN, NUM_BUFFERS, Offloads, Sender};
use super::tap::Link;
use crate::devices::GuestMemory;
use crate::devices::alarm::Alarm;
use crate::devices::rate::Rate;

/// The device's number in the virtio specification.
const DEVICE_TYPE: u32 = 1;
/// The queues: frames to the guest, frames from the guest.
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// What is offered. Not UFO, which Linux has given up, so that a snapshot fits any host's taps.
const FEATURES: [u32; 7] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
];
/// How many frames are moved each way before other work has its turn.
const BATCH: usize = 64;
/// How many buffers the guest is given in a turn before other work has its turn.
const MAX_CHAINS: usize = 1024;
/// How many are sent before the state is saved at most: more than a queue has.
const ALL: usize = u16::MAX as usize;

/// A frame of the host that the guest has not been given yet.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Its length with its header, in bytes.
    len: usize,
    /// Whether the rate limit has let it pass.
    paid: bool,
}

/// What the device has while the driver drives it.
struct Active {
    rings: Rings,
    /// A frame on its way to the guest.
    incoming: Box<[u8]>,
    /// Whether there is one, from an earlier turn.
    held: Option<Held>,
    /// A frame on its way to the host.
    outgoing: Box<[u8]>,
    /// The chain at hand, and the first of those that a frame is spread over.
    buffer: Buffer,
    first: Buffer,
    /// Chains that a frame is spread over: heads, and bytes written.
    spread: Vec<(u16, u32)>,
}

/// What became of a frame for the guest.
#[derive(Debug, PartialEq, Eq)]
enum Delivery {
    /// The guest has it.
    Done,
    /// The guest has no buffers for it now.
    Later,
    /// The guest can never have buffers for it.
    Never,
}

/// What there is to do at once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    /// The guest may have frames.
    pub(super) tx: bool,
    /// The host may have frames, or the guest buffers for one.
    pub(super) rx: bool,
}

/// The guest's cable.
pub(super) struct Cable {
    /// What messages call the interface.
    name: String,
    link: Box<dyn Link>,
    /// What the link was told last that the guest understands.
    offloads: Option<Offloads>,
    /// How many frames in a row could not be read.
    unreadable: usize,
    /// The tap has gone: the guest's frames lead nowhere from now on, and none come.
    pub(super) lost: bool,
}

impl Cable {
    fn lose(&mut self, error: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.lost, true) {
            tracing::error!("{}: its tap device cannot be used any more, the guest is cut off: {error}", self.name);
        }
    }

    /// The length of the host's next frame, if there is one. One that cannot be read has none of its bytes.
    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        if self.lost {
            return None;
        }
        match rustix::io::read(self.link.as_fd(), into) {
            Ok(len) => {
                self.unreadable = 0;
                Some(len)
            }
            Err(Errno::AGAIN | Errno::INTR) => None,
            // A tap drops a frame that it cannot describe, and says so; the next one may be fine.
            Err(error) if !is_gone(error) && self.unreadable < BATCH => {
                tracing::debug!("{}: a frame of the host cannot be read: {error}", self.name);
                self.unreadable += 1;
                Some(0)
            }
            Err(error) => {
                self.lose(&error);
                None
            }
        }
    }

    /// Hands a frame to the host. One that it does not take is lost, as on any network: it has no room, is down, or finds
    /// something wrong with the frame. Says whether the host has taken it.
    fn send(&mut self, frame: &[u8]) -> bool {
        if self.lost {
            return false;
        }
        match rustix::io::write(self.link.as_fd(), frame) {
            Err(error) if is_gone(error) => self.lose(&error),
            Err(error) => tracing::debug!("{}: a frame of {} bytes is dropped: {error}", self.name, frame.len()),
            Ok(_) => return true,
        }
        false
    }

    /// Tells the link what the guest understands, unless it knows: it costs a lock that all interfaces of the host share. A
    /// link that does not do as it is told loses frames, since those that the guest does not understand are dropped.
    fn set_offloads(&mut self, offloads: Offloads) {
        if self.lost || self.offloads == Some(offloads) {
            return;
        }
        match self.link.set_offloads(offloads) {
            Ok(()) => self.offloads = Some(offloads),
            Err(error) => {
                self.offloads = None;
                tracing::error!("{}: its tap device does not take its offloads: {error}", self.name);
            }
        }
    }
}

/// Whether an error means that there is no tap device any more.
fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::BADFD | Errno::NODEV)
}

impl AsRawFd for Cable {
    fn as_raw_fd(&self) -> RawFd {
        self.link.as_fd().as_raw_fd()
    }
}

/// The virtio network device.
pub struct Net {
    pub(super) iface_id: String,
    pub(super) mac: Option<MacAddr>,
    pub(super) events: [Arc<EventFd>; 2],
    pub(super) alarm: Alarm,
    pub(super) cable: Cable,
    /// Whether the event loop waits for frames of the host.
    pub(super) watched: bool,
    rx_rate: Rate,
    tx_rate: Rate,
    stats: NetworkStats,
    /// What had to wait for the alarm.
    waiting: Due,
    /// The features that the driver has accepted.
    features: u64,
    active: Option<Active>,
    /// Between a restore and the first resume, when the device leaves guest memory alone.
    pub(super) restored: bool,
}

impl Net {
    /// The device that `config` describes, over `link`. Without a MAC address its driver makes one up.
    ///
    /// The result is both the device for a transport and a subscriber for the event manager.
    pub fn new(config: &NetworkInterface, link: Box<dyn Link>) -> io::Result<Arc<Mutex<Self>>> {
        let now = Instant::now();
        Ok(Arc::new(Mutex::new(Net {
            iface_id: config.iface_id.clone(),
            mac: config.guest_mac,
            events: [Arc::new(EventFd::new(EFD_NONBLOCK)?), Arc::new(EventFd::new(EFD_NONBLOCK)?)],
            alarm: Alarm::new()?,
            cable: Cable { name: name(&config.iface_id), link, offloads: None, unreadable: 0, lost: false },
            watched: false,
            rx_rate: Rate::new(config.rx_rate_limiter.as_ref(), now),
            tx_rate: Rate::new(config.tx_rate_limiter.as_ref(), now),
            stats: NetworkStats { iface_id: config.iface_id.clone(), ..Default::default() },
            waiting: Due::default(),
            features: 0,
            active: None,
            restored: false,
        })))
    }

    /// What the interface has done.
    pub fn stats(&self) -> NetworkStats {
        self.stats.clone()
    }

    /// Sets other bounds of what the guest receives and sends, from now on, also for frames that wait.
    pub fn set_rates(&mut self, rx: Option<&RateLimiter>, tx: Option<&RateLimiter>) {
        let now = Instant::now();
        self.rx_rate.change(rx, now);
        self.tx_rate.change(tx, now);
        if self.waiting.rx || self.waiting.tx {
            self.alarm.set(Some(Duration::ZERO));
        }
    }

    /// Moves what is due, and what had to wait; what then still has to is left to the alarm.
    pub(super) fn exchange(&mut self, due: Due) {
        let due = Due { tx: due.tx || self.waiting.tx, rx: due.rx || self.waiting.rx };
        let [tx, rx] = match self.work().map(|mut work| work.exchange(due)) {
            Some(Ok(again)) => again,
            Some(Err(error)) => return self.fail(&error),
            None => [None; 2],
        };
        self.waiting = Due { tx: tx.is_some(), rx: rx.is_some() };
        self.alarm.set(tx.into_iter().chain(rx).min());
    }

    /// Sends all that the guest has for the host, whatever the rate limit says, so that nothing of it is left in the queue
    /// for clones to send again.
    pub(super) fn send_all(&mut self) {
        if let Some(Err(error)) = self.work().map(|mut work| work.send_all()) {
            self.fail(&error);
        }
    }

    /// What moving frames needs, if any may be moved.
    fn work(&mut self) -> Option<Work<'_>> {
        let active = self.active.as_mut().filter(|_| !self.restored)?;
        let Net { cable, features, rx_rate, tx_rate, stats, .. } = self;
        Some(Work { active, cable, features: *features, rx_rate, tx_rate, stats })
    }

    /// Whether the event loop should wait for frames of the host: not while one already waits for the guest.
    pub(super) fn wants_frames(&self) -> bool {
        let takes = self.active.as_ref().is_some_and(|active| active.held.is_none());
        takes && !self.restored && !self.cable.lost
    }

    /// The driver has broken the rules: the device leaves its memory alone until it is reset.
    fn fail(&mut self, reason: &QueueBroken) {
        if let Some(active) = self.active.take() {
            active.rings.fail(&self.cable.name, reason);
        }
        self.reset();
    }

    /// Has the devices' thread look at what it waits for.
    fn wake(&mut self) {
        self.alarm.set(Some(Duration::ZERO));
    }
}

/// What messages call an interface.
fn name(iface_id: &str) -> String {
    format!("network interface {iface_id}")
}

impl VirtioDevice for Net {
    fn name(&self) -> String {
        self.cable.name.clone()
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mac = u64::from(self.mac.is_some()) << VIRTIO_NET_F_MAC;
        FEATURES.iter().fold(VERSION_1 | EVENT_IDX | mac, |features, bit| features | 1 << bit)
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.events.to_vec()
    }

    /// The configuration begins with the MAC address; the features behind what follows are not offered.
    fn config(&self) -> Vec<u8> {
        self.mac.map_or([0; 6], MacAddr::bytes).to_vec()
    }

    fn negotiated(&mut self, features: u64) -> usize {
        self.features = features;
        QUEUE_SIZES.len()
    }

    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) {
        // One byte more than the longest frame, to tell a longer one.
        let room = || vec![0; MAX_LEN + 1].into_boxed_slice();
        self.active = Some(Active {
            rings: Rings::new(mem, queues, interrupt),
            incoming: room(),
            held: None,
            outgoing: room(),
            buffer: Buffer::default(),
            first: Buffer::default(),
            spread: Vec::new(),
        });
        self.cable.set_offloads(Offloads::of_host(self.features));
        self.wake(); // for the frames of the host
    }

    fn queues(&self) -> &[Queue] {
        self.active.as_ref().map_or(&[], |active| active.rings.queues())
    }

    fn reset(&mut self) {
        self.active = None;
        self.restored = false;
        self.waiting = Due::default();
        self.wake(); // to wait for frames no longer
    }

    /// What the guest had to send was sent before it was saved, so there is nothing to do but to wait for frames.
    fn resume(&mut self) {
        if !std::mem::take(&mut self.restored) {
            return;
        }
        if let Some(active) = &mut self.active {
            active.rings.resume(&[TX]);
        }
        self.wake();
    }
}

/// Everything that moving frames needs.
struct Work<'a> {
    active: &'a mut Active,
    cable: &'a mut Cable,
    features: u64,
    rx_rate: &'a mut Rate,
    tx_rate: &'a mut Rate,
    stats: &'a mut NetworkStats,
}

impl Work<'_> {
    /// Moves frames both ways; one interrupt at most. The results are when there is more to do, if there is: for the
    /// guest's frames, and for the host's.
    fn exchange(&mut self, due: Due) -> Result<[Option<Duration>; 2], QueueBroken> {
        let tx = if due.tx { self.send(BATCH, true)? } else { None };
        let rx = if due.rx { self.receive()? } else { None };
        self.active.rings.interrupt()?;
        Ok([tx, rx])
    }

    fn send_all(&mut self) -> Result<(), QueueBroken> {
        self.send(ALL, false)?;
        self.active.rings.interrupt()
    }

    /// Takes up to `most` frames from the guest.
    fn send(&mut self, most: usize, limited: bool) -> Result<Option<Duration>, QueueBroken> {
        let Active { rings, buffer, outgoing, .. } = &mut *self.active;
        for _ in 0..most {
            let Some((head, ())) = rings.next(TX, |chain| buffer.load(chain, Direction::FromDriver))? else {
                return Ok(None);
            };
            check_header(TX, buffer)?;
            if let Err(wait) = self.tx_rate.take(buffer.len() - HEADER_LEN as u64, Instant::now())
                && limited
            {
                rings.put_back(TX);
                self.stats.tx_throttled += 1;
                return Ok(Some(wait));
            }
            let mut sent = false;
            // Of one that is too long nobody looks at a byte.
            if let Some(frame) = outgoing.get_mut(..usize::try_from(buffer.len()).unwrap_or(usize::MAX)) {
                buffer.read(rings.mem(), 0, frame).map_err(|error| QueueBroken::Chain(TX, error))?;
                if frame::admit(frame, Sender::Guest, Offloads::of_guest(self.features)) {
                    sent = self.cable.send(frame);
                }
            }
            match sent {
                true => {
                    self.stats.tx_frames += 1;
                    self.stats.tx_bytes += buffer.len() - HEADER_LEN as u64;
                }
                false => self.stats.tx_dropped += 1,
            }
            rings.used(TX, head, 0)?;
        }
        Ok(Some(Duration::ZERO))
    }

    /// Gives the guest what the host has for it. If there is more than one turn takes, the event loop says so again.
    fn receive(&mut self) -> Result<Option<Duration>, QueueBroken> {
        let mergeable = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut chains = 0;
        for _ in 0..BATCH {
            // A guest may offer buffers so small that each frame takes many.
            if chains > MAX_CHAINS {
                return Ok(Some(Duration::ZERO));
            }
            if self.active.held.is_none() {
                self.take_frame();
            }
            let Some(held) = &mut self.active.held else { return Ok(None) };
            if !held.paid {
                if let Err(wait) = self.rx_rate.take((held.len - HEADER_LEN) as u64, Instant::now()) {
                    self.stats.rx_throttled += 1;
                    return Ok(Some(wait));
                }
                held.paid = true;
            }
            let len = held.len;
            let delivery = self.active.deliver(len, mergeable)?;
            chains += self.active.spread.len();
            match delivery {
                Delivery::Done => {
                    self.stats.rx_frames += 1;
                    self.stats.rx_bytes += (len - HEADER_LEN) as u64;
                    self.active.held = None;
                }
                Delivery::Never => {
                    tracing::debug!("{}: a frame of {len} bytes is dropped: the guest has no room", self.cable.name);
                    self.stats.rx_dropped += 1;
                    self.active.held = None;
                }
                Delivery::Later => break,
            }
        }
        Ok(None)
    }

    /// Takes the next frame of the host that the guest can be given.
    fn take_frame(&mut self) {
        let incoming = &mut self.active.incoming;
        // A host that sends nothing but what is dropped must not keep the event loop for itself.
        for _ in 0..BATCH {
            let Some(len) = self.cable.receive(incoming) else { return };
            if frame::admit(&mut incoming[..len], Sender::Host, Offloads::of_host(self.features)) {
                self.active.held = Some(Held { len, paid: false });
                return;
            }
            self.stats.rx_dropped += 1;
        }
    }
}

impl Active {
    /// Spreads the frame in `incoming` over as many buffers of the guest as it takes, or, unless they are `mergeable`, puts
    /// it into one. The guest sees all of it or nothing.
    fn deliver(&mut self, len: usize, mergeable: bool) -> Result<Delivery, QueueBroken> {
        let Active { rings, incoming, buffer, first, spread, .. } = self;
        let broken = |error| QueueBroken::Chain(RX, error);
        spread.clear();
        let mut rest = &incoming[..len];
        while !rest.is_empty() {
            let into = if spread.is_empty() { &mut *first } else { &mut *buffer };
            // Never more than the queue holds, however often the guest makes its buffers available anew.
            let full = spread.len() >= usize::from(rings.queues()[RX].size());
            let one_more = (mergeable || spread.is_empty()) && !full;
            let next = if one_more { rings.next(RX, |chain| into.load(chain, Direction::ToDriver))? } else { None };
            let Some((head, ())) = next else {
                spread.iter().for_each(|_| rings.put_back(RX));
                return Ok(if one_more { Delivery::Later } else { Delivery::Never });
            };
            check_header(RX, into)?;
            let (part, after) = rest.split_at(rest.len().min(usize::try_from(into.len()).unwrap_or(usize::MAX)));
            into.write(rings.mem(), 0, part).map_err(broken)?;
            spread.push((head, part.len() as u32));
            rest = after;
        }
        first.write(rings.mem(), NUM_BUFFERS, &(spread.len() as u16).to_le_bytes()).map_err(broken)?;
        rings.used_together(RX, spread)?;
        Ok(Delivery::Done)
    }
}

/// A buffer must have room for a header at least (virtio 1.2, sections 5.1.6.2 and 5.1.6.3.1).
fn check_header(queue: usize, buffer: &Buffer) -> Result<(), QueueBroken> {
    let (len, needed) = (buffer.len(), HEADER_LEN as u64);
    if len < needed { Err(QueueBroken::Chain(queue, ChainError::Short { len, needed })) } else { Ok(()) }
}
