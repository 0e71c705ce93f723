//! A region of guest memory as vm-memory sees it: a mapping of our own, at a guest address.
// UNSAFETY: one slice that is made of a pointer; see `get_slice`.
#![allow(unsafe_code)]

use super::mmap::Mapping;
use super::written::WriteLog;
use std::ops::Range;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress, MmapRegion,
    VolatileMemory, VolatileSlice, guest_memory,
};

/// A region of guest memory.
#[derive(Debug)]
pub struct RamRegion {
    mapping: Mapping,
    guest_addr: GuestAddress,
    written: WriteLog,
}

impl RamRegion {
    /// Puts a mapping at a guest address; `None` if it would reach beyond all addresses.
    pub fn new(mapping: Mapping, guest_addr: GuestAddress) -> Option<Self> {
        let bytes = mapping.region().size() as u64;
        guest_addr.0.checked_add(bytes)?;
        Some(RamRegion { mapping, guest_addr, written: WriteLog::new(bytes) })
    }

    /// Its mapping.
    pub fn mapping(&self) -> &MmapRegion {
        self.mapping.region()
    }

    /// The log of what this process writes to it.
    pub fn written(&self) -> &WriteLog {
        &self.written
    }

    /// Part of it, in bytes from its start. What is written there is not logged.
    pub fn unlogged(&self, bytes: Range<u64>) -> guest_memory::Result<VolatileSlice<'_>> {
        Ok(self.mapping().get_slice(bytes.start as usize, (bytes.end - bytes.start) as usize)?)
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = WriteLog;

    fn len(&self) -> GuestUsize {
        self.mapping().size() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        self.guest_addr
    }

    fn bitmap(&self) -> BS<'_, WriteLog> {
        self.written.slice_at(0)
    }

    /// Whoever writes there has to log it: nobody does yet.
    fn get_host_address(&self, addr: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        let addr = self.check_address(addr).ok_or(guest_memory::Error::InvalidBackendAddress)?;
        Ok(self.mapping().as_ptr().wrapping_add(addr.0 as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, WriteLog>>> {
        let offset = offset.0 as usize;
        let plain = self.mapping().get_slice(offset, count)?;
        let addr = plain.ptr_guard_mut().as_ptr();
        // SAFETY: `addr` and `count` are those of a slice of the mapping, which was checked to lie within it, and which
        // borrows `self` for as long as the new one does. Guest memory is accessed by nothing but volatile accesses.
        Ok(unsafe { VolatileSlice::with_bitmap(addr, count, self.written.slice_at(offset), None) })
    }
}

impl GuestMemoryRegionBytes for RamRegion {}
