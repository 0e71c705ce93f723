//! Other VMMs beside ours: the same guest in them, its memory from a file, and the same questions over the same kind of channel.
//!
//! Each of their processes has a directory of its own, in which it finds its sockets by relative paths.

mod firecracker;
mod qemu;

use super::guest::{Channel, Workplace};
use super::{BenchError, io_error};
use crate::loader::EMBEDDED_GUEST;
use api_spec::client::AgentClient;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Firecracker, by its API.
    Firecracker,
    /// QEMU's `microvm` machine, by QMP.
    Qemu,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Firecracker, Kind::Qemu];

    /// What a report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Firecracker => "Firecracker",
            Kind::Qemu => "QEMU",
        }
    }

    /// What programs call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Firecracker => "firecracker",
            Kind::Qemu => "qemu",
        }
    }

    /// Whether it has read all of memory before its guest runs, so that nothing that is touched then adds anything.
    pub fn loads_all(self) -> bool {
        match self {
            Kind::Firecracker => false,
            Kind::Qemu => true,
        }
    }

    /// How the agent of its guest is called. QEMU has no vsock device of its own, only one of the host's kernel, which many hosts do not
    /// have.
    pub fn channel(self) -> Channel {
        match self {
            Kind::Firecracker => Channel::Vsock,
            Kind::Qemu => Channel::Serial,
        }
    }
}

/// Another VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Which.
    pub kind: Kind,
    /// Its program.
    pub program: PathBuf,
}

impl Peer {
    /// Adds what another `--peer` says; each kind can be named once.
    pub fn add(peers: &mut Vec<Peer>, text: &OsStr) -> Result<(), String> {
        let peer = Peer::parse(text)?;
        if peers.iter().any(|known| known.kind == peer.kind) {
            return Err(format!("--peer {}: {} is named already", text.display(), peer.kind.title()));
        }
        peers.push(peer);
        Ok(())
    }

    /// Its name, and its program.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let program = |kind: Kind| bytes.strip_prefix(kind.name().as_bytes())?.strip_prefix(b"=");
        let named = Kind::ALL.into_iter().find_map(|kind| Some((kind, program(kind).filter(|path| !path.is_empty())?)));
        let wrong = || format!("--peer {}: must be `firecracker=PROGRAM` or `qemu=PROGRAM`", text.display());
        let (kind, program) = named.ok_or_else(wrong)?;
        Ok(Peer { kind, program: OsStr::from_bytes(program).into() })
    }

    /// Boots the embedded guest in it, has somebody do something with its agent, and takes a snapshot.
    pub fn prepare(
        &self,
        place: &Workplace,
        machine: MachineConfig,
        something: impl FnOnce(&mut AgentClient) -> Result<(), BenchError>,
    ) -> Result<Prepared, BenchError> {
        let Peer { kind, program } = self;
        let named = |what: &str| place.path(&format!("{}-{what}", kind.name()));
        let (kernel, snapshot) = (named("kernel"), named("snap"));
        std::fs::write(&kernel, EMBEDDED_GUEST).map_err(io_error("cannot write the guest for another VMM"))?;
        std::fs::create_dir_all(&snapshot).map_err(io_error("cannot make a directory"))?;
        let program = std::path::absolute(program).map_err(io_error("--peer: the program cannot be found"))?;
        let mut prepared = Prepared { kind: *kind, program, kernel, machine, snapshot, version: String::new() };
        prepared.version = match kind {
            Kind::Firecracker => firecracker::prepare(&prepared, place, something)?,
            Kind::Qemu => qemu::prepare(&prepared, place, something)?,
        };
        Ok(prepared)
    }
}

/// Another VMM that has a snapshot of the guest.
pub struct Prepared {
    /// Which.
    pub kind: Kind,
    program: PathBuf,
    kernel: PathBuf,
    machine: MachineConfig,
    /// The directory of the snapshot.
    pub snapshot: PathBuf,
    /// What it says of its version.
    pub version: String,
}

/// One of its processes.
pub enum Process {
    /// Of Firecracker.
    Firecracker(firecracker::Process),
    /// Of QEMU.
    Qemu(qemu::Process),
}

impl Prepared {
    /// Starts a process that waits until it is told to load.
    pub fn start(&self, place: &Workplace, name: &str) -> Result<Process, BenchError> {
        Ok(match self.kind {
            Kind::Firecracker => Process::Firecracker(firecracker::Process::start(self, place, name)?),
            Kind::Qemu => Process::Qemu(qemu::Process::start(self, place, name, qemu::Start::Waiting)?),
        })
    }

    /// Starts a process with the snapshot, and waits until its guest runs.
    pub fn restore(&self, place: &Workplace, name: &str) -> Result<Process, BenchError> {
        Ok(match self.kind {
            Kind::Firecracker => {
                let mut process = firecracker::Process::start(self, place, name)?;
                process.load(self)?;
                Process::Firecracker(process)
            }
            Kind::Qemu => {
                let mut process = qemu::Process::start(self, place, name, qemu::Start::Loading)?;
                process.wait_until_it_runs()?;
                Process::Qemu(process)
            }
        })
    }

    /// A directory of its own for a process.
    fn room(&self, place: &Workplace, name: &str) -> Result<PathBuf, BenchError> {
        let dir = place.path(&format!("{}-{name}", self.kind.name()));
        std::fs::create_dir_all(&dir).map_err(io_error("cannot make a directory"))?;
        Ok(dir)
    }
}

impl Process {
    /// Loads the snapshot, and has the guest run.
    pub fn load(&mut self, prepared: &Prepared) -> Result<(), BenchError> {
        match self {
            Process::Firecracker(process) => process.load(prepared),
            Process::Qemu(process) => process.load(),
        }
    }

    /// Calls the agent of its guest.
    pub fn agent(&mut self) -> Result<AgentClient, BenchError> {
        match self {
            Process::Firecracker(process) => process.agent(),
            Process::Qemu(process) => process.agent(),
        }
    }
}

/// What a process has left there before.
fn remove(socket: &Path) {
    let _ = std::fs::remove_file(socket);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_named_with_its_program() {
        for (text, kind, program) in [
            ("firecracker=/a=b", Kind::Firecracker, "/a=b"),
            ("qemu=qemu-system-x86_64", Kind::Qemu, "qemu-system-x86_64"),
        ] {
            assert_eq!(Peer::parse(text.as_ref()).unwrap(), Peer { kind, program: program.into() });
        }
        for bad in ["", "firecracker", "firecracker=", "qemu=", "xen=/x", "qemu/x"] {
            let refused = Peer::parse(bad.as_ref()).unwrap_err();
            assert!(refused.contains("`firecracker=PROGRAM` or `qemu=PROGRAM`"), "{bad}");
        }
        let mut peers = Vec::new();
        assert!(["firecracker=a", "qemu=b"].iter().all(|text| Peer::add(&mut peers, text.as_ref()).is_ok()));
        assert!(Peer::add(&mut peers, "qemu=c".as_ref()).unwrap_err().contains("named already"));
        assert_eq!(peers.len(), 2);
    }
}
