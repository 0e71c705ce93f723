//! Gets pages ready that a guest is going to need: those of its snapshot's working set, as earlier clones have taught it.
//!
//! A thread has the kernel map what is to be read, and copy what is to be written, while the guest runs. It is only advice: what the
//! guest asks for meanwhile it gets as ever, and first, as this thread waits for one page at a time; and where advice fails, nothing is
//! done.

use super::mmap::{self, Populate};
use super::{GuestMemory, GuestRam, PAGE_SIZE};
use crate::sandbox::{self, Kind};
use snapshot::load::Snapshot;
use snapshot::manifest::MemoryRegion;
use snapshot::page_runs::PageRuns;
use snapshot::working_set::WorkingSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use vm_memory::GuestMemoryBackend;

/// How many pages the kernel is asked for at a time: 2 MiB, so that the end of a guest need not wait long.
const SLICE: u64 = 512;

/// Pages being got ready. Ends when this is dropped.
#[derive(Debug)]
pub struct Replay {
    over: Arc<AtomicBool>,
}

impl Replay {
    /// Begins to get ready what the snapshot's working set names, if it has one. With `writes`, also what is to be written: that is
    /// private memory from then on.
    ///
    /// It ends when `over` is set.
    pub fn start(
        snapshot: Arc<Snapshot>,
        ram: &GuestRam,
        writes: bool,
        over: Arc<AtomicBool>,
    ) -> io::Result<Option<Self>> {
        if !WorkingSet::exists(&snapshot) {
            return Ok(None);
        }
        let work = Work { memory: ram.memory().clone(), regions: ram.regions().to_vec(), over: over.clone() };
        sandbox::spawn("replay", Kind::Memory, move || match WorkingSet::load(&snapshot) {
            Ok(Some(set)) => work.run(&set, writes),
            Ok(None) => {}
            Err(e) => tracing::warn!("the working set is not made use of: {e}"),
        })?;
        Ok(Some(Replay { over }))
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

struct Work {
    memory: GuestMemory,
    regions: Vec<MemoryRegion>,
    over: Arc<AtomicBool>,
}

impl Work {
    fn run(&self, set: &WorkingSet, writes: bool) {
        let start = Instant::now();
        // What is to be written first: a page that was mapped to be read would have to be mapped anew.
        let written = if writes { self.populate(set.written(), Populate::Write) } else { Ok(0) };
        let read = written.and_then(|written| Ok((written, self.populate(set.read(), Populate::Read)?)));
        match read {
            Ok((written, read)) => {
                let us = start.elapsed().as_micros() as u64;
                tracing::debug!(written, read, us, "the pages of the working set are ready");
            }
            Err(e) if self.over.load(Ordering::Relaxed) => tracing::trace!("the guest is gone: {e}"),
            Err(e) => tracing::debug!("the pages of the working set are not got ready: {e}"),
        }
    }

    /// Returns how many pages those were.
    fn populate(&self, pages: &PageRuns, how: Populate) -> io::Result<u64> {
        let mut done = 0;
        for (region, mapped) in self.regions.iter().zip(self.memory.iter()) {
            let here = region.offset / PAGE_SIZE..(region.offset + region.size_bytes) / PAGE_SIZE;
            for slice in slices(pages, here.clone()) {
                if self.over.load(Ordering::Relaxed) {
                    return Ok(done);
                }
                let bytes = (slice.start - here.start) * PAGE_SIZE..(slice.end - here.start) * PAGE_SIZE;
                mmap::populate(mapped.mapping(), bytes, how)?;
                done += slice.end - slice.start;
            }
        }
        Ok(done)
    }
}

/// The parts of a set that lie in a range, none of them long.
fn slices(pages: &PageRuns, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
    pages.runs().iter().flat_map(move |run| {
        let (start, end) = (run.start.max(within.start), run.end.min(within.end));
        (start..end).step_by(SLICE as usize).map(move |first| first..(first + SLICE).min(end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use crate::memory::pagemap::Pagemap;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_to_be_read_is_mapped_and_what_is_to_be_written_is_the_guests_own() {
        const SIZE: u64 = 8 << 20;
        // Not a file on a disk, of which the kernel may map more than it is asked for.
        let image = std::fs::File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        image.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        let ram = GuestRam::private_view(&image, layout::ram_regions(SIZE)).unwrap();
        let work = Work { memory: ram.memory().clone(), regions: ram.regions().to_vec(), over: Arc::default() };
        let (read, written) = (PageRuns::new([16..32, 1000..1100]), PageRuns::new([64..80, 1050..1060]));
        assert_eq!(work.populate(&written, Populate::Write).unwrap(), 26);
        assert_eq!(work.populate(&read, Populate::Read).unwrap(), 116);
        let pagemap = Pagemap::open().unwrap();
        let base = ram.mappings().next().unwrap().1 as u64;
        let entry = |page: u64| pagemap.entry(base + page * PAGE_SIZE).unwrap();
        for page in [16, 31, 1000, 1099] {
            assert!(entry(page).is_used() && entry(page).is_of_file(), "page {page}");
        }
        for page in [64, 79, 1050, 1059] {
            assert!(entry(page).is_used() && !entry(page).is_of_file(), "page {page}");
        }
        assert!(!entry(512).is_used());
        work.over.store(true, Ordering::Relaxed);
        assert_eq!(work.populate(&PageRuns::new([0..1000, 1000..2000]), Populate::Read).unwrap(), 0, "it is over");
    }

    proptest! {
        #[test]
        fn slices_are_the_pages_of_a_range(
            runs in prop::collection::vec((0..5000u64, 1..2000u64), 0..20), first in 0..4000u64, len in 0..4000u64
        ) {
            let pages = PageRuns::new(runs.into_iter().map(|(first, len)| first..first + len));
            let within = first..first + len;
            let slices: Vec<_> = slices(&pages, within.clone()).collect();
            prop_assert!(slices.iter().all(|slice| !slice.is_empty() && slice.end - slice.start <= SLICE));
            prop_assert_eq!(slices.iter().map(|slice| slice.end - slice.start).sum::<u64>(), pages.pages_in(within));
        }
    }
}
