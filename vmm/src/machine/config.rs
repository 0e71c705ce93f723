//! Is a configuration one that can be built? Pure; the same check for the command line, the file and the API.

use crate::console::Place;
use crate::devices::virtio::net::tap::MAX_NAME;
use crate::loader::Kernel;
use crate::memory::layout::{MAX_MIB, MIN_MIB};
use api_spec::devices::{Entropy, NetworkInterface, RateLimiter, Serial, TokenBucket};
use api_spec::vm::{BootSource, MachineConfig, VmConfig, Vsock};
use std::path::PathBuf;
use uffd_handler::listener;

/// Most vCPUs that a VM may have.
pub const MAX_VCPUS: u8 = 8;
/// Most network interfaces that a VM may have.
pub const MAX_INTERFACES: usize = 8;
/// Context ids below this one have a meaning of their own.
const MIN_CID: u32 = 3;

/// Why a configuration cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// vCPUs out of range.
    #[error("machine-config.vcpu_count is {0}; it may be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Memory out of range.
    #[error("machine-config.mem_size_mib is {0}; it may be {MIN_MIB} to {MAX_MIB}")]
    Memory(u64),
    /// A reserved context id.
    #[error("vsock.guest_cid is {0}; it may be {MIN_CID} to 4294967294")]
    GuestCid(u32),
    /// A socket path that is too long.
    #[error("vsock.uds_path: {0}")]
    UdsPath(String),
    /// Two places for the console.
    #[error("serial names both a file (`serial_out_path`) and `pty`; choose one")]
    TwoConsoles,
    /// A name that cannot be one.
    #[error("{field} is {id:?}; it may be 1 to 64 letters, digits, `-` and `_`")]
    Id {
        /// Which field.
        field: &'static str,
        /// What it says.
        id: String,
    },
    /// A name that no tap device can have.
    #[error(
        "network interface {iface_id}: host_dev_name is {tap:?}; it may be 1 to {MAX_NAME} printable characters but `/`, `:` and `%`"
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
    /// More than there may be.
    #[error("there are {0} network interfaces; there may be {MAX_INTERFACES}")]
    TooManyInterfaces(usize),
    /// A request that contradicts itself.
    #[error("the path names the network interface {path} and the body {body}; they must agree")]
    WhichInterface {
        /// What the path says.
        path: String,
        /// What the body says.
        body: String,
    },
    /// A rate limit that nothing would ever pass.
    #[error("{0}: `size` and `refill_time` must be at least 1")]
    Rate(String),
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
    /// The source of entropy.
    pub entropy: Option<Entropy>,
    /// The network interfaces.
    pub network: Vec<NetworkInterface>,
}

impl DevicePlan {
    /// Number of virtio devices.
    pub fn virtio_count(&self) -> u32 {
        let DevicePlan { vsock, network, entropy } = self;
        u32::from(vsock.is_some()) + network.len() as u32 + u32::from(entropy.is_some())
    }
}

/// Checks CPUs and memory.
pub fn check_machine(config: &MachineConfig) -> Result<(), ConfigError> {
    let MachineConfig { vcpu_count, mem_size_mib } = *config;
    if !(1..=MAX_VCPUS).contains(&vcpu_count) {
        return Err(ConfigError::Vcpus(vcpu_count));
    }
    if !(MIN_MIB..=MAX_MIB).contains(&mem_size_mib) {
        return Err(ConfigError::Memory(mem_size_mib));
    }
    Ok(())
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
        let NetworkInterface { iface_id, host_dev_name: tap, guest_mac, rx_rate_limiter, tx_rate_limiter } = interface;
        check_id("network-interfaces.iface_id", iface_id)?;
        // What the kernel would refuse, or take for a pattern.
        let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
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

/// The network interfaces with another one, in the place of the one of the same name if there is one. `id` is what the
/// request's path calls it.
pub fn with_interface(
    interfaces: &[NetworkInterface],
    id: &str,
    interface: NetworkInterface,
) -> Result<Vec<NetworkInterface>, ConfigError> {
    if interface.iface_id != id {
        return Err(ConfigError::WhichInterface { path: id.to_owned(), body: interface.iface_id });
    }
    let mut interfaces = interfaces.to_vec();
    match interfaces.iter_mut().find(|known| known.iface_id == id) {
        Some(known) => *known = interface,
        None => interfaces.push(interface),
    }
    check_network(&interfaces)?;
    Ok(interfaces)
}

/// Checks the source of entropy.
pub fn check_entropy(entropy: &Entropy) -> Result<(), ConfigError> {
    check_rate("entropy.rate_limiter", entropy.rate_limiter.as_ref())
}

/// Checks where the console leads.
pub fn check_serial(serial: Option<&Serial>) -> Result<Place, ConfigError> {
    match serial.map(|Serial { serial_out_path, pty }| (serial_out_path, *pty)) {
        None | Some((None, false)) => Ok(Place::Stdio),
        Some((None, true)) => Ok(Place::Pty),
        Some((Some(path), false)) => Ok(Place::File(path.clone())),
        Some((Some(_), true)) => Err(ConfigError::TwoConsoles),
    }
}

/// Checks a whole configuration.
pub fn plan(config: &VmConfig) -> Result<BootPlan, ConfigError> {
    let VmConfig { boot_source, machine_config, vsock, network_interfaces: network, entropy, serial } = config;
    let source = boot_source.as_ref().ok_or(ConfigError::NoKernel)?;
    let kernel = check_boot_source(source)?;
    check_machine(machine_config)?;
    vsock.as_ref().map(check_vsock).transpose()?;
    check_network(network)?;
    entropy.as_ref().map(check_entropy).transpose()?;
    check_serial(serial.as_ref())?;
    Ok(BootPlan {
        kernel,
        initrd: source.initrd_path.clone(),
        command_line: source.boot_args.clone().unwrap_or_default(),
        vcpus: machine_config.vcpu_count,
        memory_bytes: machine_config.mem_size_mib << 20,
        devices: DevicePlan { vsock: vsock.clone(), network: network.clone(), entropy: *entropy },
    })
}

/// Checks the name of a disk or a network interface.
pub fn check_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(ConfigError::Id { field, id: id.to_owned() });
    }
    Ok(())
}

/// Checks a bound of a device's traffic. `field` names it.
pub fn check_rate(field: &str, rate: Option<&RateLimiter>) -> Result<(), ConfigError> {
    let RateLimiter { bandwidth, ops } = rate.copied().unwrap_or_default();
    for (part, bucket) in [("bandwidth", bandwidth), ("ops", ops)] {
        if bucket.is_some_and(|TokenBucket { size, refill_time, .. }| size == 0 || refill_time == 0) {
            return Err(ConfigError::Rate(format!("{field}.{part}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(iface_id: &str, tap: &str, mac: Option<&str>) -> NetworkInterface {
        NetworkInterface {
            iface_id: iface_id.into(),
            host_dev_name: tap.into(),
            guest_mac: mac.map(|mac| mac.parse().unwrap()),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }

    fn good() -> VmConfig {
        VmConfig {
            boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }),
            machine_config: MachineConfig { vcpu_count: 8, mem_size_mib: 8 },
            vsock: Some(Vsock { guest_cid: 3, uds_path: "/run/v".into() }),
            network_interfaces: vec![
                interface("eth0", "tap0", Some("06:00:ac:10:00:02")),
                interface("eth1", "tap1", None),
            ],
            entropy: Some(Entropy::default()),
            serial: None,
        }
    }

    #[test]
    fn a_good_configuration_is_planned() {
        let plan = plan(&good()).unwrap();
        assert_eq!((plan.vcpus, plan.memory_bytes, plan.kernel), (8, 8 << 20, Kernel::Embedded));
    }

    #[test]
    fn each_bad_value_is_refused_by_name() {
        let with = |change: fn(&mut VmConfig)| {
            let mut config = good();
            change(&mut config);
            plan(&config).unwrap_err()
        };
        assert_eq!(with(|c| c.machine_config.vcpu_count = 0), ConfigError::Vcpus(0));
        assert_eq!(with(|c| c.machine_config.vcpu_count = 9), ConfigError::Vcpus(9));
        assert_eq!(with(|c| c.machine_config.mem_size_mib = 7), ConfigError::Memory(7));
        assert_eq!(with(|c| c.machine_config.mem_size_mib = u64::MAX), ConfigError::Memory(u64::MAX));
        assert_eq!(with(|c| c.boot_source = None), ConfigError::NoKernel);
        assert_eq!(with(|c| c.boot_source = Some(BootSource::default())), ConfigError::NoKernel);
        let both = with(|c| c.boot_source.as_mut().unwrap().kernel_image_path = Some("k".into()));
        assert_eq!(both, ConfigError::TwoKernels);
        let initrd = with(|c| c.boot_source.as_mut().unwrap().initrd_path = Some("i".into()));
        assert_eq!(initrd, ConfigError::EmbeddedInitrd);
        assert_eq!(with(|c| c.vsock.as_mut().unwrap().guest_cid = 2), ConfigError::GuestCid(2));
        let consoles = with(|c| c.serial = Some(Serial { serial_out_path: Some("f".into()), pty: true }));
        assert_eq!(consoles, ConfigError::TwoConsoles);
        for id in ["", "a/b", "a b", &"x".repeat(65)] {
            assert!(check_id("drives.drive_id", id).is_err(), "{id}");
        }
        assert_eq!(check_id("drives.drive_id", "root-1_A"), Ok(()));
        let ops = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 0 });
        let rate_limiter = Some(RateLimiter { bandwidth: None, ops });
        assert_eq!(check_entropy(&Entropy { rate_limiter }), Err(ConfigError::Rate("entropy.rate_limiter.ops".into())));
        for name in ["", "a b", "a/b", "a:b", "tap%d", ".", "..", "sixteen-bytes-xx", "tap\u{e4}"] {
            let refused = check_network(&[interface("e", name, None)]);
            assert_eq!(refused, Err(ConfigError::TapName { iface_id: "e".into(), tap: name.into() }));
        }
        let mac = Some("06:00:ac:10:00:02");
        for (other, field) in [
            (interface("eth0", "t", None), "iface_id"),
            (interface("e", "tap1", None), "host_dev_name"),
            (interface("e", "t", mac), "guest_mac"),
        ] {
            let mut interfaces = good().network_interfaces;
            interfaces.push(other);
            assert!(
                matches!(check_network(&interfaces), Err(ConfigError::TwoInterfaces { field: f, .. }) if f == field)
            );
        }
        let many: Vec<_> = (0..9).map(|n| interface(&format!("e{n}"), &format!("t{n}"), None)).collect();
        assert_eq!(check_network(&many), Err(ConfigError::TooManyInterfaces(9)));
        let long = with(|c| c.vsock.as_mut().unwrap().uds_path = "x".repeat(108).into());
        assert!(matches!(long, ConfigError::UdsPath(_)));
    }
}
