//! REST documents that describe a VM, and the configuration file, which holds the same objects.

use crate::devices::{Balloon, Drive, Entropy, NetworkInterface, Serial};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The configuration file of `vmm --config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What to boot.
    #[serde(rename = "boot-source", default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// CPUs and memory.
    #[serde(rename = "machine-config", default)]
    pub machine_config: MachineConfig,
    /// The vsock device, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The disks. The root disk becomes the first, the others follow in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// The network interfaces, in the order in which the guest finds them.
    #[serde(rename = "network-interfaces", default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The source of entropy, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// Where the guest's console leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The balloon, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
}

/// What to boot: a kernel file, or the embedded guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An uncompressed ELF kernel or a bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_image_path: Option<PathBuf>,
    /// Boot the guest that the vmm carries, instead of a file.
    #[serde(default, skip_serializing_if = "is_false")]
    pub embedded_guest: bool,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; the vmm appends its devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// CPUs and memory of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 8.
    #[serde(default = "one")]
    pub vcpu_count: u8,
    /// Guest memory, in MiB.
    #[serde(default = "default_memory")]
    pub mem_size_mib: u64,
    /// Most private memory, in MiB, that the guest may have before it is paused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_private_mib: Option<u64>,
}

/// Body of `PATCH /machine-config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachinePatch {
    /// The new limit of private memory, in MiB; `null` takes it away.
    #[serde(deserialize_with = "Option::deserialize")]
    pub max_private_mib: Option<u64>,
}

fn one() -> u8 {
    1
}

fn default_memory() -> u64 {
    128
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig { vcpu_count: one(), mem_size_mib: default_memory(), max_private_mib: None }
    }
}

/// The vsock device: on the host it is a Unix socket (see the guide to operations).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or above.
    pub guest_cid: u32,
    /// Path of the Unix socket on the host.
    pub uds_path: PathBuf,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// The state to bring the VM to.
    pub state: VmState,
}

/// States to which a VM can be brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// vCPUs stand still.
    Paused,
    /// vCPUs run.
    Resumed,
}

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// Actions on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Boot the configured VM.
    InstanceStart,
}

/// Body of the answer to `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The VM's id.
    pub id: String,
    /// Where the VM stands.
    pub state: InstanceState,
    /// Version of the vmm.
    pub vmm_version: String,
    /// Name of the program.
    pub app_name: String,
    /// What the agent in the guest has announced, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Readiness>,
    /// The pseudo-terminal that is the guest's console, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// Why the VM was paused, if nobody asked for it: the limit that was reached, by name, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_reason: Option<String>,
}

/// Where a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Nothing has been booted or loaded.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs stand still.
    Paused,
    /// vCPUs run.
    Running,
}

/// What the agent has announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readiness {
    /// The agent answers.
    Agent,
    /// All services have started.
    Full,
    /// All services were started, some failed.
    Degraded,
}

/// Body of the answer to `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the vmm.
    pub firecracker_version: String,
}
