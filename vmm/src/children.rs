//! Processes that a demonstration or a benchmark starts. None of this same program outlives it, however it ends.

use api_spec::agent::Request;
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Why a process is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// A file, or the process itself.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It ended and should not have.
    #[error("{name} ended ({status}): {last_words}")]
    Ended {
        /// Which process.
        name: String,
        /// Its exit status.
        status: ExitStatus,
        /// The last line of its log.
        last_words: String,
    },
}

impl ChildError {
    /// Whether this host cannot run microVMs at all.
    pub fn host_cannot(&self) -> bool {
        matches!(self, ChildError::Ended { status, .. } if status.code() == Some(crate::cli::HOST_CANNOT))
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ChildError {
    let what = what.into();
    move |source| ChildError::Io { what, source }
}

/// Starts processes of this same program.
pub struct Children {
    program: PathBuf,
}

/// A process, which ends when this is dropped.
pub struct Child {
    name: String,
    process: std::process::Child,
    log: PathBuf,
    /// It is of another program, and is killed.
    is_other: bool,
}

/// How long a process may take to end in good order.
const LAST_ORDERS: Duration = Duration::from_secs(2);

impl Children {
    /// Finds this program.
    pub fn new() -> Result<Self, ChildError> {
        let program = std::env::current_exe().map_err(io_error("cannot find this program's own file"))?;
        Ok(Children { program })
    }

    /// Starts this program with what `arguments` adds; its log goes to `log`.
    pub fn start(&self, name: &str, log: &Path, arguments: impl FnOnce(&mut Command)) -> Result<Child, ChildError> {
        let add = |command: &mut Command| {
            arguments(command);
            command.arg("--end-with-parent");
        };
        Children::spawn((name, log), &self.program, add, false)
    }

    /// Starts another program; its log goes to `log`. How to end it in good order is not known, so that it is killed; it outlives this process
    /// if that is killed itself.
    pub fn start_other(
        name: &str,
        log: &Path,
        program: &Path,
        arguments: impl FnOnce(&mut Command),
    ) -> Result<Child, ChildError> {
        Children::spawn((name, log), program, arguments, true)
    }

    fn spawn(
        (name, log): (&str, &Path),
        program: &Path,
        arguments: impl FnOnce(&mut Command),
        is_other: bool,
    ) -> Result<Child, ChildError> {
        let log_file = File::create(log).map_err(io_error(format!("cannot write {}", log.display())))?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
        // Ctrl-C is for us, who then end the children: in the order that leaves nothing behind.
        command.process_group(0);
        arguments(&mut command);
        let process = command.spawn().map_err(io_error(format!("cannot start the process of the {name}")))?;
        Ok(Child { name: name.to_owned(), process, log: log.to_owned(), is_other })
    }
}

impl Child {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// An error with the last line of the log, if the process has ended.
    pub fn check_alive(&mut self) -> Result<(), ChildError> {
        let status = self.process.try_wait().map_err(io_error(format!("cannot look after {}", self.name)))?;
        let Some(status) = status else { return Ok(()) };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().last().unwrap_or("its log is empty");
        let last_words = last.strip_prefix("vmm: ").unwrap_or(last).to_owned();
        Err(ChildError::Ended { name: self.name.clone(), status, last_words })
    }

    /// Waits until `deadline` for the first reply of its guest, which may take `patience` for each; if the process ends instead, says
    /// why. `go_on` is asked at each step, and ends it by an error.
    pub fn first_reply<E: From<ChildError>>(
        &mut self,
        vsock: &Path,
        (patience, deadline): (Duration, Instant),
        request: Request,
        go_on: impl Fn() -> Result<(), E>,
        failed: impl FnOnce(AgentError) -> E,
    ) -> Result<AgentClient, E> {
        // In slices, so that a process that fails at once is noticed at once; growing, so that a slow guest has its time.
        let mut slice = Duration::from_millis(100);
        loop {
            go_on()?;
            let until = deadline.min(Instant::now() + slice);
            slice *= 2;
            match AgentClient::first_reply(vsock, patience, until, request) {
                Ok((agent, _)) => return Ok(agent),
                Err(source) => {
                    self.check_alive()?;
                    if Instant::now() >= deadline {
                        return Err(failed(source));
                    }
                }
            }
        }
    }

    /// Asks the process to end, without waiting for it.
    pub fn ask_to_end(&mut self) {
        // As long as the process has not been waited for, its number is its own.
        let alive = matches!(self.process.try_wait(), Ok(None));
        if let Some(pid) = Pid::from_raw(self.process.id() as i32).filter(|_| alive) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    fn end(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + if self.is_other { Duration::ZERO } else { LAST_ORDERS };
        if !self.is_other {
            self.ask_to_end();
        }
        while Instant::now() < deadline {
            if self.process.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.process.kill()?;
        self.process.wait().map(drop)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            eprintln!("vmm: cannot end the process of the {}: {e}", self.name);
        }
    }
}
