//! The virtio socket device (virtio 1.2, section 5.10): streams between programs in the guest and on the host.
//!
//! | file | what it is |
//! |---|---|
//! | `packet.rs` | the packet header, and packets in descriptor chains |
//! | `connection.rs` | one stream: a state machine without I/O |
//! | `muxer.rs` | all streams, and the sockets at their ends |
//! | `host.rs` | the listening socket, the `CONNECT` line, paths |
//! | `ready.rs` | the port that the device itself answers |
//! | `device.rs` | the queues: packets in, packets out, the reset event |
//! | `event_handler.rs` | which events of the event loop lead where |
//! | `persist.rs` | save and restore |
//!
//! Everything except the calls of the transport happens on the devices' thread.

pub mod connection;
mod device;
mod event_handler;
pub mod host;
mod muxer;
pub mod packet;
pub mod persist;
pub mod ready;

#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockError};
pub use persist::{restore, save};
pub use ready::ReadySink;
