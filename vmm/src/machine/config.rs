//! Is a configuration one that can be built? Pure; the same check for the command line, the file and the API.

use super::shell::Shape;
use crate::console::Place;
use crate::devices::virtio::net::tap::MAX_NAME;
use crate::loader::Kernel;
use crate::memory::layout::{MAX_MIB, MAX_VIRTIO, MIN_MIB};
use api_spec::NotOffered;
use api_spec::devices::{
    Balloon, Drive, DriveUpdate, Entropy, IoEngine, NetworkInterface, NetworkUpdate, RateLimiter, Serial, TokenBucket,
};
use api_spec::saved::SavedState;
use api_spec::vm::{BootSource, CpuTemplate, HugePages, MachineConfig, MachinePatch, VmConfig, Vsock};
use std::path::PathBuf;
use uffd_handler::listener;

/// Most vCPUs that a VM may have.
pub const MAX_VCPUS: u8 = 8;
/// Most network interfaces that a VM may have.
pub const MAX_INTERFACES: usize = 8;
/// Longest name of a saved state, in bytes.
const MAX_SAVED_NAME: usize = 200;
/// Context ids below this one have a meaning of their own.
const MIN_CID: u32 = 3;

/// Why a configuration cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Something that other VMMs have and this one does not.
    #[error("{field} is not offered: {remedy}")]
    NotOffered {
        /// Which field.
        field: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A place where nothing can be saved.
    #[error("saved-state.path is {}; it must end in a name of 1 to {MAX_SAVED_NAME} bytes", .0.display())]
    SavedPath(PathBuf),
    /// No change at all.
    #[error("machine-config: nothing to change was given; once a VM was started, max_private_mib can be changed")]
    NoChange,
    /// It was settled when the VM was started.
    #[error("machine-config.{field} cannot be changed once a VM was started; max_private_mib can")]
    Fixed {
        /// Which field.
        field: &'static str,
    },
    /// vCPUs out of range.
    #[error("machine-config.vcpu_count is {0}; it may be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Memory out of range.
    #[error("machine-config.mem_size_mib is {0}; it may be {MIN_MIB} to {MAX_MIB}")]
    Memory(u64),
    /// A limit that nothing can keep.
    #[error("max_private_mib is 0, and the vmm itself needs more; give it more, or leave it out for no limit")]
    MaxPrivate,
    /// A reserved context id.
    #[error("vsock.guest_cid is {0}; it may be {MIN_CID} to 4294967294")]
    GuestCid(u32),
    /// A socket path that is too long.
    #[error("vsock.uds_path: {0}")]
    UdsPath(String),
    /// Two places for the console.
    #[error("serial names both a file (`serial_out_path`) and `pty`; choose one")]
    TwoConsoles,
    /// A disk that cannot be.
    #[error("drives: {0}")]
    Drive(#[from] DriveError),
    /// More devices than there are places for.
    #[error("{0} virtio devices are configured; there may be {MAX_VIRTIO}")]
    TooMany(u32),
    /// A name that cannot be one.
    #[error("{field} is {id:?}; it may be 1 to 64 letters, digits, `-` and `_`")]
    Id {
        /// Which field.
        field: String,
        /// What it says.
        id: String,
    },
    /// A name that no tap device can have.
    #[error(
        "network interface {iface_id}: host_dev_name is {tap:?}; it may be 1 to {MAX_NAME} printable characters but `/`, `:`, `%` and `,`"
    )]
    TapName {
        /// Which interface.
        iface_id: String,
        /// What it says.
        tap: String,
    },
    /// Two interfaces with something in common that they must not have in common.
    #[error("two network interfaces have the {field} {value}; each needs one of its own")]
    TwoInterfaces {
        /// What they have in common.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// No such interface.
    #[error("network interfaces: there is no {0}")]
    NoInterface(String),
    /// More than there may be.
    #[error("there are {0} network interfaces; there may be {MAX_INTERFACES}")]
    TooManyInterfaces(usize),
    /// A rate limit that nothing would ever pass.
    #[error("{0}: `size` and `refill_time` must both be at least 1, or both 0 for no bound")]
    Rate(String),
    /// A balloon that does not fit into the guest.
    #[error("balloon.amount_mib is {amount_mib}; it may be at most {memory_mib}, the guest's memory")]
    Balloon {
        /// How large the balloon shall be, in MiB.
        amount_mib: u64,
        /// The guest's memory, in MiB.
        memory_mib: u64,
    },
    /// Statistics that were off when the guest started.
    #[error("balloon.stats_polling_interval_s was 0 when the guest started, which was not offered statistics then")]
    NoStatistics,
    /// Statistics cannot be turned off.
    #[error("balloon.stats_polling_interval_s is 0; once the guest has started it may be 1 to 65535")]
    Interval,
    /// Nothing to boot.
    #[error("boot-source is missing: name a kernel (`kernel_image_path`) or say `embedded_guest`")]
    NoKernel,
    /// Two things to boot.
    #[error("boot-source names both a kernel (`kernel_image_path`) and `embedded_guest`; choose one")]
    TwoKernels,
    /// The embedded guest takes no RAM disk.
    #[error("boot-source.initrd_path: the embedded guest takes no initial RAM disk")]
    EmbeddedInitrd,
}

/// Why a disk cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriveError {
    /// Two of the same name.
    #[error("two have the drive_id {0}; each needs its own")]
    Duplicate(String),
    /// Two roots.
    #[error("{0} and {1} both say is_root_device; one can be root")]
    TwoRoots(String, String),
    /// An engine that is not offered.
    #[error("{0}: io_engine `Async` (io_uring) is not offered; leave it out, or say `Sync`")]
    Async(String),
    /// A disk that only reads has nothing to keep.
    #[error("{0}: `{1}` makes no sense with is_read_only: the guest writes nothing")]
    ReadOnly(String, &'static str),
    /// An overlay that can hold nothing.
    #[error("{0}: max_overlay_mib must be at least 1")]
    NoOverlay(String),
    /// A partition's id that cannot be one, or of a disk that is not root.
    #[error("{0}: partuuid must be letters, digits and `-`, at most 64, of the drive that says is_root_device")]
    Partuuid(String),
    /// Another image for a running guest.
    #[error("{0}: path_on_host cannot be changed once the VM was started; stop the guest to exchange a disk")]
    Path(String),
    /// No change at all.
    #[error("{0}: nothing to change was given; max_overlay_mib and rate_limiter can be changed")]
    NoChange(String),
    /// No such disk.
    #[error("there is no {0}")]
    Unknown(String),
}

/// A configuration that can be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootPlan {
    /// What to boot.
    pub kernel: Kernel,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line as configured; the vmm appends its devices.
    pub command_line: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Its devices.
    pub devices: DevicePlan,
}

/// The devices of a machine that are configured: those of virtio, in order of their places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicePlan {
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// The disks, the root disk first.
    pub drives: Vec<Drive>,
    /// The source of entropy.
    pub entropy: Option<Entropy>,
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The network interfaces.
    pub network: Vec<NetworkInterface>,
}

impl DevicePlan {
    /// Number of virtio devices.
    pub fn virtio_count(&self) -> u32 {
        let DevicePlan { vsock, drives, network, entropy, balloon } = self;
        let single: u32 = [vsock.is_some(), entropy.is_some(), balloon.is_some()].map(u32::from).iter().sum();
        single + (drives.len() + network.len()) as u32
    }
}

/// Checks CPUs and memory.
pub fn check_machine(config: &MachineConfig) -> Result<(), ConfigError> {
    let MachineConfig {
        vcpu_count,
        mem_size_mib,
        smt,
        track_dirty_pages: _,
        huge_pages,
        cpu_template,
        max_private_mib,
    } = *config;
    refuse_if(smt, "machine-config.smt", "each vCPU is shown as a core of its own; say false")?;
    refuse_if(
        huge_pages != HugePages::None,
        "machine-config.huge_pages",
        "guest memory is in pages of 4 KiB, as a clone copies each page that it writes, and a pool of huge pages that runs \
         empty ends guests; say None. To have what clones only read mapped by the 2 MiB, start the page server with \
         --huge-pages collapse",
    )?;
    let has_template = !matches!(cpu_template, None | Some(CpuTemplate::None));
    refuse_if(has_template, "machine-config.cpu_template", "guests see what KVM offers; say None")?;
    if !(1..=MAX_VCPUS).contains(&vcpu_count) {
        return Err(ConfigError::Vcpus(vcpu_count));
    }
    if !(MIN_MIB..=MAX_MIB).contains(&mem_size_mib) {
        return Err(ConfigError::Memory(mem_size_mib));
    }
    check_max_private(max_private_mib)
}

/// The vCPUs and the memory with some of it changed.
pub fn with_machine(config: &MachineConfig, patch: MachinePatch) -> Result<MachineConfig, ConfigError> {
    let MachinePatch { vcpu_count, mem_size_mib, smt, track_dirty_pages, huge_pages, cpu_template, max_private_mib } =
        patch;
    let changed = MachineConfig {
        vcpu_count: vcpu_count.unwrap_or(config.vcpu_count),
        mem_size_mib: mem_size_mib.unwrap_or(config.mem_size_mib),
        smt: smt.unwrap_or(config.smt),
        track_dirty_pages: track_dirty_pages.unwrap_or(config.track_dirty_pages),
        huge_pages: huge_pages.unwrap_or(config.huge_pages),
        cpu_template: cpu_template.or(config.cpu_template),
        max_private_mib: max_private_mib.unwrap_or(config.max_private_mib),
    };
    check_change(patch)?;
    check_machine(&changed)?;
    Ok(changed)
}

/// What can be changed of the vCPUs and the memory of a VM that was started: its limit, if it is to be changed.
pub fn check_machine_update(patch: MachinePatch) -> Result<Option<Option<u64>>, ConfigError> {
    let MachinePatch { vcpu_count, mem_size_mib, smt, track_dirty_pages, huge_pages, cpu_template, max_private_mib } =
        patch;
    let fixed = [
        ("vcpu_count", vcpu_count.is_some()),
        ("mem_size_mib", mem_size_mib.is_some()),
        ("smt", smt.is_some()),
        ("track_dirty_pages", track_dirty_pages.is_some()),
        ("huge_pages", huge_pages.is_some()),
        ("cpu_template", cpu_template.is_some()),
    ];
    if let Some((field, _)) = fixed.into_iter().find(|(_, given)| *given) {
        return Err(ConfigError::Fixed { field });
    }
    check_change(patch)?;
    check_max_private(max_private_mib.flatten())?;
    Ok(max_private_mib)
}

fn check_change(patch: MachinePatch) -> Result<(), ConfigError> {
    if patch == MachinePatch::default() { Err(ConfigError::NoChange) } else { Ok(()) }
}

fn refuse_if(given: bool, field: &str, remedy: &'static str) -> Result<(), ConfigError> {
    if given { Err(ConfigError::NotOffered { field: field.to_owned(), remedy }) } else { Ok(()) }
}

/// Checks that nothing is asked for that is not offered at all.
fn check_offered(fields: [(&str, &NotOffered); 4]) -> Result<(), ConfigError> {
    fields.into_iter().try_for_each(|(field, value)| refuse_if(value.is_some(), field, "leave it out, or say null"))
}

/// Checks the limit of private memory.
pub fn check_max_private(mib: Option<u64>) -> Result<(), ConfigError> {
    if mib == Some(0) { Err(ConfigError::MaxPrivate) } else { Ok(()) }
}

/// Checks what to boot.
pub fn check_boot_source(source: &BootSource) -> Result<Kernel, ConfigError> {
    match (&source.kernel_image_path, source.embedded_guest) {
        (Some(_), true) => Err(ConfigError::TwoKernels),
        (None, false) => Err(ConfigError::NoKernel),
        (None, true) if source.initrd_path.is_some() => Err(ConfigError::EmbeddedInitrd),
        (None, true) => Ok(Kernel::Embedded),
        (Some(path), false) => Ok(Kernel::File(path.clone())),
    }
}

/// Checks the vsock device.
pub fn check_vsock(vsock: &Vsock) -> Result<(), ConfigError> {
    if vsock.guest_cid < MIN_CID || vsock.guest_cid == u32::MAX {
        return Err(ConfigError::GuestCid(vsock.guest_cid));
    }
    listener::check_path(&vsock.uds_path).map_err(|e| ConfigError::UdsPath(e.to_string()))
}

/// Checks the network interfaces, one by one and against each other.
pub fn check_network(interfaces: &[NetworkInterface]) -> Result<(), ConfigError> {
    if interfaces.len() > MAX_INTERFACES {
        return Err(ConfigError::TooManyInterfaces(interfaces.len()));
    }
    for (i, interface) in interfaces.iter().enumerate() {
        let NetworkInterface { iface_id, host_dev_name: tap, guest_mac, rx_rate_limiter, tx_rate_limiter, mtu } =
            interface;
        refuse_if(mtu.is_some(), &format!("network interface {iface_id}: mtu"), "leave it out; the guest can set one")?;
        check_id("network-interfaces.iface_id", iface_id)?;
        // What the kernel would refuse, or take for a pattern, and what ends the name on a command line.
        let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%' | ',');
        if tap.is_empty() || tap.len() > MAX_NAME || !tap.chars().all(plain) || tap == "." || tap == ".." {
            return Err(ConfigError::TapName { iface_id: iface_id.clone(), tap: tap.clone() });
        }
        check_rate(&format!("network interface {iface_id}: rx_rate_limiter"), rx_rate_limiter.as_ref())?;
        check_rate(&format!("network interface {iface_id}: tx_rate_limiter"), tx_rate_limiter.as_ref())?;
        for other in &interfaces[..i] {
            let same = [
                ("iface_id", (other.iface_id == *iface_id).then(|| iface_id.clone())),
                ("host_dev_name", (other.host_dev_name == *tap).then(|| tap.clone())),
                ("guest_mac", guest_mac.filter(|mac| other.guest_mac == Some(*mac)).map(|mac| mac.to_string())),
            ];
            if let Some((field, value)) = same.into_iter().find_map(|(field, value)| Some((field, value?))) {
                return Err(ConfigError::TwoInterfaces { field, value });
            }
        }
    }
    Ok(())
}

/// The network interfaces with another one, in the place of the one of the same name if there is one.
pub fn with_interface(
    interfaces: &[NetworkInterface],
    interface: NetworkInterface,
) -> Result<Vec<NetworkInterface>, ConfigError> {
    let interfaces = with(interfaces, interface, |a, b| a.iface_id == b.iface_id);
    check_network(&interfaces)?;
    Ok(interfaces)
}

/// Checks the source of entropy.
pub fn check_entropy(entropy: &Entropy) -> Result<(), ConfigError> {
    check_rate("entropy.rate_limiter", entropy.rate_limiter.as_ref())
}

/// Checks where the console leads.
pub fn check_serial(serial: Option<&Serial>) -> Result<Place, ConfigError> {
    let Some(Serial { serial_out_path, pty, rate_limiter }) = serial else { return Ok(Place::Stdio) };
    refuse_if(rate_limiter.is_some(), "serial.rate_limiter", "leave it out; a console file is bounded in size")?;
    match (serial_out_path, pty) {
        (None, false) => Ok(Place::Stdio),
        (None, true) => Ok(Place::Pty),
        (Some(path), false) => Ok(Place::File(path.clone())),
        (Some(_), true) => Err(ConfigError::TwoConsoles),
    }
}

/// Checks where a VM is saved.
pub fn check_saved_state(saved: &SavedState) -> Result<(), ConfigError> {
    match saved.path.file_name() {
        Some(name) if name.len() <= MAX_SAVED_NAME => Ok(()),
        _ => Err(ConfigError::SavedPath(saved.path.clone())),
    }
}

/// Checks the balloon of a guest of so much memory.
pub fn check_balloon_config(balloon: &Balloon, memory_mib: u64) -> Result<(), ConfigError> {
    let remedy = "leave it out; free_page_reporting gives free memory back unasked";
    refuse_if(balloon.free_page_hinting, "balloon.free_page_hinting", remedy)?;
    check_balloon(balloon.amount_mib, memory_mib)
}

/// Checks how large the balloon of a guest of so much memory shall be.
pub fn check_balloon(amount_mib: u64, memory_mib: u64) -> Result<(), ConfigError> {
    if amount_mib > memory_mib { Err(ConfigError::Balloon { amount_mib, memory_mib }) } else { Ok(()) }
}

/// Checks how often a guest that was started with one interval shall report statistics, in seconds.
pub fn check_interval(started_with: u16, wanted: u16) -> Result<(), ConfigError> {
    match (started_with, wanted) {
        (0, 0) => Ok(()),
        (0, _) => Err(ConfigError::NoStatistics),
        (_, 0) => Err(ConfigError::Interval),
        _ => Ok(()),
    }
}

/// Checks a disk by itself.
pub fn check_drive(drive: &Drive) -> Result<(), ConfigError> {
    let Drive { drive_id: id, is_root_device, is_read_only, partuuid, io_engine, rate_limiter, .. } = drive;
    check_id("drives.drive_id", id)?;
    check_rate(&format!("drives.{id}.rate_limiter"), rate_limiter.as_ref())?;
    refuse_if(drive.socket.is_some(), &format!("drives.{id}.socket"), "use path_on_host; there is no vhost-user")?;
    if *io_engine == IoEngine::Async {
        return Err(DriveError::Async(id.clone()).into());
    }
    for (field, given) in [("overlay", drive.overlay), ("max_overlay_mib", drive.max_overlay_mib.is_some())] {
        if *is_read_only && given {
            return Err(DriveError::ReadOnly(id.clone(), field).into());
        }
    }
    if drive.max_overlay_mib == Some(0) {
        return Err(DriveError::NoOverlay(id.clone()).into());
    }
    let plain = |id: &String| {
        let all = id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        *is_root_device && all && (1..=64).contains(&id.len())
    };
    if !partuuid.as_ref().is_none_or(plain) {
        return Err(DriveError::Partuuid(id.clone()).into());
    }
    Ok(())
}

/// The disks with another one, in the place of the one of the same name if there is one.
pub fn with_drive(drives: &[Drive], drive: Drive) -> Result<Vec<Drive>, ConfigError> {
    let drives = with(drives, drive, |a, b| a.drive_id == b.drive_id);
    check_drives(&drives)?;
    Ok(drives)
}

/// A list with another item, in the place of the one that is the same device if there is one.
fn with<T: Clone>(list: &[T], item: T, same: impl Fn(&T, &T) -> bool) -> Vec<T> {
    let mut list = list.to_vec();
    match list.iter_mut().find(|known| same(known, &item)) {
        Some(known) => *known = item,
        None => list.push(item),
    }
    list
}

/// Checks disks, each by itself and all together.
pub fn check_drives(drives: &[Drive]) -> Result<(), ConfigError> {
    drives.iter().try_for_each(check_drive)?;
    for (i, drive) in drives.iter().enumerate() {
        if drives[..i].iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(DriveError::Duplicate(drive.drive_id.clone()).into());
        }
    }
    let mut roots = drives.iter().filter(|drive| drive.is_root_device).map(|drive| drive.drive_id.clone());
    match (roots.next(), roots.next()) {
        (Some(one), Some(two)) => Err(DriveError::TwoRoots(one, two).into()),
        _ => Ok(()),
    }
}

/// One of these disks with its bounds changed, which is all that can be changed of a disk.
pub fn with_drive_update(drives: &[Drive], update: &DriveUpdate) -> Result<Drive, ConfigError> {
    let DriveUpdate { drive_id, path_on_host, max_overlay_mib, rate_limiter } = update;
    let drive = drives.iter().find(|drive| drive.drive_id == *drive_id);
    let mut drive = drive.ok_or_else(|| DriveError::Unknown(drive_id.clone()))?.clone();
    if path_on_host.is_some() {
        return Err(DriveError::Path(drive_id.clone()).into());
    }
    if max_overlay_mib.is_none() && rate_limiter.is_none() {
        return Err(DriveError::NoChange(drive_id.clone()).into());
    }
    drive.max_overlay_mib = max_overlay_mib.unwrap_or(drive.max_overlay_mib);
    drive.rate_limiter = updated(drive.rate_limiter, *rate_limiter);
    // What a disk cannot be configured with it cannot be changed to: a snapshot records it, and a restore checks it.
    check_drive(&drive)?;
    Ok(drive)
}

/// One of these network interfaces with its bounds changed, which is all that can be changed of one.
pub fn with_network_update(
    interfaces: &[NetworkInterface],
    update: &NetworkUpdate,
) -> Result<NetworkInterface, ConfigError> {
    let NetworkUpdate { iface_id, rx_rate_limiter, tx_rate_limiter } = update;
    let interface = interfaces.iter().find(|interface| interface.iface_id == *iface_id);
    let mut interface = interface.ok_or_else(|| ConfigError::NoInterface(iface_id.clone()))?.clone();
    interface.rx_rate_limiter = updated(interface.rx_rate_limiter, *rx_rate_limiter);
    interface.tx_rate_limiter = updated(interface.tx_rate_limiter, *tx_rate_limiter);
    check_network(std::slice::from_ref(&interface))?;
    Ok(interface)
}

fn updated(limiter: Option<RateLimiter>, update: Option<RateLimiter>) -> Option<RateLimiter> {
    update.map_or(limiter, |update| Some(limiter.unwrap_or_default().updated(update)))
}

/// Checks that there is a place for each device.
pub fn check_places(plan: &DevicePlan) -> Result<(), ConfigError> {
    match plan.virtio_count() {
        count if count > MAX_VIRTIO => Err(ConfigError::TooMany(count)),
        _ => Ok(()),
    }
}

/// Checks that there will be a place for each device that is configured so far.
pub fn check_room(config: &VmConfig) -> Result<(), ConfigError> {
    let VmConfig { vsock, drives, network_interfaces: network, entropy, balloon, .. } = config;
    let (vsock, drives, network) = (vsock.clone(), drives.clone(), network.clone());
    check_places(&DevicePlan { vsock, drives, network, entropy: *entropy, balloon: *balloon })
}

/// Checks a whole configuration.
pub fn plan(config: &VmConfig) -> Result<BootPlan, ConfigError> {
    let VmConfig {
        boot_source,
        machine_config,
        vsock,
        drives,
        network_interfaces: network,
        entropy,
        balloon,
        serial,
        logger: _,
        metrics: _,
        saved_state,
        cpu_config,
        mmds_config,
        pmem,
        memory_hotplug,
    } = config;
    check_offered([
        ("cpu-config", cpu_config),
        ("mmds-config", mmds_config),
        ("pmem", pmem),
        ("memory-hotplug", memory_hotplug),
    ])?;
    let source = boot_source.as_ref().ok_or(ConfigError::NoKernel)?;
    let kernel = check_boot_source(source)?;
    check_machine(machine_config)?;
    vsock.as_ref().map(check_vsock).transpose()?;
    check_network(network)?;
    entropy.as_ref().map(check_entropy).transpose()?;
    check_serial(serial.as_ref())?;
    saved_state.as_ref().map_or(Ok(()), check_saved_state)?;
    balloon.map_or(Ok(()), |balloon| check_balloon_config(&balloon, machine_config.mem_size_mib))?;
    check_drives(drives)?;
    let mut drives = drives.clone();
    // Stable: the others keep their order.
    drives.sort_by_key(|drive| !drive.is_root_device);
    let (vsock, network) = (vsock.clone(), network.clone());
    let devices = DevicePlan { vsock, drives, network, entropy: *entropy, balloon: *balloon };
    check_places(&devices)?;
    Ok(BootPlan {
        kernel,
        initrd: source.initrd_path.clone(),
        command_line: source.boot_args.clone().unwrap_or_default(),
        vcpus: machine_config.vcpu_count,
        memory_bytes: machine_config.mem_size_mib << 20,
        devices,
    })
}

/// Checks what a shell is to be built of: a configuration without what only a guest that is booted has.
pub fn shape(config: &VmConfig) -> Result<Shape, ConfigError> {
    let VmConfig { boot_source, drives, network_interfaces, entropy, saved_state, machine_config, .. } = config;
    let only_booted = "a shell has none: a snapshot brings its own; leave it out";
    refuse_if(boot_source.is_some(), "boot-source", only_booted)?;
    let bounds = "a snapshot brings the bounds of its devices; leave it out";
    for Drive { drive_id, rate_limiter, max_overlay_mib, .. } in drives {
        refuse_if(rate_limiter.is_some(), &format!("drives.{drive_id}.rate_limiter"), bounds)?;
        refuse_if(max_overlay_mib.is_some(), &format!("drives.{drive_id}.max_overlay_mib"), bounds)?;
    }
    for NetworkInterface { iface_id, rx_rate_limiter, tx_rate_limiter, .. } in network_interfaces {
        refuse_if(rx_rate_limiter.is_some(), &format!("network interface {iface_id}: rx_rate_limiter"), bounds)?;
        refuse_if(tx_rate_limiter.is_some(), &format!("network interface {iface_id}: tx_rate_limiter"), bounds)?;
    }
    let limit = entropy.and_then(|entropy| entropy.rate_limiter);
    refuse_if(limit.is_some(), "entropy.rate_limiter", bounds)?;
    refuse_if(saved_state.is_some(), "saved-state", "a shell has none: it loads what a request names; leave it out")?;
    refuse_if(
        machine_config.max_private_mib.is_some(),
        "machine-config.max_private_mib",
        "the request that loads a snapshot says it; leave it out",
    )?;
    // The rest is as for one that is booted.
    let bootable =
        VmConfig { boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }), ..config.clone() };
    let BootPlan { vcpus, memory_bytes, devices, .. } = plan(&bootable)?;
    Ok(Shape { vcpus, memory_bytes, devices })
}

/// Checks the name of a disk or a network interface.
pub fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(ConfigError::Id { field: field.to_owned(), id: id.to_owned() });
    }
    Ok(())
}

/// Checks a bound of a device's traffic. `field` names it.
pub fn check_rate(field: &str, rate: Option<&RateLimiter>) -> Result<(), ConfigError> {
    let RateLimiter { bandwidth, ops } = rate.copied().unwrap_or_default();
    for (part, bucket) in [("bandwidth", bandwidth), ("ops", ops)] {
        if bucket.is_some_and(|TokenBucket { size, refill_time, .. }| (size == 0) != (refill_time == 0)) {
            return Err(ConfigError::Rate(format!("{field}.{part}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
