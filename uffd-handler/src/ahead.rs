//! How far to copy ahead of a guest that touches one page after the other. No I/O.
//!
//! Each page that is copied is memory of the guest's own, so that pages which nobody asked for are copied only where the next fault is
//! likely to ask for them: a fault at the very page where what was copied last ended. Then twice as many pages are copied as the time
//! before, up to the end of the chunk.

use crate::region::CHUNK_PAGES;
use std::ops::Range;

/// How many sequences are followed at once: vCPUs take turns.
const SEQUENCES: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    /// The page after those that were copied last.
    next: u64,
    /// How many those were.
    len: u64,
}

/// The faults of one guest, as far as they tell of the next ones.
#[derive(Debug, Default)]
pub struct Ahead {
    sequences: [Sequence; SEQUENCES],
    oldest: usize,
}

impl Ahead {
    /// The pages to copy for a fault on `page`: it, and those that are likely to follow, all in one chunk.
    pub fn pages(&mut self, page: u64) -> Range<u64> {
        let followed = self.sequences.iter().position(|sequence| sequence.len > 0 && sequence.next == page);
        let slot = followed.unwrap_or_else(|| {
            self.oldest = (self.oldest + 1) % SEQUENCES;
            self.sequences[self.oldest] = Sequence::default();
            self.oldest
        });
        let sequence = &mut self.sequences[slot];
        sequence.len = (sequence.len * 2).clamp(1, CHUNK_PAGES);
        sequence.next = (page + sequence.len).min((page / CHUNK_PAGES + 1) * CHUNK_PAGES);
        page..sequence.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_who_goes_on_gets_more_and_one_who_jumps_does_not() {
        let mut ahead = Ahead::default();
        let mut walk = |page: u64| ahead.pages(page).end - page;
        assert_eq!([walk(0), walk(1), walk(3), walk(7), walk(15), walk(16)], [1, 2, 4, 8, 1, 16]);
        assert_eq!([walk(500), walk(900), walk(32), walk(901)], [1, 1, 16, 2]);
    }

    #[test]
    fn sequences_that_take_turns_are_followed_all() {
        let mut ahead = Ahead::default();
        let mut at = [0u64, 1000, 2000, 3000].map(|first| first * CHUNK_PAGES);
        let mut faults = 0;
        while at[3] < 3004 * CHUNK_PAGES {
            for page in &mut at {
                *page = ahead.pages(*page).end;
                faults += 1;
            }
        }
        assert!(faults <= 4 * 8, "{faults} faults for four times four chunks");
    }

    proptest! {
        #[test]
        fn what_is_copied_begins_with_the_page_and_stays_in_its_chunk(pages in prop::collection::vec(0..200u64, 0..100)) {
            let mut ahead = Ahead::default();
            let mut copied = 0;
            for page in &pages {
                let range = ahead.pages(*page);
                prop_assert!(range.start == *page && range.end > *page);
                prop_assert_eq!(range.start / CHUNK_PAGES, (range.end - 1) / CHUNK_PAGES);
                copied += range.end - range.start;
            }
            prop_assert!(copied <= 16 * pages.len() as u64);
        }
    }
}
