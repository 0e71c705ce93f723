//! Save and restore of the device.

use std::sync::Mutex;

use snapshot::state::{EntropyState, VirtioMmioState};
use virtio_queue::QueueT;

use super::super::mmio::{MmioTransport, TransportError};
use super::device::{Active, REQUESTS, Rng};
use crate::devices::lock;

/// The state to save of `device`, and of its transport, which is asked for once the device is done. The vCPUs must be paused, and no event of the device be under way.
///
/// Requests that wait stay in the queue: each clone serves them with random bytes of its own. Guest memory is only read.
pub fn save(device: &Mutex<Rng>, transport: impl FnOnce() -> VirtioMmioState) -> EntropyState {
    let pending = lock(device).is_pending();
    EntropyState { transport: transport(), pending }
}

/// Takes over a saved state into a fresh `device` behind a fresh `transport`. Touches no guest memory; the device does
/// nothing until [`resume`](super::super::VirtioDevice::resume).
pub fn restore(device: &Mutex<Rng>, transport: &mut MmioTransport, state: &EntropyState) -> Result<(), TransportError> {
    let EntropyState { transport: saved, pending } = state;
    // From here on the devices' thread keeps away from the queue that the transport is about to hand over.
    lock(device).restored = Some(*pending);
    transport.restore(saved)
}

impl Rng {
    /// Whether there is something to do: requests wait in the queue, or the last turn was over before the driver was asked
    /// to tell of more. A queue that cannot be read is left for the first turn to find out about.
    fn is_pending(&self) -> bool {
        if let Some(pending) = self.restored {
            return pending;
        }
        let Some(Active { rings, .. }) = &self.active else { return false };
        let next = rings.queues()[REQUESTS].next_avail();
        rings.avail_index(REQUESTS).map_or(true, |available| available != next) || !rings.will_tell(REQUESTS)
    }
}
