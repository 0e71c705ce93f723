//! The virtio entropy device (virtio 1.2, section 5.4): random bytes of the host for the guest.
//!
//! | file | what it is |
//! |---|---|
//! | `device.rs` | the queue: empty buffers in, random bytes out |
//! | `event_handler.rs` | which events of the event loop lead where |
//! | `persist.rs` | save and restore |
//!
//! Nothing random is kept: bytes are fetched from the host when a request is served, and requests are not served for the
//! sake of a snapshot, so that clones never find the same bytes in a buffer that was still empty in their parent.

mod device;
mod event_handler;
pub mod persist;

#[cfg(test)]
mod tests;

pub use device::{Rng, RngError};
pub use persist::{restore, save};
