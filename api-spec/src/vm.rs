//! REST documents that describe a VM, and the configuration file, which holds the same objects.

use crate::NotOffered;
use crate::devices::{Balloon, Drive, Entropy, NetworkInterface, Serial};
use crate::logger::{Logger, MetricsSink};
use crate::saved::{Saved, SavedState, Started};
use crate::stats::PageServerState;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::PathBuf;

/// A VM as it is configured: the answer to `GET /vm/config`, and the configuration file of `vmm --config`.
///
/// The keys of devices that are not offered may be `null`, as configuration generators write them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// The network interfaces, in the order in which the guest finds them.
    #[serde(rename = "network-interfaces", default)]
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
    /// Where the log goes, and what is in it. Set at the start of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where counters are written. Set at the start of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsSink>,
    /// Where the VM is saved when it is stopped, if anywhere.
    #[serde(rename = "saved-state", default, skip_serializing_if = "Option::is_none")]
    pub saved_state: Option<SavedState>,
    /// A CPU template. Not offered: anything but `null` is refused by name.
    #[serde(rename = "cpu-config", default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub cpu_config: NotOffered,
    /// A metadata service. Not offered: anything but `null` is refused by name.
    #[serde(rename = "mmds-config", default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub mmds_config: NotOffered,
    /// Persistent-memory devices. Not offered: anything but `null` is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub pmem: NotOffered,
    /// Memory that can be plugged in. Not offered: anything but `null` is refused by name.
    #[serde(rename = "memory-hotplug", default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub memory_hotplug: NotOffered,
}

/// What to boot: a kernel file, or the embedded guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An uncompressed ELF kernel or a bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub kernel_image_path: Option<PathBuf>,
    /// Boot the guest that the vmm carries, instead of a file.
    #[serde(default, skip_serializing_if = "crate::is_false")]
    pub embedded_guest: bool,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; the vmm appends its devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// CPUs and memory of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 8.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 8))]
    pub vcpu_count: u8,
    /// Guest memory, in MiB, 8 to 1048576.
    #[serde(default = "default_memory")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub mem_size_mib: u64,
    /// Show pairs of vCPUs to the guest as threads of one core. Not offered: `true` is refused by name.
    #[serde(default)]
    pub smt: bool,
    /// Taken for the sake of clients that send it: a guest's own pages are known here without tracking anything.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Size of the host's pages behind guest memory. Only `None` is offered; the others are refused by name.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// A CPU template. Only `None` is offered; the others are refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Most private memory, in MiB, at least 1, that the guest may have before it is paused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_private_mib: Option<u64>,
}

/// Size of the host's pages behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HugePages {
    /// 4 KiB.
    #[default]
    None,
    /// 2 MiB where the kernel finds them. Not offered.
    Transparent,
    /// 2 MiB out of the host's pool. Not offered.
    #[serde(rename = "2M")]
    TwoMib,
}

/// Sets of CPU features that a guest may be limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuTemplate {
    /// All that KVM offers.
    None,
    /// Not offered.
    C3,
    /// Not offered.
    T2,
    /// Not offered.
    T2S,
    /// Not offered.
    T2CL,
    /// Not offered.
    T2A,
    /// Not offered.
    V1N1,
}

/// Body of `PATCH /machine-config`: the fields to change, at least one; the others stay. After the start only
/// `max_private_mib` can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("minProperties" = 1))]
pub struct MachinePatch {
    /// Number of vCPUs, 1 to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 8))]
    pub vcpu_count: Option<u8>,
    /// Guest memory, in MiB, 8 to 1048576.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub mem_size_mib: Option<u64>,
    /// Show pairs of vCPUs to the guest as threads of one core. Not offered: `true` is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Taken for the sake of clients that send it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Size of the host's pages behind guest memory. Only `None` is offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// A CPU template. Only `None` is offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// The new limit of private memory, in MiB, at least 1; `null` takes it away.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    #[schemars(with = "Option<u64>", range(min = 1))]
    pub max_private_mib: Option<Option<u64>>,
}

/// A field that was given, whose value may be `null`: unlike one that is absent, it says something.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// A field that may be `null`, which is as if it were absent.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Option::deserialize(from).map(Option::unwrap_or_default)
}

fn one() -> u8 {
    1
}

fn default_memory() -> u64 {
    128
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vcpu_count: one(),
            mem_size_mib: default_memory(),
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
            max_private_mib: None,
        }
    }
}

/// The vsock device: on the host it is a Unix socket (see the guide to operations).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 to 4294967294.
    #[schemars(range(min = 3, max = 4_294_967_294_u32))]
    pub guest_cid: u32,
    /// Path of the Unix socket on the host, at most 107 bytes. It must not exist when the VM starts.
    #[schemars(length(min = 1, max = 107))]
    pub uds_path: PathBuf,
    /// Deprecated: a name, which nothing reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("deprecated" = true))]
    pub vsock_id: Option<String>,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// The state to bring the VM to.
    pub state: VmState,
}

/// States to which a VM can be brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// vCPUs stand still.
    Paused,
    /// vCPUs run.
    Resumed,
}

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// Actions on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActionType {
    /// Boot the configured VM.
    InstanceStart,
    /// Write the counters to the metrics path, which must have been set.
    FlushMetrics,
    /// Press Ctrl+Alt+Del. Not offered, as guests have no keyboard: refused by name. Ask the guest's agent.
    SendCtrlAltDel,
}

/// Body of `PUT /vm/save`: a snapshot is taken, and the vmm ends once it is complete on disk.
///
/// The guest stands still from then on. If the snapshot fails, the guest goes on as before and the vmm stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSave {
    /// The directory to create. It must not exist; its parent must.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub snapshot_path: PathBuf,
}

/// Body of the answer to `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceInfo {
    /// The VM's id.
    pub id: String,
    /// Where the VM stands.
    pub state: InstanceState,
    /// Version of the vmm.
    pub vmm_version: String,
    /// Name of the program.
    pub app_name: String,
    /// What the agent in the guest has announced, once it has. A clone's announces itself anew, when it has been given an
    /// identity; the embedded guest's does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Readiness>,
    /// The pseudo-terminal that is the guest's console, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// Why the VM was paused, if nobody asked for it: the limit that was reached, by name, and what to do. It is there already while a vCPU
    /// that waits for a page keeps the VM from standing still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_reason: Option<String>,
    /// Who serves the guest's pages, if they come from a page server; `GET /vm/stats` has more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_server: Option<PageServerState>,
    /// How the VM was started, if its configuration has a `saved-state`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Started>,
    /// What there is of its saved state, if its configuration has a `saved-state`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<Saved>,
}

/// Where a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// Version of the vmm.
    pub firecracker_version: String,
}
