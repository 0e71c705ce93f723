//! A set of page numbers below a bound: which pages the server has put into a store. No I/O.

use std::ops::Range;

/// A set of pages, as a bitmap, that knows how many it holds.
#[derive(Debug)]
pub struct PageSet {
    words: Vec<u64>,
    count: u64,
}

impl PageSet {
    /// An empty set for pages `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], count: 0 }
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds the pages of a range, a word at a time: a range may be as long as a guest's memory.
    pub fn insert(&mut self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let end = (page / 64 * 64 + 64).min(pages.end);
            let mask = (u64::MAX >> (64 - (end - page))) << (page % 64);
            let word = &mut self.words[(page / 64) as usize];
            self.count += u64::from((mask & !*word).count_ones());
            *word |= mask;
            page = end;
        }
    }

    /// The first run of pages in `within` that are not in the set; `None` when all are.
    pub fn first_gap(&self, within: Range<u64>) -> Option<Range<u64>> {
        let start = within.clone().find(|&page| !self.contains(page))?;
        let end = (start..within.end).find(|&page| self.contains(page)).unwrap_or(within.end);
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn gaps_are_found_around_what_is_there() {
        let mut set = PageSet::new(100);
        set.insert(10..20);
        assert_eq!(set.first_gap(0..32), Some(0..10));
        assert_eq!(set.first_gap(10..32), Some(20..32));
        assert_eq!(set.first_gap(12..18), None);
        assert_eq!(set.first_gap(5..5), None);
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(ranges in prop::collection::vec((0..200u64, 0..150u64), 0..20)) {
            let (mut set, mut model) = (PageSet::new(350), BTreeSet::new());
            for (start, len) in ranges {
                set.insert(start..start + len);
                model.extend(start..start + len);
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert!((0..350).all(|page| set.contains(page) == model.contains(&page)));
        }
    }
}
