//! A memory image in a local file.

use super::{Chunk, Source, SourceError};
use snapshot::image::{ImageError, MemoryImage};
use snapshot::load::{Lease, Snapshot};
use std::ops::Range;
use std::sync::Arc;

/// The memory image of a snapshot on this host.
#[derive(Debug)]
pub struct LocalImage {
    image: MemoryImage,
    snapshot: Arc<Snapshot>,
    /// Nobody removes it meanwhile.
    _lease: Lease,
}

impl LocalImage {
    /// Opens it.
    pub fn open(snapshot: Snapshot) -> Result<Self, ImageError> {
        let _lease = snapshot.lease().map_err(|e| ImageError::Parent(Box::new(e)))?;
        Ok(LocalImage { image: MemoryImage::open(&snapshot)?, snapshot: Arc::new(snapshot), _lease })
    }
}

impl Source for LocalImage {
    fn kind(&self) -> &'static str {
        self.image.kind()
    }

    fn root(&self) -> &str {
        self.image.root()
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        self.image.read_chunk(index, chunk).map_err(damaged)
    }

    fn read_chunk_now(&self, index: u64, chunk: &mut Chunk) -> Result<Option<usize>, SourceError> {
        self.image.read_chunk_now(index, chunk).map_err(damaged)
    }

    fn forget(&self, chunks: Range<u64>) {
        self.image.forget(chunks);
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        Some(self.snapshot.clone())
    }
}

fn damaged(error: ImageError) -> SourceError {
    SourceError::Damaged(error.to_string())
}
