//! Which RAM is nobody's: the work pages, from the first 2 MiB boundary after the guest's image. Where RAM reaches the hole for
//! devices below 4 GiB they go on above it, and what is left of the image's last 2 MiB holds the tables that map it.
//!
//! Both boot protocols hand over a list of ranges in the same terms (address, length, type 1 for RAM).

const TYPE_RAM: u32 = 1;
const PAGE: u64 = 4096;
const ALIGN: u64 = 2 << 20;
/// Nothing from here to [`HIGH`] is used: devices live there.
const LIMIT: u64 = 3 << 30;
/// Where RAM goes on. The stub maps all that is below.
pub const HIGH: u64 = 4 << 30;
/// What one page directory maps.
pub const DIRECTORY_SPAN: u64 = 1 << 30;
/// Page directories above [`HIGH`] for which there are entries in the one table that refers to them.
const MAX_DIRECTORIES: u64 = 512 - HIGH / DIRECTORY_SPAN;

/// An entry of the loader's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// 1 for RAM.
    pub kind: u32,
}

/// The work pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkPages {
    /// Address of the first.
    pub base: u64,
    /// How many lie below the hole.
    pub low: u32,
    /// How many lie above it.
    pub high: u32,
    /// Where page directories for those above may lie: free pages, enough of them.
    pub directories: u64,
}

impl WorkPages {
    /// How many there are.
    pub fn count(&self) -> u32 {
        self.low + self.high
    }

    /// Address of the page `number`.
    pub fn address(&self, number: u32) -> u64 {
        match number.checked_sub(self.low) {
            None => self.base + PAGE * u64::from(number),
            Some(above) => HIGH + PAGE * u64::from(above),
        }
    }

    /// Page directories that it takes to map those above the hole.
    pub fn directory_count(&self) -> u64 {
        (PAGE * u64::from(self.high)).div_ceil(DIRECTORY_SPAN)
    }
}

/// Finds the work pages after an image that ends at `image_end`, in the RAM range that holds the image's end, and, if that
/// reaches the hole, in the one that begins behind it. Ranges that follow each other without a gap count as one, if they
/// come in order.
pub fn work_pages(map: impl Iterator<Item = Range>, image_end: u64) -> WorkPages {
    let base = image_end.next_multiple_of(ALIGN);
    let (mut end, mut high_end) = (image_end, HIGH);
    for range in map.filter(|range| range.kind == TYPE_RAM) {
        for end in [&mut end, &mut high_end] {
            if range.start <= *end {
                *end = (*end).max(range.start.saturating_add(range.len));
            }
        }
    }
    let low = (end.min(LIMIT).saturating_sub(base) / PAGE) as u32;
    let directories = image_end.next_multiple_of(PAGE);
    let room = ((base - directories) / PAGE).min(MAX_DIRECTORIES) * DIRECTORY_SPAN;
    // Only behind the hole, so that work pages and RAM without its hole are in the same order.
    let high = if end >= LIMIT { ((high_end - HIGH).min(room) / PAGE) as u32 } else { 0 };
    WorkPages { base, low, high, directories }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn pages(map: &[(u64, u64, u32)], image_end: u64) -> WorkPages {
        work_pages(map.iter().map(|&(start, len, kind)| Range { start, len, kind }), image_end)
    }

    #[test]
    fn work_pages_are_the_ram_behind_the_image() {
        let low = (0, 0x9_f000, 1);
        let work = pages(&[low, (0x10_0000, 127 << 20, 1)], 0x12_3456);
        assert_eq!(work, WorkPages { base: 2 << 20, low: 126 * 256, high: 0, directories: 0x12_4000 });
        let two = pages(&[low, (0x10_0000, 15 << 20, 1), (16 << 20, 16 << 20, 1)], 0x12_3456);
        assert_eq!(two.count(), 30 * 256, "ranges that touch are one");
        let gap = pages(&[low, (0x10_0000, 15 << 20, 1), (32 << 20, 16 << 20, 1)], 0x12_3456);
        assert_eq!(gap.count(), 14 * 256);
        let reserved = pages(&[low, (0x10_0000, 15 << 20, 1), (16 << 20, 16 << 20, 2)], 0x12_3456);
        assert_eq!(reserved.count(), 14 * 256);
    }

    #[test]
    fn work_pages_go_on_above_the_hole() {
        let (below, above) = ((0x10_0000, 3 * GIB - 0x10_0000, 1), (HIGH, 2 * GIB + 0x1000, 1));
        let work = pages(&[(0, 0x9_f000, 1), below, above], 0x12_3456);
        let low = (3 * GIB - (2 << 20)) / PAGE;
        assert_eq!((u64::from(work.low), u64::from(work.high)), (low, 2 * GIB / PAGE + 1));
        assert_eq!(work.directory_count(), 3);
        let last_below = work.low - 1;
        assert_eq!((work.address(last_below), work.address(last_below + 1)), (LIMIT - PAGE, HIGH));
        assert_eq!(work.address(work.count() - 1), HIGH + 2 * GIB);
        let room = pages(&[below, (HIGH, 8 * GIB, 1)], (2 << 20) - 0x1fff);
        assert_eq!(u64::from(room.high), GIB / PAGE, "as far as there is room for tables");
        let none = pages(&[below, (HIGH, 8 * GIB, 1)], 2 << 20);
        assert_eq!(none.high, 0);
        let short = pages(&[(0x10_0000, GIB, 1), above], 0x12_3456);
        assert_eq!(short.high, 0, "RAM does not reach the hole");
    }

    #[test]
    fn odd_maps_are_survived() {
        assert_eq!(pages(&[], 0x12_3456).count(), 0);
        assert_eq!(pages(&[(0x10_0000, 0x8_0000, 1)], 0x12_3456).count(), 0, "RAM ends before the first boundary");
        let all = pages(&[(0, u64::MAX, 1)], 0x12_3456);
        assert_eq!(u64::from(all.low), (LIMIT - ALIGN) / PAGE);
        assert!(all.directory_count() <= MAX_DIRECTORIES);
        assert!(all.directories + all.directory_count() * PAGE <= all.base);
        assert_eq!(pages(&[(0, (2 << 20) + 0x1fff, 1)], 0x12_3456).count(), 1, "half a page is no page");
    }
}
