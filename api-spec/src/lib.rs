//! Every byte that crosses a process boundary in Coppice, as types: no KVM, no threads, and no I/O but in [`client`].
//!
//! - [`agent`]: host and guest agent, over vsock or COM1 (also without the standard library, for the embedded guest)
//! - [`handshake`]: vmm and page server, over a Unix stream socket; [`page_server`]: the page server's counters;
//!   [`prometheus`]: the text in which both tell theirs to Prometheus
//! - [`operations`]: the calls of the vmm's REST API; [`vm`], [`devices`], [`saved`], [`reset`], [`snapshot`], [`logger`], [`stats`],
//!   [`error`], [`mac`]: its documents
//! - [`openapi`]: the published document of that API; [`strict`] reads documents as it has them
//! - [`client`]: blocking clients of the agent, the REST API and the page server's metrics

#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

pub mod agent;
#[cfg(feature = "std")]
pub mod client;
#[cfg(feature = "std")]
pub mod devices;
#[cfg(feature = "std")]
pub mod error;
#[cfg(feature = "std")]
pub mod fork;
#[cfg(feature = "std")]
pub mod handshake;
#[cfg(feature = "std")]
pub mod logger;
#[cfg(feature = "std")]
pub mod mac;
#[cfg(feature = "std")]
pub mod openapi;
#[cfg(feature = "std")]
pub mod operations;
#[cfg(feature = "std")]
pub mod page_server;
#[cfg(feature = "std")]
mod path;
#[cfg(feature = "std")]
pub mod prometheus;
#[cfg(feature = "std")]
pub mod reset;
#[cfg(feature = "std")]
pub mod saved;
#[cfg(feature = "std")]
pub mod snapshot;
#[cfg(feature = "std")]
pub mod stats;
#[cfg(feature = "std")]
pub mod strict;
#[cfg(feature = "std")]
pub mod vm;

/// For fields that are left out when they say nothing.
#[cfg(feature = "std")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A part of the API of other VMMs that this one does not offer: `null` is taken, anything else refused by name.
#[cfg(feature = "std")]
pub type NotOffered = Option<serde_json::Value>;
