//! The memory image: served chunk by chunk, each checked ([`MemoryImage`]), or mapped whole after it was checked once
//! ([`ensure_trusted`]).

use crate::create::next_data;
use crate::digests::Digests;
use crate::dir::FileError;
use crate::load::Snapshot;
use crate::stamp::Stamp;
use crate::{CHUNK_BYTES, file};
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::ReadWriteFlags;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Why a memory image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file is absent, is no regular file, has the wrong length or cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The digests are not those of the manifest.
    #[error("{path} is damaged or belongs to another snapshot: it does not match the manifest; copy it again")]
    Digests {
        /// The file of digests.
        path: PathBuf,
    },
    /// A chunk's bytes are not those that the snapshot was made with.
    #[error(
        "{path} is damaged at offset {offset:#x}: the digest of that chunk does not match; copy it again or create the snapshot anew"
    )]
    Damaged {
        /// The memory image.
        path: PathBuf,
        /// Where the chunk begins, in bytes.
        offset: u64,
    },
    /// A file that is offered in the place of the memory image cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no file.
    #[error("{path} is not a regular file; name the snapshot's memory file, or a copy of it")]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// It has another length.
    #[error(
        "{path} has {found} bytes and the snapshot's memory {expected}: it is of another snapshot, or was cut short"
    )]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        found: u64,
        /// That of the memory image, in bytes.
        expected: u64,
    },
    /// It holds something else.
    #[error(
        "{path} is not the snapshot's memory: it differs in the chunk at offset {offset:#x}; it is of another snapshot, was changed, or was copied badly"
    )]
    OtherMemory {
        /// The file.
        path: PathBuf,
        /// Where the chunk begins, in bytes.
        offset: u64,
    },
    /// There is no such chunk.
    #[error("{path} has {chunks} chunks; chunk {index} was asked for")]
    NoSuchChunk {
        /// The memory image.
        path: PathBuf,
        /// The chunk that was asked for.
        index: u64,
        /// How many there are.
        chunks: u64,
    },
    /// Somebody wrote the image while it was being checked.
    #[error("{path} changed while it was being checked; nothing may write to a snapshot")]
    Changed {
        /// The memory image.
        path: PathBuf,
    },
    /// The image cannot be read.
    #[error("cannot read {path} at offset {offset:#x}: {source}")]
    Read {
        /// The memory image.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// A memory image from which single chunks are read. What it hands out is what the snapshot was made with.
///
/// It can be shared by threads.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    path: PathBuf,
    digests: Digests,
}

impl MemoryImage {
    /// Opens the image of a snapshot and checks its digests against the manifest.
    pub fn open(snapshot: &Snapshot) -> Result<MemoryImage, ImageError> {
        let (dir, memory) = (snapshot.open_dir(), &snapshot.manifest().memory);
        let path = dir.join(&memory.file);
        let file = snapshot.memory_file()?.try_clone();
        let file = file.map_err(|source| ImageError::Read { path: path.clone(), offset: 0, source })?;
        let table = dir.read_sized(&memory.digests, Digests::table_bytes(memory))?;
        let digests = Digests::check(memory, &table);
        let digests = digests.map_err(|_| ImageError::Digests { path: dir.join(&memory.digests) })?;
        Ok(MemoryImage { file, path, digests })
    }

    /// Size of the image, in bytes.
    pub fn size(&self) -> u64 {
        self.digests.size()
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.digests.chunks()
    }

    /// Root digest, in hex. Two images with the same root hold the same memory.
    pub fn root(&self) -> &str {
        self.digests.root()
    }

    /// The image file, open for reading. Nothing has checked what is read or mapped from it directly.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a chunk is all zero. Chunks beyond the end are.
    pub fn chunk_is_zero(&self, index: u64) -> bool {
        self.digests.is_zero(index)
    }

    /// Reads and checks a chunk into the beginning of `buf`, which must have room for it, and returns its length: that
    /// of a chunk ([`CHUNK_BYTES`]), or less for the last one.
    ///
    /// # Panics
    ///
    /// If `buf` is shorter than the chunk.
    pub fn read_chunk(&self, index: u64, buf: &mut [u8]) -> Result<usize, ImageError> {
        let read = self.read_checked(index, buf, |buf| self.read_from_file(index, buf).map(|()| true))?;
        Ok(read.unwrap_or_default())
    }

    /// As [`MemoryImage::read_chunk`], but never waits for a disk: `None` if that is where the bytes are.
    ///
    /// # Panics
    ///
    /// If `buf` is shorter than the chunk.
    pub fn read_chunk_now(&self, index: u64, buf: &mut [u8]) -> Result<Option<usize>, ImageError> {
        self.read_checked(index, buf, |buf| Ok(self.read_from_cache(index, buf)))
    }

    /// Fills the beginning of `buf` with a chunk, by means of `read` if it is not all zero, and checks it; `None` if
    /// `read` says that it has not read it.
    fn read_checked(
        &self,
        index: u64,
        buf: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> Result<bool, ImageError>,
    ) -> Result<Option<usize>, ImageError> {
        if index >= self.chunks() {
            return Err(ImageError::NoSuchChunk { path: self.path.clone(), index, chunks: self.chunks() });
        }
        let buf = &mut buf[..self.digests.chunk_len(index)];
        if self.digests.is_zero(index) {
            // What the snapshot was made with, whatever the file holds there.
            buf.fill(0);
            return Ok(Some(buf.len()));
        }
        if !read(buf)? {
            return Ok(None);
        }
        if !self.digests.is_right(index, buf) {
            return Err(self.damaged(index));
        }
        Ok(Some(buf.len()))
    }

    /// Tells the kernel that these chunks of the file will hardly be read again, so that it need not keep them in memory.
    pub fn forget(&self, chunks: Range<u64>) {
        let (start, end) = (chunks.start * CHUNK_BYTES, (chunks.end * CHUNK_BYTES).min(self.size()));
        if let Some(len) = end.checked_sub(start).and_then(NonZeroU64::new) {
            // Advice that is not taken costs some memory, and nothing else.
            let _ = rustix::fs::fadvise(&self.file, start, Some(len), Advice::DontNeed);
        }
    }

    fn read_from_file(&self, index: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let offset = index * CHUNK_BYTES;
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|source| ImageError::Read { path: self.path.clone(), offset, source })
    }

    /// Fills `buf` with what the kernel has in memory; false if it has not all of it, or fails, which a read that may wait
    /// will say better.
    fn read_from_cache(&self, index: u64, buf: &mut [u8]) -> bool {
        let (offset, wanted) = (index * CHUNK_BYTES, buf.len());
        rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) == Ok(wanted)
    }

    fn damaged(&self, index: u64) -> ImageError {
        ImageError::Damaged { path: self.path.clone(), offset: index * CHUNK_BYTES }
    }

    /// Compares the whole file with the digests, holes that should be data and data that should be holes included.
    /// `damaged` hears of each chunk that differs; an error from it ends the search. Returns the bytes that were read.
    pub(crate) fn check_file(
        &self,
        mut damaged: impl FnMut(ImageError) -> Result<(), ImageError>,
    ) -> Result<u64, ImageError> {
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let (mut bytes, mut index) = (0, 0);
        while index < self.chunks() {
            let at = index * CHUNK_BYTES;
            let data = next_data(&self.file, at, self.size());
            let data = data.map_err(|source| ImageError::Read { path: self.path.clone(), offset: at, source })?;
            let (from, to) = match data {
                Some(range) => (range.start / CHUNK_BYTES, range.end.div_ceil(CHUNK_BYTES)),
                None => (self.chunks(), self.chunks()),
            };
            for hole in (index..from).filter(|i| !self.chunk_is_zero(*i)) {
                damaged(self.damaged(hole))?;
            }
            for chunk in from..to {
                let buf = &mut buf[..self.digests.chunk_len(chunk)];
                self.read_from_file(chunk, buf)?;
                bytes += buf.len() as u64;
                if !self.digests.is_right(chunk, buf) {
                    damaged(self.damaged(chunk))?;
                }
            }
            index = to;
        }
        Ok(bytes)
    }
}

/// A memory image that may be mapped.
#[derive(Debug)]
pub struct Trust {
    /// The file that was checked, open for reading. Map this one.
    pub file: File,
    /// Why it is trusted.
    pub basis: Basis,
}

/// Why a memory image is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Its stamp says that it has not changed since it was checked.
    Stamp,
    /// It was checked now.
    Verified {
        /// How much was read, in bytes.
        bytes: u64,
    },
}

/// Makes sure that the image file as a whole is what the snapshot was made with, for the case that the kernel pages it
/// in and nobody can check. A matching stamp is enough; otherwise the file is read and checked now, and stamped.
pub fn ensure_trusted(snapshot: &Snapshot) -> Result<Trust, ImageError> {
    let root = &snapshot.manifest().memory.root;
    let path = || snapshot.open_dir().join(&snapshot.manifest().memory.file);
    let unreadable = |source| ImageError::Read { path: path(), offset: 0, source };
    let file = snapshot.memory_file()?.try_clone().map_err(unreadable)?;
    let now = Stamp::of(&file, root).map_err(unreadable)?;
    if Stamp::read(snapshot.open_dir(), file::STAMP).as_ref() == Some(&now) {
        return Ok(Trust { file, basis: Basis::Stamp });
    }
    let bytes = MemoryImage::open(snapshot)?.check_file(Err)?;
    stamp(snapshot, &now)?;
    Ok(Trust { file, basis: Basis::Verified { bytes } })
}

/// Makes sure that the file at `path` holds the memory of the snapshot, for the same case. If it is the snapshot's own memory
/// file, by whatever name, that is [`ensure_trusted`]; any other is read and checked each time.
pub fn ensure_same(snapshot: &Snapshot, path: &Path) -> Result<Trust, ImageError> {
    let unreadable = |source: io::Error| ImageError::Read { path: path.to_owned(), offset: 0, source };
    // NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for regular files.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = opened.map(File::from).map_err(|e| ImageError::Open { path: path.to_owned(), source: e.into() })?;
    let (metadata, own) = (file.metadata().map_err(unreadable)?, snapshot.memory_file()?.metadata());
    if !metadata.is_file() {
        return Err(ImageError::NotRegular { path: path.to_owned() });
    }
    if own.is_ok_and(|own| (own.dev(), own.ino()) == (metadata.dev(), metadata.ino())) {
        return ensure_trusted(snapshot);
    }
    let memory = &snapshot.manifest().memory;
    let (found, expected) = (metadata.len(), memory.size_bytes);
    if found != expected {
        return Err(ImageError::OtherSize { path: path.to_owned(), found, expected });
    }
    let before = Stamp::of(&file, &memory.root).map_err(unreadable)?;
    let own = MemoryImage::open(snapshot)?;
    let image = MemoryImage { file, path: path.to_owned(), ..own };
    let bytes = image.check_file(|differs| match differs {
        ImageError::Damaged { path, offset } => Err(ImageError::OtherMemory { path, offset }),
        other => Err(other),
    })?;
    if !before.still_fits(&image.file).map_err(unreadable)? {
        return Err(ImageError::Changed { path: image.path });
    }
    Ok(Trust { file: image.file, basis: Basis::Verified { bytes } })
}

/// Stamps an image that was found right, if it is still as it was before the check.
pub(crate) fn stamp(snapshot: &Snapshot, before: &Stamp) -> Result<(), ImageError> {
    let path = || snapshot.open_dir().join(&snapshot.manifest().memory.file);
    match before.confirm(snapshot.memory_file()?, snapshot.open_dir(), file::STAMP) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ImageError::Changed { path: path() }),
        Err(source) => Err(ImageError::Read { path: path(), offset: 0, source }),
    }
}
