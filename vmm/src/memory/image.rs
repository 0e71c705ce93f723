//! The first view of a memory image that is not one raw file: several files over each other, or a packed one.
//!
//! | image | view |
//! |---|---|
//! | a raw file | a private mapping of it: nothing is read |
//! | files over each other | a private mapping of the lowest; over it the longer runs of the others are mapped, the shorter ones copied, and what became zero is discarded |
//! | packed | it is unpacked into memory that is this guest's alone, which is mapped privately as a file is |

use super::changes::CaptureError;
use super::layer::{Copied, Layer, Places, View};
use super::{GuestRam, MemoryError, PAGE_SIZE, mmap};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use snapshot::clusters::{Cluster, Clusters};
use snapshot::create::Cancel;
use snapshot::image::{ImageError, MemoryImage, TrustedLayer, TrustedMemory};
use snapshot::manifest::MemoryRegion;
use snapshot::{CHUNK_BYTES, PAGE_BYTES, threads};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Most runs that are mapped: each may take two of the mappings that a process can have.
const MAX_MAPPED: usize = 450;
/// Most runs of zeros that take mappings; the others take memory. A guest may have twice as many of those that it gives back.
const MAX_EMPTIED: usize = 8_000;
/// How many pages a run has that is worth a mapping: 64 KiB.
const LONG_RUN: u64 = 16;
/// Most layers that a guest's memory has over the lowest file before it is forked with one instead of them.
pub const MAX_LAYERS: usize = 6;
/// Most bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

/// Fewest runs to be copied for which a thread is worth its start.
const RUNS_PER_THREAD: u64 = 64;
/// Fewest runs of a layer to be copied for which it is worth a view of its own.
const RUNS_PER_VIEW: u64 = 32;
/// Fewest chunks for which a thread is worth its start.
const CHUNKS_PER_THREAD: u64 = 16;

/// Why an image could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum LayError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A layer of it.
    #[error("cannot read the memory of the snapshot at offset {offset:#x}: {source}")]
    Read {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// No memory to unpack it into.
    #[error("no memory to unpack {size} bytes of guest memory into: {source}")]
    Unpack {
        /// Size of the image.
        size: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A view of it.
    #[error("cannot put the pages of a snapshot over those of its parent: {0}")]
    Lay(io::Error),
}

/// Part of an image as it is seen from above.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    /// Pages of the image.
    pages: Range<u64>,
    /// The layer that holds them; `None` if they are zero.
    layer: Option<usize>,
}

/// What is seen of layers that lie over a whole image, the uppermost first.
fn visible(layers: &[&Clusters]) -> Vec<Piece> {
    let Some(uppermost) = layers.first() else { return Vec::new() };
    let (mut taken, mut pieces) = (Clusters::new(uppermost.count() * PAGE_BYTES), Vec::new());
    for (number, layer) in layers.iter().enumerate() {
        for (held, state) in layer.runs(0..layer.count()).filter(|(_, state)| *state != Cluster::Absent) {
            let layer = (state == Cluster::Data).then_some(number);
            let free = taken.runs(held).filter(|(_, above)| *above == Cluster::Absent);
            pieces.extend(free.map(|(pages, _)| Piece { pages, layer }));
        }
        taken.lay(layer);
    }
    pieces
}

/// Cuts pieces where regions meet.
fn cut(pieces: Vec<Piece>, regions: &[MemoryRegion]) -> impl Iterator<Item = (usize, Piece)> + '_ {
    let places = regions.iter().map(|r| r.offset / PAGE_BYTES..(r.offset + r.size_bytes) / PAGE_BYTES);
    let places: Vec<Range<u64>> = places.collect();
    pieces.into_iter().flat_map(move |piece| {
        let part = |(number, place): (usize, &Range<u64>)| {
            let pages = piece.pages.start.max(place.start)..piece.pages.end.min(place.end);
            (!pages.is_empty()).then_some((number, Piece { pages, layer: piece.layer }))
        };
        places.iter().enumerate().filter_map(part).collect::<Vec<_>>()
    })
}

impl GuestRam {
    /// Shows the memory of a snapshot where nothing was yet, as a private view.
    pub fn show_trusted(&mut self, memory: TrustedMemory) -> Result<(), LayError> {
        match memory {
            TrustedMemory::Image(image) => Ok(self.show(&unpack(&image)?)?),
            TrustedMemory::Files(files) => {
                let mut above = files;
                let lowest = above.pop().ok_or_else(|| LayError::Lay(io::ErrorKind::NotFound.into()))?;
                self.show(&lowest.file)?;
                let layer = |TrustedLayer { file, pages }| Some(Layer { file, pages: pages?, packed: false });
                self.show_above(above.into_iter().filter_map(layer).collect())
            }
        }
    }

    /// Shows layers, the uppermost first, over what is shown already. Nobody has used the memory yet.
    pub fn show_above(&mut self, layers: Vec<Layer>) -> Result<(), LayError> {
        let ends = self.lay(&layers)?;
        // What is copied of a layer, or discarded, is the guest's own from now on.
        self.above = layers.into_iter().zip(ends).filter(|(_, end)| *end > 0).collect();
        Ok(())
    }

    /// What the guest's memory is at this moment: a copy of what it has changed, and the layers that lie over the image that it is a view
    /// of, the uppermost first. `None` if that is not to be told. No vCPU and no device may write meanwhile, and the guest must have been
    /// frozen if it was booted here.
    pub fn layers(&self, cancel: &dyn Cancel) -> Result<Option<(Copied, Vec<Layer>)>, CaptureError> {
        let flattens = self.above.len() >= MAX_LAYERS;
        let also: Vec<&Clusters> = self.above.iter().map(|(layer, _)| &layer.pages).collect();
        let own = self.copy_own(if flattens { &also } else { &[] }, cancel)?;
        let kept = self.above.iter().filter(|_| !flattens).map(|(layer, _)| layer.try_clone());
        let kept = kept.collect::<Result<_, _>>().map_err(CaptureError::Keep)?;
        Ok(own.map(|own| (own, kept)))
    }

    /// Puts what these layers hold, the uppermost first, over what is there. Nobody has used the memory yet. Returns where what is
    /// mapped of each layer ends in it, in bytes.
    fn lay(&self, layers: &[Layer]) -> Result<Vec<u64>, LayError> {
        let maps: Vec<&Clusters> = layers.iter().map(|layer| &layer.pages).collect();
        let places: Vec<Places> = layers.iter().map(Layer::places).collect();
        let mut pieces: Vec<(usize, Piece)> = cut(visible(&maps), &self.regions).collect();
        // The longest are mapped, as far as there are mappings.
        pieces.sort_by_key(|(_, piece)| std::cmp::Reverse(piece.pages.end - piece.pages.start));
        let (discarder, mut mapped, mut emptied) = (self.discarder(), 0, 0);
        let (mut ends, mut short) = (vec![0; layers.len()], Vec::new());
        for (region, piece) in pieces {
            let pages = piece.pages.end - piece.pages.start;
            match piece.layer {
                None => {
                    let first = (self.guest_addr(region, piece.pages.start)) / PAGE_SIZE;
                    emptied += 1;
                    if emptied > MAX_EMPTIED || discarder.discard(first..first + pages).discarded < pages {
                        self.write(region, &piece.pages, |_, buf| {
                            buf.fill(0);
                            Ok(())
                        })?;
                    }
                }
                Some(layer) if pages >= LONG_RUN && mapped < MAX_MAPPED => {
                    let place = places[layer].of(piece.pages.start);
                    self.map_over(region, &piece.pages, &layers[layer].file, place).map_err(LayError::Lay)?;
                    ends[layer] = ends[layer].max(place + pages * PAGE_BYTES);
                    mapped += 1;
                }
                Some(layer) => short.push((region, piece.pages, layer)),
            }
        }
        // What the guest gives back is bounded by itself.
        discarder.begin_anew();
        let view = |(number, layer): (usize, &Layer)| {
            let runs = short.iter().filter(|(_, _, of)| *of == number).count() as u64;
            if runs < RUNS_PER_VIEW { None } else { layer.view() }
        };
        let views: Vec<Option<View>> = layers.iter().enumerate().map(view).collect();
        threads::split(short.len() as u64, RUNS_PER_THREAD, |some| {
            short[some.start as usize..some.end as usize].iter().try_for_each(|(region, pages, layer)| {
                let place = places[*layer].of(pages.start);
                match &views[*layer] {
                    Some(view) => self.copy_in(*region, pages, view, place),
                    None => {
                        self.write(*region, pages, |offset, buf| layers[*layer].file.read_exact_at(buf, place + offset))
                    }
                }
            })
        })?;
        Ok(ends)
    }

    /// Copies pages that are in a file from `place` on.
    fn copy_in(&self, region: usize, pages: &Range<u64>, view: &View, place: u64) -> Result<(), LayError> {
        let failed = |e| LayError::Lay(io::Error::other(e));
        let len = ((pages.end - pages.start) * PAGE_BYTES) as usize;
        let from = view.bytes(place, len).map_err(LayError::Lay)?;
        let to = self.memory.get_slice(GuestAddress(self.guest_addr(region, pages.start)), len).map_err(failed)?;
        from.copy_to_volatile_slice(to);
        Ok(())
    }

    fn guest_addr(&self, region: usize, page: u64) -> u64 {
        let MemoryRegion { guest_addr, offset, .. } = self.regions[region];
        guest_addr + (page * PAGE_BYTES - offset)
    }

    /// Maps what is in a file from `place` on.
    fn map_over(&self, region: usize, pages: &Range<u64>, file: &File, place: u64) -> io::Result<()> {
        let mapped = self.memory.iter().nth(region).ok_or(io::ErrorKind::NotFound)?;
        let start = pages.start * PAGE_BYTES - self.regions[region].offset;
        let range = start..start + (pages.end - pages.start) * PAGE_BYTES;
        mmap::map_over(mapped.mapping(), range, file, place)
    }

    /// Writes pages that `read` tells by how far they are from the first, in bytes.
    fn write(
        &self,
        region: usize,
        pages: &Range<u64>,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), LayError> {
        let (mut at, end) = (pages.start * PAGE_BYTES, pages.end * PAGE_BYTES);
        let mut buf = vec![0; (end - at).min(PIECE) as usize];
        while at < end {
            let buf = &mut buf[..(end - at).min(PIECE) as usize];
            let from = at - pages.start * PAGE_BYTES;
            read(from, buf).map_err(|source| LayError::Read { offset: at, source })?;
            let to = GuestAddress(self.guest_addr(region, at / PAGE_BYTES));
            self.memory.write_slice(buf, to).map_err(|e| LayError::Lay(io::Error::other(e)))?;
            at += buf.len() as u64;
        }
        Ok(())
    }
}

/// Unpacks an image into memory of its own, sealed, on as many threads as there are CPUs.
fn unpack(image: &MemoryImage) -> Result<File, LayError> {
    let failed = |source| LayError::Unpack { size: image.size(), source };
    let fd = memfd_create("coppice-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let file = File::from(fd.map_err(|e| failed(e.into()))?);
    ftruncate(&file, image.size()).map_err(|e| failed(e.into()))?;
    // As many for each thread, wherever in memory they are.
    let chunks: Vec<u64> = (0..image.chunks()).filter(|index| !image.chunk_is_zero(*index)).collect();
    threads::split(chunks.len() as u64, CHUNKS_PER_THREAD, |run| -> Result<(), LayError> {
        let mut buf = vec![0; CHUNK_BYTES as usize];
        for index in &chunks[run.start as usize..run.end as usize] {
            let len = image.read_chunk(*index, &mut buf)?;
            file.write_all_at(&buf[..len], index * CHUNK_BYTES).map_err(failed)?;
        }
        Ok(())
    })?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|e| failed(e.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 200;

    fn layer() -> impl Strategy<Value = Clusters> {
        prop::collection::vec((0..PAGES, 1u64..40, 0u8..3), 0..8).prop_map(|runs| {
            let mut map = Clusters::new(PAGES * PAGE_BYTES);
            for (from, len, state) in runs {
                map.set(from..from + len, [Cluster::Absent, Cluster::Data, Cluster::Zero][usize::from(state)]);
            }
            map
        })
    }

    /// What a page of a chain holds, by layer: each layer's pages hold its number, those of the lowest 99.
    fn seen(layers: &[Clusters], page: u64) -> u8 {
        for (number, layer) in layers.iter().enumerate() {
            match layer.get(page) {
                Cluster::Absent => {}
                Cluster::Data => return number as u8 + 1,
                Cluster::Zero => return 0,
            }
        }
        99
    }

    fn file(fill: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![fill; (PAGES * PAGE_BYTES) as usize], 0).unwrap();
        file
    }

    fn regions() -> Vec<MemoryRegion> {
        let first = 70 * PAGE_BYTES;
        vec![
            MemoryRegion { guest_addr: 0, size_bytes: first, offset: 0 },
            MemoryRegion { guest_addr: 1 << 32, size_bytes: PAGES * PAGE_BYTES - first, offset: first },
        ]
    }

    /// Every other page is zero, and those between them are of the lowest file.
    #[test]
    fn zeros_of_a_chain_leave_a_guest_all_that_it_may_give_back() {
        const RUNS: u64 = 1_500;
        let size = 2 * RUNS * PAGE_BYTES;
        let mut map = Clusters::new(size);
        (0..RUNS - 1).for_each(|run| map.set(2 * run..2 * run + 1, Cluster::Zero));
        let lowest = tempfile::tempfile().unwrap();
        lowest.write_all_at(&vec![1; size as usize], 0).unwrap();
        let upper = tempfile::tempfile().unwrap();
        upper.set_len(size).unwrap();
        let files = vec![TrustedLayer { file: upper, pages: Some(map) }, TrustedLayer { file: lowest, pages: None }];
        let regions = vec![MemoryRegion { guest_addr: 0, size_bytes: size, offset: 0 }];
        let mut ram = GuestRam::reserve(regions).unwrap();
        ram.show_trusted(TrustedMemory::Files(files)).unwrap();
        let last = 2 * RUNS - 1;
        assert_eq!(ram.discarder().discard(last..last + 1).discarded, 1);
        for page in 0..2 * RUNS {
            let mut byte = [7];
            ram.memory().read_slice(&mut byte, GuestAddress(page * PAGE_BYTES)).unwrap();
            let is_zero = page == last || page % 2 == 0 && page < 2 * RUNS - 2;
            assert_eq!(byte, [u8::from(!is_zero)], "page {page}");
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_noticed_wherever_in_a_chain_it_lies() {
        let mut map = Clusters::new(PAGES * PAGE_BYTES);
        map.set(20..20 + LONG_RUN, Cluster::Data);
        for cut in 0..3 {
            let files = [1, 2, 99].map(file);
            let layers = files.iter().zip([Some(map.clone()), Some(map.clone()), None]);
            let layers = layers.map(|(file, pages)| TrustedLayer { file: file.try_clone().unwrap(), pages }).collect();
            let mut ram = GuestRam::reserve(regions()).unwrap();
            ram.show_trusted(TrustedMemory::Files(layers)).unwrap();
            assert!(!ram.is_cut_short());
            files[cut].set_len((20 + LONG_RUN) * PAGE_BYTES).unwrap();
            assert_eq!(ram.is_cut_short(), cut == 2, "as much is mapped of each of the others");
            files[cut].set_len((19 + LONG_RUN) * PAGE_BYTES).unwrap();
            // Nothing is mapped of the one in the middle.
            assert_eq!(ram.is_cut_short(), cut != 1, "{cut}");
        }
    }

    proptest! {
        #[test]
        fn what_is_visible_is_what_is_seen_from_above(layers in prop::collection::vec(layer(), 0..5)) {
            let maps: Vec<&Clusters> = layers.iter().collect();
            let mut covered = vec![false; PAGES as usize];
            for piece in visible(&maps) {
                for page in piece.pages {
                    prop_assert!(!std::mem::replace(&mut covered[page as usize], true), "no page is there twice");
                    let wanted = seen(&layers, page);
                    prop_assert_eq!(piece.layer.map_or(0, |layer| layer as u8 + 1), wanted);
                }
            }
            for page in 0..PAGES {
                prop_assert_eq!(covered[page as usize], seen(&layers, page) != 99);
            }
        }

        #[test]
        fn a_view_of_a_chain_shows_each_page_of_the_uppermost_that_has_it(layers in prop::collection::vec(layer(), 0..4)) {
            let mut files: Vec<TrustedLayer> = (1..).zip(&layers)
                .map(|(fill, map)| TrustedLayer { file: file(fill), pages: Some(map.clone()) })
                .collect();
            files.push(TrustedLayer { file: file(99), pages: None });
            let mut ram = GuestRam::reserve(regions()).unwrap();
            ram.show_trusted(TrustedMemory::Files(files)).unwrap();
            for page in 0..PAGES {
                let region = ram.regions().iter().rposition(|r| r.offset <= page * PAGE_BYTES).unwrap();
                let mut bytes = [77; PAGE_BYTES as usize];
                ram.memory().read_slice(&mut bytes, GuestAddress(ram.guest_addr(region, page))).unwrap();
                prop_assert_eq!(bytes, [seen(&layers, page); PAGE_BYTES as usize]);
                // And what is written stays there.
                ram.memory().write_slice(&[55; 8], GuestAddress(ram.guest_addr(region, page))).unwrap();
            }
        }
    }
}
