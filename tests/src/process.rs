//! Processes that always end: when the value goes, so does the process. What it said is shown if a test fails.

use crate::place::Place;
use crate::{PATIENCE, holds_within, procfs};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How long a process may take to end in good order.
const LAST_ORDERS: Duration = Duration::from_secs(5);

/// A process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// What came of a process that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl Finished {
    /// The exit code; panics if a signal ended the process.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("a signal ended the process: {self:?}"))
    }

    /// The one line that a failing program says.
    pub fn one_line(&self) -> &str {
        let mut lines = self.stderr.lines();
        match (lines.next(), lines.next()) {
            (Some(line), None) => line,
            _ => panic!("expected one line on standard error: {:?}", self.stderr),
        }
    }
}

impl Process {
    /// Starts `program` with the arguments that `arguments` adds. Its output goes to files in `place`, which are named
    /// after it.
    pub fn start(place: &Place, name: &str, program: &Path, arguments: impl FnOnce(&mut Command)) -> Self {
        let (stdout, stderr) = (place.join(format!("{name}.out")), place.join(format!("{name}.log")));
        let create = |path| File::create(path).expect("a file can be made in the test's directory");
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(create(&stdout)).stderr(create(&stderr));
        arguments(&mut command);
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {}: {e}", program.display()));
        Process { name: name.to_owned(), child, stdout, stderr }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        fs::read(&self.stdout).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Panics with what it logged if it has ended.
    pub fn check_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
            panic!("{} ended ({status}): {}", self.name, self.log());
        }
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_alive() {
            // It has not been waited for, so its number is still its own.
            let pid = Pid::from_raw(self.child.id() as i32).expect("a process id is not zero");
            kill_process(pid, signal).expect("a child can be sent signals");
        }
    }

    /// Waits for it to end by itself; panics if it has not within `patience`.
    pub fn finish_within(mut self, patience: Duration) -> Finished {
        assert!(holds_within(patience, || !self.is_alive()), "{} has not ended within {patience:?}", self.name);
        let status = self.child.wait().expect("a child can be waited for");
        let read = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        Finished { status, stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }

    /// Waits for it to end by itself; panics if it has not within [`PATIENCE`].
    pub fn finish(self) -> Finished {
        self.finish_within(PATIENCE)
    }

    /// Asks it to end, as soon as it listens, and waits until it has.
    pub fn stop(mut self) -> Finished {
        holds_within(PATIENCE, || !self.is_alive() || procfs::heeds(self.pid(), Signal::TERM));
        self.signal(Signal::TERM);
        self.finish()
    }

    /// Kills it and waits until it is gone.
    pub fn kill(mut self) -> Finished {
        self.signal(Signal::KILL);
        self.finish()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        if ended.is_none() {
            self.signal(Signal::TERM);
            if !holds_within(LAST_ORDERS, || !self.is_alive()) {
                let _ = self.child.kill();
                if !holds_within(LAST_ORDERS, || !self.is_alive()) {
                    eprintln!("---- {} (pid {}) cannot be killed", self.name, self.pid());
                }
            }
        }
        if std::thread::panicking() {
            let how = ended.map_or("was alive".to_owned(), |status| format!("had ended, {status}"));
            eprintln!("---- {} (pid {}, {how}) logged:\n{}", self.name, self.pid(), self.log());
            let printed = self.printed();
            if !printed.is_empty() {
                eprintln!("---- and printed:\n{printed}");
            }
        }
    }
}

/// Runs the `vmm` program with these arguments until it ends by itself.
pub fn run_vmm(place: &Place, name: &str, arguments: &[&str]) -> Finished {
    Process::start(place, name, crate::binaries::vmm(), |vmm| {
        vmm.args(arguments);
    })
    .finish_within(3 * PATIENCE)
}
