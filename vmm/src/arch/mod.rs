//! What an x86-64 guest finds when it starts: registers, CPUID, and the tables that the Linux boot protocol wants.
//!
//! ```text
//!   0x00500  GDT              0x09000  page tables: the first GiB at its own address
//!   0x06000  PVH start info   0x20000  command line
//!   0x07000  zero page
//!   0x9f000  from here on reserved in the memory map: generation id
//!   0xe0000  ACPI tables      0xffff0  reset vector
//!   0x100000 kernel
//! ```
//!
//! The 64-bit entry of the Linux boot protocol: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod msrs;
pub mod regs;

/// Where the GDT of the boot vCPU lies.
pub const GDT: u64 = 0x500;
/// Where the PVH start info, its module list and its memory map lie: one page.
pub const START_INFO: u64 = 0x6000;
/// Where the zero page (`struct boot_params`) lies.
pub const ZERO_PAGE: u64 = 0x7000;
/// Where the boot page tables lie: three pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the kernel command line lies.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line, in bytes, its terminator included.
pub const COMMAND_LINE_MAX: usize = 4096;
/// Where high memory begins, and kernels are loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Where the ACPI tables lie, the RSDP first: where firmware of old would put them, and kernels look for them.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where a kernel jumps in real mode to have firmware restart the machine: the end of the first MiB, less 16 bytes.
///
/// Linux does that on a hardware-reduced ACPI platform without EFI, although there is a reset register, unless its command
/// line says `reboot=a` or `reboot=k`.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Code for there: `mov al, 0xfe; out 0x64, al; hlt; jmp` back to `hlt`. The i8042 then resets the machine.
pub const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// Where each vCPU finds its local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where the IOAPIC lies.
pub const IO_APIC: u32 = 0xfec0_0000;
