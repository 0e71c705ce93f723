//! The first process, and what there is to start where nothing else starts it.
//!
//! The first process only mounts, loads modules, reaps, and ends the machine in order. The agent is a process of its own
//! that it starts again if it ends: a fault of the agent is then no kernel panic, and reaping is nobody else's affair.
//!
//! Signals, as other first processes have them: TERM and INT (Ctrl-Alt-Del) reboot; USR1, USR2 and PWR switch off.

use crate::options::{Options, UNDER_INIT};
use crate::serve::Agent;
use crate::spawn::{Process, command};
use crate::users::Account;
use crate::{hooks, network, readiness, say};
use api_spec::agent::linux::Readiness;
use libc::{SIGCHLD, SIGINT, SIGPWR, SIGTERM, SIGUSR1, SIGUSR2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use rustix::system::{RebootCommand, finit_module, reboot};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long an agent that ended is left alone before the next.
const RESPAWN: Duration = Duration::from_millis(200);
/// How long processes have after they were asked to end.
const GRACE: Duration = Duration::from_secs(3);
/// How long the kernel has to end those that were not asked.
const KILL_GRACE: Duration = Duration::from_secs(1);
/// How long systemd is left alone when it cannot say how ready the guest is.
const SYSTEMD_RETRY: Duration = Duration::from_millis(500);

/// Whether this is the first process.
pub fn is_init() -> bool {
    rustix::process::getpid() == Pid::INIT
}

/// The work of the first process; returns only if it cannot even hear signals.
pub fn run(options: &Options, args: &[OsString]) -> io::Error {
    let mut signals = match Signals::new([SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGPWR]) {
        Ok(signals) => signals,
        Err(e) => return e,
    };
    // Ctrl-Alt-Del becomes SIGINT.
    let _ = reboot(RebootCommand::CadOff);
    mount_all();
    if let Err(e) = network::loopback() {
        say(format_args!("cannot bring up the loopback interface: {e}"));
    }
    load_modules(&options.modules);
    let mut agent = start_agent(args);
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {
                while let Some(pid) = reap() {
                    if agent == Some(pid) {
                        agent = None;
                    }
                }
                if agent.is_none() {
                    say("the agent has ended and is started again");
                    std::thread::sleep(RESPAWN);
                    agent = start_agent(args);
                }
            }
            SIGTERM | SIGINT => end(RebootCommand::Restart),
            _ => end(RebootCommand::PowerOff),
        }
    }
    io::Error::other("the first process hears no signals any more")
}

/// Starts the agent. Where that fails it says so and there is none; the next signal of a child tries again.
fn start_agent(args: &[OsString]) -> Option<Pid> {
    let started = Command::new("/proc/self/exe").args(args).arg(UNDER_INIT).stdin(Stdio::null()).spawn();
    started.inspect_err(|e| say(format_args!("cannot start the agent: {e}"))).ok().map(|child| Pid::from_child(&child))
}

/// Frees the process id of a child that has ended, if there is one.
fn reap() -> Option<Pid> {
    wait(WaitOptions::NOHANG).ok().flatten().map(|(pid, _)| pid)
}

fn mount_all() {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let device = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (kind, target, flags, data) in [
        ("proc", "/proc", plain, None),
        ("sysfs", "/sys", plain, None),
        ("devtmpfs", "/dev", device, Some(c"mode=0755")),
        ("devpts", "/dev/pts", device, Some(c"mode=0620,ptmxmode=0666")),
        ("tmpfs", "/dev/shm", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=1777")),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755")),
        ("cgroup2", "/sys/fs/cgroup", plain, None),
    ] {
        let _ = fs::create_dir_all(target);
        match mount(kind, target, kind, flags, data) {
            // BUSY: whoever came before has mounted it. NODEV: this kernel has no such file system.
            Ok(()) | Err(Errno::BUSY | Errno::NODEV) => {}
            Err(e) => say(format_args!("cannot mount {target}: {e}")),
        }
    }
}

/// Loads the kernel modules in a list, a path a line, in that order. `#` begins a comment.
fn load_modules(list: &Path) {
    /// `MODULE_INIT_COMPRESSED_FILE`
    const COMPRESSED: i32 = 4;
    let Ok(list) = fs::read_to_string(list) else { return };
    for path in list.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|p| !p.is_empty()) {
        let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED };
        let loaded = File::open(path).and_then(|file| Ok(finit_module(file, c"", flags)?));
        match loaded {
            Err(e) if e.raw_os_error() != Some(Errno::EXIST.raw_os_error()) => {
                say(format_args!("cannot load the kernel module {path}: {e}"));
            }
            _ => {}
        }
    }
}

/// Ends every process, writes everything back, and then the machine.
fn end(how: RebootCommand) {
    let everyone = |signal| kill_process_group(Pid::INIT, signal);
    let _ = everyone(Signal::TERM);
    if !all_end(GRACE) {
        let _ = everyone(Signal::KILL);
        let _ = all_end(KILL_GRACE);
    }
    rustix::fs::sync();
    // From the innermost on; what is still in use is made read-only with the root.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|t| !is_kernels(t)) {
        let _ = unmount(target, UnmountFlags::empty());
    }
    let _ = mount_remount("/", MountFlags::RDONLY, "");
    rustix::fs::sync();
    if let Err(e) = reboot(how) {
        say(format_args!("the kernel refuses to end: {e}"));
    }
}

/// Whether a mounted file system is the kernel's own, with nothing to be written back.
fn is_kernels(target: &str) -> bool {
    target == "/" || ["/proc", "/sys", "/dev"].iter().any(|own| Path::new(target).starts_with(own))
}

/// Reaps until no child is left, or for so long; whether none is.
fn all_end(grace: Duration) -> bool {
    let until = Instant::now() + grace;
    loop {
        match wait(WaitOptions::NOHANG) {
            Err(Errno::CHILD) => return true,
            Ok(Some(_)) | Err(Errno::INTR) => {}
            _ if Instant::now() >= until => return false,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Finds out how ready the guest is, and tells the agent when nothing more will start.
pub fn watch_readiness(agent: &Agent) {
    let options = agent.options();
    let by_systemd = !options.under_init && Path::new("/run/systemd/system").is_dir();
    agent.set_readiness(if by_systemd { wait_for_systemd() } else { run_jobs(options) });
}

/// Runs the start jobs, once: an agent that was started again goes by what the one before has left.
fn run_jobs(options: &Options) -> Readiness {
    let left = options.state.join("started");
    if let Ok(failed) = fs::read_to_string(&left) {
        return readiness::started(failed.lines().map(Into::into));
    }
    let failed: Vec<String> = match hooks::run_all(&options.jobs, &[], options.job_deadline) {
        Ok(jobs) => jobs
            .filter_map(Result::err)
            .map(|job| {
                say(format_args!("start job {job}"));
                job.name
            })
            .collect(),
        Err(e) => vec![format!("{}: {e}", options.jobs.display())],
    };
    let written = fs::create_dir_all(&options.state).and_then(|()| fs::write(&left, failed.join("\n")));
    if let Err(e) = written {
        say(format_args!("cannot leave word that the start jobs are done: {e}"));
    }
    readiness::started(failed)
}

fn wait_for_systemd() -> Readiness {
    loop {
        let state = readiness::Systemd::parse(&ask_systemd(&["is-system-running", "--wait"]));
        let failed = match state {
            readiness::Systemd::Running => Vec::new(),
            _ => readiness::failed_units(&ask_systemd(&["list-units", "--state=failed", "--plain", "--no-legend"])),
        };
        if let Some(readiness) = state.readiness(failed) {
            return readiness;
        }
        std::thread::sleep(SYSTEMD_RETRY);
    }
}

/// What `systemctl` prints; nothing if it cannot be run.
fn ask_systemd(args: &[&str]) -> String {
    let mut systemctl = command("systemctl", &Account::of_agent(), true);
    systemctl.args(args).stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut process) = Process::start(&mut systemctl) else { return String::new() };
    let mut output = Vec::new();
    if let Some(stdout) = process.child().stdout.take() {
        let _ = stdout.take(64 * 1024).read_to_end(&mut output);
    }
    process.finish(None);
    String::from_utf8_lossy(&output).into_owned()
}
