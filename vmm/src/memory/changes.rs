//! What a guest has made of the image that it began with: copied while it stands still, written when it goes on.
//!
//! A page counts as changed if this process has it for itself, or if the guest has given it back. Pages that were loaded by copying
//! (in copy mode, or when no page server was there) look no different from pages that were written: they are copied too, and
//! whoever writes them leaves out those that are as they were.

use super::discard::Discarded;
use super::pagemap::Pagemap;
use super::{Backing, GuestRam, PAGE_SIZE};
use crate::devices::lock;
use crate::host::proc;
use rustix::fs::{MemfdFlags, memfd_create};
use snapshot::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use snapshot::create::{Cancel, LayerSource};
use snapshot::page_runs::PageRuns;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

const _: () = assert!(CLUSTER_BYTES == PAGE_SIZE, "a cluster of the map is a page");

/// Most bytes that are copied before whoever wants to end is asked again.
const PIECE: u64 = 4 << 20;

/// How much may be copied, in bytes, without a look at what memory there is.
const LITTLE: u64 = 16 << 20;

/// Why changes could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel does not tell.
    #[error("the kernel does not tell what the guest has written (/proc/self/pagemap): {0}")]
    Pagemap(io::Error),
    /// They do not fit.
    #[error(
        "the guest has written {bytes} bytes, and the host has memory for {room} more to copy them into (half of MemAvailable)"
    )]
    NoRoom {
        /// How much it has written.
        bytes: u64,
        /// How much may be taken for a copy.
        room: u64,
    },
    /// They cannot be kept.
    #[error("cannot keep a copy of what the guest has written: {0}")]
    Keep(io::Error),
    /// They cannot be read.
    #[error("cannot read the guest's memory at image offset {offset:#x}: {source}")]
    Read {
        /// Where, in bytes.
        offset: u64,
        /// What went wrong.
        source: vm_memory::GuestMemoryError,
    },
    /// Given up on request.
    #[error("cancelled; nothing was kept")]
    Cancelled,
}

/// Memory that lies in one piece in the image and in the guest.
pub(super) struct Part {
    /// Where it is in the image, in bytes.
    pub offset: u64,
    /// Where it is in the guest.
    pub from: GuestAddress,
    /// How long it is, in bytes.
    pub len: usize,
}

/// The pages that a guest has changed.
#[derive(Debug)]
pub struct Changes {
    size: u64,
    pages: Clusters,
    /// Runs of pages that are data, in order, and where each lies in the copy, in bytes.
    runs: Vec<(Range<u64>, u64)>,
    /// A file in memory: what is in it counts as nobody's private memory, which a guest may have a limit of.
    copy: File,
}

impl GuestRam {
    /// Copies what the guest has changed of its image. No vCPU and no device may write meanwhile. `None` if that is not to be told
    /// from the rest: the guest was booted here and has no image, or has one in part.
    pub fn capture(&self, cancel: &dyn Cancel) -> Result<Option<Changes>, CaptureError> {
        let Some(pages) = self.changed()? else { return Ok(None) };
        let keep = |e: rustix::io::Errno| CaptureError::Keep(e.into());
        let copy = File::from(memfd_create("coppice-changes", MemfdFlags::CLOEXEC).map_err(keep)?);
        let runs = self.copy_runs(data_runs(&pages), &copy, cancel)?;
        Ok(Some(Changes { size: self.size(), pages, runs, copy }))
    }

    /// Which pages the guest has changed of its image, of which a copy would fit.
    pub(super) fn changed(&self) -> Result<Option<Clusters>, CaptureError> {
        let given_back = match &*lock(&self.backing) {
            Backing::Own(_) | Backing::Image(Discarded { is_mixed: true, .. }) => return Ok(None),
            Backing::Image(discarded) => discarded.runs(),
        };
        let mut pages = Clusters::new(self.size());
        for run in given_back {
            pages.set(run, Cluster::Zero);
        }
        let pagemap = self.pagemap().map_err(CaptureError::Pagemap)?;
        let mut private = Vec::new();
        for (region, address) in self.mappings() {
            let (start, first) = (address as u64, region.offset / PAGE_SIZE);
            let found = pagemap.private_pages(start..start + region.size_bytes).map_err(CaptureError::Pagemap)?;
            let place = |page: u64| page - start / PAGE_SIZE + first;
            private.extend(found.runs().iter().map(|run| place(run.start)..place(run.end)));
        }
        let private = PageRuns::new(private);
        for run in private.runs() {
            pages.set(run.clone(), Cluster::Data);
        }
        check_room(&pages)?;
        Ok(Some(pages))
    }

    /// Opened once: it takes a while, and the process may come to live where there is no /proc.
    fn pagemap(&self) -> io::Result<&Pagemap> {
        if let Some(pagemap) = self.pagemap.get() {
            return Ok(pagemap);
        }
        let opened = Pagemap::open()?;
        Ok(self.pagemap.get_or_init(|| opened))
    }

    /// The parts of a run of pages of the image that can be copied at a time.
    pub(super) fn parts(&self, run: Range<u64>) -> impl Iterator<Item = Part> + '_ {
        let (mut at, end) = (run.start * PAGE_SIZE, run.end * PAGE_SIZE);
        std::iter::from_fn(move || {
            let offset = at;
            let region = self.regions.iter().find(|r| (r.offset..r.offset + r.size_bytes).contains(&offset));
            let region = region.filter(|_| offset < end)?;
            let len = (end - offset).min(region.offset + region.size_bytes - offset).min(PIECE);
            at += len;
            Some(Part { offset, from: GuestAddress(region.guest_addr + (offset - region.offset)), len: len as usize })
        })
    }

    /// Copies runs of pages of the image, one behind the other. Returns where each lies.
    fn copy_runs(
        &self,
        runs: impl Iterator<Item = Range<u64>>,
        mut copy: &File,
        cancel: &dyn Cancel,
    ) -> Result<Vec<(Range<u64>, u64)>, CaptureError> {
        let (mut placed, mut end_of_copy, mut asks) = (Vec::new(), 0, Asks::new(cancel));
        for run in runs {
            placed.push((run.clone(), end_of_copy));
            for Part { offset, from, len } in self.parts(run) {
                asks.go_on(len)?;
                let written = self.memory.write_all_volatile_to(from, &mut copy, len);
                written.map_err(|source| CaptureError::Read { offset, source })?;
                end_of_copy += len as u64;
            }
        }
        Ok(placed)
    }
}

/// Asks whether to go on: as each answer takes a system call, not before each of many short copies.
pub(super) struct Asks<'a> {
    cancel: &'a dyn Cancel,
    /// How many bytes may be copied before it asks again.
    left: u64,
}

impl<'a> Asks<'a> {
    pub(super) fn new(cancel: &'a dyn Cancel) -> Self {
        Asks { cancel, left: 0 }
    }

    /// Whether so many bytes are to be copied.
    pub(super) fn go_on(&mut self, bytes: usize) -> Result<(), CaptureError> {
        let bytes = bytes as u64;
        if self.left < bytes {
            if self.cancel.is_cancelled() {
                return Err(CaptureError::Cancelled);
            }
            self.left = PIECE;
        }
        self.left -= bytes.min(self.left);
        Ok(())
    }
}

/// Pages that are data, as runs, in order.
pub(super) fn data_runs(pages: &Clusters) -> impl Iterator<Item = Range<u64>> + '_ {
    pages.runs(0..pages.count()).filter(|(_, state)| *state == Cluster::Data).map(|(run, _)| run)
}

/// Whether there is memory for a copy of these pages. So little as any host has is not asked for.
fn check_room(pages: &Clusters) -> Result<(), CaptureError> {
    let bytes = pages.data() * PAGE_SIZE;
    if bytes <= LITTLE {
        return Ok(());
    }
    let room = room();
    if bytes > room { Err(CaptureError::NoRoom { bytes, room }) } else { Ok(()) }
}

/// How many bytes may be taken for a copy: half of what the host has. All that there are, if it does not say.
pub(super) fn room() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    proc::number_after(&text, "MemAvailable:").map_or(u64::MAX, |kib| kib.saturating_mul(1024) / 2)
}

impl LayerSource for Changes {
    fn size(&self) -> u64 {
        self.size
    }

    fn clusters(&self) -> &Clusters {
        &self.pages
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let page = offset / PAGE_SIZE;
        let run = self.runs.partition_point(|(run, _)| run.start <= page).checked_sub(1).map(|at| &self.runs[at]);
        let Some((run, place)) = run.filter(|(run, _)| run.contains(&page)) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if offset + buf.len() as u64 > run.end * PAGE_SIZE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.copy.read_exact_at(buf, place + (offset - run.start * PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const SIZE: u64 = 4 << 20;

    fn view() -> GuestRam {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        GuestRam::private_view(&file, layout::ram_regions(SIZE)).unwrap()
    }

    #[test]
    fn it_is_asked_before_the_first_copy_and_then_as_often_as_a_piece_was_copied() {
        struct Asked(AtomicU64);
        impl Cancel for Asked {
            fn is_cancelled(&self) -> bool {
                self.0.fetch_add(1, Ordering::Relaxed) == 3
            }
        }
        let asked = Asked(AtomicU64::new(0));
        let (mut asks, mut copied) = (Asks::new(&asked), 0);
        while asks.go_on(PAGE_SIZE as usize).is_ok() {
            copied += PAGE_SIZE;
        }
        assert_eq!(copied, 3 * PIECE);
        let mut asks = Asks::new(&asked);
        (0..5).for_each(|_| asks.go_on(PIECE as usize).unwrap());
        assert_eq!(asked.0.load(Ordering::Relaxed), 4 + 5);
    }

    #[test]
    fn what_was_written_or_given_back_has_changed_and_nothing_else() {
        let (ram, go_on) = (view(), AtomicBool::new(false));
        for page in [3, 4, 5, 100, SIZE / PAGE_SIZE - 1] {
            ram.memory().write_slice(&[page as u8; 16], GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        ram.memory().read_obj::<u8>(GuestAddress(50 * PAGE_SIZE)).unwrap();
        assert_eq!(ram.discarder().discard(200..220).discarded, 20);
        ram.memory().write_slice(&[9], GuestAddress(210 * PAGE_SIZE + 5)).unwrap();
        let changes = ram.capture(&go_on).unwrap().unwrap();
        // What the guest does later is not in them.
        ram.memory().write_slice(&[1; 4096], GuestAddress(3 * PAGE_SIZE)).unwrap();
        for page in 0..SIZE / PAGE_SIZE {
            let wanted = match page {
                3..=5 | 100 | 210 | 1023 => Cluster::Data,
                200..220 => Cluster::Zero,
                _ => Cluster::Absent,
            };
            assert_eq!(changes.clusters().get(page), wanted, "{page}");
        }
        let mut bytes = vec![0; 3 * PAGE_SIZE as usize];
        changes.read(3 * PAGE_SIZE, &mut bytes).unwrap();
        for (page, bytes) in (3..).zip(bytes.chunks(PAGE_SIZE as usize)) {
            assert!(bytes[..16].iter().all(|b| *b == page) && bytes[16..].iter().all(|b| *b == 7), "{page}");
        }
        let mut page = vec![0; PAGE_SIZE as usize];
        changes.read(210 * PAGE_SIZE, &mut page).unwrap();
        assert!(page[5] == 9 && page.iter().filter(|b| **b != 0).count() == 1);
        for (offset, len) in [(2, 1), (5, 2), (1023, 2), (50, 1)] {
            let mut bytes = vec![0; len * PAGE_SIZE as usize];
            assert!(changes.read(offset * PAGE_SIZE, &mut bytes).is_err(), "{offset}");
        }
    }

    #[test]
    fn a_guest_without_an_image_has_changed_none_and_one_that_ends_is_left() {
        let ram = GuestRam::fresh(SIZE).unwrap();
        assert!(ram.capture(&AtomicBool::new(false)).unwrap().is_none());
        let ram = view();
        assert_eq!(
            ram.capture(&AtomicBool::new(true)).unwrap().unwrap().clusters().data(),
            0,
            "there is nothing to copy"
        );
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        assert!(matches!(ram.capture(&AtomicBool::new(true)), Err(CaptureError::Cancelled)));
    }
}
