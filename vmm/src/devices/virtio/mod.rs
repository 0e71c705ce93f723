//! virtio devices (virtio 1.2) on the MMIO transport.

pub mod balloon;
pub mod block;
pub mod chain;
#[cfg(test)]
mod fake_driver;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rings;
pub mod rng;
pub mod status;
pub mod vsock;

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::GuestMemory;
use interrupt::Interrupt;

/// `VIRTIO_F_VERSION_1`: the device is not a legacy one. Every driver must accept it.
pub const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_RING_F_EVENT_IDX`: both sides say at which index they want to be told of news.
pub const EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// A virtio device as its transport sees it.
///
/// The transport calls it on vCPU threads, and on the devices' thread for save and restore.
pub trait VirtioDevice: Send {
    /// What messages call the device, such as `drive root`.
    fn name(&self) -> String;

    /// The device's number in the virtio specification.
    fn device_type(&self) -> u32;

    /// The largest size of each queue, in order. Powers of two.
    fn queue_max_sizes(&self) -> &'static [u16];

    /// The features that the device offers.
    fn features(&self) -> u64;

    /// The event that tells the device of news in each queue, in order.
    fn queue_events(&self) -> Vec<Arc<EventFd>>;

    /// The configuration space. What is beyond it reads as zeros.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Writes the configuration space. What cannot be written there is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has accepted these features, and is about to be ready, or was when it was saved. The result is how many
    /// queues it uses then, from the first: all, unless features decide.
    fn negotiated(&mut self, _features: u64) -> usize {
        self.queue_max_sizes().len()
    }

    /// The driver is ready: from here on the device may use its queues. They have been checked. Touches no guest
    /// memory.
    fn activate(&mut self, mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>);

    /// The queues of a device that is active and has not failed; otherwise none.
    fn queues(&self) -> &[Queue];

    /// Back to the state before activation. The device does not touch guest memory any more when this returns.
    fn reset(&mut self);

    /// The vCPUs are about to run. A device that was restored has left guest memory alone until now; the first call
    /// lets it work, and it looks at its queues if something was left in them. Any other call does nothing.
    fn resume(&mut self);
}

/// Says whether the event loop watches a file of this device as it was told to, and logs it if not.
fn is_watched(device: &str, done: event_manager::Result<()>) -> bool {
    if let Err(error) = &done {
        tracing::error!("{device}: the event loop cannot watch a file: {error}");
    }
    done.is_ok()
}
