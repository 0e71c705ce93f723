//! The device and its queue.
//!
//! ```text
//!   Gate:   Open ── the rate limit ──> Limited ── the timer ──> Open
//!           Open ── the overlay is full ──> Full ── resume ──> Open        (the guest is paused meanwhile)
//!           Restored ── resume ──> Open
//! ```
//!
//! A request that cannot be done now stays in the queue and is looked at again when the gate opens.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api_spec::devices::RateLimiter;
use api_spec::stats::DriveStats;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::{Buffer, ChainError};
use super::super::interrupt::Interrupt;
use super::super::rings::{QueueBroken, Rings};
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice};
use super::disk::{Disk, Frozen, Image};
use super::overlay::{Folded, OverlayMark, Stack};
use super::request::{
    HEADER_LEN, ID_LEN, Limits, MAX_DATA, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZERO_SECTORS, Request, SECTOR,
    Segment, Status,
};
use crate::devices::GuestMemory;
use crate::devices::alarm::Alarm;
use crate::devices::rate::Rate;
use crate::notice::Halt;

/// The device's number in the virtio specification.
const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// Most pieces of data in a request: what a chain can have besides header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Longest piece, in bytes.
const SIZE_MAX: u32 = 64 * 1024;
const _: () = assert!(SEG_MAX as u64 * SIZE_MAX as u64 <= MAX_DATA);
/// Sectors of a cluster of an overlay: what lies so needs no copying.
const CLUSTER_SECTORS: u32 = 8;
/// How much data is moved at a time, in bytes.
const PIECE: u64 = 64 * 1024;
/// After how many requests, or what cost ([`Request::cost`]), other work has its turn.
const TURN_REQUESTS: usize = 64;
const TURN_COST: u64 = 4 << 20;
/// What may be spent before the state is saved. The rest is left in the queue.
const DRAIN_COST: u64 = 64 << 20;
/// How often failures of the host are logged.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// Where the wish goes that the guest stand still.
pub type HaltSink = Box<dyn FnMut(Halt) + Send>;

/// What kind of disk the guest sees.
#[derive(Clone, Debug, Default)]
pub struct BlockConfig {
    /// Its name.
    pub id: String,
    /// Whether a flush means anything.
    pub flush: bool,
    /// Bounds of its traffic.
    pub rate_limiter: Option<RateLimiter>,
    /// Most that its overlay may hold, in MiB.
    pub max_overlay_mib: Option<u64>,
}

/// Whether the device takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// It does.
    Open,
    /// Not before the timer goes off.
    Limited,
    /// Not before the guest is resumed: its overlay is full.
    Full,
    /// Nothing, and guest memory is left alone: the vCPUs have not started.
    Restored {
        /// Requests are left in the queue.
        pending: bool,
    },
}

/// What the device has while the driver drives it.
struct Active {
    rings: Rings,
    /// The two parts of the chain at hand.
    request: Buffer,
    answer: Buffer,
}

/// A disk of the guest.
pub struct Block {
    config: BlockConfig,
    limits: Limits,
    pub(super) event: Arc<EventFd>,
    pub(super) timer: Alarm,
    pub(super) gate: Gate,
    active: Option<Active>,
    disk: Disk,
    rate: Rate,
    stats: DriveStats,
    halt: HaltSink,
    complaints: Complaints,
    /// The data at hand.
    bounce: Vec<u8>,
}

/// How a request went.
enum Outcome {
    /// It is done.
    Done {
        status: Status,
        /// How many bytes of its answer were written, from the beginning.
        written: u64,
        /// What it cost, in bytes that could be moved meanwhile.
        cost: u64,
    },
    /// The rate limit lets it pass after this time.
    Limited(Duration),
    /// The overlay has no room for it.
    Full,
}

impl Outcome {
    /// A request that is no request.
    fn refused(status: Status) -> Outcome {
        Outcome::Done { status, written: 0, cost: 0 }
    }
}

fn limits(config: &BlockConfig, disk: &Disk) -> Limits {
    Limits { size: disk.size(), read_only: disk.is_read_only(), flush: config.flush }
}

/// How a turn ended.
enum Turn {
    /// The queue is empty.
    Idle,
    /// There is more to do.
    More,
    /// The rate limit holds the next request back.
    Limited(Duration),
    /// The overlay has no room for the next request.
    Full,
}

impl Block {
    /// A device with no disk behind it yet. `halt` hears of it when the guest should stand still, on the devices' thread.
    ///
    /// The result is both the device for a transport and a subscriber for the event manager.
    pub fn new(config: BlockConfig, halt: HaltSink) -> io::Result<Arc<Mutex<Self>>> {
        let disk = Disk::absent()?;
        Ok(Arc::new(Mutex::new(Block {
            limits: limits(&config, &disk),
            event: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            timer: Alarm::new()?,
            gate: Gate::Open,
            active: None,
            rate: Rate::new(config.rate_limiter.as_ref(), Instant::now()),
            stats: DriveStats { drive_id: config.id.clone(), ..Default::default() },
            complaints: Complaints::default(),
            bounce: Vec::new(),
            config,
            disk,
            halt,
        })))
    }

    /// Puts a disk behind it. Its driver must not have seen it yet.
    pub fn insert(&mut self, config: BlockConfig, disk: Disk) {
        self.limits = limits(&config, &disk);
        self.rate = Rate::new(config.rate_limiter.as_ref(), Instant::now());
        self.stats = DriveStats { drive_id: config.id.clone(), ..Default::default() };
        (self.config, self.disk) = (config, disk);
    }

    /// What the disk has done.
    pub fn stats(&self) -> DriveStats {
        DriveStats { overlay_bytes: self.disk.private_bytes(), ..self.stats.clone() }
    }

    /// The name of the disk.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    /// Size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.limits.size
    }

    /// Sets the bound of the overlay, in MiB, or takes it away. A guest that waits for room goes on when it is resumed.
    pub fn set_max_overlay(&mut self, mib: Option<u64>) {
        self.config.max_overlay_mib = mib;
    }

    /// Sets other bounds of the guest's reads and writes, from now on, also for a request that waits.
    pub fn set_rate(&mut self, limiter: Option<&RateLimiter>) {
        self.rate.change(limiter, Instant::now());
        if self.gate == Gate::Limited {
            self.timer.set(Some(Duration::ZERO));
        }
    }

    /// What a snapshot needs of the disk. The guest must stand still, and the device's state be saved.
    pub fn freeze(&mut self) -> io::Result<Frozen> {
        self.disk.freeze()
    }

    /// Has nobody write any more what is on the disk, likewise, for clones to read it: see [`Disk::share`].
    pub fn share(&mut self) -> io::Result<Option<Image>> {
        self.disk.share()
    }

    /// Remembers what the disk is: see [`Disk::mark`].
    pub fn mark(&mut self, may_fold: bool) -> io::Result<Option<OverlayMark>> {
        self.disk.mark(may_fold)
    }

    /// Nobody comes back to what was remembered.
    pub fn unmark(&mut self) {
        self.disk.unmark();
    }

    /// Brings the disk back to what was remembered.
    pub fn rewind(&mut self, mark: &OverlayMark) -> io::Result<()> {
        self.disk.rewind(mark)
    }

    /// The layers that earlier snapshots have frozen; `None` for a disk without any.
    pub fn frozen_layers(&self) -> Option<Stack> {
        self.disk.frozen_layers()
    }

    /// Takes over the layer into which others have been folded or merged.
    pub fn adopt(&mut self, folded: &Folded) {
        self.disk.adopt(folded);
    }

    /// Has the devices' thread look at the queue.
    fn wake(&self) {
        let _ = self.event.write(1); // It can only overflow when it is set already.
    }

    /// The timer has gone off.
    pub(super) fn rate_allows(&mut self) {
        if self.gate == Gate::Limited {
            self.gate = Gate::Open;
        }
    }

    /// Does what the driver asks for, until the turn is over.
    pub(super) fn work(&mut self) {
        match self.turn(TURN_REQUESTS, TURN_COST) {
            Turn::Idle => {}
            Turn::More => self.wake(),
            Turn::Limited(wait) => self.limit(wait),
            Turn::Full => self.stop(),
        }
    }

    /// Does what the driver has asked for before its state is saved. Says whether something is left.
    pub(super) fn drain(&mut self) -> bool {
        match self.gate {
            Gate::Restored { pending } => return pending,
            Gate::Limited | Gate::Full => return self.active.is_some(),
            Gate::Open => {}
        }
        // No more than a queue holds: what is read from the disk may be written over the queue, which then holds more.
        let queue = self.queues().first().map_or(0, |queue| queue.size().into());
        match self.turn(queue, DRAIN_COST) {
            Turn::Idle => return false,
            Turn::More => self.wake(),
            Turn::Limited(wait) => self.limit(wait),
            // The guest is told when it has gone on: who saves it decides whether it runs.
            Turn::Full => self.wake(),
        }
        true
    }

    /// Waits for the rate limit.
    fn limit(&mut self, wait: Duration) {
        self.gate = Gate::Limited;
        self.stats.throttled += 1;
        self.timer.set(Some(wait));
    }

    /// Whether it waits for room in its overlay.
    pub fn is_full(&self) -> bool {
        self.gate == Gate::Full
    }

    /// Waits for room.
    fn stop(&mut self) {
        self.gate = Gate::Full;
        let (drive_id, limit_mib) = (self.config.id.clone(), self.config.max_overlay_mib.unwrap_or(0));
        (self.halt)(Halt::Overlay { drive_id, limit_mib });
    }

    fn turn(&mut self, requests: usize, cost: u64) -> Turn {
        if self.gate != Gate::Open {
            return Turn::Idle;
        }
        let Some(mut active) = self.active.take() else { return Turn::Idle };
        let done = self.serve(&mut active, requests, cost).and_then(|turn| active.rings.interrupt().map(|()| turn));
        match done {
            Ok(turn) => {
                self.active = Some(active);
                turn
            }
            // The driver has broken the rules: the device leaves its memory alone until it is reset.
            Err(error) => {
                active.rings.fail(&self.name(), &error);
                Turn::Idle
            }
        }
    }

    fn serve(&mut self, active: &mut Active, requests: usize, most: u64) -> Result<Turn, QueueBroken> {
        let mut spent = 0;
        for _ in 0..requests {
            let Active { rings, request, answer } = active;
            if spent >= most {
                return Ok(Turn::More);
            }
            let Some((head, ())) = rings.next(0, |chain| Buffer::load_both(chain, request, answer))? else {
                return Ok(Turn::Idle);
            };
            let chain = Chain { mem: rings.mem(), request, answer };
            match self.handle(&chain).map_err(|error| QueueBroken::Chain(0, error))? {
                Outcome::Done { status, written, cost } => {
                    spent += cost;
                    self.stats.errors += u64::from(status != Status::Ok);
                    let room = answer.len() - 1;
                    answer.write(rings.mem(), room, &[status as u8]).map_err(|e| QueueBroken::Chain(0, e))?;
                    // The length is that of what was written without a gap from the beginning.
                    let written = if written == room { room + 1 } else { written };
                    rings.used(0, head, written as u32)?;
                }
                Outcome::Limited(wait) => {
                    rings.put_back(0);
                    return Ok(Turn::Limited(wait));
                }
                Outcome::Full => {
                    rings.put_back(0);
                    return Ok(Turn::Full);
                }
            }
        }
        Ok(Turn::More)
    }

    /// Does a request, if limits allow it. An error is a chain that is none, for which there is no answer.
    fn handle(&mut self, chain: &Chain) -> Result<Outcome, ChainError> {
        let Some(room) = chain.answer.len().checked_sub(1) else {
            return Err(ChainError::Short { len: 0, needed: 1 });
        };
        let mut header = [0; HEADER_LEN];
        let Some(readable) = chain.request.len().checked_sub(HEADER_LEN as u64) else {
            return Ok(Outcome::refused(Status::IoError));
        };
        chain.request.read(chain.mem, 0, &mut header)?;
        let request = match self.limits.parse(&header, readable, room) {
            Ok(request) => request,
            Err(status) => return Ok(Outcome::refused(status)),
        };
        let segments = match self.segments(request, chain)? {
            Ok(segments) => segments,
            Err(status) => return Ok(Outcome::refused(status)),
        };
        let cost = request.cost(&segments);
        if let Some(refusal) = self.refuses(request, &segments) {
            return Ok(refusal);
        }
        match self.perform(request, &segments, chain) {
            Ok(written) => {
                self.count(request, &segments);
                Ok(Outcome::Done { status: Status::Ok, written, cost })
            }
            Err(Fault::Chain(error)) => Err(error),
            Err(Fault::Host(error)) => {
                self.complaints.say(Instant::now(), &self.config.id, &error);
                Ok(Outcome::Done { status: Status::IoError, written: 0, cost })
            }
        }
    }

    /// Counts a request that was done.
    fn count(&mut self, request: Request, segments: &[Segment]) {
        let stats = &mut self.stats;
        let (requests, bytes) = match request {
            Request::Read { len, .. } => (&mut stats.reads, Some((&mut stats.read_bytes, len))),
            Request::Write { len, .. } => (&mut stats.writes, Some((&mut stats.written_bytes, len))),
            Request::WriteZeroes { .. } => {
                let len = segments.iter().map(|segment| segment.len).sum();
                (&mut stats.writes, Some((&mut stats.written_bytes, len)))
            }
            Request::Flush => (&mut stats.flushes, None),
            Request::Discard { .. } => (&mut stats.discards, None),
            Request::GetId => return,
        };
        *requests += 1;
        if let Some((sum, len)) = bytes {
            *sum += len;
        }
    }

    /// The ranges of a request that has a list of them.
    fn segments(&mut self, request: Request, chain: &Chain) -> Result<Result<Vec<Segment>, Status>, ChainError> {
        let (Request::Discard { list } | Request::WriteZeroes { list }) = request else { return Ok(Ok(Vec::new())) };
        self.bounce.resize(list, 0);
        chain.request.read(chain.mem, HEADER_LEN as u64, &mut self.bounce)?;
        Ok(self.limits.segments(request, &self.bounce))
    }

    /// Whether limits hold a request back. What they let pass is counted.
    fn refuses(&mut self, request: Request, segments: &[Segment]) -> Option<Outcome> {
        let growth = match request {
            Request::Write { offset, len } => self.disk.growth(offset, len),
            Request::WriteZeroes { .. } => {
                segments.iter().map(|segment| self.disk.zero_growth(segment.offset, segment.len)).sum()
            }
            Request::Read { .. } | Request::Flush | Request::GetId | Request::Discard { .. } => 0,
        };
        let limit = self.config.max_overlay_mib.map(|mib| mib.saturating_mul(1 << 20));
        if growth > 0 && limit.is_some_and(|limit| self.disk.private_bytes() + growth > limit) {
            return Some(Outcome::Full);
        }
        self.rate.take(request.traffic(segments), Instant::now()).err().map(Outcome::Limited)
    }

    /// Does a request. Returns how many bytes of the answer were written.
    fn perform(&mut self, request: Request, segments: &[Segment], chain: &Chain) -> Result<u64, Fault> {
        match request {
            Request::Read { offset, len } => {
                for (at, piece) in pieces(len) {
                    self.bounce.resize(piece, 0);
                    self.disk.read(offset + at, &mut self.bounce)?;
                    chain.answer.write(chain.mem, at, &self.bounce)?;
                }
                return Ok(len);
            }
            Request::Write { offset, len } => {
                for (at, piece) in pieces(len) {
                    self.bounce.resize(piece, 0);
                    chain.request.read(chain.mem, HEADER_LEN as u64 + at, &mut self.bounce)?;
                    self.disk.write(offset + at, &self.bounce)?;
                }
            }
            Request::Flush => self.disk.flush()?,
            Request::GetId => {
                let mut id = [0; ID_LEN];
                let name = self.config.id.as_bytes();
                let len = name.len().min(ID_LEN);
                id[..len].copy_from_slice(&name[..len]);
                chain.answer.write(chain.mem, 0, &id)?;
                return Ok(ID_LEN as u64);
            }
            Request::Discard { .. } => {
                for &Segment { offset, len, unmap: _ } in segments {
                    self.disk.discard(offset, len)?;
                }
            }
            Request::WriteZeroes { .. } => {
                for &Segment { offset, len, unmap } in segments {
                    self.disk.zero(offset, len, unmap)?;
                }
            }
        }
        Ok(0)
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> String {
        format!("drive {}", self.config.id)
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let Limits { size: _, read_only, flush } = self.limits;
        let mut bits = vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY];
        if flush {
            bits.push(VIRTIO_BLK_F_FLUSH);
        }
        match read_only {
            true => bits.push(VIRTIO_BLK_F_RO),
            false => bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        }
        bits.into_iter().fold(VERSION_1 | EVENT_IDX, |features, bit| features | 1 << bit)
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        vec![self.event.clone()]
    }

    fn config(&self) -> Vec<u8> {
        config_space(self.limits.size)
    }

    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) {
        let (request, answer) = (Buffer::default(), Buffer::default());
        self.active = Some(Active { rings: Rings::new(mem, queues, interrupt), request, answer });
    }

    fn queues(&self) -> &[Queue] {
        self.active.as_ref().map_or(&[], |active| active.rings.queues())
    }

    fn reset(&mut self) {
        self.active = None;
        self.gate = Gate::Open;
    }

    /// After a restore, and after a pause for want of room, the device takes requests again.
    fn resume(&mut self) {
        match self.gate {
            Gate::Open | Gate::Limited => {}
            Gate::Full => {
                self.gate = Gate::Open;
                self.wake();
            }
            Gate::Restored { pending } => {
                self.gate = Gate::Open;
                if let Some(active) = &mut self.active {
                    active.rings.resume(if pending { &[] } else { &[0] });
                }
                if pending {
                    self.wake();
                }
            }
        }
    }
}

/// The configuration space (virtio 1.2, section 5.2.4).
fn config_space(size: u64) -> Vec<u8> {
    let word = |value: u32| value.to_le_bytes();
    [
        &(size / SECTOR).to_le_bytes()[..],
        &word(SIZE_MAX),
        &word(SEG_MAX),
        &word(0), // geometry, which is not offered
        &word(SECTOR as u32),
        // Topology: a physical block has 2^3 sectors, the first begins with one, and input and output in whole ones is best.
        &[CLUSTER_SECTORS.ilog2() as u8, 0],
        &(CLUSTER_SECTORS as u16).to_le_bytes(),
        &word(0),
        &[0, 0, 0, 0], // cache mode and number of queues, which are not offered
        &word(MAX_DISCARD_SECTORS),
        &word(MAX_DISCARD_SEGMENTS),
        &word(CLUSTER_SECTORS),
        &word(MAX_ZERO_SECTORS),
        &word(1),
        &[1, 0, 0, 0], // zeros may be made by giving space back
    ]
    .concat()
}

/// The chain at hand.
struct Chain<'a> {
    mem: &'a GuestMemory,
    request: &'a Buffer,
    answer: &'a Buffer,
}

/// Why a request was not done.
enum Fault {
    /// Its chain leads nowhere.
    Chain(ChainError),
    /// The host cannot.
    Host(io::Error),
}

impl From<ChainError> for Fault {
    fn from(error: ChainError) -> Fault {
        Fault::Chain(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Host(error)
    }
}

/// Offsets and lengths of the pieces of so many bytes.
fn pieces(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len.div_ceil(PIECE)).map(move |n| (n * PIECE, (len - n * PIECE).min(PIECE) as usize))
}

/// Failures of the host, which a guest can provoke as often as it likes.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    fn say(&mut self, now: Instant, id: &str, error: &io::Error) {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < COMPLAINT_INTERVAL) {
            self.unsaid += 1;
            return;
        }
        self.last = Some(now);
        match std::mem::take(&mut self.unsaid) {
            0 => tracing::error!("drive {id}: the guest sees an I/O error: {error}"),
            unsaid => {
                tracing::error!("drive {id}: the guest sees an I/O error: {error} ({unsaid} more since the last)")
            }
        }
    }
}
