//! The ring-0 stub (`stub.s`), and what it shares with ring 3.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("stub.s"));

/// Most CPUs that the stub has descriptors for.
pub const MAX_CPUS: usize = 8;

/// The LAPIC timer has fired.
pub const TIMER: Causes = Causes(1);
/// COM1 wants to be read.
pub const SERIAL: Causes = Causes(4);
/// The virtio device has news.
pub const VIRTIO: Causes = Causes(8);

/// Interrupt vectors, as in the stub's IDT.
#[derive(Clone, Copy)]
pub enum Vector {
    /// LAPIC timer.
    Timer = 0x20,
    /// Another CPU.
    Ipi = 0x21,
    /// COM1.
    Serial = 0x22,
    /// The virtio device.
    Virtio = 0x23,
    /// The LAPIC changed its mind.
    Spurious = 0x3f,
}

/// Why a CPU has woken up.
#[derive(Clone, Copy)]
pub struct Causes(u32);

impl Causes {
    /// Whether `cause` is among them.
    pub fn contains(self, cause: Causes) -> bool {
        self.0 & cause.0 != 0
    }
}

/// A CPU's ring-0 stack and, where that begins, the word in which interrupts leave their causes. The stub knows these
/// sizes.
#[repr(C)]
struct Ring0 {
    stack: UnsafeCell<[u8; 176]>,
    pending: AtomicU32,
    padding: [u32; 3],
}

// SAFETY: only the stub uses the stack, and only the CPU it belongs to.
unsafe impl Sync for Ring0 {}

impl Ring0 {
    fn take(&self) -> Causes {
        Causes(self.pending.swap(0, Ordering::SeqCst))
    }
}

/// What the stub's `ap_start` label marks: how the next application processor begins in ring 3.
#[repr(C)]
pub struct ApStart {
    frame: [u64; 3],
    stack: AtomicU64,
    data_selector: u64,
    index: AtomicU32,
    tss: AtomicU32,
}

unsafe extern "C" {
    safe static boot_ring0: Ring0;
    safe static ap_ring0: [Ring0; MAX_CPUS];
    safe static ap_start: ApStart;
    static page_directory_pointers: u8;
    static trampoline: u8;
    static trampoline_end: u8;
    static image_end: u8;
    safe fn idle();
}

/// Takes the causes that have come up on the boot CPU since the last call.
pub fn take_pending() -> Causes {
    boot_ring0.take()
}

/// Takes the causes that have come up on application processor `cpu`, which is the caller.
pub fn take_pending_of_ap(cpu: usize) -> Causes {
    ap_ring0[cpu].take()
}

/// Waits until there is a pending cause on this CPU, using no CPU time.
/// May return early; whoever waits looks for work and comes back.
pub fn wait() {
    idle();
}

/// First address after everything that belongs to the guest.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}

/// Address of the table with an entry for each GiB of memory, of which the first four are in use.
pub fn page_directory_pointers_table() -> u64 {
    &raw const page_directory_pointers as u64
}

/// The code by which an application processor comes up, to be copied below 1 MiB.
pub fn trampoline_code() -> &'static [u8] {
    let (start, end) = (&raw const trampoline, &raw const trampoline_end);
    // SAFETY: both labels are in the stub, in this order, and nobody writes to what lies between them.
    unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Says where application processor `index` begins, which must be the only one that comes up now.
pub fn prepare_ap(index: usize, stack_top: u64) {
    const TSS0: u32 = 0x40;
    ap_start.stack.store(stack_top - 8, Ordering::SeqCst);
    ap_start.index.store(index as u32, Ordering::SeqCst);
    ap_start.tss.store(TSS0 + 16 * index as u32, Ordering::SeqCst);
}
