//! Which pages a buffer names, as runs. Pure.

use crate::memory::PAGE_SIZE;
use std::ops::Range;

/// The runs that page frame numbers make, in ascending order, apart from each other. A guest names pages in any order, and
/// may name one twice.
pub fn runs(mut numbers: Vec<u32>) -> Vec<Range<u64>> {
    numbers.sort_unstable();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in numbers.into_iter().map(u64::from) {
        match runs.last_mut() {
            Some(run) if number <= run.end => run.end = run.end.max(number + 1),
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

/// The page frame numbers in a buffer: 32 bits each, little-endian. What is left over is ignored.
pub fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).collect()
}

/// The whole pages that lie within `len` bytes at a guest-physical address.
pub fn within(addr: u64, len: u32) -> Range<u64> {
    let end = addr.saturating_add(len.into()) / PAGE_SIZE;
    addr.div_ceil(PAGE_SIZE)..end.max(addr.div_ceil(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_largest_number_is_a_page_too() {
        assert_eq!(runs(vec![u32::MAX, u32::MAX - 1, 7]), [7..8, 0xffff_fffe..0x1_0000_0000]);
        assert_eq!(runs(vec![]), []);
        assert_eq!(numbers(&[1, 0, 0, 0, 0, 1, 0, 0, 9]), [1, 256]);
    }

    proptest! {
        #[test]
        fn runs_hold_what_was_named_and_nothing_else(numbers in prop::collection::vec(0u32..60, 0..40)) {
            let runs = runs(numbers.clone());
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", runs);
            let named: BTreeSet<u64> = numbers.into_iter().map(u64::from).collect();
            prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), named.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn only_whole_pages_lie_within(addr in prop_oneof![0u64..20_000, any::<u64>()], len in prop_oneof![0u32..20_000, any::<u32>()]) {
            let pages = within(addr, len);
            prop_assert!(pages.start <= pages.end);
            if !pages.is_empty() {
                prop_assert!(pages.start * PAGE_SIZE >= addr && pages.end * PAGE_SIZE <= addr.saturating_add(len.into()));
            }
            // No more than a part of a page is left out at either end.
            prop_assert!((pages.end - pages.start + 2) * PAGE_SIZE > u64::from(len) || addr.checked_add(len.into()).is_none());
        }
    }
}
