//! What a remote image counts.

use crate::source::SourceCounters;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Counters that several threads move.
#[derive(Debug, Default)]
pub struct Tally {
    counters: Mutex<SourceCounters>,
    /// Chunks that the cache on disk had wrong: several may look before one is put right.
    bad: Mutex<BTreeSet<u64>>,
}

impl Tally {
    /// So many chunks were fetched and right, in an answer of so many bytes.
    pub fn fetched(&self, chunks: usize, bytes: usize) {
        let mut counters = self.lock();
        counters.chunks += chunks as u64;
        counters.bytes += bytes as u64;
        counters.away_since = None;
    }

    /// A chunk of so many bytes was kept near.
    pub fn recalled(&self, bytes: usize) {
        let mut counters = self.lock();
        counters.cached_chunks += 1;
        counters.cached_bytes += bytes as u64;
    }

    /// What the cache on disk held of a chunk was wrong.
    pub fn found_bad(&self, chunk: u64) {
        let is_new = self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk);
        self.lock().cache_faults += u64::from(is_new);
    }

    /// A read failed; `away` if the place cannot be reached.
    pub fn failed(&self, away: bool) {
        let mut counters = self.lock();
        counters.failures += 1;
        if away {
            counters.away_since.get_or_insert_with(Instant::now);
        }
    }

    /// As they are now.
    pub fn counters(&self) -> SourceCounters {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, SourceCounters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
