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

/// Everything that works after boot. It lies at the very end of the stack, so a clone that answers a request writes two
/// pages: the stack's last one, and the one with rings and buffers behind it.
struct Guest {
    agent: Agent<Hardware>,
    socket: Option<Socket>,
    line: Option<Line>,
    timer: Timer,
}

/// The timer runs while somebody waits for it, as a guest that waits for nothing shall cost nothing.
#[derive(PartialEq)]
enum Timer {
    Stopped,
    Running,
    Fired,
}

/// Where the stub arrives in ring 3, once: `protocol` says how the machine was booted, `params` points at what the
/// loader left.
#[unsafe(no_mangle)]
extern "C" fn boot_main(protocol: u64, params: u64) -> ! {
    let mut guest = Guest::boot(protocol, params);
    loop {
        guest.work();
        stub::wait();
    }
}

impl Guest {
    /// Sets up the machine and tells the host about it.
    #[cold]
    #[inline(never)]
    fn boot(protocol: u64, params: u64) -> Self {
        let boot = loader::read(protocol, params);
        apic::enable();
        let machine = Hardware::new(&boot);
        let mut guest = Guest {
            agent: Agent::new(machine, hw::random_seed(), boot.cmdline.tsc_khz.unwrap_or(0)),
            socket: Socket::find(&boot),
            line: serial::Port::find().map(Line::new),
            timer: Timer::Stopped,
        };
        if guest.line.is_some() {
            apic::route(serial::IRQ, stub::Vector::Serial);
        }
        match (&mut guest.socket, &mut guest.line) {
            (Some(socket), _) => socket.announce(),
            (None, Some(line)) => line.announce(),
            (None, None) => {}
        }
        guest
    }

    /// Does what there is to do.
    fn work(&mut self) {
        let causes = stub::take_pending();
        // A timer that has fired fires once more when a machine is restored: a host cannot tell whether the interrupt
        // had been delivered before the snapshot, and losing one would be worse. Only the one that was waited for counts.
        if causes.contains(stub::TIMER) && self.timer == Timer::Running {
            self.agent.tick();
            self.timer = Timer::Fired;
        }
        if let Some(socket) = &mut self.socket {
            socket.work(causes.contains(stub::VIRTIO), &mut self.agent);
        }
        if let Some(line) = &mut self.line {
            if causes.contains(stub::SERIAL) {
                line.receive(&mut self.agent);
            }
            line.ticked(&mut self.agent);
        }
        let waits = self.socket.as_ref().is_some_and(Socket::waits) || self.line.as_ref().is_some_and(Line::waits);
        if waits && self.timer != Timer::Running {
            apic::start_timer();
            self.timer = Timer::Running;
        } else if !waits && self.timer != Timer::Stopped {
            apic::stop_timer();
            self.timer = Timer::Stopped;
        }
    }
}
