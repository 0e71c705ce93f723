//! Saved state that KVM keeps for the VM as a whole.

use serde::{Deserialize, Serialize};

/// Saved state that KVM keeps for the VM as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The interval timer.
    pub pit: PitState,
    /// The paravirtual clock.
    pub clock: ClockState,
    /// Interrupt controllers: both PICs and the IOAPIC.
    pub irqchips: Vec<IrqchipState>,
}

/// The interval timer, `kvm_pit_state2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Its three channels.
    pub channels: [PitChannel; 3],
    /// `KVM_PIT_FLAGS_*`.
    pub flags: u32,
}

/// A channel of the interval timer, `kvm_pit_channel_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct PitChannel {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    pub count_load_time: i64,
}

/// The paravirtual clock, `kvm_clock_data`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds since the VM was created.
    pub clock: u64,
    /// `KVM_CLOCK_*`: which of the fields below are valid.
    pub flags: u32,
    /// Wall-clock time of the host when the state was saved, in nanoseconds since the Unix epoch.
    pub realtime: u64,
    /// Time-stamp counter of the host at that moment.
    pub host_tsc: u64,
}

/// An interrupt controller, `kvm_irqchip`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    /// `KVM_IRQCHIP_*`: which controller.
    pub chip_id: u32,
    /// Its 512 bytes of state, laid out as the KVM API lays them out for that controller.
    pub chip: Vec<u8>,
}
