//! The same snapshot once more, with its memory stored otherwise: packed or not, over another snapshot or alone.
//!
//! Everything else is as it was: the state, the disks, the time, and what is known of which pages clones use.

use super::Job;
use crate::CHUNK_BYTES;
use crate::clusters::{Cluster, Clusters};
use crate::create::{
    Base, BaseError, Cancel, CreateError, LayerSource, MemoryDigest, MemorySource, Packing, Staging, Stored,
};
use crate::disk::DiskError;
use crate::image::{ImageError, MemoryImage, pages_of};
use crate::load::{self, LoadError, Snapshot};
use crate::manifest::MemoryRegion;
use crate::working_set::WorkingSet;
use serde::Serialize;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// How memory is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As it is.
    Raw,
    /// Each chunk once, and compressed.
    Packed,
}

/// A snapshot that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Its directory.
    pub path: PathBuf,
    /// Version of the format.
    pub format_version: u32,
    /// Digest of its manifest, in hex.
    pub digest: String,
    /// Root digest of its memory, in hex: that of the snapshot that it was made from.
    pub root: String,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// What the memory image takes, in bytes, without holes.
    pub image_bytes: u64,
    /// Whether the memory is packed.
    pub packed: bool,
    /// The snapshot that it lies over, as its manifest says.
    pub parent: Option<String>,
    /// Whether it came with a working set.
    pub working_set: bool,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Written { path, digest, root, memory_bytes, image_bytes, packed, parent, working_set, .. } = self;
        writeln!(f, "{} is written", path.display())?;
        let form = if *packed { "packed" } else { "raw" };
        writeln!(f, "  memory   {} MiB in {} KiB, {form}", memory_bytes >> 20, image_bytes.div_ceil(1024))?;
        if let Some(parent) = parent {
            writeln!(f, "  over     {parent}")?;
        }
        if *working_set {
            writeln!(f, "  working set carried along")?;
        }
        writeln!(f, "  root     {root}")?;
        writeln!(f, "  digest   {digest}")
    }
}

/// Why a snapshot was not stored in another way. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The snapshot, or the one that it lies over, cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its memory cannot.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// What it holds of a disk cannot.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Nothing can lie over the other one.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The two are of machines with other memory.
    #[error("{child} has other memory than {parent} (size or layout), so it cannot be stored as changes of that")]
    OtherLayout {
        /// The snapshot that was to be the child.
        child: PathBuf,
        /// The one that was to be the parent.
        parent: PathBuf,
    },
    /// The new one cannot be written.
    #[error(transparent)]
    Create(#[from] CreateError),
}

/// Stores a snapshot with its memory packed. One that lies over another lies over the same again.
pub fn pack(source: &Path, target: &Path, job: &Job<'_>) -> Result<Written, StoreError> {
    let snapshot = load::open(source)?;
    store(&snapshot, Base::parent_of(&snapshot)?.as_ref(), Form::Packed, target, job)
}

/// Stores a snapshot so that it stands alone.
pub fn flatten(source: &Path, target: &Path, form: Form, job: &Job<'_>) -> Result<Written, StoreError> {
    store(&load::open(source)?, None, form, target, job)
}

/// Stores what differs in the snapshot `child` from the snapshot `parent`, and all of its state and disks, as a snapshot that lies
/// over the parent.
pub fn write_diff(
    parent: &Path,
    child: &Path,
    target: &Path,
    form: Form,
    job: &Job<'_>,
) -> Result<Written, StoreError> {
    let (parent, child) = (load::open(parent)?, load::open(child)?);
    let layout = |snapshot: &Snapshot| snapshot.manifest().memory.regions.clone();
    if layout(&parent) != layout(&child) {
        return Err(StoreError::OtherLayout { child: child.dir().to_owned(), parent: parent.dir().to_owned() });
    }
    let base = Base::open(&parent)?;
    base.can_be_parent()?;
    store(&child, Some(&base), form, target, job)
}

fn store(
    snapshot: &Snapshot,
    over: Option<&Base>,
    form: Form,
    target: &Path,
    job: &Job<'_>,
) -> Result<Written, StoreError> {
    let image = MemoryImage::open(snapshot)?;
    let state = snapshot.state_bytes()?;
    // Advice: one that is of no use is left behind.
    let working_set = WorkingSet::load(snapshot).ok().flatten();
    let mut staging = Staging::begin(target)?;
    staging.limit(job.max_bytes.unwrap_or(u64::MAX));
    for drive in &snapshot.manifest().devices.drives {
        if let Some(held) = snapshot.open_trusted_disk(drive)? {
            staging.copy_held(snapshot, drive, &held, job.cancel)?;
        }
    }
    let regions = &snapshot.manifest().memory.regions;
    let memory = match (form, over) {
        (Form::Packed, over) => {
            let hot = working_set.as_ref().map(|set| set.read().union(set.written())).unwrap_or_default();
            let packing = Packing { image: &image, regions, over, hot: &hot };
            staging.write_packed(packing, job.cancel, job.progress)?
        }
        (Form::Raw, None) => staging.write_memory(&mut Whole { image: &image, regions, job }, job.cancel)?,
        (Form::Raw, Some(base)) => write_changes(&mut staging, base, &image, job)?,
    };
    if let Some(set) = &working_set {
        staging.write_working_set(set)?;
    }
    let image_bytes = memory.data_bytes();
    let manifest = staging.commit_as(memory, snapshot.manifest(), &state)?;
    Ok(Written {
        path: target.to_owned(),
        format_version: manifest.format_version,
        memory_bytes: manifest.memory.size_bytes,
        image_bytes,
        packed: manifest.memory.packed.is_some(),
        parent: manifest.memory.parent.map(|parent| parent.path),
        working_set: working_set.is_some(),
        root: manifest.memory.root,
        digest: manifest.digest,
    })
}

/// The memory of a snapshot, as a source of another: checked as it is read.
struct Whole<'a> {
    image: &'a MemoryImage,
    regions: &'a [MemoryRegion],
    job: &'a Job<'a>,
}

impl MemorySource for Whole<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn regions(&self) -> Vec<MemoryRegion> {
        self.regions.to_vec()
    }

    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        let chunks = self.image.chunks();
        let start = (from / CHUNK_BYTES..chunks).find(|index| !self.image.chunk_is_zero(*index));
        (self.job.progress)(start.map_or(self.size(), |index| index * CHUNK_BYTES), self.size());
        let Some(start) = start else { return Ok(None) };
        let end = (start..chunks).find(|index| self.image.chunk_is_zero(*index)).unwrap_or(chunks);
        Ok(Some(start * CHUNK_BYTES..(end * CHUNK_BYTES).min(self.size())))
    }

    /// Chunks are asked for as such.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_chunk(self.image, offset, buf, self.job.progress)
    }
}

fn write_changes(
    staging: &mut Staging,
    base: &Base,
    image: &MemoryImage,
    job: &Job<'_>,
) -> Result<MemoryDigest, StoreError> {
    // All of each chunk that differs: what is the same in it is left out when it is written.
    let mut clusters = Clusters::new(image.size());
    for index in (0..image.chunks()).filter(|index| !image.digests().agree(base.image().digests(), *index)) {
        clusters.set(pages_of(index), Cluster::Data);
    }
    let changes = Differences { image, clusters, progress: job.progress };
    let digest = staging.write_changes(base, &changes, Stored::Changes, job.cancel)?;
    (job.progress)(image.size(), image.size());
    Ok(digest)
}

/// Why two images were not compared.
pub(super) enum CompareFault {
    Cancelled,
    Image(ImageError),
}

/// Calls `look` with the bytes of each chunk in which two images of one size differ.
pub(super) fn compare(
    a: &MemoryImage,
    b: &MemoryImage,
    cancel: &dyn Cancel,
    progress: &dyn Fn(u64, u64),
    mut look: impl FnMut(u64, &[u8], &[u8]),
) -> Result<(), CompareFault> {
    let (mut left, mut right) = (vec![0; CHUNK_BYTES as usize], vec![0; CHUNK_BYTES as usize]);
    for index in (0..a.chunks()).filter(|index| !a.digests().agree(b.digests(), *index)) {
        if cancel.is_cancelled() {
            return Err(CompareFault::Cancelled);
        }
        let len = a.read_chunk(index, &mut left).map_err(CompareFault::Image)?;
        b.read_chunk(index, &mut right).map_err(CompareFault::Image)?;
        look(index, &left[..len], &right[..len]);
        progress(index * CHUNK_BYTES + len as u64, a.size());
    }
    progress(a.size(), a.size());
    Ok(())
}

/// The chunks of an image that differ from another's.
struct Differences<'a> {
    image: &'a MemoryImage,
    clusters: Clusters,
    progress: &'a dyn Fn(u64, u64),
}

impl LayerSource for Differences<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    /// Chunks are asked for as such.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_chunk(self.image, offset, buf, self.progress)
    }
}

/// Reads the chunk that begins at `offset`, which is as long as `buf`, and tells how far that is.
fn read_chunk(image: &MemoryImage, offset: u64, buf: &mut [u8], progress: &dyn Fn(u64, u64)) -> io::Result<()> {
    if !offset.is_multiple_of(CHUNK_BYTES) || image.digests().chunk_len(offset / CHUNK_BYTES) != buf.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    image.read_chunk(offset / CHUNK_BYTES, buf).map_err(io::Error::other)?;
    progress(offset + buf.len() as u64, image.size());
    Ok(())
}
