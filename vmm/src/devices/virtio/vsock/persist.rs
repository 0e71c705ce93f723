//! Save and restore of the device.
//!
//! Streams are not saved: their ends on the host stay with the machine that was saved. If there were any, the guest of
//! a restored machine is told to forget them.

use std::sync::Mutex;

use snapshot::state::{VirtioMmioState, VsockState};

use super::super::mmio::{MmioTransport, TransportError};
use super::device::{Gate, Vsock};
use crate::devices::lock;

/// The state to save of `device`, and of its transport, which is asked for once the device is done. The vCPUs must be paused, and no event of the device be under way.
///
/// What the guest has sent is taken in first, so guest memory may change; it must be saved after this. The streams of
/// the running guest go on undisturbed.
pub fn save(device: &Mutex<Vsock>, transport: impl FnOnce() -> VirtioMmioState) -> VsockState {
    let mut vsock = lock(device);
    vsock.take_all();
    let (guest_cid, needs_reset) = (vsock.guest_cid, vsock.needs_reset());
    drop(vsock); // The transport asks the device for its queues.
    VsockState { guest_cid, transport: transport(), needs_reset }
}

/// Takes over a saved state into a fresh `device` behind a fresh `transport`. Touches no guest memory; the device does
/// nothing until [`resume`](super::super::VirtioDevice::resume).
pub fn restore(device: &Mutex<Vsock>, transport: &mut MmioTransport, state: &VsockState) -> Result<(), TransportError> {
    let VsockState { guest_cid, transport: ref saved, needs_reset } = *state;
    // From here on the devices' thread keeps away from the queues that the transport is about to hand over.
    let mut vsock = lock(device);
    let renamed = vsock.guest_cid != guest_cid;
    vsock.gate = Gate::Restored { reset: needs_reset || renamed };
    drop(vsock);
    transport.restore(saved)?;
    if renamed {
        transport.renew_config();
    }
    Ok(())
}

impl Vsock {
    /// Whether the guest may believe in streams, or has not yet been told of an earlier reset.
    fn needs_reset(&self) -> bool {
        match self.gate {
            Gate::Open => !self.muxer.is_quiet(),
            Gate::Restored { reset } => reset,
            Gate::ResetDue | Gate::ResetSent { .. } => true,
        }
    }
}
