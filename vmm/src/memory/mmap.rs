//! The system calls that change what lies behind guest memory.
// UNSAFETY: mappings are raw memory; every block here argues from the region that it is given, which stays mapped,
// at the same address and size, for as long as the region lives.
#![allow(unsafe_code)]

use super::{PAGE_SIZE, lost};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{self, NonNull};
use uffd_handler::place;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

/// A mapping of guest memory, which lies where the kernel can map huge pages of what is behind it: addresses and offsets
/// in the file have the same remainder by 2 MiB. It is unmapped with this value.
#[derive(Debug)]
pub struct Mapping {
    region: MmapRegion,
}

impl Mapping {
    /// Maps `len` bytes (not zero) of a file, readable and writable, from where is said.
    pub fn new(file: FileOffset, len: usize, flags: libc::c_int) -> Result<Self, MmapRegionError> {
        let place = (file.file().as_fd(), file.start());
        let addr = place::map(Some(place), len, PROTECTION, flags).map_err(MmapRegionError::Mmap)?;
        Mapping::of(addr, len, flags)
    }

    /// Reserves `len` addresses (not zero) for what is to be mapped of a file from `offset` on. Whoever accesses them before
    /// dies of it. They take no memory.
    pub fn reserve(len: usize, offset: u64) -> Result<Self, MmapRegionError> {
        let addr = place::reserve(len, offset).map_err(MmapRegionError::Mmap)?;
        Mapping::of(addr, len, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    }

    fn of(addr: NonNull<u8>, len: usize, flags: libc::c_int) -> Result<Self, MmapRegionError> {
        let builder = MmapRegionBuilder::new(len).with_mmap_prot(PROTECTION).with_mmap_flags(flags);
        // SAFETY: the mapping has just been made, of that length, and stays until this value is dropped, which owns the
        // region; nobody is given the region but by reference.
        let region = unsafe { builder.with_raw_mmap_pointer(addr.as_ptr()) }.build()?;
        Ok(Mapping { region })
    }

    /// The mapping as vm-memory sees it.
    pub fn region(&self) -> &MmapRegion {
        &self.region
    }
}

/// What guest memory may be used for.
const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, whole, which the region does not unmap by itself; whoever refers to it borrows
        // this value. Nothing else can lie there: what is put in its place is put there by `replaced` alone, which does not
        // return if that fails.
        unsafe { libc::munmap(self.region.as_ptr().cast(), self.region.size()) };
    }
}

fn not_null(addr: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    NonNull::new(addr.cast()).ok_or_else(|| io::Error::other("the kernel mapped memory at address null"))
}

/// What the kernel is to get ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Populate {
    /// Pages to be read: they are mapped.
    Read,
    /// Pages to be written: they are copied.
    Write,
}

/// Has the kernel get part of a region ready, in bytes from its start: as if each page were read, or written, but without a change
/// to any byte. Needs Linux 5.14.
pub fn populate(region: &MmapRegion, range: Range<u64>, how: Populate) -> io::Result<()> {
    Part::of(region, range)?.advise(match how {
        Populate::Read => libc::MADV_POPULATE_READ,
        Populate::Write => libc::MADV_POPULATE_WRITE,
    })
}

/// Makes addresses that were reserved anonymous memory, kept out of core dumps and of child processes.
pub fn open_up(region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is the region's own mapping, which so far nobody could access.
    if unsafe { libc::mprotect(region.as_ptr().cast(), region.size(), PROTECTION) } != 0 {
        return Err(io::Error::last_os_error());
    }
    keep_private(region)
}

/// Keeps a region out of core dumps and out of child processes.
pub fn keep_private(region: &MmapRegion) -> io::Result<()> {
    let all = Part { addr: region.as_ptr(), len: region.size() };
    PRIVACY.into_iter().try_for_each(|advice| all.advise(advice))
}

/// Advice that keeps memory out of core dumps and out of child processes.
const PRIVACY: [libc::c_int; 2] = [libc::MADV_DONTDUMP, libc::MADV_DONTFORK];

/// Part of a region's mapping, or all of it; or a mapping that is to become one.
struct Part {
    addr: *mut u8,
    len: usize,
}

impl Part {
    /// The bytes of `range`, whole pages, counted from the region's start.
    fn of(region: &MmapRegion, range: Range<u64>) -> io::Result<Self> {
        let aligned = [range.start, range.end].iter().all(|at| at.is_multiple_of(PAGE_SIZE));
        if !aligned || range.is_empty() || range.end > region.size() as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let addr = region.as_ptr().wrapping_add(range.start as usize);
        Ok(Part { addr, len: (range.end - range.start) as usize })
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range lies within a region's own mapping, which stays, or within a new one of ours. Advice changes no byte that is read there,
        // but for MADV_DONTNEED, which is like a write of the guest, to volatile memory that no Rust reference points to.
        if unsafe { libc::madvise(self.addr.cast(), self.len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Tells that something has taken the place of part of a region, given what the kernel says of it; or ends the process.
///
/// The kernel unmaps what was there before it puts something in its place. If it then fails, the addresses are free, and the next
/// mapping of any thread may get them: the guest could read and write that, and whoever unmaps the region would unmap it. Which
/// failures come that late is not said, and cannot be seen afterwards, as somebody else's mapping looks like ours. So none is
/// survived. They are rare: the kernel has no memory for itself, or its bound of mappings is reached, which we stay far from.
fn replaced(put: *mut libc::c_void) {
    if put == libc::MAP_FAILED {
        lost::end_of_a_place(&io::Error::last_os_error());
    }
}

/// Anonymous memory that nobody has ever accessed, to put in the place of parts of regions.
///
/// What is put there joins neighbours of the same kind: a range that touches such a one takes no mapping of its own. It
/// would be taken for another kind for good if it were accessed before all advice was given, so that is given here.
#[derive(Debug)]
pub struct Blank {
    /// Of [`Blank::LEN`] bytes, between two pages that keep it from joining whatever else lies beside it.
    addr: NonNull<u8>,
}

// SAFETY: the mapping is not accessed through this type, and any thread may copy it to other places, or unmap it.
unsafe impl Send for Blank {}

impl Blank {
    /// How much there is, in bytes: as much of a region as is replaced at a time.
    const LEN: usize = 64 << 20;
    const GUARD: usize = PAGE_SIZE as usize;

    /// Reserves addresses for it. It takes no memory.
    pub fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), Self::LEN + 2 * Self::GUARD, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let blank = Blank { addr: not_null(start.cast::<u8>().wrapping_add(Self::GUARD).cast())? };
        let all = Part { addr: blank.addr.as_ptr(), len: Self::LEN };
        // SAFETY: the range lies within the mapping just made, which nothing refers to.
        if unsafe { libc::mprotect(all.addr.cast(), all.len, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if let Err(e) = PRIVACY.into_iter().try_for_each(|advice| all.advise(advice)) {
            tracing::debug!("pages that the guest gave back may appear in core dumps: {e}");
        }
        // A huge page would take 2 MiB as soon as one of its pages is used again. Refused by kernels that have none.
        let _ = all.advise(libc::MADV_NOHUGEPAGE);
        Ok(blank)
    }

    /// Puts anonymous memory, which reads as zeros, in the place of part of a region: `range` in bytes from its start,
    /// whole pages. Others may access the region meanwhile; they find what was there before, or zeros.
    pub fn put(&self, region: &MmapRegion, range: Range<u64>) -> io::Result<()> {
        let part = Part::of(region, range)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        for offset in (0..part.len).step_by(Self::LEN) {
            let (to, len) = (part.addr.wrapping_add(offset), Self::LEN.min(part.len - offset));
            // SAFETY: what moves are empty pages of a mapping that nothing refers to, and MREMAP_DONTUNMAP leaves such a
            // mapping behind. `Part::of` has checked that the range lies within the region's own mapping, so nothing else
            // is unmapped; the new mapping has the same protection, so every pointer into the region stays valid, and
            // `replaced` does not return if the place may have become somebody else's; page faults on the range wait until
            // it is complete; the bytes are volatile guest memory that no Rust reference points to.
            replaced(unsafe { libc::mremap(self.addr.as_ptr().cast(), len, len, flags, to) });
        }
        Ok(())
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        let start = self.addr.as_ptr().wrapping_sub(Self::GUARD);
        // SAFETY: the mapping with its two pages, which this value owns alone, is unmapped once.
        unsafe { libc::munmap(start.cast(), Self::LEN + 2 * Self::GUARD) };
    }
}

/// Drops what part of a region holds of its own: anonymous memory reads as zeros then, a private view as what lies under it.
pub fn empty(region: &MmapRegion, range: Range<u64>) -> io::Result<()> {
    Part::of(region, range)?.advise(libc::MADV_DONTNEED)
}

/// Puts a mapping in a region's place that cannot be accessed. For the end of a guest: whoever accesses the region later
/// dies of it.
pub fn cut_off(region: &MmapRegion) {
    put_nothing(region, libc::PROT_NONE);
}

/// Puts memory of zeros in a region's place. For the end of a guest that never ran: whoever accesses the region later finds zeros.
pub fn blank(region: &MmapRegion) {
    put_nothing(region, libc::PROT_READ | libc::PROT_WRITE);
}

fn put_nothing(region: &MmapRegion, protection: libc::c_int) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: MAP_FIXED replaces exactly the region's own mapping, so nothing else is unmapped, and the address stays
    // the region's to unmap: `replaced` does not return if it may have become somebody else's. The bytes were volatile
    // guest memory that no Rust reference points to.
    replaced(unsafe { libc::mmap(region.as_ptr().cast(), region.size(), protection, flags, -1, 0) });
}

/// Puts a private mapping of part of `file`, from `offset` on, in the place of part of a region: `range` in bytes from its start,
/// whole pages. Others may access the region meanwhile; they find what was there before, or what is in the file.
pub fn map_over(region: &MmapRegion, range: Range<u64>, file: &File, offset: u64) -> io::Result<()> {
    let part = Part::of(region, range)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: `Part::of` has checked that the range lies within the region's own mapping, so nothing else is unmapped. MAP_FIXED
    // replaces it in one step by a mapping with the same protection, so every pointer into the region stays valid, and `replaced`
    // does not return if the place may have become somebody else's; the bytes are volatile guest memory that no Rust reference
    // points to.
    replaced(unsafe {
        libc::mmap(part.addr.cast(), part.len, protection, flags, file.as_raw_fd(), offset as libc::off_t)
    });
    PRIVACY.into_iter().try_for_each(|advice| part.advise(advice))
}

/// A mapping that was moved aside: nothing refers to it any more, and it is waiting to be unmapped.
#[derive(Debug)]
pub struct Aside {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is not accessed through this type, only unmapped, which any thread may do.
unsafe impl Send for Aside {}

/// How much of a mapping is unmapped at a time, in bytes: short enough that a page fault of the running guest never
/// waits long for the address-space lock.
const UNMAP_SLICE: usize = 4 << 20;

impl Drop for Aside {
    fn drop(&mut self) {
        for offset in (0..self.len).step_by(UNMAP_SLICE) {
            let slice = UNMAP_SLICE.min(self.len - offset);
            // SAFETY: `addr..addr + len` is a mapping that this value owns alone, and each slice is unmapped once.
            unsafe { libc::munmap(self.addr.as_ptr().add(offset).cast(), slice) };
        }
    }
}

/// Replaces a region's shared mapping of `file` by a private one of the same bytes, at the same address.
///
/// The pages' mappings move aside with the old mapping instead of being torn down here, which is what makes this quick.
/// Nobody may access the region meanwhile: in between it is still the shared mapping, only not yet populated, so an access
/// would not be undefined, but a write would go to the file.
///
/// If this fails, the region is the shared mapping that it was.
pub fn make_private(region: &MmapRegion, file: &File, offset: u64) -> io::Result<Aside> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // To a place that lies in the same way: the kernel then moves whole tables of 512 pages, not page by page.
    let aside = Aside { addr: place::reserve(region.size(), region.as_ptr() as u64)?, len: region.size() };
    let to = aside.addr.as_ptr();
    // SAFETY: the range is the region's own mapping. MREMAP_DONTUNMAP leaves a mapping of the same file at the old
    // address, so the region stays valid; what it moves to was just reserved for it, and nothing else refers to that.
    let moved = unsafe { libc::mremap(region.as_ptr().cast(), region.size(), region.size(), flags, to) };
    if moved == libc::MAP_FAILED {
        let failed = io::Error::last_os_error();
        // The kernel may have let the place go, and given it to somebody else. It takes no memory.
        std::mem::forget(aside);
        return Err(failed);
    }
    // SAFETY: MAP_FIXED replaces exactly the region's own mapping, atomically, with one of the same length and
    // protection, so every pointer into the region stays valid, and `replaced` does not return if the place may have become
    // somebody else's; the bytes there are volatile guest memory that no Rust reference points to.
    replaced(unsafe {
        libc::mmap(
            region.as_ptr().cast(),
            region.size(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    });
    // The new mapping stands; advice that is refused costs privacy of core dumps, not the freeze.
    if let Err(e) = keep_private(region) {
        tracing::warn!("guest RAM may appear in core dumps: {e}");
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;
    use std::sync::Arc;

    /// Has the kernel refuse what is named, which must be the end of this process.
    fn have_refused(what: &str) {
        let memory = File::from(rustix::fs::memfd_create("coppice-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(4 * PAGE_SIZE).unwrap();
        let place = FileOffset::new(memory, 0);
        let mapping = Mapping::new(place, 4 * PAGE_SIZE as usize, libc::MAP_SHARED).unwrap();
        let unreadable = || {
            let mut options = File::options();
            options.write(true).custom_flags(libc::O_TMPFILE).open(std::env::temp_dir()).unwrap()
        };
        // Nothing can be mapped then, not even in the place of something.
        let no_addresses = || {
            use rustix::process::{Resource, Rlimit, setrlimit};
            setrlimit(Resource::As, Rlimit { current: Some(PAGE_SIZE), maximum: Some(PAGE_SIZE) }).unwrap();
        };
        match what {
            "map_over" => map_over(mapping.region(), 0..PAGE_SIZE, &unreadable(), 0).unwrap(),
            "make_private" => drop(make_private(mapping.region(), &unreadable(), 0)),
            "cut_off" => {
                no_addresses();
                cut_off(mapping.region());
            }
            "put" => {
                let blank = Blank::new().unwrap();
                no_addresses();
                blank.put(mapping.region(), 0..PAGE_SIZE).unwrap();
            }
            other => panic!("{other}"),
        }
    }

    /// Else a mapping of somebody else could lie there next, open to the guest, and be unmapped with the region.
    #[test]
    fn a_place_that_the_kernel_may_have_given_away_is_the_end_of_the_process() {
        const CASE: &str = "COPPICE_TEST_REFUSED";
        if let Ok(case) = std::env::var(CASE) {
            return have_refused(&case);
        }
        for case in ["map_over", "make_private", "cut_off", "put"] {
            let name = "memory::mmap::tests::a_place_that_the_kernel_may_have_given_away_is_the_end_of_the_process";
            let mut test = Command::new(std::env::current_exe().unwrap());
            let done = test.args(["--exact", name, "--nocapture"]).env(CASE, case).output().unwrap();
            let words = String::from_utf8_lossy(&done.stderr);
            assert!(words.contains("guest memory cannot be remapped"), "{case}: {done:?}");
            assert_eq!(done.status.code(), Some(1), "{case}: {done:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_mapping_lies_where_huge_pages_of_its_file_can_be_mapped(first in 0..1500u64, pages in 1..1500u64) {
            let file = File::from(rustix::fs::memfd_create("coppice-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            file.set_len((first + pages) * PAGE_SIZE).unwrap();
            let place = FileOffset::from_arc(Arc::new(file), first * PAGE_SIZE);
            let mapping = Mapping::new(place, (pages * PAGE_SIZE) as usize, libc::MAP_PRIVATE).unwrap();
            prop_assert_eq!(mapping.region().as_ptr() as u64 % place::HUGE_PAGE, first * PAGE_SIZE % place::HUGE_PAGE);
            prop_assert_eq!(mapping.region().size() as u64, pages * PAGE_SIZE);
            populate(mapping.region(), 0..pages * PAGE_SIZE, Populate::Write).unwrap();
        }
    }
}
