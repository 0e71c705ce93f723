//! REST documents of the devices that a VM can have besides vsock.

use crate::NotOffered;
use crate::mac::MacAddr;
use crate::vm::{given, or_default};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A disk (virtio block device) over a raw image file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the disk: 1 to 64 letters, digits, `-` and `_`; unique among the VM's disks.
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub drive_id: String,
    /// The image: a raw file or a block device, of a whole number of 512-byte sectors.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub path_on_host: PathBuf,
    /// The guest's root file system: it becomes the first disk, and the kernel command line says `root=/dev/vda`.
    #[serde(default)]
    pub is_root_device: bool,
    /// The guest can only read it.
    #[serde(default, deserialize_with = "or_default")]
    #[schemars(with = "Option<bool>")]
    pub is_read_only: bool,
    /// Root is the partition with this unique id instead of the whole disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// What a flush of the guest means on the host.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the image is read and written.
    #[serde(default, deserialize_with = "or_default")]
    #[schemars(with = "Option<IoEngine>")]
    pub io_engine: IoEngine,
    /// Bounds the guest's reads and writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// What the guest writes goes to a private overlay, which ends with the VM; the image itself is only read, so that any
    /// number of VMs can share it. Clones write to overlays whether this is set or not.
    #[serde(default)]
    pub overlay: bool,
    /// Most that the overlay may hold, in MiB, at least 1; a guest that writes more is paused. No bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_overlay_mib: Option<u64>,
    /// A vhost-user back end. Not offered: anything but `null` is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub socket: NotOffered,
}

/// Body of `PATCH /drives/{drive_id}`: what can be changed of the disk of a VM that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Name of the disk.
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub drive_id: String,
    /// Another image. The image of a running guest's disk is not exchanged: a value is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub path_on_host: Option<PathBuf>,
    /// Most that the overlay may hold from now on, in MiB, at least 1; `null` takes the bound away.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    #[schemars(with = "Option<u64>", range(min = 1))]
    pub max_overlay_mib: Option<Option<u64>>,
    /// Other bounds of the guest's reads and writes, from full buckets on; a part that is absent stays as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What a flush of the guest means on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CacheType {
    /// Nothing: the guest is offered no flush, and the host writes when it likes. A crash of the host can lose what the
    /// guest believes to be on disk.
    #[default]
    Unsafe,
    /// What was written is on the host's disk when a flush returns.
    Writeback,
}

/// How an image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum IoEngine {
    /// By system calls.
    #[default]
    Sync,
    /// By io_uring. Not offered: refused by name.
    Async,
}

/// A network interface (virtio network device) over a tap device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name of the interface: 1 to 64 letters, digits, `-` and `_`; unique among the VM's interfaces.
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub iface_id: String,
    /// Name of the tap device, of 1 to 15 bytes. It must exist, and be nobody else's.
    #[schemars(length(min = 1, max = 15))]
    pub host_dev_name: String,
    /// The guest's MAC address, such as `06:00:ac:10:00:02`; a random one of local administration when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddr>,
    /// Bounds what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Bounds what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// The largest packet that the guest is told to send. Not offered: anything but `null` is refused by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub mtu: NotOffered,
}

/// Body of `PATCH /network-interfaces/{iface_id}`: other bounds, from full buckets on. A part that is absent stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkUpdate {
    /// Name of the interface.
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub iface_id: String,
    /// Bounds what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Bounds what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The memory balloon (virtio balloon device).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How much memory the guest shall give back, in MiB.
    pub amount_mib: u64,
    /// The guest may take memory back out of the balloon before it would run out.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// How often the guest reports its memory's statistics, in seconds; 0: never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest gives back free memory by itself as it goes.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// The guest tells free memory on request. Not offered: `true` is refused by name; `free_page_reporting` does it unasked.
    #[serde(default)]
    pub free_page_hinting: bool,
}

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How much memory the guest shall give back, in MiB.
    pub amount_mib: u64,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// How often the guest shall report statistics, in seconds, at least 1; 0 if it was told so when it started.
    pub stats_polling_interval_s: u16,
}

/// Body of the answer to `GET /balloon/statistics`. What the guest reports is absent until it has; sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonStatistics {
    /// How many pages of 4 KiB shall be in the balloon.
    pub target_pages: u64,
    /// How many the guest says are.
    pub actual_pages: u64,
    /// What shall be in the balloon, in MiB.
    pub target_mib: u64,
    /// What the guest says is, in MiB.
    pub actual_mib: u64,
    /// Memory that was swapped in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Memory that was swapped out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Number of major page faults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Number of minor page faults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Memory that nothing uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Memory that the guest knows of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Memory that programs could have without swapping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Memory that holds contents of files and could be had at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Number of huge pages that were allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Number of huge pages that could not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
}

/// The source of entropy (virtio entropy device).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Bounds what the guest takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Where the guest's serial port COM1 leads on the host: standard input and output unless one of these is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file that what the guest writes is appended to, up to 64 MiB, or a FIFO. Nothing can be typed.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub serial_out_path: Option<PathBuf>,
    /// A new pseudo-terminal; `GET /` tells its name.
    #[serde(default)]
    pub pty: bool,
    /// Bounds what the guest writes. Not offered: anything but `null` is refused by name; a file is bounded anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "()")]
    pub rate_limiter: NotOffered,
}

/// Bounds of a device's traffic. Either may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// In bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// In operations: requests of a disk, packets of a network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// These bounds with others in the place of those that `update` gives.
    pub fn updated(self, update: RateLimiter) -> Self {
        RateLimiter { bandwidth: update.bandwidth.or(self.bandwidth), ops: update.ops.or(self.ops) }
    }
}

/// A token bucket. It is full at first and refills steadily. One whose `size` and `refill_time` are both 0 is no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How many tokens it holds.
    pub size: u64,
    /// Tokens on top of that, once, at the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// How long it takes to refill from empty to full, in milliseconds.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it is a bound.
    pub fn is_bound(&self) -> bool {
        self.size > 0 || self.refill_time > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_as_if_it_were_absent() {
        let drive = |text: &str| serde_json::from_str::<Drive>(text).unwrap();
        let nulls = r#"{"drive_id":"a","path_on_host":"b","partuuid":null,"is_read_only":null,"io_engine":null,"rate_limiter":null}"#;
        assert_eq!(drive(nulls), drive(r#"{"drive_id":"a","path_on_host":"b"}"#));
    }
}
