//! What a kernel is told at its entry: the zero page of the Linux boot protocol, or the start info of PVH.

use super::{ACPI_TABLES, COMMAND_LINE, HIGH_MEMORY, START_INFO, ZERO_PAGE};
use crate::memory::GuestMemory;
use crate::memory::layout::GENERATION_PAGE;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use snapshot::manifest::MemoryRegion;
use vm_memory::GuestAddress;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `boot_flag` of every kernel.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A loader without a registered number.
const LOADER_OTHER: u8 = 0xff;
/// What an ELF kernel, which has no header of its own, is aligned to.
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// `magic` of a PVH start info.
const START_MAGIC: u32 = 0x336e_c578;
/// Version of the PVH start info that has a memory map.
const START_VERSION: u32 = 1;
/// Where the list of modules lies in the page of the start info.
const MODULES: u64 = START_INFO + 0x40;
/// Where the memory map lies in the page of the start info.
const MEMORY_MAP: u64 = START_INFO + 0x80;

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// First guest-physical address.
    pub addr: u64,
    /// Size, in bytes.
    pub size: u64,
}

/// A run of guest-physical addresses and what it is: start, length, type.
type E820 = (u64, u64, u32);

/// The memory map that the guest is given.
fn memory_map(regions: &[MemoryRegion]) -> Vec<E820> {
    let mut map = vec![(0, GENERATION_PAGE, E820_RAM), (GENERATION_PAGE, HIGH_MEMORY - GENERATION_PAGE, E820_RESERVED)];
    for region in regions {
        let start = region.guest_addr.max(HIGH_MEMORY);
        map.push((start, region.guest_addr + region.size_bytes - start, E820_RAM));
    }
    map
}

/// Writes the zero page. `header` is the kernel's own (bzImage) or `None` (ELF).
pub fn write_zero_page(
    memory: &GuestMemory,
    regions: &[MemoryRegion],
    header: Option<setup_header>,
    command_line_len: usize,
    initrd: Option<Initrd>,
) -> Result<(), linux_loader::configurator::Error> {
    let mut params = boot_params { hdr: header.unwrap_or_default(), ..Default::default() };
    if header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.acpi_rsdp_addr = ACPI_TABLES;
    params.hdr.cmdline_size = command_line_len as u32;
    if let Some(Initrd { addr, size }) = initrd {
        params.hdr.ramdisk_image = addr as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    let map = memory_map(regions);
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(&map) {
        (entry.addr, entry.size, entry.r#type) = (*addr, *size, *type_);
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), memory)
}

/// Writes the start info of PVH (Xen's `docs/misc/pvh.pandoc`).
pub fn write_start_info(
    memory: &GuestMemory,
    regions: &[MemoryRegion],
    initrd: Option<Initrd>,
) -> Result<(), linux_loader::configurator::Error> {
    let entry = |&(addr, size, type_): &E820| hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
    let map: Vec<_> = memory_map(regions).iter().map(entry).collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|&Initrd { addr, size }| hvm_modlist_entry { paddr: addr, size, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::ram_regions;

    #[test]
    fn the_memory_map_covers_ram_and_hides_the_generation_page() {
        let map = memory_map(&ram_regions(5 << 30));
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "sorted, no overlap: {map:x?}");
        let ram: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1).sum();
        assert_eq!(ram, (5 << 30) - (HIGH_MEMORY - GENERATION_PAGE));
    }
}
