//! The embedded guest: a machine's worth of work for the vmm's own tests, demo and benchmarks, in a few tens of KiB.
//!
//! Ring 0 is a stub in assembly (`stub.s`): some hosts emulate every ring-0 instruction. It sets up descriptors once,
//! counts no time, handles interrupts in a few instructions and idles. Everything else runs in ring 3, natively,
//! with devices mapped for it and the few ports it needs opened to it.
//!
//! - [`stub`]: the stub, and what it shares with Rust
//! - [`loader`]: what the boot loader left in memory
//! - [`hw`], [`apic`], [`serial`], [`smp`]: registers
//! - [`virtio`], [`socket`]: the way to the host
//! - [`machine`]: the machine as the agent sees it
//! - [`runtime`]: memory functions, panics and faults
//!
//! UNSAFETY: this program is the only thing in its machine; nearly all of its unsafe code is register access. What can
//! do without is in the library beside it.

#![no_std]
#![no_main]

mod apic;
mod hw;
mod loader;
mod machine;
mod runtime;
mod serial;
mod smp;
mod socket;
mod stub;
mod virtio;

use embedded_guest::agent::Agent;
use machine::Hardware;
use serial::Line;
use socket::Socket;

/// Where the stub arrives in ring 3, once: `protocol` says how the machine was booted, `params` points at what the
/// loader left.
#[unsafe(no_mangle)]
extern "C" fn boot_main(protocol: u64, params: u64) -> ! {
    let boot = loader::read(protocol, params);
    apic::enable();
    let machine = Hardware::new(&boot);
    let mut agent = Agent::new(machine, hw::random_seed(), boot.cmdline.tsc_khz.unwrap_or(0));
    let mut line = serial::Port::find().map(Line::new);
    if line.is_some() {
        apic::route(serial::IRQ, stub::Vector::Serial);
    }
    let mut socket = Socket::find(&boot);
    match (&mut socket, &mut line) {
        (Some(socket), _) => socket.announce(),
        (None, Some(line)) => line.announce(),
        (None, None) => {}
    }

    let mut timer_runs = false;
    loop {
        let causes = stub::take_pending();
        if causes.contains(stub::TIMER) {
            agent.tick();
            timer_runs = false;
        }
        if let Some(socket) = &mut socket {
            socket.work(causes.contains(stub::VIRTIO), &mut agent);
        }
        if let Some(line) = &mut line {
            if causes.contains(stub::SERIAL) {
                line.receive(&mut agent);
            }
            line.ticked(&mut agent);
        }
        let waits = socket.as_ref().is_some_and(Socket::waits) || line.as_ref().is_some_and(Line::waits);
        if waits && !timer_runs {
            apic::start_timer();
            timer_runs = true;
        }
        stub::wait();
    }
}
