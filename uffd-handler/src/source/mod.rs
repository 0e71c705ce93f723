//! Where pages come from: an immutable memory image that is read, and checked, a chunk at a time.

pub mod file;
pub mod open;
#[cfg(feature = "remote")]
pub mod remote;

use crate::region::CHUNK_SIZE;
use snapshot::load::Snapshot;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Room for one chunk.
pub type Chunk = [u8; CHUNK_SIZE as usize];

/// Why a chunk cannot be had. The texts are for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// It is not what the image's digests say, or is not there at all. That will not change.
    #[error("{0}")]
    Damaged(String),
    /// The place where it comes from cannot be reached, or fails. That may pass.
    #[error("{0}")]
    Away(String),
}

/// What a source has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceCounters {
    /// Chunks that came from where the image lies, and were right; those that came along with others included.
    pub chunks: u64,
    /// Bytes that came from there.
    pub bytes: u64,
    /// Chunks that were given out of what is kept near.
    pub cached_chunks: u64,
    /// Bytes in them.
    pub cached_bytes: u64,
    /// Chunks that the cache on disk had wrong, and that were fetched anew.
    pub cache_faults: u64,
    /// Reads that failed.
    pub failures: u64,
    /// Since when the place has not been reached, if the last attempt failed.
    pub away_since: Option<Instant>,
}

/// An immutable memory image.
///
/// Methods that may wait are called on threads that have the time.
pub trait Source: Send + Sync {
    /// What kind of place it is, in one word, for the counters.
    fn kind(&self) -> &'static str;

    /// Root digest of the image: its name.
    fn root(&self) -> &str;

    /// Size of the image in bytes, a multiple of the page size.
    fn size(&self) -> u64;

    /// Reads chunk `index` into `chunk` and checks it; returns how many bytes of it the image has, which is less than
    /// a whole chunk only at the image's end. Bytes that fail their check are never returned as good.
    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError>;

    /// As [`Source::read_chunk`], but never waits: `None` if it would have to.
    fn read_chunk_now(&self, _index: u64, _chunk: &mut Chunk) -> Result<Option<usize>, SourceError> {
        Ok(None)
    }

    /// Hears that these chunks are in a store, so that nothing but another user's store will ask for them again. Must not
    /// wait.
    fn forget(&self, _chunks: Range<u64>) {}

    /// The snapshot that it is of, if that lies on this host: its working set is beside it.
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        None
    }

    /// What it has done so far. Sources that count nothing themselves say so by zeros.
    fn counters(&self) -> SourceCounters {
        SourceCounters::default()
    }
}

const _: () = assert!(CHUNK_SIZE == snapshot::CHUNK_BYTES, "a chunk is checked against one digest");
