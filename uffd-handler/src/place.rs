//! Addresses for mappings: where the kernel can map huge pages of what is behind them.

// UNSAFETY: addresses are reserved by mapping memory that cannot be accessed, what is too much of it is unmapped, and the rest is
// mapped over.
#![allow(unsafe_code)]

use crate::region::PAGE_SIZE;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// Size of a huge page, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Reserves `len` addresses (not zero) for a mapping that is to replace them: the first has the same remainder by
/// [`HUGE_PAGE`] as `offset`, which is that of the mapping in its file. They take no memory, and belong to the caller.
pub fn reserve(len: usize, offset: u64) -> io::Result<NonNull<u8>> {
    let too_long = || io::Error::from_raw_os_error(libc::ENOMEM);
    let len = len.checked_next_multiple_of(PAGE_SIZE as usize).ok_or_else(too_long)?;
    let whole = len.checked_add(HUGE_PAGE as usize).ok_or_else(too_long)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
    let start = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (start, lead) = (start.cast::<u8>(), lead(start as u64, offset) as usize);
    let addr = start.wrapping_add(lead);
    for (from, len) in [(start, lead), (addr.wrapping_add(len), whole - lead - len)] {
        if len > 0 {
            // SAFETY: an end of the range that was just reserved, which nothing refers to, is unmapped once: `lead` is less
            // than the 2 MiB that were added to `len`.
            unsafe { libc::munmap(from.cast(), len) };
        }
    }
    NonNull::new(addr).ok_or_else(|| io::Error::other("the kernel gave out address null"))
}

/// Maps `len` bytes (not zero) at such a place: of a file, from an offset on, or of no file, as from its start. `flags` and
/// `protection` are those of mmap(2). The mapping belongs to the caller.
pub fn map(
    file: Option<(BorrowedFd, u64)>,
    len: usize,
    protection: libc::c_int,
    flags: libc::c_int,
) -> io::Result<NonNull<u8>> {
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    let place = reserve(len, offset)?;
    let flags = flags | libc::MAP_FIXED;
    // SAFETY: MAP_FIXED replaces addresses that were just reserved for this, and that nothing else refers to.
    let mapped = unsafe { libc::mmap(place.as_ptr().cast(), len, protection, flags, fd, offset as libc::off_t) };
    if mapped == libc::MAP_FAILED {
        // The addresses are left alone: the kernel may have let them go, and given them to somebody else. They take no memory.
        return Err(io::Error::last_os_error());
    }
    Ok(place)
}

/// How many bytes after `start` the first address lies that has the same remainder by [`HUGE_PAGE`] as `offset`.
fn lead(start: u64, offset: u64) -> u64 {
    offset.wrapping_sub(start) % HUGE_PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_lead_is_short_and_leads_to_the_same_remainder(start in 0..1u64 << 47, offset in 0..1u64 << 40) {
            let lead = lead(start, offset);
            prop_assert!(lead < HUGE_PAGE);
            prop_assert_eq!((start + lead) % HUGE_PAGE, offset % HUGE_PAGE);
        }
    }
}
