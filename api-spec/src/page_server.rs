//! The page server's counters: what `GET /metrics.json` on its metrics socket says, and `GET /metrics` as Prometheus text.

use crate::handshake::Mode;
use serde::{Deserialize, Serialize};

/// All counters of a page server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Page stores, in use or kept warm.
    pub stores: Vec<StoreMetrics>,
    /// Where pages come from: one for each image.
    pub images: Vec<ImageMetrics>,
    /// Guests that are being served now.
    pub sessions: Vec<SessionMetrics>,
    /// Guests served since the start, those of now included.
    pub sessions_total: u64,
    /// Clients that were refused or broke off the handshake.
    pub refused_total: u64,
    /// Stores retired because pages had appeared in them that the server had not put there.
    pub stores_retired_total: u64,
    /// Faults answered since the start, by how they were.
    pub faults: FaultMetrics,
    /// From reading a fault event until its guest was woken.
    pub fault_latency: Histogram,
    /// Blocks of stores that were to become huge pages.
    #[serde(default)]
    pub huge_pages: HugeMetrics,
}

/// What became of complete blocks of 2 MiB of page stores, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugeMetrics {
    /// Moved into one huge page.
    pub collapsed: u64,
    /// Left in pages of 4 KiB, since the kernel did not take them.
    pub failed: u64,
}

/// Faults by how they were answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultMetrics {
    /// The store had to be filled first, at once.
    pub filled: u64,
    /// The page was in the store already, and a wake-up was the whole answer.
    pub present: u64,
    /// The bytes had to be waited for.
    pub deferred: u64,
    /// The page was copied into the client's memory.
    pub copied: u64,
    /// The client had given the page back, and got zeros.
    pub zeroed: u64,
}

/// Counters of one memory image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMetrics {
    /// Root digest of the image.
    pub image: String,
    /// What it is read from: `file` or `remote`.
    pub source: String,
    /// Chunks of 64 KiB that were read and checked.
    pub chunks_read: u64,
    /// Bytes in them.
    pub bytes_read: u64,
    /// Chunks of a remote image for which nobody had to be asked: they had come along with others, or were in the cache on disk.
    pub cached_chunks: u64,
    /// How often a chunk was found wrong in the cache on disk, which is then fetched anew. May count one chunk twice.
    pub cache_faults: u64,
    /// Chunks that are being waited for.
    pub chunks_waiting: u64,
    /// Reads that failed, and will be tried again.
    pub failures: u64,
    /// Why nothing can be read at present, if that is so.
    pub away: Option<String>,
    /// Why nobody is served this image any more, if that is so.
    pub damage: Option<String>,
}

/// How long something took: how many took no longer than each bound, not counting those of smaller bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// In order of the bounds; what is above all bounds is in none.
    pub buckets: Vec<Bucket>,
    /// All, those above all bounds included.
    pub count: u64,
    /// Their sum, in microseconds.
    pub sum_us: u64,
}

/// One class of a [`Histogram`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Its upper bound, which belongs to it, in microseconds.
    pub le_us: u64,
    /// How many are in it.
    pub count: u64,
}

/// Counters of one page store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreMetrics {
    /// Root digest of the image.
    pub image: String,
    /// The user whose guests share this store; absent for that from which the server copies.
    pub uid: Option<u32>,
    /// Size of the image, in pages of 4 KiB.
    pub image_pages: u64,
    /// Pages that the server has filled.
    pub filled_pages: u64,
    /// Guests that use it now.
    pub sessions: u64,
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
    /// How pages come to it.
    pub mode: Mode,
    /// Page-fault events read from the guest's userfaultfd.
    pub uffd_events: u64,
    /// Pages that the server filled in answer to those events, neighbours included.
    pub pages_filled: u64,
    /// Events whose page was in the store already, so that a wake-up was the whole answer.
    pub already_present: u64,
    /// Pages copied into its memory, those that read as zeros included.
    pub pages_copied: u64,
    /// Faults that wait for bytes now.
    pub waiting: u64,
}
