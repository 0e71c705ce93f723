//! REST documents of the snapshot calls.

use crate::mac::MacAddr;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Body of `PUT /snapshot/create`.
///
/// A running VM stands still only while its state is saved; a paused one stays paused. The answer comes when the
/// snapshot is complete on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// The directory to create. It must not exist; its parent must.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub snapshot_path: PathBuf,
    /// Which kind of snapshot; `Full` unless told otherwise.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Another name for the snapshot's memory file, as other VMMs' clients give it: a hard link to the file in the directory,
    /// which must not exist yet, on the same file system. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub mem_file_path: Option<PathBuf>,
    /// Most MiB of memory that are written in a second while the guest runs; no bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_write_mib_s: Option<u64>,
    /// Have the guest's agent run the guest's hooks for a snapshot first, and write back to its disks. There is no snapshot if
    /// one fails.
    #[serde(default, skip_serializing_if = "crate::is_false")]
    pub run_hooks: bool,
    /// Have the guest let go of its caches first, and give its free memory back through its balloon, so that neither is stored.
    /// However far it gets with that, the snapshot is taken.
    #[serde(default, skip_serializing_if = "crate::is_false")]
    pub trim: bool,
}

impl SnapshotCreate {
    /// A full snapshot in this directory.
    pub fn of(snapshot_path: PathBuf) -> Self {
        SnapshotCreate {
            snapshot_path,
            snapshot_type: SnapshotType::Full,
            mem_file_path: None,
            max_write_mib_s: None,
            run_hooks: false,
            trim: false,
        }
    }
}

/// Kinds of snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotType {
    /// All of the guest's memory.
    #[default]
    Full,
    /// Only the memory that is not as it was in the snapshot before it, its parent: the last that was taken of this guest, or else
    /// the one that it was loaded from. The parent is needed to load it. A guest that has none gets a full one.
    Diff,
}

/// Body of `PUT /snapshot/cancel`: nothing is to be said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCancel {}

/// Body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The snapshot directory, or the `snap.json` in it.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub snapshot_path: PathBuf,
    /// Where memory comes from; the snapshot's own memory file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// Deprecated: the memory file, as `mem_backend` of type `File` names it. One of the two may be given.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(extend("deprecated" = true))]
    #[schemars(length(min = 1))]
    pub mem_file_path: Option<PathBuf>,
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
    /// Advance the guest's monotonic clock (kvmclock) by the time that has passed since the snapshot. Otherwise it goes on
    /// from where it stood.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Taken for the sake of clients that send it: a guest's own pages are known here without tracking anything.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Deprecated name of `track_dirty_pages`.
    #[serde(default, skip_serializing_if = "crate::is_false")]
    #[schemars(extend("deprecated" = true))]
    pub enable_diff_snapshots: bool,
    /// Size of the host's pages behind guest memory. `Snapshot` and `None` mean 4 KiB; the others are refused by name.
    #[serde(default)]
    pub huge_pages: LoadHugePages,
    /// Most private memory, in MiB, at least 1, that the guest may have before it is paused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_private_mib: Option<u64>,
    /// Have pages ready, while the guest runs, that earlier clones have used, if that was learnt (`working-set.json` beside the
    /// snapshot). Not in copy mode.
    #[serde(default = "yes")]
    pub replay_working_set: bool,
    /// In what the host may differ from what the snapshot needs. That is logged as a warning; the guest may fail at any time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_mismatch: Vec<AllowedMismatch>,
}

/// In what a host may be allowed to differ from what a snapshot needs. Architecture and size of pages are never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AllowedMismatch {
    /// Another maker of the CPU.
    Vendor,
    /// Features that the CPU lacks.
    CpuFeatures,
    /// A shorter XSAVE area, or one that is laid out otherwise.
    Xsave,
    /// Another frequency of the time-stamp counter, which cannot be scaled.
    TscKhz,
}

fn yes() -> bool {
    true
}

/// Size of the host's pages behind a restored guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LoadHugePages {
    /// As it was when the snapshot was taken: 4 KiB.
    #[default]
    Snapshot,
    /// 4 KiB.
    None,
    /// 2 MiB where the kernel finds them. Not offered.
    Transparent,
    /// 2 MiB out of the host's pool. Not offered.
    #[serde(rename = "2M")]
    TwoMib,
}

impl SnapshotLoad {
    /// Loading this snapshot, and nothing said beyond that: from its own memory file, paused, with a fresh generation id.
    pub fn of(snapshot_path: PathBuf) -> Self {
        SnapshotLoad {
            snapshot_path,
            mem_backend: None,
            mem_file_path: None,
            resume_vm: false,
            vsock_override: None,
            drive_overrides: Vec::new(),
            network_overrides: Vec::new(),
            new_generation: true,
            clock_realtime: false,
            track_dirty_pages: false,
            enable_diff_snapshots: false,
            huge_pages: LoadHugePages::Snapshot,
            max_private_mib: None,
            replay_working_set: true,
            allow_mismatch: Vec::new(),
        }
    }
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// A file or a socket, according to `backend_type`.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub backend_path: PathBuf,
    /// How memory is provided.
    pub backend_type: MemBackendType,
    /// What becomes of the guest when the page server dies or hangs; `failover` when absent. Not for a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_handler_loss: Option<OnHandlerLoss>,
}

impl MemBackend {
    /// Memory from there, and nothing said beyond that.
    pub fn of(backend_type: MemBackendType, backend_path: PathBuf) -> Self {
        MemBackend { backend_path, backend_type, on_handler_loss: None }
    }
}

/// What becomes of a guest when its page server dies, hangs, or cannot get its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnHandlerLoss {
    /// The vmm serves its pages itself, from the snapshot's memory file, until there is a page server again. Where it cannot,
    /// `reattach`.
    #[default]
    Failover,
    /// It waits for a page server at the same place. After a second it is paused, and goes on when there is one.
    Reattach,
    /// It is paused at once, and goes on when there is a page server again.
    Pause,
    /// It ends: at once if the page server is gone, after 5 s if it does not answer.
    Kill,
}

/// How a guest's memory is provided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MemBackendType {
    /// A raw memory file, mapped privately; the kernel pages it in. One that is not the snapshot's own is checked whole.
    File,
    /// A page server that speaks Firecracker's protocol: it copies every page that the guest touches, and shares none.
    Uffd,
    /// Our page server in shared mode: clones share every page that they have not written.
    UffdShared,
}

/// Another host side for a restored vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The Unix socket that stands for the device on the host, at most 107 bytes.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1, max = 107))]
    pub uds_path: PathBuf,
}

/// Another place of a disk's image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Name of the disk.
    pub drive_id: String,
    /// The image.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub path_on_host: PathBuf,
}

/// Another host side for a restored network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

/// Body of the answer to `GET /snapshot/status`: how the last snapshot that was begun went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotStatus {
    /// Where it stands.
    pub state: SnapshotState,
    /// The directory that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_path: Option<PathBuf>,
    /// How long the guest stood still, in microseconds.
    #[serde(default)]
    pub pause_us: u64,
    /// From when the guest was prepared for it, if it was to be, until the snapshot was complete on disk, in microseconds.
    #[serde(default)]
    pub total_us: u64,
    /// Bytes of memory that were written (holes are not), so far if it is being written.
    #[serde(default)]
    pub memory_bytes: u64,
    /// The snapshot that this one lies over; absent if it stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    /// What the guest gave back for it; absent if it was not to, or has not yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trimmed: Option<Trimmed>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a guest gave back for a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Trimmed {
    /// Memory that it gave back, in bytes, as the host counts them.
    pub given_back_bytes: u64,
    /// How long that took, and its hooks, in microseconds. The guest ran meanwhile.
    pub took_us: u64,
    /// Why it was less than it could be, or is not over yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortfall: Option<String>,
}

impl SnapshotStatus {
    /// Of a snapshot into this directory that is being written, or waits for the end of one before it.
    pub fn writing(snapshot_path: PathBuf) -> Self {
        SnapshotStatus { state: SnapshotState::Writing, snapshot_path: Some(snapshot_path), ..Default::default() }
    }
}

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// None was asked for.
    #[default]
    None,
    /// The guest prepares for it, and runs.
    Preparing,
    /// Memory is being written in the background.
    Writing,
    /// Complete on disk.
    Done,
    /// Failed; nothing was left on disk.
    Failed,
}
