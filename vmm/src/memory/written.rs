//! What this process writes to a region of guest memory: one bit a page, once somebody wants to know.
//!
//! KVM logs what vCPUs write, and what it writes itself. What devices write goes through vm-memory, which tells the region's
//! bitmap: this one. Until a log is wanted, a write costs one look at a flag more.

use super::PAGE_SIZE;
use super::bits::Bits;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// The log of a region.
#[derive(Debug)]
pub struct WriteLog {
    /// There once the log is kept.
    words: OnceLock<Box<[AtomicU64]>>,
    pages: u64,
}

impl WriteLog {
    /// The log of a region of so many bytes, which is not kept yet.
    pub fn new(bytes: u64) -> Self {
        WriteLog { words: OnceLock::new(), pages: bytes.div_ceil(PAGE_SIZE) }
    }

    /// Keeps it from now on.
    pub fn keep(&self) {
        self.words.get_or_init(|| (0..Bits::words_of(self.pages)).map(|_| AtomicU64::new(0)).collect());
    }

    /// Takes the pages that were written out of the log, and adds them to `pages`. Who writes meanwhile may be in either.
    pub fn take(&self, pages: &mut Bits) {
        for (number, word) in self.words.get().into_iter().flatten().enumerate() {
            // Most are zero, and are not to be fetched for writing.
            if word.load(Ordering::Relaxed) != 0 {
                pages.insert_word(number, word.swap(0, Ordering::Relaxed));
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, WriteLog>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(words) = self.words.get() else { return };
        let Some(last) = len.checked_sub(1) else { return };
        for page in offset as u64 / PAGE_SIZE..=offset.saturating_add(last) as u64 / PAGE_SIZE {
            let Some(word) = words.get((page / 64) as usize) else { return };
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        let word = self.words.get().and_then(|words| words.get((page / 64) as usize));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, WriteLog> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use proptest::prelude::*;
    use std::io::Cursor;
    use std::sync::atomic::Ordering::Release;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    const PAGES: u64 = 130;

    /// What was written to memory that is to be logged.
    fn written(ram: &GuestRam) -> Vec<u64> {
        let mut pages = Bits::new(PAGES);
        ram.take_written(std::slice::from_mut(&mut pages));
        pages.runs().flatten().collect()
    }

    proptest! {
        #[test]
        fn pages_that_any_byte_of_was_written_to_are_logged(
            writes in prop::collection::vec((0..PAGES * PAGE_SIZE, 0u64..3 * PAGE_SIZE), 0..20),
        ) {
            let (log, mut model) = (WriteLog::new(PAGES * PAGE_SIZE), Bits::new(PAGES));
            log.mark_dirty(0, 1);
            log.keep();
            for (offset, len) in writes {
                let len = len.min(PAGES * PAGE_SIZE - offset);
                log.mark_dirty(offset as usize, len as usize);
                if len > 0 {
                    model.insert(offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE));
                }
            }
            prop_assert!((0..PAGES).all(|page| log.dirty_at((page * PAGE_SIZE) as usize) == model.contains(page)));
            let mut taken = Bits::new(PAGES);
            log.take(&mut taken);
            prop_assert_eq!(&taken, &model);
            log.take(&mut taken);
            prop_assert_eq!(&taken, &model);
        }
    }

    #[test]
    fn each_way_to_write_to_guest_memory_is_logged() {
        let ram = GuestRam::fresh(PAGES * PAGE_SIZE).unwrap();
        let (memory, page) = (ram.memory(), |page: u64| GuestAddress(page * PAGE_SIZE));
        memory.write_obj(1u8, page(0)).unwrap();
        assert!(written(&ram).is_empty(), "nobody wants to know");
        ram.keep_written();
        memory.write_obj(1u8, page(1)).unwrap();
        memory.write_slice(&[1; 5000], page(3)).unwrap();
        memory.store(1u32, page(64), Release).unwrap();
        memory.read_exact_volatile_from(page(70), &mut Cursor::new(vec![7; 4097]), 4097).unwrap();
        memory.get_slice(GuestAddress(90 * PAGE_SIZE + 4), 8).unwrap().write_obj(1u16, 6).unwrap();
        memory.get_slice(page(100), 4096).unwrap().copy_from(&[1u8; 16]);
        memory.read_obj::<u64>(page(110)).unwrap();
        assert_eq!(written(&ram), [1, 3, 4, 64, 70, 71, 90, 100]);
        assert!(written(&ram).is_empty());
    }
}
