//! Which guest-physical addresses are what. Pure arithmetic.
//!
//! ```text
//!          0  RAM: boot data below 640 KiB (see `arch`), kernels from 1 MiB
//!      3 GiB  nothing: virtio-mmio devices from 0xd000_0000, IOAPIC, local APIC
//!      4 GiB  the rest of RAM
//! ```

use snapshot::manifest::MemoryRegion;

/// Where the hole for devices begins.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on after the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Where the first virtio-mmio device lies.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Distance between two virtio-mmio devices.
pub const MMIO_STRIDE: u64 = 0x1000;
/// GSI of the first virtio-mmio device.
pub const MMIO_GSI: u32 = 5;
/// GSI of the event device: the last pin of the IOAPIC, so that virtio-mmio devices have all before it.
pub const EVENT_GSI: u32 = 23;
/// Most virtio-mmio devices.
pub const MAX_VIRTIO: u32 = EVENT_GSI - MMIO_GSI;
/// The page that holds the generation id (16 bytes at its start), reserved in the guest's memory map.
pub const GENERATION_PAGE: u64 = 0x9_f000;
/// Least RAM that a guest may have, in MiB.
pub const MIN_MIB: u64 = 8;
/// Most RAM that a guest may have, in MiB.
pub const MAX_MIB: u64 = 1 << 20;

/// The regions of a guest with `size` bytes of RAM: one below the hole, and one above it if it does not suffice.
pub fn ram_regions(size: u64) -> Vec<MemoryRegion> {
    let low = size.min(HOLE_START);
    let mut regions = vec![MemoryRegion { guest_addr: 0, size_bytes: low, offset: 0 }];
    if size > low {
        regions.push(MemoryRegion { guest_addr: HOLE_END, size_bytes: size - low, offset: low });
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn regions_cover_ram_once_and_spare_the_hole(mib in 1u64..10_000) {
            let regions = ram_regions(mib << 20);
            prop_assert_eq!(regions.iter().map(|r| r.size_bytes).sum::<u64>(), mib << 20);
            let mut offset = 0;
            for r in &regions {
                prop_assert_eq!(r.offset, offset);
                prop_assert!(r.guest_addr + r.size_bytes <= HOLE_START || r.guest_addr >= HOLE_END);
                offset += r.size_bytes;
            }
        }
    }
}
