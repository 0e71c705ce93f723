//! Interrupt controllers: this CPU's LAPIC in xAPIC mode, and the IOAPIC. Both are mapped, so ring 3 drives them.

use crate::hw;
use crate::stub::Vector;

const LAPIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const ERROR_STATUS: u64 = 0x280;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;

const ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const FIXED: u32 = 0x4000;
const BUSY: u32 = 1 << 12;
/// KVM's LAPIC timer counts nanoseconds.
const MILLISECOND: u32 = 1_000_000;

const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_WINDOW: u64 = 0xfec0_0010;
const IOAPIC_INPUTS: u32 = 24;

fn read(register: u64) -> u32 {
    // SAFETY: the LAPIC's page, where a read has no effect on memory.
    unsafe { hw::mmio_read(LAPIC + register) }
}

fn write(register: u64, value: u32) {
    // SAFETY: the LAPIC's page; nothing that is written there makes it touch memory.
    unsafe { hw::mmio_write(LAPIC + register, value) }
}

/// Switches this CPU's LAPIC on, with the timer ready and the legacy interrupt pins off.
#[cold]
pub fn enable() {
    write(SPURIOUS, ENABLED | Vector::Spurious as u32);
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, MASKED);
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(LVT_TIMER, Vector::Timer as u32);
}

/// Has the timer fire once, in a millisecond.
pub fn start_timer() {
    write(TIMER_INITIAL, MILLISECOND);
}

/// Stops the timer. One that has merely run out would fire again when its state is loaded into another machine.
pub fn stop_timer() {
    write(TIMER_INITIAL, 0);
}

/// Routes an input of the IOAPIC to a vector of the boot CPU, edge-triggered.
#[cold]
pub fn route(input: u32, vector: Vector) {
    if input < IOAPIC_INPUTS {
        ioapic_write(0x11 + 2 * input, 0);
        ioapic_write(0x10 + 2 * input, vector as u32);
    }
}

fn ioapic_write(register: u32, value: u32) {
    // SAFETY: the IOAPIC's two registers, which touch no memory.
    unsafe {
        hw::mmio_write(IOAPIC_SELECT, register);
        hw::mmio_write(IOAPIC_WINDOW, value);
    }
}

/// Interrupts another CPU.
pub fn interrupt(apic_id: u8) {
    command(apic_id, FIXED | Vector::Ipi as u32);
}

/// Puts another CPU into the state from which [`start`] starts it.
pub fn init(apic_id: u8) {
    command(apic_id, INIT);
}

/// Starts a CPU in real mode at `page`, a page number below 256.
pub fn start(apic_id: u8, page: u8) {
    write(ERROR_STATUS, 0);
    command(apic_id, STARTUP | u32::from(page));
}

fn command(apic_id: u8, what: u32) {
    write(COMMAND_HIGH, u32::from(apic_id) << 24);
    write(COMMAND_LOW, what);
    for _ in 0..1000 {
        if read(COMMAND_LOW) & BUSY == 0 {
            return;
        }
    }
}
