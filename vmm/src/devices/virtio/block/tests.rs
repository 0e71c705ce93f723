//! The device as a whole: a driver of our own in place of the guest.
//!
//! The event loop runs on the test's thread; [`Rig::run`] returns when there is nothing more to do.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use api_spec::devices::{RateLimiter, TokenBucket};
use api_spec::stats::DriveStats;
use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use snapshot::state::DriveState;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::interrupt::Interrupt;
use super::super::mmio::MmioTransport;
use super::super::{EVENT_IDX, VERSION_1, VirtioDevice, status};
use super::disk::{Frozen, Image};
use super::request::{MAX_DISCARD_SECTORS, SECTOR, Status};
use super::{Block, BlockConfig, Disk};
use crate::devices::bus::BusDevice;
use crate::devices::{GuestMemory, lock};
use crate::notice::Halt;

const MEMORY: usize = 2 << 20;
const SIZE: u16 = 64;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const STATUSES: u64 = 0x5000;
const DATA: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const DISK: u64 = 1 << 20;

/// A piece of a chain: where, how long, and whether the device writes it.
type Piece = (u64, u32, bool);

/// The driver's variables. They survive with the guest's memory.
#[derive(Clone, Copy, Debug, Default)]
struct Driver {
    next_avail: u16,
    seen_used: u16,
}

/// A machine with nothing but a disk.
struct Rig {
    mem: GuestMemory,
    driver: Driver,
    block: Arc<Mutex<Block>>,
    transport: MmioTransport,
    events: EventManager<Arc<Mutex<Block>>>,
    halts: Receiver<Halt>,
    event_idx: bool,
}

fn config() -> BlockConfig {
    BlockConfig { id: "root".into(), flush: true, rate_limiter: None, max_overlay_mib: None }
}

fn image(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.path().join("disk.img");
    let bytes: Vec<u8> = (0..DISK).map(|i| (i / 251) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn overlay(path: &Path) -> Disk {
    Disk::overlay("root", DISK, Some(Image::open("root", path, false).unwrap()), None).unwrap()
}

impl Rig {
    /// A machine before its driver starts.
    fn cold(config: BlockConfig, disk: Disk, mem: GuestMemory, driver: Driver, event_idx: bool) -> Self {
        let (send, halts) = channel();
        let block = Block::new(BlockConfig::default(), Box::new(move |halt| send.send(halt).unwrap())).unwrap();
        let transport = MmioTransport::new(block.clone(), mem.clone(), Arc::new(Interrupt::new().unwrap()));
        // As in every machine: the disk comes last, and all that the guest sees of the device goes by it.
        lock(&block).insert(config, disk);
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(block.clone());
        Rig { mem, driver, block, transport, events, halts, event_idx }
    }

    /// A machine whose driver has started.
    fn with(config: BlockConfig, disk: Disk, event_idx: bool) -> Self {
        let mem = crate::memory::from_zero(MEMORY);
        let mut rig = Rig::cold(config, disk, mem, Driver::default(), event_idx);
        rig.start_driver();
        rig
    }

    fn new(disk: Disk) -> Self {
        Rig::with(config(), disk, true)
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

    fn features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | u64::from(self.read(0x10)) << 32
    }

    fn start_driver(&mut self) {
        for at in (DESC..HEADERS).step_by(8) {
            self.mem.write_obj(0u64, GuestAddress(at)).unwrap();
        }
        self.driver = Driver::default();
        let wanted = self.features() & !if self.event_idx { 0 } else { EVENT_IDX };
        assert!(wanted & VERSION_1 != 0);
        for value in [0, 1, 3] {
            self.write(0x70, value);
        }
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, (wanted >> (32 * select)) as u32);
        }
        self.write(0x70, 0xb);
        for (offset, value) in [(0x30, 0), (0x38, SIZE.into()), (0x80, DESC as u32), (0x90, AVAIL as u32)] {
            self.write(offset, value);
        }
        self.write(0xa0, USED as u32);
        self.write(0x44, 1);
        self.write(0x70, 0xf);
        assert_eq!(self.read(0x70), 0xf);
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

    /// Waits for the rate limit's timer.
    fn run_timer(&mut self) {
        while self.events.run_with_timeout(1000).unwrap() == 0 {}
        self.run();
    }

    fn describe(&self, id: u16, (addr, len, write): Piece, next: Option<u16>) {
        let at = DESC + 16 * u64::from(id);
        let flags = if write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next.unwrap_or(0), GuestAddress(at + 14)).unwrap();
    }

    /// Offers a chain of these pieces in the descriptors from `head` on.
    fn offer(&mut self, head: u16, pieces: &[Piece]) {
        for (i, piece) in pieces.iter().enumerate() {
            let id = head + i as u16;
            self.describe(id, *piece, (i + 1 < pieces.len()).then_some(id + 1));
        }
        self.offer_head(head);
    }

    fn offer_head(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.driver.next_avail % SIZE);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.driver.next_avail = self.driver.next_avail.wrapping_add(1);
        self.mem.write_obj(self.driver.next_avail, GuestAddress(AVAIL + 2)).unwrap();
        self.write(0x50, 0);
    }

    /// The next used chain and how much was written to it.
    fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.mem.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() == self.driver.seen_used {
            return None;
        }
        let slot = USED + 4 + 8 * u64::from(self.driver.seen_used % SIZE);
        self.driver.seen_used = self.driver.seen_used.wrapping_add(1);
        self.mem.write_obj(self.driver.seen_used, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
        let id: u32 = self.mem.read_obj(GuestAddress(slot)).unwrap();
        Some((id as u16, self.mem.read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    fn put_header(&self, n: u64, kind: u32, sector: u64) -> Piece {
        let at = HEADERS + 16 * n;
        self.mem.write_obj(kind, GuestAddress(at)).unwrap();
        self.mem.write_obj(sector, GuestAddress(at + 8)).unwrap();
        (at, 16, false)
    }

    /// A place for a status that is none yet.
    fn put_status(&self, n: u64) -> Piece {
        self.mem.write_obj(0xffu8, GuestAddress(STATUSES + n)).unwrap();
        (STATUSES + n, 1, true)
    }

    fn status_of(&self, n: u64) -> u8 {
        self.mem.read_obj(GuestAddress(STATUSES + n)).unwrap()
    }

    /// Offers a write without waiting for it.
    fn offer_write(&mut self, n: u64, sector: u64, data: &[u8]) {
        let at = DATA + n * 0x1_0000;
        self.mem.write_slice(data, GuestAddress(at)).unwrap();
        let chain = [self.put_header(n, OUT, sector), (at, data.len() as u32, false), self.put_status(n)];
        self.offer(n as u16 * 3, &chain);
    }

    /// A request whose data is in pieces of `cut` bytes; how it ended, and how much was written.
    fn ask(&mut self, kind: u32, sector: u64, len: usize, write: bool, cut: usize) -> (u8, u32) {
        let mut chain = vec![self.put_header(0, kind, sector)];
        let starts = (0..len).step_by(cut);
        chain.extend(starts.map(|at| (DATA + at as u64, (len - at).min(cut) as u32, write)));
        chain.push(self.put_status(0));
        self.offer(0, &chain);
        self.run();
        let (head, written) = self.take_used().expect("the request was answered");
        assert_eq!((head, self.take_used()), (0, None));
        (self.status_of(0), written)
    }

    fn put(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.mem.write_slice(data, GuestAddress(DATA)).unwrap();
        self.ask(OUT, sector, data.len(), false, 1000.max(data.len() / 20)).0
    }

    fn get(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let done = self.ask(IN, sector, len, true, 700);
        assert_eq!(done, (0, len as u32 + 1));
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let list: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.mem.write_slice(&list, GuestAddress(DATA)).unwrap();
        self.ask(kind, 0, list.len(), false, 10).0
    }

    fn save(&mut self) -> DriveState {
        super::save(&self.block, || self.transport.save())
    }

    /// A clone with the same memory, over another disk.
    fn restored(&self, state: &DriveState, disk: Disk) -> Rig {
        let mem = crate::memory::from_zero(MEMORY);
        let mut bytes = vec![0; MEMORY];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        mem.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut clone = Rig::cold(config(), disk, mem, self.driver, self.event_idx);
        super::restore(&clone.block, &mut clone.transport, state).unwrap();
        clone
    }

    fn resume(&mut self) {
        lock(&self.block).resume();
        self.run();
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

#[test]
fn what_was_written_is_read_over_split_descriptors() {
    for event_idx in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let before = std::fs::read(&path).unwrap();
        let mut rig = Rig::with(config(), overlay(&path), event_idx);
        assert_eq!(rig.get(3, 4096), before[3 * 512..3 * 512 + 4096]);
        let data: Vec<u8> = (0..40_000u32 / 512 * 512).map(|i| (i % 253) as u8).collect();
        assert_eq!(rig.put(5, &data), 0);
        assert_eq!(rig.get(5, data.len()), data);
        assert_eq!(rig.get(4, 512), before[4 * 512..5 * 512]);
        assert_eq!(rig.ask(FLUSH, 0, 0, false, 1), (0, 1));
        assert!(std::fs::read(&path).unwrap() == before, "the image is not written");
        assert!(rig.transport.interrupt().event().read().is_ok());
    }
}

#[test]
fn what_was_done_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(overlay(&image(&dir)));
    rig.get(3, 4096);
    rig.put(8, &[7; 8192]);
    rig.ranges(WRITE_ZEROES, &[(64, 8, 0)]);
    rig.ranges(DISCARD, &[(8, 8, 0), (16, 8, 0)]);
    rig.ask(FLUSH, 0, 0, false, 1);
    rig.ask(GET_ID, 0, 20, true, 1);
    for _ in 0..2 {
        assert_ne!(rig.put(2047, &[9; 1024]), 0, "beyond the end");
    }
    assert_ne!(rig.ask(99, 0, 0, false, 1).0, 0, "no such request");
    let stats = lock(&rig.block).stats();
    assert!(stats.overlay_bytes <= 8192 + 4096, "{stats:?}");
    let expected = DriveStats {
        drive_id: "root".into(),
        reads: 1,
        writes: 2,
        flushes: 1,
        discards: 1,
        read_bytes: 4096,
        written_bytes: 8192 + 4096,
        errors: 3,
        ..Default::default()
    };
    assert_eq!(DriveStats { overlay_bytes: 0, ..stats }, expected);
}

#[test]
fn a_raw_disk_is_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let mut rig = Rig::new(Disk::raw(Image::open("root", &path, true).unwrap(), true));
    assert_eq!(rig.put(2047, &[9; 512]), 0);
    assert_eq!(rig.put(2047, &[9; 1024]), Status::IoError as u8, "beyond the end");
    assert_eq!(rig.ranges(WRITE_ZEROES, &[(8, 16, 1)]), 0);
    assert_eq!(rig.ask(FLUSH, 0, 0, false, 1), (0, 1));
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.len() as u64 == DISK && bytes[DISK as usize - 512..] == [9; 512]);
    assert!(bytes[4096..4096 + 8192].iter().all(|byte| *byte == 0) && bytes[4095] != 0);
}

#[test]
fn a_disk_that_is_only_read_offers_no_writing() {
    let dir = tempfile::tempdir().unwrap();
    let sealed = BlockConfig { flush: false, ..config() };
    let mut rig = Rig::with(sealed, Disk::raw(Image::open("root", &image(&dir), false).unwrap(), false), true);
    let features = rig.features();
    for (bit, offered) in [(1, true), (2, true), (5, true), (6, true), (9, false), (10, true), (13, false), (14, false)]
    {
        assert_eq!(features >> bit & 1 == 1, offered, "feature {bit}");
    }
    assert_eq!(rig.put(0, &[0; 512]), Status::IoError as u8);
    for kind in [FLUSH, DISCARD, WRITE_ZEROES, 77] {
        assert_eq!(rig.ask(kind, 0, 16, false, 16).0, Status::Unsupported as u8, "{kind}");
    }
    assert!(!rig.has_failed());
}

#[test]
fn the_configuration_says_how_large_it_is_and_what_it_takes() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    let mut bytes = [0xaa; 64];
    rig.transport.read(0x100, &mut bytes);
    assert_eq!(bytes[..8], (DISK / SECTOR).to_le_bytes());
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!([8, 12, 20, 36, 40, 48, 52].map(word), [65536, 254, 512, MAX_DISCARD_SECTORS, 16, 32768, 1]);
    assert_eq!(bytes[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!((word(44), bytes[56], &bytes[57..]), (8, 1, &[0; 7][..]));
    rig.transport.write(0x100, &[0xff; 8]);
    let mut again = [0; 64];
    rig.transport.read(0x100, &mut again);
    assert_eq!(again, bytes);
}

#[test]
fn the_name_is_told_in_twenty_bytes() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    assert_eq!(rig.ask(GET_ID, 0, 20, true, 7), (0, 21));
    let mut id = [0xff; 20];
    rig.mem.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.ask(GET_ID, 0, 24, true, 24), (0, 20));
    assert_eq!(rig.ask(GET_ID, 0, 19, true, 19), (Status::IoError as u8, 0));
}

#[test]
fn ranges_are_discarded_all_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(overlay(&image(&dir)));
    let before = rig.get(0, 32 * 512);
    let bad = [(0, MAX_DISCARD_SECTORS + 1, 0), (2048, 1, 0), (u64::MAX, 8, 0)];
    for range in bad {
        assert_eq!(rig.ranges(DISCARD, &[(0, 8, 0), range]), Status::IoError as u8, "{range:?}");
    }
    assert_eq!(rig.ranges(DISCARD, &[(0, 8, 0), (8, 8, 1)]), Status::Unsupported as u8);
    assert_eq!(rig.ranges(DISCARD, &[]), Status::IoError as u8);
    assert_eq!(rig.ranges(DISCARD, &[(0, 8, 0); 17]), Status::IoError as u8);
    assert_eq!(rig.get(0, 32 * 512), before);
    assert_eq!(rig.ranges(DISCARD, &[(0, 8, 0), (17, 3, 0)]), 0);
    assert_eq!(rig.ranges(WRITE_ZEROES, &[(20, 2, 0)]), 0);
    let mut wanted = before;
    wanted[..4096].fill(0);
    wanted[20 * 512..22 * 512].fill(0);
    assert_eq!(rig.get(0, 32 * 512), wanted);
}

#[test]
fn requests_that_make_no_sense_are_answered() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    let failed = Status::IoError as u8;
    assert_eq!(rig.ask(IN, 0, 511, true, 511).0, failed);
    assert_eq!(rig.ask(IN, u64::MAX, 512, true, 512).0, failed);
    // A header that is cut short.
    let (header, status) = (rig.put_header(0, IN, 0), rig.put_status(0));
    rig.offer(0, &[(header.0, 15, false), (DATA, 512, true), status]);
    rig.run();
    assert_eq!((rig.take_used(), rig.status_of(0)), (Some((0, 0)), failed));
    // Absurdly long data, made of the same memory many times over.
    let mut chain = vec![rig.put_header(0, OUT, 0)];
    chain.extend([(DATA, 100 << 20, false); 40]);
    chain.push(rig.put_status(0));
    rig.offer(0, &chain);
    rig.run();
    assert_eq!((rig.take_used(), rig.status_of(0)), (Some((0, 1)), failed));
    assert!(!rig.has_failed());
}

#[test]
fn a_driver_that_breaks_the_rules_stops_its_device_until_it_resets_it() {
    let end = MEMORY as u64;
    let header = (HEADERS, 16, false);
    let chains: [(&str, Vec<Piece>); 5] = [
        ("no status", vec![header, (DATA, 512, false)]),
        ("data outside of memory", vec![header, (end - 256, 512, true), (STATUSES, 1, true)]),
        ("status outside of memory", vec![header, (DATA, 512, true), (end, 1, true)]),
        ("header outside of memory", vec![(u64::MAX - 8, 16, false), (DATA, 512, true), (STATUSES, 1, true)]),
        ("read after written", vec![header, (STATUSES, 1, true), (DATA, 512, false)]),
    ];
    for (what, chain) in chains {
        let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
        rig.put_header(0, IN, 0);
        rig.offer(0, &chain);
        rig.run();
        assert!(rig.has_failed(), "{what}");
        assert_eq!(rig.take_used(), None, "{what}");
        rig.start_driver();
        assert_eq!(rig.put(1, &[5; 512]), 0, "{what}: after its reset");
    }
    // An indirect table, which was not offered, longer than any queue.
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    for n in 0..300u16 {
        let at = GuestAddress(DATA + 16 * u64::from(n));
        rig.mem.write_obj(DATA + 0x1_0000, at).unwrap();
        rig.mem.write_obj(512u32, GuestAddress(at.0 + 8)).unwrap();
        rig.mem
            .write_obj(if n < 299 { NEXT } else { 0 } | if n > 0 { WRITE } else { 0 }, GuestAddress(at.0 + 12))
            .unwrap();
        rig.mem.write_obj(n + 1, GuestAddress(at.0 + 14)).unwrap();
    }
    rig.describe(0, (DATA, 16 * 300, false), None);
    rig.mem.write_obj(INDIRECT, GuestAddress(DESC + 12)).unwrap();
    rig.offer_head(0);
    rig.run();
    assert!(rig.has_failed());
    // A loop, and a ring that claims more than it can hold.
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    rig.describe(0, header, Some(1));
    rig.describe(1, (DATA, 512, true), Some(0));
    rig.offer_head(0);
    rig.run();
    assert!(rig.has_failed());
    rig.start_driver();
    rig.mem.write_obj(SIZE * 3, GuestAddress(AVAIL + 2)).unwrap();
    rig.write(0x50, 0);
    rig.run();
    assert!(rig.has_failed());
}

#[test]
fn a_failing_host_is_an_io_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let mut rig = Rig::new(overlay(&path));
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert_eq!(rig.ask(IN, 64, 4096, true, 4096), (Status::IoError as u8, 0));
    assert_eq!(rig.put(64, &[1; 4096]), 0, "what needs no image is written all the same");
    assert_eq!(rig.put(80, &[1; 512]), Status::IoError as u8);
    assert!(!rig.has_failed());
}

#[test]
fn a_reset_in_mid_flight_forgets_what_waited() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    rig.offer_write(0, 0, &[7; 512]);
    rig.write(0x70, 0);
    let before = rig.memory();
    rig.run();
    assert!(rig.memory() == before, "a reset device leaves memory alone");
    rig.start_driver();
    assert_eq!(rig.get(0, 512), [0; 512]);
}

#[test]
fn a_turn_is_bounded_and_nothing_is_forgotten() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    for round in 0..4 {
        for n in 0..16 {
            rig.offer_write(n, n * 128, &vec![round + n as u8 + 1; 0xfe00]);
        }
        rig.run();
        let done: Vec<u16> = std::iter::from_fn(|| rig.take_used()).map(|(head, _)| head).collect();
        assert_eq!(done, (0..16).map(|n| n * 3).collect::<Vec<_>>());
        assert!((0..16).all(|n| rig.status_of(n) == 0));
    }
    for n in 0..16 {
        assert_eq!(rig.get(n * 128, 512), [3 + n as u8 + 1; 512]);
    }
}

#[test]
fn the_rate_limit_holds_requests_back_until_the_timer() {
    let bucket = TokenBucket { size: 1024, one_time_burst: None, refill_time: 20 };
    let rate_limiter = Some(RateLimiter { bandwidth: Some(bucket), ops: None });
    let disk = Disk::overlay("root", DISK, None, None).unwrap();
    let mut rig = Rig::with(BlockConfig { rate_limiter, ..config() }, disk, true);
    for n in 0..3 {
        rig.offer_write(n, n * 2, &[n as u8 + 1; 1024]);
    }
    let mut done = 0;
    rig.run();
    while done < 3 {
        match rig.take_used() {
            Some(_) => done += 1,
            None => rig.run_timer(),
        }
    }
    assert!((0..3).all(|n| rig.status_of(n) == 0));
    assert!(lock(&rig.block).stats().throttled >= 2, "two had to wait");
}

/// A request that would wait for ever goes on.
#[test]
fn a_rate_limit_that_is_lifted_lets_waiting_requests_pass() {
    let bucket = TokenBucket { size: 1024, one_time_burst: None, refill_time: u64::MAX };
    let rate_limiter = Some(RateLimiter { bandwidth: Some(bucket), ops: None });
    let disk = Disk::overlay("root", DISK, None, None).unwrap();
    let mut rig = Rig::with(BlockConfig { rate_limiter, ..config() }, disk, true);
    for n in 0..2 {
        rig.offer_write(n, n * 2, &[n as u8 + 1; 1024]);
    }
    rig.run();
    assert!(rig.take_used().is_some() && rig.take_used().is_none(), "the second waits");
    let lifted = TokenBucket { size: 0, refill_time: 0, ..bucket };
    lock(&rig.block).set_rate(Some(&RateLimiter { bandwidth: Some(lifted), ops: None }));
    rig.run_timer();
    assert!(rig.take_used().is_some());
    assert_eq!(rig.status_of(1), 0);
}

#[test]
fn a_full_overlay_pauses_the_guest_and_the_request_waits() {
    let disk = Disk::overlay("root", 4 << 20, None, None).unwrap();
    let mut rig = Rig::with(BlockConfig { max_overlay_mib: Some(1), ..config() }, disk, true);
    for n in 0..16 {
        assert_eq!(rig.put(n * 128, &vec![1; 0x1_0000]), 0);
    }
    assert_eq!(rig.put(0, &vec![2; 0x1_0000]), 0, "what is there can be written again");
    rig.offer_write(0, 4096, &[3; 512]);
    rig.run();
    assert_eq!(rig.take_used(), None);
    let halt = rig.halts.try_recv().unwrap();
    assert_eq!(halt, Halt::Overlay { drive_id: "root".into(), limit_mib: 1 });
    assert!(halt.to_string().contains("max_overlay_mib"));
    rig.write(0x50, 0);
    rig.run();
    assert!(rig.halts.try_recv().is_err(), "it is said once");
    assert!(rig.save().pending, "what waits is part of the state");

    rig.resume();
    assert!(rig.halts.try_recv().is_ok(), "nothing has changed");
    lock(&rig.block).set_max_overlay(Some(2));
    rig.resume();
    assert_eq!((rig.take_used(), rig.status_of(0)), (Some((0, 1)), 0));
    assert_eq!(rig.get(4096, 512), [3; 512]);
    // Space that is given back can be used again.
    lock(&rig.block).set_max_overlay(Some(1));
    assert_eq!(rig.ranges(DISCARD, &[(0, 2048, 0)]), 0);
    assert_eq!(rig.put(5000, &[4; 512]), 0);
}

#[test]
fn a_drain_is_bounded_by_the_queue_that_a_read_may_write_over() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    // Each request reads over the available ring that there is another, and over its own header which sector that reads.
    let requests = 2 * SIZE;
    let first = rig.driver.next_avail.wrapping_add(requests);
    for n in 0..requests {
        let mut sectors = [0; 1024];
        sectors[2..4].copy_from_slice(&first.wrapping_add(n + 2).to_le_bytes());
        sectors[512 + 8..512 + 10].copy_from_slice(&(2 * (n + 1)).to_le_bytes());
        assert_eq!(rig.put(2 * u64::from(n), &sectors), 0);
    }
    let (header, status) = (rig.put_header(0, IN, 0), rig.put_status(0));
    rig.offer(0, &[header, (AVAIL, 512, true), (HEADERS, 512, true), status]);
    let used = |rig: &Rig| rig.mem.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    let before = used(&rig);
    assert!(rig.save().pending);
    assert_eq!(used(&rig).wrapping_sub(before), SIZE);
}

#[test]
fn a_drain_does_not_flush_without_end() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    for _ in 0..SIZE {
        let (header, status) = (rig.put_header(0, FLUSH, 0), rig.put_status(0));
        rig.describe(0, header, Some(1));
        rig.describe(1, status, None);
        rig.offer_head(0);
    }
    assert!(
        rig.save().pending,
        "a flush costs as much as a mebibyte: what is at the bound has been looked at no further"
    );
}

#[test]
fn zeros_and_discarded_ranges_count_as_traffic() {
    for (kind, sectors) in [(WRITE_ZEROES, 2), (DISCARD, 8)] {
        let bucket = TokenBucket { size: 1024, one_time_burst: None, refill_time: 1_000_000 };
        let rate_limiter = Some(RateLimiter { bandwidth: Some(bucket), ops: None });
        let disk = Disk::overlay("root", DISK, None, None).unwrap();
        let mut rig = Rig::with(BlockConfig { rate_limiter, ..config() }, disk, true);
        assert_eq!(rig.ranges(kind, &[(0, sectors, 0)]), 0, "the first empties the bucket");
        rig.offer_write(0, 0, &[1; 512]);
        rig.run();
        assert_eq!(rig.take_used(), None, "{kind}");
    }
}

/// What a snapshot would hold of a disk, for a clone.
fn held(rig: &Rig) -> snapshot::disk::Held {
    let Frozen::Layers(_, stack) = lock(&rig.block).freeze().unwrap() else { panic!("it is an overlay") };
    let dir = tempfile::tempdir().unwrap();
    let file = File::create_new(dir.path().join("held")).unwrap();
    let flat = stack.flattened();
    let clusters = snapshot::create::LayerSource::clusters(&flat).clone();
    for (run, _) in clusters.runs(0..clusters.count()).filter(|(_, s)| *s == snapshot::clusters::Cluster::Data) {
        let mut bytes = vec![0; ((run.end - run.start) * 4096) as usize];
        stack.read(run.start * 4096, &mut bytes).unwrap();
        file.write_all_at(&bytes, run.start * 4096).unwrap();
    }
    stack.fold(&AtomicBool::new(false)).unwrap().into_iter().for_each(|folded| lock(&rig.block).adopt(&folded));
    snapshot::disk::Held { file: File::open(dir.path().join("held")).unwrap(), clusters }
}

#[test]
fn a_saved_disk_goes_on_in_clones_that_do_not_see_each_other() {
    for event_idx in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let mut rig = Rig::with(config(), overlay(&path), event_idx);
        assert_eq!(rig.put(0, &[1; 4096]), 0);
        // In flight when the state is saved: it is done before.
        rig.offer_write(1, 100, &[2; 512]);
        let state = rig.save();
        assert!(!state.pending);
        assert_eq!((rig.take_used(), rig.status_of(1)), (Some((3, 1)), 0));

        let mut clones: Vec<Rig> = Vec::new();
        for _ in 0..2 {
            let image = Image::open("root", &path, false).unwrap();
            let disk = Disk::overlay("root", DISK, Some(image), Some(held(&rig))).unwrap();
            let mut clone = rig.restored(&state, disk);
            let before = clone.memory();
            clone.run();
            clone.resume();
            assert!(clone.memory() == before, "a clone with nothing to do touches no memory");
            clones.push(clone);
        }
        for (i, clone) in clones.iter_mut().enumerate() {
            assert_eq!(clone.get(0, 4096), [1; 4096]);
            assert_eq!(clone.get(100, 512), [2; 512]);
            assert_eq!(clone.put(100, &[10 + i as u8; 512]), 0);
        }
        for (i, clone) in clones.iter_mut().enumerate() {
            assert_eq!(clone.get(100, 512), [10 + i as u8; 512]);
        }
        assert_eq!(rig.get(100, 512), [2; 512]);
    }
}

#[test]
fn what_was_held_back_is_done_by_the_clone() {
    let bucket = TokenBucket { size: 1, one_time_burst: None, refill_time: 1_000_000 };
    let rate_limiter = Some(RateLimiter { bandwidth: None, ops: Some(bucket) });
    let disk = Disk::overlay("root", DISK, None, None).unwrap();
    let mut rig = Rig::with(BlockConfig { rate_limiter, ..config() }, disk, true);
    rig.offer_write(0, 0, &[1; 512]);
    rig.offer_write(1, 1, &[2; 512]);
    rig.run();
    assert_eq!(rig.take_used(), Some((0, 1)));
    let state = rig.save();
    assert!(state.pending);
    assert_eq!(rig.take_used(), None);
    let mut clone = rig.restored(&state, Disk::overlay("root", DISK, None, Some(held(&rig))).unwrap());
    let before = clone.memory();
    clone.run();
    assert!(clone.memory() == before, "not before it is resumed");
    assert_eq!(clone.save(), state, "and it can be saved again as it is");
    clone.resume();
    assert_eq!((clone.take_used(), clone.status_of(1)), (Some((3, 1)), 0));
    assert_eq!(clone.get(0, 1024), [[1; 512], [2; 512]].concat());
}

#[test]
fn a_device_that_has_failed_is_restored_as_failed() {
    let mut rig = Rig::new(Disk::overlay("root", DISK, None, None).unwrap());
    rig.offer(0, &[(HEADERS, 16, false)]);
    rig.run();
    assert!(rig.has_failed());
    let state = rig.save();
    assert!(!state.pending);
    let mut clone = rig.restored(&state, Disk::overlay("root", DISK, None, None).unwrap());
    clone.resume();
    assert!(clone.has_failed());
    assert!(clone.transport.interrupt().event().read().is_ok(), "the driver hears of it");
    clone.start_driver();
    assert_eq!(clone.get(0, 512), [0; 512]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever is in the rings, the device answers, fails or rests; it never panics, and can be reset.
    #[test]
    fn random_rings_do_no_harm(
        descriptors in prop::collection::vec((0u64..MEMORY as u64 + 4096, prop_oneof![0u32..2048, any::<u32>()], 0u16..8, 0u16..20), 1..20),
        headers in prop::collection::vec((0u32..15, 0u64..2060), 4),
        heads in prop::collection::vec(0u16..24, 1..8),
        event_idx: bool,
    ) {
        let mut rig = Rig::with(config(), Disk::overlay("root", DISK, None, None).unwrap(), event_idx);
        for (id, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            let at = GuestAddress(DESC + 16 * id as u64);
            // Often where headers are.
            let addr = if addr % 3 == 0 { HEADERS + 16 * (addr % 4) } else { addr };
            rig.mem.write_obj(addr, at).unwrap();
            rig.mem.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
            rig.mem.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            rig.mem.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
        }
        for (n, (kind, sector)) in headers.into_iter().enumerate() {
            rig.put_header(n as u64, kind, sector);
        }
        for head in heads {
            rig.offer_head(head);
            rig.run();
        }
        rig.save();
        rig.start_driver();
        prop_assert_eq!(rig.put(0, &[1; 512]), 0);
    }
}
