//! The server's own mapping of a store, the two ways in which bytes get into it, and those in which pages get into the
//! memory of a client in copy mode.

// UNSAFETY: memory is mapped and unmapped, and filled through pointers into the mapping. Pages are put into other processes.
#![allow(unsafe_code)]

use crate::faults::Outcome;
use crate::place::{self, HUGE_PAGE};
use crate::region::PAGE_SIZE;
use crate::uffd::{self, UffdError};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use userfaultfd::Uffd;

/// A store could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The mapping was refused.
    #[error("cannot map {0} bytes of page store: {1}")]
    Map(usize, io::Error),
    /// No userfaultfd to fill it with.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The userfaultfd would not take it.
    #[error("cannot register the page store with userfaultfd: {0}")]
    Register(userfaultfd::Error),
}

/// How far one attempt to put bytes into the store got.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// So many bytes, from the start of those offered: at least a page.
    Bytes(usize),
    /// None: the first page is there already.
    Exists,
    /// None, for now: try again.
    Again,
}

/// A shared, writable mapping of a store, registered for missing faults with a userfaultfd of its own while it lives.
///
/// The registration makes `UFFDIO_COPY` possible, by which a page appears whole or not at all, and keeps the kernel
/// from joining the store's pages into huge ones where some are absent. The mapping lies where a huge page of the store
/// is one of the mapping too.
#[derive(Debug)]
pub struct StoreMapping {
    mapped: Arc<Mapped>,
}

/// The range that is mapped. It is shared with those who have [`Block`]s of it collapsed.
#[derive(Debug)]
struct Mapped {
    base: NonNull<u8>,
    len: usize,
    /// Last field: it is closed after `drop` has unmapped the range.
    uffd: Uffd,
}

// SAFETY: the mapping belongs to this value alone and is bound to no thread: any one may fill it, or unmap it.
unsafe impl Send for Mapped {}
// SAFETY: by a shared reference the range is only handed to the kernel, whose calls do not mind each other. Its bytes are
// written by this process in `StoreMapping::overwrite` alone, which only the one owner of a `StoreMapping` can call.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn advise(&self, advice: libc::c_int) -> Result<(), MapError> {
        // SAFETY: the range is this mapping, whole; DONTFORK and DONTDUMP, the callers' advice, leave its bytes alone.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(MapError::Map(self.len, io::Error::last_os_error())),
        }
    }

    fn range(&self, offset: usize, len: usize) -> *mut u8 {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "{len} bytes at {offset} are outside of a store of {} bytes", self.len);
        // SAFETY: the offset is within the mapping, as was just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, whole, and its only owner is going away.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Two MiB of a store, all of whose pages are there, for as long as there is the store.
#[derive(Clone, Debug)]
pub struct Block {
    mapped: Weak<Mapped>,
    offset: usize,
}

impl Block {
    /// Has the kernel move the block's pages into one huge page, if the store is there still. That takes the kernel up to a
    /// few milliseconds, while whoever needs one of the pages waits; it changes no byte. Needs Linux 6.1.
    pub fn collapse(&self) -> Option<io::Result<()>> {
        let mapped = self.mapped.upgrade()?;
        let start = mapped.range(self.offset, HUGE_PAGE as usize);
        // SAFETY: the range lies in the mapping (`range` checks it), and keeps its bytes, in other pages.
        let collapsed = unsafe { libc::madvise(start.cast(), HUGE_PAGE as usize, libc::MADV_COLLAPSE) };
        Some(if collapsed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
    }
}

impl StoreMapping {
    /// Maps the first `len` bytes (not zero) of `memfd`.
    pub fn new(memfd: BorrowedFd, len: usize) -> Result<Self, MapError> {
        let uffd = uffd::create_user_only()?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        let base = place::map(Some((memfd, 0)), len, protection, flags).map_err(|error| MapError::Map(len, error))?;
        let mapped = Mapped { base, len, uffd };
        mapped.uffd.register(mapped.base.as_ptr().cast(), len).map_err(MapError::Register)?;
        mapped.advise(libc::MADV_DONTFORK)?;
        mapped.advise(libc::MADV_DONTDUMP)?;
        Ok(Self { mapped: Arc::new(mapped) })
    }

    /// The block of [`HUGE_PAGE`] bytes with this number, which must be within the store, and complete: the kernel would
    /// make zeros of pages that are not there, were the mapping not registered.
    pub fn block(&self, number: u64) -> Block {
        Block { mapped: Arc::downgrade(&self.mapped), offset: (number * HUGE_PAGE) as usize }
    }

    /// Puts whole pages of `bytes` at `offset`, where there are none yet: one attempt.
    pub fn copy(&self, offset: usize, bytes: &[u8]) -> io::Result<Copied> {
        let target = self.range(offset, bytes.len());
        // SAFETY: the source is a slice and the target lies in this mapping (`range` checks it), where nothing else of
        // this process keeps a reference; the kernel only adds pages that are absent.
        let result = unsafe { self.mapped.uffd.copy(bytes.as_ptr().cast(), target.cast(), bytes.len(), false) };
        interpret(result)
    }

    /// Copies the page at `offset`, which must be present, to an address of the process that `client` is of.
    pub fn give(&self, offset: usize, client: &Uffd, address: u64) -> io::Result<Outcome> {
        let source = self.range(offset, PAGE_SIZE as usize);
        // SAFETY: the source lies in this mapping (`range` checks it), and is only read. The target is in the memory of
        // whoever made `client`, where the kernel accepts only what that process has registered; no store's own
        // userfaultfd, the only ones of this process, is ever a client's.
        let copied = unsafe { client.copy(source.cast(), address as *mut _, PAGE_SIZE as usize, true) };
        placed(copied)
    }

    /// As [`StoreMapping::give`], for so many bytes, whole pages; returns how many of them the kernel took.
    pub fn give_run(&self, offset: usize, len: usize, client: &Uffd, address: u64) -> usize {
        let source = self.range(offset, len);
        // SAFETY: as in `give`.
        let copied = unsafe { client.copy(source.cast(), address as *mut _, len, true) };
        progress(copied).unwrap_or(0)
    }

    /// Replaces bytes at `offset`, in pages that are present: for those that somebody else brought into being.
    ///
    /// The caller has made sure that they are present; this thread would wait for itself in one that is not.
    pub fn overwrite(&mut self, offset: usize, bytes: &[u8]) {
        let target = self.range(offset, bytes.len());
        // SAFETY: source and target are distinct (a slice of ours, and this mapping, to which no reference exists), nobody else
        // of this process writes (this value is borrowed alone), and `range` has checked the length. Other processes that read the page meanwhile see old or new bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    fn range(&self, offset: usize, len: usize) -> *mut u8 {
        self.mapped.range(offset, len)
    }
}

/// Copies a page of bytes to an address of the process that `client` is of, where there is none.
pub fn give_page(client: &Uffd, address: u64, page: &[u8]) -> io::Result<Outcome> {
    assert_eq!(page.len() as u64, PAGE_SIZE, "a page is copied whole");
    // SAFETY: the source is a slice. The kernel accepts only what the process that made `client` has registered, which is memory
    // that is filled in this way, by whomever, and to which no Rust reference exists; and it only adds pages that are absent.
    placed(unsafe { client.copy(page.as_ptr().cast(), address as *mut _, page.len(), true) })
}

/// Puts a page of zeros to an address of the process that `client` is of.
pub fn give_zeros(client: &Uffd, address: u64) -> io::Result<Outcome> {
    // SAFETY: as in `StoreMapping::give`: the kernel accepts only what the process that made `client` has registered.
    placed(unsafe { client.zeropage(address as *mut _, PAGE_SIZE as usize, true) })
}

/// What became of the one page that was to be put into a client's memory.
fn placed(result: userfaultfd::Result<usize>) -> io::Result<Outcome> {
    match progress(result) {
        Ok(_) => Ok(Outcome::Placed),
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(Outcome::Present),
            Some(libc::ENOENT) => Ok(Outcome::Gone),
            Some(libc::EAGAIN) => Ok(Outcome::Again),
            _ => Err(error),
        },
    }
}

/// What became of bytes that were to be put into the store.
fn interpret(result: userfaultfd::Result<usize>) -> io::Result<Copied> {
    match progress(result) {
        Ok(bytes) => Ok(Copied::Bytes(bytes)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(Copied::Exists),
            Some(libc::EAGAIN) => Ok(Copied::Again),
            _ => Err(error),
        },
    }
}

/// Makes one word of the several ways in which the crate and the kernel report an incomplete copy.
fn progress(result: userfaultfd::Result<usize>) -> io::Result<usize> {
    let failed = |errno: i32| Err(io::Error::from_raw_os_error(errno));
    match result {
        Ok(bytes) => Ok(bytes),
        // A signed count or error number that the crate has cast: only a positive one is progress.
        Err(userfaultfd::Error::PartiallyCopied(count)) => match count as isize {
            1.. => Ok(count),
            0 => failed(libc::EAGAIN),
            negative => failed(negative.unsigned_abs() as i32),
        },
        Err(userfaultfd::Error::CopyFailed(errno) | userfaultfd::Error::ZeropageFailed(errno)) => failed(errno as i32),
        Err(other) => Err(io::Error::other(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_count_is_no_progress() {
        let partial = |count: isize| interpret(Err(userfaultfd::Error::PartiallyCopied(count as usize))).unwrap();
        assert_eq!(partial(8192), Copied::Bytes(8192));
        assert_eq!(partial(0), Copied::Again);
        assert_eq!(partial(-(libc::EAGAIN as isize)), Copied::Again);
        assert_eq!(partial(-(libc::EEXIST as isize)), Copied::Exists);
        let placed = |errno: i32| placed(Err(userfaultfd::Error::PartiallyCopied(-(errno as isize) as usize)));
        assert_eq!(placed(libc::ENOENT).unwrap(), Outcome::Gone);
        assert_eq!(placed(libc::ESRCH).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
