//! How much is fetched at once. Pure.
//!
//! A guest's fault waits for the whole answer, so that reading more than the one chunk must not cost much; but the next fault
//! is often close by, and an answer's first byte takes far longer than the bytes after it. From an object store the first byte
//! takes some 20 ms, and at 100 MB/s a chunk of 64 KiB takes 0.7 ms and a block of 512 KiB 5 ms: a quarter more waiting for
//! eight times as much. A whole image then comes in an eighth of the requests, too, which are paid for one by one.

use std::ops::Range;

/// Chunks in a block.
pub const BLOCK_CHUNKS: u64 = 8;

/// Number of the block that a chunk is in.
pub fn block_of(chunk: u64) -> u64 {
    chunk / BLOCK_CHUNKS
}

/// Chunks to fetch when `chunk`, which is not zero, is wanted: its block, without zero chunks at either end.
pub fn span(chunk: u64, is_zero: impl Fn(u64) -> bool) -> Range<u64> {
    let first = block_of(chunk) * BLOCK_CHUNKS;
    let end = first.saturating_add(BLOCK_CHUNKS);
    let start = (first..chunk).find(|index| !is_zero(*index)).unwrap_or(chunk);
    let last = (chunk + 1..end).rfind(|index| !is_zero(*index)).unwrap_or(chunk);
    start..last + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_span_is_a_block_without_zero_ends(zeros in prop::collection::vec(any::<bool>(), 1..50), at in any::<prop::sample::Index>()) {
            let chunk = at.index(zeros.len()) as u64;
            // What lies beyond the end of an image is zero.
            let is_zero = |index: u64| index != chunk && zeros.get(index as usize).copied().unwrap_or(true);
            let span = span(chunk, is_zero);
            prop_assert!(span.contains(&chunk) && span.end <= zeros.len() as u64);
            prop_assert!(!is_zero(span.start) && !is_zero(span.end - 1));
            prop_assert_eq!((block_of(span.start), block_of(span.end - 1)), (block_of(chunk), block_of(chunk)));
            let block = block_of(chunk) * BLOCK_CHUNKS..(block_of(chunk) + 1) * BLOCK_CHUNKS;
            prop_assert!(block.filter(|index| !span.contains(index)).all(is_zero));
        }
    }
}
