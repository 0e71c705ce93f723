//! What is saved of a machine besides its memory, as plain data.
//!
//! These types belong to the file format: nothing here is a live object, and the live objects in the vmm convert to and
//! from them field by field. Values are in the units of the KVM API (Documentation/virt/kvm/api.rst) unless a field
//! says otherwise.

mod devices;
mod file;
mod machine;
mod vcpu;

pub use devices::{
    BalloonState, DeviceState, DriveState, EntropyState, NetState, QueueState, SerialState, VirtioMmioState, VsockState,
};
pub use file::{StateError, decode, encode};
pub use machine::{ClockState, IrqchipState, PitChannel, PitState, VmState};
pub use vcpu::{
    CpuidEntry, DebugRegs, DescriptorTable, ExceptionEvent, InterruptEvent, Msr, NmiEvent, Regs, Segment, SmiEvent,
    Sregs, VcpuEvents, VcpuState, Xcr,
};

use serde::{Deserialize, Serialize};

/// Everything that is saved of a machine besides its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// One entry per vCPU, in order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// What KVM keeps for the VM as a whole.
    pub vm: VmState,
    /// The devices that the vmm emulates.
    pub devices: DeviceState,
}

impl MachineState {
    /// A machine that never ran: all values zero, all lists as long as the format wants them. For tests and tools that
    /// care about memory only.
    pub fn blank(vcpus: usize) -> MachineState {
        let vcpu = VcpuState { xsave: vec![0; 4096], lapic: vec![0; 1024], ..VcpuState::default() };
        MachineState { vcpus: vec![vcpu; vcpus], vm: VmState::default(), devices: DeviceState::default() }
    }
}
