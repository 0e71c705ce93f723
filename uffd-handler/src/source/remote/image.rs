//! A memory image that lies elsewhere: fetched in blocks, checked chunk by chunk, kept near.

use super::disk::{CacheError, CachedImage, DiskCache};
use super::flights::Flights;
use super::memory::{Bytes, ChunkCache};
use super::span::{block_of, span};
use super::store::{Pin, Store, StoreError};
use super::tally::Tally;
use crate::region::CHUNK_SIZE;
use crate::source::{Chunk, Source, SourceCounters, SourceError};
use snapshot::digests::Digests;
use snapshot::{file, manifest};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Chunks that are kept in memory: 16 MiB, which are 32 blocks that were fetched ahead.
const CHUNKS_IN_MEMORY: usize = 256;

/// Why a remote image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A file of the snapshot cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its manifest is refused.
    #[error(transparent)]
    Manifest(#[from] snapshot::load::LoadError),
    /// The digests are not those of the manifest.
    #[error("{0} is damaged or belongs to another snapshot: it does not match the manifest; upload the snapshot again")]
    Digests(String),
    /// The memory has another length.
    #[error(
        "{url} has {found} bytes and should have {expected}: it was cut short or replaced; upload the snapshot again"
    )]
    Size {
        /// The object.
        url: String,
        /// Its length, in bytes.
        found: u64,
        /// The length that it should have, in bytes.
        expected: u64,
    },
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Chunks that came together and were found right.
type Fetched = Arc<Vec<(u64, Bytes)>>;

/// A memory image that lies elsewhere.
#[derive(Debug)]
pub struct RemoteImage {
    store: Store,
    /// Name of the memory file.
    file: String,
    pin: Pin,
    digests: Digests,
    memory: Mutex<ChunkCache>,
    disk: Option<CachedImage>,
    flights: Flights<u64, Result<Fetched, StoreError>>,
    tally: Tally,
}

impl RemoteImage {
    /// Fetches and checks what describes the image, and finds out that it is there, with the right length.
    pub fn open(store: Store, cache: Option<&Arc<DiskCache>>) -> Result<RemoteImage, RemoteError> {
        let url = |name: &str| store.location().name_of(name);
        let json = store.read_whole(file::MANIFEST, manifest::MAX_BYTES)?;
        let memory = snapshot::load::check_manifest(Path::new(&url(file::MANIFEST)), &json)?.memory;
        let table = store.read_whole(&memory.digests, Digests::table_bytes(&memory))?;
        let digests = Digests::check(&memory, &table).map_err(|_| RemoteError::Digests(url(&memory.digests)))?;
        let pin = store.pin(&memory.file)?;
        if pin.size != digests.size() {
            return Err(RemoteError::Size { url: url(&memory.file), found: pin.size, expected: digests.size() });
        }
        let disk = cache.map(|cache| cache.image(digests.root(), digests.size())).transpose()?;
        let (memory, file) = (Mutex::new(ChunkCache::new(CHUNKS_IN_MEMORY)), memory.file);
        Ok(RemoteImage {
            store,
            file,
            pin,
            digests,
            memory,
            disk,
            flights: Flights::default(),
            tally: Tally::default(),
        })
    }

    /// What is known of a chunk without fetching it: that it is zero, or what is kept of it. `read` reads the cache on disk.
    fn recall(&self, index: u64, chunk: &mut [u8], read: impl Fn(&CachedImage, u64, &mut [u8]) -> bool) -> bool {
        if self.digests.is_zero(index) {
            chunk.fill(0);
            return true;
        }
        let kept = self.memory().get(index);
        let found = match (kept, &self.disk) {
            (Some(bytes), _) => {
                chunk.copy_from_slice(&bytes);
                true
            }
            (None, Some(disk)) => read(disk, index * CHUNK_SIZE, chunk) && self.is_whole(index, chunk),
            (None, None) => false,
        };
        if found {
            self.tally.recalled(chunk.len());
        }
        found
    }

    /// Whether what the cache gave is the chunk. If it is neither that nor a hole, the cache is wrong there: the chunk is fetched
    /// and takes its place.
    fn is_whole(&self, index: u64, bytes: &[u8]) -> bool {
        let right = self.digests.is_right(index, bytes);
        if !right && bytes.iter().any(|byte| *byte != 0) {
            self.tally.found_bad(index);
        }
        right
    }

    /// Fetches a chunk with its block, and if that has it wrong, once more alone.
    fn fetch(&self, index: u64) -> Result<Bytes, SourceError> {
        let of = |fetched: &Fetched| fetched.iter().find(|(known, _)| *known == index).map(|(_, bytes)| bytes.clone());
        let block = self.flights.join(block_of(index), || {
            // Its block may have come between the look into the cache and now.
            let kept = self.memory().get(index);
            match kept {
                Some(bytes) => Ok(Arc::new(vec![(index, bytes)])),
                None => self.fetch_span(span(index, |other| self.digests.is_zero(other))),
            }
        });
        if let Some(bytes) = of(&block.map_err(|error| self.failed(error))?) {
            return Ok(bytes);
        }
        self.tally.failed(false);
        let alone = self.fetch_span(index..index + 1).map_err(|error| self.failed(error))?;
        of(&alone).ok_or_else(|| {
            self.tally.failed(false);
            SourceError::Damaged(format!(
                "{} is damaged at offset {:#x}: twice the digest of that chunk did not match; upload it again or create the \
                 snapshot anew",
                self.store.location().name_of(&self.file),
                index * CHUNK_SIZE
            ))
        })
    }

    /// Fetches chunks and keeps those that are right.
    fn fetch_span(&self, chunks: Range<u64>) -> Result<Fetched, StoreError> {
        let start = chunks.start * CHUNK_SIZE;
        let end = (chunks.end * CHUNK_SIZE).min(self.digests.size());
        let bytes = self.store.read_range(&self.file, &self.pin, start..end)?;
        let split = chunks.zip(bytes.chunks(CHUNK_SIZE as usize));
        let right = split.filter(|(index, chunk)| self.digests.is_right(*index, chunk));
        let right: Vec<(u64, Bytes)> = right.map(|(index, chunk)| (index, chunk.into())).collect();
        self.tally.fetched(right.len(), bytes.len());
        for (index, chunk) in right.iter().filter(|(index, _)| !self.digests.is_zero(*index)) {
            self.memory().insert(*index, chunk.clone());
            if let Some(disk) = &self.disk {
                disk.write(index * CHUNK_SIZE, chunk);
            }
        }
        Ok(Arc::new(right))
    }

    fn failed(&self, error: StoreError) -> SourceError {
        match error {
            StoreError::Changed(_) => {
                self.tally.failed(false);
                SourceError::Damaged(error.to_string())
            }
            _ => {
                self.tally.failed(true);
                SourceError::Away(error.to_string())
            }
        }
    }

    /// The part of `chunk` that the image has.
    fn part<'a>(&self, index: u64, chunk: &'a mut Chunk) -> Result<&'a mut [u8], SourceError> {
        match self.digests.chunk_len(index) {
            0 => Err(SourceError::Damaged(format!(
                "{} has {} chunks; chunk {index} was asked for",
                self.store.location().name_of(&self.file),
                self.digests.chunks()
            ))),
            len => Ok(&mut chunk[..len]),
        }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, ChunkCache> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for RemoteImage {
    fn kind(&self) -> &'static str {
        "remote"
    }

    fn root(&self) -> &str {
        self.digests.root()
    }

    fn size(&self) -> u64 {
        self.digests.size()
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        let part = self.part(index, chunk)?;
        if !self.recall(index, part, CachedImage::read) {
            part.copy_from_slice(&self.fetch(index)?);
        }
        Ok(part.len())
    }

    fn read_chunk_now(&self, index: u64, chunk: &mut Chunk) -> Result<Option<usize>, SourceError> {
        let part = self.part(index, chunk)?;
        Ok(self.recall(index, part, CachedImage::read_now).then_some(part.len()))
    }

    fn counters(&self) -> SourceCounters {
        self.tally.counters()
    }
}
