//! Save and restore of the device.
//!
//! Frames of the host are not saved, and the network has to live with it: those in the tap, and one that the device may
//! hold for want of buffers, stay with the machine that was saved.

use std::sync::Mutex;

use api_spec::mac::MacAddr;
use snapshot::state::{NetState, VirtioMmioState};

use super::super::mmio::{MmioTransport, TransportError};
use super::device::Net;
use crate::devices::lock;

/// The state to save of `device`, and of its transport, which is asked for once the device is done. The vCPUs must be paused, and no event of the device be under way.
///
/// What the guest has for the host is sent first, so guest memory may change; it must be saved after this.
pub fn save(device: &Mutex<Net>, transport: impl FnOnce() -> VirtioMmioState) -> NetState {
    let mut net = lock(device);
    net.send_all();
    let (iface_id, mac) = (net.iface_id.clone(), net.mac.map(MacAddr::bytes));
    drop(net); // The transport asks the device for its queues.
    NetState { iface_id, mac, transport: transport() }
}

/// Takes over a saved state into a fresh `device` behind a fresh `transport`. Touches no guest memory; the device does
/// nothing until [`resume`](super::super::VirtioDevice::resume). If its MAC address is another one than was saved, its
/// configuration counts as changed; a driver that does not look again has to be told by other means.
pub fn restore(device: &Mutex<Net>, transport: &mut MmioTransport, state: &NetState) -> Result<(), TransportError> {
    let NetState { iface_id: _, mac, transport: saved } = state;
    // From here on the devices' thread keeps away from the queues that the transport is about to hand over.
    let mut net = lock(device);
    net.restored = true;
    let renamed = net.mac.map(MacAddr::bytes) != *mac;
    drop(net);
    transport.restore(saved)?;
    if renamed {
        transport.renew_config();
    }
    Ok(())
}
