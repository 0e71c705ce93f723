//! The memory image: served chunk by chunk, each checked ([`MemoryImage`]), or mapped whole after it was checked once
//! ([`ensure_trusted`]).
//!
//! An image is one file or several over each other: that of a snapshot and, where it holds nothing, those of its parents. The digests
//! of the uppermost are those of what is seen, so they check it wherever it comes from.

mod check;
mod layer;
mod trust;

pub(crate) use check::Checked;
pub(crate) use layer::{bytes_of, differing_pages, pages_of};
pub use trust::{Basis, Trust, TrustedLayer, TrustedMemory, ensure_same, ensure_trusted};
pub(crate) use trust::{check_level, levels, stamp, stamp_of};

use crate::CHUNK_BYTES;
use crate::clusters::{Clusters, MapError};
use crate::digests::Digests;
use crate::dir::FileError;
use crate::load::{Level, LoadError, Snapshot};
use crate::packed::{self, Index, IndexError};
use layer::{Fault, Form, Layer, Pages, Patience};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

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
    /// The map of pages is not that of the manifest.
    #[error("{path} is damaged or belongs to another snapshot: its digest does not match; copy it again")]
    MapDigest {
        /// The map.
        path: PathBuf,
    },
    /// The map of pages cannot be decoded.
    #[error("{path} cannot be used: {source}; the snapshot was not written by this program")]
    Map {
        /// The map.
        path: PathBuf,
        /// What is wrong.
        source: MapError,
    },
    /// The index of a packed image is not that of the manifest.
    #[error("{path} is damaged or belongs to another snapshot: the digest of its index does not match; copy it again")]
    IndexDigest {
        /// The packed image.
        path: PathBuf,
    },
    /// The index of a packed image cannot be decoded.
    #[error("{path} cannot be used: {source}; the snapshot was not written by this program")]
    Index {
        /// The packed image.
        path: PathBuf,
        /// What is wrong.
        source: IndexError,
    },
    /// What a packed image stores is not what was stored, though all chunks can still be read from it.
    #[error(
        "{path} was changed: its digest does not match, though every chunk of memory in it is right; copy it again"
    )]
    PackedData {
        /// The packed image.
        path: PathBuf,
    },
    /// Nothing is where a packed image has chunks.
    #[error("{path} has a hole at offset {offset:#x}, as no packed image has: it was copied badly; copy it again")]
    PackedHole {
        /// The packed image.
        path: PathBuf,
        /// Where the hole begins, in bytes.
        offset: u64,
    },
    /// A snapshot whose memory is below cannot be used.
    #[error(transparent)]
    Parent(Box<LoadError>),
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
    /// The uppermost first. The last holds every chunk.
    layers: Vec<Layer>,
    digests: Digests,
}

impl MemoryImage {
    /// Opens the image of a snapshot, those of its parents included, and checks its digests against the manifest.
    pub fn open(snapshot: &Snapshot) -> Result<MemoryImage, ImageError> {
        MemoryImage::of(&trust::levels(snapshot)?)
    }

    /// The image that is seen over these levels, the uppermost first.
    fn of(levels: &[&Level]) -> Result<MemoryImage, ImageError> {
        let layers = levels.iter().map(|level| open_layer(level)).collect::<Result<_, _>>()?;
        Ok(MemoryImage { layers, digests: open_digests(levels[0])? })
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

    /// How it is stored, in one word.
    pub fn kind(&self) -> &'static str {
        match (&self.layers[0].form, self.layers.len()) {
            (_, 2..) => "chain",
            (Form::Packed(_), _) => "packed",
            _ => "file",
        }
    }

    /// How many bytes of the file, if it is packed, are of chunks that clones were known to use when it was.
    pub fn hot_bytes(&self) -> u64 {
        match &self.layers[0].form {
            Form::Packed(index) => index.hot_bytes(),
            Form::Whole | Form::Pages(_) => 0,
        }
    }

    /// The digests.
    pub fn digests(&self) -> &Digests {
        &self.digests
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
        Ok(self.read_checked(index, buf, Patience::Waits)?.unwrap_or_default())
    }

    /// As [`MemoryImage::read_chunk`], but never waits for a disk: `None` if that is where the bytes are.
    ///
    /// # Panics
    ///
    /// If `buf` is shorter than the chunk.
    pub fn read_chunk_now(&self, index: u64, buf: &mut [u8]) -> Result<Option<usize>, ImageError> {
        self.read_checked(index, buf, Patience::Never)
    }

    fn read_checked(&self, index: u64, buf: &mut [u8], patience: Patience) -> Result<Option<usize>, ImageError> {
        if index >= self.chunks() {
            return Err(ImageError::NoSuchChunk { path: self.layers[0].path.clone(), index, chunks: self.chunks() });
        }
        let buf = &mut buf[..self.digests.chunk_len(index)];
        if self.digests.is_zero(index) {
            // What the snapshot was made with, whatever the files hold there.
            buf.fill(0);
            return Ok(Some(buf.len()));
        }
        if !self.assemble(index, buf, patience)? {
            return Ok(None);
        }
        if !self.digests.is_right(index, buf) {
            return Err(self.damaged(index));
        }
        Ok(Some(buf.len()))
    }

    /// Fills `buf`, which has the length of the chunk, with what the layers hold. False if they would have to wait.
    fn assemble(&self, index: u64, buf: &mut [u8], patience: Patience) -> Result<bool, ImageError> {
        let mut wanted = Pages::first(layer::pages_in(buf.len()));
        for layer in &self.layers {
            wanted = match layer.fill(index, buf, wanted, patience) {
                Ok(Pages::NONE) => return Ok(true),
                Ok(left) => left,
                Err(Fault::NotNow) => return Ok(false),
                Err(Fault::Frame) => {
                    return Err(ImageError::Damaged { path: layer.path.clone(), offset: index * CHUNK_BYTES });
                }
                Err(Fault::Read(offset, source)) => {
                    return Err(ImageError::Read { path: layer.path.clone(), offset, source });
                }
            };
        }
        // The lowest layer holds all.
        Ok(true)
    }

    /// Tells the kernel that these chunks of the files will hardly be read again, so that it need not keep them in memory.
    pub fn forget(&self, chunks: Range<u64>) {
        self.layers.iter().for_each(|layer| layer.forget(chunks.clone()));
    }

    /// The chunk is damaged, in the uppermost layer that has to do with it, or below.
    fn damaged(&self, index: u64) -> ImageError {
        let layer = self.layers.iter().find(|layer| layer.holds(index)).unwrap_or(&self.layers[0]);
        ImageError::Damaged { path: layer.path.clone(), offset: index * CHUNK_BYTES }
    }
}

fn open_digests(level: &Level) -> Result<Digests, ImageError> {
    let (dir, memory) = (&level.dir, &level.manifest.memory);
    let table = dir.read_sized(&memory.digests, Digests::table_bytes(memory))?;
    Digests::check(memory, &table).map_err(|_| ImageError::Digests { path: dir.join(&memory.digests) })
}

fn open_layer(level: &Level) -> Result<Layer, ImageError> {
    let (path, size) = (level.path(), level.manifest.memory.size_bytes);
    let unreadable = |source| ImageError::Read { path: path.clone(), offset: 0, source };
    let file = level.file()?.try_clone().map_err(unreadable)?;
    let memory = &level.manifest.memory;
    let form = match (&memory.packed, open_map(level)?) {
        (Some(packed), _) => {
            let mut bytes = vec![0; packed::index_bytes(size).min(packed.file_bytes) as usize];
            file.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
            if blake3::hash(&bytes).to_hex().as_str() != packed.index_digest {
                return Err(ImageError::IndexDigest { path });
            }
            let index = Index::decode(&bytes, size, packed.file_bytes, memory.parent.is_some());
            Form::Packed(index.map_err(|source| ImageError::Index { path: path.clone(), source })?)
        }
        (None, Some(map)) => Form::Pages(map),
        (None, None) => Form::Whole,
    };
    Ok(Layer { file, path, form, size })
}

/// Which pages a level with a parent holds.
fn open_map(level: &Level) -> Result<Option<Clusters>, ImageError> {
    let Level { dir, manifest, .. } = level;
    let Some(map) = &manifest.memory.map else { return Ok(None) };
    let path = || dir.join(&map.file);
    let bytes = dir.read_digested(&map.file, map.bytes, &map.digest)?;
    let bytes = bytes.ok_or_else(|| ImageError::MapDigest { path: path() })?;
    let clusters = Clusters::decode(&bytes, manifest.memory.size_bytes);
    clusters.map(Some).map_err(|source| ImageError::Map { path: path(), source })
}
