//! Brings a guest's memory back to what it was at a checkpoint, page by page of those that were written since.
//!
//! | what a page was at the checkpoint | what it is brought back from |
//! |---|---|
//! | the guest's own | the copy that was made of it then |
//! | given back, and zeros since | nothing: it is filled with zeros |
//! | a page of the image | the first time it is dropped, so that the image's is there again, and copied; from then on, that copy |
//!
//! So a page that the guest writes again and again costs one copy each time. One of the last two kinds that was not written for a
//! while is dropped, with its copy: what a guest has needed once is not kept for ever.
//!
//! A page of the image is always read through the guest's own view, never from the file: a page server may not have it there,
//! and an image may be several files. The copies lie in a file in memory, each at its place in the image: what is in it counts
//! as nobody's private memory, which a guest may have a limit of.
//!
//! What the guest gives back while there is a checkpoint is not taken from it, if it is a page of the image: that could not be
//! put back in its place without another mapping for each.

use super::bits::Bits;
use super::discard::Discarded;
use super::pagemap::Pagemap;
use super::region::RamRegion;
use super::{Backing, GuestMemory, GuestRam, MemoryError, PAGE_SIZE, changes, mmap, share};
use crate::devices::lock;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

/// After so many times the pages are looked at that were not written meanwhile: a page is dropped when it was not for at least so
/// many, and less than twice as many.
pub const PATIENCE: u32 = 8;

/// Why memory cannot be brought back to what it is now.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// Nothing lies under what the guest writes.
    #[error(
        "guest memory that a page server copies (`Uffd`) cannot be reset, since no image lies under it; have it come from \
         `UffdShared` or `File`"
    )]
    Copied,
    /// An earlier freeze has failed half-way.
    #[error("guest memory was made a view of its image only in part, by a freeze that failed, and cannot be reset")]
    Mixed,
    /// The kernel does not tell.
    #[error("the kernel does not tell what the guest has written (/proc/self/pagemap): {0}")]
    Pagemap(io::Error),
    /// A copy does not fit.
    #[error(
        "the guest has {bytes} bytes of its own, and the host has memory for {room} more to copy them into (half of MemAvailable)"
    )]
    NoRoom {
        /// How much it has.
        bytes: u64,
        /// How much may be taken for a copy.
        room: u64,
    },
    /// There is no place for copies.
    #[error(transparent)]
    Place(#[from] MemoryError),
    /// They cannot be made.
    #[error("cannot copy what the guest has written: {0}")]
    Copy(#[from] GuestMemoryError),
}

/// Why memory was not brought back. It is neither what it was nor what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum PutBackError {
    /// A page cannot be dropped.
    #[error("cannot drop what the guest has written: {0}")]
    Drop(io::Error),
    /// A copy cannot be given up.
    #[error("cannot give up a copy of guest memory: {0}")]
    GiveUp(io::Error),
    /// A page cannot be reached.
    #[error("cannot reach guest memory: {0}")]
    Reach(#[from] GuestMemoryError),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutBack {
    /// So many pages were brought back.
    pub pages: u64,
    /// So many of them were pages of the image that were dropped, and copied.
    pub fresh: u64,
}

/// What guest memory was at a checkpoint.
#[derive(Debug)]
pub struct Rollback {
    parts: Vec<Part>,
    /// Copies of pages, each where it lies in the image.
    copies: GuestMemory,
    file: Arc<File>,
    /// How often memory was brought back since pages that are not written were looked at.
    times: u32,
}

/// What is known of the pages of a region.
#[derive(Debug)]
struct Part {
    region: MemoryRegion,
    /// Those of which there is a copy.
    copied: Bits,
    /// Those that were zeros since they were given back.
    zeros: Bits,
    /// Those that the guest has of its own now and had not at the checkpoint.
    loose: Bits,
    /// Those that were written since pages were looked at that were not.
    recent: Bits,
}

impl GuestRam {
    /// No page of each region.
    pub fn no_pages(&self) -> Vec<Bits> {
        self.regions.iter().map(|region| Bits::new(region.size_bytes / PAGE_SIZE)).collect()
    }

    /// Logs what this process writes to guest memory from now on.
    pub fn keep_written(&self) {
        self.memory.iter().for_each(|region| region.written().keep());
    }

    /// Takes the pages that this process has written out of the log, and adds them to those of each region.
    pub fn take_written(&self, pages: &mut [Bits]) {
        self.memory.iter().zip(pages).for_each(|(region, pages)| region.written().take(pages));
    }

    /// Remembers what memory is, which must be a private view of an image. No vCPU and no device may write meanwhile.
    pub fn mark(&self) -> Result<Rollback, MarkError> {
        let given_back = match &mut *lock(&self.backing) {
            Backing::Own(_) | Backing::Image(Discarded { is_mixed: true, .. }) => return Err(MarkError::Mixed),
            Backing::Image(Discarded { waker: Some(_), .. }) => return Err(MarkError::Copied),
            Backing::Image(discarded) => {
                discarded.keeps_image = true;
                discarded.runs()
            }
        };
        let pagemap = Pagemap::open().map_err(MarkError::Pagemap)?;
        let parts = self.mappings().map(|(region, address)| {
            let (start, pages) = (address as u64, region.size_bytes / PAGE_SIZE);
            let none = Bits::new(pages);
            let mut part =
                Part { region, copied: none.clone(), zeros: none.clone(), loose: none.clone(), recent: none };
            let private = pagemap.private_pages(start..start + region.size_bytes)?;
            let first = start / PAGE_SIZE;
            private.runs().iter().for_each(|run| part.copied.insert(run.start - first..run.end - first));
            let first = region.offset / PAGE_SIZE;
            let within = |run: &Range<u64>| run.start.max(first)..run.end.min(first + pages).max(run.start.max(first));
            given_back.iter().map(within).for_each(|run| part.zeros.insert(run.start - first..run.end - first));
            part.zeros.leave_out(&part.copied);
            Ok(part)
        });
        let parts = parts.collect::<io::Result<Vec<Part>>>().map_err(MarkError::Pagemap)?;
        let (bytes, room) = (parts.iter().map(|part| part.copied.count() * PAGE_SIZE).sum(), changes::room());
        if bytes > room {
            return Err(MarkError::NoRoom { bytes, room });
        }
        let size = self.size();
        let create = |source: rustix::io::Errno| MemoryError::Create { size, source: source.into() };
        let file = File::from(memfd_create("coppice-checkpoint", MemfdFlags::CLOEXEC).map_err(create)?);
        ftruncate(&file, size).map_err(create)?;
        let file = Arc::new(file);
        let copies = share(&file, &self.regions)?;
        for ((part, view), copies) in parts.iter().zip(self.memory.iter()).zip(copies.iter()) {
            part.copied.runs().try_for_each(|run| copy(view, copies, run))?;
        }
        Ok(Rollback { parts, copies, file, times: 0 })
    }

    /// Memory is not to be brought back any more.
    pub fn forget_mark(&self) {
        if let Backing::Image(discarded) = &mut *lock(&self.backing) {
            discarded.keeps_image = false;
        }
    }
}

impl Rollback {
    /// How many pages were the guest's own at the checkpoint.
    pub fn private_pages(&self) -> u64 {
        self.parts.iter().map(|part| part.copied.without(&part.loose).count()).sum()
    }

    /// Whether one of the pages that are `written`, by region, is to be brought back by dropping it.
    pub fn has_to_drop(&self, written: &[Bits]) -> bool {
        self.parts.iter().zip(written).any(|(part, written)| !part.fresh(written).is_empty())
    }

    /// Brings the pages back that are `written`, by region. Nobody may access memory meanwhile.
    pub fn put_back(&mut self, ram: &GuestRam, written: &[Bits]) -> Result<PutBack, PutBackError> {
        let mut done = PutBack::default();
        let regions = ram.memory.iter().zip(self.copies.iter());
        let parts = self.parts.iter_mut().zip(written).zip(regions);
        for ((part, written), (view, copies)) in parts.filter(|((_, written), _)| !written.is_empty()) {
            done.pages += written.count();
            done.fresh += part.put_back(written, view, copies)?;
        }
        Ok(done)
    }

    /// To be called each time when memory was brought back as a whole: drops, now and then, what was not written for a while.
    /// Returns how many pages those are.
    pub fn tidy(&mut self, ram: &GuestRam) -> Result<u64, PutBackError> {
        self.times += 1;
        if self.times < PATIENCE {
            return Ok(0);
        }
        self.times = 0;
        let (parts, regions) = (self.parts.iter_mut(), ram.memory.iter());
        parts.zip(regions).map(|(part, view)| part.tidy(view, &self.file)).sum()
    }
}

impl Part {
    /// Those of the pages that were written of which nothing is left but what lies under them.
    fn fresh(&self, written: &Bits) -> Bits {
        let mut fresh = written.without(&self.copied);
        fresh.leave_out(&self.zeros);
        fresh
    }

    /// Brings pages back. Returns how many of them were the image's, and have no copy yet.
    fn put_back(&mut self, written: &Bits, view: &RamRegion, copies: &RamRegion) -> Result<u64, PutBackError> {
        for run in written.both(&self.copied).runs() {
            copy(copies, view, run)?;
        }
        let zeros = written.both(&self.zeros);
        for page in zeros.runs().flatten() {
            view.unlogged(bytes(&(page..page + 1)))?.copy_from(&[0u8; PAGE_SIZE as usize]);
        }
        let fresh = self.fresh(written);
        for run in fresh.runs() {
            mmap::empty(view.mapping(), bytes(&run)).map_err(PutBackError::Drop)?;
            copy(view, copies, run)?;
        }
        self.copied.join(&fresh);
        self.loose.join(&fresh);
        self.loose.join(&zeros);
        self.recent.join(written);
        Ok(fresh.count())
    }

    /// Drops what was not written since it was last called.
    fn tidy(&mut self, view: &RamRegion, file: &File) -> Result<u64, PutBackError> {
        let stale = self.loose.without(&self.recent);
        for run in stale.runs() {
            mmap::empty(view.mapping(), bytes(&run)).map_err(PutBackError::Drop)?;
            let Range { start, end } = bytes(&run);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, self.region.offset + start, end - start)
                .map_err(|e| PutBackError::GiveUp(e.into()))?;
        }
        self.loose.leave_out(&stale);
        self.copied.leave_out(&stale);
        self.recent.clear();
        Ok(stale.count())
    }
}

/// Where a run of pages lies in its region.
fn bytes(run: &Range<u64>) -> Range<u64> {
    run.start * PAGE_SIZE..run.end * PAGE_SIZE
}

fn copy(from: &RamRegion, to: &RamRegion, run: Range<u64>) -> Result<(), GuestMemoryError> {
    from.unlogged(bytes(&run))?.copy_to_volatile_slice(to.unlogged(bytes(&run))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use proptest::prelude::*;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 2 << 20;
    const PAGES: u64 = SIZE / PAGE_SIZE;

    /// A view of an image each page of which is filled with a part of its number.
    fn view() -> GuestRam {
        let image = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at / PAGE_SIZE % 251) as u8 + 1).collect();
        image.write_all_at(&bytes, 0).unwrap();
        GuestRam::private_view(&image, layout::ram_regions(SIZE)).unwrap()
    }

    fn write(ram: &GuestRam, page: u64, value: u64) {
        ram.memory().write_obj(value, GuestAddress(page * PAGE_SIZE + 8 * (value % 512))).unwrap();
    }

    /// All of memory, by another way than any log or copy.
    fn all(ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// Which pages are the guest's own.
    fn own(ram: &GuestRam) -> Vec<u64> {
        let (region, address) = ram.mappings().next().unwrap();
        let start = address as u64;
        let runs = Pagemap::open().unwrap().private_pages(start..start + region.size_bytes).unwrap();
        runs.runs().iter().cloned().flatten().map(|page| page - start / PAGE_SIZE).collect()
    }

    fn written(ram: &GuestRam) -> Vec<Bits> {
        let mut pages = ram.no_pages();
        ram.take_written(&mut pages);
        pages
    }

    fn marked(ram: &GuestRam) -> Rollback {
        ram.keep_written();
        let rollback = ram.mark().unwrap();
        written(ram);
        rollback
    }

    /// What was brought back, and how many pages were dropped.
    fn reset(ram: &GuestRam, rollback: &mut Rollback) -> (PutBack, u64) {
        let done = rollback.put_back(ram, &written(ram)).unwrap();
        let dropped = rollback.tidy(ram).unwrap();
        assert!(written(ram).iter().all(Bits::is_empty), "what is put back is not logged");
        (done, dropped)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u64),
        GiveBack(Range<u64>),
        Reset,
        Mark,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            12 => (0..PAGES, any::<u64>()).prop_map(|(page, value)| Step::Write(page, value)),
            3 => (0..PAGES, 1u64..40).prop_map(|(at, len)| Step::GiveBack(at..(at + len).min(PAGES))),
            6 => Just(Step::Reset),
            1 => Just(Step::Mark),
        ];
        prop::collection::vec(step, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn memory_is_what_it_was_whatever_came_in_between(before in steps(), after in steps()) {
            let ram = view();
            let give_back = |run: &Range<u64>| {
                ram.discarder().discard(run.clone());
            };
            for step in &before {
                match step {
                    Step::Write(page, value) => write(&ram, *page, *value),
                    Step::GiveBack(run) => give_back(run),
                    Step::Reset | Step::Mark => {}
                }
            }
            let (mut rollback, mut then) = (marked(&ram), all(&ram));
            for step in &after {
                match step {
                    Step::Write(page, value) => write(&ram, *page, *value),
                    Step::GiveBack(run) => give_back(run),
                    Step::Reset => {
                        reset(&ram, &mut rollback);
                        prop_assert!(all(&ram) == then);
                    }
                    Step::Mark => (rollback, then) = (marked(&ram), all(&ram)),
                }
            }
            reset(&ram, &mut rollback);
            prop_assert!(all(&ram) == then);
        }

        /// The oracle sees what the log does not say.
        #[test]
        fn a_page_that_is_left_out_of_the_log_is_found(pages in prop::collection::btree_set(0..PAGES, 1..40), which: prop::sample::Index) {
            let ram = view();
            let (mut rollback, then) = (marked(&ram), all(&ram));
            pages.iter().for_each(|page| write(&ram, *page, 0xdead_beef));
            let mut log = written(&ram);
            let left_out = pages.iter().nth(which.index(pages.len())).unwrap();
            let mut planted = Bits::new(PAGES);
            planted.insert(*left_out..left_out + 1);
            log[0].leave_out(&planted);
            rollback.put_back(&ram, &log).unwrap();
            let now = all(&ram);
            let differ: Vec<u64> = (0..PAGES)
                .filter(|page| { let at = (page * PAGE_SIZE) as usize..((page + 1) * PAGE_SIZE) as usize; now[at.clone()] != then[at] })
                .collect();
            prop_assert_eq!(differ, [*left_out]);
        }
    }

    #[test]
    fn a_page_is_copied_once_and_dropped_when_it_is_not_written_for_a_while() {
        let ram = view();
        write(&ram, 7, 1);
        let mut rollback = marked(&ram);
        assert_eq!((rollback.private_pages(), own(&ram)), (1, vec![7]));
        let blocks = |rollback: &Rollback| rollback.file.metadata().unwrap().blocks() * 512 / PAGE_SIZE;
        assert_eq!(blocks(&rollback), 1);
        for round in 0..3 * PATIENCE {
            write(&ram, 7, 2);
            write(&ram, 8, 3);
            if round == 0 {
                write(&ram, 100, 4);
            }
            let (PutBack { pages, fresh }, dropped) = reset(&ram, &mut rollback);
            assert_eq!((pages, fresh), if round == 0 { (3, 2) } else { (2, 0) }, "{round}");
            // It was written in the first of the times that are looked at together.
            assert_eq!(dropped, u64::from(round == 2 * PATIENCE - 1), "{round}");
        }
        assert_eq!((own(&ram), blocks(&rollback)), (vec![7, 8], 2));
        for _ in 0..2 * PATIENCE {
            reset(&ram, &mut rollback);
        }
        assert_eq!((own(&ram), blocks(&rollback)), (vec![7], 1), "what was the guest's own stays so");
    }

    #[test]
    fn what_is_given_back_stays_if_it_is_the_images_until_the_mark_is_forgotten() {
        let ram = view();
        let discarder = ram.discarder();
        assert_eq!(discarder.discard(10..20).discarded, 10);
        let mut rollback = marked(&ram);
        let then = all(&ram);
        assert_eq!((discarder.discard(30..40).kept, discarder.discard(12..15).discarded), (10, 3));
        write(&ram, 13, 5);
        assert_eq!(discarder.discard(13..14).discarded, 1);
        assert!(all(&ram) == then);
        write(&ram, 14, 6);
        reset(&ram, &mut rollback);
        assert!(all(&ram) == then);
        ram.forget_mark();
        assert_eq!(discarder.discard(30..40).discarded, 10);
    }

    #[test]
    fn memory_without_an_image_is_refused_by_name() {
        let ram = GuestRam::fresh(SIZE).unwrap();
        assert!(matches!(ram.mark(), Err(MarkError::Mixed)));
        if let Ok(uffd) = uffd_handler::uffd::create_user_only() {
            let ram = GuestRam::copied_into(uffd.into(), layout::ram_regions(SIZE)).unwrap();
            assert!(ram.mark().unwrap_err().to_string().contains("`Uffd`"));
        }
    }
}
