//! One figure beside another, and how sure that is. Pure.

use super::figure::rounded;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// How often the samples are drawn anew.
const DRAWS: usize = 1000;
/// Which share of them is left out at either end.
const LOW: f64 = 0.025;
/// What is less than so many microseconds cannot be compared with.
const LEAST_US: f64 = 1.0;

/// How many times one median is another, and between what that lies in 95 of 100 draws (a percentile bootstrap).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The quotient.
    pub ratio: f64,
    /// The least that it can well be.
    pub low: f64,
    /// The most.
    pub high: f64,
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interval { ratio, low, high } = self;
        write!(f, "{ratio:.3} times (95 %: {low:.3} to {high:.3})")
    }
}

/// Durations with something, and without.
pub type Both = (Vec<Duration>, Vec<Duration>);

/// The median of some durations divided by that of others.
pub fn medians(of: &[Duration], to: &[Duration]) -> Interval {
    interval(|numbers| quotient(median(of, numbers), median(to, numbers)))
}

/// The same of what something adds to the median: durations with it, and without. What is compared with counts as a microsecond at least, so
/// that beside nothing whatever takes time is much.
pub fn added(of: &Both, to: &Both) -> Interval {
    let added = |(with, without): &Both, draw: &mut Draw| median(with, draw) - median(without, draw);
    interval(|draw| quotient(added(of, draw), added(to, draw)))
}

fn interval(mut ratio: impl FnMut(&mut Draw) -> f64) -> Interval {
    let mut draws: Vec<f64> = (0..DRAWS as u64).map(|number| ratio(&mut Draw::Anew(seed(number)))).collect();
    draws.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| rounded(draws[((DRAWS - 1) as f64 * share).round() as usize]);
    Interval { ratio: rounded(ratio(&mut Draw::AsTheyAre)), low: at(LOW), high: at(1.0 - LOW) }
}

/// Which samples are taken.
enum Draw {
    AsTheyAre,
    /// As many, each any of them: by xorshift64, since a report is to be the same for the same samples.
    Anew(u64),
}

fn seed(number: u64) -> u64 {
    number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Draw {
    fn next(&mut self, number: usize, count: usize) -> usize {
        match self {
            Draw::AsTheyAre => number,
            Draw::Anew(state) => {
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                (*state % count as u64) as usize
            }
        }
    }
}

/// In microseconds.
fn median(durations: &[Duration], draw: &mut Draw) -> f64 {
    let mut drawn: Vec<Duration> = (0..durations.len()).map(|at| durations[draw.next(at, durations.len())]).collect();
    let middle = drawn.len() / 2;
    match drawn.is_empty() {
        true => 0.0,
        false => drawn.select_nth_unstable(middle).1.as_secs_f64() * 1e6,
    }
}

fn quotient(of: f64, to: f64) -> f64 {
    of / to.max(LEAST_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(range: std::ops::RangeInclusive<u64>) -> Vec<Duration> {
        range.map(Duration::from_micros).collect()
    }

    #[test]
    fn an_interval_is_around_the_quotient_and_as_wide_as_the_samples_differ() {
        let wide = medians(&us(1..=199), &us(100..=300));
        assert!(wide.low < 0.5 && 0.5 == wide.ratio && 0.5 < wide.high, "{wide:?}");
        let narrow = medians(&us(90..=110), &us(200..=200));
        assert!(narrow.high - narrow.low < wide.high - wide.low, "{narrow:?} {wide:?}");
        assert_eq!(medians(&us(5..=5), &us(10..=10)), Interval { ratio: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(medians(&us(1..=199), &us(100..=300)), wide, "the same samples, the same interval");
    }

    #[test]
    fn what_is_added_is_compared_without_what_was_there() {
        let with = |us: u64| vec![Duration::from_micros(us)];
        assert_eq!(added(&(with(150), with(100)), &(with(300), with(200))).ratio, 0.5);
        assert_eq!(added(&(with(150), with(100)), &(with(200), with(200))).ratio, 50.0, "it is much beside nothing");
        assert_eq!(added(&(with(150), with(100)), &(with(150), with(200))).ratio, 50.0, "or beside less");
        assert_eq!(medians(&[], &with(1)).ratio, 0.0);
        assert!(medians(&with(1), &[]).ratio.is_finite());
    }
}
