//! Where a fault is: arithmetic over addresses, offsets, pages and chunks. No I/O.
//!
//! A client's memory is a list of regions; each maps a range of addresses to a range of the image. The store is filled
//! in chunks of 64 KiB, which need not lie whole in one region: what is woken is the part that does.

use api_spec::handshake::Region;
use std::ops::Range;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a chunk: what is read, checked and filled at once.
pub const CHUNK_SIZE: u64 = 64 * 1024;
/// Pages in a chunk.
pub const CHUNK_PAGES: u64 = CHUNK_SIZE / PAGE_SIZE;

/// Why a list of regions is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// No region at all.
    #[error("no regions: name the ranges that are registered with the userfaultfd")]
    None,
    /// A page size that this server does not serve.
    #[error("region {0}: page size {1} is not offered, only 4096")]
    PageSize(usize, u64),
    /// A base, size or offset that is not a multiple of the page size, or an empty region.
    #[error("region {0}: base, size and offset must be multiples of 4096, base and size not zero")]
    Unaligned(usize),
    /// A range that runs over the end of the address space.
    #[error("region {0}: ends beyond the address space")]
    Overflow(usize),
    /// Two regions at one address.
    #[error("regions overlap at address {0:#x}")]
    Overlap(u64),
    /// A part of the image in no region, in two, or beyond its end.
    #[error("regions must cover the image's {size} bytes exactly once; they do not at offset {at}")]
    Coverage {
        /// Size of the image.
        size: u64,
        /// First offset that is covered twice or not at all.
        at: u64,
    },
}

/// What a faulting address asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// Page of the image.
    pub page: u64,
    /// Chunk of the image that the page is in.
    pub chunk: u64,
    /// Addresses in the client that this chunk backs, as far as they are in the page's region: what is woken.
    pub wake: Range<u64>,
}

/// Regions of one client that were found right: aligned, apart from each other, covering the image exactly once.
#[derive(Debug)]
pub struct Regions(Vec<Region>);

impl Regions {
    /// Checks a client's list against the size of its image.
    pub fn check(mut regions: Vec<Region>, image_size: u64) -> Result<Self, RegionError> {
        if regions.is_empty() {
            return Err(RegionError::None);
        }
        for (index, region) in regions.iter().enumerate() {
            check_one(index, region)?;
        }
        check_coverage(&mut regions, image_size)?;
        check_overlap(&mut regions)?;
        Ok(Self(regions))
    }

    /// Translates a faulting address; `None` if it is in no region.
    pub fn locate(&self, address: u64) -> Option<Fault> {
        let above = self.0.partition_point(|region| region.base_host_virt_addr <= address);
        let region = self.0.get(above.checked_sub(1)?)?;
        let within = address - region.base_host_virt_addr;
        if within >= region.size {
            return None;
        }
        let offset = region.offset + within;
        let chunk = offset / CHUNK_SIZE;
        let first = (chunk * CHUNK_SIZE).max(region.offset);
        let end = ((chunk + 1) * CHUNK_SIZE).min(region.offset + region.size);
        let address_of = |offset: u64| region.base_host_virt_addr + (offset - region.offset);
        Some(Fault { page: offset / PAGE_SIZE, chunk, wake: address_of(first)..address_of(end) })
    }

    /// Where a page of the image is in the client; `None` if the image has no such page.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let offset = page.checked_mul(PAGE_SIZE)?;
        let region = self.0.iter().find(|region| (region.offset..region.offset + region.size).contains(&offset))?;
        Some(region.base_host_virt_addr + (offset - region.offset))
    }

    /// The whole pages of the image that a range of addresses maps.
    pub fn pages_within(&self, addresses: Range<u64>) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        for region in &self.0 {
            let (base, last) = (region.base_host_virt_addr, region.base_host_virt_addr + region.size);
            let (start, end) = (addresses.start.max(base), addresses.end.min(last));
            if start >= end {
                continue;
            }
            let page = |address: u64| (region.offset + (address - base)) / PAGE_SIZE;
            let pages = page(start.next_multiple_of(PAGE_SIZE))..page(end);
            if !pages.is_empty() {
                found.push(pages);
            }
        }
        found
    }
}

fn check_one(index: usize, region: &Region) -> Result<(), RegionError> {
    let Region { base_host_virt_addr: base, size, offset, page_size } = *region;
    if page_size != PAGE_SIZE {
        return Err(RegionError::PageSize(index, page_size));
    }
    if [base, size, offset].iter().any(|n| !n.is_multiple_of(PAGE_SIZE)) || base == 0 || size == 0 {
        return Err(RegionError::Unaligned(index));
    }
    if base.checked_add(size).is_none() || offset.checked_add(size).is_none() {
        return Err(RegionError::Overflow(index));
    }
    Ok(())
}

/// In order of offset, each region must begin where the one before it ended, from 0 to the image's end.
fn check_coverage(regions: &mut [Region], size: u64) -> Result<(), RegionError> {
    regions.sort_unstable_by_key(|region| region.offset);
    let mut covered = 0;
    for region in regions.iter() {
        let end = region.offset + region.size;
        if region.offset != covered || end > size {
            return Err(RegionError::Coverage { size, at: covered.min(region.offset).min(size) });
        }
        covered = end;
    }
    if covered == size { Ok(()) } else { Err(RegionError::Coverage { size, at: covered }) }
}

/// Leaves the regions in order of address.
fn check_overlap(regions: &mut [Region]) -> Result<(), RegionError> {
    regions.sort_unstable_by_key(|region| region.base_host_virt_addr);
    for pair in regions.windows(2) {
        if pair[0].base_host_virt_addr + pair[0].size > pair[1].base_host_virt_addr {
            return Err(RegionError::Overlap(pair[1].base_host_virt_addr));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn region(base: u64, size: u64, offset: u64) -> Region {
        Region { base_host_virt_addr: base, size, offset, page_size: PAGE_SIZE }
    }

    fn refusal(regions: Vec<Region>) -> RegionError {
        Regions::check(regions, 2 * MIB).unwrap_err()
    }

    #[test]
    fn no_regions_refused() {
        assert_eq!(refusal(vec![]), RegionError::None);
    }

    #[test]
    fn other_page_size_refused() {
        let huge = Region { page_size: 2 * MIB, ..region(MIB, 2 * MIB, 0) };
        assert_eq!(refusal(vec![huge]), RegionError::PageSize(0, 2 * MIB));
    }

    #[test]
    fn unaligned_base_size_and_offset_refused() {
        for odd in [region(MIB + 1, 2 * MIB, 0), region(MIB, 2 * MIB - 1, 0), region(MIB, 2 * MIB, 1)] {
            assert_eq!(refusal(vec![odd]), RegionError::Unaligned(0));
        }
    }

    #[test]
    fn empty_region_and_zero_base_refused() {
        assert_eq!(refusal(vec![region(MIB, 0, 0)]), RegionError::Unaligned(0));
        assert_eq!(refusal(vec![region(0, 2 * MIB, 0)]), RegionError::Unaligned(0));
    }

    #[test]
    fn end_of_the_address_space_refused() {
        let last = u64::MAX - PAGE_SIZE + 1;
        assert_eq!(refusal(vec![region(last, 2 * MIB, 0)]), RegionError::Overflow(0));
        assert_eq!(refusal(vec![region(MIB, 2 * MIB, last)]), RegionError::Overflow(0));
    }

    #[test]
    fn gap_overlap_and_excess_in_the_image_refused() {
        let at = |at| RegionError::Coverage { size: 2 * MIB, at };
        assert_eq!(refusal(vec![region(MIB, MIB, 0)]), at(MIB));
        assert_eq!(refusal(vec![region(MIB, MIB, MIB)]), at(0));
        assert_eq!(refusal(vec![region(MIB, MIB, 0), region(8 * MIB, MIB, MIB / 2)]), at(MIB / 2));
        assert_eq!(refusal(vec![region(MIB, 4 * MIB, 0)]), at(0));
    }

    #[test]
    fn two_regions_at_one_address_refused() {
        assert_eq!(refusal(vec![region(MIB, MIB, 0), region(MIB, MIB, MIB)]), RegionError::Overlap(MIB));
    }

    #[test]
    fn wake_range_is_clipped_to_the_region() {
        let (low, high) = (3 * PAGE_SIZE, 2 * MIB - 3 * PAGE_SIZE);
        let regions = Regions::check(vec![region(MIB, low, 0), region(16 * MIB, high, low)], 2 * MIB).unwrap();
        assert_eq!(regions.locate(MIB + 5).unwrap(), Fault { page: 0, chunk: 0, wake: MIB..MIB + low });
        let rest_of_chunk = 16 * MIB..16 * MIB + CHUNK_SIZE - low;
        assert_eq!(regions.locate(16 * MIB).unwrap(), Fault { page: 3, chunk: 0, wake: rest_of_chunk });
        assert_eq!(regions.locate(MIB + low), None);
        assert_eq!(regions.locate(0), None);
    }

    /// Cuts an image into regions and lays them out in the address space, with gaps, listed from any of them on.
    fn layouts() -> impl Strategy<Value = (u64, Vec<Region>)> {
        let pieces = prop::collection::vec((1..40u64, 0..5u64), 1..8);
        (pieces, any::<prop::sample::Index>()).prop_map(|(pieces, turn)| {
            let (mut offset, mut base, mut regions) = (0, MIB, Vec::new());
            for (pages, gap) in &pieces {
                regions.push(region(base, pages * PAGE_SIZE, offset));
                offset += pages * PAGE_SIZE;
                base += (pages + gap) * PAGE_SIZE;
            }
            let by = turn.index(regions.len());
            regions.rotate_left(by);
            (offset, regions)
        })
    }

    proptest! {
        #[test]
        fn every_address_of_a_good_layout_is_located((size, regions) in layouts(), at in any::<prop::sample::Index>()) {
            let offset = at.index(size as usize) as u64;
            let home = *regions.iter().find(|r| (r.offset..r.offset + r.size).contains(&offset)).unwrap();
            let address = home.base_host_virt_addr + (offset - home.offset);
            let regions = Regions::check(regions, size).unwrap();
            let fault = regions.locate(address).unwrap();
            prop_assert_eq!(regions.address_of(fault.page), Some(address / PAGE_SIZE * PAGE_SIZE));
            prop_assert_eq!(regions.address_of(size / PAGE_SIZE), None);
            prop_assert_eq!(fault.page, offset / PAGE_SIZE);
            prop_assert_eq!(fault.chunk, offset / CHUNK_SIZE);
            prop_assert!(fault.wake.contains(&address));
            prop_assert!(fault.wake.end - fault.wake.start <= CHUNK_SIZE);
            prop_assert!(fault.wake.start >= home.base_host_virt_addr);
            prop_assert!(fault.wake.end <= home.base_host_virt_addr + home.size);
            prop_assert!([fault.wake.start, fault.wake.end].iter().all(|n| n.is_multiple_of(PAGE_SIZE)));
        }

        #[test]
        fn a_range_of_addresses_has_the_pages_that_lie_whole_in_it(
            (size, regions) in layouts(), start in 0..2 * MIB, len in 0..MIB
        ) {
            let regions = Regions::check(regions, size).unwrap();
            let found: Vec<u64> = regions.pages_within(start..start + len).into_iter().flatten().collect();
            for page in 0..size / PAGE_SIZE {
                let address = regions.address_of(page).unwrap();
                let within = start <= address && address + PAGE_SIZE <= start + len;
                prop_assert_eq!(found.contains(&page), within, "page {}", page);
            }
        }

        #[test]
        fn any_list_is_checked_without_panic(
            raw in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..6), size in any::<u64>()
        ) {
            let mask = !(PAGE_SIZE - 1);
            let regions = raw.iter().map(|&(b, s, o)| region(b & mask, s & mask, o & mask)).collect();
            if let Ok(regions) = Regions::check(regions, size) {
                for (base, ..) in raw { regions.locate(base); }
            }
        }
    }
}
