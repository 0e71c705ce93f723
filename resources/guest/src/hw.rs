//! Registers: ports, memory-mapped device registers, and a few instructions that have no name in Rust.

use core::arch::{asm, x86_64};

/// Reads a port that the stub's I/O bitmap opens to ring 3.
pub fn port_read(port: u16) -> u8 {
    let value;
    // SAFETY: reading a port changes no memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a port that the stub's I/O bitmap opens to ring 3.
pub fn port_write(port: u16, value: u8) {
    // SAFETY: neither device behind those ports (COM1, i8042) reads or writes memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a device register.
///
/// # Safety
/// `address` is a device's 32-bit register.
pub unsafe fn mmio_read(address: u64) -> u32 {
    let value;
    // SAFETY: the first 4 GiB are mapped, and the caller vouches for the address. A plain `mov` is what every
    // instruction emulator understands.
    unsafe { asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// Writes a device register.
///
/// # Safety
/// `address` is a device's 32-bit register, and what the write makes the device do to memory is intended.
pub unsafe fn mmio_write(address: u64, value: u32) {
    // SAFETY: as in `mmio_read`. Memory is not declared untouched, so earlier writes reach it first.
    unsafe { asm!("mov dword ptr [{}], {:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) };
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has it, and the stub does not set CR4.TSD.
    unsafe { x86_64::_rdtsc() }
}

/// Lets a sibling run while this CPU spins.
pub fn relax() {
    core::hint::spin_loop();
}

/// 32 bytes from the processor's random generator, if it has one, and the time-stamp counter.
#[cold]
pub fn random_seed() -> [u8; 32] {
    const RDRAND: u32 = 1 << 30;
    // SAFETY: every 64-bit processor has the instruction. (Newer compilers do not ask for `unsafe` here.)
    #[allow(unused_unsafe)]
    let has_rdrand = unsafe { x86_64::__cpuid(1) }.ecx & RDRAND != 0;
    let mut seed = [0; 32];
    for chunk in seed.chunks_exact_mut(8) {
        let word = if has_rdrand { rdrand() } else { 0 } ^ tsc();
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    seed
}

/// A random word, or 0 if the processor gives none in ten attempts.
fn rdrand() -> u64 {
    for _ in 0..10 {
        let (word, done): (u64, u8);
        // SAFETY: the caller has asked CPUID for the instruction.
        unsafe { asm!("rdrand {}", "setc {}", out(reg) word, out(reg_byte) done, options(nomem, nostack)) };
        if done != 0 {
            return word;
        }
    }
    0
}

/// Asks the i8042 controller to reset the machine, and waits for that.
pub fn reset() -> ! {
    const CONTROLLER: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    port_write(CONTROLLER, PULSE_RESET);
    loop {
        crate::stub::wait();
    }
}
