//! Writing the memory image: all of it, or what has changed since another snapshot.

use super::base::Base;
use super::{Cancel, CreateError, LayerSource, MemorySource, Staging};
use crate::chunk::{self, DIGEST_BYTES, Digest, ZeroDigests, is_zero};
use crate::clusters::{Cluster, Clusters};
use crate::image::{ImageError, bytes_of, differing_pages, pages_of};
use crate::manifest::{Memory, MemoryRegion, Packed, PageMap, Parent};
use crate::{CHUNK_BYTES, PAGE_BYTES, file};
use rustix::fs::Mode;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// How changes of a memory are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// With all that has not changed: the snapshot stands alone.
    Whole,
    /// By themselves: the snapshot lies over the one that was there before.
    Changes,
}

/// The memory of a snapshot, as it was written.
#[derive(Debug)]
pub struct MemoryDigest {
    pub(super) regions: Vec<MemoryRegion>,
    pub(super) size_bytes: u64,
    pub(super) data_bytes: u64,
    pub(super) digests: Vec<u8>,
    pub(super) root: blake3::Hash,
    pub(super) file: File,
    pub(super) packed: Option<Packed>,
    pub(super) over: Option<Over>,
}

/// What a memory lies over.
#[derive(Debug)]
pub(super) struct Over {
    pub(super) parent: Parent,
    /// Where the parent is.
    pub(super) dir: PathBuf,
    /// The map of the pages that the image holds; none if it is packed.
    pub(super) map: Option<Vec<u8>>,
}

impl MemoryDigest {
    /// The root digest, in hex.
    pub fn root(&self) -> String {
        self.root.to_hex().to_string()
    }

    /// How much was written, in bytes; the rest are holes.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Name of the image file.
    pub(super) fn name(&self) -> &'static str {
        if self.packed.is_some() { file::PACKED_MEMORY } else { file::MEMORY }
    }

    /// What the manifest says of it.
    pub(super) fn describe(&self) -> Memory {
        let map = self.over.as_ref().and_then(|over| over.map.as_ref());
        Memory {
            file: self.name().into(),
            size_bytes: self.size_bytes,
            regions: self.regions.clone(),
            chunk_bytes: CHUNK_BYTES,
            digests: file::DIGESTS.into(),
            root: self.root(),
            packed: self.packed.clone(),
            parent: self.over.as_ref().map(|over| over.parent.clone()),
            map: map.map(|map| PageMap {
                file: file::PAGE_MAP.into(),
                bytes: map.len() as u64,
                digest: blake3::hash(map).to_hex().to_string(),
            }),
        }
    }
}

impl Staging {
    /// Writes the memory. Zero pages become holes. `cancel` is looked at before each chunk. Nothing is synced to disk
    /// yet: a guest may be standing still meanwhile.
    pub fn write_memory(
        &mut self,
        source: &mut dyn MemorySource,
        cancel: &dyn Cancel,
    ) -> Result<MemoryDigest, CreateError> {
        let (size, regions) = (source.size(), source.regions());
        let file = self.create_memory(&regions, size)?;
        let mut image = ImageWriter::new(&file, size, self.room());
        if let Err(fault) = file.set_len(size).map_err(Fault::Write).and_then(|()| image.copy(source, cancel)) {
            let needed = || image.data_bytes + data_bytes(source, image.position(), cancel);
            return Err(self.failed(file::MEMORY, fault, needed));
        }
        let ImageWriter { digests, data_bytes, .. } = image;
        self.end_memory(file, regions, size, digests, data_bytes, None)
    }

    /// Writes the memory that `base` is where `changes` says nothing else. Of what is said to have changed, what is the same is
    /// left out. What is copied of `base` is checked, since it is stamped as right here; what is not has the digests of `base`.
    pub fn write_changes(
        &mut self,
        base: &Base,
        changes: &dyn LayerSource,
        stored: Stored,
        cancel: &dyn Cancel,
    ) -> Result<MemoryDigest, CreateError> {
        let (size, regions) = (base.image.size(), base.regions.clone());
        if changes.size() != size {
            let source = io::Error::new(io::ErrorKind::InvalidData, "it has another size than it began with");
            return Err(CreateError::Source { offset: 0, source });
        }
        let parent = (stored == Stored::Changes).then(|| self.parent(base)).transpose()?;
        let file = self.create_memory(&regions, size)?;
        let mut image = ImageWriter::new(&file, size, self.room());
        let sized = file.set_len(size).map_err(Fault::Write);
        let held = sized.and_then(|()| image.change(base, changes, stored, cancel)).map_err(|fault| {
            let needed = || match stored {
                Stored::Changes => changes.clusters().data() * PAGE_BYTES,
                Stored::Whole => size,
            };
            self.failed(file::MEMORY, fault, needed)
        })?;
        let ImageWriter { digests, data_bytes, .. } = image;
        let over = parent.map(|parent| Over { parent, dir: base.dir().to_owned(), map: Some(held.encode()) });
        self.end_memory(file, regions, size, digests, data_bytes, over)
    }

    /// What whoever asked for the memory is told. `needed` says how many bytes it takes, if there is no space.
    pub(super) fn failed(&self, name: &str, fault: Fault, needed: impl FnOnce() -> u64) -> CreateError {
        match fault {
            Fault::Cancelled => CreateError::Cancelled,
            Fault::Source { offset, source } => CreateError::Source { offset, source },
            Fault::Base(error) => error.into(),
            Fault::Full(bytes) => self.over_limit(bytes),
            Fault::Write(e) => self.write_error(name, needed(), e),
        }
    }

    /// What the manifest will say of the snapshot that this one lies over.
    pub(super) fn parent(&self, base: &Base) -> Result<Parent, CreateError> {
        let noted = |source| CreateError::Note { path: base.dir().to_owned(), source };
        base.as_parent_of(&self.target_path()).map_err(noted)
    }

    fn create_memory(&self, regions: &[MemoryRegion], size: u64) -> Result<File, CreateError> {
        Memory::check_layout(regions, size)?;
        self.dir().create_file(file::MEMORY).map_err(|e| self.write_error(file::MEMORY, 0, e))
    }

    fn end_memory(
        &mut self,
        file: File,
        regions: Vec<MemoryRegion>,
        size_bytes: u64,
        digests: Vec<u8>,
        data_bytes: u64,
        over: Option<Over>,
    ) -> Result<MemoryDigest, CreateError> {
        // Complete: from here on nobody writes it, and the mode says so.
        let closed = rustix::fs::fchmod(&file, Mode::RUSR);
        closed.map_err(|e| self.write_error(file::MEMORY, data_bytes, e.into()))?;
        let map = over.as_ref().and_then(|over| over.map.as_ref()).map_or(0, Vec::len);
        self.take(data_bytes + map as u64)?;
        let root = blake3::hash(&digests);
        Ok(MemoryDigest { regions, size_bytes, data_bytes, digests, root, file, packed: None, over })
    }
}

/// How many runs of data are looked for to say how much space they take.
const COUNTED_RUNS: usize = 1000;

/// How much of a source, from `at` on, may be data, in bytes: what comes after many runs counts as such, since a guest may be
/// standing still meanwhile.
fn data_bytes(source: &mut dyn MemorySource, mut at: u64, cancel: &dyn Cancel) -> u64 {
    let (size, mut sum) = (source.size(), 0);
    for _ in 0..COUNTED_RUNS {
        match source.next_data(at) {
            Ok(Some(range)) if range.end > at && !cancel.is_cancelled() => {
                sum += range.end - range.start.max(at);
                at = range.end;
            }
            _ => return sum,
        }
    }
    sum + size.saturating_sub(at)
}

/// Why copying memory stopped.
pub(super) enum Fault {
    Cancelled,
    Source {
        offset: u64,
        source: io::Error,
    },
    /// What it lies over cannot be read.
    Base(ImageError),
    Write(io::Error),
    /// There is no room for so many bytes of data.
    Full(u64),
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Self {
        Fault::Base(error)
    }
}

/// Puts the changes of a chunk over it.
fn overlay(index: u64, chunk: &mut [u8], changes: &dyn LayerSource) -> io::Result<()> {
    let first = pages_of(index).start;
    for (run, state) in changes.clusters().runs(pages_of(index)) {
        let bytes = bytes_of(run.start - first..run.end - first, chunk.len());
        match state {
            Cluster::Absent => {}
            Cluster::Data => changes.read(run.start * PAGE_BYTES, &mut chunk[bytes])?,
            Cluster::Zero => chunk[bytes].fill(0),
        }
    }
    Ok(())
}

/// Writes an image and digests it on the way.
struct ImageWriter<'f> {
    file: &'f File,
    size: u64,
    /// Digests of the chunks so far, 32 bytes each.
    digests: Vec<u8>,
    data_bytes: u64,
    /// Most that it may write, in bytes.
    room: u64,
}

impl<'f> ImageWriter<'f> {
    fn new(file: &'f File, size: u64, room: u64) -> ImageWriter<'f> {
        let digests = Vec::with_capacity(size.div_ceil(CHUNK_BYTES) as usize * 32);
        ImageWriter { file, size, digests, data_bytes: 0, room }
    }

    /// How far it has come, in bytes: what follows may have been written in part.
    fn position(&self) -> u64 {
        (self.digests.len() / DIGEST_BYTES) as u64 * CHUNK_BYTES
    }

    fn copy(&mut self, source: &mut dyn MemorySource, cancel: &dyn Cancel) -> Result<(), Fault> {
        let zero = ZeroDigests::new(self.size);
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let chunks = self.size.div_ceil(CHUNK_BYTES);
        let mut index = 0;
        while index < chunks {
            let at = index * CHUNK_BYTES;
            let data = source.next_data(at).map_err(|source| Fault::Source { offset: at, source })?;
            let (from, to) = match data {
                Some(range) if range.end > at && range.start < self.size => {
                    (range.start.max(at) / CHUNK_BYTES, range.end.min(self.size).div_ceil(CHUNK_BYTES))
                }
                Some(_) => {
                    let source = io::Error::new(io::ErrorKind::InvalidData, "its next data lies outside it");
                    return Err(Fault::Source { offset: at, source });
                }
                None => (chunks, chunks),
            };
            for hole in index..from {
                self.digests.extend_from_slice(zero.of(hole));
            }
            for chunk in from..to {
                cancel.progress(self.data_bytes);
                if cancel.is_cancelled() {
                    return Err(Fault::Cancelled);
                }
                let offset = chunk * CHUNK_BYTES;
                let buf = &mut buf[..(self.size - offset).min(CHUNK_BYTES) as usize];
                source.read(offset, buf).map_err(|source| Fault::Source { offset, source })?;
                if is_zero(buf) {
                    self.digests.extend_from_slice(zero.of(chunk));
                } else {
                    self.write_pages(offset, buf)?;
                    self.digests.extend_from_slice(blake3::hash(buf).as_bytes());
                }
            }
            index = to;
        }
        Ok(())
    }

    /// Writes what `base` is with these changes. Returns which pages the file then holds, if it is to hold changes.
    fn change(
        &mut self,
        base: &Base,
        changes: &dyn LayerSource,
        stored: Stored,
        cancel: &dyn Cancel,
    ) -> Result<Clusters, Fault> {
        let (zero, mut held) = (ZeroDigests::new(self.size), Clusters::new(self.size));
        let (mut before, mut after) = (vec![0; CHUNK_BYTES as usize], vec![0; CHUNK_BYTES as usize]);
        for index in 0..chunk::count(self.size) {
            cancel.progress(self.data_bytes);
            if cancel.is_cancelled() {
                return Err(Fault::Cancelled);
            }
            let (offset, len) = (index * CHUNK_BYTES, chunk::len(self.size, index));
            let (before, after) = (&mut before[..len], &mut after[..len]);
            let is_changed = changes.clusters().runs(pages_of(index)).any(|(_, state)| state != Cluster::Absent);
            let old = base.image.digests().get(index).expect("there are as many digests as chunks");
            if !is_changed {
                self.digests.extend_from_slice(old);
                if stored == Stored::Whole && !base.image.chunk_is_zero(index) {
                    base.image.read_chunk(index, before)?;
                    self.write_pages(offset, before)?;
                }
                continue;
            }
            base.image.read_chunk(index, before)?;
            after.copy_from_slice(before);
            overlay(index, after, changes).map_err(|source| Fault::Source { offset, source })?;
            let new: Digest = if is_zero(after) { *zero.of(index) } else { chunk::digest(after) };
            self.digests.extend_from_slice(&new);
            match stored {
                Stored::Whole => self.write_pages(offset, after)?,
                Stored::Changes if new == *old => {}
                Stored::Changes => {
                    for (page, now) in differing_pages(index, before, after) {
                        held.set(page..page + 1, if is_zero(now) { Cluster::Zero } else { Cluster::Data });
                    }
                    let first = pages_of(index).start;
                    for (run, _) in held.runs(pages_of(index)).filter(|(_, state)| *state == Cluster::Data) {
                        self.write(run.start * PAGE_BYTES, &after[bytes_of(run.start - first..run.end - first, len)])?;
                    }
                }
            }
        }
        Ok(held)
    }

    /// Writes the runs of pages that are not zero.
    fn write_pages(&mut self, offset: u64, chunk: &[u8]) -> Result<(), Fault> {
        let page_end = |at: usize| (at + PAGE_BYTES as usize).min(chunk.len());
        let mut at = 0;
        while at < chunk.len() {
            let mut end = at;
            while end < chunk.len() && !is_zero(&chunk[end..page_end(end)]) {
                end = page_end(end);
            }
            if end > at {
                self.write(offset + at as u64, &chunk[at..end])?;
            }
            // The page at `end`, if any, is zero.
            at = page_end(end);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let data_bytes = self.data_bytes + bytes.len() as u64;
        if data_bytes > self.room {
            return Err(Fault::Full(data_bytes));
        }
        self.file.write_all_at(bytes, offset).map_err(Fault::Write)?;
        self.data_bytes = data_bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Every other page is data; counts how often it is asked.
    struct Alternating(usize);

    const SIZE: u64 = 1 << 40;

    impl MemorySource for Alternating {
        fn size(&self) -> u64 {
            SIZE
        }

        fn regions(&self) -> Vec<MemoryRegion> {
            Vec::new()
        }

        fn next_data(&mut self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
            self.0 += 1;
            let page = (from / PAGE_BYTES).next_multiple_of(2) * PAGE_BYTES;
            Ok((page < SIZE).then_some(page..page + PAGE_BYTES))
        }

        fn read(&mut self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_memory_takes_is_said_without_a_walk_over_all_of_it() {
        let cancel = AtomicBool::new(false);
        let end = SIZE - 8 * PAGE_BYTES;
        assert_eq!(data_bytes(&mut Alternating(0), end, &cancel), 4 * PAGE_BYTES);
        let mut source = Alternating(0);
        let most = data_bytes(&mut source, 0, &cancel);
        assert!((SIZE / 2..=SIZE).contains(&most) && source.0 <= COUNTED_RUNS, "{most} after {}", source.0);
        cancel.store(true, Ordering::Relaxed);
        let mut source = Alternating(0);
        data_bytes(&mut source, 0, &cancel);
        assert_eq!(source.0, 1);
    }
}
