//! The digests of a memory image, one for each chunk: what tells right bytes from wrong ones, wherever they come from. Pure.

use crate::chunk::{self, DIGEST_BYTES, Digest, ZeroDigests};
use crate::manifest::Memory;

/// The table of digests is not the one that the manifest describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the digests do not match the manifest")]
pub struct OtherDigests;

/// The digests of a memory image, found to be those of its manifest.
#[derive(Clone, Debug)]
pub struct Digests {
    size: u64,
    root: String,
    table: Vec<Digest>,
    zero: ZeroDigests,
}

impl Digests {
    /// Length of the table of an image, in bytes.
    pub fn table_bytes(memory: &Memory) -> u64 {
        chunk::count(memory.size_bytes) * DIGEST_BYTES as u64
    }

    /// Checks the contents of `mem.b3` against a manifest, which has been [checked](crate::manifest::Manifest::check) itself.
    pub fn check(memory: &Memory, table: &[u8]) -> Result<Digests, OtherDigests> {
        let right_length = table.len() as u64 == Digests::table_bytes(memory);
        if !right_length || blake3::hash(table).to_hex().as_str() != memory.root {
            return Err(OtherDigests);
        }
        Ok(Digests {
            size: memory.size_bytes,
            root: memory.root.clone(),
            table: table.as_chunks().0.to_vec(),
            zero: ZeroDigests::new(memory.size_bytes),
        })
    }

    /// Size of the image, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Root digest, in hex. Two images with the same root hold the same memory.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.table.len() as u64
    }

    /// Length of a chunk, in bytes: the last may be shorter than the others, and beyond it there is nothing.
    pub fn chunk_len(&self, index: u64) -> usize {
        chunk::len(self.size, index)
    }

    /// Whether a chunk is all zero. Chunks beyond the end are.
    pub fn is_zero(&self, index: u64) -> bool {
        self.get(index).is_none_or(|digest| digest == self.zero.of(index))
    }

    /// Whether these are the bytes of the chunk. Those of no chunk are never right.
    pub fn is_right(&self, index: u64, bytes: &[u8]) -> bool {
        self.get(index).is_some_and(|digest| chunk::digest(bytes) == *digest)
    }

    /// Whether two images hold the same in a chunk.
    pub fn agree(&self, other: &Digests, index: u64) -> bool {
        self.get(index) == other.get(index)
    }

    pub(crate) fn get(&self, index: u64) -> Option<&Digest> {
        self.table.get(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CHUNK_BYTES, file};
    use proptest::prelude::*;

    fn describe(image: &[u8]) -> (Memory, Vec<u8>) {
        let table: Vec<u8> = image.chunks(CHUNK_BYTES as usize).flat_map(chunk::digest).collect();
        let memory = Memory {
            file: file::MEMORY.to_owned(),
            size_bytes: image.len() as u64,
            regions: Vec::new(),
            chunk_bytes: CHUNK_BYTES,
            digests: file::DIGESTS.to_owned(),
            root: blake3::hash(&table).to_hex().to_string(),
            packed: None,
            parent: None,
            map: None,
        };
        (memory, table)
    }

    proptest! {
        #[test]
        fn right_bytes_are_told_from_wrong_ones(pages in 1usize..40, fill in 0u8..2, at in any::<prop::sample::Index>()) {
            let image = vec![fill; pages * 4096];
            let (memory, table) = describe(&image);
            let digests = Digests::check(&memory, &table).unwrap();
            prop_assert_eq!((digests.size(), digests.chunks() as usize), (image.len() as u64, image.len().div_ceil(65536)));
            for (index, chunk) in image.chunks(65536).enumerate() {
                prop_assert!(digests.is_right(index as u64, chunk));
                prop_assert_eq!(digests.is_zero(index as u64), fill == 0);
                prop_assert_eq!(digests.chunk_len(index as u64), chunk.len());
                let mut wrong = chunk.to_vec();
                wrong[at.index(chunk.len())] ^= 4;
                prop_assert!(!digests.is_right(index as u64, &wrong));
                prop_assert!(!digests.is_right(index as u64, &chunk[1..]));
            }
            prop_assert!(!digests.is_right(digests.chunks(), &[]));
        }

        #[test]
        fn another_table_is_refused(pages in 1usize..40, at in any::<prop::sample::Index>()) {
            let (memory, table) = describe(&vec![7; pages * 4096]);
            let mut wrong = table.clone();
            wrong[at.index(table.len())] ^= 1;
            for wrong in [&wrong[..], &table[1..], &[]] {
                prop_assert_eq!(Digests::check(&memory, wrong).unwrap_err(), OtherDigests);
            }
        }
    }
}
