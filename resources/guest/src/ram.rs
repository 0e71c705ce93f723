//! Which RAM is nobody's: the work pages, from the first 2 MiB boundary after the guest's image.
//!
//! Both boot protocols hand over a list of ranges in the same terms (address, length, type 1 for RAM).

const TYPE_RAM: u32 = 1;
const PAGE: u64 = 4096;
const ALIGN: u64 = 2 << 20;
/// Nothing above is used: devices live in the last GiB of the 4 GiB that the guest maps.
const LIMIT: u64 = 3 << 30;

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
    /// How many.
    pub count: u32,
}

/// Finds the work pages after an image that ends at `image_end`, in the RAM range that holds the image's end.
/// Ranges that follow each other without a gap count as one, if they come in order.
pub fn work_pages(map: impl Iterator<Item = Range>, image_end: u64) -> WorkPages {
    let base = image_end.next_multiple_of(ALIGN);
    let mut end = image_end;
    for range in map.filter(|range| range.kind == TYPE_RAM) {
        if range.start <= end {
            end = end.max(range.start.saturating_add(range.len));
        }
    }
    let bytes = end.min(LIMIT).saturating_sub(base);
    WorkPages { base, count: (bytes / PAGE) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(map: &[(u64, u64, u32)], image_end: u64) -> WorkPages {
        work_pages(map.iter().map(|&(start, len, kind)| Range { start, len, kind }), image_end)
    }

    #[test]
    fn work_pages_are_the_ram_behind_the_image() {
        let low = (0, 0x9_f000, 1);
        let work = pages(&[low, (0x10_0000, 127 << 20, 1)], 0x12_3456);
        assert_eq!(work, WorkPages { base: 2 << 20, count: 126 * 256 });
        let two = pages(&[low, (0x10_0000, 15 << 20, 1), (16 << 20, 16 << 20, 1)], 0x12_3456);
        assert_eq!(two.count, 30 * 256, "ranges that touch are one");
        let gap = pages(&[low, (0x10_0000, 15 << 20, 1), (32 << 20, 16 << 20, 1)], 0x12_3456);
        assert_eq!(gap.count, 14 * 256);
        let reserved = pages(&[low, (0x10_0000, 15 << 20, 1), (16 << 20, 16 << 20, 2)], 0x12_3456);
        assert_eq!(reserved.count, 14 * 256);
    }

    #[test]
    fn odd_maps_are_survived() {
        assert_eq!(pages(&[], 0x12_3456).count, 0);
        assert_eq!(pages(&[(0x10_0000, 0x8_0000, 1)], 0x12_3456).count, 0, "RAM ends before the first boundary");
        assert_eq!(pages(&[(0, u64::MAX, 1)], 0x12_3456).count, ((LIMIT - ALIGN) / PAGE) as u32);
        assert_eq!(pages(&[(0, (2 << 20) + 0x1fff, 1)], 0x12_3456).count, 1, "half a page is no page");
    }
}
