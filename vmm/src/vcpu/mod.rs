//! vCPUs: a thread each, which either runs the guest or stands still.
//!
//! ```text
//!            run()                  pause(): flag, signal
//!   Paused ---------> Running ------------------------------> Paused
//!      |                 | the guest ends
//!      | end_all         v
//!      +----> gone <-- Ended (stands still for good; reported once)
//! ```
//!
//! A vCPU stops only where `KVM_RUN` returns EINTR: by then KVM has completed the I/O instruction of the exit before, so
//! the registers are whole. While it stands still its file descriptor is free for the owner of the machine to save from.

mod counts;
mod exit;
pub mod rewind;
mod run_page;
pub mod state;

pub use exit::{GuestEnd, ring0_is_emulated};

use api_spec::stats::VcpuStats;
use counts::Counts;

use crate::devices::bus::Bus;
use crate::memory::lost;
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use kvm_ioctls::{VcpuExit, VcpuFd};
use run_page::ImmediateExit;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// How long a vCPU may take to stand still. It takes microseconds, unless it waits for a page that does not come.
pub const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Why vCPUs could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No thread, no mapping or no signal.
    #[error("cannot start a vCPU thread: {0}")]
    Start(io::Error),
    /// A vCPU did not stand still in time.
    #[error(
        "vCPU {vcpu} did not stand still in time; it may be waiting for a page that its page server does not deliver"
    )]
    Stuck {
        /// Number of the vCPU.
        vcpu: u8,
    },
}

/// What a vCPU is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Pause,
    Run,
    Quit,
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Standing,
    Running,
}

/// What the owner and a vCPU's thread tell each other.
#[derive(Debug)]
struct Shared {
    talk: Mutex<(Goal, Doing)>,
    changed: Condvar,
    exit: ImmediateExit,
    counts: Counts,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (Goal, Doing)> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_goal(&self, goal: Goal) {
        self.lock().0 = goal;
        self.changed.notify_all();
    }

    fn goal(&self) -> Goal {
        self.lock().0
    }

    /// Has the thread look at its goal, which is no longer to run.
    fn kick(&self) {
        // First the flag, then the signal: a thread that is about to enter KVM_RUN sees the flag, one inside is
        // interrupted, and one that handles an exit meets the flag at its next entry.
        self.exit.set(true);
        if let Some(thread) = &*self.thread() {
            // The handler does nothing; the signal only ends KVM_RUN. A thread that is gone needs none.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

/// Stops a running vCPU, from any thread and without waiting for it.
#[derive(Clone, Debug)]
pub struct Brake(Weak<Shared>);

impl Brake {
    /// Has the vCPU stand still, if it runs. Whoever owns it must be told.
    pub fn pull(&self) {
        let Some(shared) = self.0.upgrade() else { return };
        let mut talk = shared.lock();
        if talk.0 == Goal::Run {
            talk.0 = Goal::Pause;
            drop(talk);
            shared.kick();
        }
    }
}

/// Where vCPUs send their exits.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// One vCPU and its thread.
#[derive(Debug)]
pub struct Vcpu {
    number: u8,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Arc<Shared>,
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    /// Starts the thread of a vCPU, standing still.
    pub fn start(number: u8, fd: VcpuFd, buses: Buses, notifier: Notifier) -> Result<Self, VcpuError> {
        // The handler does nothing: its only effect is that KVM_RUN returns.
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|e| VcpuError::Start(io::Error::from_raw_os_error(e.errno())))?;
        let exit = ImmediateExit::of(&fd).map_err(VcpuError::Start)?;
        let fd = Arc::new(Mutex::new(fd));
        let talk = Mutex::new((Goal::Pause, Doing::Standing));
        let shared = Arc::new(Shared {
            talk,
            changed: Condvar::new(),
            exit,
            counts: Counts::default(),
            thread: Mutex::new(None),
        });
        let thread = Thread { number, fd: fd.clone(), shared: shared.clone(), buses, notifier };
        let thread =
            sandbox::spawn(&format!("vcpu{number}"), Kind::Vcpu, move || thread.main()).map_err(VcpuError::Start)?;
        *shared.thread() = Some(thread);
        Ok(Vcpu { number, fd, shared })
    }

    /// The vCPU's registers, while it stands still. Waits for it otherwise.
    pub fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        self.shared.set_goal(Goal::Run);
    }

    /// What the vCPU has done.
    pub fn stats(&self) -> VcpuStats {
        self.shared.counts.read()
    }

    /// What stops the vCPU from another thread.
    pub fn brake(&self) -> Brake {
        Brake(Arc::downgrade(&self.shared))
    }

    /// Asks the vCPU to stand still, without waiting for it.
    fn ask_to_pause(&self, goal: Goal) {
        self.shared.set_goal(goal);
        self.shared.kick();
    }

    fn wait_until_standing(&self, deadline: Instant) -> Result<(), VcpuError> {
        let mut talk = self.shared.lock();
        while talk.1 == Doing::Running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VcpuError::Stuck { vcpu: self.number });
            }
            talk = self.shared.changed.wait_timeout(talk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

/// Brings all vCPUs to a standstill: all are asked before the first is waited for. If one does not stand still within
/// `patience`, the others do, and it will as soon as it can, unless all are run again.
pub fn pause_all(vcpus: &[Vcpu], patience: Duration) -> Result<(), VcpuError> {
    vcpus.iter().for_each(|vcpu| vcpu.ask_to_pause(Goal::Pause));
    let deadline = Instant::now() + patience;
    vcpus.iter().try_for_each(|vcpu| vcpu.wait_until_standing(deadline))
}

/// Ends the threads of all vCPUs. `false`: one does not end, and is left to the end of the process.
pub fn end_all(vcpus: &[Vcpu]) -> bool {
    vcpus.iter().for_each(|vcpu| vcpu.ask_to_pause(Goal::Quit));
    let deadline = Instant::now() + PAUSE_DEADLINE;
    let mut all = true;
    for vcpu in vcpus {
        match vcpu.wait_until_standing(deadline) {
            Ok(()) => {
                let thread = vcpu.shared.thread().take();
                if let Some(thread) = thread {
                    let _ = thread.join();
                }
            }
            Err(_) => all = false,
        }
    }
    all
}

/// What the thread of a vCPU owns.
struct Thread {
    number: u8,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Arc<Shared>,
    buses: Buses,
    notifier: Notifier,
}

impl Thread {
    fn main(self) {
        // A parent may have left the signal blocked, and then nothing would interrupt the guest.
        if let Err(e) = unblock_signal(SIGRTMIN()) {
            tracing::warn!("vCPU {} cannot be interrupted: {e}", self.number);
        }
        while self.wait_for_run() {
            let end = self.run_guest();
            self.stand();
            if let Some(end) = end {
                self.notifier.send(Notice::End(end));
                break;
            }
        }
    }

    /// Waits until the vCPU is to run; `false` if it is to quit.
    fn wait_for_run(&self) -> bool {
        let mut talk = self.shared.lock();
        while talk.0 == Goal::Pause {
            talk = self.shared.changed.wait(talk).unwrap_or_else(PoisonError::into_inner);
        }
        let run = talk.0 == Goal::Run;
        if run {
            talk.1 = Doing::Running;
        }
        run
    }

    fn stand(&self) {
        self.shared.lock().1 = Doing::Standing;
        self.shared.changed.notify_all();
    }

    /// Runs the guest until it ends or is to stand still.
    fn run_guest(&self) -> Option<GuestEnd> {
        let mut vcpu = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        state::note_pause(&vcpu);
        let counts = &self.shared.counts;
        loop {
            let end = match vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    counts.io_out.add();
                    self.buses.pio.write(port.into(), data);
                    None
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    counts.io_in.add();
                    self.buses.pio.read(port.into(), data);
                    None
                }
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    counts.mmio_write.add();
                    self.buses.mmio.write(addr, data);
                    None
                }
                Ok(VcpuExit::MmioRead(addr, data)) => {
                    counts.mmio_read.add();
                    self.buses.mmio.read(addr, data);
                    None
                }
                Ok(VcpuExit::Intr) => {
                    counts.interrupted.add();
                    None
                }
                Ok(other) => {
                    counts.other.add();
                    match other {
                        VcpuExit::Shutdown => Some(GuestEnd::TripleFault { vcpu: self.number }),
                        VcpuExit::InternalError => Some(self.internal_error(&mut vcpu)),
                        other => Some(self.unexpected(format!("KVM exit {other:?}"))),
                    }
                }
                Err(e) => match e.errno() {
                    libc::EINTR => {
                        counts.interrupted.add();
                        self.shared.exit.set(false);
                        // The flag is cleared before the goal is read: whoever sets the flag has set the goal before.
                        if self.shared.goal() != Goal::Run {
                            return None;
                        }
                        None
                    }
                    libc::EFAULT => Some(self.unexpected(lost::UNREACHABLE.to_owned())),
                    // A vCPU that has just received its start-up IPI.
                    libc::EAGAIN => None,
                    _ => Some(self.unexpected(format!("KVM_RUN failed: {e}"))),
                },
            };
            if end.is_some() {
                counts.failures.add();
                return end;
            }
        }
    }

    fn unexpected(&self, what: String) -> GuestEnd {
        GuestEnd::Unexpected { vcpu: self.number, what }
    }

    fn internal_error(&self, vcpu: &mut VcpuFd) -> GuestEnd {
        match run_page::internal_error(vcpu) {
            (_, Some(bytes)) => {
                let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
                GuestEnd::Emulation { vcpu: self.number, rip, bytes, ring0_emulated: ring0_is_emulated() }
            }
            (suberror, None) => self.unexpected(format!("KVM internal error {suberror}")),
        }
    }
}
