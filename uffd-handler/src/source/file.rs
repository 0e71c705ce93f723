//! A memory image in a local file.
//!
//! [`LocalImage`] is one that knows its snapshot.

use super::{Chunk, Source, SourceError};
use snapshot::image::{ImageError, MemoryImage};
use snapshot::load::Snapshot;
use std::ops::Range;
use std::sync::Arc;

impl Source for MemoryImage {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn root(&self) -> &str {
        self.root()
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        self.read_chunk(index, chunk).map_err(|error| SourceError::Damaged(error.to_string()))
    }

    fn read_chunk_now(&self, index: u64, chunk: &mut Chunk) -> Result<Option<usize>, SourceError> {
        self.read_chunk_now(index, chunk).map_err(|error| SourceError::Damaged(error.to_string()))
    }

    fn forget(&self, chunks: Range<u64>) {
        self.forget(chunks);
    }
}

/// The memory image of a snapshot on this host.
#[derive(Debug)]
pub struct LocalImage {
    image: MemoryImage,
    snapshot: Arc<Snapshot>,
}

impl LocalImage {
    /// Opens it.
    pub fn open(snapshot: Snapshot) -> Result<Self, ImageError> {
        Ok(LocalImage { image: MemoryImage::open(&snapshot)?, snapshot: Arc::new(snapshot) })
    }
}

impl Source for LocalImage {
    fn kind(&self) -> &'static str {
        Source::kind(&self.image)
    }

    fn root(&self) -> &str {
        self.image.root()
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        Source::read_chunk(&self.image, index, chunk)
    }

    fn read_chunk_now(&self, index: u64, chunk: &mut Chunk) -> Result<Option<usize>, SourceError> {
        Source::read_chunk_now(&self.image, index, chunk)
    }

    fn forget(&self, chunks: Range<u64>) {
        self.image.forget(chunks);
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        Some(self.snapshot.clone())
    }
}
