//! What of a configuration its guest can tell, as a document with a digest: two machines with the same one are alike to
//! their guests. Pure.

use api_spec::devices::{Balloon, Drive, Entropy, NetworkInterface};
use api_spec::strict;
use api_spec::vm::{BootSource, CpuTemplate, MachineConfig, VmConfig, Vsock};

/// Name of the file of a saved state that holds it.
pub const FILE: &str = ::snapshot::file::CONFIGURATION;
/// Longest such file, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// Why there is no copy of the configuration that a machine was saved with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// It is of another saved state, or damaged.
    #[error("{FILE} is not the one that the saved state was written with: its digest does not match")]
    Digest,
    /// It cannot be read as one.
    #[error("{FILE} cannot be understood: {0}")]
    Document(#[from] strict::DocumentError),
}

/// What of a configuration its guest can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    config: VmConfig,
    text: Vec<u8>,
}

impl Configuration {
    /// That of this configuration.
    pub fn of(config: &VmConfig) -> Self {
        let config = seen(config);
        // Our own documents have string keys and no failing serializers.
        let text = serde_json::to_vec(&config).unwrap_or_default();
        Configuration { config, text }
    }

    /// The one that was written as this text, whose digest, in hex, is known.
    pub fn read(text: &[u8], digest: &str) -> Result<Self, ConfigurationError> {
        if blake3::hash(text).to_hex().as_str() != digest {
            return Err(ConfigurationError::Digest);
        }
        Ok(Configuration { config: strict::from_slice(text)?, text: text.to_vec() })
    }

    /// Its fields; those that no guest can tell are as if they had not been given.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The text, as it is kept.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// BLAKE3 of the text, in hex.
    pub fn digest(&self) -> String {
        blake3::hash(&self.text).to_hex().to_string()
    }
}

/// The same configuration without all that its guest cannot tell: where devices lead on the host, bounds, the console, the
/// log, counters; and said in one of the ways that mean the same.
fn seen(config: &VmConfig) -> VmConfig {
    let VmConfig {
        boot_source,
        machine_config,
        vsock,
        drives,
        network_interfaces,
        entropy,
        serial: _,
        balloon,
        logger: _,
        metrics: _,
        saved_state: _,
        cpu_config: _,
        mmds_config: _,
        pmem: _,
        memory_hotplug: _,
    } = config;
    let mut drives: Vec<Drive> = drives.iter().map(drive).collect();
    // As the guest finds them.
    drives.sort_by_key(|drive| !drive.is_root_device);
    VmConfig {
        boot_source: boot_source.as_ref().map(source),
        machine_config: machine(machine_config),
        vsock: vsock.as_ref().map(socket),
        drives,
        network_interfaces: network_interfaces.iter().map(interface).collect(),
        entropy: entropy.map(|Entropy { rate_limiter: _ }| Entropy::default()),
        balloon: balloon.map(|balloon| Balloon { free_page_hinting: false, ..balloon }),
        ..VmConfig::default()
    }
}

fn source(source: &BootSource) -> BootSource {
    BootSource { boot_args: source.boot_args.clone().filter(|args| !args.is_empty()), ..source.clone() }
}

fn machine(machine: &MachineConfig) -> MachineConfig {
    let MachineConfig {
        vcpu_count,
        mem_size_mib,
        smt,
        track_dirty_pages: _,
        huge_pages,
        cpu_template,
        max_private_mib: _,
    } = *machine;
    MachineConfig {
        vcpu_count,
        mem_size_mib,
        smt,
        huge_pages,
        cpu_template: cpu_template.filter(|template| *template != CpuTemplate::None),
        ..MachineConfig::default()
    }
}

fn socket(vsock: &Vsock) -> Vsock {
    Vsock { guest_cid: vsock.guest_cid, uds_path: Default::default(), vsock_id: None }
}

fn drive(drive: &Drive) -> Drive {
    Drive { io_engine: Default::default(), rate_limiter: None, max_overlay_mib: None, socket: None, ..drive.clone() }
}

fn interface(interface: &NetworkInterface) -> NetworkInterface {
    NetworkInterface {
        iface_id: interface.iface_id.clone(),
        host_dev_name: String::new(),
        guest_mac: interface.guest_mac,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        mtu: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn parse(config: &Value) -> VmConfig {
        serde_json::from_value(config.clone()).unwrap()
    }

    fn full() -> Value {
        serde_json::from_str(include_str!("../../../../resources/vm.json")).unwrap()
    }

    fn digest(config: &Value) -> String {
        Configuration::of(&parse(config)).digest()
    }

    #[test]
    fn what_a_guest_cannot_tell_makes_no_difference() {
        for (pointer, value) in [
            ("/logger/level", json!("Debug")),
            ("/logger/log_path", json!("elsewhere")),
            ("/metrics/metrics_path", json!("elsewhere")),
            ("/serial/serial_out_path", json!("elsewhere")),
            ("/vsock/uds_path", json!("elsewhere")),
            ("/machine-config/max_private_mib", json!(7)),
            ("/machine-config/track_dirty_pages", json!(true)),
            ("/machine-config/cpu_template", Value::Null),
            ("/drives/0/rate_limiter", Value::Null),
            ("/drives/0/max_overlay_mib", json!(9)),
            ("/network-interfaces/0/host_dev_name", json!("tap9")),
            ("/network-interfaces/0/rx_rate_limiter", Value::Null),
            ("/entropy/rate_limiter", Value::Null),
            ("/boot-source/boot_args", Value::Null),
            ("/saved-state/path", json!("elsewhere")),
        ] {
            let mut changed = full();
            *changed.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
            assert_eq!(digest(&changed), digest(&full()), "{pointer}");
        }
    }

    #[test]
    fn what_a_guest_can_tell_makes_a_difference() {
        for (pointer, value) in [
            ("/boot-source", json!({ "kernel_image_path": "k", "initrd_path": "i" })),
            ("/boot-source/boot_args", json!("quiet")),
            ("/machine-config/vcpu_count", json!(3)),
            ("/machine-config/mem_size_mib", json!(65)),
            ("/vsock/guest_cid", json!(9)),
            ("/vsock", Value::Null),
            ("/drives/0/path_on_host", json!("other")),
            ("/drives/0/cache_type", json!("Writeback")),
            ("/drives/0/overlay", json!(false)),
            ("/drives", json!([])),
            ("/network-interfaces/0/guest_mac", json!("06:00:0a:09:00:03")),
            ("/entropy", Value::Null),
            ("/balloon/deflate_on_oom", json!(false)),
        ] {
            let mut changed = full();
            *changed.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
            assert_ne!(digest(&changed), digest(&full()), "{pointer}");
        }
    }

    #[test]
    fn disks_are_told_in_the_order_of_the_guest() {
        let drives = |drives: [&str; 2]| {
            let drive = |id| json!({ "drive_id": id, "path_on_host": id, "is_root_device": id == "root" });
            let config = json!({ "boot-source": { "embedded_guest": true }, "drives": drives.map(drive) });
            digest(&config)
        };
        assert_eq!(drives(["root", "a"]), drives(["a", "root"]));
        assert_ne!(drives(["a", "b"]), drives(["b", "a"]));
    }

    proptest! {
        #[test]
        fn what_is_kept_comes_back(vcpus in 1..9_u8, memory in 8..1000_u64, args in "\\PC{0,20}", at in any::<prop::sample::Index>()) {
            let mut config = full();
            config["machine-config"]["vcpu_count"] = vcpus.into();
            config["machine-config"]["mem_size_mib"] = memory.into();
            config["boot-source"]["boot_args"] = args.into();
            let kept = Configuration::of(&parse(&config));
            prop_assert_eq!(&Configuration::of(kept.config()), &kept);
            prop_assert_eq!(&Configuration::read(kept.text(), &kept.digest()).unwrap(), &kept);
            // No byte of it can be changed.
            let mut text = kept.text().to_vec();
            let at = at.index(text.len());
            text[at] ^= 1;
            prop_assert!(Configuration::read(&text, &kept.digest()).is_err());
        }
    }
}
