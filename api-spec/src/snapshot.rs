//! REST documents of the snapshot calls.

use crate::mac::MacAddr;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Body of `PUT /snapshot/create`.
///
/// A running VM stands still only while its state is saved; a paused one stays paused. The answer comes when the
/// snapshot is complete on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// The directory to create. It must not exist; its parent must.
    pub snapshot_path: PathBuf,
    /// Which kind of snapshot; `Full` unless told otherwise.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Other VMMs keep the memory apart from the rest; here it is part of the directory, so a value is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
}

/// Kinds of snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of the guest's memory.
    #[default]
    Full,
    /// Only what changed since the parent. Not offered yet: refused by name.
    Diff,
}

/// Body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The snapshot directory, or the `snap.json` in it.
    pub snapshot_path: PathBuf,
    /// Where memory comes from; the snapshot's own memory file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// Run the vCPUs at once; otherwise the VM is left paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// Another host side for the vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Other places of disk images. The images must be those that the snapshot was taken over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Other host sides for network interfaces; those not named are as they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Write a fresh generation id into the guest before any vCPU runs. On unless told otherwise; turning it off makes
    /// clones indistinguishable to themselves and is meant for tests.
    #[serde(default = "yes")]
    pub new_generation: bool,
    /// Most private memory, in MiB, that the guest may have before it is paused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_private_mib: Option<u64>,
}

fn yes() -> bool {
    true
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// A file or a socket, according to `backend_type`.
    pub backend_path: PathBuf,
    /// How memory is provided.
    pub backend_type: MemBackendType,
}

/// How a guest's memory is provided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemBackendType {
    /// A raw memory file, mapped privately; the kernel pages it in.
    File,
    /// A page server of the copy-mode protocol. Not offered yet: refused by name.
    Uffd,
    /// Our page server in shared mode: clones share every page that they have not written.
    UffdShared,
}

/// Another host side for a restored vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The Unix socket that stands for the device on the host.
    pub uds_path: PathBuf,
}

/// Another place of a disk's image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Name of the disk.
    pub drive_id: String,
    /// The image.
    pub path_on_host: PathBuf,
}

/// Another host side for a restored network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Name of the interface in the snapshot.
    pub iface_id: String,
    /// Name of the tap device for it.
    pub host_dev_name: String,
    /// Another MAC address. A guest that runs already goes on with the one that it has until its agent is told to change
    /// it ([`Interface`](crate::agent::linux::Interface)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddr>,
}

/// Body of the answer to `GET /snapshot/status`: how the last `PUT /snapshot/create` went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// Where it stands.
    pub state: SnapshotState,
    /// How long the guest stood still, in microseconds.
    #[serde(default)]
    pub pause_us: u64,
    /// From the request until the snapshot was complete on disk, in microseconds.
    #[serde(default)]
    pub total_us: u64,
    /// Bytes of memory that were written (holes are not).
    #[serde(default)]
    pub memory_bytes: u64,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// None was asked for.
    #[default]
    None,
    /// Memory is being written in the background.
    Writing,
    /// Complete on disk.
    Done,
    /// Failed; nothing was left on disk.
    Failed,
}
