//! Firecracker: configured and told what to do by its REST API, its guest called through the socket of its vsock device.

use super::super::BenchError;
use super::super::guest::{PATIENCE, Workplace};
use super::{Prepared, remove};
use crate::children::{Child, Children};
use api_spec::agent::Request;
use api_spec::client::rest::RestError;
use api_spec::client::{AgentClient, RestClient};
use api_spec::vm::MachineConfig;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// How its socket of the vsock device is called in the directory of a process.
const VSOCK: &str = "guest.vsock";
/// Files of a snapshot.
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// A process.
pub struct Process {
    child: Child,
    client: RestClient,
    /// Where its guest is called.
    vsock: PathBuf,
}

/// Takes the snapshot, and tells the version.
pub fn prepare(
    prepared: &Prepared,
    place: &Workplace,
    something: impl FnOnce(&mut AgentClient) -> Result<(), BenchError>,
) -> Result<String, BenchError> {
    let Prepared { kernel, snapshot, machine, .. } = prepared;
    let mut process = Process::start(prepared, place, "parent")?;
    let version: Value = process.client.get("/version").map_err(failed("its version"))?;
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
    let times = (PATIENCE, deadline);
    let mut agent = process.child.first_reply(&process.vsock, times, ping, || place.go_on(), BenchError::Agent)?;
    something(&mut agent)?;
    drop(agent);
    process.client.patch("/vm", &json!({ "state": "Paused" })).map_err(failed("its guest does not pause"))?;
    let create = json!({
        "snapshot_type": "Full",
        "snapshot_path": snapshot.join(STATE),
        "mem_file_path": snapshot.join(MEMORY),
    });
    process.client.put("/snapshot/create", &create).map_err(failed("it takes no snapshot"))?;
    Ok(version["firecracker_version"].as_str().unwrap_or("unknown").to_owned())
}

fn failed(what: &'static str) -> impl FnOnce(RestError) -> BenchError {
    move |source| BenchError::Api { what, source }
}

impl Process {
    /// Starts a process, and waits until its API takes a connection.
    pub fn start(prepared: &Prepared, place: &Workplace, name: &str) -> Result<Self, BenchError> {
        let dir = prepared.room(place, name)?;
        let (api, vsock, log) = (dir.join("api.sock"), dir.join(VSOCK), dir.join("log"));
        remove(&api);
        remove(&vsock);
        let mut child = Children::start_other("other VMM", &log, &prepared.program, |vmm| {
            vmm.current_dir(&dir).args(["--api-sock", "api.sock", "--id", "peer", "--level", "Warning"]);
        })?;
        let client = place.connect(&mut child, &api)?;
        Ok(Process { child, client, vsock })
    }

    /// Loads the snapshot, and lets the guest run.
    pub fn load(&mut self, Prepared { snapshot, .. }: &Prepared) -> Result<(), BenchError> {
        let load = json!({
            "snapshot_path": snapshot.join(STATE),
            "mem_backend": { "backend_type": "File", "backend_path": snapshot.join(MEMORY) },
            "resume_vm": true,
        });
        self.client.put("/snapshot/load", &load).map_err(failed("another VMM does not load its snapshot"))
    }

    /// Calls the agent of the guest.
    pub fn agent(&self) -> Result<AgentClient, BenchError> {
        AgentClient::connect(&self.vsock, PATIENCE).map_err(BenchError::Agent)
    }
}
