//! What an x86-64 guest finds when it starts: registers, CPUID, and the tables that the Linux boot protocol wants.
//!
//! ```text
//!   0x00500  GDT              0x09000  page tables: the first GiB at its own address
//!   0x07000  zero page        0x20000  command line
//!   0x9f000  generation id (reserved in the memory map)
//!   0x100000 kernel
//! ```
//!
//! The 64-bit entry of the Linux boot protocol: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".

pub mod boot;
pub mod cpuid;
pub mod regs;

/// Where the GDT of the boot vCPU lies.
pub const GDT: u64 = 0x500;
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
