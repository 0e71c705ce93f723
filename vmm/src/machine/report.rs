//! What is told of virtio devices, together, so that it can be kept.

use super::wiring::{Devices, Slot};
use crate::devices::lock;
use api_spec::devices::BalloonStatistics;
use api_spec::stats::{BalloonStats, DriveStats, EntropyStats, NetworkStats, VsockStats};

/// What the devices have done, and where the balloon stands.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub drives: Vec<DriveStats>,
    pub network: Vec<NetworkStats>,
    pub vsock: Option<VsockStats>,
    pub entropy: Option<EntropyStats>,
    pub balloon: Option<(BalloonStats, BalloonStatistics)>,
}

impl Report {
    /// What these devices have done so far.
    pub fn of(devices: &Devices) -> Self {
        let Devices { vsock, network, entropy, balloon, drives, .. } = devices;
        Report {
            drives: drives.iter().map(|Slot { device, .. }| lock(device).stats()).collect(),
            network: network.iter().map(|Slot { device, .. }| lock(device).stats()).collect(),
            vsock: vsock.as_ref().map(|Slot { device, .. }| lock(device).stats()),
            entropy: entropy.as_ref().map(|Slot { device, .. }| lock(device).stats()),
            balloon: balloon.as_ref().map(|Slot { device, .. }| {
                let balloon = lock(device);
                (balloon.stats(), balloon.statistics())
            }),
        }
    }
}
