//! A histogram of how long something took, with fixed bounds. No I/O.

use api_spec::page_server::{Bucket, Histogram as Document};
use std::time::Duration;

/// Upper bounds of the classes, in microseconds, each belonging to its class.
pub const BOUNDS_US: [u64; 17] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 500_000, 1_000_000, 10_000_000,
];

/// Counts durations by class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BOUNDS_US.len()],
    count: u64,
    sum_us: u64,
}

impl Histogram {
    /// Counts something that took so long, `times` times.
    pub fn record(&mut self, took: Duration, times: u64) {
        // A part of a microsecond counts as a whole one, so that nothing is put into a class that is too short for it.
        let us = u64::try_from(took.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
        let class = BOUNDS_US.partition_point(|&bound| bound < us);
        if let Some(count) = self.counts.get_mut(class) {
            *count += times;
        }
        self.count += times;
        self.sum_us = self.sum_us.saturating_add(us.saturating_mul(times));
    }

    /// The counts as of now, as the counters' document has them.
    pub fn document(&self) -> Document {
        let buckets = BOUNDS_US.iter().zip(self.counts).map(|(&le_us, count)| Bucket { le_us, count });
        Document { buckets: buckets.collect(), count: self.count, sum_us: self.sum_us }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bound_belongs_to_its_class_and_what_is_above_all_to_none() {
        let mut histogram = Histogram::default();
        histogram.record(Duration::from_micros(5), 1);
        histogram.record(Duration::from_nanos(5_001), 2);
        histogram.record(Duration::from_secs(11), 1);
        let document = histogram.document();
        assert_eq!(document.buckets[0], Bucket { le_us: 5, count: 1 });
        assert_eq!(document.buckets[1], Bucket { le_us: 10, count: 2 });
        assert_eq!((document.count, document.sum_us), (4, 5 + 2 * 6 + 11_000_000));
        assert_eq!(document.buckets.iter().map(|bucket| bucket.count).sum::<u64>(), 3);
    }

    #[test]
    fn bounds_rise() {
        assert!(BOUNDS_US.is_sorted_by(|low, high| low < high));
    }

    proptest! {
        #[test]
        fn every_duration_is_in_the_first_class_that_has_room_for_it(us in 0..20_000_000u64) {
            let mut histogram = Histogram::default();
            histogram.record(Duration::from_micros(us), 1);
            let first = histogram.document().buckets.into_iter().find(|bucket| bucket.count > 0);
            prop_assert_eq!(first.map(|bucket| bucket.le_us), BOUNDS_US.into_iter().find(|&bound| us <= bound));
        }
    }
}
