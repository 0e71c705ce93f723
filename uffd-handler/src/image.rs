//! One image that is served: where its chunks come from, who waits for them, and what is wrong with it.
//!
//! ```text
//!   wanted --at hand--> read at once
//!      |
//!      +--> waited for --fetched--> delivered
//!               ^    |
//!               |    +--the place is away--> again after a pause, as long as somebody waits
//!               +----+
//! ```

use crate::fetch::{Fetched, Fetcher, Inbox, Urgency};
use crate::region::{CHUNK_SIZE, PAGE_SIZE};
use crate::source::{Chunk, Source, SourceCounters, SourceError};
use api_spec::page_server::ImageMetrics;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause before the first new attempt at a place that is away; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Between two lines in the log that say that an image cannot be read.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// Ranges of a source that are let go at one time.
const MOST_FORGOTTEN: usize = 256;

/// Somebody who waits for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiter {
    /// Key of the store that needs it.
    pub store: u64,
    /// The guest; `None` if the store itself is to be put right.
    pub peer: Option<u32>,
}

/// A chunk that was waited for.
pub struct Delivery {
    /// The chunk.
    pub chunk: u64,
    /// Who waited for it.
    pub waiters: BTreeSet<Waiter>,
    /// Whether it was read ahead, for every store.
    pub ahead: bool,
    /// All of its bytes, or why there will never be any.
    pub bytes: Result<(Box<Chunk>, usize), SourceError>,
}

/// The place that chunks come from cannot be reached.
#[derive(Debug)]
struct Away {
    reason: String,
    /// Whether it is in the log.
    said: bool,
    pause: Duration,
    /// When to try again; no time for that is set while an attempt is under way.
    again: Option<Instant>,
}

/// An image that is served, until it turns out to be damaged.
pub struct Image {
    source: Arc<dyn Source>,
    fetcher: Fetcher,
    damage: Option<String>,
    away: Option<Away>,
    /// When the log last said that it is away.
    last_said: Option<Instant>,
    waiters: BTreeMap<u64, BTreeSet<Waiter>>,
    /// Chunks that are in a store now, and perhaps still in the page cache.
    kept_twice: BTreeSet<u64>,
    chunks_read: u64,
    bytes_read: u64,
    failures: u64,
}

impl Image {
    /// Image number `number` of the server.
    pub fn new(number: usize, source: Arc<dyn Source>, inbox: &Inbox) -> Self {
        Self {
            fetcher: Fetcher::new(number, source.clone(), inbox),
            source,
            damage: None,
            away: None,
            last_said: None,
            waiters: BTreeMap::new(),
            kept_twice: BTreeSet::new(),
            chunks_read: 0,
            bytes_read: 0,
            failures: 0,
        }
    }

    /// Its root digest.
    pub fn root(&self) -> &str {
        self.source.root()
    }

    /// Its size, in bytes.
    pub fn size(&self) -> u64 {
        self.source.size()
    }

    /// Its size, in pages.
    pub fn pages(&self) -> u64 {
        self.size() / PAGE_SIZE
    }

    /// What is wrong with it for good.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// Why nothing can be read at present.
    pub fn away(&self) -> Option<&str> {
        self.away.as_ref().map(|away| away.reason.as_str())
    }

    /// Reads a chunk into the beginning of `buffer`, if that does not mean to wait.
    pub fn read_now(&mut self, chunk: u64, buffer: &mut Chunk) -> Result<Option<usize>, SourceError> {
        let read = self.source.read_chunk_now(chunk, buffer);
        match read.and_then(|bytes| bytes.map(|bytes| self.check_len(chunk, bytes)).transpose()) {
            Ok(Some(bytes)) => {
                self.count_read(bytes);
                Ok(Some(bytes))
            }
            // A thread will see what there is to it.
            Ok(None) | Err(SourceError::Away(_)) => Ok(None),
            Err(error) => {
                self.mark_damaged(&error.to_string());
                Err(error)
            }
        }
    }

    fn check_len(&self, chunk: u64, bytes: usize) -> Result<usize, SourceError> {
        let expected = self.size().saturating_sub(chunk * CHUNK_SIZE).min(CHUNK_SIZE) as usize;
        if bytes == expected {
            return Ok(bytes);
        }
        Err(SourceError::Damaged(format!("chunk {chunk} has {bytes} bytes instead of {expected}")))
    }

    fn count_read(&mut self, bytes: usize) {
        self.chunks_read += 1;
        self.bytes_read += bytes as u64;
    }

    /// From now on nobody new is served this image; a guest that needs a bad chunk loses its connection.
    fn mark_damaged(&mut self, damage: &str) {
        if self.damage.is_none() {
            tracing::error!("image {} is damaged: {damage}; new clients are refused", self.root());
            self.damage = Some(damage.to_string());
        }
    }

    /// Has a chunk read for somebody who waits for it.
    pub fn wait(&mut self, chunk: u64, waiter: Waiter) {
        let waiters = self.waiters.entry(chunk).or_default();
        let is_first = waiters.is_empty();
        waiters.insert(waiter);
        if is_first {
            self.fetcher.want(chunk, Urgency::Demand);
        }
    }

    /// Somebody waits for nothing any more.
    pub fn leave(&mut self, waiter: Waiter) {
        self.let_leave(|waiters| {
            waiters.remove(&waiter);
        });
    }

    /// Nobody waits for the sake of a store that is no more.
    pub fn leave_store(&mut self, store: u64) {
        self.let_leave(|waiters| waiters.retain(|waiter| waiter.store != store));
    }

    /// What nobody waits for then is not read either.
    fn let_leave(&mut self, leave: impl Fn(&mut BTreeSet<Waiter>)) {
        let awaited = self.waiters.len();
        self.waiters.retain(|_, waiters| {
            leave(waiters);
            !waiters.is_empty()
        });
        if self.waiters.len() < awaited {
            self.fetcher.forget(|chunk| self.waiters.contains_key(&chunk));
        }
    }

    /// Has a chunk read when there is nothing better to do; false if it is on its way already, or too many are.
    pub fn read_ahead(&mut self, chunk: u64) -> bool {
        chunk < self.size().div_ceil(CHUNK_SIZE) && self.fetcher.want(chunk, Urgency::Ahead)
    }

    /// Takes what a thread has brought; `None` if whoever waits for it has to wait on.
    pub fn receive(&mut self, fetched: Fetched, now: Instant) -> Option<Delivery> {
        let chunk = fetched.chunk;
        let ahead = self.fetcher.delivered(chunk) == Some(Urgency::Ahead);
        let bytes = fetched.bytes.and_then(|(bytes, len)| Ok((bytes, self.check_len(chunk, len)?)));
        if let Err(SourceError::Away(reason)) = &bytes {
            self.is_away(reason, now);
            return None;
        }
        let waiters = self.waiters.remove(&chunk).unwrap_or_default();
        match &bytes {
            Ok((_, len)) => {
                self.count_read(*len);
                self.is_back(now);
            }
            Err(error) => self.mark_damaged(&error.to_string()),
        }
        Some(Delivery { chunk, waiters, ahead, bytes })
    }

    fn is_away(&mut self, reason: &str, now: Instant) {
        self.failures += 1;
        match &mut self.away {
            Some(away) => {
                away.reason = reason.to_string();
                // If a time is set, this is only one more of the attempts that failed before.
                if away.again.is_none() {
                    away.pause = (away.pause * 2).min(LONGEST_PAUSE);
                    away.again = Some(now + away.pause);
                }
            }
            None => {
                // A place that comes and goes does not fill the log.
                let said = self.last_said.is_none_or(|last| now.duration_since(last) >= SAY_AGAIN);
                if said {
                    self.last_said = Some(now);
                    tracing::warn!("image {}: {reason}; trying again as long as somebody waits", self.source.root());
                }
                let again = Some(now + FIRST_PAUSE);
                self.away = Some(Away { reason: reason.to_string(), said, pause: FIRST_PAUSE, again });
            }
        }
    }

    fn is_back(&mut self, now: Instant) {
        match &mut self.away {
            None => {}
            // Perhaps it was only this one chunk that could be read: what has failed waits for its time, but a short one.
            Some(Away { pause, again: Some(again), .. }) if !self.waiters.is_empty() => {
                *pause = FIRST_PAUSE;
                *again = (*again).min(now + FIRST_PAUSE);
            }
            Some(Away { said, .. }) => {
                if *said {
                    tracing::info!("image {} can be read again", self.source.root());
                }
                self.away = None;
                self.want_all();
            }
        }
    }

    /// Asks once more for all that is waited for. What is on its way is not asked for twice.
    fn want_all(&mut self) {
        for &chunk in self.waiters.keys() {
            self.fetcher.want(chunk, Urgency::Demand);
        }
    }

    /// When [`Image::try_again`] is to be called, if somebody waits for a place that is away.
    pub fn next_attempt(&self) -> Option<Instant> {
        self.away.as_ref().and_then(|away| away.again).filter(|_| !self.waiters.is_empty())
    }

    /// Tries again what could not be read, if it is time.
    pub fn try_again(&mut self, now: Instant) {
        if self.next_attempt().is_none_or(|again| again > now) {
            return;
        }
        if let Some(away) = &mut self.away {
            away.again = None;
        }
        self.want_all();
    }

    /// A chunk has got into a store.
    pub fn is_stored(&mut self, chunk: u64) {
        self.kept_twice.insert(chunk);
    }

    /// What is done every second: nothing here is urgent.
    pub fn tick(&mut self) {
        self.fetcher.man();
        for run in runs(&mut self.kept_twice, MOST_FORGOTTEN) {
            self.source.forget(run);
        }
    }

    /// The counters as of now.
    pub fn metrics(&self) -> ImageMetrics {
        let SourceCounters { cached_chunks, cache_faults, .. } = self.source.counters();
        ImageMetrics {
            image: self.root().to_string(),
            source: self.source.kind().to_string(),
            chunks_read: self.chunks_read,
            bytes_read: self.bytes_read,
            cached_chunks,
            cache_faults,
            chunks_waiting: self.waiters.len() as u64,
            failures: self.failures,
            away: self.away().map(str::to_string),
            damage: self.damage.clone(),
        }
    }
}

/// Takes numbers out of a set as runs of neighbours, so many runs at most.
fn runs(set: &mut BTreeSet<u64>, most: usize) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    while let Some(&number) = set.first() {
        let is_full = runs.len() == most;
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ if is_full => break,
            _ => runs.push(number..number + 1),
        }
        set.pop_first();
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_few_and_have_each_number_once(numbers in prop::collection::btree_set(0..60u64, 0..40)) {
            let mut left = numbers.clone();
            let found = runs(&mut left, 5);
            prop_assert!(found.len() <= 5);
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            let taken: BTreeSet<u64> = found.into_iter().flatten().collect();
            prop_assert!(taken.is_disjoint(&left));
            prop_assert_eq!(&taken | &left, numbers);
        }
    }
}
