//! Discarding: a guest gives pages back, and they read as zeros from then on.
//!
//! | memory | what happens to the pages |
//! |---|---|
//! | of a guest that was booted here | a hole is punched into its memory file |
//! | a private view over an image | anonymous memory takes their place; it is recorded which pages those are |
//!
//! Dropping the pages of a private view alone (`MADV_DONTNEED`) would bring the image's bytes back, which are older than
//! what the guest gave away. The record says where a page comes from, not what it holds: a guest that takes a page back
//! writes to it, and it is then a private page like any other, only that nothing of the image lies under it.
//!
//! All this happens on the devices' thread while vCPUs run. That is safe:
//! - Mappings are replaced in place, and the kernel does that in one step as far as page faults can see: whoever accesses
//!   the range meanwhile finds old bytes or zeros. A guest that uses pages which it gave away harms itself.
//! - A freeze replaces mappings too, and a snapshot reads the record; both take the lock that a discard holds.
//! - A frozen image that is still being written is read through its file, which is sealed, not through the view.
//! - Nothing waits. Faults on a page server's pages may be pending on the range: they are answered as before, since the
//!   kernel wakes by address and does not look at what is mapped there ([`super::uffd`]), and then find the anonymous
//!   memory. No page of anonymous memory is ever put into the server's store, also not if the guest's memory is taken away
//!   ([`super::cut_off`]) just before a discard puts some of it back.
//! - In copy mode the server's answer to such a fault fails, as nothing is registered there any more, and wakes nobody: that is
//!   done here. What is registered is never advised away: that would wait until the server has read of it.

use super::pagemap::Pagemap;
use super::ranges::RangeSet;
use super::region::RamRegion;
use super::{Backing, GuestMemory, GuestRam, PAGE_SIZE, mmap};
use crate::devices::lock;
use rustix::fs::{FallocateFlags, fallocate};
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use userfaultfd::Uffd;
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

/// Once so many runs of a view's pages were replaced one by one, short ones are left alone. Each may take two more of the
/// mappings that a process can have (`vm.max_map_count`, 65,530 by default), and without any left the vmm cannot go on.
const MANY_RUNS: usize = 1_000;
/// Beyond so many, no run is begun.
const MAX_RUNS: usize = 16_000;
/// How many pages a run has that is worth a mapping when there are many: 64 KiB.
const LONG_RUN: u64 = 16;

/// The pages of a private view that do not come from its image.
#[derive(Debug, Default)]
pub(super) struct Discarded {
    /// Anonymous pages, by their place in the image.
    pages: RangeSet,
    /// What takes their place, once there are any.
    blank: Option<mmap::Blank>,
    /// How often a run was begun: what bounds the number of mappings. Runs that have grown together count as before, as
    /// the kernel cannot always join their mappings.
    begun: usize,
    /// In copy mode, what faults on the pages may be waiting for.
    pub(super) waker: Option<Arc<Uffd>>,
    /// Part of the view still is the file itself, which a freeze has left off at: what the guest writes there is no page of its own.
    pub(super) is_mixed: bool,
    /// Pages of the image stay where they are, for as long as memory may have to be brought back: see [`super::rollback`].
    pub(super) keeps_image: bool,
}

/// What became of pages that were to be discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// So many pages were discarded.
    pub discarded: u64,
    /// So many keep their bytes and their memory: they would have taken too many mappings, the kernel refused, or there is a
    /// checkpoint.
    pub kept: u64,
    /// So many are not RAM.
    pub outside: u64,
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, Outcome { discarded, kept, outside }: Outcome) {
        self.discarded += discarded;
        self.kept += kept;
        self.outside += outside;
    }
}

/// Discards pages of a guest's RAM. Made by [`GuestRam::discarder`].
#[derive(Clone, Debug)]
pub struct Discarder {
    memory: GuestMemory,
    regions: Vec<MemoryRegion>,
    backing: Arc<Mutex<Backing>>,
}

impl Discarder {
    /// Discards guest pages, named by their guest-physical addresses divided by [`PAGE_SIZE`]. Whoever reads one that was
    /// discarded reads zeros.
    pub fn discard(&self, pages: Range<u64>) -> Outcome {
        let mut outcome = Outcome { outside: pages.end.saturating_sub(pages.start), ..Outcome::default() };
        let mut backing = lock(&self.backing);
        for (region, mapped) in self.regions.iter().zip(self.memory.iter()) {
            let first = region.guest_addr / PAGE_SIZE;
            let (start, end) = (pages.start.max(first), pages.end.min(first + region.size_bytes / PAGE_SIZE));
            if start >= end {
                continue;
            }
            let count = end - start;
            outcome.outside -= count;
            let part = Part { region, mapped, pages: start - first..end - first };
            let done = match &mut *backing {
                Backing::Own(file) => part.punch(file).map(|()| true),
                Backing::Image(discarded) => part.replace(discarded),
            };
            match done {
                Ok(true) => outcome.discarded += count,
                Ok(false) => outcome.kept += count,
                Err(e) => {
                    tracing::debug!("{count} pages that the guest gave back stay: {e}");
                    outcome.kept += count;
                }
            }
        }
        outcome
    }

    /// What was discarded so far counts no more against what may be: it was not the guest that did it.
    pub(super) fn begin_anew(&self) {
        if let Backing::Image(discarded) = &mut *lock(&self.backing) {
            discarded.begun = 0;
        }
    }
}

/// A run of pages within a region of RAM, counted from the region's start.
struct Part<'a> {
    region: &'a MemoryRegion,
    mapped: &'a RamRegion,
    pages: Range<u64>,
}

impl Part<'_> {
    /// In bytes.
    fn bytes(&self) -> Range<u64> {
        self.pages.start * PAGE_SIZE..self.pages.end * PAGE_SIZE
    }

    /// Makes a hole of a part of the guest's own file.
    fn punch(&self, file: &File) -> io::Result<()> {
        let Range { start, end } = self.bytes();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file, flags, self.region.offset + start, end - start)?)
    }

    /// Has anonymous memory take the place of a part of a view. The result is whether that was done: `false` if there are
    /// too many such places already, or if the image's pages are to stay.
    fn replace(&self, discarded: &mut Discarded) -> io::Result<bool> {
        let offset = self.region.offset / PAGE_SIZE;
        let place = self.pages.start + offset..self.pages.end + offset;
        if discarded.pages.contains(place.clone()) {
            // Anonymous already, and perhaps written since.
            let Range { start, end } = self.bytes();
            self.mapped.written().mark_dirty(start as usize, (end - start) as usize);
            return mmap::empty(self.mapped.mapping(), self.bytes()).map(|()| true);
        }
        if discarded.keeps_image {
            return Ok(false);
        }
        let begins = !discarded.pages.touches(place.clone());
        if begins && !discarded.may_begin(place.end - place.start) {
            return Ok(false);
        }
        let blank = match &discarded.blank {
            Some(blank) => blank,
            None => discarded.blank.insert(mmap::Blank::new()?),
        };
        blank.put(self.mapped.mapping(), self.bytes())?;
        if let Some(uffd) = &discarded.waker {
            self.wake(uffd);
        }
        discarded.pages.insert(place);
        discarded.begun += usize::from(begins);
        if begins && discarded.begun == MANY_RUNS {
            tracing::debug!("the guest has given back {MANY_RUNS} separate runs of pages; further short ones stay");
        }
        Ok(true)
    }

    /// Has whoever waits for a page of this part look again at what is there.
    fn wake(&self, uffd: &Uffd) {
        let Range { start, end } = self.bytes();
        let addr = self.mapped.mapping().as_ptr().wrapping_add(start as usize);
        if let Err(e) = uffd.wake(addr.cast(), (end - start) as usize) {
            tracing::warn!("cannot wake those who wait for pages that the guest gave back: {e}");
        }
    }
}

impl Discarded {
    /// Nothing yet, of memory whose faults wait for this.
    pub(super) fn waking(uffd: Arc<Uffd>) -> Self {
        Discarded { waker: Some(uffd), ..Discarded::default() }
    }

    /// Nothing yet, of memory that is a view of its image only in part.
    pub(super) fn of_mixed() -> Self {
        Discarded { is_mixed: true, ..Discarded::default() }
    }

    /// Which pages those are.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        self.pages.runs().collect()
    }

    /// Whether a run of so many pages may be begun.
    fn may_begin(&self, pages: u64) -> bool {
        self.begun < if pages < LONG_RUN { MANY_RUNS } else { MAX_RUNS }
    }
}

impl GuestRam {
    /// What discards pages of this RAM.
    pub fn discarder(&self) -> Discarder {
        Discarder { memory: self.memory.clone(), regions: self.regions.clone(), backing: self.backing.clone() }
    }

    /// The parts of a view that may hold anything but zeros, as the record of discarded pages tells. Nobody may write or
    /// discard meanwhile.
    pub fn contents(&self) -> Contents {
        let anonymous = match &*lock(&self.backing) {
            Backing::Own(_) => RangeSet::default(),
            Backing::Image(discarded) => discarded.pages.clone(),
        };
        let mappings = self.mappings().map(|(region, addr)| (region, addr as u64)).collect();
        // Without it, all pages count as used.
        let pagemap = if anonymous.is_empty() { None } else { Pagemap::open().ok() };
        Contents { anonymous, mappings, pagemap, size: self.size() }
    }
}

/// Which parts of RAM may hold anything but zeros.
#[derive(Debug)]
pub struct Contents {
    /// Discarded pages, by their place in the image.
    anonymous: RangeSet,
    mappings: Vec<(MemoryRegion, u64)>,
    pagemap: Option<Pagemap>,
    size: u64,
}

impl Contents {
    /// The next range at or after `from` that may hold anything but zeros, in bytes of the image; `None` if there is none.
    /// A run of such ranges may come in parts.
    pub fn next(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = from;
        while at < self.size {
            let Some(run) = self.anonymous.run_at(at / PAGE_SIZE) else {
                let next = self.anonymous.next_run(at / PAGE_SIZE);
                return Ok(Some(at..next.map_or(self.size, |run| run.start * PAGE_SIZE)));
            };
            let Some((region, addr)) =
                self.mappings.iter().find(|(r, _)| (r.offset..r.offset + r.size_bytes).contains(&at))
            else {
                return Ok(Some(at..self.size));
            };
            let end = (run.end * PAGE_SIZE).min(region.offset + region.size_bytes);
            let used = match &self.pagemap {
                None => Some(at..end),
                Some(pagemap) => {
                    // Where a place in the image is mapped. The start is that of a page.
                    let start = at / PAGE_SIZE * PAGE_SIZE;
                    let mapped = |place: u64| place - region.offset + addr;
                    let used = pagemap.first_used(mapped(start)..mapped(end))?;
                    used.map(|used| (used.start - addr + region.offset).max(at)..used.end - addr + region.offset)
                }
            };
            match used {
                Some(used) => return Ok(Some(used)),
                None => at = end,
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use rustix::fs::fstat;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 8 << 20;
    const OLD: u8 = 0x11;
    const NEW: u8 = 0x22;

    /// A view over an image whose bytes are all old.
    fn view() -> (GuestRam, File) {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&vec![OLD; SIZE as usize], 0).unwrap();
        (GuestRam::private_view(&image, layout::ram_regions(SIZE)).unwrap(), image)
    }

    fn fill(ram: &GuestRam, pages: Range<u64>, byte: u8) {
        let bytes = vec![byte; ((pages.end - pages.start) * PAGE_SIZE) as usize];
        ram.memory().write_slice(&bytes, GuestAddress(pages.start * PAGE_SIZE)).unwrap();
    }

    /// The byte that fills a page.
    fn byte(ram: &GuestRam, page: u64) -> u8 {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
        assert!(bytes.iter().all(|b| *b == bytes[0]), "page {page} is of one kind");
        bytes[0]
    }

    fn all(discarded: u64) -> Outcome {
        Outcome { discarded, ..Outcome::default() }
    }

    /// Sum of a field of `/proc/self/smaps` over the mappings within the RAM, in KiB, and how many mappings those are.
    fn smaps(ram: &GuestRam, field: &str) -> (u64, usize) {
        let ranges: Vec<_> = ram.mappings().map(|(r, addr)| addr as u64..addr as u64 + r.size_bytes).collect();
        let (mut sum, mut count, mut inside) = (0, 0, false);
        for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap();
            match first.strip_suffix(':') {
                Some(name) if inside && name == field => sum += words.next().unwrap().parse::<u64>().unwrap(),
                Some(_) => {}
                None => {
                    let start = u64::from_str_radix(first.split('-').next().unwrap(), 16).unwrap();
                    inside = ranges.iter().any(|range| range.contains(&start));
                    count += usize::from(inside);
                }
            }
        }
        (sum, count)
    }

    #[test]
    fn a_booted_guest_gets_holes_in_its_file() {
        let ram = GuestRam::fresh(SIZE).unwrap();
        fill(&ram, 0..1024, NEW);
        let file = match &*lock(&ram.backing) {
            Backing::Own(file) => file.try_clone().unwrap(),
            Backing::Image(_) => panic!("it was booted here"),
        };
        let blocks = || fstat(&file).unwrap().st_blocks as u64 * 512;
        let before = blocks();
        assert_eq!(ram.discarder().discard(256..768), all(512));
        assert_eq!(before - blocks(), 512 * PAGE_SIZE);
        assert_eq!([255, 256, 767, 768].map(|page| byte(&ram, page)), [NEW, 0, 0, NEW]);
        assert_eq!(ram.discarder().discard(300..301), all(1), "a hole stays one");
    }

    #[test]
    fn a_view_reads_zeros_and_not_its_image() {
        let (ram, image) = view();
        fill(&ram, 0..512, NEW);
        assert_eq!(smaps(&ram, "Anonymous").0, 2048);
        let discarder = ram.discarder();
        assert_eq!(discarder.discard(128..512), all(384));
        assert_eq!(discarder.discard(600..700), all(100), "pages that were never written");
        assert_eq!(smaps(&ram, "Anonymous").0, 512, "private memory was given back");
        let pages = [127, 128, 511, 512, 599, 600, 699, 700];
        assert_eq!(pages.map(|page| byte(&ram, page)), [NEW, 0, 0, OLD, OLD, 0, 0, OLD]);

        fill(&ram, 130..132, NEW);
        assert_eq!([129, 130, 131, 132].map(|page| byte(&ram, page)), [0, NEW, NEW, 0]);
        assert_eq!(discarder.discard(100..140), all(40), "some of it is anonymous already");
        assert_eq!(discarder.discard(131..133), all(2), "all of it is");
        assert_eq!([99, 100, 130, 131, 139].map(|page| byte(&ram, page)), [NEW, 0, 0, 0, 0]);
        let mut in_image = [0];
        image.read_exact_at(&mut in_image, 130 * PAGE_SIZE).unwrap();
        assert_eq!(in_image, [OLD]);
    }

    #[test]
    fn a_guest_that_was_frozen_is_a_view() {
        let mut ram = GuestRam::fresh(SIZE).unwrap();
        let discarder = ram.discarder();
        fill(&ram, 0..64, OLD);
        assert_eq!(discarder.discard(32..64), all(32));
        let image = ram.freeze().unwrap().unwrap().finish().unwrap();
        assert_eq!(discarder.discard(0..16), all(16));
        assert_eq!([0, 15, 16, 32].map(|page| byte(&ram, page)), [0, 0, OLD, 0]);
        let mut in_image = [0];
        image.read_exact_at(&mut in_image, 0).unwrap();
        assert_eq!(in_image, [OLD], "the image is what it was when it was frozen");
    }

    #[test]
    fn what_is_not_ram_is_not_touched() {
        let (ram, _image) = view();
        let end = SIZE / PAGE_SIZE;
        let outcome = ram.discarder().discard(end - 1..end + 9);
        assert_eq!(outcome, Outcome { discarded: 1, kept: 0, outside: 9 });
        assert_eq!(ram.discarder().discard(end + 5..u64::MAX).discarded, 0);
        assert_eq!(ram.discarder().discard(7..7), Outcome::default());
    }

    /// RAM in two regions, with the hole for devices between.
    #[test]
    fn a_range_may_reach_over_the_hole() {
        const LOW_END: u64 = (3 << 30) / PAGE_SIZE;
        const HIGH: u64 = (4 << 30) / PAGE_SIZE;
        let mut ram = GuestRam::fresh(5 << 30).unwrap();
        let discarder = ram.discarder();
        for frozen in [false, true] {
            fill(&ram, LOW_END - 4..LOW_END, NEW);
            fill(&ram, HIGH..HIGH + 4, NEW);
            let outcome = discarder.discard(LOW_END - 2..HIGH + 2);
            assert_eq!(outcome, Outcome { discarded: 4, kept: 0, outside: HIGH - LOW_END });
            let pages = [LOW_END - 3, LOW_END - 2, LOW_END - 1, HIGH, HIGH + 1, HIGH + 2];
            assert_eq!(pages.map(|page| byte(&ram, page)), [NEW, 0, 0, 0, 0, NEW]);
            if !frozen {
                ram.freeze().unwrap();
            }
        }
        // One run of the image, of which a page has been written since, on either side. (That it was read counts as use too.)
        discarder.discard(LOW_END - 2..HIGH + 2);
        let contents = ram.contents();
        assert_eq!(contents.next(0).unwrap().unwrap().end, (LOW_END - 2) * PAGE_SIZE);
        let used = (LOW_END - 1) * PAGE_SIZE;
        fill(&ram, LOW_END - 1..LOW_END, NEW);
        assert_eq!(contents.next((LOW_END - 2) * PAGE_SIZE).unwrap(), Some(used..used + PAGE_SIZE));
        fill(&ram, HIGH + 1..HIGH + 2, NEW);
        let used = (LOW_END + 1) * PAGE_SIZE;
        assert_eq!(contents.next(LOW_END * PAGE_SIZE).unwrap(), Some(used..used + PAGE_SIZE));
    }

    #[test]
    fn mappings_are_bounded_and_neighbours_share_one() {
        let (ram, _image) = view();
        let discarder = ram.discarder();
        // Short runs apart from each other, each written before the next, until no more are begun.
        let mut sum = Outcome::default();
        for page in (0..2 * MANY_RUNS as u64 - 2).step_by(2) {
            sum += discarder.discard(page..page + 1);
        }
        assert_eq!(sum, all(MANY_RUNS as u64 - 1));
        let last = SIZE / PAGE_SIZE - 1;
        assert_eq!(discarder.discard(last..last + 1), all(1));
        assert_eq!(discarder.discard(last - 4..last - 3), Outcome { kept: 1, ..Outcome::default() });
        assert_eq!(byte(&ram, last - 4), OLD, "it keeps its bytes");
        let mappings = smaps(&ram, "Anonymous").1;
        assert!(mappings <= 2 * MANY_RUNS + 1, "{mappings}");
        // What touches a run is not bounded, and becomes part of it.
        for page in (1..2 * MANY_RUNS as u64 - 4).step_by(2) {
            assert_eq!(discarder.discard(page..page + 1), all(1));
        }
        assert_eq!(smaps(&ram, "Anonymous").1, 3, "two runs and what lies between");
        assert!((0..2 * MANY_RUNS as u64 - 3).all(|page| byte(&ram, page) == 0));

        let mut discarded = Discarded { begun: MANY_RUNS, ..Discarded::default() };
        assert!(discarded.may_begin(LONG_RUN) && !discarded.may_begin(LONG_RUN - 1));
        discarded.begun = MAX_RUNS;
        assert!(!discarded.may_begin(u64::MAX));
    }

    /// A page that is written the moment it is discarded joins its neighbours all the same.
    #[test]
    fn a_guest_that_writes_what_it_gives_away_takes_no_more_mappings() {
        let (ram, _image) = view();
        let discarder = ram.discarder();
        let end = SIZE / PAGE_SIZE;
        let at = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                loop {
                    let page = at.load(std::sync::atomic::Ordering::Relaxed);
                    if page == end {
                        return;
                    }
                    ram.memory().write_obj(NEW, GuestAddress(page * PAGE_SIZE)).unwrap();
                }
            });
            for page in 0..end {
                at.store(page, std::sync::atomic::Ordering::Relaxed);
                assert_eq!(discarder.discard(page..page + 1), all(1));
            }
            at.store(end, std::sync::atomic::Ordering::Relaxed);
            writer.join().unwrap();
        });
        assert_eq!(smaps(&ram, "Anonymous").1, 1);
    }

    #[test]
    fn contents_leave_out_what_is_empty() {
        let (ram, _image) = view();
        let discarder = ram.discarder();
        let all_of = |contents: Contents| {
            let (mut at, mut found) = (0, Vec::new());
            while let Some(range) = contents.next(at).unwrap() {
                assert!(range.start >= at && range.end > range.start);
                at = range.end;
                found.push(range.start / PAGE_SIZE..range.end / PAGE_SIZE);
            }
            found
        };
        let end = SIZE / PAGE_SIZE;
        assert_eq!(all_of(ram.contents()), [Range { start: 0, end }]);
        discarder.discard(0..10);
        discarder.discard(20..1000);
        discarder.discard(end - 1..end);
        assert_eq!(all_of(ram.contents()), [10..20, 1000..end - 1]);
        // Pages that were taken back and written are private pages, and are not forgotten.
        fill(&ram, 600..602, NEW);
        assert_eq!(all_of(ram.contents()), [10..20, 600..602, 1000..end - 1]);
        assert_eq!(ram.contents().next(601 * PAGE_SIZE + 5).unwrap(), Some(601 * PAGE_SIZE + 5..602 * PAGE_SIZE));
        let blind = Contents { pagemap: None, ..ram.contents() };
        assert_eq!(all_of(blind), [0..10, 10..20, 20..1000, 1000..end - 1, end - 1..end]);
    }

    /// A page server's view: a fault that waits on a range when it is discarded is woken as before, and finds zeros.
    #[test]
    fn a_fault_that_waits_is_woken_and_finds_zeros() {
        let uffd = match uffd_handler::uffd::create_user_only() {
            Ok(uffd) => uffd,
            Err(e) => return test_skip::skip(e.to_string()),
        };
        let store = rustix::fs::memfd_create("store", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let store = File::from(store);
        store.set_len(SIZE).unwrap();
        let ram = GuestRam::private_view(&store, layout::ram_regions(SIZE)).unwrap();
        let (region, addr) = ram.mappings().next().unwrap();
        let (addr, len) = (addr as usize, region.size_bytes as usize);
        uffd.register(addr as *mut _, len).unwrap();

        let memory = ram.memory().clone();
        let waiting = std::thread::spawn(move || {
            let mut bytes = [1u8; 8];
            // By pointer and not by system call, which such a userfaultfd would fail.
            let slice = memory.get_slice(GuestAddress(40 * PAGE_SIZE), 8).unwrap();
            slice.copy_to(&mut bytes);
            bytes
        });
        let event = next_event(&uffd);
        assert!(matches!(event, userfaultfd::Event::Pagefault { .. }), "{event:?}");
        assert_eq!(ram.discarder().discard(32..64), all(32));
        assert!(!waiting.is_finished(), "nobody has woken it");
        // The server wakes what it has filled, whatever is mapped there now; and the whole of RAM at the end.
        uffd.wake((addr + 40 * PAGE_SIZE as usize) as *mut _, PAGE_SIZE as usize).unwrap();
        assert_eq!(waiting.join().unwrap(), [0; 8]);
        uffd.wake(addr as *mut _, len).unwrap();
        assert_eq!(byte(&ram, 50), 0, "and nobody waits there any more");
        assert_eq!(fstat(&store).unwrap().st_blocks, 0, "the store has no page by that");
    }

    /// Copy mode: nobody but the vmm itself can wake a fault that waits on a range when it is discarded.
    #[test]
    fn in_copy_mode_a_fault_that_waits_is_woken_by_the_discard() {
        let uffd = match uffd_handler::uffd::create_user_only() {
            Ok(uffd) => Arc::new(uffd),
            Err(e) => return test_skip::skip(e.to_string()),
        };
        let ram = GuestRam::copied_into(uffd.clone(), layout::ram_regions(SIZE)).unwrap();
        let (region, addr) = ram.mappings().next().unwrap();
        uffd.register(addr.cast(), region.size_bytes as usize).unwrap();
        let read = |page: u64| {
            let memory = ram.memory().clone();
            std::thread::spawn(move || {
                let mut bytes = [1u8; 8];
                memory.get_slice(GuestAddress(page * PAGE_SIZE), 8).unwrap().copy_to(&mut bytes);
                bytes
            })
        };
        let (given, kept) = (read(40), read(50));
        for _ in 0..2 {
            let event = next_event(&uffd);
            assert!(matches!(event, userfaultfd::Event::Pagefault { .. }), "{event:?}");
        }
        assert_eq!(ram.discarder().discard(32..48), all(16));
        assert_eq!(given.join().unwrap(), [0; 8]);
        assert_eq!(byte(&ram, 47), 0, "and nobody waits there any more");
        assert!(!kept.is_finished(), "what was not given back is still waited for");
        // Again: it is anonymous already, and no event is made of that.
        fill(&ram, 32..48, NEW);
        assert_eq!(ram.discarder().discard(32..48), all(16));
        assert_eq!(byte(&ram, 40), 0);
        assert!(uffd.read_event().unwrap().is_none());
        assert_eq!(ram.discarder().discard(48..64), all(16));
        assert_eq!(kept.join().unwrap(), [0; 8]);
    }

    fn next_event(uffd: &userfaultfd::Uffd) -> userfaultfd::Event {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        let polled = poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(polled, 1, "no fault came");
        uffd.read_event().unwrap().expect("an event is there")
    }
}
