//! The REST API: HTTP/1.1 on a Unix socket.
//!
//! ```text
//!   socket --server--> bytes --http--> Message --router--> Request --> the driver, which owns the VM
//! ```
//!
//! [`http`], [`response`] and [`router`] are pure; [`server`] does the I/O on the event loop's thread.

mod chunked;
pub mod http;
pub mod response;
pub mod router;
pub mod server;

pub use response::{ContentType, Response};

use api_spec::devices::{
    Balloon, BalloonStatisticsUpdate, BalloonUpdate, Drive, DriveUpdate, Entropy, NetworkInterface, NetworkUpdate,
    Serial,
};
use api_spec::fork::{ForkLoad, VmFork};
use api_spec::logger::{Logger, MetricsSink};
use api_spec::operations::Operation;
use api_spec::reset::{VmCheckpoint, VmReset};
use api_spec::saved::{SavedState, VmStop};
use api_spec::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotLoad};
use api_spec::stats::MemoryMapQuery;
use api_spec::vm::{Action, BootSource, MachineConfig, MachinePatch, VmPatch, VmSave, Vsock};

/// A request that has been understood, before anyone has asked whether it is legal now.
#[derive(Clone, Debug)]
pub enum Request {
    /// `GET /`
    Info,
    /// `GET /version`
    Version,
    /// `GET /vm/config`
    Config,
    /// `GET /machine-config`
    GetMachineConfig,
    /// `PUT /machine-config`
    PutMachineConfig(MachineConfig),
    /// `PATCH /machine-config`
    PatchMachineConfig(MachinePatch),
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /vsock`
    PutVsock(Vsock),
    /// `PUT /drives/{drive_id}`
    PutDrive(Drive),
    /// `PATCH /drives/{drive_id}`
    PatchDrive(DriveUpdate),
    /// `PUT /serial`
    PutSerial(Serial),
    /// `PUT /network-interfaces/{iface_id}`
    PutNetworkInterface(NetworkInterface),
    /// `PATCH /network-interfaces/{iface_id}`
    PatchNetworkInterface(NetworkUpdate),
    /// `PUT /entropy`
    PutEntropy(Entropy),
    /// `PUT /saved-state`
    PutSavedState(SavedState),
    /// `PUT /balloon`
    PutBalloon(Balloon),
    /// `GET /balloon`
    GetBalloon,
    /// `PATCH /balloon`
    PatchBalloon(BalloonUpdate),
    /// `GET /balloon/statistics`
    GetBalloonStatistics,
    /// `PATCH /balloon/statistics`
    PatchBalloonStatistics(BalloonStatisticsUpdate),
    /// `PUT /actions`
    Action(Action),
    /// `PATCH /vm`
    PatchVm(VmPatch),
    /// `PUT /vm/save`
    SaveVm(VmSave),
    /// `PUT /vm/stop`
    StopVm(VmStop),
    /// `PUT /vm/checkpoint`
    CheckpointVm(VmCheckpoint),
    /// `PUT /vm/reset`
    ResetVm(VmReset),
    /// `PUT /vm/fork`
    ForkVm(VmFork),
    /// `PUT /fork/load`
    ForkLoad(ForkLoad),
    /// `GET /vm/stats`
    GetStats,
    /// `GET /vm/memory-map`
    GetMemoryMap(MemoryMapQuery),
    /// `GET /metrics`
    GetMetrics,
    /// `PUT /metrics`
    PutMetrics(MetricsSink),
    /// `PUT /logger`
    PutLogger(Logger),
    /// What is known and not offered.
    Declined(&'static Operation),
    /// `PUT /snapshot/create`
    SnapshotCreate(SnapshotCreate),
    /// `PUT /snapshot/load`
    SnapshotLoad(SnapshotLoad),
    /// Give up a snapshot.
    SnapshotCancel(SnapshotCancel),
    /// `GET /snapshot/status`
    SnapshotStatus,
}
