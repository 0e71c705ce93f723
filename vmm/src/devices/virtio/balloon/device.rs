//! The device and its queues.
//!
//! | queue | the driver puts there | and the device |
//! |---|---|---|
//! | inflate | numbers of pages that it gives away | discards them |
//! | deflate | numbers of pages that it has taken back | gives the buffer back: the pages were always there |
//! | statistics | what it knows of its memory, once | keeps the buffer until the next statistics are due |
//! | reporting | pages that are free for now | discards them |
//!
//! The last two are there only if the driver has accepted their features, and the numbers of queues leave no gap.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api_spec::devices::{self, BalloonStatistics};
use api_spec::stats::BalloonStats;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::chain::{Buffer, Direction};
use super::super::interrupt::Interrupt;
use super::super::rings::{QueueBroken, Rings};
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice};
use super::pages;
use super::statistics::{self, Statistics};
use crate::devices::GuestMemory;
use crate::devices::alarm::Alarm;
use crate::memory::PAGE_SIZE;
use crate::memory::discard::{Discarder, Outcome};

/// The device's number in the virtio specification.
const DEVICE_TYPE: u32 = 5;
/// `VIRTIO_BALLOON_F_STATS_VQ`: there is a queue for statistics.
pub(super) const STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the driver may take pages back before the guest would run out of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`: there is a queue for pages that are free.
pub(super) const REPORTING: u64 = 1 << 5;
/// The queues, all of one size.
const QUEUE_SIZES: [u16; 4] = [256; 4];
/// Most pages that a buffer may name. Drivers name 256 or 1,024.
pub(super) const MAX_NUMBERS: u64 = 4096;
/// How much is done before other work has its turn: so many pages that were named one by one, or [`RUN_PAGES`] times as many
/// in runs. A buffer of numbers that has been begun is taken as a whole.
const TURN: u64 = 4096;
/// The same for a guest that stands still to be saved; what is left stays in the queues.
const LAST_TURN: u64 = TURN / 16;
/// How many pages of a run take about as long as one alone.
const RUN_PAGES: u64 = 4;
/// What a buffer, or a run, counts as in a turn, at least.
const BUFFER_COST: u64 = 16;
/// Pages in a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The roles of the queues of a driver with these features, in order.
pub(super) fn roles(features: u64) -> Vec<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    roles.extend((features & STATS_VQ != 0).then_some(Role::Statistics));
    roles.extend((features & REPORTING != 0).then_some(Role::Reporting));
    roles
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The system refuses an event or a timer.
    #[error("the balloon cannot have its events: {0}; raise the limit on open files")]
    Events(io::Error),
}

/// Why a driver cannot go on.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueBroken),
    #[error("a buffer of {0} bytes is no list of 1 to {MAX_NUMBERS} page numbers")]
    Numbers(u64),
}

/// What the device has while the driver drives it.
pub(super) struct Active {
    pub(super) rings: Rings,
    roles: Vec<Role>,
    /// The chain at hand.
    buffer: Buffer,
    /// The statistics buffer that the device keeps.
    pub(super) held: Option<u16>,
    /// The report that has been begun.
    report: Option<Report>,
}

/// Pages that the driver has reported as free, and that are being discarded.
struct Report {
    /// The chain that names them.
    head: u16,
    /// Those that are left, the last run first.
    rest: Vec<Range<u64>>,
}

impl Active {
    /// The number of a queue.
    pub(super) fn queue(&self, role: Role) -> Option<usize> {
        self.roles.iter().position(|r| *r == role)
    }
}

/// The balloon.
pub struct Balloon {
    pub(super) config: devices::Balloon,
    pub(super) events: Vec<Arc<EventFd>>,
    pub(super) timer: Alarm,
    discarder: Discarder,
    /// What the driver has accepted.
    accepted: u64,
    /// How many pages the driver says are in the balloon.
    pub(super) actual: u32,
    pub(super) statistics: Statistics,
    stats: BalloonStats,
    /// The vCPUs have not started after a restore: the guest's memory is left alone.
    pub(super) restored: bool,
    /// Something was left in the queues when the device was saved.
    pub(super) pending: bool,
    pub(super) active: Option<Active>,
}

impl Balloon {
    /// A balloon as configured. What the guest gives back, `discarder` discards.
    ///
    /// The result is both the device for a transport and a subscriber for the event manager.
    pub fn new(config: devices::Balloon, discarder: Discarder) -> Result<Arc<Mutex<Self>>, BalloonError> {
        let event = |_| EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(BalloonError::Events);
        let events = roles(offered(&config)).into_iter().map(event).collect::<Result<_, _>>()?;
        Ok(Arc::new(Mutex::new(Balloon {
            config,
            events,
            timer: Alarm::new().map_err(BalloonError::Events)?,
            discarder,
            accepted: 0,
            actual: 0,
            statistics: Statistics::default(),
            stats: BalloonStats::default(),
            restored: false,
            pending: false,
            active: None,
        })))
    }

    /// How large the balloon shall be. The transport has to tell the driver.
    pub fn set_target(&mut self, amount_mib: u64) {
        self.config.amount_mib = amount_mib;
    }

    /// How often the guest shall report statistics, in seconds.
    pub fn set_interval(&mut self, seconds: u16) {
        self.config.stats_polling_interval_s = seconds;
        self.wind();
    }

    /// Where the balloon stands, and what the guest said last of its memory.
    pub fn statistics(&self) -> BalloonStatistics {
        self.statistics.show(BalloonStatistics {
            target_pages: self.target().into(),
            actual_pages: self.actual.into(),
            target_mib: self.config.amount_mib,
            actual_mib: u64::from(self.actual) / PAGES_PER_MIB,
            ..Default::default()
        })
    }

    /// What the balloon has done, and where it stands.
    pub fn stats(&self) -> BalloonStats {
        let (target_mib, actual_mib) = (self.config.amount_mib, u64::from(self.actual) / PAGES_PER_MIB);
        BalloonStats { target_mib, actual_mib, ..self.stats }
    }

    /// How large the balloon shall be, in pages. A configuration that was checked fits.
    fn target(&self) -> u32 {
        self.config.amount_mib.saturating_mul(PAGES_PER_MIB).try_into().unwrap_or(u32::MAX)
    }

    /// Has the devices' thread look at a queue.
    fn wake(&self, queue: usize) {
        if let Some(event) = self.events.get(queue) {
            let _ = event.write(1); // It can only overflow when it is set already.
        }
    }

    /// Winds the timer for the next statistics, if the driver has any.
    fn wind(&mut self) {
        let seconds = self.config.stats_polling_interval_s;
        let wanted = self.active.as_ref().is_some_and(|active| active.queue(Role::Statistics).is_some());
        let asks = wanted && !self.restored && seconds > 0;
        self.timer.set(asks.then(|| Duration::from_secs(seconds.into())));
    }

    /// Asks the guest for new statistics, by giving it the buffer back.
    pub(super) fn ask_for_statistics(&mut self) {
        // Not read, which could block: the event may be older than the last winding.
        self.wind();
        if self.restored {
            return;
        }
        let Some(active) = &mut self.active else { return };
        if let (Some(queue), Some(head)) = (active.queue(Role::Statistics), active.held.take()) {
            let given = active.rings.used(queue, head, 0).and_then(|()| active.rings.interrupt());
            if let Err(error) = given {
                self.fail(&error.into());
            }
        }
    }

    /// Takes what the driver has put into a queue, up to a turn's worth.
    pub(super) fn take(&mut self, queue: usize) {
        self.take_some(queue, TURN);
    }

    /// Takes what the driver has put into a queue, up to so much. The result is whether there is more.
    fn take_some(&mut self, queue: usize, turn: u64) -> bool {
        if self.restored {
            return false;
        }
        let Some(active) = &mut self.active else { return false };
        let Some(&role) = active.roles.get(queue) else { return false };
        let (statistics, stats) = (&mut self.statistics, &mut self.stats);
        let mut work = Work { active, discarder: &self.discarder, statistics, stats };
        match work.turn(queue, role, turn) {
            Ok(more) => {
                if more {
                    self.wake(queue);
                }
                more
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Takes some of every queue, before the device is saved, and notes whether there is more. A report that has been begun
    /// goes back to its queue: whoever goes on takes it anew.
    pub(super) fn settle(&mut self) {
        if !self.restored {
            let queues = self.active.as_ref().map_or(0, |active| active.roles.len());
            // Each of them, also after one that has more.
            self.pending = (0..queues).fold(false, |more, queue| self.take_some(queue, LAST_TURN) | more);
            if let Some(active) = &mut self.active
                && active.report.take().is_some()
                && let Some(queue) = active.queue(Role::Reporting)
            {
                active.rings.put_back(queue);
            }
        }
    }

    /// The driver has broken the rules: the device leaves its memory alone until it is reset.
    fn fail(&mut self, reason: &Broken) {
        if let Some(active) = self.active.take() {
            active.rings.fail("balloon", reason);
        }
        self.wind();
    }
}

/// The features that a configuration offers.
fn offered(config: &devices::Balloon) -> u64 {
    let devices::Balloon {
        amount_mib: _,
        deflate_on_oom,
        stats_polling_interval_s,
        free_page_reporting,
        free_page_hinting: _,
    } = *config;
    let feature = |is_offered, bit| if is_offered { bit } else { 0 };
    VERSION_1
        | EVENT_IDX
        | feature(deflate_on_oom, DEFLATE_ON_OOM)
        | feature(stats_polling_interval_s > 0, STATS_VQ)
        | feature(free_page_reporting, REPORTING)
}

impl VirtioDevice for Balloon {
    fn name(&self) -> String {
        "balloon".to_owned()
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES[..self.events.len()]
    }

    fn features(&self) -> u64 {
        offered(&self.config)
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.events.clone()
    }

    /// How many pages shall be in the balloon, and how many are (virtio 1.2, section 5.5.4).
    fn config(&self) -> Vec<u8> {
        [self.target().to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    /// The driver writes how many pages are in the balloon.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.actual.to_le_bytes();
        let at = offset.checked_sub(4).and_then(|at| usize::try_from(at).ok());
        if let Some(part) = at.and_then(|at| actual.get_mut(at..at.checked_add(data.len())?)) {
            part.copy_from_slice(data);
        }
        self.actual = u32::from_le_bytes(actual);
    }

    fn negotiated(&mut self, features: u64) -> usize {
        self.accepted = features;
        roles(features).len()
    }

    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) {
        let (rings, roles) = (Rings::new(mem, queues, interrupt), roles(self.accepted));
        self.active = Some(Active { rings, roles, buffer: Buffer::default(), held: None, report: None });
        self.wind();
    }

    fn queues(&self) -> &[Queue] {
        self.active.as_ref().map_or(&[], |active| active.rings.queues())
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual = 0;
        self.statistics = Statistics::default();
        self.restored = false;
        self.pending = false;
        self.wind();
    }

    fn resume(&mut self) {
        if !std::mem::take(&mut self.restored) {
            return;
        }
        let pending = std::mem::take(&mut self.pending);
        if let Some(active) = &mut self.active {
            let all: Vec<usize> = (0..active.roles.len()).collect();
            active.rings.resume(if pending { &[] } else { &all });
            if pending {
                all.into_iter().for_each(|queue| self.wake(queue));
            }
        }
        self.wind();
    }
}

/// Everything that taking buffers needs.
struct Work<'a> {
    active: &'a mut Active,
    discarder: &'a Discarder,
    statistics: &'a mut Statistics,
    stats: &'a mut BalloonStats,
}

impl Work<'_> {
    /// Takes buffers from a queue until there are none or the turn is over. The result is whether there are more.
    fn turn(&mut self, queue: usize, role: Role, turn: u64) -> Result<bool, Broken> {
        let mut outcome = Outcome::default();
        let more = match role {
            Role::Reporting => self.take_reports(queue, turn, &mut outcome),
            Role::Inflate | Role::Deflate | Role::Statistics => self.take_buffers(queue, role, turn, &mut outcome),
        };
        // What was done before the driver broke a rule was done.
        let discarded = outcome.discarded * PAGE_SIZE;
        self.stats.discarded_bytes += discarded;
        self.stats.reported_bytes += if role == Role::Reporting { discarded } else { 0 };
        self.stats.kept_bytes += outcome.kept * PAGE_SIZE;
        let more = more?;
        self.active.rings.interrupt()?;
        if outcome.outside > 0 {
            tracing::debug!("balloon: {} pages that the guest gave back are not RAM", outcome.outside);
        }
        Ok(more)
    }

    fn take_buffers(&mut self, queue: usize, role: Role, turn: u64, outcome: &mut Outcome) -> Result<bool, Broken> {
        let mut done = 0;
        while done < turn {
            let Active { rings, buffer, .. } = &mut *self.active;
            let next = rings.next(queue, |chain| buffer.load(chain, Direction::FromDriver))?;
            let Some((head, ())) = next else { return Ok(false) };
            match role {
                Role::Inflate => self.stats.inflations += 1,
                Role::Deflate => self.stats.deflations += 1,
                Role::Statistics => self.stats.updates += 1,
                Role::Reporting => {}
            }
            let cost = if role == Role::Inflate { self.inflate(outcome)? } else { 0 };
            done += cost.max(BUFFER_COST);
            // Given back after its pages were discarded, as the guest may use them from then on.
            let back = match role {
                Role::Statistics => self.keep_statistics(queue, head)?,
                _ => Some(head),
            };
            if let Some(head) = back {
                self.active.rings.used(queue, head, 0)?;
            }
        }
        Ok(true)
    }

    /// Discards the pages that buffers consist of. A buffer may be all of memory, so that it may take many turns.
    fn take_reports(&mut self, queue: usize, turn: u64, outcome: &mut Outcome) -> Result<bool, Broken> {
        let Active { rings, buffer, report: begun, .. } = &mut *self.active;
        let mut left = turn;
        while left > 0 {
            let mut report = match begun.take() {
                Some(report) => report,
                None => {
                    let next = rings.next(queue, |chain| buffer.load(chain, Direction::ToDriver))?;
                    let Some((head, ())) = next else { return Ok(false) };
                    left = left.saturating_sub(BUFFER_COST);
                    self.stats.reports += 1;
                    let mut rest: Vec<_> = buffer.pieces().map(|(addr, len)| pages::within(addr.0, len)).collect();
                    rest.reverse();
                    Report { head, rest }
                }
            };
            while left > 0
                && let Some(Range { start, end }) = report.rest.pop()
            {
                let now = end.min(start + left.max(BUFFER_COST) * RUN_PAGES);
                *outcome += self.discarder.discard(start..now);
                left = left.saturating_sub(((now - start) / RUN_PAGES).max(BUFFER_COST));
                report.rest.extend((now < end).then_some(now..end));
            }
            match report.rest.is_empty() {
                true => rings.used(queue, report.head, 0)?,
                false => *begun = Some(report),
            }
        }
        Ok(true)
    }

    /// Discards the pages whose numbers are in the buffer. The result is how many there were.
    fn inflate(&mut self, outcome: &mut Outcome) -> Result<u64, Broken> {
        let Active { rings, buffer, .. } = &*self.active;
        let len = buffer.len();
        if len == 0 || len % 4 != 0 || len / 4 > MAX_NUMBERS {
            return Err(Broken::Numbers(len));
        }
        let mut bytes = vec![0; len as usize];
        buffer.read(rings.mem(), 0, &mut bytes).map_err(|e| QueueBroken::Chain(0, e))?;
        for run in pages::runs(pages::numbers(&bytes)) {
            *outcome += self.discarder.discard(run);
        }
        Ok(len / 4)
    }

    /// Takes in statistics and keeps their buffer. A driver has one; if one is kept already, that goes back.
    fn keep_statistics(&mut self, queue: usize, head: u16) -> Result<Option<u16>, Broken> {
        let Active { rings, buffer, held, .. } = &mut *self.active;
        let mut bytes = vec![0; buffer.len().min(statistics::MAX_BYTES) as usize];
        buffer.read(rings.mem(), 0, &mut bytes).map_err(|e| QueueBroken::Chain(queue, e))?;
        *self.statistics = Statistics::parse(&bytes);
        Ok(held.replace(head))
    }
}
