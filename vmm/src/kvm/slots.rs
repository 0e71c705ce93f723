//! Memory slots: which of this process's memory the guest sees.
// UNSAFETY: a memory slot gives the guest access to whatever is mapped at an address.
#![allow(unsafe_code)]

use crate::memory::GuestRam;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// Gives a VM its RAM: one slot a region, numbered from 0.
pub fn set(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    for (slot, (region, addr)) in ram.mappings().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
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
