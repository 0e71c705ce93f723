//! REST documents of what a VM has done and what memory it has.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Answer to `GET /vm/stats`. Counters begin with the process, also those of a clone, and never fall.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmStats {
    /// For how long this process has run, in microseconds.
    pub uptime_us: u64,
    /// Page faults of this process's own threads, which says little of the guest.
    pub page_faults: PageFaults,
    /// What the API was asked.
    pub api: ApiStats,
    /// How long operations took.
    pub latencies: Latencies,
    /// What the last operation of each kind spent its time on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traces: Vec<PhaseTrace>,
    /// What guest memory consists of.
    pub memory: MemoryStats,
    /// How the page server has done, if memory comes from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_server: Option<PageServerStats>,
    /// What each vCPU has done, in the order of their numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<VcpuStats>,
    /// What each disk has done, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<DriveStats>,
    /// What each network interface has done, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkStats>,
    /// What the vsock device has done, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockStats>,
    /// What the source of entropy has done, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyStats>,
    /// What the balloon has done, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStats>,
    /// What the guest's console has done.
    pub console: ConsoleStats,
    /// A device that has been at work for so long that the devices could not be looked at: what is told of them is as it was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_at_work: Option<DeviceAtWork>,
}

/// A device that is at work: it may be waiting for a page of guest memory, or for a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceAtWork {
    /// Its name, such as `vsock`.
    pub device: String,
    /// For how long it has been so, in microseconds.
    pub for_us: u64,
}

/// How often a thread of this process asked for a page that was not mapped. Of the guest's faults only those are among them that
/// need not wait: the others KVM hands to kernel threads, whose faults count for no process. `memory` tells what the guest has
/// touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PageFaults {
    /// Times that the host had the page in memory, or a page server delivered it.
    pub minor: u64,
    /// Times that it had to be read from a disk.
    pub major: u64,
}

/// What the API was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApiStats {
    /// Requests that have come.
    pub requests: u64,
    /// Requests that were answered with a status of 400 or above.
    pub refused: u64,
}

/// How long the last operation of each kind took, in microseconds; absent until there was one that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Latencies {
    /// Boot, until the vCPUs ran, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_us: Option<u64>,
    /// Restore from a snapshot, until the vCPUs ran, or could, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_us: Option<u64>,
    /// For how long the guest stood still for a snapshot, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_pause_us: Option<u64>,
    /// How long a snapshot took until it was complete on disk, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_total_us: Option<u64>,
    /// Stopping the vCPUs by `PATCH /vm`, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// Letting the vCPUs run by `PATCH /vm`, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_us: Option<u64>,
}

/// An operation whose phases are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TracedOperation {
    /// A guest was booted.
    Boot,
    /// A shell was built, for a snapshot to be loaded into.
    Shell,
    /// A snapshot was loaded, or a fork of another VM.
    Load,
    /// The VM was forked: while it stood still.
    Fork,
    /// The VM was reset.
    Reset,
}

impl std::fmt::Display for TracedOperation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TracedOperation::Boot => "boot",
            TracedOperation::Shell => "shell",
            TracedOperation::Load => "load",
            TracedOperation::Fork => "fork",
            TracedOperation::Reset => "reset",
        })
    }
}

/// What an operation spent its time on. Its phases follow each other without gaps: their times add up to the whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseTrace {
    /// Which operation.
    pub operation: TracedOperation,
    /// From its beginning to its end, in nanoseconds.
    pub total_ns: u64,
    /// Its phases, in order.
    pub phases: Vec<PhaseTime>,
}

/// One phase of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseTime {
    /// What it was for.
    pub name: String,
    /// How long it took, in nanoseconds.
    pub ns: u64,
}

/// What guest memory consists of, in bytes. The three parts add up to the size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryStats {
    /// All of it.
    pub size_bytes: u64,
    /// Not mapped here: this guest has not touched it since it was restored, or since its first snapshot; or it has given
    /// it back. It takes no memory of the host, but for what the image or the page server may hold of it.
    pub not_loaded_bytes: u64,
    /// Pages of the image as they are, which other guests may have as well.
    pub shared_bytes: u64,
    /// The guest's own pages. Before its first snapshot a booted guest has no others. One that was given back and then read
    /// counts here, though it takes no memory: the kernel maps its one page of zeros.
    pub private_bytes: u64,
}

/// How the page server of a guest has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PageServerStats {
    /// Who serves now.
    pub state: PageServerState,
    /// Why it is not the page server, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Times that the page server was gone.
    pub losses: u64,
    /// Times that it was found silent, or unable to get its bytes.
    pub hangs: u64,
    /// Times that the vmm has begun to serve page faults itself.
    pub takeovers: u64,
    /// Times that a page server was found again.
    pub reattachments: u64,
    /// Page faults that the vmm has served itself.
    pub faults_served: u64,
    /// Of those, the ones that were outstanding when it took over.
    pub faults_taken_over: u64,
    /// How long the last takeover took, in microseconds: from noticing that the page server was gone, or from the first fault that
    /// a silent one left unanswered, until the faults outstanding were served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takeover_us: Option<u64>,
}

/// Who serves the pages of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PageServerState {
    /// The page server.
    #[default]
    Serving,
    /// The vmm itself.
    Failover,
    /// Nobody: a guest that needs a page that it has not touched yet waits.
    Lost,
}

/// What a vCPU has done: how often it has left the guest, and for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VcpuStats {
    /// Times that the guest read from an I/O port.
    pub io_in: u64,
    /// Times that the guest wrote to an I/O port.
    pub io_out: u64,
    /// Times that the guest read from a device's registers in memory.
    pub mmio_read: u64,
    /// Times that the guest wrote to a device's registers in memory. Kicks of queues do not count: no vCPU stops for them.
    pub mmio_write: u64,
    /// Times that a signal stopped it: to pause, for instance.
    pub interrupted: u64,
    /// Times that it was something else.
    pub other: u64,
    /// Times that it could not go on after that: 0 or 1.
    pub failures: u64,
}

/// What a disk has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DriveStats {
    /// Name of the disk.
    pub drive_id: String,
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded, of zeros too.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests to discard that succeeded.
    pub discards: u64,
    /// What was read, in bytes.
    pub read_bytes: u64,
    /// What was written, in bytes.
    pub written_bytes: u64,
    /// Requests that the guest was answered with an error.
    pub errors: u64,
    /// Times that the rate limit had the disk wait.
    pub throttled: u64,
    /// What the overlay holds of this guest now, in bytes: what `max_overlay_mib` bounds. 0 without an overlay.
    pub overlay_bytes: u64,
}

/// What a network interface has done. Received is what goes to the guest, transmitted what comes from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkStats {
    /// Name of the interface.
    pub iface_id: String,
    /// Frames that the guest was given.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames of the host that the guest was not given: it could not take them, or nobody could.
    pub rx_dropped: u64,
    /// Times that the rate limit had the host's frames wait.
    pub rx_throttled: u64,
    /// Frames that the host took from the guest.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that the host did not take: its side was down or full, or they were no frames.
    pub tx_dropped: u64,
    /// Times that the rate limit had the guest's frames wait.
    pub tx_throttled: u64,
}

/// What the vsock device has done. Received is what goes to the guest, transmitted what comes from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VsockStats {
    /// Connections that there are now.
    pub connections: u64,
    /// Connections that there have been in all.
    pub opened: u64,
    /// Packets that the guest was given.
    pub rx_packets: u64,
    /// What the guest was given in them, in bytes.
    pub rx_bytes: u64,
    /// Packets that the guest has sent.
    pub tx_packets: u64,
    /// What the guest has sent in them, in bytes.
    pub tx_bytes: u64,
}

/// What the source of entropy has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EntropyStats {
    /// Requests that the guest was answered.
    pub requests: u64,
    /// What it was given, in bytes.
    pub bytes: u64,
    /// Times that the rate limit had the guest wait.
    pub throttled: u64,
}

/// What the balloon has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonStats {
    /// How large it shall be, in MiB.
    pub target_mib: u64,
    /// How large it is, in MiB.
    pub actual_mib: u64,
    /// Times that the guest has put pages into it.
    pub inflations: u64,
    /// Times that the guest has taken pages out of it.
    pub deflations: u64,
    /// Times that the guest has reported pages as free.
    pub reports: u64,
    /// Times that the guest has told its statistics.
    pub updates: u64,
    /// What the guest has given back in all, whether it has used it again or not, in bytes.
    pub discarded_bytes: u64,
    /// How much of that it has reported as free, in bytes.
    pub reported_bytes: u64,
    /// What it wanted to give back and has kept, as it would have taken too many mappings, in bytes.
    pub kept_bytes: u64,
}

/// What the guest's console has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleStats {
    /// What the guest has written and was taken, in bytes.
    pub written_bytes: u64,
    /// What it has written faster than anybody read it, and is lost, in bytes.
    pub lost_bytes: u64,
}

/// Query of `GET /vm/memory-map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryMapQuery {
    /// Guest-physical address to begin at, that of a page; 0 when absent.
    #[serde(default)]
    #[schemars(extend("multipleOf" = 4096))]
    pub start: u64,
    /// Most runs in the answer, 1 to 10000; 1000 when absent.
    #[serde(default = "default_runs")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_runs: u32,
}

fn default_runs() -> u32 {
    1000
}

impl Default for MemoryMapQuery {
    fn default() -> Self {
        MemoryMapQuery { start: 0, max_runs: default_runs() }
    }
}

/// Answer to `GET /vm/memory-map`: guest memory as runs of pages of a kind, in ascending order. What is no memory is in none.
/// One answer covers 16 GiB at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryMap {
    /// The runs.
    pub runs: Vec<MemoryRun>,
    /// Where to go on, as `start` of the next call, if this is not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// A run of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryRun {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What its pages are.
    pub kind: PageKind,
}

/// What a page of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PageKind {
    /// Not mapped here: not touched yet, or given back.
    NotLoaded,
    /// A page of the image as it is.
    Shared,
    /// The guest's own.
    Private,
}
