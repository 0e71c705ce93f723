//! Layers: pages of an image in files of their own, which are mapped over it; and the copy of a guest's own pages that becomes one.

use super::changes::{CaptureError, Part, data_runs};
use super::mmap::{self, Mapping, Populate};
use super::{GuestRam, PAGE_SIZE};
use crate::devices::lock;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use snapshot::clusters::{Cluster, Clusters};
use snapshot::create::Cancel;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestMemoryBackend, VolatileMemory};

/// Most room that is kept for the next copy, in bytes.
const MAX_SPARE: u64 = 64 << 20;
/// By how much it grows.
const STEP: u64 = 256 << 10;
/// What nobody can begin to do to a layer that was copied here: whoever has copied it may have it mapped for a moment longer.
pub const SEALED: SealFlags = SealFlags::FUTURE_WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// Whether nobody can begin to write a file with these seals, or change its size.
pub fn is_sealed(seals: SealFlags) -> bool {
    seals.intersects(SealFlags::FUTURE_WRITE | SealFlags::WRITE) && seals.contains(SealFlags::SHRINK | SealFlags::GROW)
}

/// Pages of an image in a file of their own.
#[derive(Debug)]
pub struct Layer {
    /// The file, open for reading.
    pub file: File,
    /// Which pages it holds, as clusters: those that are data in the file, others as zeros.
    pub pages: Clusters,
    /// They lie one behind the other in the file. Otherwise each is at its place in the image.
    pub packed: bool,
}

impl Layer {
    /// Where pages are in the file.
    pub fn places(&self) -> Places {
        let mut end = 0;
        let place = |run: Range<u64>| {
            let at = end;
            end += (run.end - run.start) * PAGE_SIZE;
            (run.start, at)
        };
        Places(self.packed.then(|| data_runs(&self.pages).map(place).collect()))
    }

    /// The same for another owner.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Layer { file: self.file.try_clone()?, pages: self.pages.clone(), packed: self.packed })
    }
}

/// Where the pages of a layer are in its file: the first page of each run and its offset in bytes, in order, if they are not where they
/// are in the image.
#[derive(Debug)]
pub struct Places(Option<Vec<(u64, u64)>>);

impl Places {
    /// Where a page is that the layer holds, in bytes. The rest of its run follows.
    pub fn of(&self, page: u64) -> u64 {
        let Some(runs) = &self.0 else { return page * PAGE_SIZE };
        let run = runs.partition_point(|(first, _)| *first <= page).checked_sub(1).map(|at| runs[at]);
        run.map_or(0, |(first, place)| place + (page - first) * PAGE_SIZE)
    }
}

/// Memory for a copy of pages, which others can map.
#[derive(Debug)]
pub struct Room {
    file: File,
    mapping: Mapping,
    size: u64,
}

impl Room {
    /// Room for so many bytes, at least. It takes memory when it is written.
    fn new(bytes: u64) -> io::Result<Self> {
        let size = bytes.max(1).next_multiple_of(STEP);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("coppice-layer", flags)?);
        ftruncate(&file, size)?;
        let place = FileOffset::new(file.try_clone()?, 0);
        let mapping = Mapping::new(place, size as usize, libc::MAP_SHARED).map_err(|e| match e {
            MmapRegionError::Mmap(e) => e,
            other => io::Error::other(other),
        })?;
        Ok(Room { file, mapping, size })
    }
}

/// Room that is got ready for the next copy, so that a guest does not stand still for that.
#[derive(Clone, Debug, Default)]
pub struct Spare(Arc<Mutex<Option<Room>>>);

impl Spare {
    /// Gets room ready for somewhat more than `bytes`, unless there is, in memory that is taken now.
    pub fn prepare(&self, bytes: u64) -> io::Result<()> {
        let wanted = (bytes + bytes / 4).clamp(1, MAX_SPARE);
        if lock(&self.0).as_ref().is_some_and(|room| room.size >= wanted) {
            return Ok(());
        }
        let room = Room::new(wanted)?;
        mmap::populate(room.mapping.region(), 0..room.size, Populate::Write)?;
        *lock(&self.0) = Some(room);
        Ok(())
    }

    fn take(&self, bytes: u64) -> io::Result<Room> {
        let ready = lock(&self.0).take_if(|room| room.size >= bytes);
        ready.map_or_else(|| Room::new(bytes), Ok)
    }
}

/// A copy of pages that is complete. [`Copied::seal`] does the part that whoever waits for the guest need not wait for.
#[derive(Debug)]
pub struct Copied {
    room: Room,
    pages: Clusters,
}

impl Copied {
    /// How many pages it holds.
    pub fn count(&self) -> u64 {
        self.pages.data()
    }

    /// Makes a layer of it that nobody can begin to write, and gives back what it has too much of, if that is much. The other part of the
    /// result takes a while to drop, and has to be before long.
    pub fn seal(self) -> io::Result<(Layer, Written)> {
        let Copied { room: Room { file, mapping, size }, pages } = self;
        let used = pages.data() * PAGE_SIZE;
        if size - used > used / 2 + STEP {
            ftruncate(&file, used)?;
        }
        fcntl_add_seals(&file, SEALED)?;
        Ok((Layer { file, pages, packed: true }, Written(mapping)))
    }
}

/// The mapping through which a layer was written.
#[derive(Debug)]
pub struct Written(#[allow(dead_code, reason = "it is there to be dropped")] Mapping);

impl GuestRam {
    /// Room that is got ready for the next copy.
    pub fn spare(&self) -> Spare {
        self.spare.clone()
    }

    /// Copies what the guest has changed of its image, and the pages of `also` where they are as they were. `None` if that is not to be
    /// told from the rest. No vCPU and no device may write meanwhile.
    pub fn copy_own(&self, also: &[&Clusters], cancel: &dyn Cancel) -> Result<Option<Copied>, CaptureError> {
        let Some(mut pages) = self.changed()? else { return Ok(None) };
        for run in also.iter().flat_map(|also| data_runs(also)) {
            let unchanged: Vec<_> = pages.runs(run).filter(|(_, state)| *state == Cluster::Absent).collect();
            unchanged.into_iter().for_each(|(run, _)| pages.set(run, Cluster::Data));
        }
        let room = self.spare.take(pages.data() * PAGE_SIZE).map_err(CaptureError::Keep)?;
        let mut to = 0;
        for run in data_runs(&pages) {
            for Part { offset, from, len } in self.parts(run) {
                if cancel.is_cancelled() {
                    return Err(CaptureError::Cancelled);
                }
                let from = self.memory.get_slice(from, len).map_err(|source| CaptureError::Read { offset, source })?;
                let room = room.mapping.region().get_slice(to, len);
                from.copy_to_volatile_slice(room.map_err(|e| CaptureError::Keep(io::Error::other(e)))?);
                to += len;
            }
        }
        Ok(Some(Copied { room, pages }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicBool;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u64 = 4 << 20;
    const PAGES: u64 = SIZE / PAGE_SIZE;

    fn view() -> GuestRam {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        GuestRam::private_view(&file, layout::ram_regions(SIZE)).unwrap()
    }

    fn go_on() -> AtomicBool {
        AtomicBool::new(false)
    }

    fn byte(layer: &Layer, page: u64) -> u8 {
        let mut byte = [0];
        layer.file.read_exact_at(&mut byte, layer.places().of(page)).unwrap();
        byte[0]
    }

    #[test]
    fn a_guests_own_pages_lie_one_behind_the_other_and_stay_as_they_were() {
        let ram = view();
        let mut also = Clusters::new(SIZE);
        also.set(300..305, Cluster::Data);
        for round in 0..3 {
            for page in [3, 4, 5, 100, 302, PAGES - 1] {
                ram.memory()
                    .write_slice(&[(page as u8).wrapping_add(round); 16], GuestAddress(page * PAGE_SIZE))
                    .unwrap();
            }
            let copied = ram.copy_own(&[&also], &go_on()).unwrap().unwrap();
            assert_eq!(copied.count(), 10);
            ram.memory().write_slice(&[99; 16], GuestAddress(3 * PAGE_SIZE)).unwrap();
            let (layer, _) = copied.seal().unwrap();
            for page in [3, 4, 5, 100, 302, PAGES - 1] {
                assert_eq!(byte(&layer, page), (page as u8).wrapping_add(round), "{page}");
            }
            assert!([300, 301, 303, 304].iter().all(|page| byte(&layer, *page) == 7));
            let length = layer.file.metadata().unwrap().len();
            assert!((10 * PAGE_SIZE..=15 * PAGE_SIZE + STEP).contains(&length), "little more than is in it: {length}");
            assert!(layer.file.write_at(b"x", 0).is_err() && ftruncate(&layer.file, 0).is_err(), "it is sealed");
            // With room that is ready, and without.
            ram.spare().prepare(u64::from(round) * 200 * PAGE_SIZE).unwrap();
        }
    }

    #[test]
    fn a_guest_that_has_changed_nothing_has_an_empty_layer() {
        let copied = view().copy_own(&[], &go_on()).unwrap().unwrap();
        let (layer, _) = copied.seal().unwrap();
        assert!(layer.pages.is_empty() && layer.file.metadata().unwrap().len() <= STEP);
        let ram = view();
        ram.memory().write_slice(&[1], GuestAddress(0)).unwrap();
        assert!(matches!(ram.copy_own(&[], &AtomicBool::new(true)), Err(CaptureError::Cancelled)));
        assert!(
            GuestRam::fresh(SIZE).unwrap().copy_own(&[], &go_on()).unwrap().is_none(),
            "a booted guest is its image"
        );
    }

    proptest! {
        #[test]
        fn packed_pages_have_a_place_each(runs in prop::collection::vec((0..PAGES, 1u64..30), 0..10), zeros in 0..PAGES) {
            let mut pages = Clusters::new(SIZE);
            runs.iter().for_each(|(from, len)| pages.set(*from..from + len, Cluster::Data));
            pages.set(zeros..zeros + 3, Cluster::Zero);
            let layer = Layer { file: tempfile::tempfile().unwrap(), pages, packed: true };
            let places = layer.places();
            let held = (0..PAGES).filter(|page| layer.pages.get(*page) == Cluster::Data);
            for (number, page) in held.enumerate() {
                prop_assert_eq!(places.of(page), number as u64 * PAGE_SIZE);
            }
            let unpacked = Layer { packed: false, ..layer }.places();
            prop_assert!((0..PAGES).all(|page| unpacked.of(page) == page * PAGE_SIZE));
        }
    }
}
