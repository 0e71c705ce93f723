//! Which images the kernel may page in by itself, where nobody can check: those that were checked as a whole and have not changed
//! since.

use super::layer::{Form, Layer};
use super::{ImageError, MemoryImage, open_digests, open_map};
use crate::CHUNK_BYTES;
use crate::clusters::Clusters;
use crate::create::next_data;
use crate::file;
use crate::load::{Level, Snapshot};
use crate::packed;
use crate::stamp::Stamp;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Memory of a snapshot that is what the snapshot was made with.
#[derive(Debug)]
pub struct Trust {
    /// Where it is.
    pub memory: TrustedMemory,
    /// Why it is trusted.
    pub basis: Basis,
}

/// Where memory is.
#[derive(Debug)]
pub enum TrustedMemory {
    /// In these files, that can be mapped: the uppermost first. The last holds all of it.
    Files(Vec<TrustedLayer>),
    /// In an image that has to be read, as it is packed. Each chunk is checked then.
    Image(Box<MemoryImage>),
}

/// A file of which pages can be mapped, each at its place in the memory image.
#[derive(Debug)]
pub struct TrustedLayer {
    /// The file that was checked, open for reading. Map this one.
    pub file: File,
    /// Which pages it holds, as clusters: those that are data in the file, others as zeros. `None`: all of them.
    pub pages: Option<Clusters>,
}

/// Why memory is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Stamps say that it has not changed since it was checked.
    Stamp,
    /// It was checked now.
    Verified {
        /// How much was read, in bytes.
        bytes: u64,
    },
    /// It is checked when it is read.
    WhenRead,
}

/// Makes sure that the image files as a whole are what the snapshot was made with, for the case that the kernel pages them
/// in and nobody can check. A matching stamp is enough; otherwise a file is read and checked now, and stamped.
pub fn ensure_trusted(snapshot: &Snapshot) -> Result<Trust, ImageError> {
    let levels = levels(snapshot)?;
    if levels.iter().any(|level| level.manifest.memory.packed.is_some()) {
        let image = Box::new(MemoryImage::of(&levels)?);
        return Ok(Trust { memory: TrustedMemory::Image(image), basis: Basis::WhenRead });
    }
    let (mut files, mut checked) = (Vec::new(), None);
    for at in (0..levels.len()).rev() {
        if let Some(bytes) = ensure_level(&levels[at..])? {
            *checked.get_or_insert(0) += bytes;
        }
        let level = levels[at];
        let file = level.file()?.try_clone().map_err(|source| unreadable(level, source))?;
        files.push(TrustedLayer { file, pages: open_map(level)? });
    }
    files.reverse();
    let basis = checked.map_or(Basis::Stamp, |bytes| Basis::Verified { bytes });
    Ok(Trust { memory: TrustedMemory::Files(files), basis })
}

/// Makes sure that the file at `path` holds the memory of the snapshot, for the same case. If it is the snapshot's own memory
/// file, by whatever name, that is [`ensure_trusted`]; any other is read and checked each time.
pub fn ensure_same(snapshot: &Snapshot, path: &Path) -> Result<Trust, ImageError> {
    let unreadable = |source: io::Error| ImageError::Read { path: path.to_owned(), offset: 0, source };
    // NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for regular files.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = opened.map(File::from).map_err(|e| ImageError::Open { path: path.to_owned(), source: e.into() })?;
    let (metadata, own) = (file.metadata().map_err(unreadable)?, snapshot.level().file()?.metadata());
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
    let layer = Layer { file, path: path.to_owned(), form: Form::Whole, size: found };
    let mut image = MemoryImage { layers: vec![layer], digests: open_digests(snapshot.level())? };
    let bytes = image.check(None)?.whole().map_err(|differs| match differs {
        ImageError::Damaged { path, offset } => ImageError::OtherMemory { path, offset },
        other => other,
    })?;
    let Layer { file, path, .. } = image.layers.remove(0);
    if !before.still_fits(&file).map_err(unreadable)? {
        return Err(ImageError::Changed { path });
    }
    let memory = TrustedMemory::Files(vec![TrustedLayer { file, pages: None }]);
    Ok(Trust { memory, basis: Basis::Verified { bytes } })
}

/// What the memory of a snapshot is made of, the uppermost first.
pub(crate) fn levels(snapshot: &Snapshot) -> Result<Vec<&Level>, ImageError> {
    let below = snapshot.below().map_err(|e| ImageError::Parent(Box::new(e)))?;
    Ok(std::iter::once(snapshot.level()).chain(below).collect())
}

/// Checks the first of these levels unless its stamp says that this was done, given that the others are right. Returns how much was
/// read, if it was.
fn ensure_level(levels: &[&Level]) -> Result<Option<u64>, ImageError> {
    let level = levels[0];
    let now = stamp_of(level)?;
    if Stamp::read(&level.dir, file::STAMP).as_ref() == Some(&now) {
        return Ok(None);
    }
    let bytes = check_level(levels)?.whole()?;
    stamp(level, &now)?;
    Ok(Some(bytes))
}

/// Compares what the first of these levels holds with its digests.
pub(crate) fn check_level(levels: &[&Level]) -> Result<super::Checked, ImageError> {
    if let Some(hole) = find_packed_hole(levels[0])? {
        return Ok(super::Checked { bytes: 0, damaged: 1, first: Some(hole) });
    }
    let below = levels.get(1).map(|level| open_digests(level)).transpose()?;
    let mut checked = MemoryImage::of(levels)?.check(below.as_ref())?;
    if checked.first.is_none() {
        checked.first = check_packed_data(levels[0])?;
        checked.damaged += u64::from(checked.first.is_some());
    }
    Ok(checked)
}

/// Looks for a hole in a packed image that is as long as two chunks. None has any, as no chunk that is stored is zero and none takes
/// more room than its bytes: what claims to be longer than what is there is not read through.
fn find_packed_hole(level: &Level) -> Result<Option<ImageError>, ImageError> {
    let Some(packed) = &level.manifest.memory.packed else { return Ok(None) };
    let (file, mut at) = (level.file()?, packed::index_bytes(level.manifest.memory.size_bytes));
    let unreadable = |source| unreadable(level, source);
    while at < packed.file_bytes {
        let data = next_data(file, at, packed.file_bytes).map_err(unreadable)?;
        let data = data.unwrap_or(packed.file_bytes..packed.file_bytes);
        if data.start - at >= 2 * CHUNK_BYTES {
            return Ok(Some(ImageError::PackedHole { path: level.path(), offset: at }));
        }
        at = data.end;
    }
    Ok(None)
}

/// Compares all that a packed image stores, however little of it counts, with its digest.
fn check_packed_data(level: &Level) -> Result<Option<ImageError>, ImageError> {
    let memory = &level.manifest.memory;
    let Some(packed) = &memory.packed else { return Ok(None) };
    let (file, mut hasher, mut buf) = (level.file()?, blake3::Hasher::new(), vec![0; PIECE]);
    let start = packed::index_bytes(memory.size_bytes);
    let mut at = start;
    while at < packed.file_bytes {
        let buf = &mut buf[..(packed.file_bytes - at).min(PIECE as u64) as usize];
        file.read_exact_at(buf, at).map_err(|source| ImageError::Read { path: level.path(), offset: at, source })?;
        hasher.update(buf);
        at += buf.len() as u64;
    }
    let is_right = hasher.finalize().to_hex().as_str() == packed.data_digest;
    Ok((!is_right).then(|| ImageError::PackedData { path: level.path() }))
}

/// How much of a file is read at a time, in bytes.
const PIECE: usize = 1 << 20;

/// The stamp that fits the image file of a level as it is now.
pub(crate) fn stamp_of(level: &Level) -> Result<Stamp, ImageError> {
    Stamp::of(level.file()?, &level.manifest.memory.root).map_err(|source| unreadable(level, source))
}

/// Stamps an image that was found right, if it is still as it was before the check.
pub(crate) fn stamp(level: &Level, before: &Stamp) -> Result<(), ImageError> {
    match before.confirm(level.file()?, &level.dir, file::STAMP) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ImageError::Changed { path: level.path() }),
        Err(source) => Err(unreadable(level, source)),
    }
}

fn unreadable(level: &Level, source: io::Error) -> ImageError {
    ImageError::Read { path: level.path(), offset: 0, source }
}
