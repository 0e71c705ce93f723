//! The other CPUs: bringing them up, and the one job that they do.
//!
//! A job is a word in memory and an interrupt that says "look". There is one word per CPU, so nothing needs a lock.

use crate::runtime::Cold;
use crate::stub::{self, MAX_CPUS};
use crate::{apic, hw};
use api_spec::agent::Refusal;
use api_spec::agent::burn::Burn;
use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where CPUs begin in real mode: a page that neither boot protocol's data uses.
const TRAMPOLINE: u64 = 0x1_0000;
/// Time-stamp counter ticks to wait for a CPU; a tenth of a second or more on any machine.
const PATIENCE: u64 = 1 << 29;

/// States of a [`Mailbox`].
mod state {
    /// Not started.
    pub const DOWN: u32 = 0;
    /// Waiting for a job.
    pub const READY: u32 = 1;
    /// Burning, or about to.
    pub const BURN: u32 = 2;
    /// Told to stop burning.
    pub const STOP: u32 = 3;
}

/// What the boot CPU and another one tell each other.
struct Mailbox {
    state: AtomicU32,
    steps: AtomicU64,
    integer: AtomicU64,
    float: AtomicU64,
}

static MAILBOXES: [Mailbox; MAX_CPUS] = [const {
    Mailbox {
        state: AtomicU32::new(state::DOWN),
        steps: AtomicU64::new(0),
        integer: AtomicU64::new(0),
        float: AtomicU64::new(0),
    }
}; MAX_CPUS];

#[repr(C, align(16))]
struct Stack([u8; 4096]);

static STACKS: [Cold<Stack>; MAX_CPUS] = [const { Cold::new(Stack([0; 4096])) }; MAX_CPUS];

/// The CPUs that are up.
pub struct Cpus {
    up: [bool; MAX_CPUS],
}

impl Cpus {
    /// Brings up the CPUs with APIC ids 1 to `count` - 1. One that does not come up is left out.
    #[cold]
    pub fn bring_up(count: u32) -> Self {
        let mut up = [false; MAX_CPUS];
        up[0] = true;
        if count > 1 {
            let code = stub::trampoline_code();
            // SAFETY: RAM below 1 MiB that nothing in this program refers to, with room for the code.
            unsafe {
                let place = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE as usize);
                place.copy_from_nonoverlapping(code.as_ptr(), code.len());
            }
        }
        for index in 1..MAX_CPUS.min(count as usize) {
            let stack = core::ptr::from_mut(STACKS[index].take()).addr() + size_of::<Stack>();
            stub::prepare_ap(index, stack as u64);
            apic::init(index as u8);
            apic::start(index as u8, (TRAMPOLINE >> 12) as u8);
            up[index] = wait_for(&MAILBOXES[index], state::READY);
            if !up[index] {
                break; // it may still be on its way, so the next one cannot be prepared
            }
        }
        Cpus { up }
    }

    /// How many there are.
    pub fn count(&self) -> u8 {
        self.up.iter().filter(|up| **up).count() as u8
    }

    /// Sets a CPU to burn.
    pub fn burn_start(&self, cpu: u8) -> Result<(), Refusal> {
        let mailbox = self.other(cpu)?;
        mailbox
            .state
            .compare_exchange(state::READY, state::BURN, Ordering::AcqRel, Ordering::Acquire)
            .map_err(|_| Refusal::WrongState)?;
        apic::interrupt(cpu);
        Ok(())
    }

    /// Stops it.
    pub fn burn_stop(&self, cpu: u8) -> Result<Burn, Refusal> {
        let mailbox = self.other(cpu)?;
        mailbox
            .state
            .compare_exchange(state::BURN, state::STOP, Ordering::AcqRel, Ordering::Acquire)
            .map_err(|_| Refusal::WrongState)?;
        // Without a bound: it runs, or its vCPU stands still and the answer has to wait for it.
        while mailbox.state.load(Ordering::Acquire) != state::READY {
            hw::relax();
        }
        Ok(Burn {
            steps: mailbox.steps.load(Ordering::Relaxed),
            integer: mailbox.integer.load(Ordering::Relaxed),
            float: mailbox.float.load(Ordering::Relaxed),
        })
    }

    fn other(&self, cpu: u8) -> Result<&'static Mailbox, Refusal> {
        match self.up.get(usize::from(cpu)) {
            Some(true) if cpu != 0 => Ok(&MAILBOXES[usize::from(cpu)]),
            _ => Err(Refusal::NoSuchVcpu),
        }
    }
}

fn wait_for(mailbox: &Mailbox, state: u32) -> bool {
    let start = hw::tsc();
    while mailbox.state.load(Ordering::Acquire) != state {
        if hw::tsc().wrapping_sub(start) > PATIENCE {
            return false;
        }
        hw::relax();
    }
    true
}

/// Where the stub arrives in ring 3 on another CPU.
#[unsafe(no_mangle)]
extern "C" fn ap_main(index: u64) -> ! {
    let cpu = index as usize;
    let mailbox = &MAILBOXES[cpu];
    apic::enable();
    mailbox.state.store(state::READY, Ordering::Release);
    loop {
        stub::take_pending_of_ap(cpu);
        // A job may have been stopped before it was seen; it still wants a result.
        if matches!(mailbox.state.load(Ordering::Acquire), state::BURN | state::STOP) {
            let burn = burn(u64::MAX, &mailbox.state);
            mailbox.steps.store(burn.steps, Ordering::Relaxed);
            mailbox.integer.store(burn.integer, Ordering::Relaxed);
            mailbox.float.store(burn.float, Ordering::Relaxed);
            mailbox.state.store(state::READY, Ordering::Release);
        }
        stub::wait();
    }
}

/// Burns so many steps on this CPU.
pub fn burn_steps(steps: u64) -> Burn {
    burn(steps, &AtomicU32::new(state::BURN))
}

/// Burns until `limit` steps are done or `state` changes. In assembly, so that the integer is in a general register
/// and the float in a vector register from the first step to the last: that they survive is the point.
fn burn(limit: u64, state: &AtomicU32) -> Burn {
    let mut steps = 0u64;
    let mut integer = 0u64;
    let mut float = 0f64;
    // SAFETY: the loop writes registers only, and reads the word behind `state`.
    unsafe {
        asm!(
            "2:",
            "cmp {steps}, {limit}",
            "je 3f",
            "cmp dword ptr [{state}], {burn}",
            "jne 3f",
            "imul {integer}, {multiplier}",
            "add {integer}, {increment}",
            "addsd {float}, {one}",
            "inc {steps}",
            "jmp 2b",
            "3:",
            steps = inout(reg) steps,
            limit = in(reg) limit,
            state = in(reg) state.as_ptr(),
            burn = const state::BURN,
            integer = inout(reg) integer,
            multiplier = in(reg) MULTIPLIER,
            increment = in(reg) INCREMENT,
            float = inout(xmm_reg) float,
            one = in(xmm_reg) 1f64,
            options(nostack, readonly),
        );
    }
    Burn { steps, integer, float: float.to_bits() }
}

/// The generator that `Burn::next_integer` steps, taken from it: x -> a x + c.
const INCREMENT: u64 = Burn::next_integer(0);
const MULTIPLIER: u64 = Burn::next_integer(1).wrapping_sub(INCREMENT);
