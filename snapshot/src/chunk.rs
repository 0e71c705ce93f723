//! Chunks of a memory image and their digests.

use crate::CHUNK_BYTES;

/// Length of a digest, in bytes.
pub(crate) const DIGEST_BYTES: usize = 32;

/// A digest of a chunk.
pub(crate) type Digest = [u8; DIGEST_BYTES];

/// Number of chunks of an image.
pub(crate) fn count(image_bytes: u64) -> u64 {
    image_bytes.div_ceil(CHUNK_BYTES)
}

/// Length of a chunk, in bytes: the last may be shorter than the others, and beyond it there is nothing.
pub(crate) fn len(image_bytes: u64, index: u64) -> usize {
    image_bytes.saturating_sub(index.saturating_mul(CHUNK_BYTES)).min(CHUNK_BYTES) as usize
}

pub(crate) fn digest(chunk: &[u8]) -> Digest {
    *blake3::hash(chunk).as_bytes()
}

/// Whether the bytes, at most a chunk, are all zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; CHUNK_BYTES as usize] = [0; CHUNK_BYTES as usize];
    bytes == &ZEROS[..bytes.len()]
}

/// Digests of the chunks of an image that is all zero.
#[derive(Clone, Debug)]
pub(crate) struct ZeroDigests {
    whole: Digest,
    last: Digest,
    last_index: u64,
}

impl ZeroDigests {
    pub(crate) fn new(image_bytes: u64) -> ZeroDigests {
        let last_index = count(image_bytes).saturating_sub(1);
        let zeros = [0; CHUNK_BYTES as usize];
        let whole = digest(&zeros);
        let last = match len(image_bytes, last_index) {
            len if len == zeros.len() => whole,
            len => digest(&zeros[..len]),
        };
        ZeroDigests { whole, last, last_index }
    }

    /// What the digest of a chunk is if the chunk is zero.
    pub(crate) fn of(&self, index: u64) -> &Digest {
        if index == self.last_index { &self.last } else { &self.whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_chunk_may_be_short() {
        assert_eq!(count(1), 1);
        assert_eq!(count(CHUNK_BYTES), 1);
        assert_eq!(count(CHUNK_BYTES + 1), 2);
        let size = 2 * CHUNK_BYTES + 4096;
        assert_eq!([0, 1, 2, 3, u64::MAX].map(|i| len(size, i)), [65536, 65536, 4096, 0, 0]);
        let zero = ZeroDigests::new(size);
        assert_eq!(*zero.of(1), digest(&[0; 65536]));
        assert_eq!(*zero.of(2), digest(&[0; 4096]));
    }
}
