//! Saved state of the devices that the vmm emulates.

use serde::{Deserialize, Serialize};

/// The devices that the vmm emulates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The serial port COM1.
    pub serial: SerialState,
    /// The vsock device, if the machine has one, with its transport.
    pub vsock: Option<VsockState>,
    /// The disks, in order of their places.
    pub drives: Vec<DriveState>,
    /// The network interfaces, in order of their places.
    pub network: Vec<NetState>,
    /// The source of entropy, if the machine has one, with its transport.
    pub entropy: Option<EntropyState>,
    /// The balloon, if the machine has one, with its transport.
    pub balloon: Option<BalloonState>,
}

/// A 16550 serial port: its registers, and what was received and not yet read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the 16550 data sheet names them")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Received bytes that the guest has not read, oldest first.
    pub in_buffer: Vec<u8>,
}

/// A virtio-mmio transport (virtio 1.2, section 4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState {
    /// Feature bits that the driver has accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `Status`.
    pub status: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<QueueState>,
}

/// A split virtqueue (virtio 1.2, section 2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used entry to write.
    pub next_used: u16,
    /// Whether `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx_enabled: bool,
}

/// The vsock device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Its transport.
    pub transport: VirtioMmioState,
    /// Whether streams were open, or the guest had not yet taken in an earlier reset: then a clone must be told that
    /// its transport was reset.
    pub needs_reset: bool,
}

/// The source of entropy. No random bytes are saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    /// Its transport.
    pub transport: VirtioMmioState,
    /// Whether requests were left in its queue.
    pub pending: bool,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// Its name.
    pub drive_id: String,
    /// Its transport.
    pub transport: VirtioMmioState,
    /// Whether requests were left in its queue.
    pub pending: bool,
}

/// The memory balloon. What is configured about it is in the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Its transport.
    pub transport: VirtioMmioState,
    /// How many pages the driver said are in the balloon.
    pub actual: u32,
    /// Head of the statistics buffer that the device keeps.
    pub held: Option<u16>,
    /// The statistics that the guest has sent last: tags and values (virtio 1.2, section 5.5.6.4).
    pub statistics: Vec<(u16, u64)>,
    /// Whether something was left in its queues.
    pub pending: bool,
}

/// A network interface. Frames on their way are not saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its name.
    pub iface_id: String,
    /// Its MAC address, if it has one of its own.
    pub mac: Option<[u8; 6]>,
    /// Its transport.
    pub transport: VirtioMmioState,
}
