//! A memory image in a local file.

use super::{Chunk, Source, SourceError};
use snapshot::image::MemoryImage;
use std::ops::Range;

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
