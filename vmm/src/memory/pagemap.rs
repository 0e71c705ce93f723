//! What this process has mapped, page by page, as the kernel tells it in `/proc/self/pagemap`.
// UNSAFETY: one system call that fills a buffer; see `Pagemap::scan`.
#![allow(unsafe_code)]

use super::PAGE_SIZE;
use snapshot::page_runs::PageRuns;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bits of an entry: the page is in memory, was swapped out, or belongs to a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const ENTRY_BYTES: u64 = 8;
/// How many entries are read at a time: little where the first is looked for, more where all are.
const BATCH: u64 = 512;
const LARGE_BATCH: u64 = 8192;

/// Runs that one scan tells at most.
const SCAN_BATCH: usize = 1024;
/// The request and the bits of `include/uapi/linux/fs.h`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () =
    assert!(size_of::<ScanArgument>() == (PAGEMAP_SCAN as usize >> 16 & 0x3fff), "the request tells the size");

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// What the kernel says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The page holds something.
    pub fn is_used(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// It is a page of the file that is mapped there, or of shared memory; not a copy of this process's own. Only of a page
    /// that is used.
    pub fn is_of_file(self) -> bool {
        self.0 & OF_FILE != 0
    }

    /// An entry for tests.
    #[cfg(test)]
    pub fn new(present: bool, swapped: bool, of_file: bool) -> Self {
        let bit = |is_set, bit| if is_set { bit } else { 0 };
        Entry(bit(present, PRESENT) | bit(swapped, SWAPPED) | bit(of_file, OF_FILE))
    }
}

/// The kernel's table of this process's pages.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// What it says of the page at an address.
    pub fn entry(&self, address: u64) -> io::Result<Entry> {
        let mut entry = [0; ENTRY_BYTES as usize];
        self.0.read_exact_at(&mut entry, address / PAGE_SIZE * ENTRY_BYTES)?;
        Ok(Entry(u64::from_ne_bytes(entry)))
    }

    /// The first run of pages in a range of addresses that hold something; a long run may come in parts. Both are aligned
    /// to pages. In anonymous memory all other pages read as zeros.
    pub fn first_used(&self, addresses: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (mut page, end) = (addresses.start / PAGE_SIZE, addresses.end / PAGE_SIZE);
        let mut buf = vec![0; (BATCH * ENTRY_BYTES) as usize];
        while page < end {
            let entries = self.read(page..end, &mut buf)?;
            let count = entries.len() as u64;
            let mut entries = entries.enumerate().skip_while(|(_, entry)| !entry.is_used());
            if let Some((first, _)) = entries.next() {
                let used = 1 + entries.take_while(|(_, entry)| entry.is_used()).count();
                let start = (page + first as u64) * PAGE_SIZE;
                return Ok(Some(start..start + used as u64 * PAGE_SIZE));
            }
            page += count;
        }
        Ok(None)
    }

    /// Tells `batch` the entries of a range of addresses, which is aligned to pages, in ascending order and some at a time,
    /// until it wants no more.
    pub fn each_batch(
        &self,
        addresses: Range<u64>,
        mut batch: impl FnMut(&mut dyn Iterator<Item = Entry>) -> bool,
    ) -> io::Result<()> {
        let (mut page, end) = (addresses.start / PAGE_SIZE, addresses.end / PAGE_SIZE);
        let mut buf = vec![0; (LARGE_BATCH * ENTRY_BYTES) as usize];
        while page < end {
            let mut entries = self.read(page..end, &mut buf)?;
            page += entries.len() as u64;
            if !batch(&mut entries) {
                break;
            }
        }
        Ok(())
    }

    /// The pages in a range of addresses, aligned to pages, that are this process's own: written, and not those of a file or of
    /// shared memory. They are numbered from address 0. Where the kernel can look for them by itself (`PAGEMAP_SCAN`, Linux 6.7)
    /// that takes as long as there are pages mapped; elsewhere it takes as long as there are pages.
    pub fn private_pages(&self, addresses: Range<u64>) -> io::Result<PageRuns> {
        match self.scan(addresses.clone()) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => self.private_entries(addresses),
            scanned => scanned,
        }
    }

    /// The same, entry by entry.
    fn private_entries(&self, addresses: Range<u64>) -> io::Result<PageRuns> {
        let (mut pages, mut page) = (Vec::new(), addresses.start / PAGE_SIZE);
        self.each_batch(addresses, |entries| {
            for entry in entries {
                if entry.is_used() && !entry.is_of_file() {
                    pages.push(page);
                }
                page += 1;
            }
            true
        })?;
        Ok(PageRuns::of_pages(pages))
    }

    /// The same by `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst).
    fn scan(&self, addresses: Range<u64>) -> io::Result<PageRuns> {
        let mut found = vec![PageRegion::default(); SCAN_BATCH];
        let (mut runs, mut at) = (Vec::new(), addresses.start);
        while at < addresses.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                start: at,
                end: addresses.end,
                vec: found.as_mut_ptr() as u64,
                vec_len: SCAN_BATCH as u64,
                category_inverted: PAGE_IS_FILE,
                category_mask: PAGE_IS_FILE,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_FILE,
                ..ScanArgument::default()
            };
            // SAFETY: the argument has the size and the layout that its `size` tells the kernel. The kernel writes at most `vec_len`
            // entries to `vec`, which has room for so many and outlives the call; any bytes are an entry.
            let count = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            runs.extend(found.iter().take(count).map(|found| found.start / PAGE_SIZE..found.end / PAGE_SIZE));
            // A kernel that does not come on would keep us here for ever.
            if argument.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN does not come on"));
            }
            at = argument.walk_end;
        }
        // Linux 6.18 tells some runs twice if there are many.
        Ok(PageRuns::new(runs))
    }

    /// The entries of the first of these pages, as many as `buf` has room for.
    fn read<'b>(
        &self,
        pages: Range<u64>,
        buf: &'b mut [u8],
    ) -> io::Result<impl ExactSizeIterator<Item = Entry> + use<'b>> {
        let len = (buf.len() as u64).min((pages.end - pages.start) * ENTRY_BYTES);
        let bytes = &mut buf[..len as usize];
        self.0.read_exact_at(bytes, pages.start * ENTRY_BYTES)?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries.iter().map(|entry| Entry(u64::from_ne_bytes(*entry))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use snapshot::manifest::MemoryRegion;
    use std::collections::BTreeSet;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn own_pages_are_told_from_those_of_a_file_in_both_ways() {
        const PAGES: u64 = 3000;
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        let region = MemoryRegion { guest_addr: 0, size_bytes: PAGES * PAGE_SIZE, offset: 0 };
        let ram = GuestRam::private_view(&file, vec![region]).unwrap();
        let written: BTreeSet<u64> = (0..PAGES).filter(|page| page * page % 7 == 1 && page % 3 != 2).collect();
        for page in 0..PAGES {
            let place = GuestAddress(page * PAGE_SIZE + 8);
            if written.contains(&page) {
                ram.memory().write_obj(page, place).unwrap();
            } else if page % 2 == 0 {
                ram.memory().read_obj::<u64>(place).unwrap();
            }
        }
        let (_, start) = ram.mappings().next().unwrap();
        let (start, pagemap) = (start as u64, Pagemap::open().unwrap());
        let addresses = start..start + PAGES * PAGE_SIZE;
        let ways: [(&str, io::Result<PageRuns>); 3] = [
            ("scan", pagemap.scan(addresses.clone())),
            ("entries", pagemap.private_entries(addresses.clone())),
            ("either", pagemap.private_pages(addresses)),
        ];
        for (way, runs) in ways {
            let runs = match runs {
                Err(e) if way == "scan" && e.raw_os_error() == Some(libc::ENOTTY) => continue,
                runs => runs.unwrap(),
            };
            let pages: Vec<u64> = runs.runs().iter().cloned().flatten().map(|page| page - start / PAGE_SIZE).collect();
            assert!(pages.iter().copied().eq(written.iter().copied()), "{way}");
        }
    }
}
