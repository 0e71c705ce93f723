//! What the guest says of its memory (virtio 1.2, section 5.5.6.3). Pure.

use api_spec::devices::BalloonStatistics;

/// Length of an entry: a tag of 16 bits, a value of 64, little-endian and packed.
const ENTRY_BYTES: usize = 10;
/// How many tags there are.
const TAGS: usize = 10;
/// Most bytes of a buffer that are looked at. A guest has an entry for each tag.
pub const MAX_BYTES: u64 = 64 * ENTRY_BYTES as u64;

/// The statistics that a guest has sent last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; TAGS]);

impl Statistics {
    /// Takes in a buffer. Tags that are unknown are ignored, as is what is left over.
    pub fn parse(bytes: &[u8]) -> Self {
        bytes.as_chunks::<ENTRY_BYTES>().0.iter().map(entry).collect()
    }

    /// The entries, each with its tag.
    pub fn entries(&self) -> impl Iterator<Item = (u16, u64)> + '_ {
        (0u16..).zip(self.0).filter_map(|(tag, value)| Some((tag, value?)))
    }

    /// Puts them into the document that shows them.
    pub fn show(&self, document: BalloonStatistics) -> BalloonStatistics {
        let Statistics(
            [
                swap_in,
                swap_out,
                major_faults,
                minor_faults,
                free_memory,
                total_memory,
                available_memory,
                disk_caches,
                hugetlb_allocations,
                hugetlb_failures,
            ],
        ) = *self;
        BalloonStatistics {
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            ..document
        }
    }
}

impl FromIterator<(u16, u64)> for Statistics {
    fn from_iter<I: IntoIterator<Item = (u16, u64)>>(entries: I) -> Self {
        let mut statistics = Statistics::default();
        for (tag, value) in entries {
            if let Some(known) = statistics.0.get_mut(usize::from(tag)) {
                *known = Some(value);
            }
        }
        statistics
    }
}

fn entry(bytes: &[u8; ENTRY_BYTES]) -> (u16, u64) {
    let [t0, t1, value @ ..] = *bytes;
    (u16::from_le_bytes([t0, t1]), u64::from_le_bytes(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_have_their_names() {
        let bytes: Vec<u8> = (0u16..12)
            .flat_map(|tag| [tag.to_le_bytes().to_vec(), (u64::from(tag) + 100).to_le_bytes().to_vec()].concat())
            .collect();
        let shown = Statistics::parse(&bytes).show(BalloonStatistics { target_pages: 5, ..Default::default() });
        assert_eq!((shown.target_pages, shown.swap_in, shown.free_memory), (5, Some(100), Some(104)));
        assert_eq!((shown.total_memory, shown.hugetlb_failures), (Some(105), Some(109)));
        let partial = Statistics::parse(&bytes[..15]);
        assert_eq!(partial.entries().collect::<Vec<_>>(), [(0, 100)]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_and_entries_survive(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let statistics = Statistics::parse(&bytes);
            prop_assert_eq!(statistics.entries().collect::<Statistics>(), statistics);
        }
    }
}
