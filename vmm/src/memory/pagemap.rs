//! Which pages of this process hold anything, as the kernel tells it in `/proc/self/pagemap`.

use super::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bits of an entry: the page is in memory, or was swapped out.
const HOLDS_SOMETHING: u64 = 1 << 63 | 1 << 62;
const ENTRY_BYTES: u64 = 8;
/// How many entries are read at a time.
const BATCH: u64 = 512;

/// The kernel's table of this process's pages.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// The first run of pages in a range of addresses that hold something; a long run may come in parts. Both are aligned
    /// to pages. In anonymous memory all other pages read as zeros.
    pub fn first_used(&self, addresses: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (mut page, end) = (addresses.start / PAGE_SIZE, addresses.end / PAGE_SIZE);
        let mut buf = [0; (BATCH * ENTRY_BYTES) as usize];
        while page < end {
            let count = BATCH.min(end - page);
            let bytes = &mut buf[..(count * ENTRY_BYTES) as usize];
            self.0.read_exact_at(bytes, page * ENTRY_BYTES)?;
            let (entries, _) = bytes.as_chunks();
            let is_used = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & HOLDS_SOMETHING != 0;
            if let Some(first) = entries.iter().position(is_used) {
                let used = entries[first..].iter().take_while(|entry| is_used(entry)).count();
                let start = (page + first as u64) * PAGE_SIZE;
                return Ok(Some(start..start + used as u64 * PAGE_SIZE));
            }
            page += count;
        }
        Ok(None)
    }
}
