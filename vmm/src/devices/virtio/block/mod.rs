//! The block device (virtio 1.2, section 5.2): a disk of the guest.
//!
//! | file | what it is |
//! |---|---|
//! | `request.rs` | what a driver asks for, and whether that is legal (pure) |
//! | `disk.rs` | what lies behind: an image on the host, or an overlay over one |
//! | `overlay.rs` | layers over an image: the private one that is written, and those that no longer change |
//! | `device.rs` | the queue: requests in, answers out, limits |
//! | `event_handler.rs` | which events of the event loop lead where |
//! | `persist.rs` | save and restore of the device; the disk's contents are the snapshot's concern |
//!
//! ```text
//!   raw      guest --> image (locked: one writer, or any number of readers)
//!   overlay  guest --> private scratch file --> frozen layers --> what a snapshot holds --> image, read only
//! ```
//!
//! A snapshot freezes the scratch file: it becomes a layer that no longer changes, and the guest goes on in a fresh one.
//! So the guest stands still no longer for a large overlay than for a small one.
//!
//! Reads and writes are system calls on the devices' thread. A turn is bounded, then other devices have theirs.

mod device;
pub mod disk;
mod event_handler;
pub mod overlay;
pub mod persist;
pub mod request;

#[cfg(test)]
mod tests;

pub use device::{Block, BlockConfig, HaltSink};
pub use disk::{Disk, DiskError};
pub use persist::{restore, save};
