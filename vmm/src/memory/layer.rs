//! Layers: pages of an image in files of their own, which are mapped over it; and the copy of a guest's own pages that becomes one.

use super::changes::{Asks, CaptureError, Part, data_runs};
use super::mmap::{self, Mapping, Populate};
use super::{GuestRam, PAGE_SIZE};
use crate::devices::lock;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use snapshot::clusters::{Cluster, Clusters};
use snapshot::create::Cancel;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestMemoryBackend, VolatileMemory, VolatileSlice};

/// Most room that is kept for the next copy, in bytes.
const MAX_SPARE: u64 = 64 << 20;
/// How much of it is got ready at a time: for less than a millisecond, since whoever has something to do waits so long.
const PREPARED: u64 = 512 << 10;
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

    /// All of it, if it is packed and cannot become shorter meanwhile: whoever reads what is there no more dies of that. `None` also if it
    /// cannot be mapped; it can be read all the same.
    pub fn view(&self) -> Option<View> {
        let len = self.pages.data() * PAGE_SIZE;
        let is_whole = || self.file.metadata().is_ok_and(|metadata| metadata.len() >= len);
        if !self.packed || !fcntl_get_seals(&self.file).is_ok_and(is_sealed) || !is_whole() {
            return None;
        }
        let place = FileOffset::new(self.file.try_clone().ok()?, 0);
        let mapping = Mapping::new(place, len as usize, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        mapping.map(View).map_err(|e| tracing::debug!("a layer is read in pieces, as it cannot be mapped: {e}")).ok()
    }

    /// The same for another owner.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Layer { file: self.file.try_clone()?, pages: self.pages.clone(), packed: self.packed })
    }
}

/// A layer as a whole, to be read without a system call for each of its runs.
#[derive(Debug)]
pub struct View(Mapping);

impl View {
    /// So many bytes of it, from an offset on.
    pub fn bytes(&self, at: u64, len: usize) -> io::Result<VolatileSlice<'_>> {
        let at = at.try_into().map_err(io::Error::other)?;
        self.0.region().get_slice(at, len).map_err(io::Error::other)
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
    /// How many bytes have their memory, from the start.
    ready: u64,
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
        Ok(Room { file, mapping, size, ready: 0 })
    }
}

/// Room that is got ready for the next copy, so that a guest does not stand still for that.
#[derive(Clone, Debug, Default)]
pub struct Spare(Arc<Mutex<Option<Room>>>);

impl Spare {
    /// Gets room ready for somewhat more than `bytes`, unless there is, in memory that is taken now, for as long as it is to go on.
    pub fn prepare(&self, bytes: u64, mut goes_on: impl FnMut() -> bool) -> io::Result<()> {
        let wanted = (bytes + bytes / 4).clamp(1, MAX_SPARE);
        let there = lock(&self.0).take_if(|room| room.size >= wanted);
        let mut room = there.map_or_else(|| Room::new(wanted), Ok)?;
        let wanted = wanted.next_multiple_of(STEP).min(room.size);
        while room.ready < wanted && goes_on() {
            let end = (room.ready + PREPARED).min(wanted);
            mmap::populate(room.mapping.region(), room.ready..end, Populate::Write)?;
            room.ready = end;
        }
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

    /// Makes a layer of it that nobody can begin to write, and gives back what it has too much of, if that is much. Both parts of the
    /// result take a while to drop.
    pub fn seal(self) -> io::Result<(Layer, Written)> {
        let Copied { room: Room { file, mapping, size, .. }, pages } = self;
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
        let (mut to, mut asks) = (0, Asks::new(cancel));
        for run in data_runs(&pages) {
            for Part { offset, from, len } in self.parts(run) {
                asks.go_on(len)?;
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
            ram.spare().prepare(u64::from(round) * 200 * PAGE_SIZE, || true).unwrap();
        }
    }

    #[test]
    fn many_scattered_pages_come_to_a_clone_as_they_were() {
        const STEP: usize = 5;
        let ram = view();
        let written = (0..PAGES).step_by(STEP);
        for page in written {
            ram.memory().write_slice(&page.to_le_bytes().repeat(512), GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        let (layer, _) = ram.copy_own(&[], &go_on()).unwrap().unwrap().seal().unwrap();
        let unsealed = tempfile::tempfile().unwrap();
        std::io::copy(&mut layer.file.try_clone().unwrap(), &mut unsealed.try_clone().unwrap()).unwrap();
        let other = Layer { file: unsealed, pages: layer.pages.clone(), packed: true };
        assert!(layer.view().is_some() && other.view().is_none());
        for layer in [layer, other] {
            let mut clone = view();
            clone.show_above(vec![layer]).unwrap();
            for page in 0..PAGES {
                let mut bytes = [0; PAGE_SIZE as usize];
                clone.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
                let is_written = page % STEP as u64 == 0;
                let as_it_should_be = if is_written { page.to_le_bytes() } else { [7; 8] }.repeat(512);
                assert!(bytes == as_it_should_be[..], "page {page}");
            }
        }
    }

    #[test]
    fn room_that_is_not_all_ready_is_got_ready_further_or_taken_as_it_is() {
        let (ram, bytes) = (view(), 3 * PREPARED);
        let mut left = 2;
        let mut for_a_while = || {
            left -= 1;
            left >= 0
        };
        ram.spare().prepare(bytes, &mut for_a_while).unwrap();
        let ready = |ram: &GuestRam| lock(&ram.spare.0).as_ref().map(|room| (room.ready, room.size));
        let (first, size) = ready(&ram).unwrap();
        assert_eq!(first, 2 * PREPARED);
        ram.spare().prepare(bytes, || true).unwrap();
        assert_eq!(ready(&ram), Some((size, size)));
        // More than there is.
        ram.spare().prepare(2 * bytes, || false).unwrap();
        assert!(ready(&ram).is_some_and(|(ready, size)| ready == 0 && size >= 2 * bytes));
        ram.memory().write_slice(&[3; 16], GuestAddress(5 * PAGE_SIZE)).unwrap();
        let (layer, _) = ram.copy_own(&[], &go_on()).unwrap().unwrap().seal().unwrap();
        assert_eq!((byte(&layer, 5), ready(&ram)), (3, None));
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
