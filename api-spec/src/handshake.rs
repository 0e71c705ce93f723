//! The page-server protocol in shared mode: a vmm and the page server over a Unix stream socket.
//!
//! Each message is one JSON object on one line (ended by `\n`, at most [`MAX_MESSAGE`] bytes). The client speaks first:
//!
//! ```text
//!   vmm                                              page server
//!   Hello { version, image, size }            ->
//!                                             <-     Reply::Store { size, page_size }   + descriptor of the page store
//!   (maps the store privately, creates a userfaultfd and registers the ranges for MISSING faults)
//!   Attach { regions }  + the userfaultfd     ->
//!                                             <-     Reply::Serving
//!   (starts vCPUs; the connection stays open for the life of the guest and carries nothing more)
//! ```
//!
//! At any step the server may answer [`Reply::Refused`] and close. Either side closing tells the other that it is gone.
//!
//! **Copy mode** is another protocol, that of Firecracker: the client sends one JSON array of [`CopyRegion`] (no line end), with
//! its userfaultfd, and nothing more is said in either direction. So a first byte `[` instead of `{` tells the two apart.

use serde::{Deserialize, Serialize};

/// Version of the shared-mode protocol.
pub const VERSION: u32 = 1;
/// Longest message, in bytes, line end included. Longer ones are refused.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// How long either side waits for the other's next message before it gives up, in milliseconds.
pub const REPLY_DEADLINE_MS: u64 = 5_000;
/// How long a client waits for the answer to its [`Hello`] before it reports a server of another protocol, in milliseconds.
pub const HELLO_DEADLINE_MS: u64 = 500;

/// The client's first message: which image it wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// Root digest of the memory image, as `snap.json` has it.
    pub image: String,
    /// Size of the memory image, in bytes.
    pub size: u64,
}

/// One range of guest memory in the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address of the range in the client, in bytes.
    pub base_host_virt_addr: u64,
    /// Size of the range, in bytes.
    pub size: u64,
    /// Where the range begins in the memory image, in bytes.
    pub offset: u64,
    /// Size of the client's pages there, in bytes.
    pub page_size: u64,
}

/// One range of guest memory, as the message of copy mode lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRegion {
    /// The range. `offset` is the sum of the sizes before it, which is its place in the memory file.
    #[serde(flatten)]
    pub region: Region,
    /// `page_size` once more, in bytes, under the deprecated name that older page servers look for.
    pub page_size_kib: u64,
}

impl From<Region> for CopyRegion {
    fn from(region: Region) -> Self {
        CopyRegion { region, page_size_kib: region.page_size }
    }
}

/// The client's second message, sent with its userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The ranges that are registered with the userfaultfd. They cover the image exactly once.
    pub regions: Vec<Region>,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Answer to [`Hello`], sent with a descriptor of the page store.
    Store {
        /// Size of the store, in bytes: that of the image.
        size: u64,
        /// Unit in which the store is filled, in bytes.
        page_size: u64,
    },
    /// Answer to [`Attach`]: faults are being served from now on.
    Serving,
    /// The server will not serve this client.
    Refused {
        /// What is wrong and what to do, in one line.
        reason: String,
    },
}

/// What the page server's metrics socket says: one JSON object to whoever connects, then the end of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Page stores, in use or kept warm.
    pub stores: Vec<StoreMetrics>,
    /// Guests that are being served now.
    pub sessions: Vec<SessionMetrics>,
    /// Guests served since the start, those of now included.
    pub sessions_total: u64,
    /// Clients that were refused or broke off the handshake.
    pub refused_total: u64,
    /// Stores retired because pages had appeared in them that the server had not put there.
    pub stores_retired_total: u64,
}

/// Counters of one page store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreMetrics {
    /// Root digest of the image.
    pub image: String,
    /// The user whose guests share this store.
    pub uid: u32,
    /// Size of the image, in pages of 4 KiB.
    pub image_pages: u64,
    /// Pages that the server has filled.
    pub filled_pages: u64,
    /// Whether the store is retired: still serving the guests that have it, given to nobody else.
    pub retired: bool,
}

/// Counters of one guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionMetrics {
    /// Number of the session, from 1 in order of connection.
    pub id: u64,
    /// Process id of the client when it connected.
    pub pid: u32,
    /// Page-fault events read from the guest's userfaultfd.
    pub uffd_events: u64,
    /// Pages that the server filled in answer to those events, neighbours included.
    pub pages_filled: u64,
    /// Events whose page was in the store already, so that a wake-up was the whole answer.
    pub already_present: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_mode_message_is_firecrackers() {
        let region = Region { base_host_virt_addr: 1 << 40, size: 8192, offset: 4096, page_size: 4096 };
        let json = serde_json::to_value([CopyRegion::from(region)]).unwrap();
        let expected = serde_json::json!([{
            "base_host_virt_addr": 1u64 << 40, "size": 8192, "offset": 4096, "page_size": 4096, "page_size_kib": 4096
        }]);
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Vec<CopyRegion>>(json).unwrap(), [region.into()]);
    }
}
