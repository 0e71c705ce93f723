//! Another VMM beside ours: the same guest in it, its memory from the file, and the same questions over the same kind of channel.
//!
//! Each of its processes has a directory of its own, in which its snapshot finds the socket of the vsock device by a relative path.

use super::guest::{PATIENCE, Workplace, connect};
use super::{BenchError, io_error};
use crate::children::{Child, Children};
use crate::loader::EMBEDDED_GUEST;
use api_spec::agent::Request;
use api_spec::client::rest::RestError;
use api_spec::client::{AgentClient, RestClient};
use api_spec::vm::MachineConfig;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// How its socket of the vsock device is called in the directory of a process.
const VSOCK: &str = "guest.vsock";
/// Files of a snapshot.
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Firecracker, by its API.
    Firecracker,
}

impl Kind {
    /// What a report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Firecracker => "Firecracker",
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
    /// What `--peer` says: its name, and its program.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let wrong = || format!("--peer {}: must be `firecracker=PROGRAM`", text.display());
        let program = text.as_bytes().strip_prefix(b"firecracker=").filter(|program| !program.is_empty());
        let program = OsStr::from_bytes(program.ok_or_else(wrong)?);
        Ok(Peer { kind: Kind::Firecracker, program: program.into() })
    }

    /// Boots the embedded guest in it, has somebody do something with its agent, and takes a snapshot.
    pub fn prepare(
        &self,
        place: &Workplace,
        machine: MachineConfig,
        something: impl FnOnce(&mut AgentClient) -> Result<(), BenchError>,
    ) -> Result<Prepared, BenchError> {
        let (kernel, snapshot) = (place.path("peer-kernel"), place.path("peer-snap"));
        std::fs::write(&kernel, EMBEDDED_GUEST).map_err(io_error("cannot write the guest for another VMM"))?;
        std::fs::create_dir_all(&snapshot).map_err(io_error("cannot make a directory"))?;
        let program = std::path::absolute(&self.program).map_err(io_error("--peer: the program cannot be found"))?;
        let mut prepared = Prepared { program, snapshot, version: String::new() };
        let mut process = prepared.start(place, "peer")?;
        let version: Value = process.client.get("/version").map_err(failed("its version"))?;
        prepared.version = version["firecracker_version"].as_str().unwrap_or("unknown").to_owned();
        let MachineConfig { vcpu_count, mem_size_mib, .. } = machine;
        for (path, body) in [
            ("/machine-config", json!({ "vcpu_count": vcpu_count, "mem_size_mib": mem_size_mib })),
            ("/boot-source", json!({ "kernel_image_path": kernel, "boot_args": "quiet" })),
            ("/vsock", json!({ "guest_cid": 3, "uds_path": VSOCK })),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ] {
            process.client.put(path, &body).map_err(failed("its guest does not boot"))?;
        }
        let (deadline, ping) = (Instant::now() + PATIENCE, Request::Ping { token: 0 });
        let mut agent = process.child.first_reply(
            &process.vsock,
            (PATIENCE, deadline),
            ping,
            || place.go_on(),
            BenchError::Agent,
        )?;
        something(&mut agent)?;
        drop(agent);
        process.client.patch("/vm", &json!({ "state": "Paused" })).map_err(failed("its guest does not pause"))?;
        let create = json!({
            "snapshot_type": "Full",
            "snapshot_path": prepared.snapshot.join(STATE),
            "mem_file_path": prepared.snapshot.join(MEMORY),
        });
        process.client.put("/snapshot/create", &create).map_err(failed("it takes no snapshot"))?;
        Ok(prepared)
    }
}

fn failed(what: &'static str) -> impl FnOnce(RestError) -> BenchError {
    move |source| BenchError::Api { what, source }
}

/// Another VMM that has a snapshot of the guest.
pub struct Prepared {
    program: PathBuf,
    /// The directory of the snapshot.
    pub snapshot: PathBuf,
    /// What it says of its version.
    pub version: String,
}

/// One of its processes.
pub struct Process {
    child: Child,
    client: RestClient,
    /// Where its guest is called.
    pub vsock: PathBuf,
}

impl Prepared {
    /// Starts a process, and waits until its API takes a connection.
    pub fn start(&self, place: &Workplace, name: &str) -> Result<Process, BenchError> {
        let dir = place.path(name);
        let api = dir.join("api.sock");
        std::fs::create_dir_all(&dir).map_err(io_error("cannot make a directory"))?;
        for socket in [&api, &dir.join(VSOCK)] {
            let _ = std::fs::remove_file(socket);
        }
        let mut command = Command::new(&self.program);
        command.current_dir(&dir).arg("--api-sock").arg("api.sock").args(["--id", "peer", "--level", "Warning"]);
        let mut child = Children::start_other("other VMM", &place.path(&format!("{name}.log")), command)?;
        let client = connect(&mut child, &api)?;
        Ok(Process { child, client, vsock: dir.join(VSOCK) })
    }
}

impl Process {
    /// Loads the snapshot, and lets the guest run.
    pub fn load(&mut self, Prepared { snapshot, .. }: &Prepared) -> Result<(), BenchError> {
        let load = json!({
            "snapshot_path": snapshot.join(STATE),
            "mem_backend": { "backend_type": "File", "backend_path": snapshot.join(MEMORY) },
            "resume_vm": true,
        });
        self.client.put("/snapshot/load", &load).map_err(failed("another VMM does not load its snapshot"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_named_with_its_program() {
        let peer = Peer::parse("firecracker=/a=b".as_ref()).unwrap();
        assert_eq!(peer, Peer { kind: Kind::Firecracker, program: "/a=b".into() });
        for bad in ["", "firecracker", "firecracker=", "qemu=/q"] {
            assert!(Peer::parse(bad.as_ref()).unwrap_err().contains("firecracker=PROGRAM"), "{bad}");
        }
    }
}
