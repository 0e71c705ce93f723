//! The REST API: HTTP/1.1 on a Unix socket.
//!
//! ```text
//!   socket --server--> bytes --http--> Message --router--> Request --> the driver, which owns the VM
//! ```
//!
//! [`http`] and [`router`] are pure; [`server`] does the I/O on the event loop's thread.

pub mod http;
pub mod router;
pub mod server;

use api_spec::devices::{
    Balloon, BalloonStatisticsUpdate, BalloonUpdate, Drive, DriveUpdate, Entropy, NetworkInterface, NetworkUpdate,
    Serial,
};
use api_spec::error::ErrorBody;
use api_spec::logger::{Logger, MetricsSink};
use api_spec::operations::Operation;
use api_spec::snapshot::{SnapshotCreate, SnapshotLoad};
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
    /// `GET /snapshot/status`
    SnapshotStatus,
}

/// What a JSON body is.
const JSON: &str = "application/json";
/// What plain text is: that of counters, which Prometheus knows by this.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// An answer: a status and a body, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// What the body is.
    pub content_type: &'static str,
    /// Body; empty with status 204.
    pub body: Vec<u8>,
}

impl Response {
    /// 204: done, nothing to say.
    pub fn done() -> Self {
        Response { status: 204, content_type: JSON, body: Vec::new() }
    }

    /// 200 with a document.
    pub fn document(document: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(document) {
            Ok(mut body) => {
                body.push(b'\n');
                Response { status: 200, content_type: JSON, body }
            }
            Err(e) => Response::fault(500, &format!("cannot encode the answer: {e}")),
        }
    }

    /// 200 with plain text.
    pub fn text(text: String) -> Self {
        Response { status: 200, content_type: TEXT, body: text.into_bytes() }
    }

    /// An error with its message.
    pub fn fault(status: u16, message: &str) -> Self {
        Response::refusal(status, &ErrorBody { fault_message: message.to_owned(), config: None })
    }

    /// An error.
    pub fn refusal(status: u16, error: &ErrorBody) -> Self {
        Response { status, content_type: JSON, body: serde_json::to_vec(error).unwrap_or_default() }
    }
}
