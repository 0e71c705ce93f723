//! A client of the vmm's REST API with a method for each call.

use super::rest::{RestClient, RestError};
use crate::devices::{
    Balloon, BalloonStatistics, BalloonStatisticsUpdate, BalloonUpdate, Drive, DriveUpdate, Entropy, NetworkInterface,
    NetworkUpdate, Serial,
};
use crate::fork::{ForkLoad, VmFork, VmForked};
use crate::logger::{Logger, MetricsSink};
use crate::reset::{VmCheckpoint, VmCheckpointed, VmReset, VmResetDone};
use crate::saved::{SavedState, VmStop, VmStopped};
use crate::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotLoad, SnapshotStatus};
use crate::stats::{MemoryMap, MemoryMapQuery, VmStats};
use crate::vm::{
    Action, ActionType, BootSource, InstanceInfo, MachineConfig, MachinePatch, Version, VmConfig, VmPatch, VmSave,
    VmState, Vsock,
};
use std::path::Path;
use std::time::Duration;

/// A connection to a vmm's API.
///
/// A call that is refused has changed nothing and is a [`RestError::Refused`], whose message is the vmm's own words. A call
/// fails with [`RestError::Connect`] when the vmm is gone, and with [`RestError::Io`] when it went, or has not answered in time;
/// of a call that changes something nobody can tell then whether it was done. After that the client can be used on: the next call
/// makes a new connection.
///
/// Each call may take as long as [`connect`](VmClient::connect) or, later, [`set_patience`](VmClient::set_patience) says.
/// Most answer within milliseconds. [`snapshot_create`](VmClient::snapshot_create), [`save`](VmClient::save),
/// [`stop`](VmClient::stop) and [`snapshot_load`](VmClient::snapshot_load) may take as long as the disk needs for all of the guest's memory.
#[derive(Debug)]
pub struct VmClient {
    rest: RestClient,
}

type Done = Result<(), RestError>;

impl VmClient {
    /// Connects to the API at `path`. Each later call may take `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, RestError> {
        Ok(VmClient { rest: RestClient::connect(path, patience)? })
    }

    /// Sets how long each later call may take.
    pub fn set_patience(&mut self, patience: Duration) {
        self.rest.set_patience(patience);
    }

    /// The connection, for calls of any form.
    pub fn rest(&mut self) -> &mut RestClient {
        &mut self.rest
    }

    /// Where the VM stands.
    pub fn info(&mut self) -> Result<InstanceInfo, RestError> {
        self.rest.get("/")
    }

    /// The vmm's version.
    pub fn version(&mut self) -> Result<Version, RestError> {
        self.rest.get("/version")
    }

    /// The whole configuration in force.
    pub fn config(&mut self) -> Result<VmConfig, RestError> {
        self.rest.get("/vm/config")
    }

    /// The vCPUs and the memory.
    pub fn machine_config(&mut self) -> Result<MachineConfig, RestError> {
        self.rest.get("/machine-config")
    }

    /// Sets the vCPUs and the memory, before the start.
    pub fn put_machine_config(&mut self, machine: &MachineConfig) -> Done {
        self.rest.put("/machine-config", machine)
    }

    /// Changes some of the vCPUs, the memory and its limit; after the start the limit only.
    pub fn patch_machine_config(&mut self, patch: &MachinePatch) -> Done {
        self.rest.patch("/machine-config", patch)
    }

    /// Sets what to boot, before the start.
    pub fn put_boot_source(&mut self, source: &BootSource) -> Done {
        self.rest.put("/boot-source", source)
    }

    /// Adds a disk, or replaces the one of that name, before the start.
    pub fn put_drive(&mut self, drive: &Drive) -> Done {
        self.rest.put(&format!("/drives/{}", drive.drive_id), drive)
    }

    /// Changes the bounds of a disk, after the start.
    pub fn patch_drive(&mut self, update: &DriveUpdate) -> Done {
        self.rest.patch(&format!("/drives/{}", update.drive_id), update)
    }

    /// Adds a network interface, or replaces the one of that name, before the start.
    pub fn put_network_interface(&mut self, interface: &NetworkInterface) -> Done {
        self.rest.put(&format!("/network-interfaces/{}", interface.iface_id), interface)
    }

    /// Changes the bounds of a network interface, after the start.
    pub fn patch_network_interface(&mut self, update: &NetworkUpdate) -> Done {
        self.rest.patch(&format!("/network-interfaces/{}", update.iface_id), update)
    }

    /// Sets the vsock device, before the start.
    pub fn put_vsock(&mut self, vsock: &Vsock) -> Done {
        self.rest.put("/vsock", vsock)
    }

    /// Sets the source of entropy, before the start.
    pub fn put_entropy(&mut self, entropy: &Entropy) -> Done {
        self.rest.put("/entropy", entropy)
    }

    /// Sets where the guest's console leads, before the start.
    pub fn put_serial(&mut self, serial: &Serial) -> Done {
        self.rest.put("/serial", serial)
    }

    /// Sets where the VM is saved when it is stopped, before the start.
    pub fn put_saved_state(&mut self, saved_state: &SavedState) -> Done {
        self.rest.put("/saved-state", saved_state)
    }

    /// The balloon as configured. Refused if there is none.
    pub fn balloon(&mut self) -> Result<Balloon, RestError> {
        self.rest.get("/balloon")
    }

    /// Sets the balloon, before the start.
    pub fn put_balloon(&mut self, balloon: &Balloon) -> Done {
        self.rest.put("/balloon", balloon)
    }

    /// Changes how much memory the guest shall give back, after the start.
    pub fn patch_balloon(&mut self, update: &BalloonUpdate) -> Done {
        self.rest.patch("/balloon", update)
    }

    /// How much memory the guest has given back, and what it says of its memory, after the start.
    pub fn balloon_statistics(&mut self) -> Result<BalloonStatistics, RestError> {
        self.rest.get("/balloon/statistics")
    }

    /// Changes how often the guest reports on its memory, after the start.
    pub fn patch_balloon_statistics(&mut self, update: &BalloonStatisticsUpdate) -> Done {
        self.rest.patch("/balloon/statistics", update)
    }

    /// Boots the configured VM. The answer comes when its vCPUs run.
    pub fn start(&mut self) -> Done {
        self.action(ActionType::InstanceStart)
    }

    /// Writes the counters to the metrics path, which must have been set.
    pub fn flush_metrics(&mut self) -> Done {
        self.action(ActionType::FlushMetrics)
    }

    fn action(&mut self, action_type: ActionType) -> Done {
        self.rest.put("/actions", &Action { action_type })
    }

    /// Stops the vCPUs. The answer comes when they stand still; asking twice is fine.
    pub fn pause(&mut self) -> Done {
        self.patch_vm(VmState::Paused)
    }

    /// Lets the vCPUs run; asking twice is fine.
    pub fn resume(&mut self) -> Done {
        self.patch_vm(VmState::Resumed)
    }

    fn patch_vm(&mut self, state: VmState) -> Done {
        self.rest.patch("/vm", &VmPatch { state })
    }

    /// Takes a snapshot, and has the vmm end once it is complete. The answer comes when it is.
    pub fn save(&mut self, save: &VmSave) -> Done {
        self.rest.put("/vm/save", save)
    }

    /// Saves the guest, shuts it down or ends it, after the start; then the vmm ends. The answer says what became of it.
    pub fn stop(&mut self, stop: VmStop) -> Result<VmStopped, RestError> {
        self.rest.ask("PUT", "/vm/stop", &stop)
    }

    /// Remembers what the VM is, for it to be reset to, after the start.
    pub fn checkpoint(&mut self, checkpoint: &VmCheckpoint) -> Result<VmCheckpointed, RestError> {
        self.rest.ask("PUT", "/vm/checkpoint", checkpoint)
    }

    /// Makes the VM what it was at the checkpoint.
    pub fn reset(&mut self, reset: &VmReset) -> Result<VmResetDone, RestError> {
        self.rest.ask("PUT", "/vm/reset", reset)
    }

    /// Gives other vmms clones of the VM as it is now, after the start.
    pub fn fork(&mut self, fork: &VmFork) -> Result<VmForked, RestError> {
        self.rest.ask("PUT", "/vm/fork", fork)
    }

    /// As [`rest::PassingCall`](super::rest::PassingCall) does it, but that no descriptors go with it: it can only be refused.
    pub fn fork_load(&mut self, load: &ForkLoad) -> Done {
        self.rest.put("/fork/load", load)
    }

    /// What the VM has done, and what its memory consists of, after the start.
    pub fn stats(&mut self) -> Result<VmStats, RestError> {
        self.rest.get("/vm/stats")
    }

    /// Of which kind each page of guest memory is, after the start. Where the answer has a `next`, that is the `start` of
    /// the next question.
    pub fn memory_map(&mut self, query: MemoryMapQuery) -> Result<MemoryMap, RestError> {
        let MemoryMapQuery { start, max_runs } = query;
        self.rest.get(&format!("/vm/memory-map?start={start}&max_runs={max_runs}"))
    }

    /// Takes a snapshot, after the start. The answer comes when it is complete on disk.
    pub fn snapshot_create(&mut self, create: &SnapshotCreate) -> Done {
        self.rest.put("/snapshot/create", create)
    }

    /// Restores a VM from a snapshot, in a vmm for which nothing was configured. One that fails leaves nothing behind.
    pub fn snapshot_load(&mut self, load: &SnapshotLoad) -> Done {
        self.rest.put("/snapshot/load", load)
    }

    /// Gives up the snapshot that is being written.
    pub fn snapshot_cancel(&mut self, cancel: &SnapshotCancel) -> Done {
        self.rest.put("/snapshot/cancel", cancel)
    }

    /// How the last snapshot went, or how far it is.
    pub fn snapshot_status(&mut self) -> Result<SnapshotStatus, RestError> {
        self.rest.get("/snapshot/status")
    }

    /// Changes where the log goes and what is in it.
    pub fn put_logger(&mut self, logger: &Logger) -> Done {
        self.rest.put("/logger", logger)
    }

    /// Sets where counters are written, before the start.
    pub fn put_metrics(&mut self, sink: &MetricsSink) -> Done {
        self.rest.put("/metrics", sink)
    }

    /// All counters, in the text form that Prometheus reads.
    pub fn metrics(&mut self) -> Result<String, RestError> {
        self.rest.get_text("/metrics")
    }
}
