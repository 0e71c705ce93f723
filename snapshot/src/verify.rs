//! Checking a snapshot in full, memory included.

use crate::disk::{self, DiskError};
use crate::image::{self, ImageError, MemoryImage};
use crate::load::{self, LoadError};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// What was found right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The directory.
    pub path: PathBuf,
    /// Version of the format.
    pub format_version: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// How many snapshots its memory is made of: itself, and those that it lies over.
    pub levels: u64,
    /// Memory that the files hold data for and that was therefore read, in bytes.
    pub checked_bytes: u64,
    /// Chunks of memory that are all zero.
    pub zero_chunks: u64,
    /// Chunks of memory.
    pub chunks: u64,
    /// Root digest of the memory, in hex.
    pub root: String,
    /// Bytes of disks that the snapshot holds and that were therefore read.
    pub disk_bytes: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report {
            path,
            format_version,
            vcpus,
            memory_bytes,
            levels,
            checked_bytes,
            zero_chunks,
            chunks,
            root,
            disk_bytes,
        } = self;
        writeln!(f, "{} is whole: every byte is what was written", path.display())?;
        writeln!(f, "  format   {format_version}")?;
        writeln!(f, "  machine  {vcpus} vCPU{}, {} MiB", if *vcpus == 1 { "" } else { "s" }, memory_bytes >> 20)?;
        writeln!(f, "  memory   {} KiB read; {zero_chunks} of {chunks} chunks are zero", checked_bytes >> 10)?;
        if *levels > 1 {
            writeln!(f, "  chain    of {levels} snapshots")?;
        }
        writeln!(f, "  root     {root}")?;
        if *disk_bytes > 0 {
            writeln!(f, "  disks    {} KiB read", disk_bytes >> 10)?;
        }
        Ok(())
    }
}

/// Why a snapshot is not what it was made as.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Its small files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its memory image cannot be read or does not belong to it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// What it holds of a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Chunks of its memory image are damaged.
    #[error("{first} (damaged chunks in all: {damaged} of {chunks})")]
    Damaged {
        /// The first of them.
        first: ImageError,
        /// How many.
        damaged: u64,
        /// How many chunks there are.
        chunks: u64,
    },
}

/// Reads and checks everything. What is right is stamped, so that restores need not check it.
pub fn verify(path: &Path) -> Result<Report, VerifyError> {
    let snapshot = load::open(path)?;
    let image = MemoryImage::open(&snapshot)?;
    let manifest = snapshot.manifest();
    let levels = image::levels(&snapshot)?;
    let (mut first, mut damaged, mut checked_bytes) = (None, 0, 0);
    // From below: what a level is compared with is right by then.
    for at in (0..levels.len()).rev() {
        let before = image::stamp_of(levels[at])?;
        let checked = image::check_level(&levels[at..])?;
        damaged += checked.damaged;
        checked_bytes += checked.bytes;
        match checked.first {
            Some(fault) => first = first.or(Some(fault)),
            None => image::stamp(levels[at], &before)?,
        }
    }
    if let Some(first) = first {
        return Err(VerifyError::Damaged { first, damaged, chunks: image.chunks() });
    }
    let mut disk_bytes = 0;
    for drive in &manifest.devices.drives {
        disk_bytes += disk::check(&snapshot, drive)?;
    }

    Ok(Report {
        path: snapshot.dir().to_owned(),
        format_version: manifest.format_version,
        vcpus: manifest.machine.vcpus,
        memory_bytes: manifest.machine.memory_bytes,
        levels: levels.len() as u64,
        checked_bytes,
        zero_chunks: (0..image.chunks()).filter(|i| image.chunk_is_zero(*i)).count() as u64,
        chunks: image.chunks(),
        root: manifest.memory.root.clone(),
        disk_bytes,
    })
}
