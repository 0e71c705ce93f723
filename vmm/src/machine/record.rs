//! How devices are configured, as a snapshot's manifest records it, and back. Pure.

use super::config::DevicePlan;
use api_spec::devices::{Balloon, Entropy, NetworkInterface, RateLimiter, TokenBucket};
use api_spec::mac::MacError;
use api_spec::vm::{Readiness, Vsock};
use snapshot::manifest::{self, BalloonDevice, Devices, EntropyDevice, NetworkDevice, RateLimit, VsockDevice};

/// What a manifest says of these devices. The disks are left out: what is said of them is known when they are written.
pub fn devices(plan: &DevicePlan) -> Devices {
    let DevicePlan { vsock, drives: _, network, entropy, balloon } = plan;
    Devices {
        vsock: vsock.as_ref().map(|Vsock { guest_cid, uds_path, vsock_id: _ }| VsockDevice {
            guest_cid: (*guest_cid).into(),
            uds_path: uds_path.to_string_lossy().into_owned(),
        }),
        drives: Vec::new(),
        network: network.iter().map(network_device).collect(),
        entropy: entropy.map(|Entropy { rate_limiter }| EntropyDevice { rate_limit: rate_limiter.map(rate_limit) }),
        balloon: balloon.map(
            |Balloon {
                 amount_mib,
                 deflate_on_oom,
                 stats_polling_interval_s,
                 free_page_reporting,
                 free_page_hinting: _,
             }| BalloonDevice { amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_reporting },
        ),
    }
}

/// The devices that a manifest speaks of, but for the disks.
pub fn plan(devices: &Devices) -> Result<DevicePlan, MacError> {
    let Devices { vsock, drives: _, network, entropy, balloon } = devices;
    Ok(DevicePlan {
        vsock: vsock.as_ref().map(|VsockDevice { guest_cid, uds_path }| Vsock {
            // One that is too large is none that a guest may have, as a check of the plan says.
            guest_cid: u32::try_from(*guest_cid).unwrap_or(u32::MAX),
            uds_path: uds_path.into(),
            vsock_id: None,
        }),
        drives: Vec::new(),
        network: network.iter().map(network_interface).collect::<Result<_, _>>()?,
        entropy: entropy
            .as_ref()
            .map(|EntropyDevice { rate_limit }| Entropy { rate_limiter: rate_limit.map(rate_limiter) }),
        balloon: balloon.map(
            |BalloonDevice { amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_reporting }| Balloon {
                amount_mib,
                deflate_on_oom,
                stats_polling_interval_s,
                free_page_reporting,
                free_page_hinting: false,
            },
        ),
    })
}

fn network_device(interface: &NetworkInterface) -> NetworkDevice {
    let NetworkInterface { iface_id, host_dev_name, guest_mac, rx_rate_limiter, tx_rate_limiter, mtu: _ } = interface;
    NetworkDevice {
        iface_id: iface_id.clone(),
        host_dev_name: host_dev_name.clone(),
        guest_mac: guest_mac.map(|mac| mac.to_string()),
        rx_rate_limit: rx_rate_limiter.map(rate_limit),
        tx_rate_limit: tx_rate_limiter.map(rate_limit),
    }
}

fn network_interface(device: &NetworkDevice) -> Result<NetworkInterface, MacError> {
    let NetworkDevice { iface_id, host_dev_name, guest_mac, rx_rate_limit, tx_rate_limit } = device;
    Ok(NetworkInterface {
        iface_id: iface_id.clone(),
        host_dev_name: host_dev_name.clone(),
        guest_mac: guest_mac.as_deref().map(str::parse).transpose()?,
        rx_rate_limiter: rx_rate_limit.map(rate_limiter),
        tx_rate_limiter: tx_rate_limit.map(rate_limiter),
        mtu: None,
    })
}

/// What a manifest says of what the agent has announced.
pub fn readiness(readiness: Readiness) -> manifest::Readiness {
    match readiness {
        Readiness::Agent => manifest::Readiness::Agent,
        Readiness::Full => manifest::Readiness::Full,
        Readiness::Degraded => manifest::Readiness::Degraded,
    }
}

/// What the agent had announced, of which a manifest says this.
pub fn readiness_of(readiness: manifest::Readiness) -> Readiness {
    match readiness {
        manifest::Readiness::Agent => Readiness::Agent,
        manifest::Readiness::Full => Readiness::Full,
        manifest::Readiness::Degraded => Readiness::Degraded,
    }
}

/// What a manifest says of a bound.
pub fn rate_limit(limiter: RateLimiter) -> RateLimit {
    let bucket = |TokenBucket { size, one_time_burst, refill_time }| manifest::TokenBucket {
        size,
        one_time_burst: one_time_burst.unwrap_or(0),
        refill_ms: refill_time,
    };
    let RateLimiter { bandwidth, ops } = limiter;
    let bound = |config: Option<TokenBucket>| config.filter(TokenBucket::is_bound).map(bucket);
    RateLimit { bandwidth: bound(bandwidth), ops: bound(ops) }
}

/// The bound that a manifest speaks of.
pub fn rate_limiter(limit: RateLimit) -> RateLimiter {
    let bucket = |manifest::TokenBucket { size, one_time_burst, refill_ms }| TokenBucket {
        size,
        one_time_burst: (one_time_burst > 0).then_some(one_time_burst),
        refill_time: refill_ms,
    };
    let RateLimit { bandwidth, ops } = limit;
    RateLimiter { bandwidth: bandwidth.map(bucket), ops: ops.map(bucket) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_comes_back() {
        let bucket = |one_time_burst| Some(TokenBucket { size: 5, one_time_burst, refill_time: 7 });
        let limits = [
            RateLimiter::default(),
            RateLimiter { bandwidth: bucket(None), ops: bucket(Some(9)) },
            RateLimiter { bandwidth: None, ops: bucket(None) },
        ];
        for limit in limits {
            let plan = DevicePlan {
                vsock: Some(Vsock { guest_cid: 7, uds_path: "run/v".into(), vsock_id: None }),
                drives: Vec::new(),
                network: [None, Some("06:00:ac:10:00:02".parse().unwrap())]
                    .map(|guest_mac| NetworkInterface {
                        iface_id: "eth0".into(),
                        host_dev_name: "tap0".into(),
                        guest_mac,
                        rx_rate_limiter: Some(limit),
                        tx_rate_limiter: None,
                        mtu: None,
                    })
                    .to_vec(),
                entropy: Some(Entropy { rate_limiter: Some(limit) }),
                balloon: Some(Balloon {
                    amount_mib: 3,
                    deflate_on_oom: true,
                    stats_polling_interval_s: 2,
                    free_page_reporting: true,
                    free_page_hinting: false,
                }),
            };
            assert_eq!(super::plan(&devices(&plan)), Ok(plan));
        }
        assert_eq!(super::plan(&Devices::default()), Ok(DevicePlan::default()));
    }
}
