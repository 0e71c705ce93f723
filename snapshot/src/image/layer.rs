//! One file of a memory image: all of it, the pages that differ from a parent's, or packed chunks. What is read here is checked by
//! nobody yet.

use crate::chunk;
use crate::clusters::{Cluster, Clusters};
use crate::packed::{Entry, Index};
use crate::{CHUNK_BYTES, PAGE_BYTES};
use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Pages of a chunk, a bit each, the first lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages(u16);

impl Pages {
    pub(super) const NONE: Pages = Pages(0);

    /// The first so many.
    pub(super) fn first(count: u64) -> Pages {
        Pages(u16::MAX.checked_shr(16 - count.min(16) as u32).unwrap_or(0))
    }

    fn has(self, page: u64) -> bool {
        self.0 >> page & 1 != 0
    }

    fn without(self, pages: Range<u64>) -> Pages {
        Pages(self.0 & !(Pages::first(pages.end).0 & !Pages::first(pages.start).0))
    }

    /// Runs of these pages within `within`, in order.
    fn runs(self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut at = within.start;
        std::iter::from_fn(move || {
            let start = (at..within.end).find(|page| self.has(*page))?;
            at = (start..within.end).find(|page| !self.has(*page)).unwrap_or(within.end);
            Some(start..at)
        })
    }
}

const _: () = assert!(CHUNK_BYTES / PAGE_BYTES == 16, "a bit for each page of a chunk");

/// Whether a read may wait for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Waits,
    Never,
}

/// Why a file gives no bytes.
#[derive(Debug)]
pub(super) enum Fault {
    /// It would have to wait.
    NotNow,
    /// It cannot be read at this offset.
    Read(u64, io::Error),
    /// What is packed there is no chunk.
    Frame,
}

/// What a layer has of the image.
#[derive(Debug)]
pub(super) enum Form {
    /// All of it, each byte at its place.
    Whole,
    /// These pages, each at its place.
    Pages(Clusters),
    /// Chunks.
    Packed(Index),
}

/// A file of a memory image, and what it holds.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) form: Form,
    /// Size of the image, in bytes.
    pub(super) size: u64,
}

impl Layer {
    /// Whether the layer holds anything of a chunk; if not, all of it is that of the parent.
    pub(super) fn holds(&self, index: u64) -> bool {
        match &self.form {
            Form::Whole => true,
            Form::Pages(map) => map.runs(pages_of(index)).any(|(_, state)| state != Cluster::Absent),
            Form::Packed(table) => table.entry(index) != Entry::Parent,
        }
    }

    /// Where in the file the bytes of a chunk would be, as they are, whichever of them it holds: nowhere if it holds none, or only
    /// zeros; `None` if they are compressed.
    pub(super) fn place_of(&self, index: u64) -> Option<Range<u64>> {
        match &self.form {
            Form::Whole | Form::Pages(_) => {
                let start = index * CHUNK_BYTES;
                Some(start..start + chunk::len(self.size, index) as u64)
            }
            Form::Packed(table) => match table.entry(index) {
                Entry::Zero | Entry::Parent => Some(0..0),
                Entry::Plain { offset } => Some(offset..offset + chunk::len(self.size, index) as u64),
                Entry::Zstd { .. } => None,
            },
        }
    }

    /// Fills those of the `wanted` pages of a chunk that the layer holds into `buf`, which has the length of the chunk. Returns the
    /// others.
    pub(super) fn fill(&self, index: u64, buf: &mut [u8], wanted: Pages, patience: Patience) -> Result<Pages, Fault> {
        match &self.form {
            Form::Whole => {
                for run in wanted.runs(0..16) {
                    self.read_pages(index, run, buf, patience)?;
                }
                Ok(Pages::NONE)
            }
            Form::Pages(map) => {
                let (first, mut left) = (pages_of(index).start, wanted);
                for (held, state) in map.runs(pages_of(index)).filter(|(_, state)| *state != Cluster::Absent) {
                    let held = held.start - first..held.end - first;
                    for run in wanted.runs(held.clone()) {
                        match state {
                            Cluster::Data => self.read_pages(index, run, buf, patience)?,
                            _ => zero(run, buf),
                        }
                    }
                    left = left.without(held);
                }
                Ok(left)
            }
            Form::Packed(table) => match table.entry(index) {
                Entry::Parent => Ok(wanted),
                Entry::Zero => {
                    wanted.runs(0..16).for_each(|run| zero(run, buf));
                    Ok(Pages::NONE)
                }
                entry if wanted == Pages::first(pages_in(buf.len())) => {
                    self.unpack(entry, buf, patience)?;
                    Ok(Pages::NONE)
                }
                entry => {
                    let mut whole = vec![0; buf.len()];
                    self.unpack(entry, &mut whole, patience)?;
                    for run in wanted.runs(0..16) {
                        let bytes = bytes_of(run, buf.len());
                        buf[bytes.clone()].copy_from_slice(&whole[bytes]);
                    }
                    Ok(Pages::NONE)
                }
            },
        }
    }

    fn read_pages(&self, index: u64, pages: Range<u64>, buf: &mut [u8], patience: Patience) -> Result<(), Fault> {
        let bytes = bytes_of(pages, buf.len());
        self.read(index * CHUNK_BYTES + bytes.start as u64, &mut buf[bytes], patience)
    }

    fn read(&self, offset: u64, buf: &mut [u8], patience: Patience) -> Result<(), Fault> {
        let wanted = buf.len();
        match patience {
            Patience::Waits => self.file.read_exact_at(buf, offset).map_err(|e| Fault::Read(offset, e)),
            // One that fails now fails again, and says why, when it may wait.
            Patience::Never => {
                let read = rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT);
                if read == Ok(wanted) { Ok(()) } else { Err(Fault::NotNow) }
            }
        }
    }

    fn unpack(&self, entry: Entry, buf: &mut [u8], patience: Patience) -> Result<(), Fault> {
        thread_local! {
            static TOOLS: RefCell<(zstd::bulk::Decompressor<'static>, Vec<u8>)> =
                RefCell::new((zstd::bulk::Decompressor::default(), Vec::new()));
        }
        match entry {
            Entry::Plain { offset } => self.read(offset, buf, patience),
            Entry::Zstd { offset, len } => TOOLS.with_borrow_mut(|(decompressor, frame)| {
                frame.resize(len as usize, 0);
                self.read(offset, frame, patience)?;
                match decompressor.decompress_to_buffer(frame, buf) {
                    Ok(written) if written == buf.len() => Ok(()),
                    _ => Err(Fault::Frame),
                }
            }),
            Entry::Zero | Entry::Parent => Ok(()),
        }
    }

    /// Tells the kernel that it need not keep what the layer holds of these chunks in memory.
    pub(super) fn forget(&self, chunks: Range<u64>) {
        let forget = |bytes: Range<u64>| {
            if let Some(len) = bytes.end.checked_sub(bytes.start).and_then(NonZeroU64::new) {
                // Advice that is not taken costs some memory, and nothing else.
                let _ = rustix::fs::fadvise(&self.file, bytes.start, Some(len), Advice::DontNeed);
            }
        };
        match &self.form {
            Form::Whole | Form::Pages(_) => {
                forget(chunks.start * CHUNK_BYTES..chunks.end.saturating_mul(CHUNK_BYTES).min(self.size));
            }
            Form::Packed(table) => {
                for index in chunks.start..chunks.end.min(chunk::count(self.size)) {
                    match table.entry(index) {
                        Entry::Plain { offset } => forget(offset..offset + chunk::len(self.size, index) as u64),
                        Entry::Zstd { offset, len } => forget(offset..offset + u64::from(len)),
                        Entry::Zero | Entry::Parent => {}
                    }
                }
            }
        }
    }
}

/// The pages of a chunk, as numbers in the image.
pub(crate) fn pages_of(index: u64) -> Range<u64> {
    let per_chunk = CHUNK_BYTES / PAGE_BYTES;
    index * per_chunk..(index + 1) * per_chunk
}

/// The pages of a chunk that are not the same in two versions of it, as numbers in the image, each with its later bytes.
pub(crate) fn differing_pages<'b>(
    index: u64,
    before: &'b [u8],
    after: &'b [u8],
) -> impl Iterator<Item = (u64, &'b [u8])> {
    let pages = before.chunks(PAGE_BYTES as usize).zip(after.chunks(PAGE_BYTES as usize));
    pages_of(index).zip(pages).filter(|(_, (before, after))| before != after).map(|(page, (_, after))| (page, after))
}

/// How many pages so many bytes are.
pub(super) fn pages_in(len: usize) -> u64 {
    (len as u64).div_ceil(PAGE_BYTES)
}

/// Where pages of a chunk of `len` bytes, counted from its first, lie in it.
pub(crate) fn bytes_of(pages: Range<u64>, len: usize) -> Range<usize> {
    let at = |page: u64| ((page * PAGE_BYTES) as usize).min(len);
    at(pages.start)..at(pages.end)
}

fn zero(pages: Range<u64>, buf: &mut [u8]) {
    let bytes = bytes_of(pages, buf.len());
    buf[bytes].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_of_pages_are_those_that_are_wanted(bits in any::<u16>(), from in 0u64..16, len in 0u64..17) {
            let (pages, within) = (Pages(bits), from..(from + len).min(16));
            let mut seen = [false; 16];
            let mut last = None;
            for run in pages.runs(within.clone()) {
                prop_assert!(run.start < run.end && last.is_none_or(|last| run.start > last));
                last = Some(run.end);
                run.for_each(|page| seen[page as usize] = true);
            }
            for page in 0..16 {
                prop_assert_eq!(seen[page as usize], pages.has(page) && within.contains(&page));
                prop_assert_eq!(pages.without(within.clone()).has(page), pages.has(page) && !within.contains(&page));
                prop_assert_eq!(Pages::first(len).has(page), page < len);
            }
        }
    }
}
