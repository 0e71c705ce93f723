//! The memory balloon (virtio 1.2, section 5.5): the guest gives memory back, asked for or by itself.
//!
//! | file | what it is |
//! |---|---|
//! | `pages.rs` | which pages a buffer names, as runs (pure) |
//! | `statistics.rs` | what the guest says of its memory (pure) |
//! | `device.rs` | the queues: pages in and out of the balloon, statistics, free pages |
//! | `event_handler.rs` | which events of the event loop lead where |
//! | `persist.rs` | save and restore |
//!
//! Everything except the calls of the transport happens on the devices' thread. What becomes of the pages is told in
//! [`crate::memory::discard`].
//!
//! Not offered: `MUST_TELL_HOST`, as a page that leaves the balloon is there at once; `FREE_PAGE_HINT` and `PAGE_POISON`.

mod device;
mod event_handler;
pub mod pages;
pub mod persist;
pub mod statistics;

#[cfg(test)]
mod tests;

pub use device::{Balloon, BalloonError};
pub use persist::{restore, save};
