//! What this process has mapped, page by page, as the kernel tells it in `/proc/self/pagemap`.

use super::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bits of an entry: the page is in memory, was swapped out, or belongs to a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const ENTRY_BYTES: u64 = 8;
/// How many entries are read at a time: little where the first is looked for, more where all are.
const BATCH: u64 = 512;
const LARGE_BATCH: u64 = 8192;

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
