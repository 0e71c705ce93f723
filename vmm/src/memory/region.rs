//! A region of guest memory as vm-memory sees it: a mapping of our own, at a guest address.

use super::mmap::Mapping;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress, MmapRegion,
    VolatileMemory, VolatileSlice, guest_memory,
};

/// A region of guest memory.
#[derive(Debug)]
pub struct RamRegion {
    mapping: Mapping,
    guest_addr: GuestAddress,
}

impl RamRegion {
    /// Puts a mapping at a guest address; `None` if it would reach beyond all addresses.
    pub fn new(mapping: Mapping, guest_addr: GuestAddress) -> Option<Self> {
        guest_addr.0.checked_add(mapping.region().size() as u64)?;
        Some(RamRegion { mapping, guest_addr })
    }

    /// Its mapping.
    pub fn mapping(&self) -> &MmapRegion {
        self.mapping.region()
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping().size() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        self.guest_addr
    }

    fn bitmap(&self) {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        let addr = self.check_address(addr).ok_or(guest_memory::Error::InvalidBackendAddress)?;
        Ok(self.mapping().as_ptr().wrapping_add(addr.0 as usize))
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> guest_memory::Result<VolatileSlice<'_, ()>> {
        Ok(self.mapping().get_slice(offset.0 as usize, count)?)
    }
}

impl GuestMemoryRegionBytes for RamRegion {}
