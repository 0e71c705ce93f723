//! Where pages come from: an immutable memory image that is read, and checked, a chunk at a time.

use crate::region::CHUNK_SIZE;

/// Room for one chunk.
pub type Chunk = [u8; CHUNK_SIZE as usize];

/// A chunk could not be had, or is not what the image's digests say. The text is for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// An immutable memory image.
pub trait Source {
    /// Root digest of the image: its name.
    fn root(&self) -> &str;

    /// Size of the image in bytes, a multiple of the page size.
    fn size(&self) -> u64;

    /// Reads chunk `index` into `chunk` and checks it; returns how many bytes of it the image has, which is less than
    /// a whole chunk only at the image's end. Bytes that fail their check are never returned as good.
    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError>;
}

impl Source for snapshot::image::MemoryImage {
    fn root(&self) -> &str {
        self.root()
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        self.read_chunk(index, chunk).map_err(|error| SourceError(error.to_string()))
    }
}

const _: () = assert!(CHUNK_SIZE == snapshot::CHUNK_BYTES, "a chunk is checked against one digest");
