//! Sets of pages as runs, in order. Pure.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A set of pages, as the fewest runs that it has: none is empty, touches another, or comes before an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct PageRuns(Vec<Range<u64>>);

/// Runs that are no set of pages in the order in which they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run of {pages} pages from page {first} on is empty, too long, or not after the run before it")]
pub struct BadRun {
    /// First page of the run.
    pub first: u64,
    /// Its length, in pages.
    pub pages: u64,
}

impl PageRuns {
    /// The pages of these runs, which may be in any order and overlap.
    pub fn new(runs: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut runs: Vec<_> = runs.into_iter().filter(|run| run.start < run.end).collect();
        runs.sort_unstable_by_key(|run| run.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => joined.push(run),
            }
        }
        PageRuns(joined)
    }

    /// These pages.
    pub fn of_pages(pages: impl IntoIterator<Item = u64>) -> Self {
        Self::new(pages.into_iter().map(|page| page..page.saturating_add(1)))
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|run| run.end - run.start).sum()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The page after the last one.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |run| run.end)
    }

    /// How many of these pages lie in a range.
    pub fn pages_in(&self, range: Range<u64>) -> u64 {
        let from = self.0.partition_point(|run| run.end <= range.start);
        let inside = self.0[from..].iter().take_while(|run| run.start < range.end);
        inside.map(|run| run.end.min(range.end) - run.start.max(range.start)).sum()
    }

    /// Pages that are in one of the two, or both.
    pub fn union(&self, other: &PageRuns) -> PageRuns {
        Self::new(self.0.iter().chain(&other.0).cloned())
    }

    /// Pages that are in so many of these sets at least: with 1 their union, with all of them what they have in common.
    pub fn in_at_least(count: usize, sets: &[&PageRuns]) -> PageRuns {
        let ends = |run: &Range<u64>| [(run.start, 1), (run.end, -1)];
        let mut steps: Vec<(u64, i64)> = sets.iter().flat_map(|set| set.0.iter().flat_map(ends)).collect();
        steps.sort_unstable();
        let (mut depth, mut runs) = (0, Vec::new());
        for pair in steps.windows(2) {
            depth += pair[0].1;
            if depth >= count.max(1) as i64 {
                runs.push(pair[0].0..pair[1].0);
            }
        }
        Self::new(runs)
    }

    /// Those before `end`.
    pub fn before(&self, end: u64) -> PageRuns {
        Self::new(self.0.iter().map(|run| run.start..run.end.min(end)))
    }

    /// All of these pages, and as few others as can be, in `most` runs at most: the smallest gaps are closed first.
    pub fn bounded(self, most: usize) -> PageRuns {
        let PageRuns(runs) = self;
        let Some(excess) = runs.len().checked_sub(most.max(1)).filter(|excess| *excess > 0) else {
            return PageRuns(runs);
        };
        let mut gaps: Vec<Range<u64>> = runs.windows(2).map(|pair| pair[0].end..pair[1].start).collect();
        gaps.sort_unstable_by_key(|gap| (gap.end - gap.start, gap.start));
        gaps.truncate(excess);
        Self::new(runs.into_iter().chain(gaps))
    }
}

impl From<PageRuns> for Vec<(u64, u64)> {
    fn from(runs: PageRuns) -> Self {
        runs.0.into_iter().map(|run| (run.start, run.end - run.start)).collect()
    }
}

impl TryFrom<Vec<(u64, u64)>> for PageRuns {
    type Error = BadRun;

    /// Takes runs (first page, pages) only as [`PageRuns`] writes them.
    fn try_from(runs: Vec<(u64, u64)>) -> Result<Self, BadRun> {
        let mut taken: Vec<Range<u64>> = Vec::with_capacity(runs.len());
        for (first, pages) in runs {
            let bad = BadRun { first, pages };
            let end = first.checked_add(pages).filter(|end| *end > first).ok_or(bad.clone())?;
            if taken.last().is_some_and(|last| last.end >= first) {
                return Err(bad);
            }
            taken.push(first..end);
        }
        Ok(PageRuns(taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    type Set = BTreeSet<u64>;

    fn sets() -> impl Strategy<Value = Set> {
        prop::collection::btree_set(0u64..120, 0..60)
    }

    fn runs(set: &Set) -> PageRuns {
        PageRuns::of_pages(set.iter().copied())
    }

    fn pages(runs: &PageRuns) -> Set {
        runs.runs().iter().cloned().flatten().collect()
    }

    #[test]
    fn runs_out_of_order_are_refused() {
        let take = |runs: &[(u64, u64)]| PageRuns::try_from(runs.to_vec());
        assert!(take(&[(0, 2), (3, 1)]).is_ok());
        for bad in [&[(0, 0)][..], &[(u64::MAX, 1)], &[(0, 2), (2, 1)], &[(5, 1), (0, 1)], &[(0, 5), (1, 1)]] {
            assert!(take(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn runs_are_the_pages_and_no_more_than_must_be(set in sets()) {
            let made = runs(&set);
            prop_assert_eq!(pages(&made), set.clone());
            prop_assert!(made.runs().windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(made.pages(), set.len() as u64);
            prop_assert_eq!(made.end(), set.last().map_or(0, |last| last + 1));
            let written: Vec<(u64, u64)> = made.clone().into();
            prop_assert_eq!(PageRuns::try_from(written), Ok(made));
        }

        #[test]
        fn sets_are_joined_cut_and_counted(a in sets(), b in sets(), c in sets(), at_least in 1usize..5, end in 0u64..130) {
            let (x, y, z) = (runs(&a), runs(&b), runs(&c));
            prop_assert_eq!(pages(&x.union(&y)), &a | &b);
            prop_assert_eq!(pages(&x.before(end)), a.iter().copied().filter(|page| *page < end).collect::<Set>());
            let often = |page: &u64| [&a, &b, &c].iter().filter(|set| set.contains(page)).count() >= at_least;
            let expected: Set = (0..120).filter(often).collect();
            prop_assert_eq!(pages(&PageRuns::in_at_least(at_least, &[&x, &y, &z])), expected);
            let inside = a.iter().filter(|page| (end / 2..end).contains(page)).count() as u64;
            prop_assert_eq!(x.pages_in(end / 2..end), inside);
        }

        #[test]
        fn a_bound_is_kept_at_the_least_cost(set in sets(), most in 1usize..20) {
            let before = runs(&set);
            let after = before.clone().bounded(most);
            prop_assert!(after.runs().len() <= most);
            prop_assert!(pages(&after).is_superset(&set));
            let mut gaps: Vec<u64> = before.runs().windows(2).map(|pair| pair[1].start - pair[0].end).collect();
            gaps.sort_unstable();
            let excess = before.runs().len().saturating_sub(most);
            prop_assert_eq!(after.pages() - before.pages(), gaps[..excess].iter().sum::<u64>());
        }
    }
}
