//! Taking away from a process what its user, and the kernel, would let it do. All of it happens before anything is opened, while there
//! is one thread.
// UNSAFETY: leaving namespaces, and becoming another user, have no form in the crates we use that would not touch one thread only.
#![allow(unsafe_code)]

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use std::io;
use std::path::PathBuf;

/// What is taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Threads make only the system calls that they need.
    pub seccomp: bool,
    /// Whom to become. It goes with a group.
    pub uid: Option<u32>,
    /// Of which group, and no others.
    pub gid: Option<u32>,
    /// Which namespaces of the host to leave.
    pub namespaces: Vec<Namespace>,
    /// Which cgroup to move into.
    pub cgroup: Option<PathBuf>,
    /// Most open files.
    pub files: Option<u64>,
    /// Longest file that is written, in bytes.
    pub file_size: Option<u64>,
}

impl Default for Confinement {
    fn default() -> Self {
        Confinement {
            seccomp: true,
            uid: None,
            gid: None,
            namespaces: Vec::new(),
            cgroup: None,
            files: None,
            file_size: None,
        }
    }
}

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Mounts: what is mounted later is seen on one side only.
    Mount,
    /// Network interfaces: there are none, and no taps, but those that are made there.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// The name of the host.
    Uts,
}

impl Namespace {
    fn flag(self) -> libc::c_int {
        match self {
            Namespace::Mount => libc::CLONE_NEWNS,
            Namespace::Net => libc::CLONE_NEWNET,
            Namespace::Ipc => libc::CLONE_NEWIPC,
            Namespace::Uts => libc::CLONE_NEWUTS,
        }
    }
}

/// Why a process is not confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// It could gain privileges by the programs that it starts.
    #[error("cannot give up gaining privileges (no_new_privs): {0}")]
    NoNewPrivileges(io::Error),
    /// The cgroup.
    #[error("--cgroup: cannot move into {}: {source}; is it a cgroup of version 2 that this user may write?", path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Namespaces.
    #[error("--isolate: cannot leave the namespaces of the host: {0}; that needs root, or CAP_SYS_ADMIN")]
    Namespaces(io::Error),
    /// A limit.
    #[error("{name}: cannot set the limit: {source}")]
    Limit {
        /// The option.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The user.
    #[error("{name} {id}: cannot become that: {source}; that needs root, or CAP_SETUID and CAP_SETGID")]
    Identity {
        /// The option.
        name: &'static str,
        /// The number.
        id: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Capabilities that would stay.
    #[error("cannot drop capabilities: {0}")]
    Capabilities(io::Error),
}

impl Confinement {
    /// Confines this process, which is to have one thread.
    ///
    /// In this order: what needs privileges comes before they are gone.
    pub fn enter(&self) -> Result<(), ConfinementError> {
        rustix::thread::set_no_new_privs(true).map_err(|e| ConfinementError::NoNewPrivileges(e.into()))?;
        self.join_cgroup()?;
        self.leave_namespaces().map_err(ConfinementError::Namespaces)?;
        lower("core dumps", Resource::Core, Some(0))?;
        lower("--rlimit-nofile", Resource::Nofile, self.files)?;
        lower("--rlimit-fsize", Resource::Fsize, self.file_size)?;
        self.change_identity()
    }

    fn join_cgroup(&self) -> Result<(), ConfinementError> {
        let Some(path) = &self.cgroup else { return Ok(()) };
        // 0 is the process that writes it. The file is not made: a directory that is no cgroup has none.
        let join = || {
            let mut file = std::fs::OpenOptions::new().write(true).open(path.join("cgroup.procs"))?;
            io::Write::write_all(&mut file, b"0")
        };
        join().map_err(|source| ConfinementError::Cgroup { path: path.clone(), source })
    }

    fn leave_namespaces(&self) -> io::Result<()> {
        if self.namespaces.is_empty() {
            return Ok(());
        }
        let flags = self.namespaces.iter().fold(0, |flags, namespace| flags | namespace.flag());
        // SAFETY: takes flags only, and changes nothing of memory or descriptors.
        done(unsafe { libc::unshare(flags) })?;
        if self.namespaces.contains(&Namespace::Mount) {
            // What the host mounts or unmounts does not arrive here, nor the other way round.
            let flags = libc::MS_REC | libc::MS_PRIVATE;
            use std::ptr::null;
            // SAFETY: the path ends with a zero; the kernel takes no source, type or data with these flags.
            done(unsafe { libc::mount(null(), c"/".as_ptr(), null(), flags, null()) })?;
        }
        Ok(())
    }

    /// Supplementary groups, the group, the user, and at the end the capabilities that the user might have kept.
    fn change_identity(&self) -> Result<(), ConfinementError> {
        let (Some(uid), Some(gid)) = (self.uid, self.gid) else { return Ok(()) };
        drop_bounding_set();
        let fail = |name, id| move |source| ConfinementError::Identity { name, id, source };
        // SAFETY: an empty list, of which the kernel reads nothing. All threads are meant; there is one.
        done(unsafe { libc::setgroups(0, std::ptr::null()) }).map_err(fail("--gid", gid))?;
        // SAFETY: takes numbers only.
        done(unsafe { libc::setresgid(gid, gid, gid) }).map_err(fail("--gid", gid))?;
        // SAFETY: takes numbers only.
        done(unsafe { libc::setresuid(uid, uid, uid) }).map_err(fail("--uid", uid))?;
        drop_capabilities().map_err(ConfinementError::Capabilities)?;
        // Or what the kernel tells in /proc of this process would belong to root, and it looks at its own memory there.
        let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
        Ok(())
    }
}

/// Sets a limit lower than it is; one that is lower already stays. The process itself cannot raise it again.
fn lower(name: &'static str, resource: Resource, to: Option<u64>) -> Result<(), ConfinementError> {
    let Some(to) = to else { return Ok(()) };
    let limit = getrlimit(resource);
    let at_most = |now: Option<u64>| Some(now.map_or(to, |now| now.min(to)));
    let lowered = Rlimit { current: at_most(limit.current), maximum: at_most(limit.maximum) };
    setrlimit(resource, lowered).map_err(|e| ConfinementError::Limit { name, source: e.into() })
}

/// What no program that this process might start could gain. It would gain nothing in any case (no_new_privs), so failing is no harm.
fn drop_bounding_set() {
    use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
    for capability in CapabilitySet::all() {
        let _ = remove_capability_from_bounding_set(capability);
    }
}

fn drop_capabilities() -> io::Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities};
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
