//! Rate limits by token buckets. Pure: whoever calls says what time it is.

use api_spec::devices::{RateLimiter, TokenBucket};
use std::time::{Duration, Instant};

/// Bounds of a device's traffic in bytes and in operations.
#[derive(Debug, Default)]
pub struct Rate {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

impl Rate {
    /// What is configured; without a configuration, no bound.
    pub fn new(config: Option<&RateLimiter>, now: Instant) -> Self {
        let RateLimiter { bandwidth, ops } = config.copied().unwrap_or_default();
        let bucket = |config: Option<TokenBucket>| config.filter(TokenBucket::is_bound).map(|b| Bucket::new(b, now));
        Rate { bytes: bucket(bandwidth), ops: bucket(ops) }
    }

    /// Takes over what is configured now, with full buckets where that is something else.
    pub fn change(&mut self, config: Option<&RateLimiter>, now: Instant) {
        let Rate { bytes, ops } = Rate::new(config, now);
        for (old, new) in [(&mut self.bytes, bytes), (&mut self.ops, ops)] {
            if old.as_ref().map(|bucket| bucket.config) != new.as_ref().map(|bucket| bucket.config) {
                *old = new;
            }
        }
    }

    /// Takes one operation of `bytes` bytes, or takes nothing and says how long to wait before asking again.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let wait = |bucket: &mut Option<Bucket>, n| bucket.as_mut().map_or(Duration::ZERO, |b| b.wait(n, now));
        let wait = wait(&mut self.bytes, bytes).max(wait(&mut self.ops, 1));
        if wait > Duration::ZERO {
            return Err(wait);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
        Ok(())
    }
}

/// A token bucket. It counts in parts of a token, one for each nanosecond of its refill time, so that nothing is lost to
/// rounding: `size` tokens come in `refill` nanoseconds, which is `size` parts a nanosecond when a token has `refill` parts.
#[derive(Debug)]
struct Bucket {
    config: TokenBucket,
    /// Parts that come in a nanosecond.
    size: u128,
    /// Parts of a token.
    refill: u128,
    /// Parts that are there now.
    parts: u128,
    /// Tokens that come on top, once.
    burst: u64,
    filled: Instant,
}

impl Bucket {
    fn new(config: TokenBucket, now: Instant) -> Self {
        let TokenBucket { size, one_time_burst, refill_time } = config;
        // Both fit into 64 bits, so that no product of two of them overflows.
        let (size, refill) = (u128::from(size.max(1)), u128::from(refill_time.max(1).saturating_mul(1_000_000)));
        Bucket { config, size, refill, parts: size * refill, burst: one_time_burst.unwrap_or(0), filled: now }
    }

    /// How long until `tokens` can be taken. More than the bucket holds can be taken when it is full, or nothing so large
    /// would ever pass.
    fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        let full = self.size * self.refill;
        let came = now.saturating_duration_since(self.filled).as_nanos().saturating_mul(self.size);
        self.parts = self.parts.saturating_add(came).min(full);
        self.filled = now;
        let needed = (u128::from(tokens.saturating_sub(self.burst)) * self.refill).min(full);
        let missing = needed.saturating_sub(self.parts);
        Duration::from_nanos(missing.div_ceil(self.size).try_into().unwrap_or(u64::MAX))
    }

    /// Takes tokens that [`Bucket::wait`] has found to be there.
    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.parts = self.parts.saturating_sub(u128::from(tokens - from_burst) * self.refill);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(size: u64, one_time_burst: Option<u64>, refill_time: u64) -> RateLimiter {
        RateLimiter { bandwidth: Some(TokenBucket { size, one_time_burst, refill_time }), ops: None }
    }

    #[test]
    fn without_a_configuration_everything_passes() {
        let now = Instant::now();
        assert_eq!(Rate::new(None, now).take(u64::MAX, now), Ok(()));
    }

    #[test]
    fn a_bucket_that_stays_the_same_is_not_filled_again() {
        let now = Instant::now();
        let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1_000_000 });
        let mut rate = Rate::new(Some(&RateLimiter { bandwidth: bucket(10), ops: bucket(5) }), now);
        rate.take(10, now).unwrap();
        rate.change(Some(&RateLimiter { bandwidth: bucket(10), ops: bucket(7) }), now);
        assert!(rate.take(10, now).is_err(), "it is empty still");
        rate.change(Some(&RateLimiter { bandwidth: bucket(20), ops: bucket(7) }), now);
        assert_eq!(rate.take(10, now), Ok(()));
        rate.change(None, now);
        assert_eq!(rate.take(u64::MAX, now), Ok(()));
    }

    #[test]
    fn a_refusal_says_when_it_will_pass() {
        let start = Instant::now();
        let mut rate = Rate::new(Some(&bytes(1000, None, 100)), start);
        rate.take(900, start).unwrap();
        assert_eq!(rate.take(600, start), Err(Duration::from_millis(50)));
        rate.take(600, start + Duration::from_millis(50)).unwrap();
    }

    #[test]
    fn no_configuration_is_too_large() {
        let start = Instant::now();
        for (size, refill) in [(u64::MAX, u64::MAX), (1, u64::MAX), (u64::MAX, 1)] {
            let mut rate = Rate::new(Some(&bytes(size, Some(u64::MAX), refill)), start);
            for after in [0, 1, u64::MAX] {
                let _ = rate.take(u64::MAX, start + Duration::from_nanos(after));
            }
        }
    }

    #[test]
    fn the_burst_comes_once_and_first() {
        let start = Instant::now();
        let mut rate = Rate::new(Some(&bytes(10, Some(100), 1000)), start);
        rate.take(110, start).unwrap();
        let later = start + Duration::from_secs(100);
        rate.take(10, later).unwrap();
        assert!(rate.take(1, later).is_err());
    }

    #[test]
    fn both_bounds_hold_and_a_refusal_takes_from_neither() {
        let start = Instant::now();
        let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1000 });
        let mut rate = Rate::new(Some(&RateLimiter { bandwidth: bucket(100), ops: bucket(2) }), start);
        rate.take(60, start).unwrap();
        assert!(rate.take(60, start).is_err(), "bytes");
        rate.take(40, start).unwrap();
        assert!(rate.take(0, start).is_err(), "operations");
    }

    proptest! {
        /// Over any stretch, no more passes than the bucket held at its beginning and what came in, but for one operation
        /// that is larger than the bucket.
        #[test]
        fn no_more_passes_than_came_in(
            size in 1u64..10_000, refill_ms in 1u64..5_000,
            asks in prop::collection::vec((0u64..12_000, 0u64..1_000_000_000), 1..100),
        ) {
            let start = Instant::now();
            let mut rate = Rate::new(Some(&bytes(size, None, refill_ms)), start);
            let (mut now, mut passed) = (start, 0u128);
            for (tokens, nanos) in asks {
                now += Duration::from_nanos(nanos);
                match rate.take(tokens, now) {
                    Ok(()) => passed += u128::from(tokens.min(size)),
                    Err(wait) => {
                        prop_assert!(wait > Duration::ZERO);
                        prop_assert!(rate.take(tokens, now + wait).is_ok(), "it passes when it was said to");
                        now += wait;
                        passed += u128::from(tokens.min(size));
                    }
                }
                let came = (now - start).as_nanos() * u128::from(size) / (u128::from(refill_ms) * 1_000_000);
                prop_assert!(passed <= u128::from(size) + came + 1);
            }
        }
    }
}
