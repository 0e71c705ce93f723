//! Registers and tables of the boot vCPU, interrupts off: long mode with the first GiB mapped at its own address, or, for
//! PVH, protected mode without paging.

use super::{GDT, PAGE_TABLES, START_INFO, ZERO_PAGE};
use crate::memory::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_ALWAYS: u64 = 1 << 1;
/// Page-table entry: present, writable.
const TABLE: u64 = 0x3;
/// Page-table entry: present, writable, a large page.
const LARGE: u64 = 0x83;

/// Flat segments: 32-bit code at 0x8, and, at the selectors that the Linux boot protocol names, 64-bit code at 0x10 and
/// data at 0x18.
const GDT_ENTRIES: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Access byte of a code segment.
const CODE: u8 = 0x9b;
/// Access byte of a data segment.
const DATA: u8 = 0x93;
/// Type of a 32-bit task-state segment that is in use.
const BUSY_TSS: u8 = 0xb;
/// Least limit of such a segment.
const TSS_LIMIT: u32 = 0x67;

/// Where and how a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, by the Linux boot protocol.
    Linux64(u64),
    /// In 32-bit protected mode, by PVH.
    Pvh(u64),
}

/// Why the boot vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// No memory where the tables belong.
    #[error("cannot write boot tables into guest memory: {0}")]
    Tables(#[from] GuestMemoryError),
    /// KVM refused.
    #[error("KVM refused the boot registers: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
}

/// Writes the GDT and the page tables.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let write = |addr: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(addr))
    };
    let (directory_pointers, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let large_pages: Vec<u64> = (0..512).map(|i| (i << 21) | LARGE).collect();
    write(GDT, &GDT_ENTRIES)?;
    write(PAGE_TABLES, &[directory_pointers | TABLE])?;
    write(directory_pointers, &[directory | TABLE])?;
    write(directory, &large_pages)
}

/// Sets the boot vCPU to enter a kernel.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: Entry) -> Result<(), RegsError> {
    let regs = match entry {
        Entry::Linux64(rip) => kvm_regs { rip, rsi: ZERO_PAGE, rflags: RFLAGS_ALWAYS, ..Default::default() },
        Entry::Pvh(rip) => kvm_regs { rip, rbx: START_INFO, rflags: RFLAGS_ALWAYS, ..Default::default() },
    };
    vcpu.set_regs(&regs)?;
    let mut sregs: kvm_sregs = vcpu.get_sregs()?;
    let data = segment(3, DATA, Size::Bits32);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable { base: GDT, limit: (size_of_val(&GDT_ENTRIES) - 1) as u16, ..Default::default() };
    match entry {
        Entry::Linux64(_) => {
            sregs.cs = segment(2, CODE, Size::Bits64);
            sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        Entry::Pvh(_) => {
            sregs.cs = segment(1, CODE, Size::Bits32);
            sregs.tr = kvm_segment { type_: BUSY_TSS, limit: TSS_LIMIT, present: 1, ..Default::default() };
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }
    Ok(vcpu.set_sregs(&sregs)?)
}

/// What code in a segment runs as; data is 32-bit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Bits32,
    Bits64,
}

/// A flat segment: entry number `index` of the GDT, with this access byte.
fn segment(index: u16, access: u8, size: Size) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_: access & 0xf,
        present: 1,
        dpl: 0,
        db: (size == Size::Bits32).into(),
        s: 1,
        l: (size == Size::Bits64).into(),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
