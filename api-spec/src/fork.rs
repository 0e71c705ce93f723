//! REST documents of a VM that is forked: made several while it runs.

use crate::devices::{Balloon, Drive, Entropy, NetworkInterface};
use crate::snapshot::{MemBackend, NetworkOverride, VsockOverride};
use crate::vm::Vsock;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most clones of one fork.
pub const MAX_CLONES: usize = 64;
/// Most layers of a disk that are handed on to clones.
pub const MAX_DISK_LAYERS: usize = 8;

/// Body of `PUT /vm/fork`: each of some other vmms gets a clone of the VM as it is now. The VM itself goes on, whatever becomes of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmFork {
    /// The vmms that are to have a clone each, up to 64. They have no VM yet: shells that fit, which is fastest, or vmms that wait for
    /// the API.
    pub into: Vec<ForkTarget>,
    /// How many those are, for whoever wants that checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Let the clones' vCPUs run.
    #[serde(default = "yes")]
    pub resume_vm: bool,
    /// Give each clone a generation id of its own, so that its guest knows that it is another one.
    #[serde(default = "yes")]
    pub new_generation: bool,
}

/// A vmm that is to have a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkTarget {
    /// Unix socket of its API, at most 107 bytes.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1, max = 107))]
    pub api_sock: PathBuf,
    /// Where its vsock device listens. A shell has its own already; any other vmm needs this, if there is such a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Its tap devices, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
}

/// Answer to `PUT /vm/fork`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmForked {
    /// How long the VM stood still, in microseconds.
    pub pause_us: u64,
    /// Until the last clone was there, or had failed, in microseconds.
    pub total_us: u64,
    /// Pages of the VM's own that were copied for the clones, which share the copy.
    pub copied_pages: u64,
    /// The clones, in the order in which they were asked for.
    pub clones: Vec<ForkedClone>,
}

/// What became of a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ForkedClone {
    /// Unix socket of its API.
    pub api_sock: PathBuf,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Body of `PUT /fork/load`, by which a vmm that forks its VM makes the one that it talks to a clone. It is the only call of its
/// connection. Descriptors come with its first byte (`SCM_RIGHTS`): a file in memory that holds the state of the machine and then the
/// maps of the layers of memory and of the disks; each layer of memory, the uppermost first; the file that they lie over, unless a page
/// server has it; and for each disk its layers, the uppermost first, and its image, if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkLoad {
    /// Version of the vmm that forks, which must be that of the one that is asked.
    pub vmm_version: String,
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// The vsock device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The disks, the root disk first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<ForkDrive>,
    /// The network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The source of entropy, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The balloon, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Where the pages come from that the layers do not hold, if that is a page server; no file comes with the call then for them to lie
    /// over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served: Option<ForkServed>,
    /// Most memory that the guest may have of its own, in MiB, if there is a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_private_mib: Option<u64>,
    /// Length of the machine's state, in bytes.
    pub state_bytes: u64,
    /// The layers, the uppermost first.
    pub layers: Vec<ForkLayer>,
    /// Let the vCPUs run.
    pub resume_vm: bool,
    /// Give the guest a generation id of its own.
    pub new_generation: bool,
    /// Where the vsock device listens, if not where the shell's does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Tap devices, if not those of the shell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
}

/// Pages that lie over others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkLayer {
    /// Length of the map that says which, in bytes.
    pub map_bytes: u64,
    /// They lie one behind the other in the layer's file, which is sealed. Otherwise each lies at its place in guest memory.
    pub packed: bool,
}

/// A disk of the VM that is forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkDrive {
    /// How it is configured. Nothing is opened at its path: that is where snapshots of the clone say that the image is.
    pub drive: Drive,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// The image, if a descriptor of one comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ForkImage>,
    /// The length of each layer's map, in bytes, the uppermost first; up to 8. A disk that can be written has an overlay over them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_map_bytes: Vec<u64>,
}

/// The image of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkImage {
    /// When it was last changed, in nanoseconds since the Unix epoch, unless it is a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_ns: Option<i64>,
}

/// A page server, and what it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkServed {
    /// The snapshot that the VM was once restored from.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub snapshot_path: PathBuf,
    /// The digest of its manifest, since another one may be there by now.
    pub digest: String,
    /// The page server.
    pub mem_backend: MemBackend,
}

fn yes() -> bool {
    true
}
