//! How far to go ahead of a guest that touches one page, or chunk, after the other. No I/O.
//!
//! Pages that nobody has asked for cost time and memory, so that they are got only where the next fault is likely to ask for them: where
//! a fault is at the very place at which what was got last ended. Then twice as many are got as the time before, up to a bound.

use crate::region::CHUNK_PAGES;
use std::ops::Range;

/// How many sequences are followed at once: vCPUs take turns.
const SEQUENCES: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    /// The one after those that were got last.
    next: u64,
    /// How many those were.
    len: u64,
}

/// The faults of one guest, as far as they tell of the next ones.
#[derive(Debug)]
pub struct Ahead {
    sequences: [Sequence; SEQUENCES],
    oldest: usize,
    /// How many are got at once, at most.
    most: u64,
    /// In groups of how many they lie of which only one is got at a time.
    group: u64,
}

/// How many chunks are got at once, at most: 512 KiB.
const MOST_CHUNKS: u64 = 8;

impl Ahead {
    /// For pages that are copied to a guest, one chunk at a time.
    pub fn of_pages() -> Self {
        Ahead { sequences: Default::default(), oldest: 0, most: CHUNK_PAGES, group: CHUNK_PAGES }
    }

    /// For chunks that are put into a store.
    pub fn of_chunks() -> Self {
        Ahead { sequences: Default::default(), oldest: 0, most: MOST_CHUNKS, group: u64::MAX }
    }

    /// What to get for a fault at this place: it, and what is likely to be asked for next.
    pub fn at(&mut self, place: u64) -> Range<u64> {
        let followed = self.sequences.iter().position(|sequence| sequence.len > 0 && sequence.next == place);
        let slot = followed.unwrap_or_else(|| {
            self.oldest = (self.oldest + 1) % SEQUENCES;
            self.sequences[self.oldest] = Sequence::default();
            self.oldest
        });
        let sequence = &mut self.sequences[slot];
        sequence.len = (sequence.len * 2).clamp(1, self.most);
        let end_of_group = (place / self.group).saturating_add(1).saturating_mul(self.group);
        sequence.next = place.saturating_add(sequence.len).min(end_of_group);
        place..sequence.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_who_goes_on_gets_more_and_one_who_jumps_does_not() {
        let mut ahead = Ahead::of_pages();
        let mut walk = |page: u64| ahead.at(page).end - page;
        assert_eq!([walk(0), walk(1), walk(3), walk(7), walk(15), walk(16)], [1, 2, 4, 8, 1, 16]);
        assert_eq!([walk(500), walk(900), walk(32), walk(901)], [1, 1, 16, 2]);
        let mut ahead = Ahead::of_chunks();
        let mut walk = |chunk: u64| ahead.at(chunk).end - chunk;
        assert_eq!([walk(0), walk(1), walk(3), walk(7), walk(15), walk(17)], [1, 2, 4, 8, 8, 1]);
    }

    #[test]
    fn sequences_that_take_turns_are_followed_all() {
        let mut ahead = Ahead::of_pages();
        let mut at = [0u64, 1000, 2000, 3000].map(|first| first * CHUNK_PAGES);
        let mut faults = 0;
        while at[3] < 3004 * CHUNK_PAGES {
            for page in &mut at {
                *page = ahead.at(*page).end;
                faults += 1;
            }
        }
        assert!(faults <= 4 * 8, "{faults} faults for four times four chunks");
    }

    proptest! {
        #[test]
        fn what_is_copied_begins_with_the_page_and_stays_in_its_chunk(pages in prop::collection::vec(0..200u64, 0..100)) {
            let mut ahead = Ahead::of_pages();
            let mut copied = 0;
            for page in &pages {
                let range = ahead.at(*page);
                prop_assert!(range.start == *page && range.end > *page);
                prop_assert_eq!(range.start / CHUNK_PAGES, (range.end - 1) / CHUNK_PAGES);
                copied += range.end - range.start;
            }
            prop_assert!(copied <= 16 * pages.len() as u64);
        }
    }
}
