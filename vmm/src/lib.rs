//! The machine.
pub mod devices;
