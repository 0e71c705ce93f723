//! Sets of numbers, such as those of pages, kept as runs. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of numbers, kept as runs that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First number of each run, and the one after its last.
    runs: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Puts the numbers of `range` in.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        // Runs that overlap the range, or touch it, become part of it.
        while let Some((&from, &to)) = self.runs.range(..=end).next_back() {
            if to < start {
                break;
            }
            (start, end) = (start.min(from), end.max(to));
            self.runs.remove(&from);
        }
        self.runs.insert(start, end);
    }

    /// Whether every number of `range` is in.
    pub fn contains(&self, range: Range<u64>) -> bool {
        range.is_empty() || self.run_at(range.start).is_some_and(|run| run.end >= range.end)
    }

    /// Whether a number of `range` is in, or one next to it: what [`RangeSet::insert`] would not make a run of its own.
    pub fn touches(&self, range: Range<u64>) -> bool {
        self.runs.range(..=range.end).next_back().is_some_and(|(_, to)| *to >= range.start)
    }

    /// The run that holds `number`.
    pub fn run_at(&self, number: u64) -> Option<Range<u64>> {
        let (&start, &end) = self.runs.range(..=number).next_back()?;
        (number < end).then_some(start..end)
    }

    /// The first run that begins at `number` or after it.
    pub fn next_run(&self, number: u64) -> Option<Range<u64>> {
        self.runs.range(number..).next().map(|(&start, &end)| start..end)
    }

    /// The runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|(&start, &end)| start..end)
    }

    /// Whether nothing is in.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers are below this.
    const END: u64 = 64;

    #[test]
    fn neighbours_become_one_run() {
        let mut set = RangeSet::default();
        for range in [4..6, 8..9, 6..8, 0..1, 3..3] {
            set.insert(range);
        }
        assert_eq!(set.runs().collect::<Vec<_>>(), [0..1, 4..9]);
        assert_eq!((set.run_at(8), set.run_at(9)), (Some(4..9), None));
        assert_eq!((set.next_run(1), set.next_run(5)), (Some(4..9), None));
        assert!(set.touches(1..2) && set.touches(3..4) && !set.touches(2..3) && !set.touches(10..12));
    }

    fn ranges() -> impl Strategy<Value = Range<u64>> {
        (0..END, 0..12u64).prop_map(|(start, len)| start..(start + len).min(END))
    }

    proptest! {
        #[test]
        fn it_is_what_a_bitmap_says(inserted in prop::collection::vec(ranges(), 0..12), asked in ranges()) {
            let (mut set, mut bitmap) = (RangeSet::default(), [false; END as usize + 2]);
            for range in inserted {
                set.insert(range.clone());
                range.for_each(|n| bitmap[n as usize] = true);
            }
            let is_in = |n: u64| bitmap[n as usize];

            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.iter().all(|run| !run.is_empty()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "apart from each other: {runs:?}");
            for n in 0..END {
                prop_assert_eq!(runs.iter().any(|run| run.contains(&n)), is_in(n), "{}", n);
                prop_assert_eq!(set.run_at(n).is_some(), is_in(n));
                prop_assert_eq!(set.next_run(n), runs.iter().find(|run| run.start >= n).cloned());
            }
            prop_assert_eq!(set.contains(asked.clone()), asked.clone().all(is_in));
            if !asked.is_empty() {
                let (before, after) = (asked.start.saturating_sub(1), asked.end);
                prop_assert_eq!(set.touches(asked.clone()), (before..=after).any(is_in));
                let mut grown = set.clone();
                grown.insert(asked.clone());
                let begins_a_run = grown.runs().any(|run| run == asked) && !set.touches(asked.clone());
                prop_assert_eq!(begins_a_run, !set.touches(asked));
            }
            prop_assert_eq!(set.is_empty(), runs.is_empty());
        }
    }
}
