//! Save and restore of the device.
//!
//! The statistics buffer that the device keeps has been taken from its queue and not given back, so its head is part of
//! the state: a guest whose buffer were forgotten would never send statistics again.

use std::sync::Mutex;

use snapshot::state::{BalloonState, VirtioMmioState};
use virtio_queue::QueueT;

use super::super::mmio::{MmioTransport, TransportError};
use super::device::{Balloon, Role};
use crate::devices::lock;

/// The state to save of `device`, and of its transport, which is asked for once the device is done. The vCPUs must be paused, and no event of the device be under way.
///
/// What the guest gives back is discarded first, so guest memory may change; it must be saved after this.
pub fn save(device: &Mutex<Balloon>, transport: impl FnOnce() -> VirtioMmioState) -> BalloonState {
    let mut balloon = lock(device);
    balloon.settle();
    let held = balloon.active.as_ref().and_then(|active| active.held);
    let Balloon { actual, pending, ref statistics, .. } = *balloon;
    let statistics = statistics.entries().collect();
    drop(balloon); // The transport asks the device for its queues.
    BalloonState { transport: transport(), actual, held, statistics, pending }
}

/// Takes over a saved state into a fresh `device` behind a fresh `transport`. Touches no guest memory; the device does
/// nothing until [`resume`](super::super::VirtioDevice::resume).
pub fn restore(
    device: &Mutex<Balloon>,
    transport: &mut MmioTransport,
    state: &BalloonState,
) -> Result<(), TransportError> {
    let BalloonState { transport: ref saved, actual, held, ref statistics, pending } = *state;
    // From here on the devices' thread keeps away from the queues that the transport is about to hand over.
    let mut balloon = lock(device);
    balloon.restored = true;
    balloon.actual = actual;
    balloon.pending = pending;
    balloon.statistics = statistics.iter().copied().collect();
    drop(balloon);
    transport.restore(saved)?;
    let mut balloon = lock(device);
    match (held, &mut balloon.active) {
        (None, _) => Ok(()),
        (Some(head), Some(active)) => {
            let queue = active.queue(Role::Statistics).and_then(|queue| active.rings.queues().get(queue));
            if queue.is_none_or(|queue| head >= queue.size()) {
                return Err(TransportError::Held(head));
            }
            active.held = held;
            Ok(())
        }
        (Some(head), None) => Err(TransportError::Held(head)),
    }
}
