//! An agent of its own for each test, as a process on this host, over Unix sockets.
//!
//! It works on the real system, so no test here may ask it to change what is the host's: clock, names, power.

#![allow(dead_code)] // Each test program uses its own part.

use api_spec::agent::linux::Exec;
use api_spec::client::AgentClient;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The moment at which a test gives up.
pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Asks until the answer is yes.
#[track_caller]
pub fn eventually(what: &str, mut question: impl FnMut() -> bool) {
    let until = soon();
    while !question() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A script that others can run.
pub fn script(path: &Path, body: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A program without input.
pub fn argv(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|&word| word.to_owned()).collect(), ..Exec::default() }
}

/// A line for the shell.
pub fn sh(line: &str) -> Exec {
    argv(&["sh", "-c", line])
}

/// An agent that runs.
pub struct Agent {
    process: Child,
    dir: TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    /// Starts an agent whose hooks, jobs and state are in a directory.
    pub fn start_in(dir: TempDir) -> Self {
        let process = Command::new(env!("CARGO_BIN_EXE_guest-agent")).args(arguments(dir.path())).spawn().unwrap();
        let agent = Agent { process, dir };
        eventually("the agent listens", || UnixStream::connect(agent.path("agent")).is_ok());
        agent
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("agent")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn connect(&self) -> AgentClient {
        AgentClient::over(self.raw(), PATIENCE)
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Children, zombies included.
    pub fn children(&self) -> usize {
        let pid = self.process.id();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let of = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        threads.map(|thread| of(thread.unwrap()).split_whitespace().count()).sum()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The options of an agent that keeps to a directory.
pub fn arguments(dir: &Path) -> Vec<String> {
    let unix = |name: &str| format!("unix:{}", dir.join(name).display());
    let path = |name: &str| dir.join(name).display().to_string();
    let (hooks, jobs, state, modules) = (path("hooks.d"), path("start.d"), path("state"), path("modules"));
    [
        ["--listen", &unix("agent")],
        ["--announce", &unix("ready")],
        ["--hooks", &hooks],
        ["--jobs", &jobs],
        ["--state", &state],
        ["--modules", &modules],
    ]
    .concat()
    .iter()
    .map(ToString::to_string)
    .collect()
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}
