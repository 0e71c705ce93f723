//! The virtio network device (virtio 1.2, section 5.1) over a tap device of the host.
//!
//! | file | what it is |
//! |---|---|
//! | `frame.rs` | the header in front of each frame, and which headers may pass |
//! | `tap.rs` | the tap device, which exists and is nobody else's |
//! | `device.rs` | the queues: frames from the guest, frames to the guest |
//! | `event_handler.rs` | which events of the event loop lead where |
//! | `persist.rs` | save and restore |
//!
//! Frames that the guest has no buffers for stay in the tap, whose queue drops what is too much; the device itself holds
//! one at most. Offloads are the tap's: it is told which of them the driver has accepted, whenever the device becomes
//! active, so also at each restore.
//!
//! Everything except the calls of the transport happens on the devices' thread.

mod device;
mod event_handler;
pub mod frame;
pub mod persist;
pub mod tap;

#[cfg(test)]
mod tests;

pub use device::Net;
pub use persist::{restore, save};
pub use tap::{Link, Tap, TapError};
