//! How a machine that was saved is restored with the configuration of today. Pure.
//!
//! What its guest can tell is as it was saved. What it cannot tell, such as sockets, tap devices and limits, is as it is
//! configured now.

use super::seen::Configuration;
use api_spec::devices::{Drive, NetworkInterface};
use api_spec::snapshot::{DriveOverride, NetworkOverride, SnapshotLoad, VsockOverride};
use api_spec::vm::VmConfig;
use snapshot::manifest::Devices;
use std::path::Path;

/// How it is restored.
#[derive(Clone, Debug, PartialEq)]
pub struct GoingOn {
    /// The request of a load that does it.
    pub load: SnapshotLoad,
    /// The disks whose images the guest goes on writing itself.
    pub in_place: Vec<String>,
}

/// Why it cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GoingOnError {
    /// The guest would write to an image that the configuration does not let it write.
    #[error(
        "drive {0} was saved with an image that its guest writes, and is not configured so any more; a guest goes on writing to configured images alone"
    )]
    Drive(String),
}

/// How the machine is restored that was saved at `path` with these devices and `saved`, now that `present` is configured.
/// Its monotonic clock makes up for the time in between if it can.
pub fn plan(
    path: &Path,
    devices: &Devices,
    has_clock: bool,
    saved: &Configuration,
    present: &VmConfig,
) -> Result<GoingOn, GoingOnError> {
    let saved_drives = &saved.config().drives;
    let mut in_place = Vec::new();
    for drive in saved_drives.iter().filter(|drive| is_written(drive)) {
        if !present.drives.iter().any(|now| is_same(drive, now)) {
            return Err(GoingOnError::Drive(drive.drive_id.clone()));
        }
        in_place.push(drive.drive_id.clone());
    }
    // What is configured may be named by a relative path, and may be a device.
    let named = present.drives.iter().filter(|now| saved_drives.iter().any(|drive| is_same(drive, now)));
    let has_image = |id: &str| devices.drives.iter().any(|drive| drive.drive_id == id && drive.image.is_some());
    let drive_overrides = named
        .filter(|drive| has_image(&drive.drive_id))
        .map(|drive| DriveOverride { drive_id: drive.drive_id.clone(), path_on_host: drive.path_on_host.clone() });
    let has_interface = |id: &str| devices.network.iter().any(|interface| interface.iface_id == id);
    let taps = present.network_interfaces.iter().filter(|interface| has_interface(&interface.iface_id));
    let network_overrides = taps.map(|NetworkInterface { iface_id, host_dev_name, .. }| NetworkOverride {
        iface_id: iface_id.clone(),
        host_dev_name: host_dev_name.clone(),
        guest_mac: None,
    });
    let vsock = present.vsock.as_ref().filter(|_| devices.vsock.is_some());
    let load = SnapshotLoad {
        resume_vm: true,
        // It is no clone: nobody else is this guest.
        new_generation: false,
        clock_realtime: has_clock,
        drive_overrides: drive_overrides.collect(),
        network_overrides: network_overrides.collect(),
        vsock_override: vsock.map(|vsock| VsockOverride { uds_path: vsock.uds_path.clone() }),
        max_private_mib: present.machine_config.max_private_mib,
        ..SnapshotLoad::of(path.to_owned())
    };
    Ok(GoingOn { load, in_place })
}

/// Whether the guest writes the image itself.
fn is_written(drive: &Drive) -> bool {
    !drive.is_read_only && !drive.overlay
}

/// Whether a disk is still the same one on the host.
fn is_same(saved: &Drive, now: &Drive) -> bool {
    let of = |drive: &Drive| (drive.drive_id.clone(), drive.path_on_host.clone(), drive.is_read_only, drive.overlay);
    of(saved) == of(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use snapshot::manifest::{CacheType, DiskImage, DriveDevice, NetworkDevice, VsockDevice};

    fn config(drives: Value, tap: &str) -> VmConfig {
        serde_json::from_value(json!({
            "boot-source": { "embedded_guest": true },
            "machine-config": { "max_private_mib": 9 },
            "vsock": { "guest_cid": 3, "uds_path": format!("{tap}.vsock") },
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": tap }],
            "drives": drives,
        }))
        .unwrap()
    }

    fn devices(ids: &[&str]) -> Devices {
        let drive = |id: &&str| DriveDevice {
            drive_id: (*id).into(),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::Unsafe,
            rate_limit: None,
            max_overlay_mib: None,
            size_bytes: 512,
            image: Some(DiskImage { path: format!("/{id}"), modified_ns: None }),
            held: None,
        };
        Devices {
            drives: ids.iter().map(drive).collect(),
            vsock: Some(VsockDevice { guest_cid: 3, uds_path: "then".into() }),
            network: vec![NetworkDevice {
                iface_id: "eth0".into(),
                host_dev_name: "then".into(),
                guest_mac: None,
                rx_rate_limit: None,
                tx_rate_limit: None,
            }],
            ..Devices::default()
        }
    }

    #[test]
    fn the_host_side_is_as_configured_now() {
        let raw = json!({ "drive_id": "raw", "path_on_host": "raw.img" });
        let overlay = json!({ "drive_id": "over", "path_on_host": "over.img", "overlay": true });
        let moved = json!({ "drive_id": "over", "path_on_host": "moved.img", "overlay": true });
        let then = Configuration::of(&config(json!([raw, overlay]), "tap0"));
        let now = config(json!([raw, moved]), "tap1");
        let devices = devices(&["raw", "over"]);
        let GoingOn { load, in_place } = plan(Path::new("s"), &devices, true, &then, &now).unwrap();
        assert_eq!(in_place, ["raw"]);
        assert_eq!(load.drive_overrides, [DriveOverride { drive_id: "raw".into(), path_on_host: "raw.img".into() }]);
        assert_eq!(load.network_overrides[0].host_dev_name, "tap1");
        assert_eq!(load.vsock_override.unwrap().uds_path, Path::new("tap1.vsock"));
        assert!(load.resume_vm && !load.new_generation && load.clock_realtime);
        assert_eq!(load.max_private_mib, Some(9));
    }

    #[test]
    fn a_guest_writes_to_no_image_that_is_not_configured() {
        let raw = json!({ "drive_id": "raw", "path_on_host": "raw.img" });
        let then = Configuration::of(&config(json!([raw]), "tap0"));
        for other in [
            json!([]),
            json!([{ "drive_id": "raw", "path_on_host": "other.img" }]),
            json!([{ "drive_id": "raw", "path_on_host": "raw.img", "is_read_only": true }]),
            json!([{ "drive_id": "raw", "path_on_host": "raw.img", "overlay": true }]),
        ] {
            let refused = plan(Path::new("s"), &devices(&["raw"]), false, &then, &config(other, "tap0"));
            assert_eq!(refused, Err(GoingOnError::Drive("raw".into())));
        }
    }

    #[test]
    fn a_device_that_was_not_saved_is_not_asked_for() {
        let then = Configuration::of(&config(json!([]), "tap0"));
        let now = config(json!([{ "drive_id": "new", "path_on_host": "new.img" }]), "tap0");
        let GoingOn { load, in_place } = plan(Path::new("s"), &Devices::default(), false, &then, &now).unwrap();
        assert!(in_place.is_empty() && load.drive_overrides.is_empty() && load.network_overrides.is_empty());
        assert!(load.vsock_override.is_none() && !load.clock_realtime);
    }
}
