//! What a program needs that has no library below it: memory functions, static buffers, last words.

use crate::hw;
use crate::serial::Port;
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

// The compiler calls these by name. String instructions are short and quick enough; written in assembly because the
// compiler would turn loops in Rust into calls of themselves.
global_asm!(
    ".text",
    ".globl memcpy, memmove, memset, memcmp, bcmp",
    "memmove:",
    "mov rax, rdi",
    "sub rax, rsi",
    "cmp rax, rdx",
    "jb 2f", // the destination begins inside the source: backwards
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    "2:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "lea rdi, [rdi + rdx - 1]",
    "lea rsi, [rsi + rdx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    "memcmp:",
    "bcmp:",
    "xor eax, eax",
    "mov rcx, rdx",
    "cmp eax, eax", // nothing is equal to nothing
    "repe cmpsb",
    "je 3f",
    "movzx eax, byte ptr [rdi - 1]",
    "movzx ecx, byte ptr [rsi - 1]",
    "sub ecx, eax",
    "mov eax, ecx",
    "3:",
    "ret",
);

/// A static buffer that is handed out once.
pub struct Cold<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through `take` alone, which gives it to one caller.
unsafe impl<T: Send> Sync for Cold<T> {}

impl<T> Cold<T> {
    /// A buffer that nobody has yet.
    pub const fn new(value: T) -> Self {
        Cold { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// The buffer. Panics when called again, which is why a shared reference is enough.
    #[allow(clippy::mut_from_ref)]
    pub fn take(&'static self) -> &'static mut T {
        assert!(!self.taken.swap(true, Ordering::AcqRel));
        // SAFETY: the flag makes this the only reference that is ever made.
        unsafe { &mut *self.value.get() }
    }
}

/// Says on COM1 where the program panicked, and resets the machine. Formatting the message would double the program.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let port = Port::for_last_words();
    port.write(b"guest panic");
    if let Some(place) = info.location() {
        port.write(b" at ");
        port.write(place.file().as_bytes());
        port.write(b" line ");
        port.write(&hex(place.line().into()));
    }
    port.write(b"\r\n");
    hw::reset()
}

/// Where the stub goes, in ring 3, for an exception that it does not expect.
#[unsafe(no_mangle)]
extern "C" fn report_fault(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    let port = Port::for_last_words();
    for (name, value) in [("guest fault: vector ", vector), (" error ", error), (" rip ", rip), (" cr2 ", cr2)] {
        port.write(name.as_bytes());
        port.write(&hex(value));
    }
    port.write(b"\r\n");
    hw::reset()
}

/// A number as 0x and 16 digits.
fn hex(value: u64) -> [u8; 18] {
    let mut text = *b"0x0000000000000000";
    for (index, digit) in text[2..].iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(value >> (60 - 4 * index)) as usize & 15];
    }
    text
}
