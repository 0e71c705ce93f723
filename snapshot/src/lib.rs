//! Bytes on disk: what a snapshot is, how it is written, whole or not at all, and how it is read and refused.

#![forbid(unsafe_code)]

pub mod state;
