//! How a guest gives its free memory back before a snapshot: how far its balloon grows, and when that is over. Pure.
//!
//! ```text
//!   Growing -- it is as large as was asked for, or grows no more --> Shrinking -- as small as it shall be, or no more --> over
//! ```
//!
//! What went through the balloon is a hole for the host, and stays one when it is free memory of the guest again. So a clone
//! has all its memory from the start, and no balloon to empty, for which it would have to write to memory of its own.
//!
//! Every number of the guest is its own word. Whatever it says, this is over in time, and all that it gets is a snapshot that
//! is larger than it need be.

use std::time::{Duration, Instant};

/// How long a balloon may stand still before nothing more is expected of it.
pub const STANDSTILL: Duration = Duration::from_secs(2);
/// How long it may take to grow, and again to shrink.
pub const LONGEST: Duration = Duration::from_secs(30);
/// The least and the most free memory, in MiB, that a guest keeps, and the part of its memory that it keeps in between.
const KEPT_MIB: (u64, u64) = (16, 64);
const KEPT_PART: u64 = 32;
/// Pages in a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / crate::memory::PAGE_SIZE;

/// Why less was given back than could be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortfall {
    /// The agent.
    #[error("the guest let go of nothing: {0}")]
    Agent(String),
    /// There is nothing to give.
    #[error("the guest says that {free_mib} MiB of its memory are free, and it keeps {kept_mib}")]
    NoneFree {
        /// What is free.
        free_mib: u64,
        /// What it keeps of that.
        kept_mib: u64,
    },
    /// The balloon did not grow as far as it should.
    #[error(
        "the guest put {actual_mib} MiB into its balloon, of {target_mib}; does it have a driver for it (virtio_balloon)?"
    )]
    Short {
        /// How large it became.
        actual_mib: u64,
        /// How large it should have.
        target_mib: u64,
    },
    /// The balloon did not shrink as far as it should.
    #[error(
        "the guest has not emptied its balloon again, which holds {actual_mib} MiB, of {target_mib}: its clones have to"
    )]
    Kept {
        /// How large it still is.
        actual_mib: u64,
        /// How large it should be.
        target_mib: u64,
    },
    /// The VM was paused.
    #[error("the VM was paused meanwhile, and its balloon held {actual_mib} MiB")]
    Paused {
        /// How large it was.
        actual_mib: u64,
    },
    /// Somebody has resized the balloon.
    #[error("the balloon was resized meanwhile")]
    Resized,
}

/// What is seen of a balloon at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When.
    pub at: Instant,
    /// How many pages the guest says are in it.
    pub actual_pages: u64,
    /// How large it shall be when all is over, in MiB.
    pub home_mib: u64,
    /// Whether the guest runs.
    pub is_running: bool,
}

impl Seen {
    fn actual_mib(&self) -> u64 {
        self.actual_pages / PAGES_PER_MIB
    }
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Look again in a moment.
    Wait,
    /// Ask the guest for a balloon of so many MiB, and look again in a moment.
    Resize(u64),
    /// Nothing: it is over. The balloon was asked to be as large as it shall be.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Growing { target_mib: u64 },
    Shrinking,
}

/// A guest that gives its free memory back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trim {
    stage: Stage,
    /// When that began.
    began: Instant,
    /// How large the balloon was when it last changed, and when that was seen.
    last: (u64, Instant),
    shortfall: Option<Shortfall>,
}

/// How much free memory a guest keeps, in MiB, so that it gets along while the balloon is large.
fn kept_mib(memory_mib: u64) -> u64 {
    (memory_mib / KEPT_PART).clamp(KEPT_MIB.0, KEPT_MIB.1)
}

impl Trim {
    /// Begins: the guest has so much memory, and says that so much of it is free. The result is also how large its balloon is
    /// to be first, in MiB.
    pub fn begin(memory_mib: u64, free_mib: u64, seen: Seen) -> Result<(Self, u64), Shortfall> {
        let kept_mib = kept_mib(memory_mib);
        let most_mib = memory_mib.saturating_sub(kept_mib);
        let target_mib = seen.actual_mib().saturating_add(free_mib.saturating_sub(kept_mib)).min(most_mib);
        if target_mib <= seen.actual_mib().max(seen.home_mib) {
            return Err(Shortfall::NoneFree { free_mib, kept_mib });
        }
        let last = (seen.actual_pages, seen.at);
        Ok((Trim { stage: Stage::Growing { target_mib }, began: seen.at, last, shortfall: None }, target_mib))
    }

    /// What is to be done, by what is seen now.
    pub fn next(&mut self, seen: Seen) -> Step {
        let actual_mib = seen.actual_mib();
        if seen.actual_pages != self.last.0 {
            self.last = (seen.actual_pages, seen.at);
        }
        let since = |then: Instant| seen.at.saturating_duration_since(then);
        let is_late = since(self.last.1) >= STANDSTILL || since(self.began) >= LONGEST;
        match self.stage {
            Stage::Growing { target_mib } if actual_mib >= target_mib => self.shrink(seen, None),
            Stage::Growing { .. } if !seen.is_running => self.shrink(seen, Some(Shortfall::Paused { actual_mib })),
            Stage::Growing { target_mib } if is_late => {
                self.shrink(seen, Some(Shortfall::Short { actual_mib, target_mib }))
            }
            Stage::Shrinking if seen.actual_pages <= seen.home_mib.saturating_mul(PAGES_PER_MIB) => Step::Over,
            Stage::Shrinking if !seen.is_running => self.give_up(Shortfall::Paused { actual_mib }),
            Stage::Shrinking if is_late => self.give_up(Shortfall::Kept { actual_mib, target_mib: seen.home_mib }),
            Stage::Growing { .. } | Stage::Shrinking => Step::Wait,
        }
    }

    /// The balloon was asked for another size meanwhile, which counts from now on.
    pub fn was_resized(&mut self, seen: Seen) {
        if self.stage != Stage::Shrinking {
            self.shrink(seen, Some(Shortfall::Resized));
        }
    }

    /// Why less was given back than could be.
    pub fn into_shortfall(self) -> Option<Shortfall> {
        self.shortfall
    }

    fn shrink(&mut self, seen: Seen, shortfall: Option<Shortfall>) -> Step {
        let last = (seen.actual_pages, seen.at);
        *self = Trim { stage: Stage::Shrinking, began: seen.at, last, shortfall };
        Step::Resize(seen.home_mib)
    }

    /// What is in the balloon now stays there: that matters more than that it may not have grown as far as it should.
    fn give_up(&mut self, shortfall: Shortfall) -> Step {
        self.shortfall = Some(shortfall);
        Step::Over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMORY_MIB: u64 = 512;

    fn seen(start: Instant, ms: u64, actual_mib: u64) -> Seen {
        let at = start + Duration::from_millis(ms);
        Seen { at, actual_pages: actual_mib * PAGES_PER_MIB, home_mib: 0, is_running: true }
    }

    fn begun(start: Instant) -> Trim {
        let (trim, target) = Trim::begin(MEMORY_MIB, 300, seen(start, 0, 0)).unwrap();
        assert_eq!(target, 284, "a guest of 512 MiB keeps 16");
        trim
    }

    #[test]
    fn a_guest_that_follows_is_through_in_two_steps() {
        let start = Instant::now();
        let mut trim = begun(start);
        assert_eq!(trim.next(seen(start, 10, 100)), Step::Wait);
        assert_eq!(trim.next(seen(start, 20, 284)), Step::Resize(0));
        assert_eq!(trim.next(seen(start, 30, 100)), Step::Wait);
        assert_eq!(trim.next(seen(start, 40, 0)), Step::Over);
        assert_eq!(trim.into_shortfall(), None);
    }

    #[test]
    fn a_guest_that_does_nothing_is_waited_for_no_longer_than_a_standstill() {
        let start = Instant::now();
        let mut trim = begun(start);
        assert_eq!(trim.next(seen(start, 1999, 0)), Step::Wait);
        assert_eq!(trim.next(seen(start, 2000, 0)), Step::Resize(0));
        assert_eq!(trim.next(seen(start, 2001, 0)), Step::Over);
        assert_eq!(trim.into_shortfall(), Some(Shortfall::Short { actual_mib: 0, target_mib: 284 }));
    }

    #[test]
    fn a_guest_that_keeps_its_balloon_is_told_of() {
        let start = Instant::now();
        let mut trim = begun(start);
        assert_eq!(trim.next(seen(start, 10, 284)), Step::Resize(0));
        assert_eq!(trim.next(seen(start, 2009, 284)), Step::Wait);
        assert_eq!(trim.next(seen(start, 2010, 284)), Step::Over);
        assert_eq!(trim.into_shortfall(), Some(Shortfall::Kept { actual_mib: 284, target_mib: 0 }));
    }

    #[test]
    fn a_pause_and_another_size_end_it() {
        let start = Instant::now();
        let mut paused = begun(start);
        let stands = Seen { is_running: false, ..seen(start, 10, 50) };
        assert_eq!([paused.next(stands), paused.next(stands)], [Step::Resize(0), Step::Over]);
        assert_eq!(paused.into_shortfall(), Some(Shortfall::Paused { actual_mib: 50 }));
        let mut resized = begun(start);
        let sized = Seen { home_mib: 60, ..seen(start, 10, 50) };
        resized.was_resized(sized);
        assert_eq!(resized.next(sized), Step::Over);
        assert_eq!(resized.into_shortfall(), Some(Shortfall::Resized));
    }

    #[test]
    fn a_guest_without_free_memory_is_left_alone() {
        let none = |memory_mib, free_mib| Trim::begin(memory_mib, free_mib, seen(Instant::now(), 0, 0)).unwrap_err();
        assert_eq!(none(MEMORY_MIB, 16), Shortfall::NoneFree { free_mib: 16, kept_mib: 16 });
        assert_eq!(none(8, u64::MAX), Shortfall::NoneFree { free_mib: u64::MAX, kept_mib: 16 });
        let full = Seen { home_mib: 400, ..seen(Instant::now(), 0, 100) };
        assert!(Trim::begin(MEMORY_MIB, 200, full).is_err(), "it is on its way to more already");
    }

    #[test]
    fn large_guests_keep_more() {
        assert_eq!([32, 512, 1024, 2048, 1 << 20].map(kept_mib), [16, 16, 32, 64, 64]);
    }

    fn looks() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
        prop::collection::vec(
            (1u64..3000, prop_oneof![0u64..200_000, any::<u64>()], prop::bool::weighted(0.95)),
            0..200,
        )
    }

    proptest! {
        /// Whatever a guest says, it is over in time, its balloon is never asked for more than leaves it something, and was asked
        /// for its own size at last.
        #[test]
        fn it_is_over_in_time(memory_mib in 1u64..100_000, free_mib: u64, home in 0u64..1000, looks in looks()) {
            let start = Instant::now();
            let mut at = start;
            let look = |at, actual_pages, is_running| Seen { at, actual_pages, home_mib: home, is_running };
            let Ok((mut trim, first)) = Trim::begin(memory_mib, free_mib, look(start, 0, true)) else { return Ok(()) };
            prop_assert!(first > home && first + KEPT_MIB.0 <= memory_mib);
            let mut asked = first;
            // Once its numbers have come to an end the guest stands at the last of them.
            let last = looks.last().map_or(0, |look| look.1);
            let rest = std::iter::repeat_n((1000, last, true), 100);
            let mut longest_gap = Duration::ZERO;
            for (ms, pages, is_running) in looks.into_iter().chain(rest) {
                let gap = Duration::from_millis(ms);
                (at, longest_gap) = (at + gap, longest_gap.max(gap));
                match trim.next(look(at, pages, is_running)) {
                    Step::Wait => {}
                    Step::Resize(mib) => asked = mib,
                    Step::Over => {
                        prop_assert_eq!(asked, home);
                        prop_assert!(at - start <= 2 * (LONGEST + longest_gap));
                        return Ok(());
                    }
                }
            }
            prop_assert!(false, "it is never over");
        }
    }
}
