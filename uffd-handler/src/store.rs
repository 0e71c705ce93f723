//! The page store: a memfd that holds the pages of one image that any guest of one user has touched so far.
//!
//! ```text
//!   image --read, checked--> buffer --UFFDIO_COPY--> server's shared mapping = page of the memfd
//!                                                              |  ordinary kernel faults
//!                                               private mappings of every guest
//! ```
//!
//! A store that the server keeps for itself is where pages for guests in copy mode come from.
//!
//! Rules that keep every guest's words right:
//! - only `UFFDIO_COPY` fills the store, so that a page is there whole or not at all;
//! - once mapped here the memfd is sealed against writing, resizing and further seals;
//! - a hole that is read through a mapping *without* userfaultfd becomes a page of zeros for everyone. Seals do not
//!   prevent that, so it is looked for: the memfd must never hold more pages than were put into it ([`Store::audit`]).
//!   Swapping does not change what the kernel counts, and the server itself never discards or preallocates anything, so
//!   that a surplus is always somebody else's doing.

use crate::faults::Outcome;
use crate::mmap::{Block, Copied, MapError, StoreMapping};
use crate::page_set::PageSet;
use crate::place::HUGE_PAGE;
use crate::region::{CHUNK_PAGES, PAGE_SIZE};
use rustix::fs::{MemfdFlags, Mode, SealFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use userfaultfd::Uffd;

/// Attempts at a copy that the kernel asks to repeat, before it counts as failed.
const COPY_ATTEMPTS: u32 = 1000;
/// Pages in a block that can become one huge page.
const BLOCK_PAGES: u64 = HUGE_PAGE / PAGE_SIZE;
/// Bytes in the blocks in which `fstat` counts.
const STAT_BLOCK: u64 = 512;

/// A store could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A step of making the memfd.
    #[error("cannot {0} the page store: {1}")]
    Memfd(&'static str, io::Error),
    /// Mapping it.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// A chunk could not be put into a store: the kernel did not take it, mostly for want of memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot fill chunk {chunk} of the page store: {source}")]
pub struct FillError {
    /// The chunk.
    pub chunk: u64,
    /// What the kernel said.
    pub source: io::Error,
}

/// What [`Store::fill`] had to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages put into the store.
    pub pages: u64,
    /// Pages that were there without our doing, put right.
    pub foreign: u64,
}

/// What [`Store::audit`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Audit {
    /// Exactly what was put there.
    Clean,
    /// So many pages too many.
    Surplus(u64),
}

/// The pages of one image that guests of one user share.
#[derive(Debug)]
pub struct Store {
    memfd: OwnedFd,
    /// The same file, opened for reading only: what clients are given.
    hand_out: File,
    mapping: StoreMapping,
    size: u64,
    present: PageSet,
    /// Numbers of the blocks that have become complete since somebody asked.
    complete: Vec<u64>,
}

impl Store {
    /// Makes an empty store of `size` bytes, a multiple of the page size.
    pub fn create(size: u64) -> Result<Self, CreateError> {
        let failed = |step| move |error: Errno| CreateError::Memfd(step, error.into());
        let memfd = rustix::fs::memfd_create("coppice-store", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed("create"))?;
        rustix::fs::ftruncate(&memfd, size).map_err(failed("size"))?;
        let mapping = StoreMapping::new(memfd.as_fd(), size as usize)?;
        rustix::fs::fcntl_add_seals(&memfd, seals()).map_err(failed("seal"))?;
        // So that other users cannot open what they are given again, for writing.
        rustix::fs::fchmod(&memfd, Mode::RUSR).map_err(failed("restrict"))?;
        let hand_out = File::open(format!("/proc/self/fd/{}", memfd.as_raw_fd()))
            .map_err(|error| CreateError::Memfd("reopen", error))?;
        Ok(Self { memfd, hand_out, mapping, size, present: PageSet::new(size / PAGE_SIZE), complete: Vec::new() })
    }

    /// The descriptor that clients get: read-only, sealed.
    pub fn hand_out(&self) -> BorrowedFd<'_> {
        self.hand_out.as_fd()
    }

    /// Pages that the server has filled.
    pub fn filled_pages(&self) -> u64 {
        self.present.count()
    }

    /// Whether all pages of a chunk are in the store.
    pub fn has_chunk(&self, chunk: u64) -> bool {
        self.present.first_gap(self.pages_of(chunk)).is_none()
    }

    /// Puts the pages of a chunk that are missing into the store. `bytes` are the chunk's, checked, and all of them.
    pub fn fill(&mut self, chunk: u64, bytes: &[u8]) -> Result<Filled, FillError> {
        let pages = self.pages_of(chunk);
        let mut filled = Filled::default();
        while let Some(gap) = self.present.first_gap(pages.clone()) {
            let within =
                ((gap.start - pages.start) * PAGE_SIZE) as usize..((gap.end - pages.start) * PAGE_SIZE) as usize;
            self.fill_gap(gap, &bytes[within], &mut filled).map_err(|source| FillError { chunk, source })?;
        }
        if filled != Filled::default() {
            self.note_complete(pages.start / BLOCK_PAGES);
        }
        Ok(filled)
    }

    /// Notes that a block is complete, if it is: a page was put into it just now. The last one of a store may be too short to
    /// be one.
    fn note_complete(&mut self, block: u64) {
        let pages = block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES;
        if pages.end <= self.size / PAGE_SIZE && self.present.first_gap(pages).is_none() {
            self.complete.push(block);
        }
    }

    /// The blocks of 2 MiB that have become complete since this was last asked. None is named twice.
    pub fn take_complete(&mut self) -> Vec<Block> {
        std::mem::take(&mut self.complete).into_iter().map(|block| self.mapping.block(block)).collect()
    }

    /// Copies a page that is in the store to where a client in copy mode has it.
    pub fn give(&self, page: u64, client: &Uffd, address: u64) -> io::Result<Outcome> {
        self.mapping.give((page * PAGE_SIZE) as usize, client, address)
    }

    /// As [`Store::give`], for neighbouring pages, as far as the kernel takes them; returns how many those were.
    pub fn give_run(&self, pages: Range<u64>, client: &Uffd, address: u64) -> u64 {
        let len = (pages.end - pages.start) * PAGE_SIZE;
        self.mapping.give_run((pages.start * PAGE_SIZE) as usize, len as usize, client, address) as u64 / PAGE_SIZE
    }

    /// Fills the first pages of a gap, as many as the kernel takes at once; at least one.
    fn fill_gap(&mut self, gap: Range<u64>, bytes: &[u8], filled: &mut Filled) -> io::Result<()> {
        let offset = (gap.start * PAGE_SIZE) as usize;
        for _ in 0..COPY_ATTEMPTS {
            match self.mapping.copy(offset, bytes)? {
                Copied::Bytes(copied) => {
                    let pages = copied as u64 / PAGE_SIZE;
                    self.present.insert(gap.start..gap.start + pages);
                    filled.pages += pages;
                    return Ok(());
                }
                Copied::Exists => {
                    self.put_right(gap.start, &bytes[..PAGE_SIZE as usize]);
                    filled.foreign += 1;
                    return Ok(());
                }
                Copied::Again => continue,
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Gives a page that is present, but was not put there by us, the bytes that it should have.
    fn put_right(&mut self, page: u64, bytes: &[u8]) {
        self.mapping.overwrite((page * PAGE_SIZE) as usize, bytes);
        self.present.insert(page..page + 1);
    }

    /// Compares what the store holds with what was put into it.
    pub fn audit(&self) -> io::Result<Audit> {
        let held = rustix::fs::fstat(&self.memfd)?.st_blocks as u64 * STAT_BLOCK / PAGE_SIZE;
        Ok(match held.saturating_sub(self.present.count()) {
            0 => Audit::Clean,
            surplus => Audit::Surplus(surplus),
        })
    }

    /// The pages that are not ours, as far as they can be found.
    pub fn foreign_pages(&self) -> io::Result<Vec<u64>> {
        let (mut foreign, mut from) = (Vec::new(), 0);
        while let Some(data) = self.next_data(from)? {
            let pages = data.start / PAGE_SIZE..data.end.div_ceil(PAGE_SIZE);
            foreign.extend(pages.filter(|&page| !self.present.contains(page)));
            from = data.end;
        }
        Ok(foreign)
    }

    /// The first range at or after `from` that holds pages.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let start = match rustix::fs::seek(&self.memfd, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(start..rustix::fs::seek(&self.memfd, SeekFrom::Hole(start))?))
    }

    fn pages_of(&self, chunk: u64) -> Range<u64> {
        let end = self.size / PAGE_SIZE;
        chunk.saturating_mul(CHUNK_PAGES).min(end)..chunk.saturating_add(1).saturating_mul(CHUNK_PAGES).min(end)
    }
}

fn seals() -> SealFlags {
    SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL
}
