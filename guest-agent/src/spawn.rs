//! Starting processes, and waiting for them.

// UNSAFETY: what a child does between fork and exec is given to the standard library as a closure that must be safe there.
#![allow(unsafe_code)]

use crate::stream::wait;
use crate::users::Account;
use api_spec::agent::linux::Exit;
use rustix::event::PollFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, setsid};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// The `PATH` of programs that are given none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command with an environment of its own, in a session and process group of its own.
///
/// `as_whom` sets user and groups, and the variables that tell about the user; the ids stay as they are if `keep_ids`.
pub fn command(program: impl AsRef<Path>, as_whom: &Account, keep_ids: bool) -> Command {
    let mut command = Command::new(program.as_ref());
    let name = as_whom.name.clone().unwrap_or_else(|| as_whom.uid.to_string());
    command.env_clear().env("PATH", PATH).env("HOME", &as_whom.home).env("SHELL", &as_whom.shell);
    command.env("USER", &name).env("LOGNAME", &name).current_dir("/").stdin(Stdio::null());
    let ids = (!keep_ids).then(|| {
        let groups: Vec<Gid> = as_whom.groups.iter().copied().map(Gid::from_raw).collect();
        (groups, Gid::from_raw(as_whom.gid), Uid::from_raw(as_whom.uid))
    });
    let before_exec = move || {
        setsid()?;
        if let Some((groups, gid, uid)) = &ids {
            set_thread_groups(groups)?;
            set_thread_res_gid(*gid, *gid, *gid)?;
            set_thread_res_uid(*uid, *uid, *uid)?;
        }
        Ok::<(), io::Error>(())
    };
    // SAFETY: the closure makes system calls on values that it owns; it allocates nothing and takes no lock, so it does
    // not matter what other threads held at the fork.
    unsafe { command.pre_exec(before_exec) };
    command
}

/// A process that leads its own group, and is killed with it if it is dropped before it was waited for.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: Pid,
    ended: OwnedFd,
    reaped: bool,
}

impl Process {
    /// Starts what [`command`] made.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(ended) => Ok(Process { child, pid, ended, reaped: false }),
            Err(e) => {
                let _ = kill_process_group(pid, Signal::KILL);
                let _ = child.wait();
                Err(e.into())
            }
        }
    }

    /// Its process id, which is also its group's.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its standard streams, where they are pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// A descriptor that becomes readable when it has ended.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Kills its group.
    pub fn kill(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    /// Waits for it to end, and frees its process id.
    pub fn reap(mut self) -> Exit {
        self.reap_now()
    }

    fn reap_now(&mut self) -> Exit {
        self.reaped = true;
        match self.child.wait() {
            Ok(status) => status.code().map_or_else(|| Exit::Signal(status.signal().unwrap_or(0)), Exit::Code),
            Err(_) => Exit::Signal(0),
        }
    }

    /// Waits for it to end; kills its group, and tells, if it has not by `deadline`.
    pub fn wait_until(&self, deadline: Option<Instant>) -> bool {
        let in_time = wait(self.ended_fd(), PollFlags::IN, deadline).unwrap_or(false);
        if !in_time {
            self.kill();
        }
        in_time
    }

    /// Waits for it to end, kills its group if it has not by `deadline`, and frees its process id.
    pub fn finish(self, deadline: Option<Instant>) -> Exit {
        if self.wait_until(deadline) {
            return self.reap();
        }
        self.reap();
        Exit::Deadline
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            self.reap_now();
        }
    }
}
