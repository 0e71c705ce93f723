//! The store of a page server that is gone, which a guest still maps.
//!
//! Nobody fills it any more, and nobody looks after it: a page that appears in it now is one of zeros, which the kernel has put there
//! for somebody who read a hole of it through a mapping without userfaultfd; be it a stranger, or a vmm that was killed at the moment
//! when its guest waited for a page. Guests would read those zeros without a fault. So it is looked for them ([`Orphan::foreign`]),
//! and each is hidden from the guest behind a page of its own with the right bytes.

use super::PAGE_SIZE;
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use uffd_handler::page_set::PageSet;
use uffd_handler::region::CHUNK_PAGES;

/// A store without a server.
#[derive(Debug)]
pub struct Orphan {
    store: File,
    /// The pages that are known: those that the server had put there, and those that were found since.
    known: PageSet,
    /// How much it held when it was last looked at, as the kernel counts.
    blocks: u64,
    pages: u64,
}

impl Orphan {
    /// Takes over a store of so many bytes, with what is in it. Servers fill whole chunks: pages of others are doubtful, and
    /// returned.
    pub fn adopt(store: File, size: u64) -> io::Result<(Self, Vec<u64>)> {
        let pages = size / PAGE_SIZE;
        let mut orphan = Orphan { store, known: PageSet::new(pages), blocks: 0, pages };
        let mut doubtful = orphan.foreign()?;
        let of_chunk =
            |page: u64| page / CHUNK_PAGES * CHUNK_PAGES..((page / CHUNK_PAGES + 1) * CHUNK_PAGES).min(pages);
        doubtful.retain(|page| orphan.known.first_gap(of_chunk(*page)).is_some());
        Ok((orphan, doubtful))
    }

    /// The bytes of a page that is there.
    pub fn page(&self, page: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        self.store.read_exact_at(&mut bytes, page * PAGE_SIZE)?;
        Ok(bytes)
    }

    /// The pages that have appeared since this was last asked.
    pub fn foreign(&mut self) -> io::Result<Vec<u64>> {
        let blocks = fstat(&self.store)?.st_blocks as u64;
        let mut foreign = Vec::new();
        if blocks == self.blocks {
            return Ok(foreign);
        }
        let mut from = 0;
        while let Some(data) = self.next_data(from)? {
            let mut at = data.start;
            while let Some(gap) = self.known.first_gap(at..data.end) {
                at = gap.end;
                foreign.extend(gap.clone());
                self.known.insert(gap);
            }
            from = data.end;
        }
        self.blocks = blocks;
        Ok(foreign)
    }

    /// The first run of pages at or after `from` that the store holds.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        if from >= self.pages {
            return Ok(None);
        }
        // Whoever else has this open file moves its offset too; what counts is the answer.
        let start = match seek(&self.store, SeekFrom::Data(from * PAGE_SIZE)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = seek(&self.store, SeekFrom::Hole(start))?;
        Ok(Some(start / PAGE_SIZE..end.div_ceil(PAGE_SIZE).min(self.pages)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    #[test]
    fn what_appears_later_is_found_once() {
        let store = File::from(memfd_create("store", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&store, 64 * PAGE_SIZE).unwrap();
        let write = |page: u64| store.write_all_at(&[0; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap();
        (16..32).for_each(write);
        (4..8).for_each(write);
        let (mut orphan, doubtful) = Orphan::adopt(store.try_clone().unwrap(), 64 * PAGE_SIZE).unwrap();
        assert_eq!(doubtful, [4, 5, 6, 7], "part of a chunk");
        assert!(orphan.foreign().unwrap().is_empty());
        [3, 8, 63].into_iter().for_each(write);
        assert_eq!(orphan.foreign().unwrap(), [3, 8, 63]);
        assert!(orphan.foreign().unwrap().is_empty());
    }
}
