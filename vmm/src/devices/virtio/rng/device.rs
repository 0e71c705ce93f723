//! The device and its queue.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api_spec::devices::RateLimiter;
use api_spec::stats::EntropyStats;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::{Buffer, Direction};
use super::super::interrupt::Interrupt;
use super::super::rings::{QueueBroken, Rings};
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice};
use crate::devices::GuestMemory;
use crate::devices::alarm::Alarm;
use crate::devices::rate::Rate;

/// The device's number in the virtio specification.
const DEVICE_TYPE: u32 = 4;
/// The only queue.
pub(super) const REQUESTS: usize = 0;
const QUEUE_SIZES: [u16; 1] = [256];
/// Most bytes that one request is given. A driver that wants more asks again.
pub(super) const MAX_REQUEST: u64 = 64 * 1024;
/// How many requests are served before other work has its turn.
pub(super) const BATCH: usize = 16;
/// Random bytes are fetched in pieces of so many.
const PIECE: usize = 4096;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The system refuses an event or a timer.
    #[error("entropy device cannot have its events: {0}; raise the limit on open files")]
    Events(io::Error),
}

/// Why the device stops.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Queue(#[from] QueueBroken),
    #[error("no random bytes from the kernel: {0}")]
    Random(rustix::io::Errno),
}

/// What the device has while the driver drives it.
pub(super) struct Active {
    pub(super) rings: Rings,
    /// The chain at hand.
    buffer: Buffer,
}

/// The virtio entropy device.
pub struct Rng {
    pub(super) event: Arc<EventFd>,
    pub(super) alarm: Alarm,
    rate: Rate,
    stats: EntropyStats,
    pub(super) active: Option<Active>,
    /// Between a restore and the first resume, when the device leaves guest memory alone: whether requests were left in
    /// the queue.
    pub(super) restored: Option<bool>,
}

impl Rng {
    /// A device that gives the guest no more than `limit`.
    ///
    /// The result is both the device for a transport and a subscriber for the event manager.
    pub fn new(limit: Option<&RateLimiter>) -> Result<Arc<Mutex<Self>>, RngError> {
        Ok(Arc::new(Mutex::new(Rng {
            event: EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(RngError::Events)?,
            alarm: Alarm::new().map_err(RngError::Events)?,
            rate: Rate::new(limit, Instant::now()),
            stats: EntropyStats::default(),
            active: None,
            restored: None,
        })))
    }

    /// Sets another bound of what the guest gets, before the device is resumed for the first time: requests that wait are looked at then.
    pub fn set_rate(&mut self, limit: Option<&RateLimiter>) {
        self.rate.change(limit, Instant::now());
    }

    /// What the device has done.
    pub fn stats(&self) -> EntropyStats {
        self.stats
    }

    /// Has the devices' thread look at the queue.
    fn wake(&self) {
        let _ = self.event.write(1); // It can only overflow when it is set already.
    }

    /// Serves requests, and sees to it that those which must wait are served later.
    pub(super) fn serve(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.restored.is_none()) else {
            return self.alarm.set(None);
        };
        match active.serve(&mut self.rate, &mut self.stats) {
            Ok(again) => self.alarm.set(again),
            Err(reason) => {
                active.rings.fail("entropy", &reason);
                self.reset();
            }
        }
    }
}

impl Active {
    /// Serves requests. The result is when there is more to do, if there is.
    fn serve(&mut self, rate: &mut Rate, stats: &mut EntropyStats) -> Result<Option<Duration>, Stop> {
        let again = self.fill_buffers(rate, stats)?;
        self.rings.interrupt()?;
        Ok(again)
    }

    fn fill_buffers(&mut self, rate: &mut Rate, stats: &mut EntropyStats) -> Result<Option<Duration>, Stop> {
        let Active { rings, buffer } = self;
        for _ in 0..BATCH {
            let Some((head, ())) = rings.next(REQUESTS, |chain| buffer.load(chain, Direction::ToDriver))? else {
                return Ok(None);
            };
            let len = buffer.len().min(MAX_REQUEST);
            if let Err(wait) = rate.take(len, Instant::now()) {
                rings.put_back(REQUESTS);
                stats.throttled += 1;
                return Ok(Some(wait));
            }
            fill(buffer, rings.mem(), len)?;
            stats.requests += 1;
            stats.bytes += len;
            rings.used(REQUESTS, head, len as u32)?;
        }
        Ok(Some(Duration::ZERO))
    }
}

/// Writes `len` random bytes into a buffer.
fn fill(buffer: &Buffer, mem: &GuestMemory, len: u64) -> Result<(), Stop> {
    let mut piece = [0; PIECE];
    let mut done = 0;
    while done < len {
        let wanted = PIECE.min((len - done) as usize);
        let came = match getrandom(&mut piece[..wanted], GetRandomFlags::empty()) {
            Ok(came) => came,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Stop::Random(error)),
        };
        let written = buffer.write(mem, done, &piece[..came]);
        written.map_err(|error| QueueBroken::Chain(REQUESTS, error))?;
        done += came as u64;
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn name(&self) -> String {
        "entropy".to_owned()
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
        vec![self.event.clone()]
    }

    /// There is no configuration.
    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) {
        self.active = Some(Active { rings: Rings::new(mem, queues, interrupt), buffer: Buffer::default() });
    }

    fn queues(&self) -> &[Queue] {
        self.active.as_ref().map_or(&[], |active| active.rings.queues())
    }

    fn reset(&mut self) {
        self.active = None;
        self.restored = None;
    }

    fn resume(&mut self) {
        let Some(pending) = self.restored.take() else { return };
        if let Some(active) = &mut self.active {
            active.rings.resume(if pending { &[] } else { &[REQUESTS] });
        }
        if pending {
            self.wake();
        }
    }
}
