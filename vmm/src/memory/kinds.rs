//! Of which kind the pages of guest memory are: not loaded, shared, or the guest's own.
//!
//! The kernel is asked what is mapped where; the memory itself is not touched, so that nothing is loaded and nobody waits
//! for a page. A page that is in the image's cache and not mapped here counts as not loaded, and one that a booted guest has
//! swapped out as well, since no trace of it is left here. One that a clone has given back and then read counts as its own, though
//! it takes no memory: the kernel's one page of zeros is mapped there, which looks no different from here.

use super::pagemap::{Entry, Pagemap};
use super::{Backing, GuestMemory, GuestRam, PAGE_SIZE};
use crate::devices::lock;
use api_spec::stats::{MemoryMap, MemoryMapQuery, MemoryRun, MemoryStats, PageKind};
use snapshot::manifest::MemoryRegion;
use snapshot::page_runs::PageRuns;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::GuestMemoryBackend;

/// How many pages one map covers at most: 16 GiB.
const MAX_MAP_PAGES: u64 = 4 << 20;

/// Why there is no map from somewhere on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// It begins within a page.
    #[error("start is {0}; it must be the address of a page, a multiple of {PAGE_SIZE}")]
    Unaligned(u64),
    /// It begins where there is no memory any more.
    #[error("start is {start}; guest memory ends at {end}")]
    Beyond {
        /// What was asked for.
        start: u64,
        /// Where memory ends.
        end: u64,
    },
}

/// Why pages could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The kernel does not tell.
    #[error("the kernel does not tell what is mapped (/proc/self/pagemap): {0}")]
    Pagemap(#[from] io::Error),
    /// The process is ending.
    #[error("the VM is ending")]
    Ending,
}

/// What a page is of which the kernel says this. A guest in memory of its own file has it to itself.
pub fn kind(entry: Entry, own_file: bool) -> PageKind {
    match entry.is_used() {
        false => PageKind::NotLoaded,
        true if entry.is_of_file() && !own_file => PageKind::Shared,
        true => PageKind::Private,
    }
}

/// Guest memory, for whoever wants to know of which kind its pages are. Keeps the mappings alive.
#[derive(Clone, Debug)]
pub struct Kinds {
    memory: GuestMemory,
    regions: Vec<MemoryRegion>,
    backing: Arc<Mutex<Backing>>,
}

impl GuestRam {
    /// What tells of which kind the pages are.
    pub fn kinds(&self) -> Kinds {
        Kinds { memory: self.memory.clone(), regions: self.regions.clone(), backing: self.backing.clone() }
    }
}

impl Kinds {
    /// Whether a map may begin there.
    pub fn check_start(&self, start: u64) -> Result<(), StartError> {
        let end = self.regions.iter().map(|region| region.guest_addr + region.size_bytes).max().unwrap_or(0);
        match start {
            _ if !start.is_multiple_of(PAGE_SIZE) => Err(StartError::Unaligned(start)),
            _ if start >= end => Err(StartError::Beyond { start, end }),
            _ => Ok(()),
        }
    }

    /// How much there is of each kind, unless it is `cancelled`.
    pub fn sum(&self, pagemap: &Pagemap, cancelled: &AtomicBool) -> Result<MemoryStats, ScanError> {
        let mut sum = MemoryStats::default();
        self.each_page(0, pagemap, cancelled, |_, kind| {
            add(&mut sum, kind);
            true
        })?;
        Ok(sum)
    }

    /// The runs from somewhere on, unless it is `cancelled`.
    pub fn map(
        &self,
        query: MemoryMapQuery,
        pagemap: &Pagemap,
        cancelled: &AtomicBool,
    ) -> Result<MemoryMap, ScanError> {
        self.map_pages(query, MAX_MAP_PAGES, pagemap, cancelled)
    }

    /// As [`Kinds::map`], of `most` pages at most.
    fn map_pages(
        &self,
        query: MemoryMapQuery,
        most: u64,
        pagemap: &Pagemap,
        cancelled: &AtomicBool,
    ) -> Result<MemoryMap, ScanError> {
        let MemoryMapQuery { start, max_runs } = query;
        let mut map = MemoryMap::default();
        let mut left = most;
        let next = self.each_page(start, pagemap, cancelled, |addr, kind| {
            let fits = left > 0 && push(&mut map.runs, max_runs, addr, kind);
            left = left.saturating_sub(1);
            fits
        })?;
        map.next = next;
        Ok(map)
    }

    /// The pages of the image that the guest has used since it was restored from it: those that it has read, and those that it has
    /// written. What it has given back is none of the image's any more.
    pub fn used(&self, pagemap: &Pagemap, cancelled: &AtomicBool) -> Result<(PageRuns, PageRuns), ScanError> {
        let (mut read, mut written) = (Vec::new(), Vec::new());
        self.each_page(0, pagemap, cancelled, |addr, kind| {
            if let Some(page) = self.image_page(addr) {
                match kind {
                    PageKind::Shared => read.push(page),
                    PageKind::Private => written.push(page),
                    PageKind::NotLoaded => {}
                }
            }
            true
        })?;
        let given_back = match &*lock(&self.backing) {
            Backing::Image(discarded) => discarded.runs(),
            Backing::Own(_) => Vec::new(),
        };
        let given_back = PageRuns::new(given_back);
        written.retain(|page| given_back.pages_in(*page..*page + 1) == 0);
        Ok((PageRuns::of_pages(read), PageRuns::of_pages(written)))
    }

    /// The page of the image that a guest-physical address is in.
    fn image_page(&self, addr: u64) -> Option<u64> {
        let within =
            |region: &&MemoryRegion| (region.guest_addr..region.guest_addr + region.size_bytes).contains(&addr);
        let region = self.regions.iter().find(within)?;
        Some((region.offset + (addr - region.guest_addr)) / PAGE_SIZE)
    }

    /// Tells `page` the address and the kind of each page from `start` on, which is the address of one, until it wants no
    /// more: the result is the address of the page that it did not want.
    fn each_page(
        &self,
        start: u64,
        pagemap: &Pagemap,
        cancelled: &AtomicBool,
        mut page: impl FnMut(u64, PageKind) -> bool,
    ) -> Result<Option<u64>, ScanError> {
        let mut unwanted = None;
        for (&MemoryRegion { guest_addr, size_bytes, .. }, mapped) in self.regions.iter().zip(self.memory.iter()) {
            let mapped = mapped.mapping().as_ptr() as u64;
            let mut at = guest_addr.max(start);
            let end = guest_addr + size_bytes;
            if at >= end || unwanted.is_some() {
                continue;
            }
            pagemap.each_batch(at - guest_addr + mapped..end - guest_addr + mapped, |entries| {
                // It may be frozen meanwhile.
                let own_file = matches!(*lock(&self.backing), Backing::Own(_));
                for entry in entries {
                    if !page(at, kind(entry, own_file)) {
                        unwanted = Some(at);
                        return false;
                    }
                    at += PAGE_SIZE;
                }
                !cancelled.load(Ordering::Relaxed)
            })?;
            if cancelled.load(Ordering::Relaxed) {
                return Err(ScanError::Ending);
            }
        }
        Ok(unwanted)
    }
}

/// Adds a page to a sum.
fn add(sum: &mut MemoryStats, kind: PageKind) {
    let MemoryStats { size_bytes, not_loaded_bytes, shared_bytes, private_bytes } = sum;
    let part = match kind {
        PageKind::NotLoaded => not_loaded_bytes,
        PageKind::Shared => shared_bytes,
        PageKind::Private => private_bytes,
    };
    *part += PAGE_SIZE;
    *size_bytes += PAGE_SIZE;
}

/// Adds a page to runs of which there may be `max`. `false`, and nothing is added, if it would begin one too many.
fn push(runs: &mut Vec<MemoryRun>, max: u32, addr: u64, kind: PageKind) -> bool {
    if let Some(last) = runs.last_mut()
        && last.kind == kind
        && last.guest_addr + last.size_bytes == addr
    {
        last.size_bytes += PAGE_SIZE;
        return true;
    }
    let fits = runs.len() < max as usize;
    if fits {
        runs.push(MemoryRun { guest_addr: addr, size_bytes: PAGE_SIZE, kind });
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 8 << 20;
    static GO_ON: AtomicBool = AtomicBool::new(false);

    #[test]
    fn an_entry_says_of_which_kind_a_page_is() {
        use PageKind::{NotLoaded, Private, Shared};
        for (present, swapped, of_file, view, own) in [
            (false, false, false, NotLoaded, NotLoaded),
            (false, false, true, NotLoaded, NotLoaded),
            (true, false, true, Shared, Private),
            (true, false, false, Private, Private),
            (false, true, false, Private, Private),
            // A page of a file that moves at this moment.
            (false, true, true, Shared, Private),
        ] {
            let entry = Entry::new(present, swapped, of_file);
            assert_eq!([kind(entry, false), kind(entry, true)], [view, own], "{entry:?}");
        }
    }

    /// The kernel's word on what these tests are about: which bits there are after a page of a private view was read, and
    /// after it was written.
    #[test]
    fn reading_shares_a_page_and_writing_makes_it_the_guests_own() {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        check_view(GuestRam::private_view(&image, layout::ram_regions(SIZE)).unwrap());
        let mut ram = GuestRam::fresh(SIZE).unwrap();
        ram.memory().write_slice(&[1; 64 << 10], GuestAddress(0)).unwrap();
        let sum = ram.kinds().sum(&Pagemap::open().unwrap(), &GO_ON).unwrap();
        assert_eq!((sum.private_bytes, sum.shared_bytes), (64 << 10, 0), "a file of its own");
        let frozen = ram.freeze().unwrap();
        check_view(ram);
        drop(frozen);
    }

    fn check_view(ram: GuestRam) {
        const READ: std::ops::Range<u64> = 256..512;
        const WRITTEN: std::ops::Range<u64> = 256..300;
        let pagemap = Pagemap::open().unwrap();
        let sum = || ram.kinds().sum(&pagemap, &GO_ON).unwrap();
        assert_eq!(sum(), MemoryStats { size_bytes: SIZE, not_loaded_bytes: SIZE, ..Default::default() });
        let read = || {
            for page in READ {
                ram.memory().read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).unwrap();
            }
            sum()
        };
        let first = read();
        // The kernel may map more at a time, up to whole huge pages.
        assert!((1 << 20..=4 << 20).contains(&first.shared_bytes), "{first:?}");
        assert_eq!(first.private_bytes, 0);
        for page in WRITTEN {
            ram.memory().write_obj(7u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        let second = read();
        assert_eq!(second.private_bytes, 44 * PAGE_SIZE);
        assert!(second.shared_bytes >= 212 * PAGE_SIZE && second.shared_bytes <= first.shared_bytes, "{second:?}");
        ram.discarder().discard(WRITTEN);
        let third = sum();
        assert_eq!(third.private_bytes, 0, "given back");
        assert_eq!(third.not_loaded_bytes, second.not_loaded_bytes + 44 * PAGE_SIZE);
    }

    #[test]
    fn a_map_can_be_had_in_parts() {
        let ram = GuestRam::fresh(SIZE).unwrap();
        for page in [3, 4, 5, 9, 700] {
            ram.memory().write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        let (kinds, pagemap) = (ram.kinds(), Pagemap::open().unwrap());
        let map = |start, max_runs| kinds.map(MemoryMapQuery { start, max_runs }, &pagemap, &GO_ON).unwrap();
        let whole = map(0, 1000);
        assert_eq!((whole.runs.len(), whole.next), (7, None), "{whole:?}");
        for max_runs in 1..7 {
            let (mut runs, mut start) = (Vec::new(), Some(0));
            while let Some(at) = start {
                let part = map(at, max_runs);
                assert!(part.runs.len() <= max_runs as usize);
                runs.extend(part.runs);
                start = part.next;
            }
            assert_eq!(runs, whole.runs, "{max_runs}");
        }
        assert_eq!(map(4 * PAGE_SIZE, 1000).runs[0].size_bytes, 2 * PAGE_SIZE, "within a run");
        let query = MemoryMapQuery { start: 2 * PAGE_SIZE, max_runs: 1000 };
        let part = kinds.map_pages(query, 5, &pagemap, &GO_ON).unwrap();
        assert_eq!((part.runs.len(), part.next), (3, Some(7 * PAGE_SIZE)), "no more pages than that");
    }

    #[test]
    fn a_map_begins_at_a_page_of_memory() {
        let kinds = GuestRam::fresh(SIZE).unwrap().kinds();
        assert_eq!(kinds.check_start(SIZE - PAGE_SIZE), Ok(()));
        assert_eq!(kinds.check_start(SIZE), Err(StartError::Beyond { start: SIZE, end: SIZE }));
        assert_eq!(kinds.check_start(u64::MAX), Err(StartError::Unaligned(u64::MAX)));
        assert!(kinds.check_start(1).unwrap_err().to_string().starts_with("start is 1;"));
    }

    #[test]
    fn a_scan_can_be_cancelled() {
        let kinds = GuestRam::fresh(SIZE).unwrap().kinds();
        let refused = kinds.sum(&Pagemap::open().unwrap(), &AtomicBool::new(true));
        assert!(matches!(refused, Err(ScanError::Ending)));
    }

    fn pages() -> impl Strategy<Value = Vec<(u64, PageKind)>> {
        let kind = prop::sample::select(vec![PageKind::NotLoaded, PageKind::Shared, PageKind::Private]);
        // Holes of up to two pages between them.
        prop::collection::vec((0..3u64, kind), 0..60).prop_map(|steps| {
            let next = |at: &mut u64, (hole, kind)| {
                let page = *at + hole * PAGE_SIZE;
                *at = page + PAGE_SIZE;
                Some((page, kind))
            };
            steps.into_iter().scan(0, next).collect()
        })
    }

    proptest! {
        #[test]
        fn runs_are_the_pages_and_no_two_can_be_joined(pages in pages(), max in 1..40u32) {
            let mut runs = Vec::new();
            let taken = pages.iter().take_while(|(addr, kind)| push(&mut runs, max, *addr, *kind)).count();
            let back: Vec<_> = runs.iter().flat_map(|run| {
                (0..run.size_bytes / PAGE_SIZE).map(|page| (run.guest_addr + page * PAGE_SIZE, run.kind))
            }).collect();
            prop_assert_eq!(&back[..], &pages[..taken]);
            let apart = |pair: &[MemoryRun]| {
                pair[0].kind != pair[1].kind || pair[0].guest_addr + pair[0].size_bytes < pair[1].guest_addr
            };
            prop_assert!(runs.windows(2).all(apart));
            prop_assert!(runs.len() <= max as usize && (taken == pages.len() || runs.len() == max as usize));
        }

        #[test]
        fn the_parts_add_up(pages in pages()) {
            let mut sum = MemoryStats::default();
            pages.iter().for_each(|(_, kind)| add(&mut sum, *kind));
            prop_assert_eq!(sum.size_bytes, pages.len() as u64 * PAGE_SIZE);
            prop_assert_eq!(sum.not_loaded_bytes + sum.shared_bytes + sum.private_bytes, sum.size_bytes);
        }
    }
}
