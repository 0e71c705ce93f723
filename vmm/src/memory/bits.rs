//! Sets of pages of a region as bits, for what is asked of all pages at once. Pure.

use std::ops::Range;

/// Pages in a word.
const WORD: u64 = u64::BITS as u64;

/// A set of the pages of a region, numbered from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    pages: u64,
}

impl Bits {
    /// No page of a region of so many.
    pub fn new(pages: u64) -> Self {
        Bits { words: vec![0; pages.div_ceil(WORD) as usize], pages }
    }

    /// How many words a region of so many pages has.
    pub fn words_of(pages: u64) -> usize {
        pages.div_ceil(WORD) as usize
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / WORD) as usize).is_some_and(|word| word >> (page % WORD) & 1 == 1)
    }

    /// Adds a run of pages, as far as the region has them.
    pub fn insert(&mut self, run: Range<u64>) {
        let (mut at, end) = (run.start, run.end.min(self.pages));
        while at < end {
            let n = (WORD - at % WORD).min(end - at);
            self.words[(at / WORD) as usize] |= (u64::MAX >> (WORD - n)) << (at % WORD);
            at += n;
        }
    }

    /// Adds the pages of a word, numbered as in [`Bits::words_of`]. Bits beyond the region's last page mean nothing.
    pub fn insert_word(&mut self, number: usize, word: u64) {
        let first = number as u64 * WORD;
        let beyond = (first + WORD).saturating_sub(self.pages).min(WORD);
        if let (Some(mine), Some(mask)) = (self.words.get_mut(number), u64::MAX.checked_shr(beyond as u32)) {
            *mine |= word & mask;
        }
    }

    /// Adds the pages of another set of the same region.
    pub fn join(&mut self, other: &Bits) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, other)| *mine |= other);
    }

    /// Takes the pages of another set of the same region away.
    pub fn leave_out(&mut self, other: &Bits) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, other)| *mine &= !other);
    }

    /// Takes all pages away.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages that are in both of two sets of one region.
    pub fn both(&self, other: &Bits) -> Bits {
        let words = self.words.iter().zip(&other.words).map(|(mine, other)| mine & other).collect();
        Bits { words, pages: self.pages }
    }

    /// The pages that are in this set and not in the other.
    pub fn without(&self, other: &Bits) -> Bits {
        let words = self.words.iter().zip(&other.words).map(|(mine, other)| mine & !other).collect();
        Bits { words, pages: self.pages }
    }

    /// The set as the fewest runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, 0)?;
            at = self.next(start, u64::MAX).unwrap_or(self.pages).min(self.pages);
            Some(start..at)
        })
    }

    /// The first page at or after `from` whose bit is set once all were flipped where `flip` is set.
    fn next(&self, from: u64, flip: u64) -> Option<u64> {
        let mut number = (from / WORD) as usize;
        let mut word = (self.words.get(number)? ^ flip) & (u64::MAX << (from % WORD));
        while word == 0 {
            number += 1;
            word = self.words.get(number)? ^ flip;
        }
        Some(number as u64 * WORD + u64::from(word.trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 300;

    fn sets() -> impl Strategy<Value = (Bits, BTreeSet<u64>)> {
        prop::collection::vec((0..PAGES + 20, 0u64..90), 0..12).prop_map(|runs| {
            let (mut bits, mut model) = (Bits::new(PAGES), BTreeSet::new());
            for (at, len) in runs {
                bits.insert(at..at + len);
                model.extend((at..at + len).filter(|page| *page < PAGES));
            }
            (bits, model)
        })
    }

    fn pages(bits: &Bits) -> BTreeSet<u64> {
        bits.runs().flatten().collect()
    }

    proptest! {
        #[test]
        fn bits_are_a_set_of_pages((a, in_a) in sets(), (b, in_b) in sets()) {
            prop_assert_eq!(pages(&a), in_a.clone());
            prop_assert_eq!(a.count(), in_a.len() as u64);
            prop_assert_eq!(a.is_empty(), in_a.is_empty());
            prop_assert!((0..PAGES + 100).all(|page| a.contains(page) == in_a.contains(&page)));
            prop_assert_eq!(pages(&a.both(&b)), &in_a & &in_b);
            prop_assert_eq!(pages(&a.without(&b)), &in_a - &in_b);
            let (mut joined, mut left) = (a.clone(), a.clone());
            joined.join(&b);
            left.leave_out(&b);
            prop_assert_eq!((pages(&joined), pages(&left)), (&in_a | &in_b, &in_a - &in_b));
        }

        #[test]
        fn runs_are_as_few_as_can_be((bits, _) in sets()) {
            let runs: Vec<_> = bits.runs().collect();
            prop_assert!(runs.iter().all(|run| run.start < run.end && run.end <= PAGES));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn words_are_runs_of_pages(words in prop::collection::vec(any::<u64>(), 0..8)) {
            let mut bits = Bits::new(PAGES);
            words.iter().enumerate().for_each(|(number, word)| bits.insert_word(number, *word));
            for page in 0..PAGES {
                let set = words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1);
                prop_assert_eq!(bits.contains(page), set);
            }
            prop_assert!(pages(&bits).iter().all(|page| *page < PAGES));
            bits.clear();
            prop_assert!(bits.is_empty());
        }
    }
}
