//! The device as a whole: a driver of our own in place of the guest, over real memory.
//!
//! The event loop runs on the test's thread, so nothing here depends on time: [`Rig::run`] returns when there is nothing
//! more to do. The timer of the statistics is not waited for either: [`Rig::tick`] does what it does.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use api_spec::devices;
use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use snapshot::state::BalloonState;
use vm_memory::{Bytes, GuestAddress};

use super::super::interrupt::Interrupt;
use super::super::mmio::{MmioTransport, TransportError};
use super::super::{EVENT_IDX, VERSION_1, status};
use super::Balloon;
use super::device::{MAX_NUMBERS, REPORTING, STATS_VQ};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::VirtioDevice;
use crate::devices::{GuestMemory, lock};
use crate::memory::{GuestRam, PAGE_SIZE, layout};

const MEMORY: u64 = 8 << 20;
const SIZE: u16 = 16;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// Where the driver's queues begin, and its buffers, and how long a buffer may be.
const QUEUES: u64 = 0x1000;
const BUFFERS: u64 = 0x1_0000;
const BUFFER_LEN: u64 = 0x8000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// What fills the image.
const OLD: u8 = 0x11;

fn config() -> devices::Balloon {
    devices::Balloon {
        amount_mib: 2,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_reporting: true,
        free_page_hinting: false,
    }
}

/// The driver's side of a queue, without event indices.
#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    base: u64,
    next_avail: u16,
    seen_used: u16,
}

struct Rig {
    ram: GuestRam,
    rings: Vec<Ring>,
    balloon: Arc<Mutex<Balloon>>,
    transport: MmioTransport,
    events: EventManager<Arc<Mutex<Balloon>>>,
}

impl Rig {
    /// A machine before its driver starts: a private view, as a clone has.
    fn cold(config: devices::Balloon) -> Self {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&vec![OLD; MEMORY as usize], 0).unwrap();
        Rig::over(config, GuestRam::private_view(&image, layout::ram_regions(MEMORY)).unwrap())
    }

    fn over(config: devices::Balloon, ram: GuestRam) -> Self {
        let balloon = Balloon::new(config, ram.discarder()).unwrap();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let transport = MmioTransport::new(balloon.clone(), ram.memory().clone(), interrupt);
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(balloon.clone());
        Rig { ram, rings: Vec::new(), balloon, transport, events }
    }

    /// A machine whose driver has accepted everything but event indices.
    fn new() -> Self {
        let mut rig = Rig::cold(config());
        rig.start_driver(STATS_VQ | REPORTING, 4);
        rig
    }

    fn mem(&self) -> &GuestMemory {
        self.ram.memory()
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn has_failed(&mut self) -> bool {
        self.read(0x70) & status::NEEDS_RESET != 0
    }

    /// Starts a driver that accepts these features and sets up so many queues.
    fn start_driver(&mut self, features: u64, queues: usize) {
        for value in [0, 1, 3] {
            self.write(0x70, value);
        }
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, ((VERSION_1 | features) >> (32 * select)) as u32);
        }
        self.write(0x70, 0xb);
        self.rings.clear();
        for index in 0..queues as u64 {
            let base = QUEUES + index * 0x1000;
            self.mem().write_slice(&[0; 0x1000], GuestAddress(base)).unwrap();
            self.write(0x30, index as u32);
            self.write(0x38, SIZE.into());
            self.write(0x80, base as u32);
            self.write(0x90, base as u32 + 0x400);
            self.write(0xa0, base as u32 + 0x800);
            self.write(0x44, 1);
            self.rings.push(Ring { base, ..Ring::default() });
        }
        self.write(0x70, 0xf);
    }

    /// Runs the event loop until there is nothing to do.
    fn run(&mut self) {
        // A device that never comes to rest fails the test instead of hanging it.
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn tick(&mut self) {
        lock(&self.balloon).ask_for_statistics();
    }

    fn describe(&self, queue: usize, id: u16, addr: u64, len: u32, flags: u16) {
        let at = self.rings[queue].base + 16 * u64::from(id);
        self.mem().write_obj(addr, GuestAddress(at)).unwrap();
        self.mem().write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem().write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem().write_obj((id + 1) % SIZE, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let Ring { base, next_avail, .. } = self.rings[queue];
        let slot = base + 0x404 + 2 * u64::from(next_avail % SIZE);
        self.mem().write_obj(head, GuestAddress(slot)).unwrap();
        self.rings[queue].next_avail = next_avail.wrapping_add(1);
        self.mem().write_obj(next_avail.wrapping_add(1), GuestAddress(base + 0x402)).unwrap();
        self.write(0x50, queue as u32);
    }

    fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let Ring { base, seen_used, .. } = self.rings[queue];
        if self.mem().read_obj::<u16>(GuestAddress(base + 0x802)).unwrap() == seen_used {
            return None;
        }
        let slot = base + 0x804 + 8 * u64::from(seen_used % SIZE);
        self.rings[queue].seen_used = seen_used.wrapping_add(1);
        Some((self.mem().read_obj(GuestAddress(slot)).unwrap(), self.mem().read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    /// Offers a buffer of these bytes, in a descriptor.
    fn put(&mut self, queue: usize, id: u16, bytes: &[u8]) {
        let addr = BUFFERS + u64::from(id) * BUFFER_LEN;
        self.mem().write_slice(bytes, GuestAddress(addr)).unwrap();
        self.describe(queue, id, addr, bytes.len() as u32, 0);
        self.offer(queue, id);
    }

    /// The driver hands over a buffer of page numbers; says whether the device gave it back.
    fn hand_over(&mut self, queue: usize, numbers: &[u32]) -> bool {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.put(queue, 3, &bytes);
        self.run();
        self.take_used(queue) == Some((3, 0))
    }

    fn put_statistics(&mut self, id: u16, free: u64) {
        let entries = [(4u16, free), (5, MEMORY), (77, 1)];
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        self.put(STATISTICS, id, &bytes);
        self.run();
    }

    fn byte(&self, page: u64) -> u8 {
        self.mem().read_obj(GuestAddress(page * PAGE_SIZE + 99)).unwrap()
    }

    fn all(&self, pages: Range<u64>, byte: u8) -> bool {
        pages.into_iter().all(|page| self.byte(page) == byte)
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.mem().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn save(&self) -> BalloonState {
        super::save(&self.balloon, || self.transport.save())
    }

    /// Another machine that goes on with this one's guest, before its vCPUs start.
    fn restored(&self, state: &BalloonState) -> Rig {
        let bytes = self.contents();
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&bytes, 0).unwrap();
        let ram = GuestRam::private_view(&image, layout::ram_regions(MEMORY)).unwrap();
        let mut rig = Rig::over(lock(&self.balloon).config, ram);
        rig.rings = self.rings.clone();
        super::restore(&rig.balloon, &mut rig.transport, state).unwrap();
        rig.run();
        rig.tick();
        assert!(rig.contents() == bytes, "restoring leaves guest memory alone");
        rig
    }

    fn resume(&mut self) {
        lock(&self.balloon).resume();
        self.run();
    }
}

#[test]
fn what_is_offered_follows_the_configuration() {
    let features = |config| {
        let mut rig = Rig::cold(config);
        (0..2).fold(0, |all, word| {
            rig.write(0x14, word);
            all | u64::from(rig.read(0x10)) << (32 * word)
        })
    };
    let plain = devices::Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_reporting: false,
        free_page_hinting: false,
    };
    assert_eq!(features(plain), VERSION_1 | EVENT_IDX);
    assert_eq!(features(config()), VERSION_1 | EVENT_IDX | STATS_VQ | REPORTING | 1 << 2);
}

#[test]
fn pages_go_into_the_balloon_and_come_out_again() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(0x100), 512, "2 MiB are wanted");
    assert!(rig.hand_over(INFLATE, &[600, 602, 601, 599, 700, 602]));
    assert!(rig.all(599..603, 0) && rig.all(700..701, 0) && rig.all(603..700, OLD));
    assert_eq!(rig.byte(598), OLD);
    assert!(rig.transport.interrupt().event().read().is_ok(), "the driver is told");
    rig.write(0x104, 6);
    assert_eq!(lock(&rig.balloon).statistics().actual_pages, 6);
    assert!(rig.hand_over(DEFLATE, &[600, 601]));
    assert!(!rig.has_failed());
    let stats = lock(&rig.balloon).stats();
    assert_eq!((stats.target_mib, stats.inflations, stats.deflations, stats.reports), (2, 1, 1, 0));
    assert_eq!(stats.discarded_bytes, 5 * PAGE_SIZE);

    lock(&rig.balloon).set_target(3);
    rig.transport.config_changed();
    assert_eq!((rig.read(0x100), rig.read(0x60) & 2), (768, 2));
    rig.transport.write(0x102, &[9; 4]);
    rig.transport.write(0x105, &[1]);
    assert_eq!((rig.read(0x100), rig.read(0x104)), (768, 0x106), "only what is the driver's is written");
}

#[test]
fn free_pages_are_discarded_whole() {
    let mut rig = Rig::new();
    // A page and a half at either end of three, in two descriptors; and something that is no memory.
    rig.describe(3, 0, 300 * PAGE_SIZE + 1, 2 * PAGE_SIZE as u32, WRITE | NEXT);
    rig.describe(3, 1, 400 * PAGE_SIZE, 16 * PAGE_SIZE as u32, WRITE | NEXT);
    rig.describe(3, 2, u64::MAX - 4095, 1 << 20, WRITE);
    rig.offer(3, 0);
    rig.run();
    assert_eq!(rig.take_used(3), Some((0, 0)));
    assert_eq!([300, 301, 302, 399, 400, 415, 416].map(|page| rig.byte(page)), [OLD, 0, OLD, OLD, 0, 0, OLD]);
    let stats = lock(&rig.balloon).stats();
    assert_eq!((stats.reports, stats.reported_bytes, stats.discarded_bytes), (1, 17 * PAGE_SIZE, 17 * PAGE_SIZE));
    assert!(!rig.has_failed());
}

#[test]
fn a_report_of_all_memory_takes_many_turns_and_holds_nobody_up() {
    let mut rig = Rig::new();
    let report = |rig: &mut Rig| {
        rig.describe(3, 0, 1024 * PAGE_SIZE, u32::MAX - 0xf_ffff, WRITE | NEXT);
        rig.describe(3, 1, 600 * PAGE_SIZE, 8 * PAGE_SIZE as u32, WRITE);
        rig.offer(3, 0);
    };
    report(&mut rig);
    rig.events.run_with_timeout(0).unwrap();
    assert!(rig.all(1024..2048, 0) && rig.byte(600) == OLD, "it has been begun");
    let numbers = 700u32.to_le_bytes();
    rig.put(INFLATE, 3, &numbers);
    rig.events.run_with_timeout(0).unwrap();
    rig.events.run_with_timeout(0).unwrap();
    assert_eq!((rig.take_used(INFLATE), rig.take_used(3)), (Some((3, 0)), None), "others have their turn");

    // Saved in the midst of it: whoever goes on takes it anew.
    let state = rig.save();
    assert!(state.pending);
    let mut clone = rig.restored(&state);
    clone.resume();
    rig.run();
    for rig in [&mut rig, &mut clone] {
        assert_eq!((rig.take_used(3), rig.take_used(3)), (Some((0, 0)), None));
        assert!(rig.all(600..608, 0) && rig.all(608..700, OLD) && !rig.has_failed());
        // The queue goes on where it should.
        rig.describe(3, 2, 650 * PAGE_SIZE, PAGE_SIZE as u32, WRITE);
        rig.offer(3, 2);
        rig.run();
        assert_eq!((rig.take_used(3), rig.byte(650)), (Some((2, 0)), 0));
    }
    report(&mut rig);
    rig.events.run_with_timeout(0).unwrap();
    rig.start_driver(STATS_VQ | REPORTING, 4);
    rig.run();
    assert_eq!(rig.take_used(3), None, "a reset ends it");
}

#[test]
fn a_driver_may_refuse_the_queues_that_features_decide() {
    for (features, queues, reporting) in [(REPORTING, 3, Some(2)), (STATS_VQ, 3, None), (0, 2, None)] {
        let mut rig = Rig::cold(config());
        rig.start_driver(features, queues);
        assert_eq!(rig.read(0x70), 0xf, "{features:#x}");
        assert!(rig.hand_over(INFLATE, &[900]));
        if let Some(queue) = reporting {
            rig.describe(queue, 0, 901 * PAGE_SIZE, PAGE_SIZE as u32, WRITE);
            rig.offer(queue, 0);
            rig.run();
            assert_eq!(rig.byte(901), 0);
        }
        rig.tick();
        let state = rig.save();
        let mut clone = rig.restored(&state);
        clone.resume();
        assert!(clone.hand_over(INFLATE, &[902]));
        assert_eq!([900, 902].map(|page| clone.byte(page)), [0, 0]);
    }
    let mut rig = Rig::cold(config());
    rig.start_driver(REPORTING, 2);
    assert!(rig.has_failed(), "what it has accepted it has to set up");
}

#[test]
fn statistics_go_back_and_forth() {
    let mut rig = Rig::new();
    rig.tick();
    rig.put_statistics(5, 1000);
    assert_eq!(rig.take_used(STATISTICS), None, "the buffer is kept");
    let shown = lock(&rig.balloon).statistics();
    assert_eq!((shown.free_memory, shown.total_memory, shown.swap_in), (Some(1000), Some(MEMORY), None));
    assert_eq!((shown.target_pages, shown.target_mib), (512, 2));
    rig.tick();
    assert_eq!(rig.take_used(STATISTICS), Some((5, 0)), "new ones are asked for");
    rig.tick();
    assert_eq!(rig.take_used(STATISTICS), None, "once");
    rig.put_statistics(5, 2000);
    assert_eq!(lock(&rig.balloon).statistics().free_memory, Some(2000));
    rig.put_statistics(6, 3000);
    assert_eq!(rig.take_used(STATISTICS), Some((5, 0)), "one is kept at a time");
    assert_eq!(lock(&rig.balloon).stats().updates, 3);
    assert!(!rig.has_failed());
}

#[test]
fn a_clone_goes_on_with_the_statistics_that_were_kept() {
    let mut rig = Rig::new();
    rig.put_statistics(5, 1000);
    rig.write(0x104, 77);
    rig.hand_over(INFLATE, &[800]);
    let state = rig.save();
    assert_eq!((state.held, state.actual, state.pending), (Some(5), 77, false));
    let mut clone = rig.restored(&state);
    assert_eq!(clone.save(), state, "also before it runs");
    let before = clone.contents();
    clone.resume();
    assert!(clone.contents() == before, "a clone at rest leaves guest memory alone");
    let shown = lock(&clone.balloon).statistics();
    assert_eq!((shown.free_memory, shown.actual_pages), (Some(1000), 77));
    for rig in [&mut rig, &mut clone] {
        rig.tick();
        assert_eq!(rig.take_used(STATISTICS), Some((5, 0)), "both go on");
        rig.put_statistics(5, 2000);
        assert_eq!(lock(&rig.balloon).statistics().free_memory, Some(2000));
    }
}

#[test]
fn what_is_in_the_queues_is_taken_before_saving_or_by_the_clone() {
    let mut rig = Rig::new();
    // More than a turn's worth, and nothing has run yet.
    for id in 0..3u16 {
        let numbers: Vec<u8> =
            (0..MAX_NUMBERS as u32).flat_map(|n| (1024 + n % 64 + 64 * u32::from(id)).to_le_bytes()).collect();
        rig.put(INFLATE, id, &numbers);
    }
    let state = rig.save();
    assert!(state.pending);
    assert!(rig.all(1024..1088, 0) && rig.all(1088..1216, OLD));
    let mut clone = rig.restored(&state);
    assert!(clone.save().pending, "still");
    clone.resume();
    rig.run();
    for rig in [&mut rig, &mut clone] {
        assert!(rig.all(1024..1216, 0) && rig.all(1216..1300, OLD));
        assert!((0..3).all(|id| rig.take_used(INFLATE) == Some((id, 0))));
        assert!(!rig.save().pending);
    }
}

#[test]
fn a_kept_buffer_that_cannot_be_is_refused() {
    let mut rig = Rig::new();
    rig.put_statistics(5, 1);
    let good = rig.save();
    let refused = |change: fn(&mut BalloonState)| {
        let mut state = good.clone();
        change(&mut state);
        let mut rig = Rig::cold(config());
        super::restore(&rig.balloon, &mut rig.transport, &state).unwrap_err()
    };
    assert_eq!(refused(|state| state.held = Some(SIZE)), TransportError::Held(SIZE));
    assert_eq!(refused(|state| state.transport.status = 0), TransportError::Held(5));
    assert_eq!(refused(|state| state.transport.driver_features &= !STATS_VQ), TransportError::Held(5));
}

#[test]
fn a_reset_forgets_and_the_next_driver_starts_afresh() {
    let mut rig = Rig::new();
    rig.put_statistics(5, 1);
    rig.write(0x104, 9);
    rig.start_driver(STATS_VQ | REPORTING, 4);
    let shown = lock(&rig.balloon).statistics();
    assert_eq!((shown.actual_pages, shown.free_memory, shown.target_pages), (0, None, 512));
    rig.tick();
    assert_eq!(rig.take_used(STATISTICS), None);
    assert!(rig.hand_over(INFLATE, &[600]));
}

#[test]
fn pages_that_are_not_ram_are_ignored() {
    let mut rig = Rig::new();
    let end = (MEMORY / PAGE_SIZE) as u32;
    assert!(rig.hand_over(INFLATE, &[end, end - 1, u32::MAX, 0xd_0000]));
    assert_eq!(rig.byte(u64::from(end) - 1), 0);
    assert!(!rig.has_failed());
}

#[test]
fn a_driver_that_breaks_the_rules_stops_the_device_alone() {
    let good = [1u32, 2, 3].map(u32::to_le_bytes).concat();
    type BreakRules = fn(&mut Rig, &[u8]);
    let cases: [(&str, BreakRules); 8] = [
        ("half a number", |rig, good| rig.put(INFLATE, 0, &good[..6])),
        ("no numbers", |rig, _| rig.put(INFLATE, 0, &[])),
        ("too many", |rig, _| {
            rig.describe(INFLATE, 0, BUFFERS, 4 * MAX_NUMBERS as u32 + 4, 0);
            rig.offer(INFLATE, 0);
        }),
        ("4 GiB", |rig, _| {
            rig.describe(INFLATE, 0, BUFFERS, u32::MAX - 3, 0);
            rig.offer(INFLATE, 0);
        }),
        ("the wrong direction", |rig, _| {
            rig.describe(INFLATE, 0, BUFFERS, 4, WRITE);
            rig.offer(INFLATE, 0);
        }),
        ("no memory", |rig, _| {
            rig.describe(STATISTICS, 0, MEMORY - 5, 10, 0);
            rig.offer(STATISTICS, 0);
        }),
        ("a loop", |rig, _| {
            (0..SIZE).for_each(|id| rig.describe(DEFLATE, id, BUFFERS, 4, NEXT));
            rig.offer(DEFLATE, 0);
        }),
        ("an index that leaps", |rig, _| {
            rig.mem().write_obj(1000u16, GuestAddress(QUEUES + 0x402)).unwrap();
            rig.write(0x50, 0);
        }),
    ];
    for (what, break_rules) in cases {
        let mut rig = Rig::new();
        break_rules(&mut rig, &good);
        rig.run();
        assert!(rig.has_failed(), "{what}");
        let before = rig.contents();
        rig.tick();
        rig.put(INFLATE, 0, &good);
        rig.run();
        assert!(before[0x2_0000..] == rig.contents()[0x2_0000..], "{what}: its memory is left alone");
        let clone = rig.restored(&rig.save());
        assert!(lock(&clone.balloon).active.is_none(), "{what}: it stays failed");
        rig.start_driver(0, 2);
        assert!(rig.hand_over(INFLATE, &[600]), "{what}: a reset heals");
    }
}

#[test]
fn a_driver_that_gives_its_own_queue_away_harms_itself() {
    let mut rig = Rig::new();
    rig.hand_over(INFLATE, &[(QUEUES / PAGE_SIZE) as u32]);
    rig.hand_over(INFLATE, &[600]);
    rig.start_driver(0, 2);
    assert!(rig.hand_over(INFLATE, &[601]));
    assert_eq!(rig.byte(601), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the queues, the device comes to rest, and works for the next driver.
    #[test]
    fn random_rings_do_no_harm(
        bytes in prop::collection::vec(prop_oneof![Just(0u8), 0u8..20, any::<u8>()], 4 * 0x100),
        indices in prop::array::uniform4(0u16..20), ticks in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        for (queue, index) in indices.into_iter().enumerate() {
            let base = rig.rings[queue].base;
            rig.mem().write_slice(&bytes[queue * 0x100..][..0x100], GuestAddress(base)).unwrap();
            rig.mem().write_obj(index, GuestAddress(base + 0x402)).unwrap();
            rig.write(0x50, queue as u32);
        }
        rig.run();
        if ticks {
            rig.tick();
        }
        let state = rig.save();
        let mut clone = rig.restored(&state);
        clone.resume();
        for rig in [&mut rig, &mut clone] {
            rig.start_driver(STATS_VQ | REPORTING, 4);
            prop_assert!(rig.hand_over(INFLATE, &[600]));
            prop_assert_eq!(rig.byte(600), 0);
        }
    }
}
