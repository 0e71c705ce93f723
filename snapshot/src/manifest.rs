//! `snap.json`: the readable description of a snapshot, which binds all its other files by size and digest.
//!
//! One type describes all versions of the format that are read: what a later version has added is absent from an earlier one, in
//! the type and in the document, so that a manifest of an earlier version keeps its digest.

use crate::clusters::Clusters;
use crate::cpu::GuestCpu;
use crate::packed;
use crate::{CHUNK_BYTES, FORMAT_VERSION, OLDEST_FORMAT_VERSION, PAGE_BYTES, file};
use serde::{Deserialize, Serialize};

/// Longest manifest that is read, in bytes.
pub const MAX_BYTES: u64 = 1024 * 1024;
/// Most vCPUs that a snapshot can have.
pub const MAX_VCPUS: u32 = 64;
/// Most guest memory that a snapshot can have, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Longest `state.bin`, in bytes.
pub const MAX_STATE_BYTES: u64 = 8 * 1024 * 1024;
/// Largest disk that a snapshot can have, in bytes.
pub const MAX_DISK_BYTES: u64 = 1 << 46;
/// Disks are made of sectors of so many bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Most disks.
const MAX_DRIVES: usize = 32;
/// Most network interfaces.
const MAX_INTERFACES: usize = 32;
/// Most memory regions.
const MAX_REGIONS: usize = 64;
/// Longest of the short texts, in bytes.
const MAX_TEXT: usize = 256;
/// Longest path, in bytes.
const MAX_PATH: usize = 4096;

/// The manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format: [`OLDEST_FORMAT_VERSION`] to [`FORMAT_VERSION`], the lowest that can say the rest.
    pub format_version: u32,
    /// Version of the vmm that wrote the snapshot.
    pub vmm_version: String,
    /// When the snapshot was completed, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Architecture, as `uname -m` names it.
    pub arch: String,
    /// CPU of the host that wrote the snapshot.
    pub cpu: Cpu,
    /// The CPU as the guest saw it. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cpu: Option<GuestCpu>,
    /// Kernel release of that host. For information.
    pub host_kernel: String,
    /// Size of the machine.
    pub machine: Machine,
    /// The memory image.
    pub memory: Memory,
    /// The state file.
    pub state: StateFile,
    /// Devices whose host side a restore has to provide.
    pub devices: Devices,
    /// What the agent in the guest had announced when the snapshot was taken.
    pub readiness: Option<Readiness>,
    /// Digest, in hex, of the configuration that the machine was started with, if it is to be compared with that of a later
    /// start. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// BLAKE3 of this manifest, in hex: see [`Manifest::expected_digest`].
    pub digest: String,
}

/// A CPU, as CPUID leaves 0, 1 and 0x8000_0002.. describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Vendor, such as `AuthenticAMD`. A snapshot runs on CPUs of the same vendor only.
    pub vendor: String,
    /// Family.
    pub family: u32,
    /// Model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Brand name. For information.
    pub brand: String,
}

/// Size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
}

/// The memory image and its digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Name of the image file.
    pub file: String,
    /// Its length, in bytes. Holes count.
    pub size_bytes: u64,
    /// Where the image belongs in the guest.
    pub regions: Vec<MemoryRegion>,
    /// Length of a digested chunk, in bytes.
    pub chunk_bytes: u64,
    /// Name of the file of digests.
    pub digests: String,
    /// BLAKE3 of the file of digests, in hex. It names the contents of the memory.
    pub root: String,
    /// How the image file is packed, if it is no raw image. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<Packed>,
    /// The snapshot whose memory is seen where this image holds nothing. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Which pages a raw image with a parent holds. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<PageMap>,
}

/// A packed image file: see [`crate::packed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    /// Length of the file, in bytes.
    pub file_bytes: u64,
    /// BLAKE3 of its beginning, which says where each chunk lies, in hex.
    pub index_digest: String,
    /// BLAKE3 of the rest of it, in hex. Chunks that are right may hide that it was changed: not every bit of a frame counts.
    pub data_digest: String,
}

/// The snapshot that a memory image lies over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its directory, as seen from the directory of this snapshot.
    pub path: String,
    /// The root digest of its memory.
    pub root: String,
    /// The digest of its manifest.
    pub digest: String,
}

/// A file that says which pages of the memory an image holds: a [map](Clusters) whose clusters are pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageMap {
    /// Its name.
    pub file: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// Its BLAKE3, in hex.
    pub digest: String,
}

/// A run of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRegion {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Its length, in bytes.
    pub size_bytes: u64,
    /// Where it begins in the memory image, in bytes.
    pub offset: u64,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Its name.
    pub file: String,
    /// Its length, in bytes.
    pub size_bytes: u64,
    /// Its BLAKE3, in hex.
    pub digest: String,
}

/// Devices whose host side a restore has to provide.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// The vsock device, if the machine has one.
    pub vsock: Option<VsockDevice>,
    /// The disks, in order.
    pub drives: Vec<DriveDevice>,
    /// The network interfaces, in order.
    pub network: Vec<NetworkDevice>,
    /// The source of entropy, if the machine has one.
    pub entropy: Option<EntropyDevice>,
    /// The balloon, if the machine has one.
    pub balloon: Option<BalloonDevice>,
}

/// The host side of a disk, and what the snapshot holds of it.
///
/// What the guest sees is `held` over `image`: a disk that is only read has no `held`, one that is wholly in the snapshot
/// has no `image`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveDevice {
    /// Name of the disk, unique among the disks.
    pub drive_id: String,
    /// It was configured as the guest's root.
    pub is_root_device: bool,
    /// The guest can only read it.
    pub is_read_only: bool,
    /// The partition that is root.
    pub partuuid: Option<String>,
    /// What a flush of the guest means.
    pub cache_type: CacheType,
    /// Bounds of its traffic.
    pub rate_limit: Option<RateLimit>,
    /// Most that the overlay of a clone may hold, in MiB.
    pub max_overlay_mib: Option<u64>,
    /// Size of the disk, in bytes.
    pub size_bytes: u64,
    /// The image on the host that it lies on. It is no part of the snapshot.
    pub image: Option<DiskImage>,
    /// What the snapshot holds of it.
    pub held: Option<HeldDisk>,
}

/// A disk image of the host, as it was when the snapshot was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskImage {
    /// Its path. A restore uses it unless told otherwise.
    pub path: String,
    /// When it was last changed, in nanoseconds since the Unix epoch; `null` for a block device, which keeps no such time.
    pub modified_ns: Option<i64>,
}

/// What a snapshot holds of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldDisk {
    /// The file with its clusters, each at its place: as long as the disk.
    pub file: String,
    /// Bytes of it that are data.
    pub data_bytes: u64,
    /// BLAKE3, in hex, of the clusters that are data, in order.
    pub digest: String,
    /// The file that says which clusters are data and which are zero.
    pub map: String,
    /// Its length, in bytes.
    pub map_bytes: u64,
    /// Its BLAKE3, in hex.
    pub map_digest: String,
}

/// What a flush of the guest means on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    /// Nothing.
    Unsafe,
    /// That everything is on disk.
    Writeback,
}

/// The host side of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkDevice {
    /// Name of the interface, unique among the interfaces.
    pub iface_id: String,
    /// Name of its tap device. A restore uses it unless told otherwise.
    pub host_dev_name: String,
    /// Its MAC address, such as `06:00:ac:10:00:02`, if it has one of its own.
    pub guest_mac: Option<String>,
    /// Bounds of what the guest receives.
    pub rx_rate_limit: Option<RateLimit>,
    /// Bounds of what the guest sends.
    pub tx_rate_limit: Option<RateLimit>,
}

/// The source of entropy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyDevice {
    /// Bounds of what the guest takes.
    pub rate_limit: Option<RateLimit>,
}

/// Bounds of a device's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// In bytes.
    pub bandwidth: Option<TokenBucket>,
    /// In operations.
    pub ops: Option<TokenBucket>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds.
    pub size: u64,
    /// Tokens on top of that, once.
    pub one_time_burst: u64,
    /// How long it takes to refill, in milliseconds.
    pub refill_ms: u64,
}

/// The configuration of the balloon when the snapshot was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonDevice {
    /// How much memory the guest should give back, in MiB.
    pub amount_mib: u64,
    /// Whether the guest may take memory back before it would run out.
    pub deflate_on_oom: bool,
    /// How often the guest reports statistics, in seconds; 0: never.
    pub stats_polling_interval_s: u16,
    /// Whether the guest gives back free memory by itself.
    pub free_page_reporting: bool,
}

/// The host side of the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockDevice {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The Unix socket that the machine was configured with, as it was given. A restore uses it unless told otherwise.
    pub uds_path: String,
}

/// What an agent has announced.
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

/// A value of a manifest that no snapshot can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct BadField {
    /// Which value, as a path in the document.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl BadField {
    pub(crate) fn new(field: impl Into<String>, problem: impl Into<String>) -> BadField {
        BadField { field: field.into(), problem: problem.into() }
    }
}

impl Manifest {
    /// The digest that belongs into [`Manifest::digest`]: BLAKE3, in hex, over the compact JSON of the manifest with
    /// an empty digest. White space and the order of fields in the file do not matter, every value does.
    pub fn expected_digest(&self) -> String {
        let unsealed = Manifest { digest: String::new(), ..self.clone() };
        blake3::hash(&to_json(&unsealed, false)).to_hex().to_string()
    }

    /// Sets the digest, after the last change of a value.
    pub fn seal(&mut self) {
        self.digest = self.expected_digest();
    }

    /// The contents of `snap.json`.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self, true)
    }

    /// The lowest version of the format that can say what this manifest says.
    pub fn lowest_version(&self) -> u32 {
        let Memory { packed, parent, map, .. } = &self.memory;
        let newer =
            packed.is_some() || parent.is_some() || map.is_some() || self.config.is_some() || self.guest_cpu.is_some();
        if newer { 2 } else { 1 }
    }

    /// Number of chunks of the memory image.
    pub fn chunks(&self) -> u64 {
        self.memory.size_bytes.div_ceil(CHUNK_BYTES)
    }

    /// Checks every value that can be checked without looking at another file. The digest is not looked at.
    pub fn check(&self) -> Result<(), BadField> {
        let Manifest {
            format_version,
            vmm_version,
            created_unix_ms: _,
            arch,
            cpu,
            guest_cpu,
            host_kernel,
            machine,
            memory,
            state,
            devices,
            readiness: _,
            config,
            digest: _,
        } = self;
        if !(OLDEST_FORMAT_VERSION..=FORMAT_VERSION).contains(format_version) {
            let problem = format!("must be {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}");
            return Err(BadField::new("format_version", problem));
        }
        let lowest = self.lowest_version();
        if *format_version < lowest {
            let problem = format!("is {format_version}, and there are fields of version {lowest}");
            return Err(BadField::new("format_version", problem));
        }
        if let Some(config) = config {
            check_hex("config", config)?;
        }
        guest_cpu.as_ref().map_or(Ok(()), GuestCpu::check)?;
        for (field, text) in [
            ("vmm_version", vmm_version),
            ("arch", arch),
            ("cpu.vendor", &cpu.vendor),
            ("cpu.brand", &cpu.brand),
            ("host_kernel", host_kernel),
        ] {
            check_text(field, text)?;
        }
        if !(1..=MAX_VCPUS).contains(&machine.vcpus) {
            return Err(BadField::new("machine.vcpus", format!("must be 1 to {MAX_VCPUS}, not {}", machine.vcpus)));
        }
        memory.check(machine.memory_bytes)?;
        check_name("state.file", &state.file)?;
        check_hex("state.digest", &state.digest)?;
        if state.size_bytes > MAX_STATE_BYTES {
            return Err(BadField::new("state.size_bytes", format!("must be at most {MAX_STATE_BYTES}")));
        }
        let Devices { vsock, drives, network, entropy, balloon } = devices;
        vsock.as_ref().map_or(Ok(()), VsockDevice::check)?;
        check_drives(drives)?;
        let mut names = vec![&memory.file, &memory.digests, &state.file];
        names.extend(memory.map.as_ref().map(|map| &map.file));
        let held = devices.drives.iter().filter_map(|drive| drive.held.as_ref());
        names.extend(held.flat_map(|held| [&held.file, &held.map]));
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            let problem =
                "and `memory.digests`, `memory.map.file`, `state.file` and those of disks must be different files";
            return Err(BadField::new("memory.file", problem));
        }
        check_network(network)?;
        if let Some(EntropyDevice { rate_limit }) = entropy {
            check_rate("devices.entropy.rate_limit".to_owned(), rate_limit.as_ref())?;
        }
        balloon.map_or(Ok(()), |balloon| balloon.check(machine.memory_bytes))
    }
}

fn check_drives(drives: &[DriveDevice]) -> Result<(), BadField> {
    if drives.len() > MAX_DRIVES {
        return Err(BadField::new("devices.drives", format!("must have at most {MAX_DRIVES} entries")));
    }
    for (i, drive) in drives.iter().enumerate() {
        let field = |name: &str| format!("devices.drives[{i}].{name}");
        drive.check(&field)?;
        if drives[..i].iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(BadField::new(field("drive_id"), "is that of another disk too"));
        }
    }
    Ok(())
}

/// Whether `id` can be the name of a disk or a network interface.
fn check_id(field: String, id: &str) -> Result<(), BadField> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(BadField::new(field, "must be 1 to 64 letters, digits, `-` and `_`"));
    }
    Ok(())
}

impl DriveDevice {
    fn check(&self, field: &impl Fn(&str) -> String) -> Result<(), BadField> {
        let DriveDevice {
            drive_id,
            is_root_device: _,
            is_read_only,
            partuuid,
            cache_type: _,
            rate_limit,
            max_overlay_mib,
            size_bytes,
            image,
            held,
        } = self;
        check_id(field("drive_id"), drive_id)?;
        if let Some(partuuid) = partuuid {
            check_text(&field("partuuid"), partuuid)?;
        }
        check_rate(field("rate_limit"), rate_limit.as_ref())?;
        if *size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) || *size_bytes > MAX_DISK_BYTES {
            let problem = format!("must be a multiple of {SECTOR_BYTES}, and at most {MAX_DISK_BYTES}");
            return Err(BadField::new(field("size_bytes"), problem));
        }
        if held.is_some() == *is_read_only {
            return Err(BadField::new(field("held"), "must be there if the guest can write the disk, and only then"));
        }
        if max_overlay_mib.is_some_and(|mib| *is_read_only || mib == 0) {
            let problem = "must be at least 1, and be absent if the guest can only read the disk";
            return Err(BadField::new(field("max_overlay_mib"), problem));
        }
        if image.is_none() && held.is_none() {
            return Err(BadField::new(field("image"), "or `held` must be there"));
        }
        if let Some(DiskImage { path, modified_ns: _ }) = image {
            check_path(field("image.path"), path)?;
        }
        match held {
            Some(held) => held.check(drive_id, *size_bytes, &|name| field(&format!("held.{name}"))),
            None => Ok(()),
        }
    }
}

impl HeldDisk {
    fn check(&self, drive_id: &str, size_bytes: u64, field: &impl Fn(&str) -> String) -> Result<(), BadField> {
        let HeldDisk { file, data_bytes, digest, map, map_bytes, map_digest } = self;
        // So that no two of them are the same file.
        for (name, found, expected) in [("file", file, file::disk(drive_id)), ("map", map, file::disk_map(drive_id))] {
            if *found != expected {
                return Err(BadField::new(field(name), format!("must be {expected}")));
            }
        }
        check_hex(&field("digest"), digest)?;
        check_hex(&field("map_digest"), map_digest)?;
        if *data_bytes > size_bytes {
            return Err(BadField::new(field("data_bytes"), "must be no more than the size of the disk"));
        }
        if *map_bytes > Clusters::max_encoded(size_bytes) {
            return Err(BadField::new(
                field("map_bytes"),
                "is more than the map of such a disk takes, or of any disk that a snapshot can hold",
            ));
        }
        Ok(())
    }
}

fn check_network(network: &[NetworkDevice]) -> Result<(), BadField> {
    if network.len() > MAX_INTERFACES {
        return Err(BadField::new("devices.network", format!("must have at most {MAX_INTERFACES} entries")));
    }
    for (i, interface) in network.iter().enumerate() {
        let NetworkDevice { iface_id, host_dev_name, guest_mac, rx_rate_limit, tx_rate_limit } = interface;
        let field = |name: &str| format!("devices.network[{i}].{name}");
        check_id(field("iface_id"), iface_id)?;
        if network[..i].iter().any(|other| other.iface_id == *iface_id) {
            return Err(BadField::new(field("iface_id"), "is that of another interface too"));
        }
        check_text(&field("host_dev_name"), host_dev_name)?;
        if let Some(mac) = guest_mac {
            check_text(&field("guest_mac"), mac)?;
        }
        check_rate(field("rx_rate_limit"), rx_rate_limit.as_ref())?;
        check_rate(field("tx_rate_limit"), tx_rate_limit.as_ref())?;
    }
    Ok(())
}

/// Whether something passes.
fn check_rate(field: String, rate: Option<&RateLimit>) -> Result<(), BadField> {
    let buckets = rate.map_or([None; 2], |RateLimit { bandwidth, ops }| [*bandwidth, *ops]);
    if buckets.into_iter().flatten().any(|bucket| bucket.size == 0 || bucket.refill_ms == 0) {
        return Err(BadField::new(field, "must let something pass"));
    }
    Ok(())
}

impl Memory {
    fn check(&self, memory_bytes: u64) -> Result<(), BadField> {
        let Memory { file, size_bytes, regions, chunk_bytes, digests, root, packed, parent, map } = self;
        check_name("memory.file", file)?;
        check_name("memory.digests", digests)?;
        check_hex("memory.root", root)?;
        if let Some(Packed { file_bytes, index_digest, data_digest }) = packed {
            check_hex("memory.packed.data_digest", data_digest)?;
            check_hex("memory.packed.index_digest", index_digest)?;
            let longest = packed::longest(*size_bytes);
            if *file_bytes > longest {
                let problem = format!("must be at most {longest}, which a packed image of this memory can have");
                return Err(BadField::new("memory.packed.file_bytes", problem));
            }
        }
        if let Some(Parent { path, root, digest }) = parent {
            check_path("memory.parent.path".to_owned(), path)?;
            if path.starts_with('/') {
                return Err(BadField::new("memory.parent.path", "must be relative to the snapshot's directory"));
            }
            check_hex("memory.parent.root", root)?;
            check_hex("memory.parent.digest", digest)?;
        }
        if map.is_some() != (parent.is_some() && packed.is_none()) {
            return Err(BadField::new("memory.map", "must be there if a raw image has a parent, and only then"));
        }
        if let Some(PageMap { file, bytes, digest }) = map {
            check_name("memory.map.file", file)?;
            check_hex("memory.map.digest", digest)?;
            if *bytes > Clusters::max_encoded(*size_bytes) {
                return Err(BadField::new("memory.map.bytes", "is more than the map of such a memory takes"));
            }
        }
        if *chunk_bytes != CHUNK_BYTES {
            return Err(BadField::new("memory.chunk_bytes", format!("must be {CHUNK_BYTES}, not {chunk_bytes}")));
        }
        if memory_bytes != *size_bytes {
            let problem = format!("is {memory_bytes}, but `memory.size_bytes` is {size_bytes}; they must be equal");
            return Err(BadField::new("machine.memory_bytes", problem));
        }
        Memory::check_layout(regions, *size_bytes)
    }

    /// Checks that `regions` lay out an image of `size_bytes`.
    pub(crate) fn check_layout(regions: &[MemoryRegion], size_bytes: u64) -> Result<(), BadField> {
        if !(PAGE_BYTES..=MAX_MEMORY_BYTES).contains(&size_bytes) {
            let problem = format!("must be {PAGE_BYTES} to {MAX_MEMORY_BYTES}, not {size_bytes}");
            return Err(BadField::new("memory.size_bytes", problem));
        }
        check_regions(regions, size_bytes)
    }
}

/// Regions are in ascending order, apart from each other in the guest, next to each other in the image, which they
/// cover.
fn check_regions(regions: &[MemoryRegion], size_bytes: u64) -> Result<(), BadField> {
    if !(1..=MAX_REGIONS).contains(&regions.len()) {
        return Err(BadField::new("memory.regions", format!("must have 1 to {MAX_REGIONS} entries")));
    }
    let (mut guest_free, mut image_end) = (0u64, 0u64);
    for (i, region) in regions.iter().enumerate() {
        let MemoryRegion { guest_addr, size_bytes: len, offset } = *region;
        let at = |field: &str| format!("memory.regions[{i}].{field}");
        for (field, value) in [("guest_addr", guest_addr), ("size_bytes", len), ("offset", offset)] {
            if !value.is_multiple_of(PAGE_BYTES) {
                return Err(BadField::new(at(field), format!("is {value}, not a multiple of {PAGE_BYTES}")));
            }
        }
        if len == 0 {
            return Err(BadField::new(at("size_bytes"), "must not be 0"));
        }
        if guest_addr < guest_free {
            return Err(BadField::new(at("guest_addr"), "overlaps the region before it, or comes before it"));
        }
        if offset != image_end {
            return Err(BadField::new(at("offset"), format!("must be {image_end}, where the region before it ends")));
        }
        let too_far = || BadField::new(at("size_bytes"), "reaches beyond the end of the address space");
        guest_free = guest_addr.checked_add(len).ok_or_else(too_far)?;
        image_end = offset.checked_add(len).ok_or_else(too_far)?;
    }
    if image_end != size_bytes {
        let problem = format!("cover {image_end} bytes, but `memory.size_bytes` is {size_bytes}");
        return Err(BadField::new("memory.regions", problem));
    }
    Ok(())
}

impl BalloonDevice {
    fn check(&self, memory_bytes: u64) -> Result<(), BadField> {
        let most = memory_bytes >> 20;
        if self.amount_mib > most {
            let problem = format!("must be at most {most}, the guest's memory, not {}", self.amount_mib);
            return Err(BadField::new("devices.balloon.amount_mib", problem));
        }
        Ok(())
    }
}

impl VsockDevice {
    fn check(&self) -> Result<(), BadField> {
        let VsockDevice { guest_cid, uds_path } = self;
        if !(3..u64::from(u32::MAX)).contains(guest_cid) {
            let problem = format!("must be 3 to {}, not {guest_cid}", u32::MAX - 1);
            return Err(BadField::new("devices.vsock.guest_cid", problem));
        }
        check_path("devices.vsock.uds_path".to_owned(), uds_path)
    }
}

fn check_path(field: String, path: &str) -> Result<(), BadField> {
    if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
        return Err(BadField::new(field, format!("must be a path of at most {MAX_PATH} bytes")));
    }
    Ok(())
}

fn check_text(field: &str, text: &str) -> Result<(), BadField> {
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        return Err(BadField::new(field, format!("must be one line of at most {MAX_TEXT} bytes")));
    }
    Ok(())
}

/// A file of a snapshot lies in its directory: a name is no path.
fn check_name(field: &str, name: &str) -> Result<(), BadField> {
    let plain = !name.starts_with('.') && !name.contains(['/', '\0']);
    if name.is_empty() || name.len() > 64 || !plain {
        let problem = "must be the plain name of a file in the snapshot's directory";
        return Err(BadField::new(field, problem));
    }
    Ok(())
}

fn check_hex(field: &str, digest: &str) -> Result<(), BadField> {
    if digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(BadField::new(field, "must be 64 lower-case hexadecimal digits"));
    }
    Ok(())
}

/// Takes the contents of a `snap.json` whose values were edited on purpose and returns them with the digest set right.
pub fn reseal(json: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    let mut manifest: Manifest = serde_json::from_slice(json)?;
    manifest.seal();
    Ok(manifest.to_json())
}

fn to_json(manifest: &Manifest, pretty: bool) -> Vec<u8> {
    let json = if pretty { serde_json::to_vec_pretty(manifest) } else { serde_json::to_vec(manifest) };
    let mut json = json.expect("numbers, strings and lists of them always have a JSON form");
    if pretty {
        json.push(b'\n');
    }
    json
}
