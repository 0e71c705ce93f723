//! Memory slots: which of this process's memory the guest sees, and what KVM logs of it.
// UNSAFETY: a memory slot gives the guest access to whatever is mapped at an address.
#![allow(unsafe_code)]

use crate::memory::bits::Bits;
use crate::memory::{GuestRam, PAGE_SIZE};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use std::cell::Cell;
use std::io;
use vm_memory::MmapRegion;

/// Number of the slot that moves: beyond those of RAM.
const MOVING: u32 = 16;
/// Where it moves: beyond what CPUs can address.
const NOWHERE: u64 = 1 << 51;

/// Gives a VM its RAM: one slot a region, numbered from 0.
pub fn set(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    set_with(vm, ram, 0)
}

/// Has KVM log which pages of RAM are written by vCPUs, and by itself on their behalf.
pub fn keep_log(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    set_with(vm, ram, KVM_MEM_LOG_DIRTY_PAGES)
}

/// Takes the pages that were written since the last time out of KVM's log, and adds them to those of each region.
pub fn take_log(vm: &VmFd, ram: &GuestRam, pages: &mut [Bits]) -> Result<(), kvm_ioctls::Error> {
    for ((slot, region), pages) in ram.regions().iter().enumerate().zip(pages) {
        let words = vm.get_dirty_log(slot as u32, region.size_bytes as usize)?;
        words.iter().enumerate().filter(|(_, word)| **word != 0).for_each(|(n, word)| pages.insert_word(n, *word));
    }
    Ok(())
}

fn set_with(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), kvm_ioctls::Error> {
    for (slot, (region, addr)) in ram.mappings().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: region.guest_addr,
            memory_size: region.size_bytes,
            userspace_addr: addr as u64,
        };
        // SAFETY: the range is exactly a mapping that holds guest memory and nothing else. KVM takes its own reference
        // to the address space, not to the mapping: should the mapping go first, guest accesses fail, and no other
        // memory of this process can appear in the guest because the machine keeps RAM until the VM is gone.
        unsafe { vm.set_user_memory_region(slot)? };
    }
    Ok(())
}

/// A page in a slot that moves while no vCPU runs, at addresses that no guest has: as it moves, KVM forgets all that it has
/// derived from the guest's page tables.
#[derive(Debug)]
pub struct MovingSlot {
    page: MmapRegion,
    /// It is at the second of its two places.
    is_second: Cell<bool>,
}

impl MovingSlot {
    /// Makes the page, and the slot.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        let page = MmapRegion::new(PAGE_SIZE as usize).map_err(io::Error::other)?;
        let slot = MovingSlot { page, is_second: Cell::new(false) };
        slot.set(vm).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(slot)
    }

    /// Moves the slot to its other place. No vCPU may run.
    pub fn move_on(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.is_second.set(!self.is_second.get());
        self.set(vm)
    }

    fn set(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let slot = kvm_userspace_memory_region {
            slot: MOVING,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: NOWHERE + PAGE_SIZE * u64::from(self.is_second.get()),
            memory_size: PAGE_SIZE,
            userspace_addr: self.page.as_ptr() as u64,
        };
        // SAFETY: the page is a mapping of its own that holds nothing, and is kept as long as the machine, which has no
        // vCPU any more when it goes, or else leaves the page there. A guest that could reach it all the same could read zeros there.
        unsafe { vm.set_user_memory_region(slot) }
    }
}
