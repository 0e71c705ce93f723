//! Save and restore of the device. What the disk holds is the snapshot's concern.

use std::sync::Mutex;

use snapshot::state::{DriveState, VirtioMmioState};

use super::super::mmio::{MmioTransport, TransportError};
use super::device::{Block, Gate};
use crate::devices::lock;

/// The state to save of `device`, and of its transport, which is asked for once the device is done. The vCPUs must be paused, and no event of the device be under way.
///
/// What the guest has asked for is done first, so guest memory and the disk may change; they must be saved after this.
/// What limits hold back is left in the queue, for the guest and for its clones.
pub fn save(device: &Mutex<Block>, transport: impl FnOnce() -> VirtioMmioState) -> DriveState {
    let mut block = lock(device);
    let pending = block.drain();
    let drive_id = block.id().to_owned();
    drop(block); // The transport asks the device for its queues.
    DriveState { drive_id, transport: transport(), pending }
}

/// Takes over a saved state into a fresh `device` behind a fresh `transport`. Touches no guest memory; the device does
/// nothing until [`resume`](super::super::VirtioDevice::resume).
pub fn restore(device: &Mutex<Block>, transport: &mut MmioTransport, state: &DriveState) -> Result<(), TransportError> {
    let DriveState { drive_id: _, transport: ref saved, pending } = *state;
    // From here on the devices' thread keeps away from the queue that the transport is about to hand over.
    lock(device).gate = Gate::Restored { pending };
    transport.restore(saved)
}
